"""The file of texts: a JSON list of strings, the only form in which training reads them."""

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from sae_core.utils.errors import SAEError, is_unicode
from sae_core.utils.files import write_parts

MAKE_IT = "python sae_core/data_processing/textbook_process.py"
"""The command that creates a file of texts from chapters."""

DECODER = json.JSONDecoder()
SPACE = re.compile(r"[ \t\n\r]*")


BLOCK = 2**20
"""Bytes that are read at once, about."""


def read_texts(path: Path, option: str = "--data-path") -> list[str]:
    """Read a file of texts; `option` is the one that named it, for the error messages."""
    return list(stream_texts(path, option))


def stream_texts(path: Path, option: str = "--data-path") -> Iterator[str]:
    """The texts of a file, each as it is read.

    Raises:
        SAEError: the file is no list of texts, or has none.
    """
    where, index = f"{option} {path}", -1
    with _reading(where), path.open("rb") as file:
        for index, text in enumerate(_items(JSONReader(file), where)):
            if not isinstance(text, str):
                raise SAEError(
                    f"{where}: item {index} (counted from 0) is a JSON {kind_of(text)}, not a "
                    "text; make every item of the list a string, or write objects as JSON lines"
                )
            if not is_unicode(text):
                raise SAEError(
                    f"{where}: item {index} (counted from 0) holds half a surrogate pair, "
                    "which is not a character; create the file again"
                )
            yield text
    if index < 0:
        raise SAEError(f"{where}: the list is empty; give a file with at least one text")


class JSONReader:
    """A JSON file whose values are decoded one after the other, as they are read.

    Its errors are those of `json` and of the file.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._at = "", 0
        self._lines_before = self._bytes = 0

    def next_character(self) -> str:
        """The next character that is no space; nothing at the end of the file."""
        while True:
            space = SPACE.match(self._text, self._at)
            assert space is not None
            self._at = space.end()
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def skip(self) -> None:
        """Go past that character."""
        self._at += 1

    def value(self) -> Any:
        """The next value."""
        while True:
            try:
                value, end = DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated") or len(self._text) - error.pos < 16
                if is_cut and self._more():
                    continue
                raise self.error(error.msg, error.pos) from error
            if end < len(self._text) or not self._more():  # or a number might go on
                self._at = end
                return value

    def error(self, message: str, at: int | None = None) -> json.JSONDecodeError:
        """What is wrong here, or at a place in the buffer."""
        error = json.JSONDecodeError(message, self._text, self._at if at is None else at)
        error.lineno += self._lines_before
        return error

    def _more(self) -> bool:
        """Read on, and forget what is past; False at the end of the file."""
        block = self._file.read(max(BLOCK, len(self._text) - self._at))
        self._lines_before += self._text.count("\n", 0, self._at)
        try:
            more = self._decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            error.start += self._bytes + len(block) - len(error.object)
            raise
        self._bytes += len(block)
        self._text, self._at = self._text[self._at :] + more, 0
        return bool(block)


def _items(reader: JSONReader, where: str) -> Iterator[Any]:
    """The items of a JSON list."""
    if reader.next_character() != "[":
        kind = kind_of(reader.value())
        raise SAEError(
            f"{where}: holds a JSON {kind}, not a list of texts; create the file with `{MAKE_IT}`"
        )
    reader.skip()
    before = "["
    while (character := reader.next_character()) != "]":
        if before != "[":
            if character != ",":
                raise reader.error("Expecting ',' delimiter")
            reader.skip()
            reader.next_character()
        yield reader.value()
        before = ","
    reader.skip()
    if reader.next_character():
        raise reader.error("Extra data")


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


@contextmanager
def _reading(where: str) -> Iterator[None]:
    """A block that reads a file of texts: what is wrong with the file in one line."""
    try:
        yield
    except SAEError:
        raise
    except FileNotFoundError as error:
        option = where.partition(" ")[0]
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


def kind_of(value: Any) -> str:
    """What JSON calls a value."""
    names = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")
