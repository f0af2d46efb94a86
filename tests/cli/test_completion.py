"""A Tab completes commands, groups, their choices and the keys of what is chosen, in bash, zsh and fish, at once."""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from command_line import mupsweep

from mupsweep.sweep.completion import complete
from mupsweep.sweep.compose import choices
from mupsweep.sweep.config import load

HEAVY = ("torch", "numpy", "scipy", "hydra", "omegaconf", "matplotlib", "wandb")


def process(program: list[str], **environment: str) -> str:
    done = subprocess.run(program, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
    return done.stdout


def given(**environment: str) -> str:
    """What a shell is given that asks by these variables."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        _, out, err = mupsweep()
    assert err == ""
    return out


def bash(*words: str) -> list[str]:
    """What bash is given for the last of some words."""
    text, last = "\n".join(["mupsweep", *words]), str(len(words))
    return given(_MUPSWEEP_COMPLETE="complete_bash", COMP_WORDS=text, COMP_CWORD=last).splitlines()


def test_bash_is_given_commands_choices_and_keys() -> None:
    assert bash("ru") == ["run", "rules"]
    assert bash("run", "optimizer", "=", "muon_") == [n for n in choices("optimizer") if n.startswith("muon_")]
    assert bash("run", "optimizer", "=") == choices("optimizer")
    assert bash("run", "optimizer", "=", "muon", "optimizer.ns") == ["optimizer.ns_steps=", "optimizer.ns_steps=5"]


def test_zsh_and_fish_are_given_whole_words() -> None:
    words = "mupsweep plan optimizer=adamw,muon_k"
    zsh = given(_MUPSWEEP_COMPLETE="complete_zsh", _TYPER_COMPLETE_ARGS=words)
    assert zsh == "_arguments '*: :((\"optimizer=adamw,muon_kimi\"))'\n"
    fish = {"_MUPSWEEP_COMPLETE": "complete_fish", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    assert given(_TYPER_COMPLETE_ARGS=words, **fish) == "optimizer=adamw,muon_kimi\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_it_installs_into_the_home_of_its_user_alone(shell: str, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    # a shell that runs it, whose name says which one to install for
    fake = tmp_path / shell
    fake.symlink_to(shutil.which("sh") or "/bin/sh")
    here = f"{sys.executable} -c 'from mupsweep.cli import main; main()' --install-completion {shell}; exit $?"
    environment = {"HOME": str(home), "ZDOTDIR": str(home), "XDG_CONFIG_HOME": str(home / ".config")}
    done = subprocess.run(
        [str(fake), "-c", here], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )
    if done.returncode:  # with shellingham the option takes no name, and asks which shell has called it
        assert "shell" in done.stderr.lower()
        pytest.skip("this shell is not recognised here")
    written = "".join(path.read_text() for path in home.rglob("*") if path.is_file())
    assert "_MUPSWEEP_COMPLETE" in written
    assert f"complete_{shell}" in written


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home of somebody who has mupsweep on the path and has installed nothing yet."""
    program = tmp_path / "bin" / "mupsweep"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\nexec {sys.executable} -c 'from mupsweep.cli import main; main()' \"$@\"\n")
    program.chmod(0o755)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    for name in ("HOME", "ZDOTDIR"):
        monkeypatch.setenv(name, str(home))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / ".config"))
    return home


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_a_real_bash_completes(home: Path) -> None:
    # the option asks which shell has called it; after `exit` bash cannot hand its place to the program
    script = process(["bash", "-c", "mupsweep --show-completion; exit $?"])
    words = 'COMP_WORDS=(mupsweep run parametrization "=" sp_f); COMP_CWORD=4'
    ask = f"{words}; _mupsweep_completion mupsweep; echo ${{COMPREPLY[*]}}"
    assert process(["bash", "-c", f"{script}\n{ask}"]) == "sp_fan_in\n"


LINES = {
    "mupsweep rul": "mupsweep rules",
    "mupsweep run optimizer=adamw,muon_k": "mupsweep run optimizer=adamw,muon_kimi",
    "mupsweep run optimizer=muon optimizer.ns": "mupsweep run optimizer=muon optimizer.ns_steps=",
}


@pytest.mark.skipif(shutil.which("fish") is None, reason="needs fish")
def test_a_real_fish_completes(home: Path) -> None:
    process(["fish", "-c", "mupsweep --install-completion; true"])
    for line, completed in LINES.items():
        candidates = process(["fish", "-c", f"complete -C '{line}'"]).splitlines()
        assert candidates[0].split("\t")[0] == completed.split()[-1]


