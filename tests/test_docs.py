"""Every command of the documentation runs as it stands, in the order of its document; every link leads somewhere.

Commands run in this process, in a folder with the finished sweep of `make demo`, beside a hub, a W&B server and Slurm's
commands of this machine. What would train for long trains SMALL models instead, after its own words were composed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer

from mupsweep.analysis import analysis
from mupsweep.analysis.config import AnalysisConfig
from mupsweep.analysis.curves import LossCurve
from mupsweep.analysis.transfer import LadderResult, judge_ladders
from mupsweep.cli import app
from mupsweep.sweep import config

TESTS = Path(__file__).parent
ROOT = TESTS.parent
sys.path += [str(TESTS / name) for name in ("data", "launchers", "trackers")]
from fake_slurm import Fake  # noqa: E402

if not (ROOT / "pyproject.toml").is_file():
    pytest.skip("an installed package has no documentation to run", allow_module_level=True)

spec = importlib.util.spec_from_file_location("readme", ROOT / "scripts" / "readme.py")
assert spec is not None
assert spec.loader is not None
readme = importlib.util.module_from_spec(spec)
spec.loader.exec_module(readme)

Cli = Callable[..., tuple[int, str, str]]

SMALL = [
    *("training.steps=2", "training.tokens=null", "training.warmup=0", "training.batch_size=1"),
    *("training.eval_batches=1", "training.precision=fp32", "model.context=8"),
]
SHAPE = ["model.width=16", "model.depth=1", "model.head_dim=8", "data.tokenizer=bytes", "sweep.log2_lrs=[-8,-6]"]
CHECK = [
    *("sweep.width_ratios=[1,2,4]", "sweep.depth_ratios=[1]", "sweep.seeds=[0]", "sweep.log2_lrs=[-8]"),
    *("model.width=16", "model.context=16", "training.steps=3", "training.batch_size=2"),
]
LAW = {"optimizer=muon": ["optimizer.ns_steps=1"]}  # most CPUs emulate the bf16 that it multiplies in
# Commands that get more words, or others, and why.
MORE = {
    "sweep.search=adaptive": ["sweep.max_runs=4", "sweep.width_ratios=[1]"],  # 18 runs of each size
    'launcher.sizes={w128-d4:{nodes:2,gpus:4,devices_per_run:8,time:"24:00:00"}}': ["training.batch_size=8"],
    "launcher=slurm": ["sweep.seeds=[0,1,2]"],  # the sweep is finished: another seed is there to be submitted
    "sweep.name=llama": [  # as long as it is, since the next command needs an optimum between the LRs
        *("training.steps=30", "training.batch_size=4", "training.eval_batches=4", "model.context=32"),
        *("sweep.width_ratios=[1]", "sweep.log2_lrs=[-8,-6,-5,-4,-2]"),
    ],
}
PLAN_ONLY = {
    "launcher.devices_per_run=4": "wants four accelerators",
    "launcher.sizes={w2048-d32:{devices_per_run:4,shard:true}}": "the same",
    "training.micro_batch=2": "a model of 640 M parameters",
    "data=fineweb": "hours on a GPU, and 262 M tokens of the hub",
    "experiment=zheng_width": "weeks on a GPU, and 300 M tokens of OpenWebText",
}
NO_SWEEP = {"sweeps/zheng_width": "a sweep that PLAN_ONLY does not train", "sweeps/first": "the same"}

PIECE = re.compile(r"(?:<!-- file: (?P<file>\S+) -->\n)?```(?P<kind>\w+)\n(?P<text>.*?)```", re.DOTALL)
LINK = re.compile(r"\]\((?!https?://)(?P<path>[^)#\s]*)(?:#(?P<anchor>[^)]*))?\)")
INLINE = re.compile(r"`(mupsweep (?:run|plan|rules|check|data)[^`]*)`")


class Piece(NamedTuple):
    """A fenced block; `file` is where it is to be written."""

    kind: str
    text: str
    file: str | None


def pieces(text: str) -> Iterator[Piece]:
    for match in PIECE.finditer(text):
        yield Piece(match["kind"], match["text"], match["file"])


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def composed(words: list[str]) -> config.SweepConfig:
    """The config that the words of a command choose."""
    folder = words[words.index("--config-dir") + 1] if "--config-dir" in words else None
    return config.load([word for word in words if re.match(r"[a-z_.]+=", word)], folder)


@dataclass
class Desk:
    """What a reader sits at."""

    cli: Cli
    monkeypatch: pytest.MonkeyPatch
    hub: Callable[[], Any]
    wandb: Callable[[], Any]
    names: dict[str, Any] = field(default_factory=dict)

    def read(self, text: str) -> None:
        """Do everything that a document says."""
        for piece in pieces(text):
            if piece.file is not None:
                Path(piece.file).parent.mkdir(parents=True, exist_ok=True)
                Path(piece.file).write_text(piece.text)
            elif piece.kind == "sh":
                for line in piece.text.splitlines():
                    self.type(line)
            elif piece.kind == "python":
                exec(compile(piece.text, "<documentation>", "exec"), self.names)
            else:
                assert piece.kind in ("text", "yaml"), f"a block of {piece.kind}"

    def type(self, line: str) -> None:
        """Run one line of a shell."""
        words = shlex.split(line, comments=True)
        if not words:
            return
        command, *rest = words
        if command == "make":
            assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line
        elif command == "pip":
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            wanted = re.fullmatch(r"mupsweep\[(.+)\]", rest[1])
            assert wanted, line
            assert set(wanted[1].split(",")) <= set(extras), line
        elif command == "export":
            assert rest == ["PYTHONPATH=$PWD/mine"], line
            self.monkeypatch.setenv("PYTHONPATH", str(Path("mine").absolute()))
            self.monkeypatch.syspath_prepend(str(Path("mine").absolute()))
        elif command == "cat":
            assert Path(rest[0]).read_text(), line
        else:
            assert command == "mupsweep", f"no test knows how to run: {line}"
            self.mupsweep(line, rest)

    def mupsweep(self, line: str, words: list[str]) -> None:
        """Run one of our commands, smaller where it would train for long."""
        if any(name in words for name in NO_SWEEP):
            return self.succeeds(line, [words[0], "--help"])
        if words[0] == "sync":
            with self.wandb():
                return self.succeeds(line, words)
        as_it_stands = composed(words) if words[0] in ("run", "data") else None
        if words[0] == "data" and as_it_stands is not None and as_it_stands.variants[0].data.hub_id is not None:
            answer = self.hub()(cli=[*words, "data.validation_fraction=0.2"])  # its sets are small
            assert answer["code"] in (0, None), (line, answer["err"])
            return None
        if words[0] == "run":
            if any(word in PLAN_ONLY for word in words):
                words = ["plan", *words[1:]]
            else:
                small = SMALL
                if "trainer=command" in words:  # its scripts are small, and sweep.sizes says their shapes
                    small = []
                elif not any(word.startswith("experiment=") for word in words):
                    words += SHAPE
                words += [] if any(word.startswith("launcher=") for word in words) else ["launcher=inline"]
                words += [*small, *(more for word in words for more in MORE.get(word, []))]
        elif words[:2] == ["check", "law"]:
            words += [more for word in words for more in LAW.get(word, [])]
        elif words[0] == "check":
            return self.succeeds(line, words + CHECK, 0, 1)  # 1: such small models miss what is promised
        return self.succeeds(line, words, *([3] if "--strict" in words else []))

    def succeeds(self, line: str, words: list[str], *codes: int) -> None:
        code, _, err = self.cli(*words)
        assert code in (codes or (0,)), f"{line}: {err}"


@pytest.fixture(scope="module", autouse=True)
def _judged_once() -> Iterator[None]:
    """Most commands analyse one and the same sweep, which takes seconds: equal curves are judged once."""
    judged: dict[str, list[LadderResult]] = {}

    def judge_once(ladders: Sequence[tuple[str, Sequence[LossCurve]]], config: AnalysisConfig) -> list[LadderResult]:
        key = repr((ladders, config))
        if key not in judged:
            judged[key] = judge_ladders(ladders, config)
        return judged[key]

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(analysis, "judge_ladders", judge_once)
        yield


@pytest.fixture(scope="module")
def sweeps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sweep of `make demo`, finished; runs that are added to it are small."""
    folder = tmp_path_factory.mktemp("demo")
    with contextlib.chdir(folder):
        readme.demo(*SMALL, "launcher=inline")
    return folder / "sweeps"


