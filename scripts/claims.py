"""Try what the works claim: train a sweep for each claim, record its losses, write the page of what came out.

    python scripts/claims.py train [NAME ...]   # all by default; the same command goes on after an interruption
    python scripts/claims.py                    # the page, from the recorded losses

A sweep is a preset of the name claim_...; its command stands in the preset's header. Its recorded runs are
configs/experiment/claims/NAME.csv, which `mupsweep transfer --from` reads, so that every verdict follows the code.
"""

from __future__ import annotations

import csv
import re
import shlex
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from statistics import geometric_mean
from tempfile import TemporaryDirectory
from typing import Any, get_type_hints

from judge_page import picture_of

from mupsweep.analysis.analysis import Analysis, analyse
from mupsweep.analysis.labels import Label
from mupsweep.analysis.run_result import COLUMNS, RunResult, Size
from mupsweep.analysis.verdict import DRIFTS, INCONCLUSIVE, TRANSFERS
from mupsweep.formatting import counted, duration
from mupsweep.report.best_runs import best_runs
from mupsweep.report.figures import norms as norm_figures
from mupsweep.report.html.charts import Charts
from mupsweep.report.norms import COLUMNS as NORM_COLUMNS
from mupsweep.report.norms import NormRow, read_norms
from mupsweep.store.results import read_runs
from mupsweep.store.sweep_dir import SweepDir
from mupsweep.store.tables import read_table

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENTS = ROOT / "configs" / "experiment"
RECORDED = EXPERIMENTS / "claims"
PUBLISHED = ROOT / "tests" / "tables"
PAGE = EXPERIMENTS / "CLAIMS.md"
KEPT = {
    *("model", "parametrization", "optimizer", "width", "depth", "width_ratio", "depth_ratio", "log2_lr", "seed"),
    *("status", "val_loss", "flops", "horizon", "seconds"),
}
COMMAND = re.compile(r"^# mupsweep run (experiment=claim_.+)$", re.MULTILINE)

KEPT_NORM = 1.5  # a factor by which ||W||_R may change and yet count as kept
VERDICTS = SUPPORTED, CONTRADICTED, UNDECIDED = "supported", "contradicted", "undecided"


def commands() -> dict[str, str]:
    """The words of `mupsweep run` for every sweep, by its name, as the headers of the presets give them."""
    presets = sorted(EXPERIMENTS.glob("claim_*.yaml"))
    found = [words for preset in presets for words in COMMAND.findall(preset.read_text())]
    return {named(words): words for words in found}


def named(words: str) -> str:
    """The name of the sweep of some words: sweep.name where it is among them, else that of the preset."""
    given = dict(word.split("=", 1) for word in shlex.split(words))
    return given.get("sweep.name", given["experiment"])


def train(names: Iterable[str]) -> None:
    """Run sweeps in ./sweeps and record them, each as soon as it has ended."""
    for name in names:
        subprocess.run([sys.executable, "-m", "mupsweep", "run", *shlex.split(commands()[name])], check=True)
        record(name)


def record(name: str) -> None:
    """Keep the runs of a finished sweep."""
    RECORDED.mkdir(exist_ok=True)
    sweep = SweepDir.open(f"sweeps/{name}")
    runs = read_runs([sweep])
    columns = [column for column in COLUMNS if column in KEPT and any(getattr(run, column) is not None for run in runs)]
    _write_csv(RECORDED / f"{name}.csv", columns, runs)
    if rows := list(_by_role(read_norms(sweep, _at_base_lr(analyse(runs))))):
        _write_csv(RECORDED / f"{name}-norms.csv", NORM_COLUMNS[1:], rows)


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


def _write_csv(path: Path, columns: Sequence[str], rows: Iterable[Any]) -> None:
    """A line per object, its numbers with no more digits than have meaning."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for row in rows:
            values = [getattr(row, column) for column in columns]
            writer.writerow([f"{value:.6g}" if isinstance(value, float) else value for value in values])


@cache
def recorded(name: str) -> Analysis:
    """The analysis of a sweep's recorded runs, or of a table that a paper prints."""
    ours = RECORDED / f"{name}.csv"
    return analyse(read_table(str(ours if ours.exists() else PUBLISHED / ours.name)).runs)


