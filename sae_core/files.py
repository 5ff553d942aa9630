"""Files written whole or not at all, and what identifies them."""

import hashlib
import os
from pathlib import Path

from sae_core.errors import SAEError


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file, making its folder; whatever fails, an earlier file stays as it was.

    Raises:
        SAEError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise SAEError(
            f"{path}: cannot be written ({error.strerror}); name one in a folder you can write to"
        ) from error


def sync(path: Path) -> None:
    """Have a file, or a folder's list of names, on the disk itself: a power cut keeps it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def folder_stamp(folder: Path) -> str:
    """A hash of the names, sizes and times of the files in a folder: another one after an edit."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    facts = [(str(path.relative_to(folder)), path.stat()) for path in paths]
    listing = repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in facts])
    return hashlib.sha256(listing.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """The file's SHA-256 as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
