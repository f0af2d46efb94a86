"""What planning reads of a launcher's section."""

from __future__ import annotations

from mupsweep.sweep.config import from_tree, load, to_tree
from mupsweep.sweep.launcher_options import LauncherOptions

SIZES = "launcher.sizes={w32-d2:{devices_per_run:2,shard:true,threads:4}}"


def test_a_size_has_its_own_options_and_the_common_ones_where_it_has_none() -> None:
    options = load(["experiment=smoke", "launcher=local", "launcher.slots_per_device=3", SIZES]).launcher_options
    common = LauncherOptions(name="local", slots_per_device=3)
    wide = LauncherOptions(name="local", slots_per_device=3, devices_per_run=2, shard=True, threads=4)
    assert options.for_size("w16-d2") is options
    assert options.for_size("w32-d2") == wide
    assert options == LauncherOptions(name="local", slots_per_device=3, sizes={"w32-d2": wide})
    assert dict(options.sections()) == {"launcher": options, "launcher.sizes.w32-d2": wide}
    assert wide.for_size("w32-d2") is wide
    assert LauncherOptions.parse({**vars(common), "sizes": None}) == common


def test_a_launcher_without_these_keys_trains_each_run_on_one_device_with_one_thread() -> None:
    options = LauncherOptions.parse({"kind": "mine.Launcher", "name": "mine", "prefix": ["nice"]})
    assert options == LauncherOptions(
        "mine", devices_per_run=1, shard=False, threads=1, slots_per_device=None, sizes={}
    )


def test_the_stored_config_keeps_the_whole_section() -> None:
    config = load(["experiment=smoke", "launcher=local", SIZES])
    assert config.launcher_options.sizes.keys() == {"w32-d2"}
    assert to_tree(config)["launcher"] == config.launcher
    assert "launcher_options" not in to_tree(config)
    assert from_tree(to_tree(config)) == config
