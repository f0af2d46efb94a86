"""Trackers show the records to somebody else: one file and one yaml each. They read records and decide nothing.

A tracker is told when a run ended and when a sweep was analysed; what goes wrong there is a warning, never an error.
"""

from __future__ import annotations

import logging
from typing import Protocol

from mupsweep.records import RunDir, SweepDir
from mupsweep.sections import instantiate

log = logging.getLogger("mupsweep")


class Tracker(Protocol):
    """A dataclass under `trackers/`; its fields are the keys of its yaml."""

    def finished(self, sweep: SweepDir, run: RunDir) -> None:
        """A run ended with a result."""
        ...

    def analysed(self, sweep: SweepDir) -> None:
        """The sweep's results were written."""
        ...


class Safe:
    """Carries on without a tracker that fails."""

    def __init__(self, tracker: Tracker, sweep: SweepDir) -> None:
        self.tracker, self.sweep = tracker, sweep

    def finished(self, run: RunDir) -> None:
        self._try(lambda: self.tracker.finished(self.sweep, run))

    def analysed(self) -> None:
        self._try(lambda: self.tracker.analysed(self.sweep))

    def _try(self, call: object) -> None:
        try:
            call()  # type: ignore[operator]
        except Exception as error:  # a tracker is a view: nothing that it does may cost a run
            log.warning("tracker: %s: %s; training goes on, the records are complete", type(error).__name__, error)


def load(sweep: SweepDir) -> Safe:
    """The tracker that a sweep's config names."""
    return Safe(instantiate(sweep.read_config()["tracker"], "tracker"), sweep)
