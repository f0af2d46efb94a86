"""Exponents of what was measured along a ladder of widths or depths, beside those that the rules imply."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from itertools import product

from mupsweep.check.measure import ATTENTION, CHANGE, COORDINATES, FEATURES, LOGITS, UPDATE, WEIGHT, Values
from mupsweep.check.regression import Exponent, slope
from mupsweep.errors import ConfigError
from mupsweep.formatting import counted
from mupsweep.scaling import Parametrization, Role, RoleScaling

WIDTH, DEPTH = "width", "depth"
TOLERANCE = 0.1  # by which an interval may miss the expected exponent
TOLERANCE_OF_ONE = 0.25  # for one tensor among several of its role, which is noisier
WRONG_RULE = 0.5  # by which wrong rules err: a wider interval cannot tell them from right ones
ENOUGH = 3  # sizes of a ladder: two leave no interval
SHARED_BLOCK = Fraction(-1)  # r_L^-1 a block is what adds up to the same change at every depth

MULTIPLIERS = {  # what moves a coordinate beside the weights, in the order of the forward pass
    FEATURES: "the multiplier on the residual branches",
    LOGITS: "the multiplier on the logits",
    ATTENTION: "the attention scale",
}
Expectations = Mapping[tuple[str, Role | None], Fraction]  # (quantity, role of the tensor) -> exponent
STABLE: Expectations = {(CHANGE + name, None): Fraction(0) for name in (FEATURES, LOGITS)}
STABLE_WIDTH: Expectations = {**STABLE, (CHANGE + ATTENTION, None): Fraction(0)}


@dataclass(frozen=True)
class Point:
    """One network of a ladder: its size on the axis, and what was measured at which step count."""

    axis: str
    size: int
    seed: int
    traced: Mapping[int, Values]


@dataclass(frozen=True)
class Row:
    """One quantity along one axis.

    Attributes:
        quantity: what was measured; tensor: of which tensor, blocks being one (`blocks.*.mlp.up.weight`), or "".
        role: of the tensor.
        sizes: widths or depths, ascending.
        values: by step count, at every size, the geometric mean over seeds.
        exponents: by step count.
        expected: the exponent that the parametrization implies; None where it implies none.
    """

    axis: str
    quantity: str
    tensor: str
    role: Role | None
    sizes: tuple[int, ...]
    values: Mapping[int, tuple[float, ...]]
    exponents: Mapping[int, Exponent]
    expected: Fraction | None

    @property
    def final_exponent(self) -> Exponent:
        """The compared exponent: at the start for weights, since updates move them later; else after the last step."""
        return self.exponents[0 if self.quantity == WEIGHT else max(self.exponents)]

    @property
    def judged(self) -> Exponent:
        """`final_exponent`, by the name that code outside this repository may use."""
        return self.final_exponent

    @property
    def violation(self) -> float:
        """How far the expected exponent lies outside the interval."""
        return 0.0 if self.expected is None else self.final_exponent.away_from(float(self.expected))

    @property
    def deviation(self) -> float:
        """How far the exponent is from the expected one."""
        return 0.0 if self.expected is None else abs(self.final_exponent.value - float(self.expected))

    @property
    def too_wide(self) -> bool:
        """Whether the interval cannot tell the expected exponent from one of a wrong rule."""
        return self.expected is not None and self.final_exponent.high - self.final_exponent.low > WRONG_RULE

    @property
    def first_deviation(self) -> float:
        """How far the first measured exponent is from the expected one, before one mistake leads to others."""
        return 0.0 if self.expected is None else abs(self.exponents[min(self.exponents)].value - float(self.expected))


@dataclass(frozen=True)
class Coordinates:
    """A coordinate check of one variant.

    Attributes:
        label: (model, optimizer, parametrization).
        log2_lr: of the base LR, where there is one.
        rows: every quantity along every axis.
        diverged: the sizes that ended in inf or nan, such as "width 256".
    """

    label: tuple[str, str, str]
    log2_lr: float | None
    rows: tuple[Row, ...]
    diverged: tuple[str, ...] = ()

    @cached_property
    def violations(self) -> list[Row]:
        """The rows whose exponent contradicts the expected one, the largest first deviation ahead."""
        violations = []
        for axis in self.axes():
            for members in self._of_roles(axis):
                if _mean(members).violation > TOLERANCE:
                    violations += [row for row in members if row.deviation > TOLERANCE]
                else:
                    violations += [row for row in members if row.violation > TOLERANCE_OF_ONE]
        return sorted(violations, key=lambda row: -row.first_deviation)

    @cached_property
    def inconclusive(self) -> list[Row]:
        """The rows of roles that contradict nothing, by intervals too wide to contradict a wrong rule."""
        off = {(row.axis, row.quantity, row.role) for row in self.violations}
        rows = [row for axis in self.axes() for row in self.by_role(axis) if row.too_wide]
        return [row for row in rows if (row.axis, row.quantity, row.role) not in off]

    @property
    def off(self) -> list[Row]:
        """`violations`, by the name that code outside this repository may use."""
        return self.violations

    @property
    def failed(self) -> bool:
        """Whether an exponent contradicts the expected one, or a size diverged where any is expected."""
        return bool(self.violations) or bool(self.diverged and any(map(self.has_expectation, self.axes())))

    @property
    def passed(self) -> bool:
        """Whether every exponent is the expected one as far as a wrong rule would show, and no size diverged."""
        return not self.failed and not self.inconclusive

    def axes(self) -> list[str]:
        """The ladders, in order."""
        return list(dict.fromkeys(row.axis for row in self.rows))

    def has_expectation(self, axis: str) -> bool:
        """Whether the rules imply any exponent along an axis."""
        return any(row.expected is not None for row in self.rows if row.axis == axis)

    def by_role(self, axis: str) -> list[Row]:
        """The rows of an axis; the tensors of a role are one row, their geometric mean."""
        return [_mean(members) for members in self._of_roles(axis)]

    def row(self, axis: str, quantity: str, role: Role | None = None) -> Row:
        """The row of a quantity, of all tensors of a role."""
        return next(r for r in self.by_role(axis) if (r.quantity, r.role) == (quantity, role))

    def _of_roles(self, axis: str) -> list[list[Row]]:
        grouped: dict[tuple[str, Role | None], list[Row]] = defaultdict(list)
        for row in self.rows:
            if row.axis == axis:
                grouped[row.quantity, row.role].append(row)
        return list(grouped.values())

    def causes(self) -> list[str]:
        """What the violations point at, one line per tensor or multiplier."""
        lines = [line for axis in self.axes() for line in self._causes(axis)]
        if self.inconclusive:
            described = "; ".join(describe(row) for row in self.inconclusive)
            lines.append(f"inconclusive, add sizes or seeds: {described}")
        if self.diverged:
            lines.append(f"{', '.join(self.diverged)} diverged: give a lower LR as sweep.log2_lrs=[-10]")
        return lines

    def _causes(self, axis: str) -> list[str]:
        """The likely causes of the violations along an axis.

        Weights and updates point at the tensors of their role, coordinates at everything before them in the forward
        pass. An update that deviates only after some steps is a consequence of something else.
        """
        violations = [row for row in self.violations if row.axis == axis]
        symptoms = {row.quantity: row for row in violations if row.role is None}
        suspects = {WEIGHT: "its init std", UPDATE: "its LR or eps does not fit its updates"}
        lines = []
        for members in self._of_roles(axis):
            wrong = [row for row in members if row in violations and row.quantity in suspects]
            wrong.sort(key=lambda row: -row.first_deviation)
            from_the_start = _mean(members).first_deviation > TOLERANCE or (
                wrong and wrong[0].first_deviation > TOLERANCE_OF_ONE
            )
            if wrong and (from_the_start or not symptoms):
                more = f"; {len(wrong) - 1} more of this role" if len(wrong) > 1 else ""
                lines.append(f"{wrong[0].role}: {suspects[wrong[0].quantity]}: {describe(wrong[0])}{more}")
        updates = [row for row in self.rows if (row.axis, row.quantity) == (axis, UPDATE)]
        # an update that is not known leaves it open whether a multiplier or a tensor before it is to blame
        unknown = any(row.axis == axis and row.quantity in suspects for row in self.inconclusive)
        if lines or unknown or all(row.expected is None for row in updates):
            return lines or [describe(row) for row in violations]
        for name, suspect in MULTIPLIERS.items():
            if CHANGE + name in symptoms:
                return [f"every update starts as promised, so {suspect}: {describe(symptoms[CHANGE + name])}"]
        return []


def expected_exponents(parametrization: Parametrization, axis: str) -> Expectations:
    """The exponents that a parametrization implies; none where it lets the change of features depend on size."""
    per_role = parametrization.role_scalings()
    scalings = {role: scaling for role, scaling in per_role.items() if isinstance(scaling, RoleScaling)}
    if len(scalings) < len(per_role):
        return {}

    def moved(role: Role) -> Fraction:
        return getattr(scalings[role].multiplier * scalings[role].update, axis)

    if moved(Role.HIDDEN) != (SHARED_BLOCK if axis == DEPTH else 0) or moved(Role.OUTPUT) != 0:
        return {}
    tensors = {(UPDATE, role): getattr(scaling.update, axis) for role, scaling in scalings.items()}
    tensors |= {(WEIGHT, role): getattr(scaling.weight, axis) for role, scaling in scalings.items()}
    return {**(STABLE_WIDTH if axis == WIDTH else STABLE), **tensors}


def family(name: str) -> str:
    """A tensor's name with the number of its block left out."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def fit(
    label: tuple[str, str, str],
    log2_lr: float | None,
    points: Sequence[Point],
    roles: Mapping[str, Role],
    expected: Mapping[str, Expectations],
) -> Coordinates:
    """The exponents of everything that is positive at every size of an axis, after every count that no size missed.

    Args:
        points: of one variant.
        roles: by family.
        expected: by axis.

    Raises:
        ConfigError: a ladder of two sizes.
    """
    last = max(1, *(count for point in points for count in point.traced))  # 0 where the first step ends them all
    diverged = sorted({(p.axis, p.size) for p in points if last not in p.traced}, reverse=True)
    rows: list[Row] = []
    for axis in dict.fromkeys(point.axis for point in points):
        ladder = [point for point in points if point.axis == axis]
        rows += _rows(ladder, roles, expected.get(axis, {}))
    return Coordinates(
        label, log2_lr, tuple(sorted(rows, key=_order)), tuple(f"{axis} {size}" for axis, size in diverged)
    )


