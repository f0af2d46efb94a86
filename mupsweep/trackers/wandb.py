"""Weights & Biases: a mirror of the records, one W&B run per training run and one that sums the sweep up.

Each W&B run is written whole from the records when its run ends, under an id that is always the same: resuming,
retrying and mirroring again never make a second one, and a run that is killed loses nothing.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from mupsweep.errors import ConfigError, nearest
from mupsweep.files import read_json
from mupsweep.records import RunDir, SweepDir

log = logging.getLogger("mupsweep")

MODES = ("offline", "online")


@dataclass
class Wandb:
    """Mirrors records to W&B.

    Attributes:
        project, entity: where on the server.
        mode: "offline" writes folders that `wandb sync` uploads later; "online" uploads when a run ends.
        init_timeout: seconds to wait for the server before carrying on offline.
    """

    name: str = "wandb"
    project: str = "mupsweep"
    entity: str | None = None
    mode: str = "offline"
    init_timeout: float = 20.0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"tracker.mode={self.mode}: {nearest(self.mode, MODES)}")
        try:
            import wandb  # noqa: F401
        except ImportError as error:
            raise ConfigError("tracker=wandb needs the wandb package: pip install 'mupsweep[wandb]'") from error

    def finished(self, sweep: SweepDir, run: RunDir) -> None:
        """One complete W&B run from a run's records."""
        summary = run.summary()
        if summary is None:
            return
        config = {**(yaml.safe_load(run.config_path.read_text()) or {}), "groups": run.groups()}
        tags = [summary["model"], summary["optimizer"], summary["parametrization"], summary["status"]]
        mirrored = self._init(sweep, f"{sweep.name}-{run.run_id}", run.run_id, "train", tags, config)
        mirrored.define_metric("tokens")
        mirrored.define_metric("*", step_metric="tokens")
        for row in run.metrics():
            mirrored.log(_logged(row))
        mirrored.summary.update(_logged(summary))
        mirrored.finish()

    def analysed(self, sweep: SweepDir) -> None:
        """The sweep's own W&B run: curves, drift table, verdicts and figures."""
        import wandb

        results = read_json(sweep.results / "transfer.json")
        if results is None:
            return
        config = {"sweep": sweep.name}
        mirrored = self._init(sweep, f"{sweep.name}-summary", f"{sweep.name} summary", "summary", [], config)
        drift = wandb.Table(
            columns=["group", "width", "depth", "log2_lr_optimum", "log2_lr_low", "log2_lr_high", "loss"]
        )
        for group in results["groups"]:
            label = "/".join(group[k] for k in ("model", "optimizer", "parametrization", "axis"))
            for size in group["sizes"]:
                drift.add_data(
                    label,
                    *(
                        size[k]
                        for k in (
                            "width",
                            "depth",
                            "log2_lr_optimum",
                            "log2_lr_low",
                            "log2_lr_high",
                            "loss_optimum",
                        )
                    ),
                )
            mirrored.summary[f"verdict/{label}"] = group["verdict"]
            mirrored.summary[f"drift/{label}"] = group["drift"]["octaves_per_doubling"]
        content: dict[str, Any] = {"drift": drift, "curves": _curves(sweep)}
        content |= {f"figures/{p.stem}": wandb.Image(str(p)) for p in sorted(sweep.figures.glob("*.png"))}
        mirrored.log(content)
        mirrored.finish()

    def _init(
        self,
        sweep: SweepDir,
        run_id: str,
        name: str,
        job_type: str,
        tags: list[str],
        config: Mapping[str, Any],
    ) -> Any:
        """A W&B run; offline where the server cannot be reached in time."""
        import wandb

        folder = sweep.trackers / "wandb"
        folder.mkdir(parents=True, exist_ok=True)
        settings = wandb.Settings(
            init_timeout=self.init_timeout, silent=True, console="off", x_disable_stats=True, disable_git=True
        )
        arguments: dict[str, Any] = {
            "project": self.project,
            "entity": self.entity,
            "id": run_id,
            "name": name,
            "group": sweep.name,
            "job_type": job_type,
            "tags": tags,
            "config": dict(config),
            "dir": str(folder),
            "settings": settings,
            "reinit": "finish_previous",
        }
        if self.mode == "online":
            try:
                return wandb.init(mode="online", **arguments)
            except (wandb.Error, OSError) as error:
                log.warning("W&B is out of reach (%s): writing offline; upload with `wandb sync %s`", error, folder)
                self.mode = "offline"  # once is enough: do not wait again at every run
        for older in (folder / "wandb").glob(f"offline-run-*-{run_id}"):
            shutil.rmtree(older)  # two offline folders of one id would overwrite each other when they are synced
        return wandb.init(mode="offline", **arguments)


def _curves(sweep: SweepDir) -> Any:
    """results/curves.csv as a W&B table."""
    import csv

    import wandb

    with (sweep.results / "curves.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    return wandb.Table(columns=list[str | int](header), data=[[_number(cell) for cell in row] for row in rows])


def _number(cell: str) -> str | float | None:
    if cell == "":
        return None
    try:
        return float(cell)
    except ValueError:
        return cell


def _logged(row: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in row.items() if v is not None}
