"""How a router's logits move with the width as training goes on, under its rule and under other powers of its LR.

Trains `model=moe` with AdamW under muP at widths 32 to 256, two seeds, and prints after some step counts the exponents
in the width of the RMS of what changed on the probe batch of `mupsweep check`. Figures in mupsweep/models/ROLES.md come
from here; the argument is the power of r_n by which the router's LR differs from its rule.

    python scripts/measure_router.py
    python scripts/measure_router.py 0.5 'sweep.width_ratios=[1,2,4]'
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from dataclasses import replace

import torch

from mupsweep.check import coordinate_check
from mupsweep.check.measure import CHANGE, FEATURES, LOGITS, ROUTING, measure
from mupsweep.check.regression import slope
from mupsweep.models.shape import Size
from mupsweep.scaling import Role
from mupsweep.sweep import tensor_rules
from mupsweep.sweep.run_spec import ResolvedVariant
from mupsweep.sweep.tensor_rules import TensorRule
from mupsweep.training import build

AT = (2, 10, 30, 100, 200)
LOG2_LR = -7.0
WATCHED = (ROUTING, CHANGE + ROUTING, CHANGE + FEATURES, CHANGE + LOGITS)
CHECK = ("model=moe", "parametrization=mup", "sweep.depth_ratios=[1]", "sweep.seeds=[0,1]", f"training.steps={AT[-1]}")


def change_router_lr(power: float) -> None:
    """Let every run be built with a router's LR that is r_n^power times its rule's."""
    solved = tensor_rules.rules

    def changed(resolved: ResolvedVariant, size: Size, base_lr: float) -> tuple[TensorRule, ...]:
        factor = size.width_ratio**power
        rows = solved(resolved, size, base_lr)
        return tuple(replace(row, lr=row.lr * factor) if row.role is Role.ROUTER else row for row in rows)

    build.rules = changed


def main() -> None:
    torch.set_num_threads(1)
    coordinate_check.STEPS = AT  # of which `subject` takes as many
    power, *overrides = sys.argv[1:] or ["0"]
    change_router_lr(float(power))
    config = coordinate_check.load([*CHECK, *overrides], None)
    variant = next(v for v in config.variants if v.names[-1] == "mup")
    values: dict[tuple[str, int], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in coordinate_check.runs_of(variant, replace(config.sweep, log2_lrs=(LOG2_LR,))):
        measured = measure(coordinate_check.subject(run), AT)
        for count in AT:
            for quantity in WATCHED:
                values[quantity, count][run.size.width].append(measured[count][quantity, ""])
    for quantity in WATCHED:
        for count in AT:
            widths = sorted(values[quantity, count])
            means = [math.exp(sum(map(math.log, v)) / len(v)) for v in (values[quantity, count][w] for w in widths)]
            print(f"{quantity:24} after {count:3}: width^{slope(widths, means)}")


if __name__ == "__main__":
    main()
