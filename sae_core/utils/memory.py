"""Out of memory: the microbatch is halved, and the work goes on with the same result."""

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from sae_core.utils.errors import SAEError, is_out_of_memory, one_line

Result = TypeVar("Result")


class Microbatch:
    """How many items are processed at a time: halved whenever that many do not fit into memory.

    Args:
        size: how many to begin with.
        items: what they are, for the messages.
        advice: what to do when not even one fits.
    """

    def __init__(self, size: int, items: str, advice: str) -> None:
        self.size, self.items, self.advice = size, items, advice

    def retry(self, work: Callable[[int], Result]) -> Result:
        """`work(size)`, again with half the size as long as memory runs out. `work` must leave
        things as they were when it fails.

        Raises:
            SAEError: there is not enough memory for one item.
        """
        while True:
            try:
                return work(self.size)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                reason = one_line(error)
            self._halve(reason)  # not in the handler: the error holds on to the memory

    def parts(self, n: int, work: Callable[[slice], Result]) -> Iterator[Result]:
        """`work` on `n` items, one microbatch at a time."""
        first = 0
        while first < n:

            def on_part(size: int, first: int = first) -> tuple[int, Result]:
                last = min(first + size, n)
                try:
                    return last, work(slice(first, last))
                except RuntimeError:
                    self.size = min(size, n)  # so that half of it is less
                    raise

            first, result = self.retry(on_part)
            yield result

    def _halve(self, reason: str) -> None:
        if self.size == 1:
            raise SAEError(
                f"out of memory with {self.items} reduced to 1: {self.advice} ({reason})"
            )
        self.size //= 2
        print(f"out of memory: continuing with {self.size} {self.items}", flush=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
