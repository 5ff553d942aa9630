"""Files of records with oddities: columns of one name, subjects that are no text, long rows."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from tiny_model import tokenizer

from sae_core.corpus import records
from sae_core.corpus.corpora import read_corpus
from sae_core.corpus.token_file import TokenFile
from sae_core.corpus.tokenise import tokenise
from sae_core.settings.texts import CorpusConfig
from sae_core.utils.errors import SAEError


def parquet(path: Path, **columns: Any) -> Path:
    table = pyarrow.Table.from_arrays([*columns.values()], names=[*columns])
    pyarrow.parquet.write_table(table, path, use_dictionary=False)
    return path


def read(path: Path, **options: Any) -> TokenFile:
    folder = path.with_name("tokens")
    corpus = read_corpus(CorpusConfig(data_path=path, **options))
    tokenise(corpus, tokenizer("a b c d"), folder, 1)
    return TokenFile.open(folder)


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    table = pyarrow.Table.from_arrays([["a b"], ["c d"]], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(SAEError, match=r"x\.parquet: --text-field text: 2 columns have this name"):
        read(tmp_path / "x.parquet")


def test_subjects_that_are_bytes(tmp_path: Path) -> None:
    path = parquet(tmp_path / "x.parquet", text=["a", "b"], topic=[b"art", "\u0394".encode()])
    sources = read(path, subject_field="topic").sources
    assert sources is not None and sources.subjects == ["art", "\u0394"]
    parquet(path, text=["a", "b"], topic=[b"art", b"\xff"])
    with pytest.raises(SAEError, match="row 2: --subject-field topic: holds bytes that are not UT"):
        read(path, subject_field="topic")


def test_subjects_that_are_numbers_of_classes(tmp_path: Path) -> None:
    """As the `datasets` library notes them; -1 and null are none."""
    columns = {"text": [*"abcd"], "topic": [1, 0, -1, None]}
    path = parquet(tmp_path / "x.parquet", **columns)
    sources = read(path, subject_field="topic").sources
    assert sources is not None and sources.subjects == ["1", "0", "-1", ""]
    kinds = {"topic": {"names": ["art", "law"], "_type": "ClassLabel"}}
    about = {"huggingface": json.dumps({"info": {"features": kinds}})}
    table = pyarrow.table(columns).replace_schema_metadata(about)
    pyarrow.parquet.write_table(table, path)
    sources = read(path, subject_field="topic").sources
    assert sources is not None and sources.subjects == ["law", "art", ""]
    assert [*read(path, subject_field="topic", subjects=("law",)).texts] == ["a"]


@pytest.mark.parametrize(("topic", "kind"), [(["a"], "a list"), ({"a": 1}, "an object")])
def test_subjects_that_are_no_names(topic: Any, kind: str, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": "a", "topic": topic}))
    with pytest.raises(SAEError, match=f"line 1: --subject-field topic: holds {kind}, not the na"):
        read(tmp_path / "x.jsonl", subject_field="topic")


def test_a_byte_order_mark_on_an_empty_line(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'\xef\xbb\xbf\r\n{"text": "a"}\r\n')
    assert [*read(tmp_path / "x.jsonl").texts] == ["a"]


@pytest.mark.parametrize("kind", [b"\x50", b"\x5f"])
def test_a_zstd_file_that_begins_with_a_frame_to_skip(kind: bytes, tmp_path: Path) -> None:
    """As parallel compressors write it."""
    skipped = kind + b"\x2a\x4d\x18\x04\0\0\0size"
    frames = pyarrow.compress(b'{"text": "a"}\n', "zstd", asbytes=True)
    (tmp_path / "x.jsonl.zst").write_bytes(skipped + frames + skipped + frames)
    assert [*read(tmp_path / "x.jsonl.zst").texts] == ["a", "a"]


def test_long_rows_of_parquet_are_read_a_few_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "ROW_BYTES", 50_000)
    texts = [f"{n % 10} " * 5000 for n in range(30)]
    path = parquet(tmp_path / "x.parquet", text=texts)
    sizes: list[int] = []

    class Watched(pyarrow.parquet.ParquetFile):
        def iter_batches(self, *words: Any, **options: Any) -> Any:
            for batch in super().iter_batches(*words, **options):
                sizes.append(batch.nbytes)
                yield batch

    monkeypatch.setattr(pyarrow.parquet, "ParquetFile", Watched)
    found = records.parquet(path, {"text": "--text-field"})
    assert [record.content["text"] for record in found] == texts
    assert max(sizes) < 60_000 < sum(sizes)
