"""The lock of a workflow in its folder, and when it may be removed.

The lock is Snakemake's own, so no library of locks can take its place, and it names files, not the
process that holds it. So each Snakemake puts a record of itself next to its lock. Without a record,
or with one from another machine or container, nobody can know whether the lock's holder is alive.
"""

import shutil
import uuid
from pathlib import Path

from sae_core.utils.errors import SAEError
from sae_core.utils.files import write_file
from sae_core.utils.holders import Holder

LOCKS = Path(".snakemake/locks")
"""From the folder in which Snakemake runs."""

RECORDS = "*.holder.json"

OURS = ("snakemake", "/scripts/")
"""Parts of the command lines of Snakemake and of its jobs."""


def record_holder() -> None:
    """Record next to Snakemake's lock that this process holds it; Snakemake deletes both."""
    if is_locked():
        write_file(LOCKS / f"{uuid.uuid4().hex}.holder.json", Holder.here().text)


def doubts() -> str | None:
    """Why the lock of this folder may belong to a running workflow; None if it cannot.

    Raises:
        SAEError: the workflow is running.
    """
    alive = processes(Path.cwd())
    holders = [Holder.parse(path.read_text(encoding="utf-8")) for path in LOCKS.glob(RECORDS)]
    alive += [h.pid for h in holders if h and h.state() == "alive" and h.pid not in alive]
    if alive:
        raise SAEError(
            f"{LOCKS}: the workflow is running here, in the processes "
            f"{', '.join(map(str, sorted(alive)))}; wait for them, or stop them"
        )
    if not holders or None in holders:
        return "it does not say which process holds it"
    others = [str(holder) for holder in holders if holder and holder.state() == "unknown"]
    if others:
        return f"it belongs to another machine or container ({'; '.join(others)})"
    return None


def is_locked() -> bool:
    """Whether a Snakemake has locked this folder and not unlocked it."""
    return any(LOCKS.glob("*.lock"))


def remove_lock() -> None:
    """Remove it, whoever holds it."""
    shutil.rmtree(LOCKS)


def processes(folder: Path) -> list[int]:
    """The ids of the processes of a workflow that are running in a folder on this machine, or in
    this container."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().decode(errors="replace")
            if (process / "cwd").resolve() != folder or "scripts/unlock.py" in command:
                continue
        except OSError:  # it has ended, or is another user's
            continue
        if any(word in command for word in OURS):
            found.append(int(process.name))
    return sorted(found)