def _rows(ladder: Sequence[Point], roles: Mapping[str, Role], expected: Expectations) -> Iterator[Row]:
    """The rows of one axis."""
    axis, sizes = ladder[0].axis, tuple(sorted({point.size for point in ladder}))
    if len(sizes) < ENOUGH:
        raise ConfigError(
            f"{counted(len(sizes), 'size')} on the {axis} axis: an exponent with an interval takes at least {ENOUGH}; "
            f"give sweep.{axis}_ratios=[1,2,4,8], or [1] for none"
        )
    counts = sorted(set.intersection(*(set(point.traced) for point in ladder)))
    collected: dict[tuple[str, str], dict[int, dict[int, list[float]]]] = {}
    for point, count in product(ladder, counts):
        for (quantity, name), value in point.traced[count].items():
            by_count = collected.setdefault((quantity, family(name)), defaultdict(lambda: defaultdict(list)))
            by_count[count][point.size].append(value)
    for (quantity, tensor), by_count in collected.items():
        measured = {c: v for c, v in by_count.items() if all(min(v[size], default=0.0) > 0 for size in sizes)}
        values = {count: tuple(_geometric_mean(v[size]) for size in sizes) for count, v in measured.items()}
        if not values or (quantity == WEIGHT and 0 not in values):
            continue  # a tensor that starts at zero, or does not move
        exponents = {count: slope(sizes, v) for count, v in values.items()}
        role = roles.get(tensor)
        yield Row(axis, quantity, tensor, role, sizes, values, exponents, expected.get((quantity, role)))


