"""Tokens that are left out of training: what trains, what validates, and what is measured."""

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import several_saes
import torch
from by_definition import in_memory
from direct_evaluation import direct
from several_saes import BATCH, LENGTH, TOKENS_PER_STEP, train_alone, train_several, wanted
from synthetic import PROVENANCE, random_sae
from tiny_model import VOCABULARY, WIDTH
from torch import Tensor

from sae_core.activations import store
from sae_core.activations.shards import harvest
from sae_core.activations.shared_stream import SharedSource, SharedStream
from sae_core.activations.store import ActivationSource, CachedSource, StreamingSource
from sae_core.activations.token_windows import TokenWindows, read_windows
from sae_core.distributed.process_group import SINGLE_PROCESS
from sae_core.evaluation.features import Corpus, tally_features
from sae_core.evaluation.metrics import evaluate
from sae_core.models.language_model import Hook, LanguageModel
from sae_core.sae_train import train_from_model
from sae_core.settings.steps import FeaturesConfig
from sae_core.train_config import DataConfig, EndToEndConfig, ModelConfig, RunConfig
from sae_core.trainer.batches import Batches
from sae_core.trainer.training_inputs import (
    Activations,
    Settings,
    end_to_end_phase,
    resolved_spec,
)
from sae_core.training import Observer
from sae_core.utils import cli
from sae_core.utils.errors import SAEError

EXCLUDED = (3, 5, 8)
FEW = 12
"""Different tokens in the windows, so that a quarter is excluded."""

HOOK = Hook(1, "hook_resid_post")


def random_windows(excluded: tuple[int, ...] = EXCLUDED, bos: int | None = None) -> TokenWindows:
    draw = torch.Generator().manual_seed(3)
    train, held_out = (torch.randint(FEW, (n,), generator=draw) for n in (40 * 11, 140))
    return TokenWindows(train, held_out, LENGTH, 5, bos, excluded)


class Numbered(ActivationSource):
    """The activation at position p, from 1 on, of window w is the number 100 w + p."""

    def __init__(self, windows: TokenWindows, tokens_per_step: int) -> None:
        shape = windows.n_train, windows.n_validation, windows.positions
        super().__init__(*shape, tokens_per_step, 5, windows)

    def read(self, part: str, epoch: int, indices: Tensor) -> Tensor:
        return (100 * indices[:, None] + 1 + torch.arange(self.positions))[..., None]


def numbers_kept(tokens: Tensor) -> list[int]:
    """What a `Numbered` gives of all windows of a part, (W, L), in their order."""
    return [
        100 * number + at
        for number, window in enumerate(tokens.tolist())
        for at, token in enumerate(window)
        if at > 0 and token not in EXCLUDED
    ]


def numbers(batches: Iterator[Tensor]) -> list[int]:
    return torch.cat([torch.empty(0, 1), *batches]).flatten().int().tolist()


