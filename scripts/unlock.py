"""Remove the lock that a killed Snakemake left in this folder, if nothing of it is alive.

A lock whose holder cannot be known to be dead, as it is of another machine or container, is asked
about; where nobody can answer, it stays.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from sae_core import cli
from sae_core.errors import SAEError
from sae_core.workflow_lock import LOCKS, doubts, is_locked, remove_lock


@dataclass(frozen=True)
class Options:
    """What is removed."""

    force: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Also a lock whose holder cannot be known to be dead: look first that no Snakemake is at
    work in this folder, on whatever machine."""


def unlock(options: Options) -> None:
    """Remove the lock, if there is one and it may be."""
    if not is_locked():
        return
    if (doubt := doubts()) and not options.force:
        if not sys.stdin.isatty():
            raise SAEError(
                f"{LOCKS}: {doubt}; if no Snakemake is at work in this folder, "
                "python scripts/unlock.py --force"
            )
        print(f"This folder is locked, and the lock cannot be known to be left over: {doubt}.")
        print("Is no other Snakemake at work here, so that the lock may be removed? [y/N] ", end="")
        sys.stdout.flush()
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            raise SAEError(f"{LOCKS}: stays")
    remove_lock()
    print("the lock of a killed Snakemake is removed; what it had not finished begins again")


if __name__ == "__main__":
    cli.run(unlock, Options, __doc__)
