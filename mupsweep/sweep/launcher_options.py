"""The options of a launcher that planning needs: how many devices share a run, and how many runs train at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class LauncherOptions:
    """What a run costs, and how long a sweep takes, depends on these options alone; a launcher may have others.

    Attributes:
        name: of the launcher.
        devices_per_run: how many devices train one run together.
        shard: whether those devices divide its weights, gradients and optimizer state.
        threads: CPU threads of each device's process.
        slots_per_device: runs that train on a device at once; None leaves the number to the launcher.
        devices: torch devices, one or a list; "auto" leaves them to the launcher.
        sizes: the options of each size that has others, by the size's name.
    """

    name: str = ""
    devices_per_run: int = 1
    shard: bool = False
    threads: int = 1
    slots_per_device: int | None = None
    devices: Any = "auto"
    sizes: Mapping[str, LauncherOptions] = field(default_factory=dict)

    @classmethod
    def parse(cls, section: Mapping[str, Any]) -> LauncherOptions:
        """Read the launcher section of a config, whose class has refused wrong values before."""
        common = _known(section)
        overrides = {str(size): _known(values) for size, values in (section.get("sizes") or {}).items()}
        return cls(**common, sizes={size: cls(**{**common, **values}) for size, values in overrides.items()})

    @property
    def device_kind(self) -> str | None:
        """The kind of the devices that are named, such as cuda; None where none is."""
        named = self.devices if isinstance(self.devices, list | tuple) else [self.devices]
        first = str(named[0]) if named else "auto"
        return None if first == "auto" else first.partition(":")[0]

    def for_size(self, size: str) -> LauncherOptions:
        """Return the options of a size, by its name."""
        return self.sizes.get(size, self)

    def sections(self) -> Iterator[tuple[str, LauncherOptions]]:
        """Yield the common options and those of every size in `sizes`, each with its place in the config."""
        yield "launcher", self
        for size, options in self.sizes.items():
            yield f"launcher.sizes.{size}", options


def _known(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a section that planning needs; a launcher of the user's may have none of them."""
    return {f.name: section[f.name] for f in fields(LauncherOptions) if f.name != "sizes" and f.name in section}
