"""Signals that ask a training to stop: taken between two steps, so that nothing is lost."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from sae_core.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from sae_core.utils.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Of the terminal, of whoever ends a process, and of SLURM before its time limit."""


class Interrupts:
    """A context in which these signals raise `Interrupted`: at once, or at the end of a `deferred`
    block if they come inside one. A notebook's threads get no signals.

    Args:
        group: the processes that share the work. Several stop together, always at the end of a
            `deferred` block.
    """

    def __init__(self, group: ProcessGroup = SINGLE_PROCESS) -> None:
        self.group = group
        self.pending = 0
        self._deferred = False
        self._before: dict[int, Any] = {}

    @contextmanager
    def deferred(self, may_end: Callable[[], bool] = lambda: True) -> Iterator[None]:
        """What is done inside is done as a whole.

        Args:
            may_end: is asked afterwards; until it is true, several processes go on without asking
                each other for signals. It has to be the same in all of them.

        Raises:
            Interrupted: a signal has come.
        """
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        if self.group.is_single or may_end():
            self._raise_pending(self.group.max(self.pending))

    def _note(self, number: int, frame: FrameType | None) -> None:
        first, self.pending = not self.pending, number
        if first and self.group.is_single and not self._deferred:
            self._raise_pending(number)

    @staticmethod
    def _raise_pending(number: int) -> None:
        if number:
            raise Interrupted(f"interrupted by {signal.Signals(number).name}")

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
