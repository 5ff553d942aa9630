"""`make gpu` ends in time, says what it left out, and leaves the rows that it has measured."""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/benchmarks"))

from gpu import Program, is_whole, outcomes  # noqa: E402
from gpu_tables import Row, table  # noqa: E402

STUCK = "sleep 60 & echo $!; wait"


def program(name: str, script: str, seconds: float = 60) -> Program:
    return Program(name, ["sh", "-c", script], seconds, [name])


def is_running(pid: int) -> bool:
    """And not only a zombie."""
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_program_that_takes_too_long_is_stopped_and_the_last_ones_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    old = tmp_path / "build/gpu/good.json"
    old.parent.mkdir(parents=True)
    old.write_text('{"whole": true}')
    began = time.monotonic()
    order = [
        program("good", "echo $TMPDIR"),
        program("bad", "exit 3"),
        program("stuck", STUCK, 1),
        program("next", STUCK),
        program("last", "echo never"),
    ]
    found = list(outcomes(order, 3))
    assert time.monotonic() - began < 30
    assert [outcome.name for outcome in found] == [each.name for each in order]
    good, bad, stuck, following, last = (outcome.state for outcome in found)
    assert (good, bad, stuck, last) == ("done", "failed", "stopped after 1 s", "left out")
    assert following.startswith("stopped after ")
    assert all(outcome.unfinished == [outcome.name] for outcome in found), "an old table is none"
    folder, *children = capfd.readouterr().out.split()
    assert len(children) == 2 and not any(is_running(int(child)) for child in children)
    assert not Path(folder).exists()


def test_a_table_is_whole_when_its_last_row_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def rows(fails: bool) -> Iterator[Row]:
        yield {"name": "first", "figure": 0.12345}
        assert not is_whole("some") and not is_whole("all")
        if fails:
            raise ValueError("of the second row")
        yield {"name": "second", "figure": None}

    wrong: list[str] = []
    assert len(table("all", rows(False), wrong)) == 2 and not wrong
    assert len(table("some", rows(True), wrong)) == 1 and len(wrong) == 1
    assert is_whole("all") and not is_whole("some")
    stored = json.loads(Path("build/gpu/some.json").read_text())
    assert stored["rows"] == [{"name": "first", "figure": 0.12345}]
    assert "| second | - |" in capsys.readouterr().out
