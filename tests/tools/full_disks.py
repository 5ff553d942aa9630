"""Disks that are full, or that nothing can be written to."""

import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

SIZE = 2**20
"""Bytes of a small disk."""


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A disk of `SIZE` bytes, mounted at a new folder; the test is skipped where nobody may."""
    folder.mkdir()
    options = f"size={SIZE},mode=700"
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, timeout=30)
    except OSError as error:
        pytest.skip(f"no disk can be mounted here: {error}")
    if done.returncode:
        pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True, timeout=30)


@contextmanager
def filled(disk: Path) -> Iterator[None]:
    """Not a byte of the disk is free."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError:
            pass
    try:
        yield
    finally:
        filler.unlink()


@contextmanager
def read_only(disk: Path) -> Iterator[None]:
    """Nothing on the disk can be changed."""
    remount = ["mount", "-o", "remount,ro", str(disk)]
    subprocess.run(remount, check=True, timeout=30)
    try:
        yield
    finally:
        subprocess.run([*remount[:2], "remount,rw", str(disk)], check=True, timeout=30)


@contextmanager
def short_files(_: Path) -> Iterator[None]:
    """No file may be longer than a few bytes, as if the disk were full; needs no rights."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