def _mean(members: Sequence[Row]) -> Row:
    first = members[0]
    if len(members) == 1:
        return first
    counts = [c for c in first.exponents if all(c in row.exponents for row in members)]
    values = {
        count: tuple(_geometric_mean(at_size) for at_size in zip(*(row.values[count] for row in members), strict=True))
        for count in counts
    }
    exponents = {count: slope(first.sizes, values[count]) for count in counts}
    return replace(first, tensor="", values=values, exponents=exponents)


def _order(row: Row) -> tuple[int, int, int, str]:
    quantities = [*COORDINATES, *(CHANGE + name for name in COORDINATES), UPDATE, WEIGHT]
    role = -1 if row.role is None else list(Role).index(row.role)
    return (WIDTH, DEPTH).index(row.axis), quantities.index(row.quantity), role, row.tensor


def kind_of_blocks(coordinates: Coordinates) -> str | None:
    """Which depth rule the updates of hidden matrices follow; features and logits cannot tell the two apart.

    Depth-muP (k = 1) freezes inner weights as depth^-1/2, CompleteP (k >= 2) moves them by the same at every depth
    (Zheng et al. 2603.00541, Conditions B.1 and 3.1).
    """
    if DEPTH not in coordinates.axes() or not coordinates.has_expectation(DEPTH):
        return None
    measured = coordinates.row(DEPTH, UPDATE, Role.HIDDEN).final_exponent
    kinds = {"as for blocks of one matrix (k = 1)": -0.5, "as for blocks of two or more matrices (k >= 2)": 0.0}
    fitting = [kind for kind, exponent in kinds.items() if measured.away_from(exponent) <= TOLERANCE]
    if len(fitting) == 1:
        conclusion = fitting[0]
    else:
        conclusion = "which fits both kinds of blocks" if fitting else "as for no depth rule"
    return f"hidden matrices move as depth^{measured}, {conclusion}"


def describe(row: Row) -> str:
    """One line: ||dW||_R of head.weight goes as width^+1.02 [0.98, 1.05], promised width^1."""
    of = f" of {row.tensor}" if row.tensor else "" if row.role is None else f" of {row.role.value} tensors"
    return f"{row.quantity}{of} goes as {row.axis}^{row.final_exponent}, promised {row.expected}"


def _geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))
