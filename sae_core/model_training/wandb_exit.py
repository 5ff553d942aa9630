"""Bounds on how long W&B's client waits for its background process, which can hang.

The client waits for what that process answers at the end of a run, and at exit for its end, both
without a limit. The work is done by then, and what has not been sent is on disk.
"""

import atexit
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_TIMEOUT = 10.0
"""Seconds that the background process has to answer or to end, beyond its own limits; then it is
killed."""

_bounded = set[int]()
"""Pids of the background processes whose end is bounded."""


@contextmanager
def killed_after(seconds: float) -> Iterator[None]:
    """Kill the client's background process if the block takes `EXIT_TIMEOUT` longer than this; a
    call of the client that waits for it then ends with an error."""
    process = _background_process()
    timer = threading.Timer(seconds + EXIT_TIMEOUT, process.kill if process else lambda: None)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def bound_exit() -> None:
    """Bound the time that Python's exit waits for the client's background process, which runs by
    now."""
    process = _background_process()
    if process is None or process.pid in _bounded:
        return
    _bounded.add(process.pid)
    exiting = threading.Event()
    # Started now, because an exiting Python starts no threads.
    threading.Thread(target=_kill_late, args=(process, exiting), daemon=True).start()

    def end() -> None:
        exiting.set()
        _tear_down()

    # Functions run in the reverse order of their registration: this one before the client's.
    atexit.register(end)


def end_client() -> None:
    """End the client with all that it holds; its next call starts another."""
    with killed_after(0):
        _tear_down()


def _tear_down() -> None:
    import wandb

    try:
        wandb.teardown()
    except (Exception, SystemExit):  # what comes of a background process that was killed
        pass


def _background_process() -> "subprocess.Popen[bytes] | None":
    """None if another process started it."""
    import wandb

    service = wandb.setup().ensure_service()._proc
    return None if service is None else service._process


def _kill_late(process: "subprocess.Popen[bytes]", exiting: threading.Event) -> None:
    exiting.wait()
    try:
        process.wait(EXIT_TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
