"""Run a command of the project as its user would."""

import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from tempfile import TemporaryFile

import pytest

ROOT = Path(__file__).resolve().parents[2]

Run = Callable[..., subprocess.CompletedProcess[str]]

TIMEOUT = 300
"""Seconds that a command may take."""


def run_python(
    *arguments: object, cwd: Path = ROOT, ok: bool = True, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS...` in a folder, and check that it succeeds, or fails if not `ok`."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        env={**os.environ, "COLUMNS": "200", **(env or {})},
    )
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done


def run_script(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run `scripts/NAME ARGUMENTS...`, whatever comes of it."""
    return subprocess.run(
        [sys.executable, ROOT / "scripts" / name, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


def run_here(
    script: object,
    *arguments: object,
    cwd: Path = ROOT,
    ok: bool = True,
    env: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """As `run_python`, but in this process, which has imported torch already: for tests of what a
    command does, not of how a process starts or ends. What a library reads from the environment
    when it is imported is not read again."""
    with (
        TemporaryFile("w+") as out,
        TemporaryFile("w+") as errors,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [str(script), *map(str, arguments)])
        patch.setattr(sys, "path", [str(Path(str(script)).parent), *sys.path])
        for name, value in {"COLUMNS": "200", **(env or {})}.items():
            patch.setenv(name, value)
        with redirect_stdout(out), redirect_stderr(errors):
            status = _status(str(script))
        printed = [file.seek(0) or file.read() for file in (out, errors)]
    assert (status == 0) == ok, "".join(printed)
    return subprocess.CompletedProcess([script, *arguments], status, *printed)


def _status(script: str) -> int:
    """Run a script; the status with which its process would end."""
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return end.code or 0
    return 0