def courses(name: str) -> Iterator[NormRow]:
    """What the best runs of a sweep recorded of norms, by role."""
    types = get_type_hints(NormRow)
    with (RECORDED / f"{name}-norms.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            number = {k: (int if types[k] is int else float)(v) for k, v in row.items() if types[k] is not str}
            yield NormRow(**{"run_id": "", **row, **number})


@dataclass(frozen=True)
class Finding:
    """What one variant shows of a claim.

    Attributes:
        cells: of its line in a table.
        verdict: SUPPORTED, CONTRADICTED or UNDECIDED.
        variant: its name in the summary.
    """

    cells: tuple[str, ...]
    verdict: str
    variant: str


@dataclass(frozen=True)
class Table:
    """Findings under their columns."""

    columns: tuple[str, ...]
    findings: tuple[Finding, ...]

    def __str__(self) -> str:
        head = [*self.columns, "the claim is"]
        lines = [head, ["---"] * len(head), *([*f.cells, f"**{f.verdict}**"] for f in self.findings)]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def transfer(sweep: str, expected: Mapping[str, str], axis: str = "width", only: Sequence[str] = ()) -> Table:
    """Whether the LR transfers, by optimizer and parametrization.

    Args:
        expected: the verdict that is claimed for a parametrization; the others are left out.
        only: optimizers; all by default.
    """
    findings = []
    for group in recorded(sweep).groups:
        if group.axis != axis or group.parametrization not in expected or (only and group.optimizer not in only):
            continue
        ends = {group.verdict: CONTRADICTED, INCONCLUSIVE: UNDECIDED, expected[group.parametrization]: SUPPORTED}
        cells = (
            group.optimizer,
            group.parametrization,
            f"{group.drift:+.2f}",
            f"{group.total_drift:+.2f}",
            f"{group.regret:.4f}",
            group.verdict,
        )
        findings.append(Finding(cells, ends[group.verdict], f"{group.optimizer}/{group.parametrization}"))
    columns = ("optimizer", "rule", f"octaves per doubling of the {axis}", "in all", "base's LR costs, nats", "LR")
    return Table(columns, tuple(findings))


def lower(sweep: str, parametrization: str, axis: str = "width") -> Table:
    """Whether a parametrization ends lower than SP at the largest size, each at its own best LR, by optimizer."""
    findings = []
    for c in recorded(sweep).comparisons:
        if c.axis != axis or c.of[2] != parametrization or c.over[2] != "sp":
            continue
        low, high = c.lower.low, c.lower.high
        found = UNDECIDED if low is None or high is None or low <= 0 <= high else SUPPORTED if low > 0 else CONTRADICTED
        cells = (c.of[1], f"{c.lower:+.4f}", f"{c.speed_up:.2f}")
        findings.append(Finding(cells, found, f"{c.of[1]}/{parametrization}"))
    columns = ("optimizer", f"{parametrization} ends lower than sp by, nats", "sp's compute for that loss, times")
    return Table(columns, tuple(findings))


def norms(sweeps: Mapping[str, str], stays: Callable[[str], bool]) -> Table:
    """How ||W||_R of hidden matrices changes through a run at the best LR, by optimizer and width.

    Args:
        sweeps: their names, and what is said of their optimizers.
        stays: whether a variant's norm is claimed to stay.
    """
    findings = []
    for name, remark in sweeps.items():
        for (optimizer, width), course in _hidden(name).items():
            first, last = course[0], course[-1]
            growth = last.norm / first.norm  # type: ignore[operator]
            kept = 1 / KEPT_NORM <= growth <= KEPT_NORM
            variant = optimizer + remark
            found = SUPPORTED if kept == stays(variant) else CONTRADICTED
            ends = (f"{first.norm:.2f}", f"{last.norm:.2f}", f"{growth:.2f}")
            cells = (variant, str(width), f"{last.log2_lr:g}", *ends)
            findings.append(Finding(cells, found, f"{variant}, width {width}"))
    columns = ("optimizer", "width", "log2 LR", "||W||_R after a step", "at the end", "factor")
    return Table(tuple(column.replace("|", "\\|") for column in columns), tuple(findings))


def _hidden(name: str) -> dict[tuple[str, int], list[NormRow]]:
    """The courses of hidden matrices by optimizer and width, each by rising step."""
    found: dict[tuple[str, int], list[NormRow]] = defaultdict(list)
    for row in courses(name):
        if row.role == "hidden":
            found[row.optimizer, row.width].append(row)
    return {key: sorted(rows, key=lambda row: row.step) for key, rows in found.items()}


@dataclass(frozen=True)
class Claim:
    """One claim of a work.

    Attributes:
        work: arXiv id.
        title: of its section.
        says: what the work says, and where.
        sweeps: those that try it.
        tables: of findings.
        reading: what explains the outcome, and what it means for a user.
        at_scale: words of `mupsweep plan` for the work's own scale; empty where there is no preset.
    """

    work: str
    title: str
    says: str
    sweeps: tuple[str, ...]
    tables: tuple[Callable[[], Table], ...]
    reading: str
    at_scale: str = ""


MUP_TRANSFERS = {"sp": DRIFTS, "mup": TRANSFERS}
SPECTRAL_TRANSFERS = {"sp": DRIFTS, "spectral": TRANSFERS, "depth_mup": DRIFTS}

CLAIMS = (
    Claim(
        "2602.20937",
        "The LR transfers in width for six optimizers",
        "Under muP the best LR stays where it is as the width grows, for AdamW, ADOPT, LAMB, Sophia, Shampoo and Muon"
        " (Appendix B); under SP it moves. A reviewer could not see it for Shampoo. LAMB is tried with the paper's "
        "rule (`lamb_published`) and with the rule of its own update (`lamb`).",
        ("claim_width",),
        (partial(transfer, "claim_width", MUP_TRANSFERS), partial(lower, "claim_width", "mup")),
        "SP drifts down by most of an octave per doubling with every optimizer that the runs decide, and at width 128"
        " muP ends lower than SP at its own best LR with all but one. The exception is Sophia, whose SP ends lower; "
        "why is not known. No optimizer's LR is seen to leave under muP; where the verdict is open, the interval "
        "still has both outcomes in it, mostly because the best LR of width 128 lies at the end of what the search "
        "had time for. The paper's LAMB rule moves down by a quarter octave per doubling and costs most, which is "
        "what `mupsweep check` says of it; the rule of its own update does not. Shampoo's reviewer and its authors "
        "are both within the interval. For a user: tune at the base under muP with any of these, and take `lamb`, not"
        " `lamb_published`.",
        "experiment=gupta_width optimizer=adamw,adopt,sophia,lamb_published,muon_bernstein,shampoo",
    ),
    Claim(
        "2603.00541",
        "The LR transfers in depth where a block holds two matrices or more",
        "With a block multiplier of 1/depth (`spectral`, k >= 2) the best LR stays from depth 4 to 256; with "
        "1/sqrt(depth) (`depth_mup`, k = 1) it rises (Tables 18, 19).",
        ("claim_depth",),
        (
            partial(transfer, "claim_depth", {"spectral": TRANSFERS, "depth_mup": DRIFTS}, "depth"),
            partial(lower, "claim_depth", "spectral", "depth"),
        ),
        "The signs are those that the paper gives: down a little for `spectral`, up for `depth_mup`. Three doublings "
        "at width 32 move the optimum by less than the square root that the rule predicts (1.5 octaves): with "
        "LayerNorm and few blocks the loss hardly tells LRs an octave apart, so that Muon's base LR costs nothing "
        "under either. AdamW under SP ends far above `spectral`; Muon's sizes are alike. For a user: `spectral` where"
        " the depth grows; that `depth_mup` fails needs more depth than this to see.",
        "experiment=zheng_depth parametrization=spectral,depth_mup",
    ),
    Claim(
        "2603.00541",
        "What the tables of that paper say",
        "The authors read from Tables 15, 16, 28 to 32 and 38 to 40 that the LR transfers in width and depth under "
        "`spectral` (widths 128 to 4096, depths 4 to 256) and neither under SP nor, in depth, under `depth_mup`. Here"
        " mupsweep reads the same numbers.",
        (),
        (
            partial(transfer, "zheng_muon_kimi_width", SPECTRAL_TRANSFERS),
            partial(transfer, "zheng_shampoo_width", SPECTRAL_TRANSFERS),
            partial(transfer, "zheng_muon_depth", SPECTRAL_TRANSFERS, "depth"),
            partial(transfer, "zheng_sophia_depth", SPECTRAL_TRANSFERS, "depth"),
        ),
        "SP drifts in width and so does `depth_mup` for Sophia in depth, as the authors say, and Shampoo transfers. "
        "The numbers do not carry all of the rest: Muon-Kimi's optimum under `spectral` moves down by 0.17 octaves "
        "per doubling, almost an octave over five doublings, at a cost that the tables cannot tell from 0.01 or 0.04 "
        "nats, and Muon's in depth is as uncertain. Octave grids of one seed are what leaves it open.",
    ),
    Claim(
        "2601.01306",
        "Plain Muon leaves the spectral condition and Muon++ keeps it",
        "Over long runs ||W||_R of plain Muon's hidden matrices grows beyond order 1; Muon++ keeps it by its updates "
        "alone, without normalising weights at every step as SSO and Hyperball do, at a fraction of their cost. A norm "
        "counts as kept within a factor of 1.5 of the first step's.",
        ("claim_norms", "claim_norms_decay"),
        (
            partial(
                norms, {"claim_norms": "", "claim_norms_decay": " with decay"}, lambda name: name != "muon_bernstein"
            ),
        ),
        "Plain Muon's norm triples in 1500 steps, and grows more at the larger width, as claimed. SSO keeps it to the"
        " digit and Hyperball nearly, since they normalise at every step; decay halves the growth and does not end "
        "it. Muon++ in its plain form grows as much as Muon: its step is a share of the weight's own norm, so that "
        "steps that line up compound, and nothing bounds their sum at a constant LR. Leaving the condition cost no "
        "loss here: SSO, Muon and Muon++ end within 0.04 nats of one another. For a user: in long runs watch the norm "
        "(`training.norm_points=12`), and take decay, `optimizer.rescale=true` of Muon++, SSO or Hyperball where it "
        "must stay. One seed, two widths, the LR of the smaller one's best run.",
    ),
    Claim(
        "2605.15290",
        "The LR transfers where ever more queries share a key",
        "muP for grouped queries: the LR transfers over the number of queries that share a head of keys and values.",
        ("claim_gqa",),
        (partial(transfer, "claim_gqa", MUP_TRANSFERS), partial(lower, "claim_gqa", "mup")),
        "SP drifts with both optimizers. Under muP neither optimum is seen to move, but the intervals still hold half"
        " an octave per doubling, so no verdict is called; Muon ends well below SP. For a user: "
        "`gqa_rule=fixed_kv_heads` does no harm that these runs can see.",
    ),
)

HEAD = """# The works, tried

What the works that mupsweep unites claim, tried on two CPU cores with the embedded corpus, one protocol for all: the
search chooses LRs and seeds, a verdict is called where a 95 % interval allows it, an interval stands beside every
estimate. `make claims` trains everything again, and a stopped one goes on. Recorded are {cost}
beside other work. The searches of width, depth and shared keys were stopped before their ends, and much of what is
undecided they had not reached. The losses are in [claims/](claims), and the verdicts are what mupsweep says of them.

A claim is *supported* where mupsweep's verdict is the claimed one, *contradicted* where it is the opposite, *undecided*
where the runs cannot tell. These models are a thousandth of the papers': what they show is what a user who tunes at
this scale would see, and no more.

| work | claim | what came out |
|---|---|---|
{rows}
"""


def page() -> str:
    """The text of the page."""
    rows, sections = [], []
    for claim in CLAIMS:
        tables = [make() for make in claim.tables]
        found = [finding for table in tables[:1] for finding in table.findings]
        rows.append(f"| {arxiv(claim.work)} | [{claim.title}](#{anchor(claim.title)}) | {outcome(found)} |")
        sections.append("\n\n".join(section(claim, tables)) + "\n")
    every = dict.fromkeys(name for claim in CLAIMS for name in claim.sweeps)
    return "\n".join([HEAD.format(cost=cost(every), rows="\n".join(rows)), *sections])


def section(claim: Claim, tables: Sequence[Table]) -> Iterator[str]:
    """The parts of a claim's section."""
    yield f"## {claim.title}"
    yield f"{claim.says} ({arxiv(claim.work)})"
    for name in claim.sweeps:
        yield f"`mupsweep run {commands()[name]}`"
    if claim.sweeps:
        yield f"{cost(claim.sweeps)}."
    yield from map(str, tables)
    for name in claim.sweeps:
        yield f"![Loss against LR of {name}](claims/{name}.svg)"
        if has_norms(name):
            yield f"![Norms of hidden matrices through the runs of {name}](claims/{name}-norms.svg)"
    yield claim.reading
    if claim.at_scale:
        yield f"At the paper's scale: `mupsweep plan {claim.at_scale}`, {price(claim.at_scale)}."


def outcome(findings: Sequence[Finding]) -> str:
    """The variants by what they show."""
    by_verdict = {verdict: [f.variant for f in findings if f.verdict == verdict] for verdict in VERDICTS}
    return "; ".join(f"{verdict}: {', '.join(variants)}" for verdict, variants in by_verdict.items() if variants)


def cost(names: Iterable[str]) -> str:
    """The runs of some sweeps, their seeds, and the time of a core that they took."""
    runs = [row for name in names for row in csv.DictReader((RECORDED / f"{name}.csv").open())]
    trained = {(row["log2_lr"], row["seed"], row["seconds"]): float(row["seconds"]) for row in runs}
    seeds = len({row["seed"] for row in runs})
    return f"{counted(len(runs), 'run')}, {counted(seeds, 'seed')}, {duration(sum(trained.values()))} of one core"


def price(words: str) -> str:
    """What a plan says of the cost."""
    command = [sys.executable, "-m", "mupsweep", "plan", *words.split()]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    runs, flops = re.search(r"(\d+) (?:of \d+ )?runs to train, (\S+FLOPs)", " ".join(said.split())).groups()  # type: ignore[union-attr]
    return f"{runs} runs, {flops}"


def arxiv(work: str) -> str:
    """A link to a paper."""
    return f"[{work}](https://arxiv.org/abs/{work})"


def anchor(title: str) -> str:
    """What a section's title is called in a link."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def draw_norms(name: str) -> None:
    """Draw the norms of hidden matrices through the runs of a sweep, as its report does."""
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


def write() -> None:
    """Write the page and the pictures."""
    PAGE.write_text(page(), encoding="utf-8")
    for name in dict.fromkeys(name for claim in CLAIMS for name in claim.sweeps):
        charts = Charts(recorded(name))
        (RECORDED / f"{name}.svg").write_text(picture_of(charts, charts.groups, len(charts.groups)), encoding="utf-8")
        if has_norms(name):
            draw_norms(name)


if __name__ == "__main__":
    if sys.argv[1:2] == ["train"]:
        train(sys.argv[2:] or commands())
    write()
