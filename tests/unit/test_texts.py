"""The file of texts: what is read back, and what a wrong file is answered with."""

import json
from pathlib import Path

import pytest

from sae_core.data_processing.texts import read_texts, write_texts
from sae_core.utils.errors import SAEError

TEXTS = ["The first text, of 5 m².", "“Second”\nin two lines", ""]


def test_reads_what_it_wrote(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "texts.json"
    write_texts(path, TEXTS)
    assert read_texts(path) == TEXTS
    assert "m²" in path.read_text(encoding="utf-8")
    assert path.read_bytes().endswith(b"]\n")
    assert [file.name for file in path.parent.iterdir()] == ["texts.json"]


def test_same_texts_same_bytes(tmp_path: Path) -> None:
    for name in ("a.json", "b.json"):
        write_texts(tmp_path / name, TEXTS)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


@pytest.mark.parametrize("texts", [[], ["one"], TEXTS])
def test_texts_that_come_one_by_one_are_written_as_a_list_is(
    tmp_path: Path, texts: list[str]
) -> None:
    write_texts(tmp_path / "texts.json", iter(texts))
    written = (tmp_path / "texts.json").read_text(encoding="utf-8")
    assert written == json.dumps(texts, ensure_ascii=False, indent=0) + "\n"


def test_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    path = tmp_path / "texts.json"
    path.write_bytes(b'\xef\xbb\xbf["one"]')
    assert read_texts(path) == ["one"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (
            None,
            "no such file; create it with `python sae_core/data_processing/textbook_process.py`",
        ),
        (b'["caf\xe9"]', "not UTF-8 (byte 5)"),
        (b"once upon a time", "not JSON"),
        (b'["one",\n"tw', "cut off (line 2"),
        (b'{"texts": []}', "JSON object, not a list"),
        (b'["one", "two", 3]', "item 2 (counted from 0) is a JSON number"),
        (b'["one", ["two"]]', "item 1 (counted from 0) is a JSON list"),
        (b"[]", "the list is empty"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_wrong_file(tmp_path: Path, content: bytes | None, says: str) -> None:
    path = tmp_path / "texts.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SAEError) as error:
        read_texts(path, option="--texts")
    message = str(error.value)
    assert message.startswith(f"--texts {path}: ")
    assert says in message
    assert "\n" not in message


def test_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(SAEError, match="--data-path .* cannot be read .*; give a JSON file"):
        read_texts(tmp_path)


def test_unwritable_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here")
    with pytest.raises(SAEError, match="texts.json: cannot be written"):
        write_texts(tmp_path / "file" / "texts.json", TEXTS)
    with pytest.raises(SAEError, match="cannot be written"):
        write_texts(tmp_path, TEXTS)
    assert [path.name for path in tmp_path.parent.iterdir() if path.suffix == ".tmp"] == []


def test_failed_write_leaves_the_earlier_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "texts.json"
    write_texts(path, ["earlier"])

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(SAEError, match="No space left"):
        write_texts(path, TEXTS)
    assert read_texts(path) == ["earlier"]
    assert len(list(tmp_path.iterdir())) == 1
