"""A saved W&B Workspace of one sweep: loss versus LR and the drift of its optimum by parametrization, then training."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

from mupsweep.atomic_files import make_folder, read_json, write_json
from mupsweep.store.sweep_dir import SweepDir
from mupsweep.trackers.wandb import start_service, summary

log = logging.getLogger("mupsweep")


def save(sweep: SweepDir, entity: str, project: str) -> str | None:
    """Make the sweep's Workspace, or write the one that it has anew; its address."""
    if importlib.util.find_spec("wandb_workspaces") is None:
        log.warning("no W&B Workspace: pip install 'mupsweep[workspaces]', or set tracker.workspace=false")
        return None
    import wandb_workspaces.workspaces as ws

    start_service()
    remembered = sweep.trackers / "wandb" / "workspace.json"
    made = ws.Workspace(
        entity=entity,
        project=project,
        name=f"{sweep.name} LR transfer",
        sections=_sections(sweep),
        runset_settings=ws.RunsetSettings(
            filters=ws.And(ws.Metric("Group") == sweep.name),
            groupby=[ws.Config("curve"), ws.Config("size")],
        ),
    )
    older = (read_json(remembered) or {}).get(f"{entity}/{project}")
    if older is not None:
        try:
            found = ws.Workspace.from_url(older)
            made._internal_name, made._internal_id = found._internal_name, found._internal_id
        except ValueError:  # somebody deleted it
            pass
    made.save()
    make_folder(remembered.parent)
    write_json(remembered, (read_json(remembered) or {}) | {f"{entity}/{project}": made.url})
    return made.url


def _sections(sweep: SweepDir) -> list[Any]:
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    def chart(key: str) -> Any:
        """A line-series chart of the summary run."""
        return wr.CustomChart(
            query={"summaryTable": {"tableKey": f"{key}_table"}},
            chart_name="wandb/lineseries/v0",
            chart_fields={"step": "step", "lineKey": "lineKey", "lineVal": "lineVal"},
            chart_strings={"title": key},
        )

    curves, drift = summary.curve_charts(sweep), summary.drift_charts(sweep)
    runs = wr.ScatterPlot(
        title="every run: loss versus LR", x=wr.Config("log2_lr"), y=wr.SummaryMetric("val_loss"), z=wr.Config("width")
    )
    training = [wr.LinePlot(title=key, x="tokens", y=[key]) for key in ("train_loss", "val_loss", "lr", "grad_norm")]
    return [
        ws.Section(name="Loss versus LR", panels=[*map(chart, curves), runs], is_open=True),
        ws.Section(name="Drift of the best LR", panels=[chart(key) for key in drift], is_open=True),
        ws.Section(name="Training", panels=[*training], is_open=False),
    ]
