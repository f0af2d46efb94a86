"""The house: rooms that import downwards only and that the architecture page draws, every public name explained."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mupsweep"
SOURCES = sorted(PACKAGE.rglob("*.py"))
TOP_LEVEL = {"pyproject.toml", "mupsweep", "configs", "scripts", "tests", "Makefile", "README.md", "LICENSE"}
LOCKS = {"constraints.txt", "uv.lock", "requirements.txt"}

in_checkout = pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="an installed package")


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_no_file_is_called_utils() -> None:
    vague = ("utils", "util", "helpers", "misc", "common")
    assert [named(p) for p in [*SOURCES, *(ROOT / "tests").rglob("*.py")] if p.stem in vague] == []


def public(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """Public functions and classes of a module."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_every_module_public_function_and_class_is_explained(path: Path) -> None:
    tree = ast.parse(path.read_text())
    missing = [node.name for node in public(tree) if not ast.get_docstring(node)]
    assert missing == []
    assert ast.get_docstring(tree) or not tree.body, "the module itself"


def test_the_architecture_page_draws_every_room_and_names_files_that_exist() -> None:
    text = (PACKAGE / "ARCHITECTURE.md").read_text()
    drawing = text.partition("```text\n")[2].partition("```")[0]
    rooms = {f"{p.name}/" for p in PACKAGE.iterdir() if (p / "__init__.py").is_file()}
    modules = {p.name for p in PACKAGE.glob("*.py")} - {"__init__.py", "__main__.py"}
    drawn = {
        word
        for line in drawing.splitlines()
        if line[:1] != " "
        for word in line.split()
        if word[-1] == "/" or word.endswith(".py")
    }
    assert drawn == rooms | modules
    missing = [
        path
        for path in re.findall(r"`([\w/]+/[\w.]*)", text)
        if not any((root / path).exists() for root in (PACKAGE, ROOT))
    ]
    assert missing == []


@in_checkout
def test_the_rooms_import_downwards_only() -> None:
    script = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([str(script), "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


@in_checkout
def test_the_top_level_of_the_repository_is_the_listed_one() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("no git checkout")
    top = {line.split("/")[0] for line in tracked.stdout.splitlines()}
    assert {name for name in top if not name.startswith(".")} - LOCKS == TOP_LEVEL


def test_only_the_store_names_the_files_of_a_run() -> None:
    names = ("status.json", "summary.json", "metrics.jsonl", "plan.jsonl", "groups.json", "train.log")

    def strings(path: Path) -> set[str]:
        """String constants that are not docstrings."""
        tree = ast.parse(path.read_text())
        docs = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)}
        return {
            n.value
            for n in ast.walk(tree)
            if isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in docs
        }

    found = {named(p): used for p in SOURCES if p.parent.name != "store" and (used := strings(p) & set(names))}
    assert found == {}


def test_test_files_have_names_of_their_own() -> None:
    stems = [p.stem for p in (ROOT / "tests").rglob("test_*.py")]
    assert len(stems) == len(set(stems))
    assert list((ROOT / "tests").rglob("__init__.py")) == []
