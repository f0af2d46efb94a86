"""Twins: runs of several variants that are one training, as those of SP and muP at the base size are."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import asdict

from mupsweep.sweep.config import Variant
from mupsweep.sweep.run_spec import RunSpec
from mupsweep.sweep.tensor_rules import clip_norm, multipliers, rules


class Twins:
    """The twins among some runs.

    Training reads a parametrization only through the numbers of the tensors. So two runs whose parametrizations give
    every tensor equal numbers, and that differ in nothing else, are one training bit for bit.
    """

    def __init__(self, runs: Sequence[RunSpec]) -> None:
        variants = {run.resolved.digest: run.resolved.variant for run in runs}
        self._settings = {digest: _without_parametrization(variant) for digest, variant in variants.items()}
        self._candidates: dict[Hashable, list[RunSpec]] = defaultdict(list)
        for run in runs if len({*self._settings.values()}) < len(variants) else ():
            self._candidates[self._key(run)].append(run)

    def of(self, run: RunSpec) -> list[RunSpec]:
        """The other runs that are the same training as `run`, in the order of the plan."""
        if run.resolved.trainer.runs_program:  # which may read the parametrization's name
            return []
        candidates = [other for other in self._candidates.get(self._key(run), ()) if other.run_id != run.run_id]
        numbers = _numbers(run) if candidates else None
        return [other for other in candidates if _numbers(other) == numbers]

    def _key(self, run: RunSpec) -> Hashable:
        return self._settings[run.resolved.digest], run.size, run.log2_lr, run.seed


def distinct(runs: Sequence[RunSpec]) -> list[RunSpec]:
    """The runs without those that are twins of an earlier one."""
    twins, seen = Twins(runs), set[str]()
    kept = []
    for run in runs:
        if run.run_id not in seen:
            kept.append(run)
            seen |= {twin.run_id for twin in twins.of(run)}
    return kept


def _without_parametrization(variant: Variant) -> str:
    """Everything that a variant is, but for its parametrization."""
    tree = asdict(variant)
    del tree["parametrization"]
    return json.dumps(tree, sort_keys=True)


def _numbers(run: RunSpec) -> Hashable:
    """Everything that training reads from the parametrization of a run."""
    tensors = tuple(json.dumps(asdict(rule), sort_keys=True) for rule in rules(run.resolved, run.size, run.base_lr))
    return tensors, multipliers(run.resolved, run.size), clip_norm(run.resolved)