@pytest.fixture(params=[1, 5 * (LENGTH - 1), 10**6])
def in_chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a window, of some, and of all."""
    monkeypatch.setattr(store, "SHUFFLE_TOKENS", request.param)


# Batches


@pytest.mark.usefixtures("in_chunks")
@pytest.mark.parametrize("epoch", [0, 1])
def test_an_epoch_has_the_rows_whose_tokens_are_kept(epoch: int) -> None:
    """With BOS and windows that fill the ring, every pass has as many, and each is in a batch."""
    windows = random_windows(bos=FEW)
    kept = numbers_kept(windows.train(epoch, torch.arange(windows.n_train)))
    source = Numbered(windows, 1)
    assert 0 < len(kept) == source.n_rows < windows.n_train * windows.positions
    found = numbers(source.train_batches(epoch))
    assert sorted(found) == kept != found
    batches = list(Numbered(windows, 26).train_batches(epoch))
    assert [len(batch) for batch in batches] == [26] * (len(kept) // 26)
    assert numbers(iter(batches)) == found[: len(batches) * 26]


@pytest.mark.parametrize("epoch", range(4))
def test_no_pass_has_fewer_rows_than_an_epoch_needs(epoch: int) -> None:
    """Without BOS an excluded token may be at position 0, so that the passes have unequal ones."""
    windows = random_windows()
    source = Numbered(windows, 26)
    kept = numbers_kept(windows.train(epoch, torch.arange(windows.n_train)))
    assert source.steps_per_epoch == source.n_rows // 26 <= len(kept) // 26
    batches = list(source.train_batches(epoch))
    assert [len(batch) for batch in batches] == [26] * source.steps_per_epoch
    found = numbers(iter(batches))
    assert len(set(found)) == len(found) and set(found) <= set(kept)


@pytest.mark.usefixtures("in_chunks")
@pytest.mark.parametrize("n_steps", [None, 7])
def test_an_epoch_goes_on_at_any_step(n_steps: int | None) -> None:
    source = Numbered(random_windows(), 26)
    whole = list(source.train_batches(1, n_steps))
    for skip in range(len(whole) + 1):
        rest = list(Numbered(random_windows(), 26).train_batches(1, n_steps, skip))
        assert len(rest) == len(whole) - skip
        assert all(map(torch.equal, rest, whole[skip:]))


@pytest.mark.usefixtures("in_chunks")
@pytest.mark.parametrize("tokens_per_step", [5, 26])
def test_whole_windows_follow_those_that_batches_read(tokens_per_step: int) -> None:
    """A phase of whole windows: the steps before it read no window of it, and none is left out."""
    source, read = Numbered(random_windows(), tokens_per_step), []
    numbered = source.read
    source.read = lambda *given: read.append(given[2]) or numbered(*given)  # type: ignore
    tokens_per_step = max(tokens_per_step, source.positions)  # a step takes a window at least
    n_steps = source.steps_per_epoch * source.tokens_per_step // tokens_per_step
    phase = [source.windows_of(1, step) for step in range(n_steps)]
    assert min(map(len, phase)) > 0
    order = source._order(1).tolist()
    assert torch.cat(phase).tolist() == order[: sum(map(len, phase))]
    if tokens_per_step == source.tokens_per_step:
        list(source.train_batches(1, 6))
        assert torch.cat([*read, *phase[6:]]).tolist() == order[: sum(map(len, phase))]


def test_validation_has_the_rows_whose_tokens_are_kept() -> None:
    windows = random_windows()
    source = Numbered(windows, 26)
    assert numbers(source.validation_batches()) == numbers_kept(windows.validation())
    assert numbers(source.calibration_batches()) == numbers_kept(windows.validation())


def test_too_many_excluded_tokens_are_an_error() -> None:
    with pytest.raises(SAEError, match="--excluded-tokens: 440 tokens"):
        Numbered(random_windows(tuple(range(FEW))), 26)


@pytest.mark.parametrize("target", [None, Hook(2, "hook_mlp_out")])
def test_stored_streamed_and_shared_batches_are_the_same(
    target: Hook | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From shards of a harvest that knew of no exclusion."""
    several_saes.small_chunks(monkeypatch.setattr)
    model, windows = several_saes.model(), random_windows()
    hook = target._replace(hook_name="mlp.hook_in") if target else HOOK
    hooks = [hook, target] if target else [hook]
    harvest(model, random_windows(()), hooks, tmp_path, batch_size=BATCH)
    options: dict[str, Any] = {"tokens_per_step": TOKENS_PER_STEP, "seed": 5, "target": target}
    sources = [
        CachedSource([tmp_path], hook, windows=windows, **options),
        StreamingSource(model, windows, hook, batch_size=BATCH, **options),
        SharedSource(SharedStream(model, windows, BATCH), hook, **options),
    ]
    all_rows = CachedSource([tmp_path], hook, **options)
    assert len({source.steps_per_epoch for source in sources}) == 1
    for name, given in (
        ("train_batches", (0,)),
        ("train_batches", (0, 6, 2)),
        ("validation_batches", ()),
        ("calibration_batches", ()),
    ):
        found = [list(getattr(source, name)(*given)) for source in sources]
        for others in found[1:]:
            assert len(others) == len(found[0]) > 0
            assert all(map(torch.equal, others, found[0]))
    assert len(list(sources[0].train_batches(0))) < len(list(all_rows.train_batches(0)))


# Training


