"""What a setting may be, beside its type: annotations of the fields of the settings dataclasses.

Each limit is written once. `check_limits` keeps it on the command line and in Python, the schema
in a configuration file, and `config_docs` writes it into the schema and the documentation.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from sae_core.utils.errors import SAEError

WORDS = {
    "minimum": "at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
}
"""What people call the limits of JSON schema."""


def range_in_words(schema: dict[str, Any]) -> str:
    """The range of a number in a JSON schema, such as `at least 0 and below 1`."""
    return " and ".join(f"{words} {schema[key]}" for key, words in WORDS.items() if key in schema)


@dataclass(frozen=True)
class Limits:
    """The range of a number, which is always finite."""

    minimum: float | None = None
    exclusive_minimum: float | None = None
    maximum: float | None = None
    exclusive_maximum: float | None = None
    hint: str = ""
    """What else to do, at the end of the message."""

    def fault(self, value: float) -> str:
        """What a number has to be, if it is not; else nothing."""
        is_in_range = (
            math.isfinite(value)
            and (self.minimum is None or self.minimum <= value)
            and (self.exclusive_minimum is None or self.exclusive_minimum < value)
            and (self.maximum is None or value <= self.maximum)
            and (self.exclusive_maximum is None or value < self.exclusive_maximum)
        )
        return "" if is_in_range else f"must be {range_in_words(self.in_schema())}{self.hint}"

    def in_schema(self) -> dict[str, float]:
        """The range as JSON schema has it."""
        values = {
            "minimum": self.minimum,
            "exclusiveMinimum": self.exclusive_minimum,
            "maximum": self.maximum,
            "exclusiveMaximum": self.exclusive_maximum,
        }
        return {keyword: value for keyword, value in values.items() if value is not None}


@dataclass(frozen=True)
class Pattern:
    """What a text looks like."""

    regex: str
    words: str
    """The same for people, such as `name==version`."""

    def fault(self, value: str) -> str:
        """What a text has to be, if it is not; else nothing."""
        return "" if re.fullmatch(self.regex, value) else f"must be {self.words}"


@dataclass(frozen=True)
class Filled:
    """A text, list or mapping that is not empty."""

    def fault(self, value: Any) -> str:
        """What a value has to be, if it is not; else nothing."""
        return "must not be empty" if value in ("", ()) else ""


@dataclass(frozen=True)
class InConfiguration:
    """The narrower range of a number in a configuration file."""

    limits: Limits


PositiveInt = Annotated[int, Limits(minimum=1)]
NaturalInt = Annotated[int, Limits(minimum=0)]
PositiveFloat = Annotated[float, Limits(exclusive_minimum=0)]
NaturalFloat = Annotated[float, Limits(minimum=0)]
Share = Annotated[float, Limits(exclusive_minimum=0, exclusive_maximum=1)]
Text = Annotated[str, Filled()]


def check_limits(settings: Any) -> None:
    """Check every field of a settings dataclass.

    Raises:
        SAEError: a value is out of its range; the message names its option.
    """
    hints = annotations(type(settings))
    for field in fields(settings):
        given = getattr(settings, field.name)
        for value, limit in _limits(hints[field.name], given):
            if fault := limit.fault(value):
                words = " ".join(map(str, given)) if isinstance(given, tuple) else str(given)
                option = f"--{field.name.replace('_', '-')} {words or repr(words)}"
                raise SAEError(f"{option}: {fault}")


def annotations(settings: type) -> dict[str, Any]:
    """The types of a dataclass's fields, with what annotates them."""
    return get_type_hints(settings, include_extras=True)


def _limits(hint: Any, value: Any) -> Iterator[tuple[Any, Limits | Pattern | Filled]]:
    """Each limit in a type, with the value, or the part of a list, that it is about."""
    for mark in getattr(hint, "__metadata__", ()):
        if isinstance(mark, Limits) and isinstance(value, (int, float)):
            yield value, mark
        elif isinstance(mark, (Pattern, Filled)) and isinstance(value, (str, tuple)):
            yield value, mark
    if get_origin(hint) is tuple and isinstance(value, tuple):
        for item in value:
            yield from _limits(get_args(hint)[0], item)
    elif get_origin(hint) in (Annotated, Union, UnionType):
        for part in get_args(hint):
            yield from _limits(part, value)
