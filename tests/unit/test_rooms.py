"""The folders of the package are layers, in the order in which docs/architecture.md lists them."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from running import ROOT

PACKAGE = ROOT / "sae_core"
TABLE = re.findall(r"^\| (`.*?) \|", (ROOT / "docs/architecture.md").read_text(), re.MULTILINE)
ROOMS = {name: n for n, cell in enumerate(TABLE) for name in re.findall(r"`(\w+)/?`", cell)}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "sae_core":
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sae_core."):
            yield str(node.module).split(".")[1]


def test_the_table_has_every_room() -> None:
    there = {room(path) for path in PACKAGE.rglob("*.py")} - {"__init__"}
    assert there == set(ROOMS)


def test_no_two_modules_of_the_tests_have_one_name() -> None:
    """They are imported by their names alone, from several folders."""
    names = [path.stem for path in (ROOT / "tests").rglob("*.py")]
    assert {name for name in names if names.count(name) > 1} <= {"conftest", "__init__"}


@pytest.mark.parametrize("name", ROOMS)
def test_a_room_imports_only_rooms_above_it(name: str) -> None:
    files = [path for path in PACKAGE.rglob("*.py") if room(path) == name]
    below = {(path.name, to) for path in files for to in imported(path) if ROOMS[to] > ROOMS[name]}
    assert not below
