"""The step of fixed sizes against the ordinary one: the same training, event by event."""

import json
from itertools import islice
from typing import Any

import pytest
import torch
from short_training import D, Recorder, make_sae
from synthetic import BATCH_KINDS, KINDS, SparseDirections, SparseMap, spec

from sae_core.distributed.process_group import ProcessGroup
from sae_core.pretrained import Origin
from sae_core.sae.kinds import build
from sae_core.sae.normalisation import Normalisation
from sae_core.sae.precision import Precision
from sae_core.sae.reconstruction import Compute
from sae_core.sae_base import SparseAutoencoder
from sae_core.train_config import OptimizerName, TrainingConfig
from sae_core.trainer import ahead, static_step
from sae_core.trainer.ahead import Stepping, Waiting, picked
from sae_core.trainer.training_state import TrainingState
from sae_core.training import Trainer
from sae_core.utils.errors import SAEError

EXACT = Precision(torch.bfloat16, torch.float32)
ROUNDED = Precision(torch.bfloat16, torch.bfloat16)


def trainer(
    stepping: Stepping,
    precision: Precision = EXACT,
    source: SparseDirections | None = None,
    log_freq: int = 3,
    n_dead: int = 0,
    max_skipped: int = 10,
    recon_weight: float = 1.0,
    origin: Origin | None = None,
    optimizer: OptimizerName = "adam",
    **changes: Any,
) -> tuple[Trainer, Recorder]:
    """A training of three epochs of eight steps, and a record of what it tells."""
    recorder = Recorder()
    sae = make_sae(n_dead=n_dead, aux_penalty=0.5, **changes)
    settings = TrainingConfig(
        num_epochs=3,
        early_stopping_patience=0,
        lr=0.01,
        lr_decay=0.2 if optimizer == "adam" else 0.9,
        optimizer=optimizer,
        recon_weight=recon_weight,
    )
    compute, source = Compute(precision=precision), source or SparseDirections()
    made = Trainer(
        sae, source, settings, recorder, compute, None, max_skipped, log_freq, stepping, origin
    )
    return made, recorder


def run(training: Trainer) -> SparseAutoencoder:
    for _ in training.train():
        pass
    return training.sae


def assert_alike(found: Trainer, right: Trainer, rel: float = 1e-4) -> None:
    assert found.progress.outliers == right.progress.outliers
    assert found.progress.tokens == right.progress.tokens
    assert set(found.history) == set(right.history)
    for name, column in right.history.items():
        assert found.history[name] == pytest.approx(column, rel=rel, abs=1e-5), name
    for name, tensor in right.sae.state_dict().items():
        other = found.sae.state_dict()[name]
        torch.testing.assert_close(other, tensor, rtol=1e-3, atol=rel, msg=name)


def test_a_training_that_begins_with_an_sae_takes_its_weights_over() -> None:
    first = run(trainer("ordinary")[0])
    normalise = Normalisation(torch.full((D,), 2.0), 3.0, float("inf"))
    origin = Origin(first.folded(normalise.mean, normalise.scale, torch.float32), "first", {})
    found, right = (trainer(how, origin=origin)[0] for how in ("static", "ordinary"))
    run(found)
    run(right)
    assert_alike(found, right)
    from_random = trainer("ordinary")[0]
    run(from_random)
    assert found.history["loss"][0] != pytest.approx(from_random.history["loss"][0], rel=0.01)


def kinds_of(recorder: Recorder) -> list[tuple[Any, ...]]:
    """What was told, without the losses."""
    return [tuple(x for x in event if not isinstance(x, float)) for event in recorder.events]


def redone(training: Trainer) -> list[int]:
    """The numbers of the steps that are taken by the ordinary code, as they come."""
    assert training.ahead is not None
    numbers, redo = [], training.ahead.redo

    def noted(batch: Waiting) -> None:
        numbers.append(batch.number)
        redo(batch)

    training.ahead.redo = noted
    return numbers


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "a penalty": {"l1_coefficient": 0.05},
    "dead features": {"n_dead": 30},
    "nested": {"n_dead": 30, "kind": "matryoshka_batch_topk"},
    "several k": {"n_dead": 30, "kind": "multi_batch_topk", "l1_coefficient": 0.05},
    "topk": {"n_dead": 30, "kind": "topk"},
    "active_adam": {"n_dead": 30, "optimizer": "active_adam"},
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_a_training_is_that_of_ordinary_steps(changes: dict[str, Any]) -> None:
    (static, told), (ordinary, expected) = (trainer(s, **changes) for s in ("static", "ordinary"))
    numbers = redone(static)
    run(static), run(ordinary)
    assert kinds_of(told) == kinds_of(expected) and not numbers
    assert_alike(static, ordinary)


def broken(n_outliers: int = 16, window: int = 5) -> SparseDirections:
    """Activations with outliers and, in one batch of an epoch, NaN."""
    source = SparseDirections()
    source.activations[: 4 * n_outliers : 4, 3] *= 1000
    source.activations[window, 7, 2] = torch.nan
    return source


