"""Activations from the model's device to files, while the forward passes go on.

The values of each hook and pass are copied into one of a few buffers, on a side stream, and then a
thread hashes and writes them. The model waits only when all buffers are in use. The place of a
window in its file follows from its number, so the threads need no order.
"""

import hashlib
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sae_core.utils.transfer import HostBuffers, Moment, SideStream

DIGEST_BYTES = hashlib.sha256().digest_size

WRITERS = 4
"""Threads that hash and write: each does about 1 GB/s."""

BUFFER_BYTES = 2**31
"""Approximate memory of all buffers together; there are at least two."""


class WindowFiles(NamedTuple):
    """Descriptors of the two files of a part at a hook."""

    data: int
    """Of the windows, one after the other."""
    digests: int
    """Of their SHA-256, likewise."""


@contextmanager
def window_files(data: Path, digests: Path) -> Iterator[WindowFiles]:
    """New files of these names, which at the end are on the disk itself."""
    with data.open("wb") as first, digests.open("wb") as second:
        yield WindowFiles(first.fileno(), second.fileno())
        for file in (first, second):
            os.fsync(file.fileno())


def window_bytes(rows: Tensor) -> list[memoryview]:
    """The bytes of each of some windows (W, positions, D)."""
    return [window.data for window in rows.flatten(1).view(torch.uint8).numpy()]


class WindowWriter:
    """Writes windows while the device goes on.

    Args:
        device: that the windows come from.
        n_hooks: whose windows come at a time.
        most_bytes: the largest amount that is given at a time.
    """

    def __init__(self, device: torch.device, n_hooks: int, most_bytes: int) -> None:
        count = min(max(WRITERS, 2 * n_hooks), BUFFER_BYTES // most_bytes)
        self._buffers = HostBuffers(max(2, count), most_bytes, device)
        self._copies = SideStream(device)
        self._threads = ThreadPoolExecutor(WRITERS)
        self._jobs: deque[Future[None]] = deque()

    def __enter__(self) -> "WindowWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)

    def write(self, files: WindowFiles, first: int, windows: Tensor) -> None:
        """Begin to write (W, positions, D) windows, numbered from `first` in their files.

        Raises:
            OSError: some that came before could not be written.
        """
        self._forget(done=True)
        buffer = self._buffers.take()
        rows = buffer[: windows.numel() * windows.element_size()]
        rows = rows.view(windows.dtype).view(windows.shape)
        copy = self._copies.copy(rows, windows, Moment.now(windows.device))
        # Held until it is copied: its memory may not be used again before.
        job = self._threads.submit(self._store, files, first, rows, [windows], copy)
        job.add_done_callback(lambda _: self._buffers.give_back(buffer))
        self._jobs.append(job)

    def finish(self) -> None:
        """Wait until everything is written.

        Raises:
            OSError: some could not be.
        """
        self._forget(done=False)

    def stop(self) -> None:
        """Begin no further write, and wait for those that have begun: the files may be closed."""
        for job in self._jobs:
            job.cancel()
        wait(self._jobs)

    def _forget(self, done: bool) -> None:
        while self._jobs and (self._jobs[0].done() or not done):
            self._jobs.popleft().result()

    @staticmethod
    def _store(
        files: WindowFiles, first: int, rows: Tensor, held: list[Tensor], copied: Moment
    ) -> None:
        copied.wait()
        held.clear()  # the executor keeps the arguments themselves until the end
        windows = window_bytes(rows)
        digests = b"".join(hashlib.sha256(window).digest() for window in windows)
        write_at(files.data, rows.flatten().view(torch.uint8).numpy().data,
                 first * windows[0].nbytes)  # fmt: skip
        write_at(files.digests, memoryview(digests), first * DIGEST_BYTES)


def read_at(descriptor: int, content: memoryview, offset: int) -> bool:
    """Fill `content` from a place of a file; whether the file has that much."""
    while content and (n := os.preadv(descriptor, [content], offset)):
        content, offset = content[n:], offset + n
    return not content


def write_at(descriptor: int, content: memoryview, offset: int) -> None:
    """Write all of `content` at a place of a file."""
    while content:
        n = os.pwrite(descriptor, content, offset)
        content, offset = content[n:], offset + n
