"""Sizes that a sweep lists: the first is the base, heads follow a rule, and ratios beside them are refused."""

from __future__ import annotations

import pytest

from mupsweep.errors import ConfigError
from mupsweep.sweep import plan
from mupsweep.sweep.config import load

SMALL, WIDE = "{width:128,depth:4,heads:2,name:small}", "{width:512,depth:8,heads:8,parameters:30e6}"
BASE = ["data.tokenizer=bytes", "sweep.log2_lrs=[-8]"]


def sizes(*entries: str) -> str:
    return f"sweep.sizes=[{','.join(entries)}]"


def test_the_first_size_is_the_base_and_every_other_has_its_ratios() -> None:
    wide, small = (run.size for run in plan.plan(load([*BASE, sizes(SMALL, WIDE)])))
    assert (small.width, small.depth, small.heads, small.label) == (128, 4, 2, "small")
    assert (small.width_ratio, small.depth_ratio) == (1.0, 1.0)
    assert (wide.width, wide.depth, wide.heads, wide.label) == (512, 8, 8, None)
    assert (wide.width_ratio, wide.depth_ratio) == (4.0, 2.0)


def test_one_number_of_heads_is_held_and_their_dimension_grows() -> None:
    listed = sizes("{width:128,depth:2,heads:4}", "{width:256,depth:2,heads:4}")
    assert [(run.size.heads, run.size.head_dim) for run in plan.plan(load([*BASE, listed]))] == [(4, 64), (4, 32)]


def test_the_parameters_of_a_size_are_the_price_of_a_program() -> None:
    words = ["trainer=command", "trainer.command=train {lr} {size}", "trainer.metrics=log.jsonl"]
    wide, small = plan.plan(load([*BASE, *words, sizes(SMALL, WIDE)]))
    assert wide.cost.known
    assert wide.row()["flops"] == 6 * 30e6 * wide.cost.tokens
    assert not small.cost.known
    assert small.row().keys().isdisjoint({"flops", "parameters"})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            [sizes(SMALL), "sweep.width_ratios=[1,2]"],
            "sweep.sizes and sweep.width_ratios both say which sizes there are",
        ),
        ([sizes(SMALL), "model.width=64"], "model.width: the first of sweep.sizes is the base, so say it there"),
        (["sweep.sizes=[1,2]"], "expected a list, such as"),
        ([sizes("{width:128}")], "missing key 'sweep.sizes.depth'"),
        ([sizes("{width:128,depth:2,head:2}")], "unknown key 'sweep.sizes.head'; did you mean 'heads'"),
        ([sizes("{width:128,depth:2,heads:3}")], "heads=3 does not divide width=128"),
        ([sizes("{width:-1,depth:2}")], "width=-1: expected a positive number"),
        ([sizes(SMALL, SMALL)], "every width and depth once"),
        ([sizes("{width:128,depth:2,heads:2}", "{width:256,depth:2}")], "give heads for every size or for none"),
        (
            [sizes(*(f"{{width:{w},depth:2,heads:{h}}}" for w, h in ((128, 2), (256, 2), (512, 8))))],
            "heads are 2 at width 128, 2 at width 256, 8 at width 512; rules know",
        ),
    ],
)
def test_a_list_that_is_no_ladder_is_refused_in_a_line(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load([*BASE, *words])
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