@pytest.mark.parametrize("kind", ahead.KINDS)
def test_bfloat16_values_change_it_by_roundings(kind: str) -> None:
    """Of a TopK SAE with dead features and outliers, too."""
    given = {"kind": kind, "source": broken(), "n_dead": 9}
    (static, told), (ordinary, expected) = (
        trainer(s, ROUNDED, **given)  # type: ignore[arg-type]
        for s in ("static", "ordinary")
    )
    numbers = redone(static)
    run(static), run(ordinary)
    assert len(numbers) == 3 and kinds_of(told) == kinds_of(expected)
    assert static.progress.outliers == ordinary.progress.outliers
    assert static.progress.bound.value == 0 or kind != "topk"
    for name in ("loss", "val_loss"):
        assert static.history[name] == pytest.approx(ordinary.history[name], rel=0.02)


def test_a_transcoder() -> None:
    source = SparseMap()
    (static, _), (ordinary, _) = (
        trainer(s, source=source, target_hook_name="hook_mlp_out") for s in ("static", "ordinary")
    )
    run(static), run(ordinary)
    assert_alike(static, ordinary)


def test_outliers_are_masked_and_what_is_not_finite_is_told_in_order() -> None:
    (static, told), (ordinary, expected) = (
        trainer(s, source=broken()) for s in ("static", "ordinary")
    )
    numbers = redone(static)
    run(static), run(ordinary)
    assert len(numbers) == 3 and static.progress.skipped == 3  # one in an epoch
    assert kinds_of(told) == kinds_of(expected)
    assert_alike(static, ordinary)


def test_a_loss_that_is_not_finite_ends_both() -> None:
    recorded = []
    for stepping in ("static", "ordinary"):
        training, recorder = trainer(stepping, max_skipped=2, recon_weight=3e38)
        with pytest.raises(SAEError, match="loss not finite in 3 batches in a row"):
            run(training)
        recorded.append(recorder.events)
    assert recorded[0] == recorded[1] and len(recorded[0]) == 4


def test_where_a_pair_may_be_missed_the_ordinary_code_takes_the_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without candidates to spare none of the steps is sure."""
    monkeypatch.setattr(static_step, "CANDIDATES", 1)
    (static, told), (ordinary, expected) = (trainer(s, n_dead=9) for s in ("static", "ordinary"))
    numbers = redone(static)
    run(static), run(ordinary)
    assert len(numbers) == 24
    assert told.events == expected.events and static.history == ordinary.history


def assert_same(found: Trainer, right: Trainer) -> None:
    assert found.history == right.history and found.progress == right.progress
    for name, tensor in right.state().tensors.items():
        assert torch.equal(found.state().tensors[name], tensor), name


@pytest.mark.parametrize("window", [5, 25])
def test_when_the_host_looks_changes_no_byte(window: int) -> None:
    """Wherever in an epoch the batch with NaN is, and so however many come after it."""
    made = [
        trainer("static", source=broken(window=window), log_freq=n, n_dead=30) for n in (1, 3, 100)
    ]
    for training, _ in made:
        run(training)
    for training, recorder in made[1:]:
        assert_same(training, made[0][0])
        assert recorder.events == made[0][1].events


@pytest.mark.parametrize("before", ["static", "ordinary"])
@pytest.mark.parametrize("after", ["static", "ordinary"])
@pytest.mark.parametrize("optimizer", ["adam", "active_adam"])
def test_a_state_goes_on_in_either_code(
    before: Stepping, after: Stepping, optimizer: OptimizerName
) -> None:
    whole, first, second = (
        trainer(s, n_dead=30, optimizer=optimizer)[0] for s in (before, before, after)
    )
    run(whole)
    first.begin()
    for batch in islice(first.rest_of_epoch(), 5):
        first.train_on(batch)
    tensors, values = first.state()
    copied = {name: tensor.clone() for name, tensor in tensors.items()}
    assert ("adam.2.exp_avg_sq" in copied) == (optimizer == "adam")  # the decoder's
    second.restore(TrainingState(copied, json.loads(json.dumps(values))))
    run(second)
    if before == after:
        assert_same(second, whole)
    else:
        assert_alike(second, whole)


@pytest.mark.parametrize("precision", [EXACT, ROUNDED], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_is_for_kinds_with_a_static_step(
    kind: str, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae, given = build(spec(kind)), Compute(precision=precision)
    is_static = kind in ("topk", *BATCH_KINDS)
    assert picked("auto", sae, given) == "ordinary"  # without a GPU
    monkeypatch.setattr(ahead, "has_kernels", lambda device: True)
    assert picked("auto", sae, given) == ("graph" if is_static else "ordinary")
    shared = Compute(precision=precision, group=ProcessGroup(0, 2))
    assert picked("auto", sae, shared) == ("static" if is_static else "ordinary")
    product = Precision(torch.float32, torch.float32)
    for other in (Compute(), Compute(precision=product), given._replace(row_block=64)):
        assert picked("auto", sae, other) == "ordinary"
