"""Enough: the smallest part of a sweep that had given its answer, and what as many runs again would buy."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mupsweep.analysis.analysis import analyse
from mupsweep.analysis.enough import Enough, MoreEffort, Part, enough
from mupsweep.analysis.labels import DIVERGED, DONE
from mupsweep.analysis.run_result import RunResult
from mupsweep.analysis.transfer import LadderResult, judge_ladders
from mupsweep.analysis.verdict import DRIFTS, INCONCLUSIVE
from mupsweep.report.results_files import enough_to_json

WIDTHS = (256, 512, 1024)
SSO = Path(__file__).parents[1] / "tables" / "sso_width.csv"


def ladder(drift: float, noise: float, seeds: int, *, diverges_above: float = math.inf) -> LadderResult:
    """A width ladder of parabolas, half octaves from 2^-12 to 2^-6, whose optimum is at 2^-8.6 at the base."""
    rng = np.random.default_rng(0)
    runs = []
    for k, width in enumerate(WIDTHS):
        for log2_lr in np.arange(-12.0, -5.9, 0.5):
            for seed in range(seeds):
                loss = 3.0 - 0.1 * k + 0.03 * (log2_lr + 8.6 - drift * k) ** 2 + noise * rng.standard_normal()
                diverged = log2_lr > diverges_above
                runs.append(
                    RunResult(
                        run_id="",
                        model="m",
                        parametrization="p",
                        optimizer="o",
                        width=width,
                        depth=4,
                        width_ratio=2.0**k,
                        depth_ratio=1.0,
                        log2_lr=float(log2_lr),
                        seed=seed,
                        status=DIVERGED if diverged else DONE,
                        val_loss=None if diverged else float(loss),
                    )
                )
    return analyse(runs).groups[0]


@pytest.fixture(scope="module")
def drifting() -> tuple[LadderResult, Enough]:
    """A clean ladder of two seeds, whose LRs above 2^-7 diverge."""
    whole = ladder(-0.7, noise=0.001, seeds=2, diverges_above=-7.0)
    return whole, enough(whole)


@pytest.fixture(scope="module")
def noisy() -> tuple[LadderResult, Enough]:
    whole = ladder(-0.15, noise=0.05, seeds=1)
    return whole, enough(whole)


def test_a_clean_sweep_needs_a_fraction_of_its_runs(drifting: tuple[LadderResult, Enough]) -> None:
    whole, found = drifting
    assert whole.verdict == DRIFTS
    assert found.n_runs == 3 * 13 * 2
    assert found.part is not None
    assert found.part.seeds == 1
    assert found.part.share < 0.2
    assert len(found.part.ways) == 2 * found.part.stride  # either seed, from every first LR
    for curves in found.part.ways:  # the part alone says it
        assert judge_ladders([(whole.axis, curves)])[0].verdict == DRIFTS


def test_the_share_counts_parameters_times_runs(drifting: tuple[LadderResult, Enough]) -> None:
    part = drifting[1].part
    assert part is not None
    work = [sum(curve.width**2 * curve.n_runs for curve in curves) for curves in part.ways]
    assert part.share == pytest.approx(np.mean(work) / sum(w**2 * 26 for w in WIDTHS))


def test_an_lr_that_diverged_stays_one_in_every_part(drifting: tuple[LadderResult, Enough]) -> None:
    part = drifting[1].part
    assert part is not None
    for curves in part.ways:
        for curve in curves:
            assert [point.diverged > 0 for point in curve.points] == [point.log2_lr > -7.0 for point in curve.points]


def test_more_runs_narrow_what_is_known(noisy: tuple[LadderResult, Enough]) -> None:
    whole, found = noisy
    half_width, of_drift = whole.optima[-1].estimate.half_width, whole.total_drift.half_width
    assert half_width is not None
    assert of_drift is not None
    for more in found.more:
        assert more.optimum is not None
        assert more.optimum < half_width
        assert more.total_drift is not None
        assert more.total_drift < of_drift
        assert 0 <= more.decided <= 1


def test_without_an_answer_there_is_no_part_of_it(noisy: tuple[LadderResult, Enough]) -> None:
    whole, found = noisy
    assert whole.verdict == INCONCLUSIVE
    assert found.part is None


def test_the_same_twice(noisy: tuple[LadderResult, Enough]) -> None:
    whole, found = noisy
    assert enough(whole) == found


def test_the_command(cli: Callable[..., tuple[int, str, str]]) -> None:
    """On a published table: SSO's optima from the two smallest of four widths."""
    only = ["transfer", "--from", str(SSO), "--optimizer", "sso", "--enough"]
    code, out, err = cli(*only)
    assert (code, err) == (0, "")
    words = " ".join(out.split())
    assert "10 of 36 runs, 3% of the FLOPs, had given this answer, whichever were taken: every second LR" in words
    assert "twice the seeds would bring the optimum at width 2048 to ±" in words


def test_the_json() -> None:
    part = Part(1, 2, (0, 1), ((),), 0.25)
    more = MoreEffort("twice the seeds", 0.2, None, 1.0)
    assert enough_to_json(Enough(part, 2, 4, 36, (more,))) == {
        "runs": 36,
        "part": {"runs": 0, "flops_share": 0.25, "seeds": 1, "lr_stride": 2, "sizes": [0, 1]},
        "more": [
            {
                "what": "twice the seeds",
                "optimum_half_width": 0.2,
                "total_drift_half_width": None,
                "decided": 1.0,
            }
        ],
    }


def test_it_is_not_of_a_target(cli: Callable[..., tuple[int, str, str]]) -> None:
    code, _, err = cli("transfer", "--from", str(SSO), "--enough", "--to", "width=4096")
    assert code == 2
    assert "--enough is of the verdict" in err
