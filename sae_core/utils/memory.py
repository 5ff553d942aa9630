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
        advice: what to do when not even the fewest fit.
        least: the fewest that take less memory than more would.
    """

    def __init__(self, size: int, items: str, advice: str, least: int = 1) -> None:
        self.size, self.items, self.advice, self.least = size, items, advice, least

    def retry(self, work: Callable[[int], Result]) -> Result:
        """`work(size)`, again with half the size as long as memory runs out. `work` must leave
        things as they were when it fails.

        Raises:
            SAEError: there is not enough memory for the fewest items.
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
        if self.size <= self.least:
            raise SAEError(
                f"out of memory with the fewest {self.items}, {self.size}: {self.advice} ({reason})"
            )
        self.size = max(self.size // 2, self.least)
        print(f"out of memory: continuing with {self.size} {self.items}", flush=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
