"""Answers of a language model, checked against their schema."""

import json
import re
from typing import Any

from jsonschema import Draft202012Validator

from sae_core.labelling.prompts import Schema

FENCED = re.compile(r"\{.*\}", re.DOTALL)
"""The object in an answer with something around it, such as a fence of Markdown."""

THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL)
"""What some local models write before they answer."""

LIMITS = ("pattern", "maxLength", "minimum", "maximum", "minItems", "maxItems")
"""Keywords that endpoints do not all accept."""


def parse_answer(text: str, schema: Schema) -> dict[str, Any] | None:
    """The JSON object in an answer, or None if there is none that fits the schema."""
    found = FENCED.search(THOUGHT.sub("", text))
    if found is None:
        return None
    try:
        value = json.loads(found[0], parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    return value if Draft202012Validator(schema).is_valid(value) else None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def without_limits(schema: Any) -> Any:
    """The schema as it is sent: types and keys only."""
    if not isinstance(schema, dict):
        return schema
    return {key: without_limits(value) for key, value in schema.items() if key not in LIMITS}
