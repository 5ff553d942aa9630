"""Command lines from settings dataclasses: options, help and one-line errors in one place."""

import dataclasses
import errno
import os
import select
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NoReturn, TypeVar

import tyro

from sae_core.utils.attempts import note_failure
from sae_core.utils.errors import Interrupted, SAEError, is_out_of_memory, is_unicode, one_line

Settings = TypeVar("Settings")

FLAT = (tyro.conf.OmitArgPrefixes,)
"""Options carry no group prefix: `--topk`, not `--sae.topk`."""

UNNAMED = tyro.conf.arg(name="")

LONGEST = 4000
"""Maximum number of characters of a message."""

CONSOLE = "SAE_CORE_CONSOLE"
"""Variable that names the workflow's own error stream, for a job whose error stream is a log."""

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Numbers of the errors that say that there is no room on a disk."""


@dataclasses.dataclass(frozen=True)
class Common:
    """What every command line has."""

    debug: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Show the traceback of an error, too."""


def parse(settings: type[Settings], description: str, argv: Sequence[str] | None) -> Settings:
    """Read the command line into a settings dataclass.

    Field names become options, field docstrings their help, nested dataclasses groups. A wrong
    option or value ends the program with status 2 and a message that names it.
    """
    for word in sys.argv[1:] if argv is None else argv:
        if not is_unicode(word):
            raise SAEError(f"{ascii(word)}: not UTF-8; rename what has this name")
    groups = [("own", Annotated[settings, UNNAMED]), ("common", Annotated[Common, UNNAMED])]
    both: Any = dataclasses.make_dataclass("Options", groups)
    if os.environ.get("NO_COLOR"):
        _print_plainly()
    return tyro.cli(both, description=description, args=argv, config=FLAT).own


def _print_plainly() -> None:
    """Have tyro print no colours. It has no public way but a variable of its own, which counts when
    tyro is imported."""
    tyro._experimental_options["ansi_codes"] = False


def run(
    body: Callable[[Settings], Any],
    settings: type[Settings],
    description: str,
    argv: Sequence[str] | None = None,
) -> NoReturn:
    """Parse the command line, run `body` on it and exit: 0, or 1 with one line that says why.

    A training that a signal interrupts exits with 75, EX_TEMPFAIL of sysexits.h: run it again.
    """
    if argv is None:
        _speak_utf8()
    try:
        body(parse(settings, description, argv))
        sys.stdout.flush()  # what a full disk does not take is known here, not after the end
    except Interrupted as interrupted:
        _fail(f"error: {interrupted}", os.EX_TEMPFAIL)
    except KeyboardInterrupt:
        _fail("error: interrupted")
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            sys.exit(1)
        # Looked for here, as the options themselves may be what is wrong.
        if "--debug" in (sys.argv[1:] if argv is None else argv):
            traceback.print_exc()
        line = f"error: {_reason(error)}"
        note_failure(error, line)
        _fail(line)
    sys.exit(0)


def _speak_utf8() -> None:
    """Restart in Python's UTF-8 mode if the locale has another encoding: file names are UTF-8 on
    disk, and libraries below Python read them as UTF-8 whatever the locale is."""
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _nobody_reads() -> bool:
    """Whether what read the output has ended, as `head` does. Then nothing more goes there."""
    output = sys.stdout.fileno()
    poll = select.poll()
    poll.register(output, 0)
    has_ended = any(event & select.POLLERR for _, event in poll.poll(0))
    if has_ended:
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return has_ended


def _fail(line: str, status: int = 1) -> NoReturn:
    """Exit with a last line that is not lost: where the error stream is a log on a disk without
    room, the line goes to the console of the workflow that runs this job."""
    try:
        print(line, file=sys.stderr, flush=True)
        os.fsync(sys.stderr.fileno())  # some file systems notice only now
    except OSError as error:
        if error.errno in FULL:
            _say_elsewhere(line)
    sys.exit(status)


def _say_elsewhere(line: str) -> None:
    """Say it on the workflow's console, if there is one, and nothing more on streams that lead to
    a full disk: Python's own end would fail on what they still hold."""
    if console := os.environ.get(CONSOLE):
        os.write(os.open(console, os.O_WRONLY | os.O_APPEND), f"{line}\n".encode())
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)


def _reason(error: Exception) -> str:
    """An error as one line: the message if the user can fix it, otherwise with the error's name."""
    if isinstance(error, SAEError):
        return one_line(error, most=LONGEST)
    if isinstance(error, RuntimeError) and is_out_of_memory(error):
        return (
            f"out of memory, although the batches are as small as they can be ({one_line(error)})"
        )
    if isinstance(error, OSError) and error.errno in FULL:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}the disk is full ({error.strerror}); free some space"
    return f"{type(error).__name__}: {one_line(error)} (unexpected; --debug shows where)"


def options(settings: Any) -> str:
    """The command line that `parse` reads back into `settings`, a dataclass instance.

    Options at their default are left out.
    """
    words: list[str] = []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            words.append(options(value))
        elif value != _default(field):
            words.append(_option(field.name, value))
    return " ".join(filter(None, words))


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _option(name: str, value: Any) -> str:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    values = value if isinstance(value, (tuple, list)) else (value,)
    return f"--{flag} {' '.join(shlex.quote(str(v)) for v in values)}"