@pytest.mark.skipif(shutil.which("zsh") is None, reason="needs zsh")
def test_a_real_zsh_completes_at_the_first_tab(home: Path) -> None:
    process(["zsh", "-f", "-c", "mupsweep --install-completion; true"])
    rc = home / ".zshrc"
    leave = f"leave() {{ print -r -- \"$BUFFER\" > {home}/buffer; exit }}; zle -N leave; bindkey '^X' leave\n"
    rc.write_text(rc.read_text().replace("; compinit\n", "; compinit -u\n") + leave)  # whoever owns zsh's folders
    for line, completed in LINES.items():
        terminal, typed = pty.openpty()
        os.write(terminal, f"{line}\t\x18".encode())
        streams = {"stdin": typed, "stdout": typed, "stderr": typed}
        shell = subprocess.Popen(["zsh", "-i", "+m"], **streams, start_new_session=True)
        assert shell.wait(60) == 0
        os.close(typed)
        os.close(terminal)
        assert (home / "buffer").read_text().strip() == completed


def test_it_imports_nothing_that_takes_long() -> None:
    program = (
        "import sys\nfrom mupsweep.cli import main\ntry: main()\nexcept SystemExit: pass\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    words = {"COMP_WORDS": "mupsweep run optimizer = muon optimizer.", "COMP_CWORD": "5"}
    out = process([sys.executable, "-c", program], _MUPSWEEP_COMPLETE="complete_bash", **words)
    assert out.splitlines()[-1] == "[]"
    assert "optimizer.momentum=" in out


def test_keys_are_those_of_what_is_chosen() -> None:
    assert complete([], "optim") == ["optimizer=", "optimizer."]
    assert "optimizer.momentum=" in complete(["optimizer=adamw,muon"], "optimizer.")
    assert "optimizer.momentum=" not in complete([], "optimizer.")
    assert complete(["optimizer=muon"], "optimizer.rest.be") == [
        "optimizer.rest.betas=",
        "optimizer.rest.betas=[0.9,0.95]",
    ]
    assert complete(["experiment=smoke"], "training.steps") == ["training.steps=", "training.steps=30"]
    assert complete([], "allow_imports=") == ["allow_imports=true", "allow_imports=false"]
    assert complete(["experiment=gupta_width"], "parametrization.na") == [
        *("parametrization.name=", "parametrization.name=mup")
    ]
    assert complete([], "optimizer=adamw,adamw") == ["optimizer=adamw,adamw_hyperball"]
    assert complete([], "nothing") == []
    assert complete([], "nothing.at=al") == []


@pytest.mark.parametrize(
    "word", ["optimizer=shampoo2", "model=llama_qiu_380m", "data=fineweb", "experiment=gupta_width"]
)
def test_the_keys_of_a_choice_are_those_that_composing_gives(word: str) -> None:
    for group, section in asdict(load([word]).variants[0]).items():
        if group not in ("model", "optimizer", "parametrization", "data", "training"):
            continue
        offered = {key.removesuffix("=").split(".")[1] for key in complete([word], f"{group}.")}
        assert offered <= set(section), group
        assert offered == set(section) - {"kind"} or group in ("data", "training"), group


def test_a_folder_of_ones_own_groups_is_completed(tmp_path: Path) -> None:
    (tmp_path / "optimizer").mkdir()
    (tmp_path / "optimizer" / "mine.yaml").write_text("defaults: [lion, _self_]\nname: mine\nturbo: 3\n")
    assert complete([], "optimizer=mi", str(tmp_path)) == ["optimizer=mine"]
    assert complete(["optimizer=mine"], "optimizer.tu", str(tmp_path)) == ["optimizer.turbo=", "optimizer.turbo=3"]
    (tmp_path / "optimizer" / "broken.yaml").write_text("a: [")
    assert complete(["optimizer=broken"], "optimizer.", str(tmp_path)) == []


def test_sweeps_are_completed() -> None:
    for name in ("demo", "deep", "other"):
        (Path("sweeps") / name).mkdir(parents=True)
        (Path("sweeps") / name / "plan.jsonl").touch()
    assert bash("status", "sweeps/de") == ["sweeps/deep", "sweeps/demo"]
    assert bash("transfer", "sweeps/o") == ["sweeps/other"]
    assert bash("transfer", "sweeps/other", "--format", "pyt") == ["pytorch"]
