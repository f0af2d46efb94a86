"""The records themselves: metrics.jsonl, summary.json and results/ need no tracker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mupsweep.store.run_dir import RunDir
from mupsweep.store.sweep_dir import SweepDir
from mupsweep.trackers import RunLogger


@dataclass(frozen=True)
class Jsonl:
    """A tracker that mirrors nothing."""

    name: str = "jsonl"

    @property
    def active(self) -> bool:
        return False

    def open(self, sweep: SweepDir, run: RunDir) -> RunLogger:
        raise NotImplementedError("the records are there already")

    def held(self, sweep: SweepDir) -> Mapping[str, str]:
        return {}

    def analysed(self, sweep: SweepDir) -> None:
        pass
