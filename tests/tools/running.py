"""Run a command of the project as its user would."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

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
