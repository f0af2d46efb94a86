"""The joint search of the LR and one other hyperparameter: at every size, the values around the best one.

The values of an axis lie in a row, the default's among them. At the base the search begins beside the default, at every
other size beside the value that was best at the size before. Each value has an LR search of its own, which begins where
the best LRs of other values point. Then the search walks: a neighbour of a value that may be the best is searched too,
until these lie between values that are worse, or at an end of the row.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from mupsweep.analysis.config import AnalysisConfig
from mupsweep.analysis.curves import collect
from mupsweep.analysis.labels import HyperparameterOverride, Label
from mupsweep.analysis.optimum import Optimum
from mupsweep.analysis.run_result import RunResult
from mupsweep.sweep.config import GridConfig
from mupsweep.sweep.lr_search import LATTICE
from mupsweep.sweep.size_search import AROUND, Ratios, SearchState, best_of, may_be_best, own_optimum, search_state

Runs = Sequence[RunResult]


@dataclass(frozen=True)
class JointSearch:
    """The search of the values of one hyperparameter of one variant.

    Attributes:
        default: the label of the value that the variant has, whose own search is not made here.
        changes: the other values.
        runs_of: finished runs of all of them.
        grid: of the sweep.
        analysis: what optima rest on beside the runs.
    """

    default: Label
    changes: Mapping[Label, HyperparameterOverride]
    runs_of: Mapping[Label, Runs]
    grid: GridConfig
    analysis: AnalysisConfig | None = None

    def states(self, sizes: Sequence[Ratios]) -> dict[Label, list[SearchState]]:
        """The state of the search of every value, at the sizes to which the walk has come.

        Args:
            sizes: in the order in which they are searched, the base first.
        """
        states: dict[Label, list[SearchState]] = {label: [] for label in self.changes}
        offsets = {self.default: 0.0}  # octaves from the default's best LR to that of each value, where found last
        best: Label | None = self.default
        for ratios in sizes:
            best = self._walk(best, ratios, offsets, states)
            if best is None:
                break
        for of_value in states.values():
            if not of_value:
                of_value.append(SearchState(sizes[0], (), "beyond the neighbours of the best value"))
        return states

    @cached_property
    def row(self) -> list[Label]:
        """The labels by rising value; a default of null comes first."""
        own = next(iter(self.changes.values())).default
        values = {label: change.value for label, change in self.changes.items()}
        values[self.default] = -math.inf if own is None else own
        return sorted(values, key=values.__getitem__)

    def _walk(
        self, begin: Label, ratios: Ratios, offsets: dict[Label, float], states: Mapping[Label, list[SearchState]]
    ) -> Label | None:
        """The best value of one size, or None while a search there is open. Adds to `offsets` and `states`."""
        known = self._optima([self.default], ratios)
        center = known[self.default].log2_lr if known else None
        if center is None:
            return None
        searched = {self.default}
        wanted = {begin, *self._neighbours([begin])}
        while new := [label for label in self.row if label in wanted - searched]:
            for label in new:
                nearest = min(offsets, key=lambda other: abs(self.row.index(other) - self.row.index(label)))
                states[label].append(self._state(label, ratios, center + offsets[nearest]))
            if any(states[label][-1].proposals for label in new):
                return None
            searched |= set(new)
            known |= self._optima(new, ratios)
            offsets.update({label: optimum.center - center for label, optimum in known.items()})
            may_win = may_be_best(list(known.values()))
            wanted = self._neighbours([label for label, wins in zip(known, may_win, strict=True) if wins])
        return list(known)[best_of(list(known.values()))]

    def _state(self, label: Label, ratios: Ratios, expected: float) -> SearchState:
        """The state of the LR search of one value at one size, which begins around an expected optimum."""
        middle = round(expected / LATTICE) * LATTICE
        around = replace(self.grid, log2_lrs=(middle - AROUND, middle + AROUND))
        one_size = replace(around, width_ratios=ratios[:1], depth_ratios=ratios[1:], pair=False, sizes=None)
        [state] = search_state(self.runs_of[label], one_size, self.analysis, has_goal=False)
        return state

    def _optima(self, labels: Iterable[Label], ratios: Ratios) -> dict[Label, Optimum]:
        """The optimum of every value at one size, after the longest training; without those that always diverged."""
        optima = {}
        for label in labels:
            curves = [c for c in collect(self.runs_of[label]) if (c.width_ratio, c.depth_ratio) == ratios and c.usable]
            if curves:
                optima[label] = own_optimum(curves[-1])
        return optima

    def _neighbours(self, labels: Iterable[Label]) -> set[Label]:
        places = {self.row.index(label) + step for label in labels for step in (-1, 1)}
        return {self.row[place] for place in places if 0 <= place < len(self.row)}
