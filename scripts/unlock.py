"""Remove the lock that a killed Snakemake left in this folder, if nothing of it is alive.

If it is not certain that a lock's holder is dead, because it is on another machine or in another
container, the user is asked; where nobody can answer, the lock stays.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from sae_core.utils import cli
from sae_core.utils.errors import SAEError
from sae_core.workflow.workflow_lock import LOCKS, doubts, is_locked, remove_lock


@dataclass(frozen=True)
class Options:
    """What to remove."""

    force: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Also remove a lock whose holder may be alive. First make sure that no Snakemake is running
    in this folder, on any machine."""


def unlock(options: Options) -> None:
    """Remove the lock, if there is one and it may be."""
    if not is_locked():
        return
    if (doubt := doubts()) and not options.force:
        if not sys.stdin.isatty():
            raise SAEError(
                f"{LOCKS}: {doubt}; if no Snakemake is running in this folder, run "
                "python scripts/unlock.py --force"
            )
        print(f"This folder is locked, and it is not certain that the lock is left over: {doubt}.")
        print("Remove it? Answer y only if no Snakemake is running in this folder. [y/N] ", end="")
        sys.stdout.flush()
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            raise SAEError(f"{LOCKS}: the lock stays")
    remove_lock()
    print("the lock of a killed Snakemake is removed; its unfinished jobs will start again")


if __name__ == "__main__":
    cli.run(unlock, Options, __doc__)
