"""A sweep in a notebook: records, curves and verdicts as dataclasses, and as pandas frames where asked for.

Example:

>>> import mupsweep
>>> sweep = mupsweep.load("sweeps/demo")
>>> sweep
Sweep('sweeps/demo': 144 of 144 runs finished; adamw/mup in width transfers, adamw/sp in width drifts)
>>> best = min((run for run in sweep.runs if run.val_loss), key=lambda run: run.val_loss)
>>> best.parametrization, best.width, best.log2_lr
('sp', 256, -9.0)
>>> [point.log2_lr for point in sweep.curves[0].points if point.censored]
[-3.0]
>>> sp = sweep.verdicts[1]
>>> sp.parametrization, sp.verdict, round(sp.total_drift.value)
('sp', 'drifts', -2)

With `pip install 'mupsweep[notebook]'` the same as frames:

>>> frame = sweep.runs_frame().query("width in (32, 256)")
>>> frame.groupby(["parametrization", "width"]).val_loss.min().round(2).to_dict()
{('mup', 32): 2.91, ('mup', 256): 2.52, ('sp', 32): 2.86, ('sp', 256): 2.47}
>>> sweep.metrics_frame(["adamw-sp-w256-d4-lr-9-s0"]).columns.to_list()
['run_id', 'step', 'tokens', 'train_loss', 'lr', 'val_loss']
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mupsweep.analysis.analysis import Analysis, analyse
from mupsweep.analysis.curves import LossCurve
from mupsweep.analysis.run_result import COLUMNS, RunResult
from mupsweep.analysis.transfer import LadderResult
from mupsweep.documents import leaves
from mupsweep.errors import ConfigError
from mupsweep.formatting import counted
from mupsweep.report.norms import COLUMNS as NORM_COLUMNS
from mupsweep.report.norms import NormRow, read_norms
from mupsweep.report.results_files import curve_table, to_json
from mupsweep.store.results import read_runs
from mupsweep.store.sweep_dir import SweepDir
from mupsweep.sweep.config import analysis_config

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True)
class Sweep:
    """What a sweep's folder held when it was loaded; load it again to see more of one that is still trained.

    Attributes:
        analysis: curves, optima and verdicts with all that is known of them.
        planned: how many runs the sweep has.
    """

    folder: SweepDir
    analysis: Analysis
    planned: int

    @property
    def runs(self) -> tuple[RunResult, ...]:
        """Every finished run, by rising size."""
        return *self.analysis.runs, *self.analysis.changed

    @property
    def curves(self) -> tuple[LossCurve, ...]:
        """Loss versus LR of every size; a diverged run makes its point a censored one."""
        return self.analysis.curves

    @property
    def verdicts(self) -> tuple[LadderResult, ...]:
        """One for every variant and axis: verdict, reasons, drift, regret, and the optimum of every size."""
        return self.analysis.groups

    def metrics(self, run: RunResult | str) -> list[dict[str, Any]]:
        """What a run logged while it was trained, by step; also of a run that is not finished."""
        return self.folder.run(run if isinstance(run, str) else run.run_id).metrics()

    def norms(self) -> list[NormRow]:
        """||W||_R and relative update of every matrix, of the finished runs that tracked them."""
        return list(read_norms(self.folder, self.runs))

    def norms_frame(self) -> DataFrame:
        """A line per matrix and step, as in results/norms.csv."""
        return _frame([asdict(row) for row in self.norms()], NORM_COLUMNS)

    def runs_frame(self) -> DataFrame:
        """A line per finished run, as in results/runs.csv."""
        return _frame([asdict(run) for run in self.runs], COLUMNS)

    def curves_frame(self) -> DataFrame:
        """A line per size and LR, as in results/curves.csv."""
        columns, rows = curve_table(self.curves)
        return _frame(rows, columns)

    def metrics_frame(self, runs: Iterable[RunResult | str] | None = None) -> DataFrame:
        """A line per logged step of some runs, else of all finished ones."""
        chosen = [run if isinstance(run, str) else run.run_id for run in (self.runs if runs is None else runs)]
        return _frame([{"run_id": run_id, **row} for run_id in chosen for row in self.metrics(run_id)])

    def verdicts_frame(self) -> DataFrame:
        """A line per size of every verdict: the best LR and its regret, and the drift and verdict of its ladder."""
        rows = []
        for group in to_json(self.analysis)["groups"]:
            flat = {key: group[key] for key in ("model", "optimizer", "parametrization", "axis", "verdict")}
            flat |= leaves({key: group[key] for key in ("drift", "total_drift")}, separator="_")
            rows += [flat | dict(leaves(size, separator="_")) for size in group["sizes"]]
        return _frame(rows)

    def __repr__(self) -> str:
        said = [f"{'/'.join(g.label[1:])} in {g.axis} {g.verdict}" for g in self.verdicts]
        finished = {run.run_id.partition("@")[0] for run in self.runs}  # without the branches of a run
        told = f"{len(finished)} of {counted(self.planned, 'run')} finished"
        return f"Sweep({str(self.folder.path)!r}: {'; '.join([told, ', '.join(said)]) if said else told})"


def load(path: str | Path) -> Sweep:
    """Read and analyse a sweep's folder, finished or not. Writes nothing.

    Raises:
        RecordError: the folder is no sweep, or its plan is damaged.
    """
    folder = SweepDir.open(path)
    return Sweep(folder, analyse(read_runs([folder]), analysis_config(folder.read_config())), len(folder.read_plan()))


def _frame(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> DataFrame:
    try:
        import pandas
    except ImportError as error:
        raise ConfigError("frames need pandas: pip install 'mupsweep[notebook]'") from error
    # nan keeps a column of numbers numeric where some are not known
    known = [{key: math.nan if value is None else value for key, value in row.items()} for row in rows]
    return pandas.DataFrame(known, columns=None if columns is None else list(columns))
