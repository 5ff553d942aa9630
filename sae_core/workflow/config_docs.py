"""The schema of the configuration and the tables of config/README.md, made from the settings, and
the table of docs/cluster.md, made by the planner.

`make docs` writes them; sae_core.workflow.config_sections says which settings stand where.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import MISSING, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml

from sae_core.utils.files import write_file
from sae_core.utils.limits import Filled, InConfiguration, Limits, Pattern
from sae_core.workflow import fitting
from sae_core.workflow.config_schema import allowed
from sae_core.workflow.config_sections import MODELS, SECTIONS, Key, keys

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "docs/cluster.md"
SCHEMA, README = ROOT / "workflow/schemas/config.schema.yaml", ROOT / "config/README.md"

HEADER = "# Made by `make docs` from the settings named in config_sections.py.\n"
TYPES: dict[Any, str] = {
    **{bool: "boolean", int: "integer", float: "number", NoneType: "null"},
    **{str: "string", Path: "string"},
}
AT_LEAST_ONE = {"string": "minLength", "array": "minItems", "object": "minProperties"}
BLOCK = re.compile(r"(?<=<!-- made by make docs: )(\S+) -->.*?(?=<!-- end -->)", re.DOTALL)
OPTION = re.compile(r"(?<![\w-])--([a-z][a-z0-9-]*)")

Schema = dict[str, Any]


def write() -> None:
    """Write the schema and the tables."""
    write_file(CLUSTER, fitting.with_table(CLUSTER.read_text(encoding="utf-8")))
    write_file(SCHEMA, schema_text())
    write_file(README, with_tables(README.read_text(encoding="utf-8")))


def schema_text() -> str:
    """The schema's file."""
    return HEADER + yaml.dump(schema(), Dumper=_Dumper, sort_keys=False, width=100)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> Any:
        return super().represent_sequence(tag, sequence, flow_style=True)


def schema() -> Schema:
    """The schema of a configuration."""
    sections = {name: _section(name) for name in SECTIONS if "[" not in name}
    model = _section(MODELS)
    models = {"description": model.pop("description"), "type": "array", "minItems": 1}
    sections["models"] = models | {"items": model}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "description": "Configuration of the SAE training workflow; config/README.md explains it.",
        **_object(sections, ["models"]),  # and either chapters or corpus, which `load_plan` says
    }


def _section(name: str) -> Schema:
    """The schema of a section's mapping."""
    found = list(keys(name))
    section = SECTIONS[name]
    reruns = "" if section.exceptions else f" A change re-runs {section.reruns}."
    return {"description": f"{section.settings[0].__doc__}{reruns}"} | _object(
        {key.name: _property(key) for key in found},
        [key.name for key in found if key.default is MISSING],
    )


def _property(key: Key) -> Schema:
    description = {"description": meaning(key)}
    return description | _type(key.hint) | description


def _object(properties: dict[str, Schema], required: list[str]) -> Schema:
    needed = {"required": required} if required else {}
    return {"type": "object", "additionalProperties": False, **needed, "properties": properties}


def _type(hint: Any) -> Schema:
    """The schema of a field's type."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind is Annotated:
        return _limited(_type(parts[0]), hint.__metadata__)
    if kind in (Union, UnionType):
        schemas = [_type(part) for part in parts]
        merged = {key: value for found in schemas for key, value in found.items()}
        return merged | {"type": [found["type"] for found in schemas]}
    if kind is Literal:
        words = {"enum": list(parts)} if len(parts) > 1 else {"pattern": f"^{parts[0]}$"}
        return {"type": "string", **words}
    if kind is tuple:
        return {"type": "array", "items": _type(parts[0])}
    if kind is dict:
        return {"type": "object", "additionalProperties": _type(parts[1])}
    if is_dataclass(hint):
        name = next(name for name, section in SECTIONS.items() if section.settings == (hint,))
        return _section(name)
    return {"type": TYPES[hint]}


def _limited(schema: Schema, marks: Iterable[Any]) -> Schema:
    """A schema with the limits that annotate the type; the configuration's own come first."""
    own = next((mark.limits for mark in marks if isinstance(mark, InConfiguration)), None)
    for mark in marks:
        if isinstance(mark, Limits):
            schema |= (own or mark).in_schema()
        elif isinstance(mark, InConfiguration):
            schema |= mark.limits.in_schema()
        elif isinstance(mark, Pattern):
            schema |= {"title": mark.words, "pattern": f"^{mark.regex}$"}
        elif isinstance(mark, Filled):
            schema |= {AT_LEAST_ONE[schema["type"]]: 1}
    return schema


def meaning(key: Key) -> str:
    """What a key does: its option's help, with keys in the place of options."""
    text = OPTION.sub(lambda option: f"`{option[1].replace('-', '_')}`", key.meaning)
    return re.sub(r"(\$[A-Z_]+)", r"`\1`", text)


def with_tables(text: str) -> str:
    """The documentation with its tables made anew."""
    return BLOCK.sub(lambda found: f"{found[1]} -->\n\n{_block(found[1])}\n", text)


def _block(name: str) -> str:
    """What a change of a section runs again, and the table of its keys."""
    section, has_column = SECTIONS[name], bool(SECTIONS[name].exceptions)
    head = ["key", "values", "default", "meaning", *["a change re-runs"] * has_column]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for key in keys(name):
        row = [f"`{key.name}`", allowed(_type(key.hint)), _default_in_words(key)]
        row.append(_meaning(name, key))
        row += [key.reruns] * has_column
        cells = " | ".join(cell.replace("|", r"\|") for cell in row)
        lines.append(f"| {cells} |")
    sentence = [] if has_column else [f"A change re-runs {section.reruns}.", ""]
    return "\n".join([*sentence, *lines, ""])


def _default_in_words(key: Key) -> str:
    if key.section:
        return f"as `{key.section}`"
    return "required" if key.default is MISSING else f"`{_written(key.default)}`"


def _written(value: Any) -> str:
    """A default as it is written in a file; a mapping of settings is empty."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(_written, value))}]"
    if is_dataclass(value):
        return "{}"
    return value if isinstance(value, str) and value else json.dumps(value)


def _meaning(section: str, key: Key) -> str:
    is_overridden = SECTIONS[MODELS].overrides.get(key.name) == section
    return f"{meaning(key)}{' A model can override it.' if is_overridden else ''}"


if __name__ == "__main__":
    write()
