"""Files of records, and plain text, read piece by piece: JSON lines, Parquet, text files.

What a reader gives is a record, a mapping of fields, for each text; of a text without fields, the
text itself.
"""

import gzip
import io
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from sae_core.data_processing.texts import kind_of
from sae_core.settings.texts import CorpusConfig
from sae_core.utils.errors import SAEError, is_unicode, one_line

LONGEST = 2**20
"""Characters of a text; a longer one is cut where a paragraph ends. To tokenise a text takes about
a hundred times its size in memory."""

ROWS, ROW_BYTES = 256, 2**24
"""Rows of a Parquet file that are in memory at once: so many, or rows of about so many bytes."""

GZIP, ZSTD = b"\x1f\x8b", re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18")
"""How compressed files begin; a zstd file also with a frame that readers skip."""

BYTE_ORDER_MARK = b"\xef\xbb\xbf"

FIELDS_SHOWN = 30
"""Of those that a message lists."""


class Record(NamedTuple):
    """One text of a file, with its fields."""

    where: str
    """For messages: the file, and where in it."""
    content: Any
    """A mapping, or a text."""


def json_lines(path: Path) -> Iterator[Record]:
    """The records of a file with a JSON value on each line, which may be compressed."""
    with reading(str(path)), opened(path) as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(BYTE_ORDER_MARK)
            if not line.strip():
                continue
            try:
                content = json.loads(line.decode())
            except UnicodeDecodeError as error:
                raise SAEError(
                    f"{path}: line {number}: not UTF-8; save the file as UTF-8"
                ) from error
            except (ValueError, RecursionError) as error:
                raise SAEError(
                    f"{path}: line {number}: not JSON ({one_line(error)}); write one JSON value on "
                    "each line"
                ) from error
            yield Record(f"{path}: line {number}", content)


def parquet(path: Path, fields: Mapping[str, str]) -> Iterator[Record]:
    """The rows of a Parquet file, with only the columns of these fields.

    Args:
        fields: with the option that names each.
    """
    from pyarrow.parquet import ParquetFile

    with reading(str(path)), ParquetFile(path, pre_buffer=False, buffer_size=2**16) as file:
        names, every = file.schema_arrow.names, _of_schema(file.schema_arrow)
        columns = {field if field in names else field.split(".")[0] for field in fields}
        for field, option in fields.items():
            if field not in every:
                raise no_field(str(path), field, every, option)
            if every.count(field) > 1:
                raise SAEError(
                    f"{path}: {option} {field}: {every.count(field)} columns have this name; "
                    "rename them, so that one is left"
                )
        classes = {field: _class_names(file.schema_arrow, field) for field in fields}
        number, n_rows = 0, _rows_at_once(file.metadata)
        for batch in file.iter_batches(n_rows, columns=sorted(columns), use_threads=False):
            for row in batch.to_pylist():
                number += 1
                for field, names in classes.items():
                    if names:
                        row[field] = names.get(row[field])
                yield Record(f"{path}: row {number}", row)


def _class_names(schema: Any, field: str) -> dict[int, str]:
    """What the numbers in a column stand for, if the `datasets` library noted that they are
    classes."""
    try:
        kind = json.loads(schema.metadata[b"huggingface"])["info"]["features"][field]
        return dict(enumerate(kind["names"])) if kind["_type"] == "ClassLabel" else {}
    except (KeyError, TypeError, ValueError):  # other libraries write no such note
        return {}


