"""The report is one file that says the verdict, escapes what it is told, and stays small."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import replace
from html import escape
from html.parser import HTMLParser

import pytest
from run_results import results

from mupsweep.analysis.analysis import analyse
from mupsweep.analysis.estimate import Estimate
from mupsweep.atomic_files import write_json
from mupsweep.report.html import words
from mupsweep.report.html.charts import estimate_text
from mupsweep.sweep.tensor_rules import TensorRule

VOID = {"meta", "br", "hr", "input"}


class RunLogger(HTMLParser):
    """Collects attributes and checks that every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, key, value or "") for key, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, key, value or "") for key, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_needs_nothing_else(rows: Callable, save_sweep: Callable, write_html: Callable) -> None:
    runs = rows()
    text = write_html(save_sweep(runs), analyse(results(runs))).read_text()
    page = RunLogger(text)
    outward = [a for a in page.attributes if a[1] in ("src", "srcset", "action") or a[0] in ("link", "iframe")]
    outward += [a for a in page.attributes if a[1] == "href" and not a[2].startswith("#")]
    assert not outward
    assert not re.search(r"https?://|//[a-z]|@import|url\(", text.replace("// ", ""))


def test_verdicts_and_numbers_come_first(
    rows: Callable, save_sweep: Callable, rule: TensorRule, write_html: Callable
) -> None:
    runs = rows()
    analysis = analyse(results(runs))
    text = write_html(save_sweep(runs, pending=3), analysis, [("mup, width 64", [rule])]).read_text()
    text = re.sub("</?a[^>]*>", "", text)  # what explains a word
    top = text[: text.index("Loss versus learning rate")]
    assert "drifts" in top
    assert "transfers" in top
    for group in analysis.groups:
        assert f"drift {group.drift} octaves per doubling, {group.total_drift} from" in top
        assert f"where the base&#x27;s LR costs {group.regret:.4f} nats" in top
        assert all(escape(reason[1:]) in top for reason in group.reasons)
        assert group.quality.held_out is not None
        assert f"hand over log2 LR {group.quality.held_out.log2_lr:.2f}" in top
    assert analysis.remarks
    assert all(escape(remark) in top for remark in analysis.remarks)
    assert "mup, width 64" in text
    assert "<td>blocks.*.mlp.up.weight</td>" in text
    assert "<td>0.4375</td>" in text
    assert "mupsweep run parametrization=sp,mup sweep.name=demo" in text
    assert "<td>27</td><td>24</td>" in text  # the runs of a size with 3 pending, and the done ones


def test_a_regret_without_a_value_says_why(rows: Callable, save_sweep: Callable, write_html: Callable) -> None:
    analysis = analyse(results(rows(widths=(32, 64), parametrizations=["sp"], seeds=1)))
    (group,), unknown = analysis.groups, Estimate(None, None, None)
    group = replace(
        group,
        regret=unknown,
        regrets=(group.regrets[0], unknown),
        reasons=("it diverges", "2^-7 diverges at width < 65"),
    )
    text = write_html(save_sweep([]), replace(analysis, groups=(group,))).read_text()
    assert "It diverges.</p>" in text
    assert "<li>2^-7 diverges at width &lt; 65</li>" in text
    assert re.search(r"<td>width 32</td>.*<td>base</td>", text)
    assert re.search(r"<td>width 64</td>.*<td>unknown</td>", text)


def test_what_a_config_says_is_escaped(
    rows: Callable, save_sweep: Callable, rule: TensorRule, write_html: Callable
) -> None:
    evil = "<script>alert('x')</script>\"&"
    runs = rows(model=evil, optimizer=evil, widths=(32, 64)) + rows(widths=(32, 64))
    sweep = save_sweep(rows(widths=(32, 64)))  # a plan refuses names with a slash, results of tables do not
    sweep.write_config({**sweep.read_config(), "sweep": {"name": evil}}, f"mupsweep run {evil}")
    text = write_html(sweep, analyse(results(runs)), [(evil, [rule])]).read_text()
    assert text.count("<script>") == 1
    assert text.count("</script>") == 1
    RunLogger(text)


@pytest.mark.parametrize(
    "grid",
    [
        {"widths": [32], "log2_lrs": [-7], "seeds": 1},
        {"widths": [32, 64], "log2_lrs": [-2, -1, 0]},
        {"widths": [32, 64], "log2_lrs": [-10, -9, -8]},
        {"widths": [64, 128]},
        {"widths": [32, 64], "depths": [4, 8]},
    ],
)
def test_degenerate_sweeps_have_a_page(rows: Callable, save_sweep: Callable, grid: dict, write_html: Callable) -> None:
    runs = rows(**grid)
    text = write_html(save_sweep(runs), analyse(results(runs))).read_text()
    body = text[text.index("<body>") : text.index("<script>")]
    RunLogger(text)
    assert not re.search(r"\b(nan|NaN|None|null|inf)\b", body.replace("gpu: null", ""))
    assert not re.search(r' d="M?"/>', body.replace(' d=""', ""))


