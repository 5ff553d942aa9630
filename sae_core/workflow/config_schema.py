"""A configuration checked against its schema, and the messages about what does not fit.

The schema also determines the type of a word: text where a number or a boolean is expected becomes
one. YAML reads `1e-3` as text, and `--config` gives all nested values as text.
"""

import difflib
import json
import math
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import yaml
from jsonschema import Draft202012Validator, ValidationError
from jsonschema.exceptions import best_match

from sae_core.utils.errors import SAEError
from sae_core.utils.limits import range_in_words
from sae_core.workflow.config_files import DEEPEST, Plain

NO_TEXT = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""Line breaks, other control characters, and halves of surrogate pairs."""

NUMBER = re.compile(r"[-+]?(?:(?:0|[1-9][0-9_]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
"""A decimal number; `012` is none, as YAML takes it for ten and people for twelve."""

LONGEST_NUMBER = 400
"""Characters; Python turns some thousand digits at most into a number."""

NULLS = ("", "~", "null", "Null", "NULL")
BOOLEANS = {
    **dict.fromkeys(("true", "yes", "on"), True),
    **dict.fromkeys(("false", "no", "off"), False),
}
YAML_TYPES = yaml.resolver.Resolver()

Path = tuple[str | int, ...]


def check(config: Any, schema: dict[str, Any]) -> dict[str, Any]:
    """The configuration with every word converted to the type that its key takes.

    Raises:
        SAEError: something in it does not fit the schema.
    """
    checked = _typed(config, schema, ())
    error = best_match(Draft202012Validator(schema).iter_errors(checked))
    if error is not None:
        raise SAEError(f"config: {location(error.absolute_path)}: {_reason(error)}")
    return checked


def location(path: Iterable[str | int]) -> str:
    """Where in the configuration a value is."""
    keys = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return keys.lstrip(".") or "top level"


def _typed(value: Any, schema: dict[str, Any], path: Path) -> Any:
    """A value and all its parts: words get the schema's types, mappings and lists become plain."""
    if len(path) > DEEPEST:
        raise SAEError(f"config: {location(path)}: nested too deeply")
    if isinstance(value, Mapping):
        return _typed_mapping(value, schema, path)
    if isinstance(value, list):
        items = schema.get("items", {})
        return [_typed(item, items, (*path, i)) for i, item in enumerate(value)]
    if isinstance(value, str):
        _check_text(value, path)
        return _word(value, schema, path)
    if isinstance(value, float) and not math.isfinite(value):
        raise SAEError(f"config: {location(path)}: {value} is not a finite number")
    return value


def _typed_mapping(value: Mapping[Any, Any], schema: dict[str, Any], path: Path) -> dict[str, Any]:
    known, others = schema.get("properties", {}), schema.get("additionalProperties")
    default = others if isinstance(others, dict) else {}
    for key in value:
        if not isinstance(key, str):
            raise SAEError(
                f"config: {location(path)}: the key {key!r} is not text; write it in quotes"
            )
        _check_text(key, path)
        if not key.strip():
            raise SAEError(f"config: {location(path)}: a key is empty; give it a name")
    return {
        str(key): _typed(item, known.get(key, default), (*path, key)) for key, item in value.items()
    }


def _check_text(text: str, path: Path) -> None:
    """Check that a name or path contains no control character and can be encoded."""
    shown = text.replace("\n", "") if path[-1:] == ("wandb_notes",) else text
    if NO_TEXT.search(shown):
        raise SAEError(f"config: {location(path)}: {ascii(text[:80])} contains a control character")
    if not text.isascii() and (encoding := sys.getfilesystemencoding()) != "utf-8":
        raise SAEError(
            f"config: {location(path)}: {ascii(text[:80])} needs UTF-8, and this locale has "
            f"{encoding}; set LC_ALL=C.UTF-8"
        )


def _word(text: str, schema: dict[str, Any], path: Path) -> Any:
    kinds = _kinds(schema)
    if isinstance(text, Plain) and text in NULLS:
        return None
    if {"number", "integer"} & set(kinds) and _is_number(text):
        return _number(text)
    if "boolean" in kinds and text.lower() in BOOLEANS:
        return BOOLEANS[text.lower()]
    is_free = "string" in kinds and not {"enum", "pattern"} & set(schema)
    if is_free and isinstance(text, Plain) and (kind := _other_kind(text)):
        raise SAEError(
            f"config: {location(path)}: YAML reads {text} as a {kind}, but text is expected; write "
            f"it in quotes: {_assignment(path, json.dumps(text))}"
        )
    return str(text)


