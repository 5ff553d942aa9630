"""Texts of every form, in files that other libraries write: read as they are, or refused in one
line."""

import gzip
import json
import os
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from tiny_model import tokenizer

from sae_core.corpus import records
from sae_core.corpus import tokenise as tokenise_module
from sae_core.corpus.cache import cached_tokens
from sae_core.corpus.corpora import read_corpus
from sae_core.corpus.token_file import TokenFile
from sae_core.corpus.tokenise import tokenise
from sae_core.data_processing.sources import Chapter
from sae_core.settings.texts import CorpusConfig
from sae_core.utils.errors import SAEError

TOPICS = ("physics", "biology", "physics", None)


def rows(texts: list[str]) -> list[dict[str, Any]]:
    """Records with a subject each, and other fields."""
    return [
        {
            "id": n,
            "text": text,
            "topic": TOPICS[n % 4],
            "meta": {"body": text, "tags": ["a", str(n)]},
        }
        for n, text in enumerate(texts)
    ]


def json_list(path: Path, texts: list[str]) -> Path:
    path.write_text(json.dumps(texts))
    return path


def lines(texts: list[str]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows(texts)).encode()


def json_lines(path: Path, texts: list[str]) -> Path:
    path.write_bytes(lines(texts).replace(b"\n", b"\n\n", 2))
    return path


def gzipped(path: Path, texts: list[str]) -> Path:
    half = len(lines(texts)) // 2
    path.write_bytes(gzip.compress(lines(texts)[:half]) + gzip.compress(lines(texts)[half:]))
    return path


def zstd(path: Path, texts: list[str]) -> Path:
    with pyarrow.CompressedOutputStream(str(path), "zstd") as file:
        file.write(lines(texts))
    return path


def parquet(path: Path, texts: list[str], **columns: Any) -> Path:
    table = pyarrow.Table.from_pylist(rows(texts))
    for name, column in columns.items():
        table = table.set_column(table.column_names.index(name), name, column)
    pyarrow.parquet.write_table(table, path, row_group_size=5)
    return path


FORMS: dict[str, Callable[[Path, list[str]], Path]] = {
    "texts.json": json_list,
    "texts.jsonl": json_lines,
    "lines.json": json_lines,
    "texts.jsonl.gz": gzipped,
    "texts.jsonl.zst": zstd,
    "texts.parquet": parquet,
    "no_suffix": parquet,
    "list": json_list,
}


@pytest.fixture(scope="module")
def made(texts: list[str]) -> Any:
    return tokenizer(" ".join(texts))


def read(config: CorpusConfig, made: Any, folder: Path) -> TokenFile:
    tokenise(read_corpus(config), made, folder, 1)
    return TokenFile.open(folder)


def refused(config: CorpusConfig, made: Any, folder: Path) -> str:
    with pytest.raises(SAEError) as error:
        read(config, made, folder)
    message = str(error.value)
    assert "\n" not in message and not folder.exists()
    return message


@pytest.mark.parametrize("name", FORMS)
def test_a_file_of_every_form(name: str, texts: list[str], made: Any, tmp_path: Path) -> None:
    given = [*texts[:3], "", *texts[3:]]
    path = FORMS[name](tmp_path / name, given)
    file = read(CorpusConfig(data_path=path), made, tmp_path / "tokens")
    assert [*file.texts] == texts
    assert file.manifest is not None and file.manifest.n_empty == 1
    assert file.manifest.data_file == name and file.sources is None


def test_the_form_does_not_change_what_identifies_texts(
    texts: list[str], made: Any, tmp_path: Path
) -> None:
    found = set()
    for name in ("texts.jsonl", "texts.jsonl.gz", "texts.parquet"):
        path = FORMS[name](tmp_path / name, texts)
        manifest = read(CorpusConfig(data_path=path), made, tmp_path / "tokens").manifest
        assert manifest is not None
        found.add(manifest.data_sha256)
    assert len(found) == 1
    other = json_lines(tmp_path / "other.jsonl", [*texts[1:], texts[0]])
    manifest = read(CorpusConfig(data_path=other), made, tmp_path / "tokens").manifest
    assert manifest is not None and manifest.data_sha256 not in found


