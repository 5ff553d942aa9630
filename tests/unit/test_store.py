"""Where batches come from: shards against the model itself, bounded memory, damaged shards."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from by_definition import stream

from sae_core.activations import store
from sae_core.activations.shards import Manifest, harvest
from sae_core.activations.store import CachedSource, StreamingSource
from sae_core.activations.token_windows import TokenWindows, read_windows
from sae_core.models.language_model import Hook, LanguageModel
from sae_core.train_config import DataConfig, ModelConfig
from sae_core.utils.errors import SAEError

HOOKS = [Hook(1, "hook_resid_post"), Hook(2, "hook_mlp_out")]
BATCH = 5
STEP = 100
PASSES = 2

Harvest = Callable[..., list[Path]]


@pytest.fixture(scope="module")
def shards(
    language_model: LanguageModel, windows: TokenWindows, tmp_path_factory: pytest.TempPathFactory
) -> Harvest:
    """The folders of a harvest in so many shards."""

    def make(n_shards: int = 1, passes: int = PASSES, model: Any = language_model) -> list[Path]:
        root = tmp_path_factory.mktemp("shards")
        for shard in range(n_shards):
            options = {"batch_size": BATCH, "passes": passes, "n_shards": n_shards, "shard": shard}
            harvest(model, windows, HOOKS, root / str(shard), **options)
        return [root / str(shard) for shard in range(n_shards)]

    return make


@pytest.fixture(scope="module")
def whole(shards: Harvest) -> Path:
    """A harvest in one shard; not to be changed."""
    return shards()[0]


def cached(*folders: Path, hook: Hook = HOOKS[0], seed: int = 5) -> CachedSource:
    return CachedSource(folders, hook, tokens_per_step=STEP, seed=seed)


# The harvest


@pytest.mark.parametrize("n_shards", [2, 3, 100])
def test_shards_hold_together_what_one_does(n_shards: int, shards: Harvest, whole: Path) -> None:
    pieces = shards(n_shards)
    for hook in HOOKS:
        for part in ("train", "validation"):
            for name in (f"{hook.spec}.{part}.bin", f"{hook.spec}.{part}.sha256"):
                joined = b"".join((folder / name).read_bytes() for folder in pieces)
                assert joined == (whole / name).read_bytes()
    together, alone = cached(*pieces), cached(whole)
    batches = zip(together.train_batches(1), alone.train_batches(1), strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in batches)


@pytest.mark.parametrize("hook", HOOKS)
def test_harvest_is_the_model_without_position_0(
    hook: Hook, whole: Path, language_model: LanguageModel, windows: TokenWindows
) -> None:
    source = cached(whole, hook=hook)
    for part, epoch in (("train", 0), ("train", 1), ("train", 2), ("validation", 0)):
        n = windows.n_train if part == "train" else windows.n_validation
        indices = torch.arange(n).flip(0)
        train = part == "train"
        tokens = windows.train(epoch % PASSES, indices) if train else windows.validation(indices)
        expected = language_model.activations(tokens, [hook])[hook][:, 1:]
        assert expected.shape[1] == source.positions == windows.length - 1
        torch.testing.assert_close(source.read(part, epoch, indices), expected)


def test_manifest_and_progress(
    language_model: LanguageModel, windows: TokenWindows, tmp_path: Path
) -> None:
    seen: list[tuple[int, int]] = []
    report = {"batch_size": BATCH, "progress": lambda *counts: seen.append(counts)}
    manifest = harvest(language_model, windows, HOOKS, tmp_path, **report)
    assert Manifest.load(tmp_path) == manifest
    assert manifest.windows == {"train": windows.n_train, "validation": windows.n_validation}
    assert manifest.hooks == [hook.spec for hook in HOOKS] and manifest.dtype == "float32"
    total = windows.n_train + windows.n_validation
    assert seen[-1] == (total, total) and seen == sorted(seen)


def test_shards_know_the_windows_they_are_of(
    language_model: LanguageModel, windows: TokenWindows, texts: list[str], whole: Path
) -> None:
    """Also from as many windows of other texts, or of the same texts split otherwise."""
    source = cached(whole)
    assert source.is_of(windows)
    data = DataConfig(max_text_length=24, val_fraction=0.25, seed=5)
    changed = [*texts[:11], texts[11].replace("a", "e")]
    others = [
        read_windows(language_model.tokenizer, changed, data),
        read_windows(language_model.tokenizer, texts[:12], replace(data, seed=6)),
    ]
    assert not any(map(source.is_of, others))


def test_bfloat16_activations_come_back_bit_for_bit(
    tiny_model: Path, windows: TokenWindows, shards: Harvest
) -> None:
    config = ModelConfig(model_name=str(tiny_model), model_dtype="bfloat16")
    model = LanguageModel.load(config, torch.device("cpu"))
    source = cached(shards(1, 1, model)[0])
    first = torch.arange(BATCH)
    expected = model.activations(windows.train(0, first), HOOKS[:1])[HOOKS[0]][:, 1:]
    assert source.dtype == "bfloat16" and torch.equal(source.read("train", 0, first), expected)


# Two sources, the same batches


@pytest.mark.parametrize("passes", [1, 2])
def test_cached_and_streaming_give_the_same_batches(
    passes: int, shards: Harvest, language_model: LanguageModel, windows: TokenWindows
) -> None:
    source = cached(*shards(2, passes))
    stream = StreamingSource(
        language_model, windows, HOOKS[0], batch_size=BATCH, tokens_per_step=STEP, seed=5
    )
    assert (source.n_train, source.n_validation) == (stream.n_train, stream.n_validation)
    assert source.steps_per_epoch == stream.steps_per_epoch > 3
    for epoch in range(passes):
        batches = source.train_batches(epoch), stream.train_batches(epoch)
        for mine, theirs in zip(*batches, strict=True):
            torch.testing.assert_close(mine, theirs)
    validation = source.validation_batches(), stream.validation_batches()
    for mine, theirs in zip(*validation, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_epochs_take_the_passes_in_turn(whole: Path) -> None:
    read = [cached(whole).read("train", epoch, torch.arange(4)) for epoch in range(PASSES + 1)]
    assert torch.equal(read[0], read[PASSES]) and not torch.equal(read[0], read[1])


# Memory, and reading ahead


def anonymous_memory() -> int:
    """Bytes that this process holds, mapped files not counted."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux's /proc")
