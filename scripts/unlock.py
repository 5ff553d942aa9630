"""Take away the lock that a killed Snakemake left in this folder, if nothing of it is alive."""

import os
import shutil
import sys
from pathlib import Path

LOCKS = Path(".snakemake/locks")
OURS = ("snakemake", "/scripts/")
"""In the command line of Snakemake, or of a job."""


def processes(folder: Path) -> list[int]:
    """The ids of the processes of a workflow that are at work in a folder, on this machine."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().decode(errors="replace")
            if (process / "cwd").resolve() != folder or process.name == str(os.getpid()):
                continue
        except OSError:  # it has ended, or is another user's
            continue
        if any(word in command for word in OURS):
            found.append(int(process.name))
    return sorted(found)


def main() -> None:
    if not LOCKS.is_dir() or not any(LOCKS.iterdir()):
        return
    alive = processes(Path.cwd())
    if alive:
        sys.exit(
            f"error: {LOCKS}: the workflow is at work here, in the processes "
            f"{', '.join(map(str, alive))}; wait for them, or stop them"
        )
    shutil.rmtree(LOCKS)
    print("the lock of a killed Snakemake is taken away; what it had not finished begins again")


if __name__ == "__main__":
    main()