@pytest.fixture
def desk(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, sweeps: Path
) -> Iterator[Desk]:
    with contextlib.ExitStack() as opened:

        def hub() -> Any:
            """Commands that use a hub run in a process that knows none but ours."""
            if not clients:
                from hub import Hub, write_fineweb, write_openwebtext
                from loopback import TEXTS, Client

                root = tmp_path_factory.mktemp("hub")
                write_fineweb(root, TEXTS)
                write_openwebtext(root, TEXTS)
                served = opened.enter_context(Hub(root))
                clients.append(Client(tmp_path_factory.mktemp("home"), served.endpoint, IMPATIENT="1"))
                opened.callback(clients[0].close)
            return clients[0]

        @contextlib.contextmanager
        def wandb() -> Iterator[None]:
            """W&B is a server of ours."""
            client = pytest.importorskip("wandb")
            from wandb_server import API_KEY, serving

            with serving() as server, monkeypatch.context() as patch:
                patch.delenv("WANDB_MODE", raising=False)
                patch.setenv("WANDB_BASE_URL", server.url)
                patch.setenv("WANDB_API_KEY", API_KEY)
                client.teardown()
                yield
                client.teardown()
                assert server.unknown == []

        clients: list[Any] = []
        for name in ("CACHE", "CONFIG", "DATA", "ARTIFACT"):
            monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "wandb"))
        (tmp_path / "slurm").mkdir()
        monkeypatch.setenv("PATH", f"{tmp_path / 'slurm'}:{Path(sys.executable).parent}:/usr/bin:/bin")
        monkeypatch.setenv("FAKE", str(tmp_path / "slurm"))
        monkeypatch.setenv("SLURM_CLUSTER_NAME", "here")
        Fake(tmp_path / "slurm").queue()
        shutil.copytree(sweeps, tmp_path / "sweeps")
        yield Desk(cli, monkeypatch, hub, wandb)