def _kinds(schema: dict[str, Any]) -> list[str]:
    kinds = schema.get("type", [])
    return [kinds] if isinstance(kinds, str) else kinds


def _is_number(text: str) -> bool:
    return len(text) < LONGEST_NUMBER and bool(NUMBER.fullmatch(text))


def _number(text: str) -> int | float | str:
    digits = text.replace("_", "")
    try:
        return int(digits)
    except ValueError:
        number = float(digits)
    return number if math.isfinite(number) else str(text)


def _other_kind(text: str) -> str | None:
    """The type that YAML gives a word, if it is not text; a date is text here."""
    tag = YAML_TYPES.resolve(yaml.ScalarNode, text, (True, False)).rpartition(":")[2]
    if tag == "bool":
        return "boolean"
    return "number" if tag in ("int", "float") or _is_number(text) else None


def _reason(error: ValidationError) -> str:
    """What was found, what is allowed, and what to write."""
    schema, found = error.schema, error.instance
    if error.validator == "additionalProperties":
        return _unknown_keys(found, list(schema["properties"]))
    if error.validator == "required":
        missing = [key for key in schema["required"] if key not in found]
        return "; ".join(_missing(key, schema["properties"][key]) for key in missing)
    path = tuple(error.absolute_path)
    example = _example(schema, found)
    such_as = f", such as {_assignment(path, example)}" if example else ""
    return f"{_shown(found)} is not allowed; write {allowed(schema)}{such_as}"


def _unknown_keys(found: dict[str, Any], known: list[str]) -> str:
    unknown = sorted(set(found) - set(known))
    near = [match for key in unknown for match in difflib.get_close_matches(key, known, 1)]
    hint = f"; did you mean {', '.join(near)}?" if near else ""
    return f"unknown key {', '.join(unknown)}{hint}; the keys are {', '.join(known)}"


def _missing(key: str, schema: dict[str, Any]) -> str:
    what, _, _ = schema.get("description", "").partition(". ")
    return f"the key {key} is missing{f' ({what})' if what else ''}; config/README.md explains it"


def _assignment(path: Path, value: str) -> str:
    """How a value is written in the file."""
    return f"`{path[-1]}: {value}`" if path and isinstance(path[-1], str) else f"`{value}`"


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "nothing (null)", True: "true", False: "false"}[value]
    if isinstance(value, (list, dict)):
        kind = "list" if isinstance(value, list) else "mapping"
        return f"a {kind}" if value else f"an empty {kind}"
    return repr(value)[:80]


def allowed(schema: dict[str, Any]) -> str:
    """The values that a key takes, in words."""
    if "enum" in schema:
        return f"one of {', '.join(schema['enum'])}"
    words = [_kind_in_words(kind, schema) for kind in _kinds(schema)]
    return (", or " if any(" " in word for word in words) else " or ").join(words)


def _kind_in_words(kind: str, schema: dict[str, Any]) -> str:
    if kind == "string":
        if pattern := schema.get("pattern"):
            return _only_word(pattern) or schema["title"]
        return "text that is not empty" if schema.get("minLength") else "text"
    if kind in ("number", "integer"):
        limits = range_in_words(schema)
        number = "a whole number" if kind == "integer" else "a number"
        return f"{number}, {limits}" if limits else number
    if kind == "array":
        items = allowed(schema["items"])
        return f"a list in which each item is {items}" if items else "a list"
    return {"null": "null", "boolean": "true or false", "object": "keys with values"}[kind]


def _only_word(pattern: str) -> str:
    """The word, if a pattern allows only one."""
    match = re.fullmatch(r"\^(\w+)\$", pattern)
    return match[1] if match else ""


def _example(schema: dict[str, Any], found: Any) -> str:
    """A value that is allowed, close to what was found if possible."""
    kinds = _kinds(schema)
    if "enum" in schema:
        near = difflib.get_close_matches(str(found), schema["enum"], 1)
        return near[0] if near else schema["enum"][0]
    if "array" in kinds and isinstance(found, (str, int)) and _is_number(str(found)):
        return f"[{found}]"
    if word := _only_word(schema.get("pattern", "")):
        return word
    if "boolean" in kinds:
        return "true"
    if "integer" in kinds:
        digits = str(found).lstrip("0") if str(found).isdecimal() else ""
        return digits or str(schema.get("minimum", 1))
    if "number" in kinds:
        return "0.1"
    if "string" in kinds and isinstance(found, (bool, int, float)):
        return json.dumps(str(found))
    return ""
