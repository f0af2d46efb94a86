"""The picture of LR and another hyperparameter: rows at their values, colours by loss, and the best pair."""

from __future__ import annotations

import re

import numpy as np
import pytest
from run_results import results

from mupsweep.analysis.analysis import analyse
from mupsweep.report.html.pairs import LEVELS, pair_chart, panels

KEY = "optimizer.weight_decay"
DECAYS = (0.1, 0.2, 0.4, 0.8, 1.6)


def runs_of(decays: tuple[float, ...]) -> list[dict[str, object]]:
    """Valleys in log2 LR, lowest at a decay of 0.4 and 2^-7; half an octave of LR less per octave of decay more."""
    random, made = np.random.default_rng(0), []
    for decay in decays:
        away = float(np.log2(decay / 0.4))
        for x in np.arange(-9.0, -4.9, 0.5):
            loss = 2.0 + 0.02 * away**2 + 0.04 * (x + 7 + 0.5 * away) ** 2 + 1e-4 * random.standard_normal()
            change = {} if decay == 0.1 else {"hyperparameter": KEY, "value": decay, "default": 0.1}
            names = {"model": "nanogpt", "optimizer": "adamw", "parametrization": "mup", **change}
            size = {"width": 32, "depth": 4, "width_ratio": 1.0, "depth_ratio": 1.0, "seed": 0}
            made.append({**names, **size, "log2_lr": float(x), "status": "done", "val_loss": float(loss)})
    return made


def test_every_part_of_the_picture_lies_where_the_runs_put_it() -> None:
    [tuning] = analyse(results(runs_of(DECAYS))).tunings
    [size] = tuning.sizes
    svg = pair_chart(tuning, size)
    labels = {float(v): float(y) - 4 for y, v in re.findall(r'class="end" x="44" y="([\d.]+)">([\d.]+)<', svg)}
    assert sorted(labels) == list(DECAYS)
    steps = np.diff([labels[decay] for decay in DECAYS])
    assert steps == pytest.approx([steps[0]] * 4, abs=0.2)  # an octave each
    assert svg.count("<circle") == 9 * len(DECAYS)
    ticks = {
        float(v.replace("−", "-")): float(x) for x, v in re.findall(r'x="([\d.]+)" y="275">2<[^>]*>([−\d.]+)<', svg)
    }
    octave = ticks[-6.0] - ticks[-7.0]
    [(x, y)] = re.findall(r'optimum" data-tip="[^"]*" transform="translate\(([\d.]+) ([\d.]+)\)', svg)
    assert float(x) == pytest.approx(ticks[-7.0], abs=0.15 * octave)
    assert float(y) == pytest.approx(labels[0.4], abs=0.3 * abs(steps[0]))
    darkest = re.findall(r'<rect class="heat" fill-opacity="0.85" x="([\d.]+)" y="([\d.]+)" width="([\d.]+)"', svg)
    assert len(darkest) == 1  # the row of 0.4 alone is so low anywhere
    left, _, width = map(float, darkest[0])
    assert width == pytest.approx(2 * (LEVELS[0] / 0.04) ** 0.5 * octave, rel=0.3)
    assert left + width / 2 == pytest.approx(ticks[-7.0], abs=0.15 * octave)


def test_two_values_are_told_and_not_drawn() -> None:
    assert panels(analyse(results(runs_of(DECAYS[:2]))).tunings) == ""
