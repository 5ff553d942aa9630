"""Progress on the error stream: a bar on a terminal, an occasional line in a log, or nothing.

Both show the rate, the time left and what the caller adds, such as the loss. Neither has colours,
so `NO_COLOR` changes nothing.
"""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Protocol, Self

from tqdm import tqdm

LINE_SECONDS = 30.0
"""Between two lines in a log."""

LINE = "{desc}: {n_fmt}/{total_fmt} {unit}s, {rate_fmt}, {remaining} left{postfix}"

_quiet: ContextVar[bool] = ContextVar("quiet", default=False)


class Progress(Protocol):
    """A phase in progress."""

    n: float
    """How much is done."""
    total: float | None

    def update(self, n: float = 1) -> object:
        """Record that this much more is done."""

    def set_postfix(self, **figures: str) -> None:
        """Show figures after the time left."""

    def close(self) -> None:
        """The phase is over."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...


class Lines:
    """A phase as lines, `LINE_SECONDS` apart; a shorter phase prints nothing."""

    n: float
    total: float | None

    def __init__(self, what: str, unit: str, total: int | None) -> None:
        self.what, self.unit, self.total, self.n = what, unit, total, 0
        self.postfix = ""
        self.start = self.last = time.monotonic()

    def update(self, n: float = 1) -> None:
        self.n += n
        now = time.monotonic()
        if now - self.last >= LINE_SECONDS:
            self.last = now
            print(self._line(now - self.start), file=sys.stderr, flush=True)

    def _line(self, elapsed: float) -> str:
        return tqdm.format_meter(
            self.n, self.total, elapsed, prefix=self.what, unit=self.unit, bar_format=LINE,
            postfix=self.postfix,
        )  # fmt: skip

    def set_postfix(self, **figures: str) -> None:
        self.postfix = ", ".join(f"{name}={figure}" for name, figure in sorted(figures.items()))

    def close(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def progress_bar(what: str, unit: str, total: int | None = None) -> Progress:
    """The way to show a phase that suits the error stream."""
    if _quiet.get() or sys.stderr.isatty():
        return tqdm(total=total, desc=what, unit=unit, leave=False, disable=_quiet.get())
    return Lines(what, unit, total)


def bars_are_wanted() -> bool:
    """Whether libraries may draw their own bars."""
    return sys.stderr.isatty() and not _quiet.get()


@contextlib.contextmanager
def quiet(wanted: bool = True) -> Iterator[None]:
    """Print nothing and show no progress within; errors are raised as ever."""
    if not wanted:
        yield
        return
    token = _quiet.set(True)
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            yield
    finally:
        _quiet.reset(token)
