"""How a command ends: status 0, or one line that says why, and the traceback if asked for."""

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from running import ROOT, run_here

from sae_core.train_config import DataConfig
from sae_core.utils import cli
from sae_core.utils.attempts import ERROR_FILE, forget_failures
from sae_core.utils.errors import Interrupted, PassingError, SAEError


@dataclass(frozen=True)
class Settings:
    """What the command works on."""

    count: int = 1
    """How many."""
    data: DataConfig = field(default_factory=DataConfig)


def ended(body: Any, capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    """Status and error stream of a command."""
    with pytest.raises(SystemExit) as end:
        cli.run(body, Settings, "", argv)
    code, printed = end.value.code, capsys.readouterr().err
    return (1, f"{printed}{code}") if isinstance(code, str) else (int(code or 0), printed)


def fail(error: BaseException) -> Any:
    def body(_: Settings) -> None:
        raise error

    return body


def test_success_is_0(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[Settings] = []
    assert ended(seen.append, capsys, "--count", "3", "--seed", "4") == (0, "")
    assert seen == [Settings(3, DataConfig(seed=4))]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (SAEError("--x 1: wrong"), "error: --x 1: wrong"),
        (SAEError("a\nb\x1b[2J\0: wrong"), r"error: a b\x1b[2J\x00: wrong"),
        (KeyError("k"), "error: KeyError: 'k' (unexpected; --debug shows where)"),
        (ValueError("two\n\n lines"), "error: ValueError: two lines (unexpected; --debug shows"),
        (RuntimeError(), "error: RuntimeError: RuntimeError (unexpected; --debug shows where)"),
        (MemoryError("x" * 5000), f"error: MemoryError: {'x' * 300} (unexpected"),
        (KeyboardInterrupt(), "error: interrupted"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_failure_is_1_and_one_line(
    error: BaseException, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, printed = ended(fail(error), capsys)
    assert status == 1 and printed.startswith(line) and len(printed.splitlines()) == 1


@pytest.mark.parametrize("error", [SAEError("wrong"), KeyError("wrong")])
def test_debug_shows_the_traceback_too(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    status, printed = ended(fail(error), capsys, "--debug")
    assert status == 1 and printed.startswith("Traceback") and "in body" in printed
    assert printed.splitlines()[-1].startswith("error: ")


def test_debug_shows_where_a_setting_was_found_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("--max-text-length", "1", "--debug")
    status, printed = ended(fail(AssertionError()), capsys, *argv)
    assert status == 1 and "Traceback" in printed
    assert printed.splitlines()[-1] == "error: --max-text-length 1: must be at least 2"


COMMANDS = sorted(
    [
        *(path for path in ROOT.glob("scripts/*.py") if "cli.run" in path.read_text()),
        ROOT / "scripts/process.py",
        *ROOT.glob("sae_core/model_training/*_training.py"),
        ROOT / "sae_core/model_training/eval_sae_minibatch.py",
        ROOT / "sae_core/data_processing/textbook_process.py",
        ROOT / "sae_core/formats/import_sae.py",
        ROOT / "sae_core/publishing/verify.py",
    ]
)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda path: path.stem)
def test_every_command_has_it(command: Path) -> None:
    printed = run_here(command, "--help").stdout
    assert "--debug" in printed and "Show the traceback of an error, too." in printed


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("raise SAEError('--x 1: wrong')", "error: --x 1: wrong\n"),
        ("open('/dev/full', 'w').write('x' * 100_000)", "error: the disk is full"),
        ("print('done')", "error: the disk is full"),
    ],
)
def test_a_reason_that_the_log_does_not_take_is_said_on_the_console(
    body: str, reason: str, tmp_path: Path
) -> None:
    """As a job is run by the workflow, with its log on a full disk."""
    script = tmp_path / "job.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom sae_core.utils import cli\n"
        "from sae_core.utils.errors import SAEError\nfrom sae_core.train_config import DataConfig\n"
        f"def body(_):\n    {body}\ncli.run(body, DataConfig, '')\n"
    )
    command = f"{cli.CONSOLE}=/proc/$$/fd/3 exec {sys.executable} {script} 3>&2 >/dev/full 2>&1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith(reason) and len(done.stderr.splitlines()) == 1
    log = tmp_path / "log"
    done = subprocess.run(
        ["bash", "-c", command.replace("/dev/full", str(log))], capture_output=True, timeout=60
    )
    assert not done.stderr, "a log that takes the reason has it alone"


@pytest.mark.parametrize(
    ("error", "is_final"),
    [
        (SAEError("--x 1: wrong"), True),
        (PassingError("the Hub is away"), False),
        (RuntimeError("out of memory"), False),
        (KeyboardInterrupt(), False),
        (Interrupted("stopped"), False),
    ],
)
def test_only_what_the_user_has_to_mend_is_not_tried_again(
    error: BaseException, is_final: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "logs/train/x.log.error"
    mark.parent.mkdir(parents=True)
    monkeypatch.setenv(ERROR_FILE, str(mark))

    def body(_: object) -> None:
        raise error

    with pytest.raises(SystemExit):
        cli.run(body, DataConfig, "", [])
    assert mark.exists() == is_final
    forget_failures(tmp_path / "logs")
    assert not mark.exists()


def test_a_reader_that_goes_away_ends_a_command_in_silence() -> None:
    program = (
        "import dataclasses; from sae_core.utils import cli\n"
        "Settings = dataclasses.make_dataclass('Settings', [])\n"
        "cli.run(lambda _: print('x' * 10**6), Settings, 'It prints.', [])\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 1
