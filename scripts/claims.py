"""Try what the works claim: train a sweep for each claim, record its losses, and say in the page what came out.

    python scripts/claims.py train [NAME ...]   # all by default; the same command goes on after an interruption
    python scripts/claims.py                    # what the recorded runs give, written into the page

A sweep is a preset of the name claim_...; its commands stand in the preset's header. Its recorded runs are
configs/experiment/claims/NAME.csv, which `mupsweep transfer --from` reads, so that every verdict follows the code.

The page is configs/experiment/CLAIMS.md. Its prose is written by hand; its tables are blocks, a comment that holds the
call of a function of this module, in the words of a shell, and what it returned, to the next empty line:

    <!-- claims: transfer claim_width sp=drifts mup=transfers -->
"""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import geometric_mean
from tempfile import TemporaryDirectory
from typing import Any

import claim_tables
from claim_tables import RECORDED, VERDICTS, Finding, Table, courses, recorded
from judge_page import picture_of

from mupsweep.analysis.analysis import Analysis, analyse
from mupsweep.analysis.labels import Label
from mupsweep.analysis.run_result import CHANGE_COLUMNS, COLUMNS, RunResult, Size
from mupsweep.analysis.transfer import HORIZON
from mupsweep.formatting import counted, duration
from mupsweep.report.best_runs import best_runs
from mupsweep.report.figures import norms as norm_figures
from mupsweep.report.html.charts import Charts
from mupsweep.report.norms import COLUMNS as NORM_COLUMNS
from mupsweep.report.norms import NormRow, read_norms
from mupsweep.store.results import read_runs
from mupsweep.store.sweep_dir import SweepDir

EXPERIMENTS = RECORDED.parent
PAGE = EXPERIMENTS / "CLAIMS.md"
COMMAND = re.compile(r"^# mupsweep ((?:run|check) experiment=claim_.+)$", re.MULTILINE)
BLOCK = re.compile(r"<!-- claims: (?P<call>.+?) -->(?P<text>(?:\n.+)*)")
SECTION = re.compile(r"^## (?P<title>.+)\n(?P<text>(?:(?!^## ).*\n?)*)", re.MULTILINE)
LINK = re.compile(r"\[\d{4}\.\d{5}\]\([^)]+\)")
KEPT = {
    *("model", "parametrization", "optimizer", "width", "depth", "width_ratio", "depth_ratio", "log2_lr", "seed"),
    *("status", "val_loss", "flops", "horizon", "seconds", *CHANGE_COLUMNS),
}
MEASURED = ("optimizer", "parametrization", "axis", "quantity", "role", "exponent", "low", "high")


@cache
def commands() -> dict[str, str]:
    """The words after `mupsweep` of every sweep and check, by its name, as the headers of the presets give them."""
    presets = sorted(EXPERIMENTS.glob("claim_*.yaml"))
    found = [words for preset in presets for words in COMMAND.findall(preset.read_text())]
    return {named(words): words for words in found}


def named(words: str) -> str:
    """The name of the sweep of some words: sweep.name where it is among them, else that of the preset."""
    given = dict(word.split("=", 1) for word in shlex.split(words)[1:])
    return given.get("sweep.name", given["experiment"])


def train(names: Iterable[str]) -> None:
    """Run sweeps in ./sweeps, and checks, and record each as soon as it has ended."""
    RECORDED.mkdir(exist_ok=True)
    for name in names:
        command = [sys.executable, "-m", "mupsweep", *shlex.split(commands()[name])]
        if command[3] == "run":
            subprocess.run(command, check=True)
            record(name)
        else:  # which exits with 1 where a promise is missed
            said = subprocess.run([*command, "--json"], stdout=subprocess.PIPE, text=True)
            record_exponents(name, json.loads(said.stdout)["variants"])


def record(name: str) -> None:
    """Keep the runs of a finished sweep, and the norms of those at the base's best LR."""
    sweep = SweepDir.open(f"sweeps/{name}")
    runs = read_runs([sweep])
    columns = [column for column in COLUMNS if column in KEPT and any(getattr(run, column) is not None for run in runs)]
    _write_csv(RECORDED / f"{name}.csv", columns, ([getattr(run, column) for column in columns] for run in runs))
    if rows := list(_by_role(read_norms(sweep, _at_base_lr(analyse(runs))))):
        columns = NORM_COLUMNS[1:]
        values = ([getattr(row, column) for column in columns] for row in rows)
        _write_csv(RECORDED / f"{name}-norms.csv", columns, values)


def record_exponents(name: str, variants: Iterable[dict[str, Any]]) -> None:
    """Keep the exponents of a check of coordinates, with their 95 % intervals."""
    rows = [
        (v["optimizer"], v["parametrization"], role["axis"], role["quantity"], role["role"], *role["judged"].values())
        for v in variants
        for role in v["roles"]
        if role["shown"]
    ]
    _write_csv(RECORDED / f"{name}.csv", MEASURED, rows)


def _at_base_lr(analysis: Analysis) -> Iterator[RunResult]:
    """Of every variant and size, the run nearest to the best LR of the variant's smallest size."""
    of_variant: dict[Label, list[tuple[Size, RunResult]]] = defaultdict(list)
    for (label, size), run in best_runs(analysis).items():
        of_variant[label].append((size, run))
    for label, best in of_variant.items():
        base_lr = min(best, key=lambda member: member[0][:2])[1].log2_lr
        for size, _ in best:
            runs = [
                run
                for run in analysis.runs
                if (run.label, run.size) == (label, size) and run.horizon in (None, run.tokens)
            ]
            yield from sorted(runs, key=lambda run: (abs(run.log2_lr - base_lr), run.seed))[:1]


