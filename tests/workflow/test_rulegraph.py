"""The README's picture of the workflow is current."""

from pathlib import Path

import pytest
from rulegraph import WHAT, Edge, draw, read_dot, rulegraph


@pytest.fixture(scope="module")
def edges() -> list[Edge]:
    return read_dot(rulegraph())


def test_the_picture_is_current(edges: list[Edge], root: Path) -> None:
    stored = (root / "docs/rulegraph.svg").read_text(encoding="utf-8")
    assert stored == draw(edges), "run `make rulegraph`"


def test_every_rule_has_a_note(edges: list[Edge]) -> None:
    assert {rule for edge in edges for rule in edge} == set(WHAT)
