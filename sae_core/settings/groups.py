"""What groups of settings have in common."""

import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, TypeVar

Settings = TypeVar("Settings")


def part_of(kind: type[Settings], settings: Any) -> Settings:
    """The settings of one of a dataclass's base classes alone."""
    own = fields(kind)  # type: ignore[arg-type]
    return kind(**{f.name: getattr(settings, f.name) for f in own})


@dataclass(frozen=True)
class FromEnvironment:
    """A default that an environment variable replaces, unchecked: an option that is given takes its
    place."""

    variable: str
    otherwise: str | None = None
    kind: Callable[[str], Any] = str
    """What makes the setting of the variable's text."""

    def __call__(self) -> Any:
        text = os.environ.get(self.variable)
        return self.kind(text) if text else self.otherwise