def _rows_at_once(metadata: Any) -> int:
    """Rows of a Parquet file that are read together."""
    groups = (metadata.row_group(at) for at in range(metadata.num_row_groups))
    largest = max((group.total_byte_size // (group.num_rows or 1) for group in groups), default=0)
    return min(ROWS, ROW_BYTES // (largest or 1)) or 1


def text_file(path: Path) -> Iterator[Record]:
    """A text file, or if it is long its stretches of about `LONGEST` characters."""
    with reading(str(path)), opened(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig")
        held = ""
        while block := text.read(LONGEST - len(held)):
            held += block
            if len(held) == LONGEST:
                end = _paragraph_end(held)
                yield Record(str(path), held[:end])
                held = held[end:]
        if held:
            yield Record(str(path), held)


def pieces(text: str) -> Iterator[str]:
    """A text, or if it is long its stretches of about `LONGEST` characters."""
    begin = 0
    while len(text) - begin > LONGEST:
        block = text[begin : begin + LONGEST]
        end = _paragraph_end(block)
        yield block[:end]
        begin += end
    yield text[begin:] if begin else text


def _paragraph_end(text: str) -> int:
    """Where to cut a text: after its last empty line, line or word."""
    for mark in ("\n\n", "\n", " "):
        if (at := text.rfind(mark, 1)) > 0:
            return at + len(mark)
    return len(text)


def is_packed(path: Path) -> bool:
    """Whether a file is gzip or zstd, whatever its name is."""
    with path.open("rb") as file:
        magic = file.read(4)
    return magic.startswith(GZIP) or bool(ZSTD.match(magic))


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A file, decompressed if it is gzip or zstd."""
    with path.open("rb") as file:
        magic = file.peek(4)[:4]
        if magic.startswith(GZIP):
            with gzip.open(file) as unpacked:
                yield unpacked  # type: ignore[misc]  # it has all that is used here
        elif ZSTD.match(magic):
            from pyarrow import CompressedInputStream, PythonFile

            with CompressedInputStream(PythonFile(file), "zstd") as unpacked:
                yield io.BufferedReader(unpacked)
        else:
            yield file


@contextmanager
def reading(where: str) -> Iterator[None]:
    """A block that reads: what goes wrong in one line."""
    try:
        yield
    except SAEError:
        raise
    except UnicodeDecodeError as error:
        raise SAEError(f"{where}: not UTF-8; save it as UTF-8") from error
    except Exception as error:  # gzip, zlib and pyarrow have exceptions of their own
        raise SAEError(
            f"{where}: damaged, cut off or not readable ({one_line(error)}); create it again"
        ) from error


def value_of(record: Record, field: str, option: str) -> Any:
    """A field of a record, `a.b` for one within another; None if that other one is null.

    Raises:
        SAEError: the record has no such field.
    """
    content = record.content
    if isinstance(content, str):
        raise SAEError(
            f"{record.where}: {option} {field}: this is a text without fields; leave the option "
            "out, or give JSON lines or Parquet"
        )
    if not isinstance(content, Mapping):
        raise SAEError(
            f"{record.where}: a JSON {kind_of(content)}, neither a text nor an object with fields"
        )
    if field in content:
        return content[field]
    for name in field.split("."):
        if content is None:
            return None
        if not isinstance(content, Mapping) or name not in content:
            raise no_field(record.where, field, list(_of_record(record.content)), option)
        content = content[name]
    return content


def text_of(record: Record, field: str) -> str:
    """A record's text; empty where it is null.

    Raises:
        SAEError: it is no text.
    """
    is_bare = isinstance(record.content, str)
    value = record.content if is_bare else value_of(record, field, "--text-field")
    if isinstance(value, bytes):
        value = _decoded(value, record, f"--text-field {field}")
    if value is None:
        return ""
    if not isinstance(value, str):
        raise SAEError(
            f"{record.where}: --text-field {field}: holds {_some(_kind(value))}, not a text; name "
            "the field of the texts, or write what it holds as one text"
        )
    if not is_unicode(value):
        raise SAEError(
            f"{record.where}: holds half a surrogate pair, which is not a character; create the "
            "file again"
        )
    return value


def subject_of(record: Record, field: str) -> str:
    """What a record's subject is called; empty where it is null.

    Raises:
        SAEError: it is no name.
    """
    option = f"--subject-field {field}"
    value = value_of(record, field, "--subject-field")
    if isinstance(value, bytes):
        value = _decoded(value, record, option)
    if isinstance(value, (list, dict)):
        raise SAEError(
            f"{record.where}: {option}: holds {_some(_kind(value))}, not the name of a subject; "
            "name another field, or write one name for each text"
        )
    return "" if value is None else str(value)


def _decoded(value: bytes, record: Record, option: str) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise SAEError(
            f"{record.where}: {option}: holds bytes that are not UTF-8; write it as text"
        ) from error


def _kind(value: Any) -> str:
    """What JSON calls a value, or Python if JSON has no such thing, such as a date."""
    return type(value).__name__ if type(value).__module__ != "builtins" else kind_of(value)


def _some(kind: str) -> str:
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def no_field(where: str, field: str, names: list[str], option: str = "--text-field") -> SAEError:
    """A record without the field that is asked for; lists those that there are."""
    more = f" and {len(names) - FIELDS_SHOWN} more" if len(names) > FIELDS_SHOWN else ""
    there = ", ".join(names[:FIELDS_SHOWN]) + more if names else "none"
    return SAEError(f"{where}: {option} {field}: no such field; there are: {there}")


def fields_of(config: CorpusConfig) -> Mapping[str, str]:
    """The fields that are read, with the options that name them."""
    fields = {config.text_field: "--text-field"}
    if config.subject_field:
        fields[config.subject_field] = "--subject-field"
    return fields


def _of_record(content: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in content.items():
        yield f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from _of_record(value, f"{prefix}{name}.")


def _of_schema(schema: Any, prefix: str = "") -> list[str]:
    from pyarrow.types import is_struct

    found: list[str] = []
    for field in schema:
        found.append(f"{prefix}{field.name}")
        if is_struct(field.type):
            found += _of_schema(field.type.fields, f"{prefix}{field.name}.")
    return found
