"""Command lines from settings dataclasses: options, help and one-line errors in one place."""

import dataclasses
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NoReturn, TypeVar

import tyro

from sae_core.errors import Interrupted, SAEError, is_out_of_memory, one_line

Settings = TypeVar("Settings")

FLAT = (tyro.conf.OmitArgPrefixes,)
"""Options carry no group prefix: `--topk`, not `--sae.topk`."""

UNNAMED = tyro.conf.arg(name="")


LONGEST = 4000
"""Characters of a message."""


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
    groups = [("own", Annotated[settings, UNNAMED]), ("common", Annotated[Common, UNNAMED])]
    both: Any = dataclasses.make_dataclass("Options", groups)
    if os.environ.get("NO_COLOR"):
        tyro._experimental_options["ansi_codes"] = False  # tyro does not look by itself
    return tyro.cli(both, description=description, args=argv, config=FLAT).own


def run(
    body: Callable[[Settings], Any],
    settings: type[Settings],
    description: str,
    argv: Sequence[str] | None = None,
) -> NoReturn:
    """Parse the command line, run `body` on it and exit: 0, or 1 with one line that says why.

    A training that a signal interrupts exits with 75, EX_TEMPFAIL of sysexits.h: run it again.
    """
    try:
        body(parse(settings, description, argv))
    except Interrupted as interrupted:
        print(f"error: {interrupted}", file=sys.stderr, flush=True)
        sys.exit(os.EX_TEMPFAIL)
    except KeyboardInterrupt:
        sys.exit("error: interrupted")
    except Exception as error:
        # Looked for here, as the options themselves may be what is wrong.
        if "--debug" in (sys.argv[1:] if argv is None else argv):
            traceback.print_exc()
        sys.exit(f"error: {_reason(error)}")
    sys.exit(0)


def _reason(error: Exception) -> str:
    """An error as one line: what the user can mend as it is, anything else by its name."""
    if isinstance(error, SAEError):
        return one_line(error, most=LONGEST)
    if isinstance(error, RuntimeError) and is_out_of_memory(error):
        return f"out of memory, and not for want of smaller pieces ({one_line(error)})"
    return f"{type(error).__name__}: {one_line(error)} (not foreseen; --debug shows where)"


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
