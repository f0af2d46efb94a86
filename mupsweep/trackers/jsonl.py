"""The records themselves: metrics.jsonl, summary.json and results/ need no tracker."""

from __future__ import annotations

from dataclasses import dataclass

from mupsweep.records import RunDir, SweepDir


@dataclass(frozen=True)
class Jsonl:
    """Tells nobody else."""

    name: str = "jsonl"

    def finished(self, sweep: SweepDir, run: RunDir) -> None:
        pass

    def analysed(self, sweep: SweepDir) -> None:
        pass
