"""The training loop: what is minimised, in what order, and what is recorded.

Per step, on a batch x of N activations, centred and scaled to `E||x||^2 = 1`:

    loss = recon_weight * ||x - x_hat||^2 + sparsity_penalty * ||f||_1 + aux_penalty * aux + own

with f the code, aux the auxiliary loss on dead features and own what the kind of SAE adds; Adam, a
short warm-up, and a linear decay to zero over the last fifth of the steps; decoder rows are kept
at unit norm.

The loop knows no progress bar, no W&B and no workflow: it tells an `Observer`.
"""

import math
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sae_core import losses
from sae_core.activations.store import ActivationSource
from sae_core.checkpoint import History
from sae_core.errors import SAEError
from sae_core.sae_base import Reconstruction, SparseAutoencoder
from sae_core.train_config import TrainingConfig

WARM_UP = 0.05
"""Share of the steps in which the learning rate rises to its peak."""

DECAY = 0.2
"""Share of the steps, the last ones, in which it falls to zero."""

MAX_GRADIENT_NORM = 1.0

MEASURED_BATCHES = 8
"""Batches that the mean, the scale and the median norm are measured on."""

OUTLIER_FACTOR = 10.0
"""Tokens with an activation norm this many times the median are left out of training: attention
sinks, whose few directions would take up the whole loss."""


class EpochRecord(NamedTuple):
    """One entry of the history."""

    epoch: int
    """Counted from 1."""
    n_epochs: int
    tokens: int
    """Tokens trained on so far."""
    metrics: dict[str, float]
    improved: bool
    """The validation loss is the best so far."""


class Observer:
    """What the loop tells the outside; every method may be left as it is."""

    def on_start(self, n_epochs: int, steps_per_epoch: int) -> None:
        """Training begins."""

    def on_step(self, epoch: int, step: int, loss: Tensor, l0: float) -> None:
        """Step `step` (from 1) of an epoch (from 1) is done."""

    def on_epoch(self, record: EpochRecord) -> None:
        """An epoch and its validation are done."""

    def on_checkpoint(self, folder: Path, best: bool) -> None:
        """An SAE directory was written."""

    def on_end(self, history: History, stopped_early: bool) -> None:
        """Training is over."""


class Normalisation(NamedTuple):
    """How raw activations enter the SAE: `(x - mean) / scale`, outliers left out."""

    mean: Tensor
    """(D,) float32, on the SAE's device."""
    scale: float
    max_norm: float

    @classmethod
    def measure(cls, x: Tensor) -> "Normalisation":
        """From a sample (N, D) of training activations."""
        norms = x.norm(dim=1)
        max_norm = OUTLIER_FACTOR * float(norms.median())
        x = x[norms <= max_norm]
        mean = x.mean(0)
        scale = float((x - mean).pow(2).sum(1).mean().sqrt())
        if not math.isfinite(scale) or scale == 0:
            raise SAEError(
                f"the activations at this hook have scale {scale}: they are all alike, or overflow "
                "the model's number format (try --model-dtype bfloat16 or float32)"
            )
        return cls(mean, scale, max_norm)

    def __call__(self, x: Tensor) -> Tensor:
        """(N, D) raw activations -> (at most N, D) float32."""
        x = x.to(self.mean.device, torch.float32)
        return (x[x.norm(dim=1) <= self.max_norm] - self.mean) / self.scale


class Terms(NamedTuple):
    """The loss and what it is made of, scalar tensors."""

    loss: Tensor
    recon_loss: Tensor
    l1_loss: Tensor
    recon_contribution: Tensor
    l1_contribution: Tensor
    aux_loss: Tensor
    kind_loss: Tensor


def learning_rate(step: int, n_steps: int, peak: float) -> float:
    """The learning rate of step `step` (from 0) of `n_steps`: a trapezium."""
    rise = (step + 1) / max(1.0, WARM_UP * n_steps)
    fall = (n_steps - step) / max(1.0, DECAY * n_steps)
    return peak * min(1.0, rise, fall)