@pytest.mark.parametrize("name", ["texts.jsonl", "texts.parquet"])
def test_subjects(name: str, texts: list[str], made: Any, tmp_path: Path) -> None:
    path = FORMS[name](tmp_path / name, texts)
    config = CorpusConfig(data_path=path, subject_field="topic")
    file = read(config, made, tmp_path / "tokens")
    assert file.sources is not None and file.origins is not None
    assert file.sources.subjects == ["physics", "biology", ""]
    assert file.origins.tolist() == [(0, 1, 0, 2)[n % 4] for n in range(len(texts))]
    words = sum(len(text.split()) for text in texts[1::4])
    assert file.sources.chapters[1] == Chapter("biology", name, len(texts[1::4]), words)
    config = CorpusConfig(data_path=path, subject_field="topic", subjects=("biology", "x"))
    file = read(config, made, tmp_path / "tokens")
    assert [*file.texts] == texts[1::4] and file.sources is not None
    assert file.sources.subjects == ["biology"]
    config = CorpusConfig(data_path=path, subject_field="topic", subjects=("art",))
    message = refused(config, made, tmp_path / "none")
    assert "--subjects art: no text has this topic; there are: physics, biology" in message


@pytest.mark.parametrize("name", ["texts.jsonl", "texts.parquet"])
def test_fields(name: str, texts: list[str], made: Any, tmp_path: Path) -> None:
    path = FORMS[name](tmp_path / name, texts)
    nested = read(CorpusConfig(data_path=path, text_field="meta.body"), made, tmp_path / "tokens")
    assert [*nested.texts] == texts
    for option, field in (("text_field", "content"), ("subject_field", "meta.topic")):
        message = refused(CorpusConfig(data_path=path, **{option: field}), made, tmp_path / "none")
        assert f"--{option.replace('_', '-')} {field}: no such field" in message
        assert "id, text, topic, meta, meta.body, meta.tags" in message
    message = refused(CorpusConfig(data_path=path, text_field="id"), made, tmp_path / "none")
    assert "--text-field id: holds a number, not a text" in message


def test_columns_of_other_types(texts: list[str], made: Any, tmp_path: Path) -> None:
    kinds = (
        pyarrow.array(texts, pyarrow.large_string()),
        pyarrow.array(texts).dictionary_encode(),
        pyarrow.array([text.encode() for text in texts], pyarrow.binary()),
    )
    for kind in kinds:
        path = parquet(tmp_path / "x.parquet", texts, text=kind)
        assert [*read(CorpusConfig(data_path=path), made, tmp_path / "tokens").texts] == texts
    dates = pyarrow.array([datetime(2026, 1, 1)] * len(texts))
    path = parquet(tmp_path / "x.parquet", texts, text=dates)
    message = refused(CorpusConfig(data_path=path), made, tmp_path / "none")
    assert "row 1: --text-field text: holds a datetime, not a text" in message
    null = parquet(tmp_path / "x.parquet", texts, text=pyarrow.array([None, *texts[1:]]))
    file = read(CorpusConfig(data_path=null), made, tmp_path / "tokens")
    assert [*file.texts] == texts[1:]


def test_a_pipe_is_refused(made: Any, tmp_path: Path) -> None:
    """It would be waited for, and is empty when it is read again."""
    pipe = tmp_path / "x.jsonl"
    os.mkfifo(pipe)
    message = refused(CorpusConfig(data_path=pipe), made, tmp_path / "tokens")
    assert message.startswith(f"--data-path {pipe}: ")


