"""Configuration files of other tools: each value is checked when it is read."""

import math
from pathlib import Path
from typing import Any

from sae_core.utils.errors import SAEError
from sae_core.utils.records import fits, read_json

NAMES = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}


class Settings:
    """The values of a JSON object, whose file the messages name.

    Raises:
        SAEError: it is no object.
    """

    def __init__(self, path: Path, values: Any, within: str = "") -> None:
        self.path, self.values, self.within = path, values, within
        if not isinstance(values, dict):
            where = f"{within.removesuffix('.')} is" if within else "it holds"
            raise SAEError(f"{path}: {where} {values!r:.80}, but must be an object of settings")

    @classmethod
    def load(cls, path: Path) -> "Settings":
        """The settings in a file.

        Raises:
            SAEError: it is missing or holds no JSON object.
        """
        return cls(path, read_json(path, "SAE configuration", "fetch the SAE again"))

    def part(self, key: str) -> "Settings":
        """The object at a key; an empty one if there is none."""
        return Settings(self.path, self.values.get(key) or {}, f"{self.within}{key}.")

    def read(self, key: str, kind: type, default: Any = None, least: float = -math.inf) -> Any:
        """The value of a key, `default` if it is missing or null.

        Raises:
            SAEError: it is not of that kind, or less than `least`.
        """
        value = self.values.get(key)
        if value is None:
            return default
        if not fits(value, kind) or (kind in (int, float) and not least <= value < math.inf):
            enough = f" of at least {least}" if least > -math.inf else ""
            raise self.error(key, f"{NAMES[kind]}{enough}")
        return value

    def require(self, key: str, kind: type, least: float = -math.inf) -> Any:
        """The same for a key that has to be there."""
        value = self.read(key, kind, least=least)
        if value is None:
            raise self.error(key, NAMES[kind])
        return value

    def error(self, key: str, wanted: str) -> SAEError:
        """An error about a wrong value."""
        return SAEError(
            f"{self.path}: {self.within}{key} is {self.values.get(key)!r:.80}, but must be {wanted}"
        )
