"""Progress bars."""

import sys

from tqdm import tqdm


def progress_bar(what: str, unit: str, total: int | None = None) -> tqdm:
    """A bar on the error stream; outside a terminal it is drawn every ten seconds."""
    return tqdm(
        total=total,
        desc=what,
        unit=unit,
        leave=False,
        mininterval=0.1 if sys.stderr.isatty() else 10,
    )
