"""Answers of a language model, checked against their schema."""

import json
from typing import Any

from jsonschema import Draft202012Validator

from sae_core.labelling.prompts import Schema

THOUGHT_ENDS = "</think>"
"""What some local models write before they answer ends with this."""

LIMITS = ("pattern", "maxLength", "minimum", "maximum", "minItems", "maxItems")
"""Keywords that endpoints do not all accept."""


def parse_answer(text: str, schema: Schema) -> dict[str, Any] | None:
    """The JSON object in an answer, or None if there is none that fits the schema."""
    answer = text.rpartition(THOUGHT_ENDS)[2]
    begin, end = answer.find("{"), answer.rfind("}")  # a fence of Markdown may be around it
    try:
        value = json.loads(answer[max(0, begin) : end + 1], parse_constant=_refuse)
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