class Trainer:
    """Trains one SAE on one source of activations.

    Args:
        sae: initialised, on the device to train on.
        source: batches of raw activations.
        row_block: tokens of SAE work at once; None chooses.
    """

    def __init__(
        self,
        sae: SparseAutoencoder,
        source: ActivationSource,
        config: TrainingConfig,
        observer: Observer,
        row_block: int | None = None,
    ) -> None:
        self.sae, self.source, self.config = sae, source, config
        self.observer, self.row_block = observer, row_block
        # As they lie in memory, which is as W_enc's transpose: fused Adam copies anything else.
        self._as_stored = [_as_stored(p.detach()) for p in sae.parameters()]
        self.optimizer = torch.optim.Adam(self._as_stored, lr=config.lr, fused=True)
        self.history: History = {}
        self.normalise: Normalisation
        self._last_batch: Tensor
        self.tokens = self.outliers = 0
        self.best_epoch: int | None = None
        self._best_loss, self._epochs_since_best = math.inf, 0

    def train(self) -> Iterator[EpochRecord]:
        """Train, and hand over a record after each epoch, when the SAE may be stored."""
        config, steps_per_epoch = self.config, self.source.steps_per_epoch
        self.observer.on_start(config.num_epochs, steps_per_epoch)
        for epoch in range(1, config.num_epochs + 1):
            means = _Means()
            for step, raw in enumerate(self._batches(epoch), start=1):
                x = self.normalise(raw)
                self.outliers += len(raw) - len(x)
                done = (epoch - 1) * steps_per_epoch + step - 1
                lr = learning_rate(done, config.num_epochs * steps_per_epoch, config.lr)
                if len(x) == 0:
                    continue
                terms, l0 = self.step(x, lr)
                self.tokens += len(x)
                means.add(terms, l0, len(x))
                self.observer.on_step(epoch, step, terms.loss, l0)
            record = self._record(epoch, means)
            self.observer.on_epoch(record)
            yield record
            if self._patience_is_out():
                break
        self.observer.on_end(self.history, stopped_early=epoch < config.num_epochs)

    def step(self, x: Tensor, lr: float) -> tuple[Terms, float]:
        """One optimizer step on a batch (N, D) of normalised activations: its terms, and L0."""
        sae = self.sae
        made = sae.reconstruct(x, self.row_block)
        terms = self._terms(x, made)
        terms.loss.backward()
        sae.add_dead_gradient()
        sae.project_decoder_gradient()
        for stored, parameter in zip(self._as_stored, sae.parameters(), strict=True):
            stored.grad = _as_stored(parameter.grad)
        _clip_gradients(self._as_stored)
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        sae.zero_grad()
        sae.normalise_decoder()
        sae.record_activity(made.fired)
        self._last_batch = x
        return Terms(*(term.detach() for term in terms)), made.l0

    def _batches(self, epoch: int) -> Iterator[Tensor]:
        batches = self.source.train_batches(epoch - 1)
        if epoch > 1:
            return batches
        sample = list(islice(batches, MEASURED_BATCHES))
        device = self.sae.b_dec.device
        self.normalise = Normalisation.measure(torch.cat(sample).to(device, torch.float32))
        return chain(sample, batches)

    def _terms(self, x: Tensor, made: Reconstruction) -> Terms:
        recon = losses.reconstruction_loss(x, made.x_hat)
        aux = self.sae.auxiliary_loss(x, made.x_hat)
        recon_part = self.config.recon_weight * recon
        l1_part = self.sae.spec.l1_coefficient * made.l1
        loss = recon_part + l1_part + self.sae.spec.aux_penalty * aux + made.kind_loss
        return Terms(loss, recon, made.l1, recon_part, l1_part, aux, made.kind_loss)

    def _record(self, epoch: int, means: "_Means") -> EpochRecord:
        metrics = means.values()
        if not math.isfinite(metrics["loss"]):
            raise SAEError(
                f"the loss is {metrics['loss']} after epoch {epoch} at {self.sae.spec.hook_spec}: "
                "lower --lr, or use --model-dtype float32"
            )
        dead = int(self.sae.dead_features.sum())
        metrics["dead_features"] = dead
        metrics["dead_feature_percentage"] = 100 * dead / self.sae.spec.d_sae
        metrics |= {f"val_{name}": value for name, value in self._validate().items()}
        val_loss = metrics.get("val_loss", math.nan)
        improved = val_loss < self._best_loss - self.config.early_stopping_min_delta
        if improved:
            self.best_epoch, self._best_loss, self._epochs_since_best = epoch, val_loss, 0
        else:
            self._epochs_since_best += 1
        for name, value in {"epoch": epoch, "tokens": self.tokens, **metrics}.items():
            self.history.setdefault(name, []).append(value)
        return EpochRecord(epoch, self.config.num_epochs, self.tokens, metrics, improved)

    def _patience_is_out(self) -> bool:
        patience = self.config.early_stopping_patience
        return 0 < patience <= self._epochs_since_best and self.source.n_validation > 0

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """Calibrate the inference threshold and measure the SAE as it is used afterwards."""
        if self.source.n_validation == 0:
            self.sae.calibrate([self._last_batch])
            return {}
        self.sae.calibrate(map(self.normalise, self.source.validation_batches()))
        means = _Means()
        for x in map(self.normalise, self.source.validation_batches()):
            if len(x) == 0:  # nothing but outliers
                continue
            made = self.sae.reconstruct_at_inference(x, self.row_block)
            means.add(self._terms(x, made), made.l0, len(x))
        return means.values()


def _as_stored(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or tensor.is_contiguous() else tensor.T


def _clip_gradients(tensors: list[Tensor]) -> None:
    norm = torch.nn.utils.get_total_norm([t.grad for t in tensors if t.grad is not None])
    if norm > MAX_GRADIENT_NORM:
        torch.nn.utils.clip_grads_with_norm_(tensors, MAX_GRADIENT_NORM, norm)


class _Means:
    """Means over tokens of the terms of many batches."""

    def __init__(self) -> None:
        self.tokens, self.l0 = 0, 0.0
        self.sums = torch.zeros(len(Terms._fields), dtype=torch.double)

    def add(self, terms: Terms, l0: float, n_tokens: int) -> None:
        self.tokens += n_tokens
        self.l0 += l0 * n_tokens
        self.sums += torch.stack(terms).cpu().double() * n_tokens

    def values(self) -> dict[str, float]:
        means = (self.sums / max(self.tokens, 1)).tolist()
        return dict(zip(Terms._fields, means, strict=True)) | {
            "sparsity": self.l0 / max(self.tokens, 1)
        }