def test_a_kept_check_is_shown_with_what_it_found(
    rows: Callable, save_sweep: Callable, check: Callable, write_html: Callable
) -> None:
    runs = rows(widths=(32, 64), seeds=1)
    sweep = save_sweep(runs)
    assert "Coordinate check" not in write_html(sweep, analyse(results(runs))).read_text()
    write_json(sweep.check_path, check())
    text = write_html(sweep, analyse(results(runs))).read_text()
    RunLogger(text)
    section = text[text.index("Coordinate check") : text.index("Runs and cost")]
    assert "<li>SP promises nothing</li><li>μP failed: 2 of 3 promises kept</li><li>its LR &amp; eps</li>" in section
    assert (
        "<td>||dW||_R hidden</td><td>+0.00 [−0.02, +0.02]</td><td>0</td><td>off blocks.*.mlp.up.weight</td>" in section
    )
    assert "width 128: 4 times that of width 32" in section  # SP's features
    assert section.count("width 128: 1 times that of width 32") == 2
    for damaged in ("{", "{}", '{"variants": 3}', '{"variants": [{}]}'):
        sweep.check_path.write_text(damaged)
        assert "Coordinate check" not in write_html(sweep, analyse(results(runs))).read_text()


def test_an_unfinished_sweep_has_a_page(save_sweep: Callable, write_html: Callable) -> None:
    sweep = save_sweep([])
    sweep.config_path.unlink()
    sweep.environment_path.unlink()
    text = write_html(sweep, analyse([])).read_text()
    RunLogger(text)
    assert "nothing to judge" in text


def test_a_large_sweep_stays_small_and_quick(
    rows: Callable, save_sweep: Callable, rule: TensorRule, write_html: Callable
) -> None:
    runs = rows(
        parametrizations=("sp", "mup", "spectral", "depth_mup"),
        widths=(16, 32, 64, 128, 256, 512),
        log2_lrs=[x / 2 for x in range(-26, 0)],
        seeds=4,
    )
    assert len(runs) == 2496
    sweep, analysis = save_sweep(runs), analyse(results(runs))
    start = time.process_time()
    path = write_html(sweep, analysis, [(f"variant {i}", [rule] * 40) for i in range(24)])
    assert time.process_time() - start < 10
    assert path.stat().st_size < 1_500_000


def test_the_page_says_on_how_many_runs_it_rests_and_what_is_known_how_well(
    rows: Callable, save_sweep: Callable, write_html: Callable
) -> None:
    trained = rows(widths=(32, 64), parametrizations=["sp"])
    analysis = analyse(results(trained))
    (group,) = analysis.groups
    text = write_html(save_sweep(trained, pending=3), analysis).read_text()
    assert f"{len(trained)} of {len(trained) + 3} runs finished" in text
    best = estimate_text(Estimate(group.base.log2_lr, group.base.low, group.base.high), spec=".2f")
    assert f"<dd>{2**group.base.log2_lr:.3g}, log2 {best}</dd>" in text
    for optimum in group.optima:
        assert f"<td>{estimate_text(optimum.loss, spec='.4f')}</td>" in text


def test_every_number_of_the_verdicts_has_its_word_explained_in_place(
    rows: Callable, save_sweep: Callable, write_html: Callable
) -> None:
    runs = rows(widths=(16, 32, 64, 128, 256))
    text = write_html(save_sweep(runs), analyse(results(runs))).read_text()
    top = text[: text.index("Loss versus learning rate")]
    ids = set(re.findall(r'<dt id="(word-[a-z-]+)">', top))
    links = re.findall(r'<a class="word" href="#(word-[a-z-]+)" title="([^"]{20,})">', top)
    assert {target for target, _ in links} <= ids
    used = {target.removeprefix("word-") for target, _ in links}
    assert used >= {"drift", "octaves", "nats", "held-out", "fit-error", "kappa", "asymptotic-loss"}
    assert ids == {f"word-{key}" for key in words.WORDS}
    lines = re.findall(r"<li>(.*?)</li>", top)
    for line in lines:
        plain = re.sub(r"<a class=.*?</a>", "", line)
        assert not re.search(r"kappa|asymptotic loss|speed-up|held out|\bE \d", plain), line


def test_an_explained_line_is_escaped_and_reads_as_before() -> None:
    line = "a<b: E 0.10 octaves, kappa [-0.1, 0.2], no octaveless Extra"
    linked = words.explained(line)
    assert re.sub(r"</?a[^>]*>", "", linked) == escape(line)
    assert re.findall(r'href="#word-([a-z-]+)"', linked) == ["fit-error", "octaves", "kappa"]
