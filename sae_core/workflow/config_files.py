"""Configuration files, read strictly: every key occurs once, and every word stays as written.

YAML gives a word without quotes a type by its look: `no` is a boolean, `012` is ten, and `1e-3` is
text. Here the key that a value belongs to decides (`config_schema`), so such words stay `Plain`.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from sae_core.utils.errors import SAEError, one_line

MOST_VALUES = 200_000
"""Values of a file once its aliases are written out."""

DEEPEST = 20
"""Keys and indices that lead to a value of a configuration, at most."""

PLAIN, MERGE, TEXT = "!plain", "tag:yaml.org,2002:merge", "tag:yaml.org,2002:str"
SCALARS = {PLAIN, *(f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "bool", "null"))}


class Plain(str):
    """A word without quotes in a file: the key that it belongs to determines its type."""


def read_config(files: Iterable[Path], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration from its files; later files override earlier ones, the command line all.

    Args:
        overrides: what Snakemake made of `--config`. In nested values its numbers are text, and so
            is `null`.

    Raises:
        SAEError: a file cannot be read, is not YAML or JSON, or has a key twice.
    """
    config: dict[str, Any] = {}
    for file in files:
        config = _over(config, read_file(file))
    return _over(config, _nulls(overrides))


def read_file(path: Path) -> dict[str, Any]:
    """The contents of one file, YAML or JSON, its words without quotes as `Plain`.

    Raises:
        SAEError: it cannot be read, is neither, or has a key twice.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise SAEError(f"{path}: cannot be read ({error.strerror}); give another file") from error
    except UnicodeDecodeError as error:
        raise SAEError(f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8") from error
    try:
        content = _from_json(text, path)
    except (ValueError, RecursionError):  # then YAML has to say what is wrong
        content = _from_yaml(text, path)
    if not isinstance(content, dict):
        raise SAEError(f"{path}: has no keys; config/README.md lists them")
    return content


def _from_json(text: str, path: Path) -> Any:
    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        for key in keys:
            if keys.count(key) > 1:
                raise SAEError(f"{path}: {_twice(key)}")
        return dict(pairs)

    return json.loads(text, object_pairs_hook=mapping)


def _from_yaml(text: str, path: Path) -> Any:
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return None if node is None else _Values(path).value(node, 0)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise SAEError(
            f"{path}{where}: not YAML ({one_line(error.problem)}); indent with spaces, and put "
            "words with special characters in quotes"
        ) from error
    except yaml.YAMLError as error:
        raise SAEError(f"{path}: not YAML ({one_line(error)})") from error
    except RecursionError as error:
        raise SAEError(f"{path}: nested too deeply") from error
    finally:
        if loader is not None:
            loader.dispose()


class _Loader(yaml.SafeLoader):
    def resolve(self, kind: type, value: Any, implicit: Any) -> str:
        if kind is yaml.ScalarNode and implicit[0]:
            return MERGE if value == "<<" else PLAIN
        return super().resolve(kind, value, implicit)


class _Values:
    """The values of one file's nodes; aliases are written out, and so they are counted."""

    def __init__(self, path: Path) -> None:
        self.path, self.left = path, MOST_VALUES

    def value(self, node: yaml.Node, depth: int) -> Any:
        self.left -= 1
        if self.left < 0:
            raise self.error(
                node, f"its aliases (*name) stand for more than {MOST_VALUES:,} values; use fewer"
            )
        if depth > DEEPEST:
            raise self.error(node, "nested too deeply")
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, depth)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, depth + 1) for item in node.value]
        if node.tag in SCALARS:
            return Plain(node.value)
        if node.tag != TEXT:
            raise self.error(
                node, f"{node.tag.rpartition(':')[2]}: not a type of value that is used here"
            )
        return node.value

    def mapping(self, node: yaml.MappingNode, depth: int) -> dict[str, Any]:
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise self.error(key, "a list or a mapping cannot be a key; write text")
            name = key.value
            if name in lines:
                raise self.error(key, _twice(name, f" (first in line {lines[name]})"))
            lines[name] = key.start_mark.line + 1
            if key.tag == MERGE:
                merged = self.merged(value, depth)
            else:
                own[name] = self.value(value, depth + 1)
        return {**merged, **own}

    def merged(self, node: yaml.Node, depth: int) -> dict[str, Any]:
        """The values that `<<` adds; of several mappings, the first that has a key counts."""
        found: dict[str, Any] = {}
        for source in node.value if isinstance(node, yaml.SequenceNode) else [node]:
            if not isinstance(source, yaml.MappingNode):
                raise self.error(source, "`<<` takes a mapping, or a list of mappings")
            found = {**self.value(source, depth + 1), **found}
        return found

    def error(self, node: yaml.Node, message: str) -> SAEError:
        return SAEError(f"{self.path}, line {node.start_mark.line + 1}: {message}")


def _twice(key: str, where: str = "") -> str:
    return f"the key {one_line(key)} occurs twice here{where}; keep one, or rename one"


def _over(config: Any, other: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with its values replaced by `other`'s; mappings are merged."""
    merged = dict(config) if isinstance(config, Mapping) else {}
    for key, value in other.items():
        merged[key] = _over(merged.get(key), value) if isinstance(value, Mapping) else value
    return merged


def _nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _nulls(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_nulls(item) for item in value]
    return None if isinstance(value, str) and value in ("null", "~") else value
