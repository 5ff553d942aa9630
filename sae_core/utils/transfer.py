"""Copies between a device and host memory that run while the device computes.

CUDA can do this if the host memory is page-locked ("pinned") and the copy has its own stream. On
any other device the same calls copy at once, from and to ordinary memory.
"""

from collections.abc import Sequence
from queue import SimpleQueue

import torch
from torch import Tensor


def host_empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor in host memory, for copies from and to `device`."""
    return torch.empty(*shape, dtype=dtype, pin_memory=device.type == "cuda")


def host_like(tensor: Tensor, device: torch.device) -> Tensor:
    """An uninitialised tensor in host memory, with the shape, format and layout of `tensor`, which
    is on `device`."""
    return torch.empty_like(tensor, device="cpu", pin_memory=device.type == "cuda")


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A small tensor on a device; a GPU takes it without making the program wait."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class Moment:
    """The moment when a device has done everything it was given so far; on any device but CUDA, it
    has already passed."""

    def __init__(self, event: "torch.cuda.Event | None") -> None:
        self.event = event

    @classmethod
    def now(cls, device: torch.device) -> "Moment":
        """The moment when it has done everything so far."""
        if device.type != "cuda":
            return cls(None)
        event = torch.cuda.Event(blocking=True)  # who waits leaves the core to others
        event.record(torch.cuda.current_stream(device))
        return cls(event)

    def wait(self) -> None:
        """Wait here for it."""
        if self.event is not None:
            self.event.synchronize()


class SideStream:
    """Where the copies from or to a device run."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(self, target: Tensor, source: Tensor, after: Moment) -> Moment:
        """Begin `target.copy_(source)` after a moment; returns the moment when it is done. Until
        then neither may be changed or freed."""
        if self._stream is None or after.event is None:
            target.copy_(source)
            return Moment(None)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(after.event)
            target.copy_(source, non_blocking=True)
            return Moment.now(self.device)


class HostBuffers:
    """Some buffers of equal size in host memory, which threads take and give back.

    Args:
        count: of buffers.
        n_bytes: of each.
        device: to copy from or to.
    """

    def __init__(self, count: int, n_bytes: int, device: torch.device) -> None:
        self.n_bytes = n_bytes
        self._free: SimpleQueue[Tensor] = SimpleQueue()
        for _ in range(count):
            self._free.put(host_empty((n_bytes,), torch.uint8, device))

    def take(self) -> Tensor:
        """(n_bytes,) uint8: a buffer that nobody uses; waits for one."""
        return self._free.get()

    def give_back(self, buffer: Tensor) -> None:
        """Let other threads take it."""
        self._free.put(buffer)
