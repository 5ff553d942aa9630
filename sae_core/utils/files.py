"""Files and folders written completely or not at all, and what identifies them."""

import errno
import fcntl
import glob
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from sae_core.utils.errors import PassingError, SAEError

FORBIDDEN = (PermissionError, NotADirectoryError, IsADirectoryError)
"""Write errors that stay until the user does something; a full disk may have room again."""

NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
"""What a file system answers that can sync files, but no folders."""


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file, creating its folder; whatever fails, an earlier file stays unchanged.

    Raises:
        SAEError: it cannot be written.
    """
    write_parts(path, [content.encode() if isinstance(content, str) else content])


def write_parts(path: Path, parts: Iterable[bytes]) -> None:
    """`write_file` without the whole content in memory: each part is written as it comes.

    Raises:
        SAEError: it cannot be written.
    """
    n_bytes = 0
    with writing(path, lambda: n_bytes):
        path.parent.mkdir(parents=True, exist_ok=True)
        _delete_leftovers(path)
        with _temporary(path) as (file, temporary):
            for part in parts:
                n_bytes += len(part)
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(path)
        sync(path.parent)


@contextmanager
def _temporary(path: Path) -> Iterator[tuple[BinaryIO, Path]]:
    """A new file next to `path`, which is deleted at the end if it is still there.

    It is locked, and the kernel ends the lock with the process: a file without a lock was left
    behind by a killed writer.
    """
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        with temporary.open("xb") as file:
            try:
                with suppress(OSError):  # without locks on this file system, leftovers stay
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Another writer may have deleted it before it was locked.
                if temporary.exists():
                    yield file, temporary
                    return
            finally:
                temporary.unlink(missing_ok=True)


def _delete_leftovers(path: Path) -> None:
    """Delete what killed writers of `path` left behind."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with suppress(OSError), leftover.open("rb") as file:  # held, gone, or without locks
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            leftover.unlink()


@contextmanager
def new_folder(folder: Path, resumes: bool = False) -> Iterator[Path]:
    """A folder to write files into, which in the end replaces `folder`: there are never
    some of the old files and some of the new, and whatever fails, the old ones stay.

    The old folder is moved aside for the new one; if the process dies between the two moves,
    the next write moves it back first.

    Args:
        resumes: the block can go on with what an interrupted one has left, which is kept unless
            the user has to put something right.
    """
    staging = folder.with_name(f".{folder.name}.writing")
    retired = bring_back(folder)
    for leftover in (retired,) if resumes else (staging, retired):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        staging.mkdir(parents=True, exist_ok=resumes)
        yield staging
        sync(staging)
        if folder.exists():
            folder.rename(retired)
        try:
            staging.rename(folder)
        except OSError:
            if retired.exists():
                retired.rename(folder)
            raise
        sync(folder.parent)
        shutil.rmtree(retired, ignore_errors=True)
    except BaseException as error:
        if not resumes or (isinstance(error, SAEError) and not isinstance(error, PassingError)):
            shutil.rmtree(staging, ignore_errors=True)
        raise


def bring_back(folder: Path) -> Path:
    """Put a folder back in its place, if `new_folder` died after it had moved it aside.

    Returns:
        Where it moves it to.
    """
    retired = folder.with_name(f".{folder.name}.replaced")
    if retired.exists() and not folder.exists():
        retired.rename(folder)
        sync(folder.parent)
    return retired


@contextmanager
def writing(path: Path, n_bytes: int | Callable[[], int]) -> Iterator[None]:
    """A block that writes `n_bytes` to a file or folder: its errors name both. Give a function if
    the number is not known beforehand.

    Raises:
        SAEError: it cannot be written.
    """
    try:
        yield
    except OSError as error:
        size = n_bytes() if callable(n_bytes) else n_bytes
        kind = SAEError if isinstance(error, FORBIDDEN) else PassingError
        raise kind(
            f"{path}: cannot be written ({error.strerror or error}), {size:,} bytes; free some "
            "space or choose another folder"
        ) from error


def check_space(path: Path, n_bytes: int, advice: str) -> None:
    """Check that `n_bytes` fit into a folder whose parent exists.

    Raises:
        SAEError: they do not; the message ends with `advice`.
    """
    free = shutil.disk_usage(path.parent).free
    if n_bytes > free:
        raise SAEError(f"{path}: needs {n_bytes:,} bytes, but {free:,} are free there; {advice}")


def sync(path: Path) -> None:
    """Write a file, or a folder's list of names, to the disk itself, so that a power cut keeps it.

    Some file systems cannot do this for a folder; there, its list of names is as safe as they keep
    it.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def folder_stamp(folder: Path) -> str:
    """A hash of the names, sizes and times of the files in a folder, which changes with an edit."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    facts = [(str(path.relative_to(folder)), path.stat()) for path in paths]
    listing = repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in facts])
    return hashlib.sha256(listing.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """The file's SHA-256 as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
