"""Synthetic sweeps: quadratic valleys of loss over log2 LR, a cliff to their right, divergence beyond it."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from mupsweep.analysis.analysis import Analysis
from mupsweep.atomic_files import write_json
from mupsweep.report.html import page
from mupsweep.scaling import Init, Role
from mupsweep.store.results import read
from mupsweep.store.sweep_dir import SweepDir
from mupsweep.sweep.tensor_rules import TensorRule

Rows = list[dict[str, Any]]
TREE = {"variants": [], "sweep": {"name": "demo"}, "launcher": {}, "tracker": {}}
DRIFT = {"sp": -0.76, "mup": 0.05}  # octaves per doubling of width


def valley(
    widths: Iterable[int] = (16, 32, 64, 128),
    log2_lrs: Iterable[float] = (-11, -10, -9, -8, -7, -6, -5, -4),
    seeds: int = 3,
    parametrizations: Iterable[str] = ("sp", "mup"),
    optimizer: str = "adamw",
    model: str = "nanogpt",
    noise: float = 0.003,
    depths: Iterable[int] = (4,),
) -> Rows:
    """The rows of a sweep whose optimum is at 2^-7 at width 32, depth 4."""
    draw = random.Random(0)
    rows: Rows = []
    for parametrization in parametrizations:
        for width, depth in ((w, d) for w in widths for d in depths if w == 32 or d == 4):
            best = -7 + DRIFT.get(parametrization, 0.0) * math.log2(width / 32)
            floor = 2.9 - 0.13 * math.log2(width / 32) + (0.05 if parametrization == "mup" else 0.0) - 0.01 * depth
            for log2_lr in log2_lrs:
                beyond = log2_lr - best - 2.6
                for seed in range(seeds):
                    loss = floor + 0.035 * (log2_lr - best) ** 2 + 2.0 * max(0.0, beyond) ** 2 + draw.gauss(0, noise)
                    diverged = beyond + 0.2 * seed > 0.8
                    rows.append(
                        {
                            "run_id": re.sub(
                                r"[^\w.+@-]",
                                "_",
                                f"{optimizer}-{parametrization}-w{width}-d{depth}-lr{log2_lr}-s{seed}",
                            ).lstrip("_"),
                            "model": model,
                            "parametrization": parametrization,
                            "optimizer": optimizer,
                            "width": width,
                            "depth": depth,
                            "width_ratio": width / 32,
                            "depth_ratio": depth / 4,
                            "log2_lr": float(log2_lr),
                            "seed": seed,
                            "status": "diverged" if diverged else "done",
                            "steps": 300,
                            "tokens": 153600,
                            "train_loss": None if diverged else loss - 0.02,
                            "val_loss": None if diverged else loss,
                            "val_bits_per_byte": None if diverged else loss / math.log(2),
                            "diverged_at_step": 40 if diverged else None,
                            "seconds": 3.5,
                            "tokens_per_second": 44000.0,
                            "device": "cpu",
                        }
                    )
    return rows


@pytest.fixture(scope="session")
def rows() -> Callable[..., Rows]:
    """Makes the rows of a sweep: `rows(widths=..., log2_lrs=..., seeds=..., ...)`."""
    return valley


def write_sweep(folder: Path, rows: Rows, pending: int = 0, name: str = "demo") -> SweepDir:
    """A sweep folder that holds these finished runs, and some that never started; seed 0 has logged its losses."""
    sweep = SweepDir(folder / name)
    sweep.path.mkdir(parents=True)
    keys = [k for k in rows[0] if k not in ("status", "train_loss", "val_loss")] if rows else []
    plan = [
        {k: row[k] for k in keys} | {"variant": "v", "parameters": 12 * 4 * row["width"] ** 2, "flops": _flops(row)}
        for row in rows
    ]
    plan += [{**plan[0], "run_id": f"pending-{i}"} for i in range(pending)]
    sweep.write_plan(plan)
    sweep.write_config(TREE, "mupsweep run parametrization=sp,mup sweep.name=demo")
    write_json(sweep.environment_path, {"python": "3.11.7", "git": {"commit": "0" * 40, "dirty": False}, "gpu": None})
    for row in rows:
        if row["seed"] == 0:
            run = sweep.run(row["run_id"])
            run.path.mkdir(parents=True)
            run.write_metrics(logged(row["val_loss"] or 6.0))
    return sweep


def _flops(row: dict[str, Any]) -> float:
    return 6.0 * 12 * row["depth"] * row["width"] ** 2 * row["tokens"]


def logged(end: float) -> Rows:
    """The metrics of a run of 300 steps: validation losses now and then, a training loss that is no number."""
    rows: Rows = []
    for step in range(10, 301, 10):
        loss = end + 3 * math.exp(-step / 60)
        row = {"step": step, "tokens": 512 * step, "train_loss": math.nan if step == 50 else loss - 0.03, "lr": 0.01}
        rows.append(row | ({"val_loss": loss} if step % 60 == 0 else {}))
    return rows


@pytest.fixture(scope="session")
def save() -> Callable[..., SweepDir]:
    """Writes rows as a sweep folder: `save(folder, rows, pending=0, name="demo")`."""
    return write_sweep


@pytest.fixture(scope="session")
def write_html() -> Callable[..., Path]:
    """Writes the report of a saved sweep, whose runs it finishes first: `write_html(sweep, analysis, rules=())`."""
    return finish_and_write


def finish_and_write(sweep: SweepDir, analysis: Analysis, rules: Sequence[tuple[str, list[TensorRule]]] = ()) -> Path:
    for result in analysis.runs:
        run = sweep.run(result.run_id)
        run.path.mkdir(parents=True, exist_ok=True)
        write_json(run.summary_path, asdict(result), durable=False)
        run.write_status(result.status, durable=False)
    return page.write(sweep, analysis, rules, read([sweep])[1][0])


@pytest.fixture
def save_sweep(save: Callable[..., SweepDir], tmp_path: Path) -> Callable[..., SweepDir]:
    """The same below the test's own folder: `save_sweep(rows, ...)`."""
    return lambda *args, **kwargs: save(tmp_path, *args, **kwargs)