def test_a_store_larger_than_the_shuffle_is_read_in_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store of 256 MB, in a sparse file, and a shuffle of 4 MB."""
    monkeypatch.setattr(store, "SHUFFLE_TOKENS", 2**11)
    d_in, positions, n_windows = 512, 64, 2048
    counts = {"train": n_windows, "validation": 0}
    first, hooks = dict.fromkeys(counts, 0), [HOOKS[0].spec]
    digests = {name: hashlib.sha256() for name in (DIGESTS, DIGESTS.replace("train", "validation"))}
    zeros = hashlib.sha256(bytes(4 * d_in * positions)).digest() * n_windows
    digests[DIGESTS].update(zeros)
    (tmp_path / DIGESTS).write_bytes(zeros)
    sums = {name: digest.hexdigest() for name, digest in digests.items()}
    Manifest(hooks, "float32", d_in, positions, 1, counts, first, counts, None, sums).save(
        tmp_path / MANIFEST
    )
    for suffix in ("bin", "sha256"):
        (tmp_path / f"{HOOKS[0].spec}.validation.{suffix}").touch()
    with (tmp_path / TRAIN).open("wb") as file:
        file.truncate(4 * d_in * positions * n_windows)
    source = cached(tmp_path)
    assert source.shuffle_windows * positions == 2**11
    before, most = anonymous_memory(), 0
    for batch in source.train_batches(0):
        most = max(most, anonymous_memory())
        assert batch.shape == (STEP, d_in)
    assert most - before < 64 * 2**20


# Damage


def edit_manifest(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def flip(path: Path, at: int) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


TRAIN, MANIFEST = f"{HOOKS[0].spec}.train.bin", "manifest.json"
DIGESTS = f"{HOOKS[0].spec}.train.sha256"
FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut": (
        lambda f: (f / TRAIN).write_bytes((f / TRAIN).read_bytes()[:-4]),
        rf"{TRAIN}: \d+ bytes, expected \d+; harvest again",
    ),
    "no file": (lambda f: (f / TRAIN).unlink(), f"{TRAIN}: 0 bytes, expected"),
    "no digests": (lambda f: (f / DIGESTS).unlink(), f"{DIGESTS}: 0 bytes, expected"),
    "digest": (
        lambda f: flip(f / DIGESTS, 40),
        f"{DIGESTS}: has changed since it was written; harvest again",
    ),
    "no manifest": (lambda f: (f / MANIFEST).unlink(), f"{MANIFEST}: not a readable shard"),
    "cut manifest": (lambda f: (f / MANIFEST).write_text("{"), f"{MANIFEST}: not a readable"),
    "no key": (lambda f: (f / MANIFEST).write_text("{}"), f"{MANIFEST}: not a readable"),
    "edited": (
        lambda f: edit_manifest(f, passes=2),
        f"{MANIFEST}: has changed since it was written",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_shard(fault: str, shards: Harvest) -> None:
    folders = shards(2, 1)
    damage, says = FAULTS[fault]
    damage(folders[1])
    with pytest.raises(SAEError, match=says) as error:
        cached(*folders)
    assert str(error.value).startswith(str(folders[1]))


@pytest.mark.parametrize("at", [0, 10_000, -1])
@pytest.mark.parametrize("part", ["train", "validation"])
def test_a_changed_byte(at: int, part: str, shards: Harvest) -> None:
    """Found when its window is read, and nothing of it is trained on."""
    folders = shards(2, 1)
    damaged = folders[1] / f"{HOOKS[0].spec}.{part}.bin"
    flip(damaged, at)
    source = cached(*folders)
    says = rf"{damaged}: window \d+ has changed since it was written; harvest again$"
    with pytest.raises(SAEError, match=says):
        list(source.train_batches(0) if part == "train" else source.validation_batches())
    assert list(cached(*folders, hook=HOOKS[1]).train_batches(0)), "a file that nobody touched"


def test_windows_that_change_places(shards: Harvest) -> None:
    """Each is as it was written, but not where."""
    [folder] = shards(1, 1)
    source = cached(folder)
    size = 4 * source.positions * source.d_in
    content = (folder / TRAIN).read_bytes()
    first, second = content[:size], content[size : 2 * size]
    assert first != second
    (folder / TRAIN).write_bytes(second + first + content[2 * size :])
    with pytest.raises(SAEError, match=f"{TRAIN}: window [01] has changed since it was written"):
        list(cached(folder).train_batches(0))


def test_a_file_that_is_cut_while_it_is_in_use(shards: Harvest) -> None:
    """After its windows have been checked: the rest of a buffer is of other windows."""
    [folder] = shards(1, 1)
    source = cached(folder)
    last = torch.tensor([source.n_train - 1])
    source.read("train", 0, last)
    content = (folder / TRAIN).read_bytes()
    (folder / TRAIN).write_bytes(content[:-4])
    with pytest.raises(SAEError, match=f"{TRAIN}: window {int(last)} has changed since"):
        source.read("train", 0, last)


def test_a_hook_that_was_not_harvested(whole: Path) -> None:
    with pytest.raises(SAEError, match=f"{whole}: has no activations of blocks.0.hook_mlp_out"):
        cached(whole, hook=Hook(0, "hook_mlp_out"))


def test_shards_of_two_harvests(shards: Harvest) -> None:
    first, second = shards(2, 1)[0], shards(2, 2)[1]
    with pytest.raises(SAEError, match=f"{second}: belongs to another harvest than {first}"):
        cached(first, second)


@pytest.mark.parametrize("given", [(0,), (1, 2), (0, 0, 1), (0, 0, 2), (0, 1, 1)])
def test_not_every_shard_once(given: tuple[int, ...], shards: Harvest) -> None:
    folders = shards(3, 1)
    with pytest.raises(SAEError, match="give every shard of the harvest"):
        cached(*(folders[i] for i in given))


def test_missing_shard_without_training_windows(
    language_model: LanguageModel, texts: list[str], tmp_path: Path
) -> None:
    """One forward batch to train on, and so a first shard of two with validation alone."""
    parts = (stream(language_model.tokenizer, part) for part in (texts[:1], texts[1:6]))
    few = TokenWindows(*parts, 24, 5)
    for shard in (0, 1):
        options = {"batch_size": few.n_train, "shard": shard, "n_shards": 2}
        manifest = harvest(language_model, few, HOOKS, tmp_path / str(shard), **options)
        assert 0 < manifest.windows["validation"] < few.n_validation
    with pytest.raises(SAEError, match="give every shard of the harvest"):
        cached(tmp_path / "1")
