"""Jobs that SLURM still runs for a Snakemake that is gone."""

import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from sae_core.utils.errors import SAEError


def wait_for_jobs(folder: Path, rules: Iterable[str], seconds: float = 10) -> None:
    """Wait until no job of one of these rules, which a Snakemake in `folder` submitted, waits or
    runs; ask at an interval. Without SLURM on this machine there are none.

    Raises:
        SAEError: squeue fails.
    """
    names, told = set(rules), set[str]()
    if not shutil.which("squeue"):
        return
    while live := _queued(folder, names):
        if live != told:
            print(
                f"Waiting for the SLURM jobs {' '.join(sorted(live))}, which an earlier Snakemake "
                "started here; scancel them to continue at once",
                file=sys.stderr,
                flush=True,
            )
            told = live
        time.sleep(seconds)


def _queued(folder: Path, rules: set[str]) -> set[str]:
    """The ids of this user's jobs of these rules in a folder that wait or run.

    The executor starts each in the workflow's folder, with a comment that begins `rule_<name>`.
    """
    command = ["squeue", "--me", "--noheader", "--format=%i|%k|%Z"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or error
        raise SAEError(
            f"squeue: cannot tell which jobs of an earlier Snakemake still run ({reason}); "
            "try again when SLURM answers"
        ) from error
    found = set()
    for line in filter(None, done.stdout.split("\n")):  # a comment may hold other line breaks
        job, comment, place = line.strip().split("|", 2)
        rule = comment.removeprefix("rule_").partition("_wildcards_")[0]
        if rule in rules and Path(place) == folder:
            found.add(job)
    return found