@pytest.fixture(scope="session")
def rule() -> TensorRule:
    """What one tensor is trained with."""
    return TensorRule(
        name="blocks.0.mlp.up.weight",
        role=Role.HIDDEN,
        shape=(256, 64),
        optimizer="adamw",
        init=Init.NORMAL,
        init_std=0.0125,
        multiplier=0.5,
        lr=0.001,
        weight_decay=0.1,
        decay_per_step=1e-4,
        eps=1e-8,
        thresholds={},
        init_var_ratio=0.5,
        multiplier_ratio=1.0,
        lr_ratio=0.4375,
        weight_decay_ratio=2.0,
        eps_ratio=0.25,
        tied_to=None,
    )


@pytest.fixture(scope="session")
def check() -> Callable[[], dict[str, Any]]:
    """Makes what `mupsweep check --into SWEEP` keeps: SP grows with the width, muP breaks one promise."""
    return lambda: {"variants": [checked("sp", 1.0), checked("mup", 0.0)]}


def checked(name: str, exponent: float) -> dict[str, Any]:
    """One variant, whose features and logits grow with this exponent."""

    def row(quantity: str, role: str | None, promised: str | None, off: list[str]) -> dict[str, Any]:
        interval = {"value": exponent, "low": exponent - 0.02, "high": exponent + 0.02}
        after = {str(n): {**interval, "values": [n * (w / 32) ** exponent for w in (32, 64, 128)]} for n in (2, 10)}
        shared = {"axis": "width", "quantity": quantity, "role": role, "promised": promised, "sizes": [32, 64, 128]}
        return {**shared, "judged": interval, "after": after, "shown": True, "off": off}

    kept = "0" if exponent == 0 else None
    rows = [row("change of features", None, kept, []), row("change of logits", None, kept, [])]
    rows.append(row("||dW||_R", "hidden", kept, ["blocks.*.mlp.up.weight"] if kept else []))
    label = {"model": "nanogpt", "optimizer": "adamw", "parametrization": name}
    return {**label, "log2_lr": -8.0, "passed": kept is None, "causes": ["its LR & eps"] if kept else [], "roles": rows}
