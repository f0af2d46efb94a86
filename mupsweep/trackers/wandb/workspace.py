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
    """Create the sweep's Workspace or overwrite the one that it has, and return its address."""
    if importlib.util.find_spec("wandb_workspaces") is None:
        log.warning("no W&B Workspace: pip install 'mupsweep[workspaces]', or set tracker.workspace=false")
        return None
    import wandb_workspaces.workspaces as ws

    start_service()
    urls_path = sweep.trackers / "wandb" / "workspace.json"
    workspace = ws.Workspace(
        entity=entity,
        project=project,
        name=f"{sweep.name} LR transfer",
        sections=_sections(sweep),
        runset_settings=ws.RunsetSettings(
            filters=ws.And(ws.Metric("Group") == sweep.name),
            groupby=[ws.Config("curve"), ws.Config("size")],
        ),
    )
    url = (read_json(urls_path) or {}).get(f"{entity}/{project}")
    if isinstance(url, str):
        try:
            existing = ws.Workspace.from_url(url)
            workspace._internal_name, workspace._internal_id = existing._internal_name, existing._internal_id
        except ValueError:  # it was deleted
            pass
    workspace.save()
    make_folder(urls_path.parent)
    write_json(urls_path, (read_json(urls_path) or {}) | {f"{entity}/{project}": workspace.url})
    return workspace.url


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
