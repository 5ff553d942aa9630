"""Data sets of the Hub, by the unmodified client against the look-alike."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hub_store import Repository
from minihub import MiniHub
from running import ROOT, run_python

from sae_core.corpus.corpora import read_corpus
from sae_core.settings.texts import CorpusConfig
from sae_core.utils.errors import SAEError

READ = """
import json, sys
import datasets
datasets.config.STREAMING_READ_RETRY_INTERVAL = 0.1
from sae_core.corpus.corpora import read_corpus
from sae_core.settings.texts import CorpusConfig
from sae_core.utils.errors import SAEError
found = []
for options in json.loads(sys.argv[1]):
    try:
        corpus = read_corpus(CorpusConfig(**options))
        texts = [text.text for text in corpus.texts()]
        labels = [label.subject for label in corpus.labels or []]
        found.append([texts, labels, corpus.commit, corpus.data_file])
    except SAEError as error:
        found.append(str(error))
print(json.dumps(found))
"""
"""In a process of its own, because the client reads its settings when it is imported."""


def shard(number: int, word: str, n: int = 300) -> bytes:
    rows = [
        {
            "text": f"{word} {number} {n}",
            "topic": "ab"[n % 2],
            "n": n,
            "filler": f"{n * 7919:099d}",
            "label": n % 2 if n > 1 else -1,
        }
        for n in range(n)
    ]
    file = io.BytesIO()
    table = pyarrow.Table.from_pylist(rows)
    kinds = {name: {"dtype": "string", "_type": "Value"} for name in ("text", "topic", "filler")}
    kinds |= {"n": {"dtype": "int64", "_type": "Value"}}
    kinds |= {"label": {"names": ["even", "odd"], "_type": "ClassLabel"}}
    table = table.replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": kinds}})}
    )
    pyarrow.parquet.write_table(table, file, row_group_size=100, compression="none")
    return file.getvalue()


def shards(word: str) -> dict[str, bytes]:
    return {f"data/train-{n:05d}-of-00002.parquet": shard(n, word) for n in range(2)}


def expected(word: str) -> list[str]:
    return [f"{word} {number} {n}" for number in range(2) for n in range(300)]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MiniHub]:
    with MiniHub(tmp_path_factory.mktemp("hub"), xet=False) as hub:
        for name in ("alice/texts", "alice/gated"):
            made = hub.repositories[name] = Repository(False, gated=name == "alice/gated")
            hub.add_commit(made, {})
            hub.commit(name, shards("old"))
            hub.commit(name, shards("new"))
        yield hub


def read(hub: MiniHub, home: Path, *options: dict[str, Any], token: str = "hf_bob") -> list[Any]:
    given = [{"dataset_id": "alice/texts"} | option for option in options]
    environment = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url, "HF_TOKEN": token}
    environment |= {"HF_HOME": str(home), "PYTHONPATH": str(ROOT)}
    done = run_python("-c", READ, json.dumps(given), env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def test_downloaded_and_streamed(hub: MiniHub, tmp_path: Path) -> None:
    old, head = list(hub.repositories["alice/texts"].commits)[1:]
    found = read(
        hub,
        tmp_path,
        {},
        {"dataset_streaming": True},
        {"dataset_revision": old, "subject_field": "topic"},
        {"subject_field": "topic", "subjects": ["b"], "dataset_streaming": True},
        {"subject_field": "label"},
        {"subject_field": "label", "subjects": ["odd"], "dataset_streaming": True},
    )
    assert found[0] == found[1] == [expected("new"), [], head, "alice/texts"]
    assert found[2] == [expected("old"), ["a", "b"], old, "alice/texts"]
    assert found[3][:2] == [expected("new")[1::2], ["b"]]
    assert found[4][:2] == [expected("new"), ["", "even", "odd"]]
    odd = [text for text in expected("new")[1::2] if not text.endswith(" 1")]
    assert found[5][:2] == [odd, ["odd"]]


def test_what_is_not_there_is_said(hub: MiniHub, tmp_path: Path) -> None:
    found = read(
        hub,
        tmp_path,
        {"text_field": "body"},
        {"subject_field": "subject", "dataset_streaming": True},
        {"dataset_split": "test"},
        {"dataset_name": "other"},
        {"dataset_id": "alice/gated"},
        {"dataset_id": "alice/nothing"},
        {"dataset_revision": "v9"},
    )
    parts = (
        "--text-field body: no such field; there are: text, topic, n, filler, label",
        "--subject-field subject: no such field; there are: text, topic, n, filler, label",
        "['train']",
        "['default']",
        "alice/gated, revision main: is only for those who have been given access",
        "alice/nothing, revision main: no such repository",
        "revision v9: no such repository",
    )
    for message, part in zip(found, parts, strict=True):
        assert part in message and "\n" not in message
    [[texts, *_]] = read(hub, tmp_path, {"dataset_id": "alice/gated"}, token="hf_alice")
    assert texts == expected("new")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_connection_that_is_cut(streaming: bool, hub: MiniHub, tmp_path: Path) -> None:
    hub.fail(r"GET /alice/texts/resolve/.*00001", cut_after=10_000)
    [[texts, *_]] = read(hub, tmp_path, {"dataset_streaming": streaming})
    assert texts == expected("new")
    assert "cut" in {request.status for request in hub.requests}


def test_a_folder_of_the_name_is_not_read_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "owner/texts").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for revision in (None, "0" * 40):
        config = CorpusConfig(dataset_id="owner/texts", dataset_revision=revision)
        with pytest.raises(SAEError, match="--dataset-id owner/texts: there is a folder of that"):
            read_corpus(config)
