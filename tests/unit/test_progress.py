"""What a phase shows: a bar on a terminal, lines in a log, nothing when quiet; and no colours."""

import io
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sae_core.trainer.console import Console
from sae_core.utils import progress
from sae_core.utils.progress import Lines, bars_are_wanted, progress_bar, quiet


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which the test sets."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_now_and_then(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with progress_bar("epoch 1/2", "step", 100) as bar:
        for step in range(1, 100):
            clock[0] = step * 0.7
            bar.set_postfix(loss="0.5")
            bar.update()
    printed = capsys.readouterr().err
    first, second = printed.splitlines()
    assert first == "epoch 1/2: 43/100 steps,  1.43step/s, 00:39 left, loss=0.5"
    assert second.startswith("epoch 1/2: 86/100 steps") and "\r" not in printed


def test_a_short_phase_says_nothing_in_a_log(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with progress_bar("harvest", "window", 5) as bar:
        bar.update(5)
        clock[0] = 29
        bar.update(0)
    assert capsys.readouterr().err == ""


def test_a_total_may_come_later(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("harvest", "window") as bar:
        bar.total = 8
        clock[0] = 40
        bar.update(2)
    assert capsys.readouterr().err == "harvest: 2/8 windows, 20.00s/window, 02:00 left\n"


def train_a_little() -> None:
    console = Console(log_freq=1)
    console.on_start(1, 2)
    for step in (1, 2):
        console.on_step(1, step, torch.tensor(0.25), 4.0)
    console.on_checkpoint(Path("folder"), best=True)
    console.on_end({"epoch": [1]}, stopped_early=True)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_with_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert bars_are_wanted()
    train_a_little()
    shown = sys.stderr.getvalue()
    assert "\repoch 1/1" in shown and "l0=4.0, loss=0.2500" in shown and "\x1b[3" not in shown


@pytest.mark.parametrize("terminal", [True, False])
def test_quiet_shows_nothing(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with quiet():
        assert not bars_are_wanted()
        train_a_little()
    assert stream.getvalue() == "" == capsys.readouterr().out
    with quiet(False):
        print("said")
    assert capsys.readouterr().out == "said\n"


def test_quiet_ends_with_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError), quiet():
        raise ValueError
    print("said")
    assert capsys.readouterr().out == "said\n"
    assert isinstance(progress_bar("a", "b", 1), Lines)


def on_a_terminal(command: list[str], **environment: str) -> str:
    """What a command writes to a terminal of its own."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=os.environ | environment
    )
    os.close(theirs)
    written = b""
    try:
        while part := os.read(ours, 65536):
            written += part
    except OSError:  # the other end is closed
        pass
    assert process.wait(timeout=120) == 0
    os.close(ours)
    return written.decode(errors="replace")


def test_no_color_is_respected(root: Path) -> None:
    command = [sys.executable, str(root / "sae_core/data_processing/textbook_process.py"), "--help"]
    terminal = {"TERM": "xterm-256color", "COLUMNS": "100"}
    coloured = on_a_terminal(command, NO_COLOR="", **terminal)
    plain = on_a_terminal(command, NO_COLOR="1", **terminal)
    assert "\x1b[" in coloured and "\x1b[" not in plain
    assert "--folders" in plain
