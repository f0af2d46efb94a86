"""The tables of the HTML report with the init, multiplier, LR, weight decay and eps of every tensor."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

from mupsweep.sweep.tensor_rules import TensorRule

COLUMNS = (
    *("role", "shape", "optimizer", "init std", "multiplier"),
    *("LR", "LR ratio", "weight decay ratio", "eps ratio", "tensors"),
)


def table_rows(tensors: Iterable[TensorRule]) -> list[tuple[str, ...]]:
    """Rows of the table: tensors that are treated alike share one, and layers are written as *."""
    rows: dict[tuple[str, ...], dict[str, None]] = defaultdict(dict)
    for t in tensors:
        std = f"{t.init_std:.4g}" if t.init.value in ("normal", "own") else t.init.value
        numbers = (t.multiplier, t.lr, t.lr_ratio, t.weight_decay_ratio, t.eps_ratio)
        shape = " × ".join(map(str, t.shape))
        name = re.sub(r"\.\d+\.", ".*.", t.name) + (f" = {t.tied_to}" if t.tied_to else "")
        rows[t.role.value, shape, t.optimizer, std, *(f"{n:.4g}" for n in numbers)][name] = None
    return [(*row, ", ".join(names)) for row, names in rows.items()]
