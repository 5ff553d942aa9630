"""What SLURM still runs for a Snakemake that is gone."""

import shutil
import subprocess
import sys
import time
from collections.abc import Iterable

from sae_core.errors import SAEError


def wait_for_jobs(ids: Iterable[str], seconds: float = 10) -> None:
    """Wait until none of these jobs waits or runs, asking every so many seconds.

    Without SLURM on this machine they were jobs of another scheduler, and are not waited for.

    Raises:
        SAEError: squeue fails.
    """
    mine, told = set(ids), set[str]()
    if not mine or not shutil.which("squeue"):
        return
    while live := mine & _queued():
        if live != told:
            print(
                f"Waiting for the SLURM jobs {' '.join(sorted(live))}, which an earlier Snakemake "
                "started for the same outputs; scancel them to go on at once",
                file=sys.stderr,
            )
            told = live
        time.sleep(seconds)


def _queued() -> set[str]:
    """The ids of this user's jobs that wait or run."""
    command = ["squeue", "--me", "--noheader", "--format=%i"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or error
        raise SAEError(
            f"squeue: cannot tell which jobs of an earlier Snakemake still run ({reason}); "
            "try again when SLURM answers"
        ) from error
    return set(done.stdout.split())
