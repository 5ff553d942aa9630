"""Full and read-only disks: one error with the path and the bytes, and what was there stays."""

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from full_disks import SIZE, filled, read_only, short_files, small_disk
from synthetic import random_sae

from sae_core.activations.shards import harvest
from sae_core.activations.store import CachedSource
from sae_core.activations.token_windows import TokenWindows
from sae_core.data_processing.texts import read_texts, write_texts
from sae_core.formats.checkpoint import load_sae, sae_files, save_sae, write_files
from sae_core.formats.saelens import saelens_files
from sae_core.models.language_model import Hook, LanguageModel
from sae_core.publishing.hub import Marker
from sae_core.trainer.observers import MetricsFile
from sae_core.utils import files
from sae_core.utils.errors import SAEError

HOOKS = [Hook(1, "hook_resid_post")]

Break = Callable[[Path], AbstractContextManager[None]]


class Artifact(NamedTuple):
    """Something that is written: how, in a first and a second version, and how it is read."""

    write: Callable[[Path, int], Any]
    read: Callable[[Path], Any]


def sae(version: int) -> Any:
    origin = {"model_name": "a/b", "max_text_length": 8, "prepend_bos": False, "data_file": "t"}
    return random_sae(dtype=torch.float32, seed=version, metadata=origin)


def export(folder: Path, version: int) -> None:
    write_files(folder, sae_files(sae(version), {"loss": [1.0]}) | saelens_files(sae(version)))


def marker(version: int) -> Marker:
    return Marker("run", "a/b", "c" * 40, "url", "time", {"run/weights.pt": str(version) * 64})


ARTIFACTS = {
    "checkpoint": Artifact(lambda path, v: save_sae(path, sae(v), {}), load_sae),
    "export": Artifact(export, load_sae),
    "texts": Artifact(lambda path, v: write_texts(path, ["a text"] * (20 + v)), read_texts),
    "upload marker": Artifact(lambda path, v: marker(v).save(path), Marker.load),
}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk") as disk:
        yield disk


def contents(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def check_failure(folder: Path, artifact: Artifact, broken: Break, reason: str) -> None:
    """The first version stays, bit for bit and readable, whether the second is to replace it or
    to lie beside it; and nothing else is left."""
    artifact.write(folder / "artifact", 1)
    before = contents(folder)
    for name in ("artifact", "other"):
        with broken(folder), pytest.raises(SAEError) as error:
            artifact.write(folder / name, 2)
        message = str(error.value)
        assert message.startswith(f"{folder / name}: cannot be written ({reason}"), message
        assert re.search(r"\), [\d,]+ bytes; free some space", message), message
        assert contents(folder) == before
        artifact.read(folder / "artifact")
    artifact.write(folder / "artifact", 2)
    assert contents(folder).keys() == before.keys() and contents(folder) != before


@pytest.mark.parametrize("name", ARTIFACTS)
def test_files_that_grow_too_long(name: str, tmp_path: Path) -> None:
    check_failure(tmp_path, ARTIFACTS[name], short_files, "File too large")


@pytest.mark.parametrize("name", ARTIFACTS)
def test_a_full_disk(name: str, disk: Path) -> None:
    check_failure(disk, ARTIFACTS[name], filled, "No space left on device")


@pytest.mark.parametrize("name", ARTIFACTS)
def test_a_read_only_disk(name: str, disk: Path) -> None:
    check_failure(disk, ARTIFACTS[name], read_only, "Read-only file system")


@pytest.mark.parametrize("broken", [filled, read_only])
def test_events_that_cannot_be_written(broken: Break, disk: Path) -> None:
    path = disk / "metrics.jsonl"
    MetricsFile(path, 1).on_start(3, 7)
    before = path.read_bytes()
    with broken(disk), pytest.raises(SAEError, match=f"{path}: cannot be written"):
        for _ in range(200):  # until the block that the file has already is full
            MetricsFile(path, 1).on_start(3, 7)
    assert path.read_bytes().startswith(before)


# The harvest


@pytest.fixture
def shard(language_model: LanguageModel, windows: TokenWindows) -> Callable[..., Any]:
    def make(folder: Path, passes: int = 1) -> Any:
        return harvest(language_model, windows, HOOKS, folder, batch_size=4, passes=passes)

    return make


def needed(windows: TokenWindows, passes: int) -> int:
    """Bytes of a shard with one hook, in float32 and of width 32, and of its digests."""
    return (windows.n_train * passes + windows.n_validation) * (windows.positions * 32 * 4 + 32)


def check_shard(folder: Path, before: dict[str, bytes]) -> None:
    assert contents(folder.parent) == before
    source = CachedSource([folder], HOOKS[0], tokens_per_step=64, seed=0)
    assert torch.cat(list(source.train_batches(0))).isfinite().all()


def test_a_harvest_that_cannot_fit_is_refused_before_the_model_runs(
    disk: Path, shard: Callable[..., Any], windows: TokenWindows, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard(disk / "shard")
    before = contents(disk)
    passes = SIZE // needed(windows, 1) + 2
    monkeypatch.setattr(LanguageModel, "activations", None)
    free = SIZE - sum(map(len, before.values()))
    for name in ("shard", "other"):
        with pytest.raises(SAEError) as error:
            shard(disk / name, passes=passes)
        found = re.fullmatch(
            rf"{disk / name}: needs ([\d,]+) bytes, but ([\d,]+) are free there; free some, .*",
            str(error.value),
        )
        assert found, error.value
        takes, there = (int(number.replace(",", "")) for number in found.groups())
        assert takes == needed(windows, passes) and 0 < there <= free
    check_shard(disk / "shard", before)


@pytest.mark.parametrize("broken", [filled, read_only])
def test_a_disk_that_fails_the_harvest(
    broken: Break, disk: Path, shard: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when somebody else takes the space meanwhile."""
    shard(disk / "shard")
    before = contents(disk)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 2**60}))
    for name in ("shard", "other"):
        words = f"{disk / name}: cannot be written .*, [0-9,]+ bytes"
        with broken(disk), pytest.raises(SAEError, match=words):
            shard(disk / name)
        check_shard(disk / "shard", before)


def test_a_harvest_with_files_that_grow_too_long(tmp_path: Path, shard: Callable[..., Any]) -> None:
    shard(tmp_path / "shard")
    before = contents(tmp_path)
    with short_files(tmp_path), pytest.raises(SAEError, match=r"shard: .*\(File too large\)"):
        shard(tmp_path / "shard", passes=2)
    check_shard(tmp_path / "shard", before)
    shard(tmp_path / "shard", passes=2)
    assert contents(tmp_path).keys() == before.keys()


def test_a_harvest_that_was_killed_leaves_nothing_behind_the_next(
    tmp_path: Path, shard: Callable[..., Any]
) -> None:
    shard(tmp_path / "shard")
    before = contents(tmp_path)
    (tmp_path / ".shard.writing").mkdir()
    (tmp_path / ".shard.writing/blocks.0.hook_resid_post.train.bin").write_bytes(b"half")
    shard(tmp_path / "shard")
    check_shard(tmp_path / "shard", before)
