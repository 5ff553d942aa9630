"""Copies between a device and the machine's memory that run beside the device's other work.

CUDA can copy while it computes if the machine's memory is page-locked ("pinned") and the copy is on
a stream of its own. On any other device the same calls copy at once, from and to ordinary memory.
"""

from collections.abc import Sequence
from queue import SimpleQueue

import torch
from torch import Tensor


def host_empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor in the machine's memory, for copies from and to `device`."""
    return torch.empty(*shape, dtype=dtype, pin_memory=device.type == "cuda")


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A small tensor on a device; a GPU takes it without making the program wait."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class Copy:
    """A copy that has begun. `source` and `target` have to stay as they are until it is done."""

    def __init__(self, event: "torch.cuda.Event | None") -> None:
        self._event = event

    def wait(self) -> None:
        """Wait here until it is done."""
        if self._event is not None:
            self._event.synchronize()

    def before_what_follows(self) -> None:
        """Make the device wait for it before it does what it is given from now on."""
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)


class SideStream:
    """Where the copies from or to a device run."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(self, target: Tensor, source: Tensor) -> Copy:
        """Begin `target.copy_(source)`; it comes after what the device has to do already."""
        if self._stream is None:
            target.copy_(source)
            return Copy(None)
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            done = torch.cuda.Event()
            done.record()
        return Copy(done)


class HostBuffers:
    """Some buffers of equal size in the machine's memory, which go round between threads.

    Args:
        count: of buffers.
        n_bytes: of each.
        device: that they are copied from or to.
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
        """Let others have it."""
        self._free.put(buffer)
