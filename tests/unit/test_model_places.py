"""Where a model is loaded from: for what the cache has whole nobody is asked, and a Hub that does
not answer is asked once."""

import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from loopback import LoopbackServer, QuietHandler
from minihub import MiniHub
from published import hub_here

from sae_core.models import model_places, model_sources
from sae_core.models.language_model import LanguageModel
from sae_core.models.model_facts import model_facts
from sae_core.models.model_places import damaged_files, is_whole, model_place
from sae_core.models.model_sources import FetchConfig, SourceConfig, fetch
from sae_core.train_config import ModelConfig
from sae_core.utils.errors import SAEError
from sae_core.utils.files import new_folder
from sae_core.utils.run_lock import lock

CPU, NAME = torch.device("cpu"), "alice/tiny"
CONFIG = ModelConfig(model_name=NAME, model_dtype="float32")


class Silence(LoopbackServer):
    """A server that takes requests, counts them, and never answers."""

    def __init__(self) -> None:
        self.n_requests = 0
        self.bind(Mute, "silence")


class Mute(QuietHandler):
    silence: Silence

    def do_GET(self) -> None:
        self.silence.n_requests += 1
        self.silence.stopping.wait()
        self.close_connection = True

    do_HEAD = do_GET


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> Iterator[MiniHub]:
    """A Hub with a model, and an empty cache."""
    with hub_here(tmp_path, monkeypatch, xet=False) as server:
        from huggingface_hub import HfApi

        HfApi().create_repo(NAME)
        files = {path.name: path.read_bytes() for path in tiny_model.iterdir()}
        server.commit(NAME, files)
        server.requests.clear()
        yield server


@pytest.fixture
def cached(hub: MiniHub, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The model in the cache, as `snapshot_download` leaves it there; from now on requests to the
    Hub are counted from 0."""
    folder = Path(fetch(FetchConfig(NAME)).path)
    hub.requests.clear()
    return folder


def unreachable(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


CLOSED = "http://127.0.0.1:9"


def test_whole_model_in_the_cache_asks_nobody(cached: Path, hub: MiniHub) -> None:
    """Files that the repository never had (chat_template.jinja) are not asked for either."""
    assert is_whole(cached) and model_place(CONFIG) == (str(cached), cached.name)
    assert model_facts(CONFIG).commit == cached.name
    model = LanguageModel.load(CONFIG, CPU)
    assert model.n_layers == 4 and model.tokenizer.eos_token == "<|endoftext|>"
    assert fetch(FetchConfig(NAME, revision=cached.name)).path == str(cached)
    assert hub.requests == []


def test_branch_is_looked_up_by_fetch_alone(cached: Path, hub: MiniHub) -> None:
    hub.commit(NAME, {"README.md": b"new"})
    assert model_facts(CONFIG).commit == cached.name
    record = fetch(FetchConfig(NAME))
    assert record.commit == hub.repositories[NAME].head != cached.name
    assert model_facts(CONFIG).commit == record.commit, "the cache knows it now"


def test_model_comes_from_the_hub_at_first(hub: MiniHub) -> None:
    assert model_facts(CONFIG).commit == hub.repositories[NAME].head
    place = model_place(CONFIG)
    assert place.source == NAME and not place.is_here
    LanguageModel.load(CONFIG, CPU)
    assert model_place(CONFIG).is_here


@pytest.fixture
def no_sleep(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Waiting between tries is noted, not done."""
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited


@pytest.mark.parametrize("call", [model_facts, lambda c: fetch(FetchConfig(c.model_name))])
def test_dead_hub_is_tried_once(
    call: Any, hub: MiniHub, monkeypatch: pytest.MonkeyPatch, no_sleep: list[float]
) -> None:
    unreachable(monkeypatch, CLOSED)
    with pytest.raises(SAEError, match=f"{NAME}.*cannot be .*refused"):
        call(CONFIG)
    assert no_sleep == []


@pytest.mark.parametrize("call", [model_facts, lambda c: fetch(FetchConfig(c.model_name))])
def test_silent_hub_is_waited_for_once(
    call: Any, hub: MiniHub, monkeypatch: pytest.MonkeyPatch, no_sleep: list[float]
) -> None:
    monkeypatch.setattr(model_places, "PATIENCE", 0.2)
    with Silence() as server:
        unreachable(monkeypatch, server.url)
        with pytest.raises(SAEError, match=f"{NAME}.*cannot be "):
            call(CONFIG)
        assert server.n_requests == 1 and no_sleep == []


def test_dead_hub_is_done_without(
    cached: Path, monkeypatch: pytest.MonkeyPatch, no_sleep: list[float]
) -> None:
    """Also where the cache lacks a file that most models have: transformers says if it needs it."""
    unreachable(monkeypatch, CLOSED)
    assert fetch(FetchConfig(NAME)).commit == cached.name
    (cached / "tokenizer_config.json").unlink()
    assert model_facts(CONFIG).commit == cached.name
    (cached / "model.safetensors").unlink()
    with pytest.raises(SAEError, match=f"--model-name {NAME}: cannot be loaded"):
        LanguageModel.load(CONFIG, CPU)
    assert no_sleep == []


def test_model_that_the_hub_does_not_have(hub: MiniHub) -> None:
    with pytest.raises(SAEError, match="--model-name alice/none: cannot be loaded"):
        model_facts(ModelConfig(model_name="alice/none"))
    with pytest.raises(SAEError, match="model alice/none at revision main: cannot be fetched"):
        fetch(FetchConfig("alice/none"))
    assert len(hub.requests) == 2


def empty(path: Path) -> None:
    path.resolve().write_bytes(b"")


def cut(path: Path) -> None:
    path.resolve().write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "name"),
    [(empty, "tokenizer.json"), (empty, "model.safetensors"), (cut, "model.safetensors")],
)
def test_damaged_file_of_the_cache_is_fetched_again(
    damage: Any, name: str, cached: Path, tiny_model: Path
) -> None:
    damage(cached / name)
    assert damaged_files(cached) == [cached / name] and not is_whole(cached)
    assert fetch(FetchConfig(NAME, revision=cached.name)).path == str(cached)
    assert (cached / name).read_bytes() == (tiny_model / name).read_bytes()
    damage(cached / name)
    LanguageModel.load(CONFIG, CPU)
    assert is_whole(cached)