def in_time(path: Path) -> Any:
    """A document, as a slow case where its commands take long."""
    return path if path.parent == ROOT else pytest.param(path, marks=pytest.mark.slow)


WITH_COMMANDS = [path for path in readme.DOCUMENTS if any(p.kind != "text" for p in pieces(path.read_text()))]


@pytest.mark.filterwarnings("ignore:Pydantic V1 style")  # wandb's own
@pytest.mark.parametrize("path", [*map(in_time, WITH_COMMANDS)], ids=named)
def test_a_document_can_be_followed_to_its_end(path: Path, desk: Desk) -> None:
    desk.read(path.read_text())


@pytest.mark.parametrize(
    "line",
    [
        "make no-such-target",
        "pip install 'mupsweep[no-such-extra]'",
        "mupsweep plan optimzer=muon",
        "mupsweep run model.widht=64 sweep.name=first",
        "mupsweep run optimizer=muon training.steps=many",
        "mupsweep transfer sweeps/demo --no-such-option",
        "mupsweep transfer sweeps/none",
        "mupsweep train experiment=demo",
        "curl http://127.0.0.1",
    ],
)
def test_a_wrong_command_is_noticed(line: str, desk: Desk) -> None:
    with pytest.raises((AssertionError, config.ConfigError)):
        desk.type(line)


def test_what_the_readme_prints_is_what_its_commands_print() -> None:
    """Those of the other documents are compared by `make lint`."""
    text = (ROOT / "README.md").read_text()
    assert len(readme.BLOCK.findall(text)) == 4
    with readme.prepared() as folder:
        assert list(readme.outdated(text, folder)) == []


def test_outputs_are_the_same_up_to_fitted_digits_and_times() -> None:
    assert readme.same("drift -0.00 [-0.23, 0.1]", "drift   +0.01 [-0.24, 0.1]", fitted=True)
    assert not readme.same("drift -0.09", "drift -0.19", fitted=True)
    assert not readme.same("sp: drifts -0.09", "sp: transfers -0.09", fitted=True)
    assert not readme.same("LR 0.01", "LR 0.011", fitted=False)
    timed = (
        "roughly 5s on 2 cpu workers at 1FLOP/s each; b",
        "roughly 9m 05s on 8 cuda\n  workers at 2FLOP/s each; b",
    )
    assert readme.same(*timed, fitted=False)
    assert readme.same(timed[0], "roughly 5s on 1 cpu worker at 1FLOP/s; b", fitted=False)
    assert not readme.same(timed[0], timed[1].removesuffix("b"), fitted=False)


def commands() -> Iterator[tuple[str, ...]]:
    """Every command of the app, those that hold others too."""

    def walk(command: Any, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        yield path
        for name, child in getattr(command, "commands", {}).items():
            yield from walk(child, (*path, name))

    return walk(typer.main.get_command(app), ())


def test_the_reference_shows_the_help_of_every_command(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "dumb")
    text = (ROOT / "mupsweep/cli/README.md").read_text()
    shown = {match["command"]: match["output"] for match in readme.BLOCK.finditer(text)}
    assert set(shown) == {" ".join(("mupsweep", *path, "--help")) for path in commands()}
    for command, output in shown.items():
        printed = cli(*shlex.split(command)[1:])[1]
        assert output.split() == printed.split(), f"{command}: run `make docs`"


@pytest.mark.parametrize("path", readme.DOCUMENTS, ids=named)
def test_links_lead_somewhere_and_commands_in_sentences_compose(path: Path) -> None:
    text = path.read_text()
    for match in LINK.finditer(text):
        target = (path.parent / match["path"]).resolve() if match["path"] else path
        assert target.exists(), match[0]
        if match["anchor"]:
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert match["anchor"] in {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles}, match[0]
    for match in INLINE.finditer(PIECE.sub("", text)):
        words = [word for word in shlex.split(match[1]) if re.fullmatch(r"[a-z_.]+=[^A-Z]*", word)]
        config.load(words)


def test_the_figure_is_small_and_stands_beside_the_command_that_made_it() -> None:
    """As everything under configs/ it is part of the wheel."""
    text, made = (ROOT / "README.md").read_text(), "mupsweep run " + " ".join(readme.DEMO)
    assert f"]({named(readme.FIGURE)})" in text
    assert f"`{made}`" in text
    assert f"{made}\n" in (ROOT / "Makefile").read_text()
    assert 20_000 < readme.FIGURE.stat().st_size < 200_000


@pytest.mark.parametrize("path", readme.DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_line_of_an_examples_output_is_longer_than_a_terminal(path: Path) -> None:
    for match in readme.BLOCK.finditer(path.read_text()):
        long = [line for line in match["output"].splitlines() if len(line) > readme.COLUMNS]
        assert not long, match["command"]
