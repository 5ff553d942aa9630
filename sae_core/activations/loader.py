"""Stored activations, brought to the device that trains on them one chunk ahead.

A chunk's windows are read into page-locked memory, copied to the device on a side stream, and put
into random order there. Each stage works on the next chunk while the one after it uses the last:
threads read and copy, and the device shuffles. On a CPU a thread reads and shuffles.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from queue import SimpleQueue
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from sae_core.utils.transfer import HostBuffers, Moment, SideStream, host_empty, to_device

Item = TypeVar("Item")


class Chunk(NamedTuple):
    """What is shuffled together."""

    windows: Tensor
    """(W,) their numbers."""
    order: Tensor
    """(at most W * positions,) int64: their tokens that take part, in an order."""


class Form(NamedTuple):
    """Of the activations: S sites (a transcoder has two) of width D."""

    sites: int
    positions: int
    width: int
    dtype: torch.dtype

    def of(self, n_windows: int) -> tuple[int, int, int, int]:
        """The shape of so many windows, one site after the other."""
        return self.sites, n_windows, self.positions, self.width

    def size(self, n_windows: int) -> int:
        """Their numbers."""
        return n_windows * self.sites * self.positions * self.width

    def view(self, buffer: Tensor, n_windows: int) -> Tensor:
        """(S, W, positions, D) the first part of a buffer, for so many windows."""
        return buffer[: self.size(n_windows)].view(self.of(n_windows))


Read = Callable[[Tensor, Tensor], None]
"""Fills (S, W, positions, D) with the windows (W,)."""


def shuffled_chunks(
    chunks: Iterable[Chunk], read: Read, form: Form, most: int, device: torch.device
) -> Iterator[Tensor]:
    """(rows, S * D) the tokens of each chunk in its order, on `device`.

    Args:
        most: windows in a chunk.
    """
    if device.type == "cuda":
        yield from _through_pinned_memory(chunks, read, form, most, device)
        return
    buffer = host_empty((form.size(most),), form.dtype, device)

    def on_the_cpu() -> Iterator[Tensor]:
        for windows, order in chunks:
            rows = form.view(buffer, len(windows))
            read(rows, windows)
            yield to_device(in_order(rows, order), device)

    yield from one_ahead(on_the_cpu())


def _through_pinned_memory(
    chunks: Iterable[Chunk], read: Read, form: Form, most: int, device: torch.device
) -> Iterator[Tensor]:
    n_bytes = form.size(most) * form.dtype.itemsize
    host, side = HostBuffers(2, n_bytes, device), SideStream(device)
    # One place on the device, and since when it is free; None at the end, whoever has the place.
    there: SimpleQueue[tuple[Tensor, Moment] | None] = SimpleQueue()
    there.put((torch.empty(form.size(most), dtype=form.dtype, device=device), Moment.now(device)))

    def in_memory() -> Iterator[tuple[Tensor, Chunk]]:
        for chunk in chunks:
            buffer = host.take()
            read(form.view(buffer.view(form.dtype), len(chunk.windows)), chunk.windows)
            yield buffer, chunk

    def on_the_device() -> Iterator[tuple[Tensor, Chunk]]:
        for buffer, chunk in one_ahead(in_memory()):
            if (place := there.get()) is None:
                return
            n, (target, free) = form.size(len(chunk.windows)), place
            try:
                side.copy(target[:n], buffer.view(form.dtype)[:n], free).wait()
            finally:
                host.give_back(buffer)
            yield target, chunk

    for target, (windows, order) in one_ahead(on_the_device(), lambda: there.put(None)):
        rows = in_order(form.view(target, len(windows)), to_device(order, device))
        there.put((target, Moment.now(device)))
        yield rows


def in_order(windows: Tensor, order: Tensor) -> Tensor:
    """(S, W, positions, D) -> (rows, S * D): the tokens in an order, their sites side by side."""
    sites = [site[order] for site in windows.flatten(1, 2)]
    return sites[0] if len(sites) == 1 else torch.cat(sites, dim=1)


def one_ahead(items: Iterator[Item], stop: Callable[[], None] = lambda: None) -> Iterator[Item]:
    """The same items, each computed in a thread while the one before is in use.

    Args:
        stop: is called before the thread is waited for at the end, also after an error or a signal.
    """

    def following() -> list[Item]:
        """The next item; nothing at the end."""
        return list(islice(items, 1))

    with ThreadPoolExecutor(1) as thread:
        try:
            coming = thread.submit(following)
            while item := coming.result():
                coming = thread.submit(following)
                yield from item
        finally:
            stop()
