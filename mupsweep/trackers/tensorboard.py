"""TensorBoard: a folder of event files per run, written by tensorboardX, which needs neither torch nor TensorFlow.

`tensorboard --logdir SWEEP/trackers/tensorboard` shows rows over steps, and the runs as hyperparameter trials.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mupsweep.store.run_dir import RunDir
from mupsweep.store.sweep_dir import SweepDir
from mupsweep.trackers import LocalTracker, RunLogger, SyncState, require_package

HPARAMS = ("model", "optimizer", "parametrization", "width", "depth", "log2_lr", "seed")


@dataclass
class TensorBoard(LocalTracker):
    """Writes event files under the sweep.

    Attributes:
        flush_seconds: the longest time until a row is on the disk.
    """

    name: str = "tensorboard"
    flush_seconds: int = 10

    def __post_init__(self) -> None:
        require_package(self.name, "tensorboardX")

    def open(self, sweep: SweepDir, run: RunDir) -> RunLogger:
        folder = sweep.trackers / self.name / run.run_id
        sync_state = self.sync_state(sweep)
        sync_state.remove(run)
        shutil.rmtree(folder, ignore_errors=True)  # event files can only grow: a resumed run is written anew
        return TensorBoardLogger(run, folder, self.flush_seconds, sync_state)


class TensorBoardLogger:
    """Writes the event files of one run."""

    def __init__(self, run: RunDir, folder: Path, flush_seconds: int, sync_state: SyncState) -> None:
        from tensorboardX import SummaryWriter

        self.run, self.sync_state = run, sync_state
        self.writer = SummaryWriter(logdir=str(folder), flush_secs=flush_seconds)
        self.writer.add_text("config", f"```\n{run.config_path.read_text()}\n```")

    def add(self, row: Mapping[str, Any]) -> None:
        for key, value in row.items():
            if key not in ("step", "tokens") and value is not None:
                self.writer.add_scalar(key, value, global_step=row["step"])

    def close(self, status: str) -> None:
        summary = self.run.summary()
        if summary is not None:
            metrics = {key: summary[key] for key in ("val_loss", "train_loss") if summary[key] is not None}
            hparams = {key: summary[key] for key in HPARAMS} | {"status": status}
            self.writer.add_hparams(hparams, metrics, name="trial")
        self.writer.close()
        self.sync_state.write(self.run)
