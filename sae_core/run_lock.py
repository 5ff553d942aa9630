"""One process at a time for one piece of work.

The lock is the kernel's, on a file beside the work, and ends with the process that holds it,
however that ends: what a killed process leaves behind is a file, and locks nobody out. Between the
nodes of a cluster it works where the shared file system passes locks on, as NFS does, and Lustre
if it is mounted with `flock`.
"""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TextIO

from sae_core.errors import SAEError
from sae_core.holders import Holder
from sae_core.naming import LOCK_FILE
from sae_core.ranks import is_follower

POLL = 0.5
"""Seconds between two looks at a lock that another process holds."""


def run_lock(checkpoints: Path) -> AbstractContextManager[None]:
    """Keep every other process from the training whose checkpoints are in a folder, but those that
    share it: of these the first has the lock.

    Raises:
        SAEError: another one is at it, or the folder does not take locks.
    """
    if is_follower():
        return nullcontext()
    return lock(checkpoints / LOCK_FILE, "is training this SAE")


@contextmanager
def lock(path: Path, work: str, wait: float = 0.0) -> Iterator[None]:
    """Keep every other process that asks for this lock away.

    Args:
        path: of the file that is locked, and deleted at the end.
        work: what its holder does, for the message.
        wait: seconds for which another holder is waited for.

    Raises:
        SAEError: another process holds it, or the folder does not take locks.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _acquired(path, time.monotonic() + wait)
    except BlockingIOError as error:
        raise SAEError(f"{path.parent}: {_holder(path)} {work}; wait for it, or stop it") from error
    except OSError as error:
        raise SAEError(
            f"{path}: cannot be locked ({error.strerror}); choose another folder"
        ) from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()


def _acquired(path: Path, deadline: float) -> TextIO:
    """The file, locked and still the one at its path, which the holder before may have deleted."""
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise
                file.close()
                time.sleep(POLL)
                continue
            if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
                file.truncate(0)
                file.write(Holder.here().text)
                file.flush()
                return file
        except BaseException:
            file.close()
            raise
        file.close()


def _holder(path: Path) -> str:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return f"process {found['pid']} on {found['host']}"
    except (OSError, ValueError, KeyError, TypeError):  # it has only just begun
        return "another process"
