"""Signals that ask a training to stop: taken between two steps, so that nothing is lost."""

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from sae_core.errors import Interrupted
from sae_core.parallel import ALONE, Everyone

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Of the terminal, of whoever ends a process, and of SLURM before its time limit."""


class Interrupts:
    """A context in which these signals raise `Interrupted`, but only when the work can bear it:
    where `check` is called, or while it is at rest. A notebook's threads get no signals.

    Args:
        at_rest: whether the work may be left where it is right now.
        everyone: the processes that share the work; they leave it together, at `check`.
    """

    def __init__(self, at_rest: Callable[[], bool], everyone: Everyone = ALONE) -> None:
        self.at_rest, self.everyone = at_rest, everyone
        self.pending = 0
        self._before: dict[int, Any] = {}

    def check(self) -> None:
        """Stop here if a signal has come.

        Raises:
            Interrupted: one has.
        """
        number = self.everyone.greatest(self.pending)
        if number:
            raise Interrupted(f"interrupted by {signal.Signals(number).name}")

    def _note(self, number: int, frame: FrameType | None) -> None:
        first, self.pending = not self.pending, number
        if first and self.everyone.is_alone and self.at_rest():
            self.check()

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
