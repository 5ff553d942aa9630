"""Numbers that are not finite: which batches are skipped, and when that stops a training."""

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from short_training import Recorder, make_sae, train
from synthetic import SparseDirections
from torch import Tensor

from sae_core.sae.kinds.batch_topk import BatchTopKSAE
from sae_core.sae.reconstruction import PLAIN, AuxiliaryLoss, Compute
from sae_core.sae.sparse_ops import LowerBound
from sae_core.train_config import TrainingConfig
from sae_core.training import Observer, Trainer
from sae_core.utils.errors import SAEError


class Spoilt(SparseDirections):
    """One activation in each of some training batches, numbered through all epochs, is a number
    that goes wrong."""

    def __init__(self, value: float, batches: set[int]) -> None:
        super().__init__()
        self.value, self.batches = value, batches

    def train_batches(self, epoch: int, *args: int, **options: int) -> Iterator[Tensor]:
        first = epoch * self.steps_per_epoch + options.get("skip", 0)
        for number, x in enumerate(super().train_batches(epoch, *args, **options), first):
            if number in self.batches:
                x = x.clone()
                x[5, 3] = self.value
            yield x


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_batch_with_an_activation_that_is_not_finite_is_skipped(value: float) -> None:
    recorder = Recorder()
    trainer = train(source=Spoilt(value, {0, 9, 10}), observer=recorder, num_epochs=2)
    assert trainer.history["skipped_batches"] == [1, 2]
    assert [e[1:] for e in recorder.events if e[0] == "skip"] == [
        (1, 1, "activations"),
        (2, 2, "activations"),
        (2, 3, "activations"),
    ]
    assert trainer.progress.tokens == 13 * 256 and trainer.progress.outliers == 0
    assert all(math.isfinite(loss) for loss in trainer.history["loss"])
    moments = trainer.optimizer.state_dict()["state"]
    assert {int(m["step"]) for m in moments.values()} == {13}
    assert all(torch.isfinite(t).all() for m in moments.values() for t in m.values())


class SpoiltValidation(SparseDirections):
    """One activation of the second of two validation batches is a number that goes wrong."""

    def __init__(self, value: float) -> None:
        super().__init__(n_validation=16)
        self.activations[-1, -1, 0] = value


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_validation_batch_that_is_not_finite_is_left_out(value: float) -> None:
    trainer = train(source=SpoiltValidation(value), num_epochs=2)
    assert trainer.history["val_skipped_batches"] == [1, 1]
    assert trainer.history["skipped_batches"] == [0, 0]
    assert all(math.isfinite(loss) for loss in trainer.history["val_loss"])
    assert trainer.progress.stopping.best_epoch is not None


class Exploding(BatchTopKSAE):
    """Its loss is not finite at some steps."""

    at: frozenset[int] = frozenset()
    calls = 0

    def auxiliary_loss(
        self,
        x: Tensor,
        x_hat: Tensor,
        target: Tensor | None = None,
        compute: Compute = PLAIN,
    ) -> AuxiliaryLoss:
        found = super().auxiliary_loss(x, x_hat, target, compute)
        if torch.is_grad_enabled():
            self.calls += 1
            if self.calls in self.at:
                return found._replace(loss=found.loss + x_hat.sum() * math.inf)
        return found


class Snapshots(Observer):
    """The tensors and bounds of a training after a step, and after the one that was skipped."""

    trainer: Trainer

    def on_step(self, epoch: int, step: int, loss: Tensor, l0: float) -> None:
        self.last = self._taken()

    def on_skip(self, epoch: int, step: int, what: str) -> None:
        self.before, self.after, self.skipped = self.last, self._taken(), (epoch, step, what)

    def _taken(self) -> tuple[dict[str, Tensor], list[LowerBound]]:
        tensors = {name: tensor.clone() for name, tensor in self.trainer.state().tensors.items()}
        progress = self.trainer.progress
        return tensors, [replace(progress.bound), replace(progress.aux_bound)]


def test_a_step_whose_loss_is_not_finite_changes_nothing() -> None:
    sae, snapshots = make_sae(cls=Exploding, n_dead=30), Snapshots()
    sae.at = frozenset({6})
    trainer = Trainer(sae, SparseDirections(), TrainingConfig(num_epochs=1), snapshots)
    snapshots.trainer = trainer
    next(trainer.train())
    assert snapshots.skipped == (1, 6, "loss")
    assert snapshots.before[1] == snapshots.after[1]
    assert all(bound.value > 0 for bound in snapshots.before[1])
    for name, tensor in snapshots.before[0].items():
        assert torch.equal(tensor, snapshots.after[0][name]), name
    assert trainer.history["skipped_batches"] == [1] and trainer.progress.skipped_in_a_row == 0


@pytest.mark.parametrize("max_skipped", [0, 3])
def test_too_many_skipped_batches_in_a_row_stop_the_training(max_skipped: int) -> None:
    source = Spoilt(math.inf, {*range(2, 5), *range(10, 16)})
    sae = make_sae()
    sae.spec.metadata["model_dtype"] = "float16"
    trainer = Trainer(sae, source, TrainingConfig(), Observer(), max_skipped=max_skipped)
    with pytest.raises(SAEError) as error:
        list(trainer.train())
    message = str(error.value)
    assert f"blocks.1.hook_resid_post: activations not finite in {max_skipped + 1} batches" in (
        message
    )
    assert "in float16; use --model-dtype bfloat16 or float32" in message
    assert trainer.progress.tokens == (2 if max_skipped == 0 else 7) * 256


def test_activations_that_are_never_finite() -> None:
    with pytest.raises(SAEError, match="activations not finite in 8 batches in a row"):
        train(source=Spoilt(math.nan, set(range(100))))


def test_a_learning_rate_that_ruins_the_weights() -> None:
    with pytest.raises(SAEError, match="_post: loss not finite in 11 batches .* lower --lr"):
        train(lr=1e38)