@pytest.fixture
def excluding(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `several_saes` trains on has excluded tokens."""
    several_saes.small_chunks(monkeypatch.setattr)
    tokens = several_saes.windows()
    common = torch.bincount(tokens.train(0, torch.arange(tokens.n_train)).flatten()).argsort()
    excluded = tuple(common[-60:].tolist())
    windows = TokenWindows(tokens._train, tokens._held_out, LENGTH, 5, excluded=excluded)
    monkeypatch.setattr(several_saes, "windows", lambda: windows)


@pytest.mark.usefixtures("excluding")
def test_together_they_are_those_that_each_is_alone(tmp_path: Path) -> None:
    """In the end-to-end phase, too."""
    saes = (wanted(1, end_to_end=EndToEndConfig(end_to_end_fraction=0.3)), wanted(2))
    train_several(tmp_path / "together", saes)
    for sae in saes:
        train_alone(tmp_path / "alone", sae)
        weights, history = (
            [(tmp_path / way / sae.name / name).read_bytes() for way in ("alone", "together")]
            for name in ("weights.pt", "history.json")
        )
        assert weights[0] == weights[1] and history[0] == history[1]


def test_a_batch_of_the_phase_has_the_kept_tokens_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    several_saes.small_chunks(monkeypatch.setattr)
    model, windows = several_saes.model(), random_windows()
    options: dict[str, Any] = {"batch_size": BATCH, "tokens_per_step": TOKENS_PER_STEP, "seed": 5}
    source = StreamingSource(model, windows, HOOK, **options)
    settings = Settings(end_to_end=EndToEndConfig(end_to_end_fraction=0.5))
    made = Activations(source, HOOK, WIDTH, PROVENANCE, None, model, windows)
    phase = end_to_end_phase(made, settings, SINGLE_PROCESS)
    spec = resolved_spec(made, settings, torch.device("cpu"))
    batches = Batches(spec, torch.device("cpu"), source, 1, phase, SINGLE_PROCESS)
    [*_, last] = batches.train(0, 0)
    tokens = windows.train(0, source.windows_of(0, source.steps_per_epoch - 1))
    kept = sum(token not in EXCLUDED for window in tokens.tolist() for token in window[1:])
    assert last.passes and len(last.x) + last.n_outliers == kept


# The command line, and what is stored


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, texts: list[str]) -> list[str]:
    folder = tmp_path_factory.mktemp("run")
    (folder / "texts.json").write_text(json.dumps(texts[:12]))
    return (
        f"--model-name {tiny_model} --data-path {folder}/texts.json --model-dtype float32 "
        "--device cpu --num-epochs 1 --max-text-length 32 --tokens-per-step 256 --sae-expansion 2 "
        f"--topk 4 --no-use-end-to-end --output-root {folder} --checkpoint-root {folder}/points"
    ).split()


def test_a_token_that_the_tokenizer_lacks_is_named_before_the_model_is_loaded(
    base: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LanguageModel, "load", lambda *_: pytest.fail("it was loaded"))
    config = cli.parse(RunConfig, "", [*base, "--excluded-tokens", "<bos>", "<|im_start|>"])
    with pytest.raises(SAEError, match=r"--excluded-tokens <\|im_start\|>: .* <\|endoftext\|>, <b"):
        train_from_model(config, Observer())


def test_an_activation_of_an_excluded_token_changes_nothing(
    base: list[str], language_model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the first hook a token's activation is its embedding, whatever stands before it."""
    end = language_model.tokenizer.eos_token_id
    load = LanguageModel.load.__func__  # type: ignore[attr-defined]

    def loud(*given: Any) -> LanguageModel:
        model = load(LanguageModel, *given)
        with torch.no_grad():
            model.model.get_input_embeddings().weight[end] *= factor
        return model

    monkeypatch.setattr(LanguageModel, "load", loud)
    words = ["--hook-layer", "0", "--hook-name", "hook_resid_pre"]
    made: dict[tuple[float, bool], tuple[bytes, bytes]] = {}
    for factor in (1.0, -2.0):
        for option in ([], ["--excluded-tokens", "<|endoftext|>"]):
            folder = train_from_model(
                cli.parse(RunConfig, "", [*base, *words, *option]), Observer()
            )
            names = ("weights.pt", "history.json")
            weights, history = ((folder / name).read_bytes() for name in names)
            made[factor, bool(option)] = weights, history
            stored = json.loads((folder / "config.json").read_text())["metadata"]
            assert stored.get("excluded_tokens") == (option[1:] or None)
    assert made[1.0, True] == made[-2.0, True]
    assert made[1.0, False][0] != made[-2.0, False][0]
    assert made[1.0, False][0] != made[1.0, True][0]


# What is measured

FIGURES = (
    *("fvu", "fvu_with_outliers", "mse", "l0", "dead_fraction", "block_mse_mean", "n_tokens"),
    *("ce_clean", "ce_mean_ablation", "ce_sae", "kl", "ce_sae_all_spliced", "ce_sae_sinks_kept"),
    *("n_left_alone", "n_left_alone_sinks_kept", "n_outlier_tokens"),
)


def an_sae(excluded: list[str], **metadata: Any) -> Any:
    where = {"hook_layer": HOOK.layer, "hook_name": HOOK.hook_name, "hook_spec": HOOK.spec}
    metadata |= {"excluded_tokens": excluded} if excluded else {}
    sizes = {"d_in": WIDTH, "d_sae": 2 * WIDTH}
    return random_sae("batch_topk", torch.float32, metadata=metadata, **sizes, **where)


def test_the_evaluation_leaves_them_alone(tiny_model: Path, windows: TokenWindows) -> None:
    """The figures are those of a direct computation. The excluded tokens are most of all, and so
    quiet that the others would be outliers if they counted."""
    config = ModelConfig(model_name=str(tiny_model), model_dtype="float32")
    model = LanguageModel.load(config, torch.device("cpu"))
    tokens = windows.evaluation()[:6]
    common = torch.bincount(tokens[:, 1:].flatten(), minlength=VOCABULARY).argsort()[-40:].tolist()
    words = model.tokenizer.convert_ids_to_tokens(common)
    excluded = torch.isin(tokens, torch.tensor(common))
    assert 0.5 < excluded.float().mean() < 0.9
    with torch.no_grad():
        model.model.get_input_embeddings().weight[common] *= 0.01
    found = evaluate(model, an_sae(words), tokens, batch_size=4)
    expected = direct(model.model, an_sae(words), tokens, HOOK, excluded)
    for name in FIGURES:
        assert found[name] == pytest.approx(expected[name], rel=1e-4), name
    excluded[:, 0] = True
    assert found["n_left_alone"] == int(excluded.sum()) > len(tokens)
    assert found["n_left_alone_all_spliced"] == 0
    plain = evaluate(model, an_sae([]), tokens, batch_size=4)
    assert found["n_outlier_tokens"] == 0 < plain["n_outlier_tokens"]
    assert found["ce_sae"] != plain["ce_sae"] and found["fvu"] != plain["fvu"]
    assert found["ce_sae_all_spliced"] == plain["ce_sae_all_spliced"]


def test_features_do_not_count_them(language_model: LanguageModel, texts: list[str]) -> None:
    sae = an_sae(["<|endoftext|>"], max_text_length=LENGTH)
    corpus = Corpus.read(in_memory(language_model.tokenizer, texts[:6]), sae.spec, 10**6)
    *_, tally = tally_features(language_model, sae, corpus, FeaturesConfig(), BATCH)
    tokens = corpus.windows.tokens[:, 1:]
    ends = int((tokens == language_model.tokenizer.eos_token_id).sum())
    assert tally.n_tokens + tally.n_outliers == tokens.numel() - ends < tokens.numel()


def test_windows_are_those_of_an_sae_without(
    language_model: LanguageModel, texts: list[str]
) -> None:
    sides = [
        read_windows(language_model.tokenizer, texts[:12], DataConfig(32, excluded_tokens=excluded))
        for excluded in ((), ("<|endoftext|>",))
    ]
    for read in (TokenWindows.validation, TokenWindows.evaluation):
        assert torch.equal(*map(read, sides))
    assert [*chain(*(side.excluded for side in sides))] == [language_model.tokenizer.eos_token_id]
