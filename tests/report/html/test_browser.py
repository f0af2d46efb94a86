"""A real Chromium opens the report: it draws, answers clicks, prints whole, and runs nothing that a name brings."""

from __future__ import annotations

import html as text
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread
from run_results import results

from mupsweep.analysis.analysis import analyse
from mupsweep.analysis.verdict import DRIFTS, TRANSFERS
from mupsweep.atomic_files import write_json
from mupsweep.sweep.tensor_rules import TensorRule

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium"),
]

HOSTILE = '"><img src=x onerror=document.documentElement.id="hit">'
# run at the end of a copy of the page: what is shown before and after clicks, and what hovering says
PROBE = """<script>
const find = (selector) => [...document.querySelectorAll(selector)];
const shown = (selector) => find(selector).filter((e) => e.getClientRects().length).length;
const seeds = () => shown('[data-seeds="each"] .pt');
const counts = () => ({ 64: shown('[data-size="64x4"]'), 32: shown('[data-size="32x4"]'),
                        first: shown('[data-variant="0"]'), second: shown('[data-variant="1"]') });
const click = (key, value) => {
  const button = document.querySelector(`.toggles [data-key="${key}"][data-value="${value}"]`);
  button?.click();
  return { ...counts(), pressed: button?.getAttribute("aria-pressed") };
};
const hover = (point) => {
  const box = point.getBoundingClientRect(), chart = point.closest("svg.chart");
  const middle = { clientX: box.x + box.width / 2, clientY: box.y + box.height / 2 };
  chart.dispatchEvent(new PointerEvent("pointermove", middle));
  const tip = document.querySelector(".tip");
  const said = tip.hidden ? null : tip.textContent;
  chart.dispatchEvent(new PointerEvent("pointerleave"));
  return { said, meant: point.dataset.tip, after: tip.hidden };
};
const seen = {
  charts: find("svg.chart").map((e) => [e.getBoundingClientRect().width, e.getBoundingClientRect().height]),
  badges: find(".badge").map((e) => e.innerText),
  overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  before: counts(), size_off: click("size", "64x4"), size_on: click("size", "64x4"),
  variant_off: click("variant", "1"), variant_on: click("variant", "1"),
  seeds_before: seeds(), seeds_on: (click("seeds", "each"), seeds()), seeds_off: (click("seeds", "each"), seeds()),
  hovers: find(".pt[data-tip]").filter((e) => e.getClientRects().length).filter((_, i) => i % 5 === 0).map(hover),
  elements: find("img, [onerror], [onload], [onclick]").length,
};
const report = document.createElement("pre");
report.id = "seen";
report.textContent = JSON.stringify(seen);
document.body.append(report);
</script>"""


