"""What the pages share: self-contained files that open from disk and fetch nothing."""

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from sae_core.reporting.summary import show

TEMPLATES = Path(__file__).parent / "templates"

STYLE = "style.css.j2"
"""Colours, type and tables of every page, for light and dark."""


def render(template: str, style: str, script: str | None = None, **values: Any) -> str:
    """A page from its templates; everything in `values` but `Markup` is escaped."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["show"] = show

    def part(name: str) -> Markup:
        return Markup(environment.get_template(name).render())

    if script is not None:
        values["script"] = part(script)
    return environment.get_template(template).render(style=part(STYLE) + part(style), **values)


def embedded(data: Any) -> Markup:
    """JSON for a `<script type="application/json">`: no text in it can end the element."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)
