"""The tokens per step and the learning rate `auto`: the rules, and where they are recorded."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from several_saes import BATCH, activations, model, settings, wanted, windows
from tiny_model import WIDTH

from sae_core.activations.shards import harvest
from sae_core.activations.shared_stream import SharedSource, SharedStream
from sae_core.activations.store import ActivationSource, CachedSource, StreamingSource
from sae_core.models.language_model import Hook
from sae_core.sae_train import SAETrainer, train_sae
from sae_core.train_config import OptimizerName, TrainingConfig
from sae_core.trainer.events import Observer
from sae_core.trainer.schedule import SAESize, peak_learning_rate, resolved, step_size

AUTO = TrainingConfig(num_epochs=2, tokens_per_step="auto", lr="auto", early_stopping_patience=0)
MEASURED = 220 * 4096
"""Tokens of the training that the rules are for."""


# The rules


@pytest.mark.parametrize(
    ("n_tokens", "size"),
    [
        (1, 256),
        (MEASURED // 16, 256),
        (MEASURED, 256),
        (4 * MEASURED, 512),
        (16 * MEASURED, 1024),
        (256 * MEASURED, 4096),
        (10**12, 4096),
    ],
)
def test_a_step_grows_with_the_root_of_the_tokens_of_all_epochs(n_tokens: int, size: int) -> None:
    one = TrainingConfig(num_epochs=1, tokens_per_step="auto")
    assert step_size(one, n_tokens) == size
    assert step_size(AUTO, -(-n_tokens // 2)) == size


def test_more_tokens_never_have_smaller_steps() -> None:
    sizes = [step_size(AUTO, 2**n) for n in range(40)]
    assert sizes == sorted(sizes) and set(sizes) == {256, 512, 1024, 2048, 4096}


def rate(
    optimizer: OptimizerName,
    tokens_per_step: int,
    n_tokens: int,
    *,
    sae_type: str = "batch_topk",
    d_in: int = 576,
    d_sae: int = 4608,
    top_k: int = 32,
) -> float:
    """The rate `auto`, of the SAE to which the rules were fitted unless another is given."""
    sae = SAESize(sae_type, d_in, d_sae, top_k)
    return peak_learning_rate(optimizer, sae, tokens_per_step, n_tokens)


@pytest.mark.parametrize("optimizer", ["adam", "active_adam"])
@pytest.mark.parametrize("sae_type", ["batch_topk", "multi_batch_topk"])
def test_the_rate_never_grows_with_tokens_or_features_nor_falls_with_the_step(
    optimizer: OptimizerName, sae_type: str
) -> None:
    found = partial(rate, optimizer, sae_type=sae_type)
    by_tokens = [found(1024, 2**n) for n in range(40)]
    assert by_tokens == sorted(by_tokens, reverse=True) and by_tokens[30] < by_tokens[25]
    by_features = [found(1024, MEASURED, d_sae=768 * 2**n) for n in range(6)]
    assert by_features == sorted(by_features, reverse=True) and len(set(by_features)) == 6
    by_step = [found(2**n, 4 * MEASURED) for n in range(6, 13)]
    assert by_step == sorted(by_step) and len(set(by_step)) == 7


def test_the_rate_of_adam_in_closed_form() -> None:
    adam = partial(rate, "adam")
    assert adam(4096, MEASURED) == 4e-3
    assert adam(1024, MEASURED) == 2e-3
    assert adam(512, MEASURED) == pytest.approx(1.414e-3, rel=1e-3)
    assert adam(4096, MEASURED, d_sae=4 * 4608) == pytest.approx(2e-3)
    assert adam(4096, MEASURED, d_in=4 * 576) == pytest.approx(2e-3)
    assert adam(4096, MEASURED, d_in=256) == pytest.approx(6e-3)
    assert adam(4096, 1000 * MEASURED) == pytest.approx(4e-4)
    assert adam(256, MEASURED // 8) == pytest.approx(2e-3)
    assert adam(4096, 4096) == 4e-3  # never larger
    assert adam(4096, MEASURED, top_k=128) == 4e-3  # for any k
    assert adam(1024, MEASURED, sae_type="multi_batch_topk") == 2e-3


def test_the_rate_of_active_adam_in_closed_form() -> None:
    active = partial(rate, "active_adam")
    assert active(4096, MEASURED) == 6e-3
    assert active(512, MEASURED) == pytest.approx(3e-3)
    assert active(1024, 2 * MEASURED) == pytest.approx(3e-3)  # as many steps
    assert active(4096, 8 * MEASURED, d_sae=4 * 4608) == pytest.approx(1.5e-3)
    assert active(4096, MEASURED, top_k=128) == pytest.approx(3e-3)
    assert active(4096, MEASURED, top_k=8) == pytest.approx(12e-3)
    assert active(4096, MEASURED, d_in=4096) == 6e-3  # for any activation
    assert active(256, 256) == 6e-3  # never larger
    assert active(4096, MEASURED, sae_type="multi_batch_topk") == pytest.approx(4.5e-3)
    assert active(4096, MEASURED, sae_type="gated", top_k=0) == 6e-3


@pytest.mark.parametrize(
    ("optimizer", "sae_type", "lr"),
    [
        ("adam", "batch_topk", 4e-3),
        ("adam", "multi_batch_topk", 4e-3),
        ("active_adam", "batch_topk", 6e-3),
        ("active_adam", "multi_batch_topk", 4.5e-3),
    ],
)
def test_auto_knows_the_optimizer_and_the_kind(
    optimizer: OptimizerName, sae_type: str, lr: float
) -> None:
    auto = replace(AUTO, optimizer=optimizer)
    found = resolved(auto, SAESize(sae_type, 576, 4608, 32), 4096, 110)
    assert found == replace(auto, tokens_per_step=4096, lr=pytest.approx(lr))


def test_numbers_stay_as_they_are() -> None:
    given = TrainingConfig(tokens_per_step=100, lr=0.5)
    sae = SAESize("batch_topk", 576, 4608, 32)
    assert resolved(given, sae, 30, 7) is given and step_size(given, 10) == 100


# Where they are recorded


SAE = wanted(1, "batch_topk", training=AUTO)
HOOK = Hook(1, "hook_resid_post")
STEP = partial(step_size, AUTO)


def streamed(folder: Path) -> ActivationSource:
    return StreamingSource(model(), windows(), HOOK, batch_size=BATCH, tokens_per_step=STEP, seed=5)


def shared(folder: Path) -> ActivationSource:
    stream = SharedStream(model(), windows(), BATCH)
    return SharedSource(stream, HOOK, tokens_per_step=STEP, seed=5)


def stored(folder: Path) -> ActivationSource:
    harvest(model(), windows(), [HOOK], folder / "shard", batch_size=BATCH, passes=2)
    return CachedSource([folder / "shard"], HOOK, tokens_per_step=STEP, seed=5)


def test_stored_and_streamed_trainings_have_and_record_the_same(tmp_path: Path) -> None:
    made: list[dict[str, bytes]] = []
    for make in (streamed, shared, stored):
        folder = tmp_path / make.__name__
        trained = activations(SAE, make(folder), HOOK)
        train_sae(trained, settings(SAE, 60), folder / "sae", folder / "points", Observer())
        made.append({path.name: path.read_bytes() for path in (folder / "sae").iterdir()})
    assert made[0] == made[1] == made[2]
    n_tokens = 2 * 256  # an epoch has one whole step
    found = json.loads(made[0]["config.json"])["metadata"]["training"]
    assert found["tokens_per_step"] == 256
    wanted = rate("adam", 256, n_tokens, d_in=WIDTH, d_sae=2 * WIDTH, top_k=4)
    assert found["lr"] == wanted


def test_a_saved_state_is_of_the_numbers(tmp_path: Path) -> None:
    trainer = SAETrainer(
        activations(SAE, streamed(tmp_path), HOOK), settings(SAE, 60), tmp_path, Observer()
    )
    fingerprint = trainer.states.fingerprint
    assert fingerprint["activations"]["tokens_per_step"] == 256
    assert fingerprint["sae"]["metadata"]["training"]["lr"] == trainer.loop.lr
    assert trainer.loop.optimizer.param_groups[0]["lr"] == trainer.loop.lr