@pytest.mark.parametrize("name", ["texts.jsonl.gz", "texts.jsonl.zst", "texts.parquet"])
def test_a_file_that_is_cut_off(name: str, texts: list[str], made: Any, tmp_path: Path) -> None:
    path = FORMS[name](tmp_path / name, texts)
    path.write_bytes(path.read_bytes()[:-40])
    message = refused(CorpusConfig(data_path=path), made, tmp_path / "tokens")
    assert message.startswith(f"{path}: ") and "damaged, cut off" in message


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"text": "a"}\n{"text": "b"\n', "line 2: not JSON"),
        (b'{"text": "a"}\n[1]\n', "line 2: a JSON list, neither a text nor an object"),
        (b'{"text": "a"}\n{"text": "\\ud800"}\n', "line 2: holds half a surrogate pair"),
        (b'{"text": "caf\xe9"}\n', "line 1: not UTF-8; save the file as UTF-8"),
        ('{"text": "a"}\n'.encode("utf-16"), "line 1: not UTF-8"),
        (b'{"text": [{"role": "user"}]}\n', "line 1: --text-field text: holds a list, not a text"),
        (b'{"text": null}\n{"text": ""}\n', "not empty, and 2 that are empty or null"),
        (b"\n", "has no text that is not empty"),
    ],
)
def test_wrong_lines(content: bytes, says: str, made: Any, tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_bytes(content)
    assert says in refused(CorpusConfig(data_path=path), made, tmp_path / "tokens")


def test_no_form_that_is_known(made: Any, tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text("text,topic\na,b\n")
    message = refused(CorpusConfig(data_path=table), made, tmp_path / "tokens")
    assert all(form in message for form in ("JSON list", ".jsonl.zst", "Parquet", "--dataset-id"))
    assert "to_parquet" in message
    message = refused(CorpusConfig(data_path=tmp_path / "none.parquet"), made, tmp_path / "tokens")
    assert f"--data-path {tmp_path}/none.parquet: no such file" in message


def test_a_file_is_another_corpus_under_a_name_that_has_it_read_in_another_form(
    texts: list[str], made: Any, tmp_path: Path
) -> None:
    path = json_lines(tmp_path / "texts.txt", texts)
    plain = cached_tokens(read_corpus(CorpusConfig(data_path=path)), made, tmp_path / "root")
    assert "{" in plain.texts[0]
    path = path.rename(tmp_path / "texts.jsonl")
    read_again = cached_tokens(read_corpus(CorpusConfig(data_path=path)), made, tmp_path / "root")
    assert [*read_again.texts] == texts


@pytest.mark.parametrize("name", ["texts.json.gz", "texts.json"])
def test_a_compressed_list_is_refused(name: str, texts: list[str], tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(gzip.compress(json.dumps(texts).encode()))
    for given in (tmp_path, tmp_path / name):
        config = CorpusConfig(data_path=given, data_pattern="*")
        with pytest.raises(SAEError, match=rf"{name}: a JSON list that is compressed"):
            read_corpus(config)


@pytest.mark.parametrize("name", ["texts.json", "texts.txt"])
def test_subjects_of_texts_without_fields_are_refused(
    name: str, texts: list[str], made: Any, tmp_path: Path
) -> None:
    path = json_list(tmp_path / name, texts)
    config = CorpusConfig(data_path=path, subject_field="topic", subjects=("biology",))
    message = refused(config, made, tmp_path / "none")
    assert "--subject-field topic" in message and "fields" in message and name in message


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_text_in_a_field_that_is_null_is_empty(
    form: str, texts: list[str], made: Any, tmp_path: Path
) -> None:
    given = [{"meta": {"body": texts[0]}}, {"meta": None}, {"meta": {"body": texts[1]}}]
    path = tmp_path / f"texts.{form}"
    if form == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in given))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(given), path)
    config = CorpusConfig(data_path=path, text_field="meta.body")
    file = read(config, made, tmp_path / "tokens")
    assert [*file.texts] == texts[:2] and file.manifest is not None
    assert file.manifest.n_empty == 1


