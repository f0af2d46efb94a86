"""The search for the best LR of every size of a ladder: which runs to train next, given those that were trained.

A proposal is a pure function of the runs: the same ones always lead to the same proposals, whoever asks and whatever
was interrupted. LRs lie on quarter octaves, so that rounds, reruns and grids share runs.

Every size is finished before the next. The smallest begins in the middle of the range, a larger one at the optimum that
the smaller ones forecast. While the best LR has no neighbour on one side, the search steps to that side: a size needs
three LRs for a curve, with the best one inside. After that the posterior of its optimum (analysis/loss_curve.py)
decides: its middle is trained next, or an end of its interval where a run near the middle exists already.

With a goal the search goes on after that. The goal names the target, the size for which the LR is meant. Runs that
would decide an open verdict come first, then those that are expected to save the most regret at the target for what
they cost (the expected value of sample information; Raiffa & Schlaifer 1961), until the LR there is known well enough.

Several runs at a time are chosen one after the other, each as if those before it had given the losses that are expected
of them ("kriging believer"; Ginsbourger et al. 2010, doi 10.1007/978-3-642-10701-6_6).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from mupsweep.analysis.config import CurvePrior, VerdictBounds
from mupsweep.analysis.estimate import Array, Estimate
from mupsweep.analysis.forecast import forecast, losses_at_target
from mupsweep.analysis.loss_curve import MIN_LRS, CurveDraws, LadderPosterior, SizeRuns, bounded, fit_ladder
from mupsweep.analysis.verdict import Runs, judge

LATTICE = 0.25  # octaves between the LRs of a sweep's search
FIRST_STEP = 1.0  # octaves from the first LRs of the smallest size to their neighbours
STEP = 0.75  # of the larger ones, whose first LR is a forecast
MOST_LRS = 4  # of one size, and MIN_LRS at least
KNOWN = 0.7  # octaves: with MIN_LRS, a size is known where an interval of 80 % is narrower
QUANTILES_TO_TRAIN = (0.5, 0.1, 0.9)  # of the optimum, in the order in which they are tried
FORESEEN = 1.1  # octaves: a size may begin before smaller ones are known if an interval of 80 % is narrower
NEW_LR = 0.25  # octaves from every trained LR
SLICES = 8  # equal parts of the draws by what a run may show
WORTH_IT = 0.05  # share of the expected regret that a run must be expected to save
HEIGHT = 0.02  # nats an octave from the middle, expected of runs of which nothing is known
EPS = 1e-6  # octaves by which two LRs count as equal


@dataclass(frozen=True)
class SearchedSize:
    """A size that a search may train.

    Attributes:
        runs: those that were trained, with the position on the ladder.
        cost: of one run, in any unit.
    """

    runs: SizeRuns
    cost: float

    @property
    def n_runs(self) -> int:
        return int(self.runs.seeds.sum() + self.runs.diverged.sum())


@dataclass(frozen=True)
class Goal:
    """When a search beyond the optima of its sizes ends.

    Attributes:
        position: of the target, doublings above the base.
        half_width: octaves to which its LR shall be known, at CONFIDENCE.
        regret: nats that its LR may be expected to lose; either is enough.
        bounds: of the verdict that shall be decided too; None where only the LR counts.
    """

    position: float
    half_width: float = 0.25
    regret: float = 0.002
    bounds: VerdictBounds | None = None


@dataclass(frozen=True)
class NextRun:
    """A run to train.

    Attributes:
        size: its index.
        repetition: how many runs its LR has already, each with a seed of its own.
        why: the reason, in words.
    """

    size: int
    log2_lr: float
    repetition: int
    why: str


@dataclass(frozen=True)
class LRSearch:
    """A search of one ladder.

    Attributes:
        sizes: in the order in which they are searched: by rising cost.
        begin: the range of log2 LRs in whose middle the smallest size begins.
        limits: the lowest and the highest log2 LR of any run.
        goal: what is wanted beyond the optimum of every size.
        both_ends: whether the interval of every size's optimum shall lie between trained LRs, as a verdict needs.
        lattice: octaves of which LRs are multiples, so that sweeps share runs; 0 for none.
        seeds: that every new LR is trained with.
        max_seeds: runs of one LR, at most.
        max_runs: runs of one size, at most.
    """

    sizes: tuple[SearchedSize, ...]
    begin: tuple[float, float]
    limits: tuple[float, float]
    goal: Goal | None = None
    seeds: int = 1
    max_seeds: int = 3
    max_runs: int | None = None
    both_ends: bool = False
    lattice: float = LATTICE
    prior: CurvePrior = field(default_factory=CurvePrior)

    def next(self, count: int = 1) -> list[NextRun]:
        """The runs to train next, at most `count` LRs of them; none when the search has ended."""
        found, search = self.proposals, self
        while found and len({(run.size, run.log2_lr) for run in found}) < count:
            search = search.believing(found[len(found) - len(search.proposals) :])
            if not search.proposals or not self._foresees(search):
                break
            found = [*found, *search.proposals]
        return found

    def _foresees(self, believing: LRSearch) -> bool:
        """Whether what this search would propose if runs gave what is expected of them is wanted whatever they give.

        The first LRs of a size are, if it has been begun, or its optimum is forecast well enough.
        """
        if all(log2_lr is None for log2_lr, _ in self.looks):
            return True  # beyond the optima of the sizes
        k = believing.proposals[0].size
        if len(believing.sizes[k].runs.log2_lrs) >= MIN_LRS:
            return False
        if k == self.proposals[0].size:
            return True
        expected = self.expected(k)
        return expected is not None and float(np.ptp(np.quantile(expected, QUANTILES_TO_TRAIN))) < FORESEEN

    @cached_property
    def proposals(self) -> list[NextRun]:
        """The first runs to train next: one LR, with its seeds."""
        for k, (log2_lr, why) in enumerate(self.looks):
            if log2_lr is not None:
                return [NextRun(k, log2_lr, seed, why) for seed in range(self.seeds)]
        return self._towards_goal()

    @cached_property
    def looks(self) -> list[tuple[float | None, str]]:
        """The LR that every size would train next to find its optimum, None where it has ended; and why."""
        looks: list[tuple[float | None, str]] = []
        for k in range(len(self.sizes)):
            is_waiting = any(log2_lr is not None for log2_lr, _ in looks)
            looks.append((None, "waits for smaller sizes") if is_waiting else self._look(k))
        return looks

    @cached_property
    def trained(self) -> list[int]:
        """The indices of the sizes that have runs, by rising position, as the posterior has them."""
        with_runs = [k for k, size in enumerate(self.sizes) if len(size.runs.log2_lrs)]
        return sorted(with_runs, key=lambda k: self.sizes[k].runs.position)

    @cached_property
    def posterior(self) -> LadderPosterior | None:
        """Of all sizes that have runs; None without any."""
        return fit_ladder([self.sizes[k].runs for k in self.trained], self.prior) if self.trained else None

    def draws(self, k: int) -> CurveDraws | None:
        """Of a size's curve; None where no LR of it has a loss."""
        if self.posterior is None or k not in self.trained:
            return None
        return self.posterior.draws[self.trained.index(k)]

    def expected(self, k: int) -> Array | None:
        """(draws,) where a size's optimum is, as far as any size says something of it."""
        if self.posterior is None or self.posterior.walk is None:
            return None
        own = self.draws(k)
        if own is not None:
            return own.optimum
        return self.posterior.walk.optima(self.sizes[k].runs.position, np.random.default_rng(2))

    def optimum(self, k: int) -> Estimate:
        """A size's optimum; where its runs do not bound it, what the other sizes say of it."""
        draws = self.expected(k)
        return Estimate(None, None, None) if draws is None else Estimate.of(draws)

    def reason(self, k: int) -> str | None:
        """Why a size's optimum is not known, in words; None where it is."""
        runs, (low, high), optimum = self.sizes[k].runs, self.limits, self.optimum(k).value
        if len(runs.log2_lrs) and not runs.usable.any():
            return f"every LR diverges, down to 2^{runs.log2_lrs[0]:.4g}"
        if optimum is None:
            return "no run of any size has a loss"
        if optimum < low:
            return f"the optimum may lie below 2^{low:.4g}, the lowest LR of the search"
        if optimum > high:
            return f"the optimum may lie above 2^{high:.4g}, the highest LR of the search"
        return None

    def believing(self, runs: Sequence[NextRun]) -> LRSearch:
        """The search as it were if some runs had given the losses that are expected of them."""
        sizes = list(self.sizes)
        for run in runs:
            size = sizes[run.size]
            runs_of_size = size.runs.with_run(run.log2_lr, self._expected_loss(run), run.repetition)
            sizes[run.size] = replace(size, runs=runs_of_size)
        return replace(self, sizes=tuple(sizes))

    def _expected_loss(self, run: NextRun) -> float:
        draws = self.draws(run.size)
        if draws is None:
            expected = self.expected(run.size)
            middle = sum(self.begin) / 2 if expected is None else float(np.median(expected))
            return 3.0 + HEIGHT * (run.log2_lr - middle) ** 2
        return float(np.median(np.minimum(draws.losses(run.log2_lr), draws.runs.lowest + 1)))

    # ---- the optimum of one size

    def _look(self, k: int) -> tuple[float | None, str]:
        size, runs = self.sizes[k], self.sizes[k].runs
        if not len(runs.log2_lrs):
            expected = self.expected(k)
            if expected is None:
                return self._on(self._start(k)), "the middle of the range" if k == 0 else "smaller sizes know nothing"
            return self._on(float(np.median(expected))), "the optimum that smaller sizes forecast"
        log2_lr, why = self._unfinished(k)
        if log2_lr is None:
            return None, why
        if self.max_runs is not None and size.n_runs + self.seeds > self.max_runs:
            return None, f"stopped at sweep.max_runs={self.max_runs}: {why}"
        return log2_lr, why

    def _start(self, k: int) -> float:
        """Where a size begins of which nothing is forecast: below what diverged at smaller ones."""
        diverged = [float(size.runs.log2_lrs[0]) for size in self.sizes[:k] if len(size.runs.log2_lrs)]
        return min([sum(self.begin) / 2, *diverged])

    def _unfinished(self, k: int) -> tuple[float | None, str]:
        """The next LR of a size that has runs."""
        runs, step = self.sizes[k].runs, FIRST_STEP if k == 0 else STEP
        x = runs.log2_lrs
        if not runs.usable.any():
            lower = self._on(x[0] - 2 * FIRST_STEP)
            return (lower if x[0] - lower > self._apart else None), "every LR diverges"
        best = float(x[runs.best])
        for side, sign, is_open in (("higher", 1, best == x[-1]), ("lower", -1, best == x[0])):
            further = self._on(best + sign * step)
            if is_open and sign * (further - best) > self._apart:  # the best may lie beyond the limits
                return further, f"no {side} LR than the best was trained"
        draws = self.draws(k)
        assert draws is not None
        low, _, high = np.quantile(draws.optimum, sorted(QUANTILES_TO_TRAIN))
        beyond = self.reason(k)
        known = beyond or f"known to +-{(high - low) / 2:.2f} octaves at 80 %"
        if len(x) >= MOST_LRS or (len(x) >= MIN_LRS and high - low < KNOWN):
            return self._missing_end(k, step) or (None, known)
        fresh = self._fresh(k, draws.optimum)
        return (fresh[0], known) if fresh else (None, beyond or f"{known}, with all LRs around it")

    def _missing_end(self, k: int, step: float) -> tuple[float, str] | None:
        """The LR that may give an interval the end that it lacks."""
        draws, runs = self.draws(k), self.sizes[k].runs
        if not self.both_ends or draws is None:
            return None
        interval = bounded(runs, draws.optimum).estimate
        for end, place, sign in ((interval.low, 0, -1), (interval.high, -1, 1)):
            further = self._on(float(runs.log2_lrs[place]) + sign * step)
            if end is None and not runs.diverged[place] and np.abs(runs.log2_lrs - further).min() > EPS:
                return further, "the optimum may lie beyond what was trained"
        return None

    def _fresh(self, k: int, optimum: Array) -> list[float]:
        """LRs where a size's optimum may be and no run is, the most wanted first."""
        wanted = (self._on(float(q)) for q in np.quantile(optimum, QUANTILES_TO_TRAIN))
        return [log2_lr for log2_lr in wanted if self._is_new(k, log2_lr)]

    def _is_new(self, k: int, log2_lr: float) -> bool:
        """Whether no LR of a size was trained near one."""
        x = self.sizes[k].runs.log2_lrs
        return not len(x) or float(np.abs(x - log2_lr).min()) >= NEW_LR - EPS

    @property
    def _apart(self) -> float:
        """Octaves within which two LRs are one: those that people write down are rounded."""
        return EPS if self.lattice else NEW_LR - EPS

    def _on(self, log2_lr: float) -> float:
        """The nearest LR of the lattice that is within the limits, or the limit."""
        low, high = self.limits
        nearest = round(log2_lr / self.lattice) * self.lattice if self.lattice else log2_lr
        return float(min(max(nearest, low), high))

    # ---- the goal

    def _towards_goal(self) -> list[NextRun]:
        """Runs that would decide the verdict, else those that tell most of the target for what they cost."""
        if self.goal is None or self.posterior is None or not self.posterior.fitted:
            return []
        if deciding := self._deciding(self.posterior, self.goal):
            return deciding
        known, lost = self._at_target(self.posterior, self.goal)
        if known:
            return []
        least = WORTH_IT * float(lost.mean(axis=0).min())
        chances = [(self._saved(lost, outcome), runs) for runs, outcome in self._candidates()]
        worth_it = [(saved / self._cost(runs), runs) for saved, runs in chances if saved >= least]
        return max(worth_it, key=lambda pair: pair[0], default=(0.0, []))[1]

    def goal_state(self) -> str:
        """What is known of the target, in words."""
        if self.goal is None or self.posterior is None or not self.posterior.fitted:
            return ""
        expected = forecast(self.posterior, self.goal.position)
        assert expected is not None
        return f"the LR of the target is 2^{expected.optimum:.2f}, expected to lose {expected.expected_regret:.4f} nats"

    def _deciding(self, posterior: LadderPosterior, goal: Goal) -> list[NextRun]:
        """The runs that would probably decide the verdict; none where it is decided, or not asked for."""
        if goal.bounds is None:
            return []
        verdict = judge(posterior, goal.bounds, self._cost_of)
        runs: list[NextRun] = []
        for deciding in verdict.deciding_runs:
            for log2_lr in dict.fromkeys(map(self._on, deciding.log2_lrs)):
                why = f"may decide the verdict: {verdict.reason}"
                runs += self._another(self.trained[deciding.size], log2_lr, why)
        return runs

    def _cost_of(self, runs: Runs) -> float:
        """What some LRs of a size cost that may decide a verdict; infinite where one of them is not to be had."""
        k = self.trained[runs.size]
        more = [self._another(k, log2_lr, "") for log2_lr in dict.fromkeys(map(self._on, runs.log2_lrs))]
        return sum(map(self._cost, more)) if all(more) else math.inf

    def _at_target(self, posterior: LadderPosterior, goal: Goal) -> tuple[bool, Array]:
        """Whether the target is known well enough, and what each LR loses there (draws, LRs)."""
        k = next((k for k, size in enumerate(self.sizes) if size.runs.position == goal.position), None)
        own = None if k is None else self.draws(k)
        assert posterior.walk is not None
        optimum = posterior.walk.optima(goal.position, np.random.default_rng(2)) if own is None else own.optimum
        _, lost = losses_at_target(posterior, goal.position, optimum)
        interval = Estimate.of(optimum)
        assert interval.low is not None
        assert interval.high is not None
        is_narrow = interval.high - interval.low <= 2 * goal.half_width
        return is_narrow or float(lost.mean(axis=0).min()) <= goal.regret, lost

    def _candidates(self) -> Iterator[tuple[list[NextRun], Array]]:
        """Runs that might tell something of the target, and (draws,) what they would show."""
        rng = np.random.default_rng(5)
        for k, size in enumerate(self.sizes):
            own, optimum = self.draws(k), self.expected(k)
            assert optimum is not None
            if own is None or not size.runs.fitted:
                middle = float(np.median(optimum))
                lrs = dict.fromkeys(self._on(middle + d) for d in (-STEP, 0.0, STEP))
                new = [log2_lr for log2_lr in lrs if self._is_new(k, log2_lr)]
                runs = [run for log2_lr in new for run in self._another(k, log2_lr, "a new size tells of the target")]
                if runs:
                    yield runs, optimum
                continue
            for log2_lr in (*self._fresh(k, optimum), float(size.runs.log2_lrs[size.runs.best])):
                runs = self._another(k, log2_lr, "tells most of the target for its cost")
                if runs:
                    noise = math.sqrt(own.noise_variance(log2_lr) / len(runs))
                    yield runs, own.losses(log2_lr) + noise * rng.standard_normal(len(optimum))

    def _another(self, k: int, log2_lr: float, why: str) -> list[NextRun]:
        """New runs of one LR: its first, or one more seed; none where it diverged or the limits are reached."""
        if not self.limits[0] <= log2_lr <= self.limits[1]:
            return []
        size, x = self.sizes[k], self.sizes[k].runs.log2_lrs
        at = np.flatnonzero(np.abs(x - log2_lr) < EPS)
        if len(at) and size.runs.diverged[at[0]]:
            return []
        had = int(size.runs.seeds[at[0]]) if len(at) else 0
        new = [NextRun(k, log2_lr, seed, why) for seed in range(had, had + 1 if had else self.seeds)]
        has_room = self.max_runs is None or size.n_runs + len(new) <= self.max_runs
        return new if has_room and new[-1].repetition < self.max_seeds else []

    def _cost(self, runs: Sequence[NextRun]) -> float:
        return sum(self.sizes[run.size].cost for run in runs)

    def _saved(self, lost: Array, outcome: Array) -> float:
        """Nats of expected regret at the target that knowing an outcome would save.

        LRs are chosen on one half of the draws and judged on the other, so that noise promises nothing.
        """
        folds = np.arange(len(outcome)) % 2
        saved = 0.0
        for fold in (0, 1):
            choosing, judging = lost[folds != fold], lost[folds == fold]
            saved += judging[:, choosing.mean(axis=0).argmin()].mean() / 2
            edges = np.quantile(outcome, np.linspace(0, 1, SLICES + 1)[1:-1])
            slices = np.searchsorted(edges, outcome)
            for s in range(SLICES):
                chosen, judged = choosing[slices[folds != fold] == s], judging[slices[folds == fold] == s]
                if len(chosen) and len(judged):
                    saved -= judged[:, chosen.mean(axis=0).argmin()].sum() / len(judging) / 2
        return saved
