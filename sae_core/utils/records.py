"""Dataclasses that are stored as JSON, and the check that a value is of a field's type."""

import json
import types
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar, Union, get_args, get_origin, get_type_hints

from sae_core.utils.errors import SAEError, one_line


class Dataclass(Protocol):
    """An instance of a dataclass, whichever."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


Record = TypeVar("Record", bound=Dataclass)


def read_json(path: Path, what: str, advice: str) -> Any:
    """The contents of a JSON file; error messages call it `what`.

    Raises:
        SAEError: it is missing or not JSON; the message ends with `advice`.
    """
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise SAEError(f"{path}: not a readable {what} ({one_line(error)}); {advice}") from error


def read_json_lines(path: Path) -> Iterator[Any]:
    """The values of a file of JSON lines, one at a time.

    Raises:
        SAEError: it is missing, or a line is not JSON.
    """
    try:
        # Bytes: JSON leaves U+2028 and other line breaks of Unicode as they are.
        with path.open("rb") as lines:
            for line in lines:
                if line.strip():
                    yield json.loads(line)
    except (OSError, ValueError, RecursionError) as error:
        raise SAEError(
            f"{path}: not readable JSON lines ({one_line(error)}); create them again"
        ) from error


def read_record(kind: type[Record], path: Path, what: str, advice: str) -> Record:
    """Read the fields of a dataclass from a JSON file; keys that it does not have are an error.

    Raises:
        SAEError: the file is missing, not JSON, or does not have the right keys and types.
    """
    stored = read_json(path, what, advice)
    hints = get_type_hints(kind)
    required = {f.name for f in fields(kind) if f.default is f.default_factory is MISSING}
    if not isinstance(stored, dict) or not required <= set(stored) <= set(hints):
        raise SAEError(f"{path}: not a readable {what} (it does not have the right keys); {advice}")
    for name, value in stored.items():
        if not fits(value, hints[name]):
            raise SAEError(f"{path}: not a readable {what} (the value of {name}); {advice}")
    return kind(**stored)


def fits(value: Any, kind: Any) -> bool:
    """Whether a value read from JSON is of a type; an integer counts as a float. pydantic's strict
    mode agrees, but every job would import it for these few lines."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return any(fits(value, option) for option in args)
    if origin is list:
        return isinstance(value, list) and all(fits(item, args[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            fits(key, args[0]) and fits(item, args[1]) for key, item in value.items()
        )
    if kind is Any:
        return True
    if kind in (int, float):
        numbers = (int,) if kind is int else (int, float)
        return isinstance(value, numbers) and not isinstance(value, bool)
    return isinstance(value, kind)