def test_how_far_ahead_texts_are_read_changes_nothing(
    texts: list[str], made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenise_module, "BATCH_TEXTS", 1)
    given = [texts[0], "", texts[1], "", texts[2], texts[3]]
    path = json_lines(tmp_path / "texts.jsonl", given)
    config = CorpusConfig(data_path=path, subject_field="id", max_tokens=len(texts[0]) // 9)
    found = []
    for processes in (1, 2):
        tokenise(read_corpus(config), made, tmp_path / "tokens", processes)
        found.append(TokenFile.open(tmp_path / "tokens").manifest)
    assert found[0] == found[1] and found[0] is not None
    assert found[0].n_texts < 4 and found[0].chapters is not None
    assert [chapter["texts"] for chapter in found[0].chapters][-1] == 1


# Folders


def test_a_folder(
    texts: list[str], made: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "corpus"
    (folder / "more").mkdir(parents=True)
    (folder / "b.TXT").write_text(texts[1])
    (folder / "a.md").write_text(f"\ufeff{texts[0]}", encoding="utf-8")
    parquet(folder / "c.parquet", texts[2:4])
    (folder / "picture.png").write_bytes(b"\x89PNG")
    (folder / ".hidden.txt").write_text("hidden")
    (folder / "more/d.txt").write_text(texts[4])
    file = read(CorpusConfig(data_path=folder), made, tmp_path / "tokens")
    assert [*file.texts] == texts[:4]
    assert f"{folder}: 3 files are passed over, such as .hidden.txt" in capsys.readouterr().out
    every = CorpusConfig(data_path=folder, data_pattern="**/*.txt")
    assert [*read(every, made, tmp_path / "tokens").texts] == [texts[4]]
    message = refused(
        CorpusConfig(data_path=folder / "more", data_pattern="*.md"), made, tmp_path / "none"
    )
    assert "no file in it that matches --data-pattern *.md" in message
    (folder / "dataset_info.json").write_text('{"features": {}}')
    message = refused(CorpusConfig(data_path=folder), made, tmp_path / "none")
    assert "dataset_info.json: line 1: --text-field text: no such field" in message
    assert message.endswith("leave it out with --data-pattern, which is *")
    for path in folder.glob("*.*"):
        path.unlink()
    message = refused(CorpusConfig(data_path=folder), made, tmp_path / "none")
    assert "more/d.txt; give --data-pattern '**/*.txt'" in message


@pytest.mark.parametrize("name", ["book.txt", "book.json", "book.jsonl", "book.parquet"])
def test_a_long_text_is_cut_where_paragraphs_end(
    name: str, made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (records, tokenise_module):
        monkeypatch.setattr(module, "LONGEST", 50)
    book = "\n\n".join(f"paragraph {n} of {'some ' * (n % 4)}words" for n in range(20))
    path = tmp_path / name
    if name == "book.txt":
        path.write_text(book)
    else:
        FORMS[f"texts{path.suffix}"](path, ["paragraph", book, "paragraph"])
    found = [*read(CorpusConfig(data_path=path), made, tmp_path / "tokens").texts]
    whole = book if name == "book.txt" else f"paragraph{book}paragraph"
    assert "".join(found) == whole and len(found) > 10
    assert all(len(text) <= 50 and text.startswith("paragraph") for text in found)


# Settings that do not go together


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "--data-path: give it, or --dataset-id"),
        ({"dataset_id": "a/b", "data_path": Path("x")}, "either --dataset-id or --data-path"),
        ({"dataset_id": "nobody"}, "--dataset-id nobody: not a repository"),
        ({"data_path": Path("x"), "subjects": ("a",)}, "--subjects needs --subject-field"),
        ({"data_path": Path("x"), "max_tokens": 0}, "--max-tokens 0: must be at least 1"),
    ],
)
def test_settings_that_do_not_fit(options: dict[str, Any], says: str) -> None:
    with pytest.raises(SAEError) as error:
        CorpusConfig(**options)
    assert says in str(error.value)