def test_whole_directories(tiny_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    assert is_whole(folder)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    assert not is_whole(folder)
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    assert not is_whole(folder)
    shutil.copy(folder / shards["a"], folder / shards["b"])
    assert is_whole(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "my.M"}}))
    assert not is_whole(folder)
    (folder / "my.py").write_text("class M: pass")
    assert is_whole(folder)


# Conversions

WHEEL = SourceConfig(wheel="a==1", sha256="0" * 64, gguf="a/m.gguf")


@pytest.fixture
def conversions(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> list[threading.Thread]:
    """Who has converted; a conversion takes a moment and gives the tiny model."""
    converted: list[threading.Thread] = []

    def convert(source: SourceConfig, target: Path) -> None:
        converted.append(threading.current_thread())
        time.sleep(0.2)
        with new_folder(target) as staging:
            shutil.copytree(tiny_model, staging, dirs_exist_ok=True)
            model_sources.seal(staging)

    monkeypatch.setenv("SAE_CORE_CACHE", str(tmp_path))
    monkeypatch.setattr(model_sources, "_convert_wheel", convert)
    monkeypatch.setattr("sae_core.utils.run_lock.POLL", 0.05)
    return converted


def test_conversion_is_made_once_by_several_at_once(conversions: list[threading.Thread]) -> None:
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(model_sources._from_wheel(WHEEL)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 3 and len(set(found)) == 1 and len(conversions) == 1


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", model_sources.CHECKSUMS])
@pytest.mark.parametrize("damage", [empty, Path.unlink])
def test_damaged_conversion_is_made_again(
    name: str, damage: Any, conversions: list[threading.Thread]
) -> None:
    folder = model_sources._from_wheel(WHEEL)
    before = (folder / name).read_bytes()
    damage(folder / name)
    assert model_sources._from_wheel(WHEEL) == folder
    assert (folder / name).read_bytes() == before and len(conversions) == 2
    model_sources._from_wheel(WHEEL)
    assert len(conversions) == 2


def test_lock_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae_core.utils.run_lock.POLL", 0.01)
    path = tmp_path / "lock"
    with lock(path, "is at it"):
        with pytest.raises(SAEError, match="is at it"), lock(path, "is at it", wait=0.05):
            pass
