"""Where batches come from: shards against the model itself, the shuffle, damaged shards."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from by_definition import stream
from synthetic import SparseDirections
from torch import Tensor

from sae_core.activations import loader, store
from sae_core.activations.shards import Manifest, harvest
from sae_core.activations.store import ActivationSource, CachedSource, StreamingSource
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


class Numbered(ActivationSource):
    """The activation at position p of window w is the number 100 w + p."""

    def read(self, part: str, epoch: int, indices: Tensor) -> Tensor:
        return (100 * indices[:, None] + torch.arange(self.positions))[..., None]


def numbered(tokens_per_step: int = 64, seed: int = 0, n_train: int = 50) -> Numbered:
    return Numbered(n_train, 7, 23, tokens_per_step, seed)


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


# Order


@pytest.mark.parametrize("shuffle_tokens", [1, 200, 10**6])
@pytest.mark.parametrize("tokens_per_step", [1, 23, 64, 10**6])
def test_an_epoch_sees_each_activation_at_most_once(
    tokens_per_step: int, shuffle_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "SHUFFLE_TOKENS", shuffle_tokens)
    source = numbered(tokens_per_step)
    batches = list(source.train_batches(0))
    size = min(tokens_per_step, 50 * 23)  # no larger than an epoch
    assert [batch.shape for batch in batches] == [(size, 1)] * source.steps_per_epoch
    assert len(batches) == 50 * 23 // size
    seen = torch.cat(batches).flatten()
    assert len(seen.unique()) == len(seen) and (seen % 100 < 23).all() and (seen < 5000).all()


def test_order_depends_on_seed_and_epoch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both the windows that are shuffled together and the order within change."""
    monkeypatch.setattr(store, "SHUFFLE_TOKENS", 10 * 23)
    orders = {
        (seed, epoch): torch.cat(list(numbered(10 * 23, seed).train_batches(epoch))).flatten()
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    windows = {frozenset((order[:230] // 100).tolist()) for order in orders.values()}
    within = {tuple((part % 100).tolist()) for o in orders.values() for part in o.split(230)}
    assert (len(windows), len(within)) == (4, 4 * 5)
    again = torch.cat(list(numbered(10 * 23, seed=1).train_batches(1))).flatten()
    assert torch.equal(again, orders[1, 1])


@pytest.mark.parametrize(("shuffle_tokens", "least"), [(10**6, 30), (10 * 23, 9)])
def test_shuffling_mixes_windows(
    shuffle_tokens: int, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 activations of 50 windows, or of the 10 that are shuffled together."""
    monkeypatch.setattr(store, "SHUFFLE_TOKENS", shuffle_tokens)
    source = numbered()
    assert source.shuffle_windows == min(50, shuffle_tokens // 23)
    for batch in source.train_batches(0):
        assert len((batch // 100).unique()) >= least


def test_validation_batches_are_every_window_in_order() -> None:
    source = numbered()
    batches = list(source.validation_batches())
    expected = source.read("validation", 0, torch.arange(7)).flatten(0, 1)
    assert torch.equal(torch.cat(batches), expected)
    assert all(len(batch) <= 64 for batch in batches)
    assert list(Numbered(50, 0, 23, 64, 0).validation_batches()) == []


@pytest.mark.parametrize("shuffle_tokens", [1, 10 * 23, 10**6])
@pytest.mark.parametrize("n_steps", [0, 1, 7, 17, 18])
def test_first_batches_of_an_epoch_read_the_windows_they_need(
    n_steps: int, shuffle_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "SHUFFLE_TOKENS", shuffle_tokens)
    source, read = numbered(), []
    numbers = source.read
    source.read = lambda *given: read.append(given[2]) or numbers(*given)  # type: ignore
    batches = list(source.train_batches(0, n_steps))
    assert source.steps_per_epoch == 17
    assert [batch.shape for batch in batches] == [(64, 1)] * min(n_steps, 17)
    if n_steps < 17:
        needed = -(-n_steps * 64 // 23)
        assert torch.equal(torch.cat([torch.empty(0), *read]), source._order(0)[:needed])


@pytest.mark.parametrize("tokens_per_step", [23, 40, 64, 115, 10**6])
def test_whole_windows_follow_those_that_batches_read(tokens_per_step: int) -> None:
    """Steps share no window, and between them take what their batches would."""
    source = numbered(tokens_per_step)
    steps = [source.windows_of(1, step) for step in range(source.steps_per_epoch)]
    taken = torch.cat(steps)
    assert torch.equal(taken, source._order(1)[: len(taken)])
    for n_steps, before in enumerate(steps):
        first = source._order(1).tolist().index(int(before[0]))
        assert first == -(-n_steps * source.tokens_per_step // 23)
    sizes = {len(step) for step in steps}
    assert max(sizes) - min(sizes) <= 1


def test_a_step_shorter_than_a_window_takes_a_whole_one() -> None:
    source = numbered(tokens_per_step=5)
    steps = [source.windows_of(0, step) for step in range(source.steps_per_epoch)]
    assert [len(step) for step in steps] == [1] * (50 * 23 // 5)
    order = source._order(0).tolist()
    assert [int(step) for step in steps] == [order[i % 50] for i in range(len(steps))]


def test_the_order_of_an_epoch_is_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For millions of windows it takes as long as a small step."""
    randperm, drawn = torch.randperm, []
    monkeypatch.setattr(torch, "randperm", lambda *a, **k: drawn.append(a) or randperm(*a, **k))
    source = numbered()
    for epoch in (0, 1):
        for step in range(source.steps_per_epoch):
            source.windows_of(epoch, step)
    assert drawn == [(50,), (50,)]


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


def test_what_fails_while_reading_ahead_is_raised() -> None:
    def items() -> Iterator[int]:
        yield from (1, 2)
        raise SAEError("the third")

    ahead = loader.one_ahead(items())
    assert (next(ahead), next(ahead)) == (1, 2)
    with pytest.raises(SAEError, match="the third"):
        next(ahead)
    assert list(loader.one_ahead(iter(range(5)))) == list(range(5))


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


def test_calibration_reads_windows_from_the_whole_of_the_held_out_texts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = SparseDirections(n_validation=30, tokens_per_step=64)
    everything = torch.cat(list(source.validation_batches()))
    assert torch.equal(torch.cat(list(source.calibration_batches())), everything)
    monkeypatch.setattr(store, "CALIBRATION_TOKENS", 8 * source.positions)
    some = torch.cat(list(source.calibration_batches())).view(-1, source.positions, 16)
    assert torch.equal(some, everything.view(30, source.positions, 16)[::4])
