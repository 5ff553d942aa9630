"""Which failures of a job another attempt may fix, recorded in a file next to the job's log."""

import os
from collections.abc import Iterable
from pathlib import Path

from sae_core.utils.errors import PassingError, SAEError

ERROR_FILE = "SAE_CORE_ERROR"
"""Variable that names the file: when it is there, the job's next attempt ends at once."""

ENDING = ".error"
"""What its name has after that of the log."""


def note_failure(error: BaseException, line: str) -> None:
    """Leave the error's line in the file, if the workflow asks for it and the user has to fix what
    is wrong."""
    path = os.environ.get(ERROR_FILE)
    if path and isinstance(error, SAEError) and not isinstance(error, PassingError):
        try:
            Path(path).write_text(f"{line}\n", encoding="utf-8")
        except OSError:
            pass  # a disk that takes no file: then there is another attempt


def is_final(logs: Iterable[str]) -> bool:
    """Whether a failed job with these logs left the file."""
    return any(Path(f"{log}{ENDING}").exists() for log in logs)


def forget_failures(logs: Path) -> None:
    """Remove the files of the workflow's last run: its errors may have been fixed."""
    for path in logs.rglob(f"*.log{ENDING}"):
        path.unlink(missing_ok=True)
