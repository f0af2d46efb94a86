"""The numbers that answers rest on beside the runs: what is known of loss curves, and when an optimum has moved.

They are the config group `analysis` (configs/analysis explains every key).
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from mupsweep.schema import require


@dataclass(frozen=True)
class WalkPrior:
    """What is known of a ladder's drift before its runs; octaves of LR and doublings of size.

    Attributes:
        slope_sd: of the drift, octaves per doubling.
        step_sds: octaves per root of a doubling, each as likely: steady ladders and restless ones.
        deviation: octaves by which a size leaves the walk.
    """

    slope_sd: float = 0.5
    step_sds: tuple[float, ...] = (0.1, 0.4)
    deviation: float = 0.08


@dataclass(frozen=True)
class SidePrior:
    """What is known of one side of a valley.

    Attributes:
        powers, growths: p and g of v(u), of every shape that a side may have; each is as likely for a ladder.
        same_shape: chance that a size has its ladder's shape.
        height_sd: by which log h of a size leaves its ladder's trend.
        height_noise: c, the share of its height by which a run scatters.
    """

    powers: tuple[float, ...]
    growths: tuple[float, ...]
    same_shape: float
    height_sd: float
    height_noise: float


@dataclass(frozen=True)
class CurvePrior:
    """The model in numbers. Losses are in nats per token, LRs in octaves, sizes in doublings.

    Attributes:
        left, right: the sides below and above the optimum.
        height: nats at one octave left of the optimum: the typical ladder's.
        height_sd: of log height over ladders.
        asymmetry_sd: of log (right height / left height) over ladders.
        trend_sd: of the change of log height per doubling.
        misfit: share of its height by which a side leaves its shape smoothly.
        misfit_length: in log |u|, over which it does.
        noise: nats by which a run at the optimum scatters: the typical ladder's.
        noise_sd: of its logarithm over ladders.
        cliff: nats above the best run of a size, from which a run is no part of the valley.
        reach: octaves around the best LR of a size beyond which runs are not looked at.
        walk: how optima move from size to size.
    """

    left: SidePrior = SidePrior((2.0, 1.4, 2.0, 2.0, 2.0), (-0.3, 0.0, 0.0, 0.2, 0.5), 0.98, 0.1, 0.04)
    right: SidePrior = SidePrior((1.5, 2.0, 2.7, 2.0), (0.0, 0.0, 0.0, 0.3), 0.7, 0.45, 0.18)
    height: float = 0.02
    height_sd: float = 1.1
    asymmetry_sd: float = 0.6
    trend_sd: float = 0.2
    misfit: float = 0.15
    misfit_length: float = 0.6
    noise: float = 0.0012
    noise_sd: float = 1.1
    cliff: float = 0.3
    reach: float = 4.3
    walk: WalkPrior = field(default_factory=WalkPrior)


@dataclass(frozen=True)
class VerdictBounds:
    """When an optimum has moved, and when that matters.

    Attributes:
        octaves: that an optimum may move in all.
        octaves_per_doubling: that it may move, where this is more.
        harmless: nats per token that the base's LR may cost whatever the optimum does.
        costly: nats per token above which it surely should not be used.
        span: doublings from the base to the largest size, at least.
    """

    octaves: float = 0.5
    octaves_per_doubling: float = 0.25
    harmless: float = 0.01
    costly: float = 0.03
    span: float = 0.5

    def total(self, doublings: float) -> float:
        """Octaves that an optimum may move over a ladder."""
        return max(self.octaves, self.octaves_per_doubling * abs(doublings))


@dataclass(frozen=True)
class AnalysisConfig:
    """What answers rest on beside the runs.

    Attributes:
        verdict: when an optimum has moved, and when that matters.
        curve: what is known of loss curves before any run.
    """

    verdict: VerdictBounds = field(default_factory=VerdictBounds)
    curve: CurvePrior = field(default_factory=CurvePrior)

    def __post_init__(self) -> None:
        curve, walk = self.curve, self.curve.walk
        sections = {
            "analysis.verdict": self.verdict,
            "analysis.curve": curve,
            "analysis.curve.left": curve.left,
            "analysis.curve.right": curve.right,
            "analysis.curve.walk": walk,
        }
        for where, section in sections.items():
            for field_ in fields(section):
                value = getattr(section, field_.name)
                if isinstance(value, float):
                    require(value > 0, f"{where}.{field_.name}", value, "a number above 0")
        for where, side in (("analysis.curve.left", curve.left), ("analysis.curve.right", curve.right)):
            powers = list(side.powers)
            require(bool(powers) and min(powers) > 0, f"{where}.powers", powers, "numbers above 0, one at least")
            expected = f"as many numbers as {where}.powers has, {len(powers)}"
            require(len(side.growths) == len(powers), f"{where}.growths", list(side.growths), expected)
            require(side.same_shape <= 1, f"{where}.same_shape", side.same_shape, "a chance, at most 1")
        steps = list(walk.step_sds)
        require(bool(steps) and min(steps) > 0, "analysis.curve.walk.step_sds", steps, "numbers above 0, one at least")