def chromium(page: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Open a page without a window, under a profile of its own."""
    profile = page.with_name("profile")
    always = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    always += [f"--user-data-dir={profile}", "--hide-scrollbars", "--enable-logging=stderr", "--v=0"]
    command = [str(CHROMIUM), *always, *flags, page.as_uri()]
    return subprocess.run(command, cwd=page.parent, capture_output=True, text=True, timeout=120, check=True)


def probed(page: Path, *flags: str) -> tuple[str, dict[str, Any], list[str]]:
    """The DOM after all scripts, what the probe saw, and what the console was told."""
    copy = page.with_name("probed.html")
    copy.write_text(page.read_text().replace("</body>", f"{PROBE}</body>"))
    done = chromium(copy, "--dump-dom", "--virtual-time-budget=1000", *flags)
    said = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
    return done.stdout, json.loads(text.unescape(said[1])) if said else {}, re.findall(r":CONSOLE.*", done.stderr)


@pytest.fixture(scope="module")
def page(
    rows: Callable,
    rule: TensorRule,
    save: Callable,
    check: Callable,
    tmp_path_factory: pytest.TempPathFactory,
    write_html: Callable,
) -> Path:
    runs = rows(seeds=2)
    sweep = save(tmp_path_factory.mktemp("browser"), runs)
    sweep.results.mkdir()
    write_json(sweep.check_path, check())
    return write_html(sweep, analyse(results(runs)), [(f"rules {i}", [rule] * 3) for i in range(60)])


@pytest.fixture(scope="module")
def opened(page: Path) -> tuple[str, dict[str, Any], list[str]]:
    return probed(page)


def test_it_draws_without_an_error(opened: tuple) -> None:
    dom, seen, console = opened
    assert console == []
    assert [badge.split()[-1] for badge in seen["badges"]] == [DRIFTS, TRANSFERS]
    assert "The learning rate drifts." in dom
    assert len(seen["charts"]) == 10  # a bar, curve, training and check panel per variant; drift and regret
    assert all(width > 200 and height > 30 for width, height in seen["charts"])
    assert seen["overflow"] == 0


def test_buttons_hide_a_size_and_a_variant_everywhere_and_bring_them_back(opened: tuple) -> None:
    seen = opened[1]
    before = seen["before"]
    assert all(n >= 4 for n in before.values())
    assert seen["size_off"] == {**before, "64": 0, "pressed": "false"}
    without = seen["variant_off"]
    assert (without["second"], without["first"]) == (0, before["first"])
    assert without["32"] == before["32"] // 2
    assert seen["size_on"] == seen["variant_on"] == {**before, "pressed": "true"}


def test_each_seed_is_shown_when_asked_for(opened: tuple) -> None:
    seen = opened[1]
    assert (seen["seeds_before"], seen["seeds_off"]) == (0, 0)
    assert seen["seeds_on"] > 60  # of two variants, four widths, eight LRs and two seeds, what lies within the axes


def test_hovering_a_point_says_its_values(opened: tuple) -> None:
    hovers = opened[1]["hovers"]
    assert len(hovers) > 10
    assert sum(h["said"] == h["meant"] for h in hovers) > len(hovers) / 2  # of two points in one place one is said
    assert all(re.search(r"\d", h["said"]) and h["after"] for h in hovers)


def test_light_and_dark_are_two_readable_pages(page: Path) -> None:
    means = []
    for scheme in ("1", "0"):  # light, dark
        picture = page.with_name(f"{scheme}.png")
        flags = ("--window-size=1200,1600", f"--blink-settings=preferredColorScheme={scheme}")
        chromium(page, *flags, f"--screenshot={picture}")
        pixels = imread(picture)[..., :3]
        assert pixels.shape[:2] == (1600, 1200)
        assert len(np.unique((pixels[::2, ::2] * 15).round() @ (1, 16, 256))) > 50  # lines of many colours
        assert np.ptp(pixels.mean(axis=2)) > 0.8  # ink that can be read
        means.append(pixels.mean())
    assert means[0] > 0.9
    assert means[1] < 0.2


def test_paper_shows_what_is_closed_on_screen(page: Path) -> None:
    opened, pdf = page.with_name("opened.html"), page.with_name("paper.pdf")
    opened.write_text(page.read_text().replace("<details>", "<details open>"))
    pages = []
    for path in (page, opened):
        chromium(path, "--no-pdf-header-footer", f"--print-to-pdf={pdf}")
        pages.append(len(re.findall(rb"/Type\s*/Page\b", pdf.read_bytes())))
    assert pages[0] == pages[1] > 5


def test_hostile_names_are_text(
    rows: Callable, rule: TensorRule, save: Callable, check: Callable, tmp_path: Path, write_html: Callable
) -> None:
    script = "</script><script>document.documentElement.id='hit'</script>"
    runs = rows(model=HOSTILE, parametrizations=["mup", HOSTILE], optimizer=HOSTILE, widths=(32, 64), seeds=2)
    runs += rows(widths=(32, 64), seeds=2)
    sweep = save(tmp_path, runs, name=HOSTILE)
    kept = check()
    for variant in kept["variants"]:
        variant |= {"model": HOSTILE + script, "causes": [HOSTILE + script]}
        for row in variant["roles"]:
            row |= {"quantity": HOSTILE, "axis": HOSTILE, "off": [HOSTILE + script]}
    sweep.results.mkdir()
    write_json(sweep.check_path, kept)
    sweep.write_config({**sweep.read_config(), "sweep": {"name": HOSTILE + script}}, f"mupsweep run {HOSTILE}{script}")
    page = write_html(sweep, analyse(results(runs)), [(HOSTILE + script, [rule])])
    dom, seen, console = probed(page, "--window-size=420,900")
    assert console == []
    assert text.escape(HOSTILE, quote=False) in dom
    assert any(HOSTILE in h["said"] for h in seen["hovers"])
    assert seen["elements"] == 0
    assert seen["overflow"] == 0  # on a narrow screen
    assert '<html lang="en">' in dom

    # the same page would be hit, and would be heard, if it did not escape
    page.write_text(page.read_text().replace("</h1>", f"{HOSTILE}</h1><script>nowhere()</script>"))
    dom, _, console = probed(page)
    assert '<html lang="en" id="hit">' in dom
    assert "nowhere is not defined" in console[0]
