"""What a machine with an NVIDIA GPU does, and whether results are the same every time, in at most
five minutes. `make gpu` runs it.

It runs some programs, the most telling first. Their tables are printed, and written to
build/gpu/*.json, row by row. A program that takes too long is stopped, and one whose turn comes too
late is left out; the last table names both, and the tables that are missing or not whole. It fails
if a program does, because results differ, the host waits or something does not run.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent
OUTPUT = Path("build/gpu")
SECONDS = 300


class Program(NamedTuple):
    """What is run, and for how long at most."""

    name: str
    command: Sequence[str]
    seconds: float
    tables: Sequence[str] = ()
    """That it writes."""


class Outcome(NamedTuple):
    """Of a program."""

    name: str
    state: str
    seconds: float
    unfinished: list[str]
    """Tables that are missing or not whole."""


def programs(peers: str, tiny: bool) -> list[Program]:
    """All of them, but for a trial the tests; `peers` is the Python of the environment with the
    peers' libraries."""
    options = ["--tiny"] if tiny else []
    steps, path = (str(FOLDER / name) for name in ("gpu_steps.py", "gpu_path.py"))
    tests = [sys.executable, "-m", "pytest", "--numprocesses=0", "tests/gpu"]
    own = "ceilings", "bytes", "ordinary", "waits", "steps"
    return [
        Program("steps", [sys.executable, steps, *options], 120, own),
        *([] if tiny else [Program("tests", tests, 75)]),
        Program("path", [sys.executable, path, *options], 170, ["harvests", "loaders", "run"]),
        Program("peers", [peers, steps, "--only", "peers", *options], 60, ["peers"]),
    ]


def outcomes(programs: Sequence[Program], seconds: float) -> Iterator[Outcome]:
    """Run programs one after the other, so many seconds in all."""
    end = time.monotonic() + seconds
    shutil.rmtree(OUTPUT, ignore_errors=True)
    # A program that is stopped cannot tidy up, and its models and activations are large.
    with tempfile.TemporaryDirectory() as scratch:
        for program in programs:
            began = time.monotonic()
            most = min(program.seconds, end - began)
            state = _run(program.command, most, {"TMPDIR": scratch}) if most > 0 else "left out"
            unfinished = [name for name in program.tables if not is_whole(name)]
            yield Outcome(program.name, state, time.monotonic() - began, unfinished)


def _run(command: Sequence[str], seconds: float, variables: Mapping[str, str]) -> str:
    """What becomes of a program within so many seconds."""
    process = subprocess.Popen(command, env=os.environ | variables, start_new_session=True)
    try:
        return "failed" if process.wait(seconds) else "done"
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds:.0f} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # with all that it has started
            process.wait()


def is_whole(table: str) -> bool:
    """Whether a table has all its rows."""
    path = OUTPUT / f"{table}.json"
    return path.is_file() and json.loads(path.read_text(encoding="utf-8"))["whole"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for everything")
    parser.add_argument("--peers", default=sys.executable, help="Python with the peers' libraries")
    parser.add_argument("--tiny", action="store_true", help="small shapes, on any machine: a trial")
    given = parser.parse_args()
    found = []
    for outcome in outcomes(programs(given.peers, given.tiny), given.seconds):
        found.append(outcome)
    print("\n| program | outcome | seconds | tables missing or not whole |\n|---|---|--:|---|")
    for name, state, seconds, unfinished in found:
        print(f"| {name} | {state} | {seconds:.0f} | {', '.join(unfinished) or 'none'} |")
    if failed := [outcome.name for outcome in found if outcome.state == "failed"]:
        sys.exit(f"failed: {', '.join(failed)}; see above")


if __name__ == "__main__":
    main()
