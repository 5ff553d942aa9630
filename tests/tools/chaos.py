"""Kill random processes of a workflow that runs, then let it finish: is the result the same?

    python tests/tools/chaos.py FOLDER --config config/demo.yaml --kills 20

runs the workflow twice, in `FOLDER/undisturbed` and in `FOLDER/chaos`, and compares every file
that they make, but for `EXCLUDED`.
"""

import argparse
import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from project import Project, copy_project
from running import ROOT

EXCLUDED = ("logs", "benchmarks", "config.yaml", "report.html")
"""What of `results` is not compared. Logs tell of every attempt of a job, and with times;
benchmarks are times and memory, which the page shows; and the configurations differ in
`resume_minutes`."""

SECONDS = (2.0, 12.0)
"""Between two kills."""

PATIENCE = 1800
"""Seconds that one run may take, or the jobs that a killed Snakemake left."""


def artifacts(folder: Path) -> dict[str, str]:
    """SHA-256 of every file that a workflow made, by its path in `results`."""
    results = folder / "results"
    return {
        str(path.relative_to(results)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(results.rglob("*"))
        if path.is_file() and path.relative_to(results).parts[0] not in EXCLUDED
    }


def processes(session: int) -> list[int]:
    """The ids of the living processes of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its_session, *_ = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if int(its_session) == session and state != "Z":
            found.append(int(stat.parent.name))
    return sorted(found)


def start(project: Project, *targets: str) -> subprocess.Popen[bytes]:
    """Snakemake in a session of its own, after the lock of a killed one is taken away."""
    project.snakemake("--unlock")
    with (project.folder / "chaos.log").open("ab") as log:
        return subprocess.Popen(
            project.command(*targets, "--retries", "2"),
            cwd=project.folder,
            stdout=log,
            stderr=log,
            env=project.variables(),
            start_new_session=True,
        )


def disturb(project: Project, kills: int, seed: int, *targets: str) -> tuple[int, int]:
    """Run the workflow and kill so many of its processes, then let it finish.

    Returns:
        How many were killed, which are fewer if it finished before, and how many times Snakemake
        was started.
    """
    left = kills
    draw = random.Random(seed)
    sessions: list[int] = []
    try:
        while left > 0:
            run = start(project, *targets)
            sessions.append(run.pid)
            while left > 0 and run.poll() is None:
                time.sleep(draw.uniform(*SECONDS))
                alive = [pid for session in sessions for pid in processes(session)]
                if len(alive) > 1:  # a job is at work, and not Snakemake alone
                    os.kill(draw.choice(alive), signal.SIGKILL)
                    left -= 1
            if run.poll() == 0:
                break
            print(f"{left} kills left", flush=True)
        settle(sessions)
        run = start(project, *targets)
        sessions.append(run.pid)
        if run.wait(PATIENCE) != 0:
            raise RuntimeError(f"it does not finish; see {project.folder / 'chaos.log'}")
        return kills - left, len(sessions)
    finally:
        for pid in (pid for session in sessions for pid in processes(session)):
            os.kill(pid, signal.SIGKILL)


def settle(sessions: list[int]) -> None:
    """Wait for the jobs of killed Snakemakes, which would keep those of the next one away."""
    end = time.monotonic() + PATIENCE
    while any(map(processes, sessions)):
        if time.monotonic() > end:
            raise RuntimeError("jobs of a killed Snakemake do not end")
        time.sleep(0.2)


def differences(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    """The files that are not the same, or only in one of both."""
    return sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--config", required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    undisturbed = copy_project(options.folder / "undisturbed", ROOT, options.config)
    undisturbed.snakemake()
    print("undisturbed: done", flush=True)
    project = copy_project(options.folder / "chaos", ROOT, options.config)
    config = project.config
    config["runtime"] = {**config.get("runtime", {}), "resume_minutes": 0.02}  # changes no result
    project.configure(config)
    kills, starts = disturb(project, options.kills, options.seed)
    changed = differences(artifacts(undisturbed.folder), artifacts(project.folder))
    if changed:
        sys.exit(f"not the same after {kills} kills: {', '.join(changed)}")
    n_files = len(artifacts(project.folder))
    print(f"{n_files} files are the same after {kills} kills and {starts} starts")


if __name__ == "__main__":
    main()
