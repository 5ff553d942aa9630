"""The file of texts: a JSON list of strings, the only form in which training reads them."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sae_core.utils.errors import SAEError, is_unicode
from sae_core.utils.files import write_parts

MAKE_IT = "python sae_core/data_processing/textbook_process.py"
"""The command that creates a file of texts from chapters."""


def read_texts(path: Path, option: str = "--data-path") -> list[str]:
    """Read a file of texts; `option` is the one that named it, for the error messages."""
    texts = _load(path, option)
    if not isinstance(texts, list):
        raise SAEError(
            f"{option} {path}: holds a JSON {_kind(texts)}, not a list of texts; "
            f"create the file with `{MAKE_IT}`"
        )
    if not texts:
        raise SAEError(f"{option} {path}: the list is empty; give a file with at least one text")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise SAEError(
                f"{option} {path}: item {index} (counted from 0) is a JSON {_kind(text)}, not a "
                "text; make every item of the list a string"
            )
        if not is_unicode(text):
            raise SAEError(
                f"{option} {path}: item {index} (counted from 0) holds half a surrogate pair, "
                "which is not a character; create the file again"
            )
    return texts


def write_texts(path: Path, texts: Iterable[str]) -> None:
    """Write a file of texts, one per line, each as it comes; whatever fails, an earlier file stays
    unchanged."""
    write_parts(path, _parts(texts))


def _parts(texts: Iterable[str]) -> Iterator[bytes]:
    """The JSON list, text by text."""
    before = "[\n"
    for text in texts:
        yield (before + json.dumps(text, ensure_ascii=False)).encode()
        before = ",\n"
    yield b"[]\n" if before.startswith("[") else b"\n]\n"


def _load(path: Path, option: str) -> Any:
    where = f"{option} {path}"
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError as error:
        raise SAEError(
            f"{where}: no such file; create it with `{MAKE_IT}` or give {option} another file"
        ) from error
    except OSError as error:
        raise SAEError(
            f"{where}: cannot be read ({error.strerror}); give a JSON file that you can read"
        ) from error
    except UnicodeDecodeError as error:
        raise SAEError(
            f"{where}: not UTF-8 (byte {error.start}); save it as UTF-8 or create it again with "
            f"`{MAKE_IT}`"
        ) from error
    except json.JSONDecodeError as error:
        raise SAEError(
            f"{where}: not JSON, or cut off (line {error.lineno}: {error.msg}); create it again "
            f"with `{MAKE_IT}`"
        ) from error
    except RecursionError as error:
        raise SAEError(
            f"{where}: nested too deeply for a list of texts; create it again with `{MAKE_IT}`"
        ) from error
    except ValueError as error:  # a number of thousands of digits
        raise SAEError(f"{where}: not a list of texts; create it again with `{MAKE_IT}`") from error


def _kind(value: Any) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")