def _by_role(rows: Iterable[NormRow]) -> Iterator[NormRow]:
    """The geometric mean over the matrices of a role at every step, where all of them are known."""
    of_role: dict[tuple[str, int, str], list[NormRow]] = defaultdict(list)
    for row in rows:
        of_role[row.run_id, row.step, row.role].append(row)
    for members in of_role.values():
        norms = [row.norm for row in members if row.norm]
        updates = [row.relative_update for row in members if row.relative_update]
        if len(norms) == len(updates) == len(members):
            yield replace(members[0], tensor="", norm=geometric_mean(norms), relative_update=geometric_mean(updates))


def _write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A line per row, its numbers with no more digits than have meaning."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for row in rows:
            writer.writerow([f"{value:.6g}" if isinstance(value, float) else value for value in row])


def tried(*names: str) -> str:
    """The commands of some sweeps and checks, and what they cost."""
    lines = []
    for name in names:
        cost = f": {cost_of([name])}" if is_sweep(name) else ""
        lines.append(f"- `mupsweep {commands()[name]}`{cost}")
    return "\n".join(lines)


def pictures(*names: str) -> str:
    """The figures of some sweeps."""
    lines = []
    for name in names:
        lines.append(f"![Loss against LR of {name}](claims/{name}.svg)")
        if has_norms(name):
            lines.append(f"![Norms of hidden matrices through the runs of {name}](claims/{name}-norms.svg)")
    return "\n".join(lines)


def cost() -> str:
    """The cost of all sweeps."""
    return f"Recorded are {cost_of([name for name in commands() if is_sweep(name)])}."


BLOCKS: dict[str, Callable[..., object]] = {
    function.__name__: function for function in (*claim_tables.TABLES, tried, pictures, cost)
}


# ------------------------------------------------------------------------------------------------------------- the page


def call(words: str) -> object:
    """What the function of a block returns."""
    name, *arguments = shlex.split(words)
    keywords = dict(word.split("=", 1) for word in arguments if "=" in word)
    return BLOCKS[name](*(word for word in arguments if "=" not in word), **keywords)


def page(old: str) -> str:
    """The page with every block written anew, and the summary of its sections at the top."""
    outcomes: dict[str, list[Table]] = defaultdict(list)

    def anew(match: re.Match[str]) -> str:
        if match["call"] == "summary":
            return match[0]
        found = call(match["call"])
        if isinstance(found, Table):
            title = old.rfind("\n## ", 0, match.start())
            outcomes[old[title:].split("\n", 2)[1].removeprefix("## ")].append(found)
        return f"<!-- claims: {match['call']} -->\n{found}"

    text = BLOCK.sub(anew, old)
    summary = "\n".join(["| work | claim | what came out |", "|---|---|---|", *_summary(text, outcomes)])
    return BLOCK.sub(
        lambda block: f"<!-- claims: summary -->\n{summary}" if block["call"] == "summary" else block[0], text
    )


def _summary(text: str, outcomes: dict[str, list[Table]]) -> Iterator[str]:
    for section in SECTION.finditer(text):
        if tables := outcomes.get(section["title"]):
            works = ", ".join(dict.fromkeys(LINK.findall(section["text"])))
            found = [finding for table in tables for finding in table.findings]
            yield f"| {works} | [{section['title']}](#{anchor(section['title'])}) | {outcome(found)} |"


def outcome(findings: Sequence[Finding]) -> str:
    """How many findings there are of each verdict."""
    counts = {verdict: sum(f.verdict == verdict for f in findings) for verdict in VERDICTS}
    return ", ".join(f"{n} {verdict}" for verdict, n in counts.items() if n)


def is_sweep(name: str) -> bool:
    """Whether a command trains a sweep; else it checks coordinates."""
    return commands()[name].startswith("run ")


def cost_of(names: Iterable[str]) -> str:
    """The runs of some sweeps, their seeds, and the time of a core that they took."""
    runs = [row for name in names for row in csv.DictReader((RECORDED / f"{name}.csv").read_text().splitlines())]
    trained = {(row["log2_lr"], row["seed"], row["seconds"]): float(row["seconds"]) for row in runs}
    seeds = len({row["seed"] for row in runs})
    return f"{counted(len(runs), 'run')}, {counted(seeds, 'seed')}, {duration(sum(trained.values()))} of one core"


def anchor(title: str) -> str:
    """What a section's title is called in a link."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def draw(name: str) -> None:
    """Draw the curves of a sweep, and the norms of hidden matrices through its runs where they were recorded."""
    charts = Charts(recorded(name))
    ladders = [group for group in charts.groups if group.axis != HORIZON]
    (RECORDED / f"{name}.svg").write_text(picture_of(charts, ladders, len(ladders)), encoding="utf-8")
    if not has_norms(name):
        return
    drawn: dict[tuple[Label, Size], list[NormRow]] = defaultdict(list)
    for row in courses(name):
        if row.role == "hidden":
            drawn[(row.model, row.optimizer, row.parametrization), (row.width, row.depth, None)].append(row)
    with TemporaryDirectory() as folder:
        norm_figures.draw(drawn, Path(folder))
        shutil.copy(Path(folder) / "norms.svg", RECORDED / f"{name}-norms.svg")


def has_norms(name: str) -> bool:
    """Whether the runs of a sweep recorded norms."""
    return (RECORDED / f"{name}-norms.csv").exists()


if __name__ == "__main__":
    if sys.argv[1:2] == ["train"]:
        train(sys.argv[2:] or commands())
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    for name in filter(is_sweep, commands()):
        draw(name)
