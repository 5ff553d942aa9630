"""The training loop: what is minimised, in what order, and what is recorded.

Per step, on a batch x of N activations, centred and scaled to `E||x||^2 = 1`:

    loss = recon_weight * ||x - x_hat||^2 + sparsity_penalty * ||f||_1 + aux_penalty * aux + own

with f the code, aux the auxiliary loss on dead features and own what the kind of SAE adds; Adam, a
short warm-up, and a linear decay to zero over the last fifth of the steps; decoder rows are kept
at unit norm.

In the end-to-end phase, the last steps, a batch is whole windows, and the loss gains the terms of
`end_to_end.py`. The validation loss changes its meaning there: the best epoch is chosen anew among
those that end in the phase, and if patience runs out before it, training goes on with the phase.

The loop knows no progress bar, no W&B and no workflow: it tells an `Observer`.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sae_core import losses
from sae_core.activations.store import ActivationSource
from sae_core.checkpoint import History
from sae_core.end_to_end import CleanPass, EndToEnd
from sae_core.errors import SAEError
from sae_core.sae_base import Reconstruction, SparseAutoencoder
from sae_core.train_config import TrainingConfig

WARM_UP = 0.05
"""Share of the steps in which the learning rate rises to its peak."""

DECAY = 0.2
"""Share of the steps, the last ones, in which it falls to zero."""

MAX_GRADIENT_NORM = 1.0

AUTO_LR, AUTO_LR_WIDTH = 4e-3, 4608
"""The learning rate `auto`, and the number of features that it is for."""

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
        return self.scaled(x[x.norm(dim=1) <= self.max_norm])

    def scaled(self, x: Tensor) -> Tensor:
        """(N, D) float32 raw activations -> as they enter the SAE."""
        return (x - self.mean) / self.scale

    def raw(self, x_hat: Tensor) -> Tensor:
        """(N, D) what the SAE gives -> raw activations."""
        return x_hat * self.scale + self.mean


class Batch(NamedTuple):
    """The tokens of one step."""

    x: Tensor
    """(N, D) activations as they enter the SAE, outliers left out."""
    n_outliers: int = 0
    passes: Sequence[CleanPass] = ()
    """The windows whose tokens they are; only in the end-to-end phase."""


class Terms(NamedTuple):
    """The loss and what it is made of, scalar tensors."""

    loss: Tensor
    recon_loss: Tensor
    l1_loss: Tensor
    recon_contribution: Tensor
    l1_contribution: Tensor
    aux_loss: Tensor
    kind_loss: Tensor
    end_to_end: dict[str, Tensor]
    """What the phase adds, by its names in the history; without gradients."""

    def by_name(self) -> dict[str, Tensor]:
        """All of them, by the names in the history."""
        terms = self._asdict()
        return terms | terms.pop("end_to_end")

    def detached(self) -> "Terms":
        """For the record."""
        *terms, end_to_end = self
        return Terms(*(term.detach() for term in terms), end_to_end)


def peak_learning_rate(lr: float | str, d_sae: int) -> float:
    """`lr`, or the one for `d_sae` features when it is `auto`.

    It falls with the root of the width (Gao et al., arXiv 2406.04093, section A.3); the constant
    was measured on SmolLM2 with about a million tokens: docs/recipe.md.
    """
    return AUTO_LR * (AUTO_LR_WIDTH / d_sae) ** 0.5 if lr == "auto" else float(lr)


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
        end_to_end: the losses of the end-to-end phase; None trains without one.
    """

    def __init__(
        self,
        sae: SparseAutoencoder,
        source: ActivationSource,
        config: TrainingConfig,
        observer: Observer,
        row_block: int | None = None,
        end_to_end: EndToEnd | None = None,
    ) -> None:
        self.sae, self.source, self.config = sae, source, config
        self.observer, self.row_block, self.end_to_end = observer, row_block, end_to_end
        # As they lie in memory, which is as W_enc's transpose: fused Adam copies anything else.
        self._as_stored = [_as_stored(p.detach()) for p in sae.parameters()]
        self.lr = peak_learning_rate(config.lr, sae.spec.d_sae)
        self.optimizer = torch.optim.Adam(self._as_stored, lr=self.lr, fused=True)
        self.history: History = {}
        self.normalise: Normalisation
        self._last_batch: Tensor
        self.tokens = self.outliers = 0
        self.best_epoch: int | None = None
        self._best_loss, self._epochs_since_best = math.inf, 0
        self.n_steps = config.num_epochs * source.steps_per_epoch
        self.n_local_steps = self.n_steps - (end_to_end.n_steps(self.n_steps) if end_to_end else 0)
        self._in_phase = False

    def train(self) -> Iterator[EpochRecord]:
        """Train, and hand over a record after each epoch, when the SAE may be stored."""
        config, steps_per_epoch = self.config, self.source.steps_per_epoch
        step = epoch = 0
        self.observer.on_start(config.num_epochs, steps_per_epoch)
        while step < self.n_steps:
            epoch, means = step // steps_per_epoch + 1, _Means()
            for batch in self._batches(step):
                self.outliers += batch.n_outliers
                lr = learning_rate(step, self.n_steps, self.lr)
                step += 1
                if len(batch.x) == 0:
                    continue
                terms, l0 = self.step(batch, lr)
                self.tokens += len(batch.x)
                means.add(terms, l0, len(batch.x))
                self.observer.on_step(epoch, step - (epoch - 1) * steps_per_epoch, terms.loss, l0)
            record = self._record(epoch, means)
            self.observer.on_epoch(record)
            yield record
            if self._patience_is_out():
                step = self.n_local_steps if step <= self.n_local_steps else self.n_steps
        self.observer.on_end(self.history, stopped_early=epoch < config.num_epochs)

    def step(self, batch: Batch, lr: float) -> tuple[Terms, float]:
        """One optimizer step: its terms, and L0."""
        sae = self.sae
        made = sae.reconstruct(batch.x, self.row_block)
        terms = self._terms(batch, made)
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
        self._last_batch = batch.x
        return terms.detached(), made.l0

    # Batches

    def _batches(self, step: int) -> Iterator[Batch]:
        """The rest of the epoch that has step `step` (of all), which is its first or the phase's:
        shuffled activations, then, in the phase, whole windows."""
        source = self.source
        epoch, first = divmod(step, source.steps_per_epoch)
        n_local = min(max(self.n_local_steps - step, 0), source.steps_per_epoch - first)
        local = source.train_batches(epoch, n_local)
        yield from map(self._local_batch, self._measure(local) if step == 0 else local)
        for number in range(first + n_local, source.steps_per_epoch):
            assert self.end_to_end is not None
            indices = source.windows_of(epoch, number)
            tokens = self.end_to_end.windows.train(source.pass_of(epoch), indices)
            batch = self._window_batch(tokens)
            if not self._in_phase and len(batch.x):
                self._begin_phase(batch)
            yield batch

    def _measure(self, batches: Iterator[Tensor]) -> Iterator[Tensor]:
        """Measure on the first of `batches` how activations enter the SAE; gives all of them."""
        sample = list(islice(batches, MEASURED_BATCHES))
        measured = sample or list(self.source.train_batches(0, MEASURED_BATCHES))
        device = self.sae.b_dec.device
        self.normalise = Normalisation.measure(torch.cat(measured).to(device, torch.float32))
        return chain(sample, batches)

    def _local_batch(self, raw: Tensor) -> Batch:
        x = self.normalise(raw)
        return Batch(x, len(raw) - len(x))

    def _window_batch(self, tokens: Tensor) -> Batch:
        assert self.end_to_end is not None
        passes = self.end_to_end.clean(tokens, self.normalise.max_norm)
        x = self.normalise.scaled(torch.cat([part.x[part.kept].float() for part in passes]))
        return Batch(x, sum(part.n_outliers for part in passes), passes)

    def _validation_batches(self) -> Iterator[Batch]:
        if not self._in_phase:
            return map(self._local_batch, self.source.validation_batches())
        assert self.end_to_end is not None
        windows = map(self.end_to_end.windows.validation, self.source.validation_windows())
        return map(self._window_batch, windows)

    # Losses and figures

    def _begin_phase(self, batch: Batch) -> None:
        """Forget the best epoch, and balance the end-to-end terms on the phase's first batch."""
        assert self.end_to_end is not None
        self._in_phase = True
        self._best_loss, self._epochs_since_best = math.inf, 0
        if self.n_local_steps > 0:
            with torch.no_grad():
                x_hat = self.sae.reconstruct(batch.x, self.row_block).x_hat
            pull = 2 * (x_hat - batch.x).norm() / (len(batch.x) * self.normalise.scale)
            self.end_to_end.balance(batch.passes, self.normalise.raw(x_hat), float(pull))

    def _terms(self, batch: Batch, made: Reconstruction) -> Terms:
        recon = losses.reconstruction_loss(batch.x, made.x_hat)
        aux = self.sae.auxiliary_loss(batch.x, made.x_hat)
        recon_part = self.config.recon_weight * recon
        l1_part = self.sae.spec.l1_coefficient * made.l1
        loss = recon_part + l1_part + self.sae.spec.aux_penalty * aux + made.kind_loss
        figures: dict[str, Tensor] = {}
        if self.end_to_end is not None and batch.passes:
            added, figures = self.end_to_end.loss(batch.passes, self.normalise.raw(made.x_hat))
            loss = loss + added
        return Terms(loss, recon, made.l1, recon_part, l1_part, aux, made.kind_loss, figures)

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
        self._note({"epoch": epoch, "tokens": self.tokens, **metrics})
        return EpochRecord(epoch, self.config.num_epochs, self.tokens, metrics, improved)

    def _note(self, entry: dict[str, float]) -> None:
        """Add an epoch to the history; what it does not have, or no earlier one had, is None."""
        n_before = len(self.history.get("epoch", []))
        for name in [*self.history, *entry]:
            column = self.history.setdefault(name, [None] * n_before)
            if len(column) == n_before:
                column.append(entry.get(name))

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
        for batch in self._validation_batches():
            x = batch.x
            if len(x) == 0:  # nothing but outliers
                continue
            made = self.sae.reconstruct_at_inference(x, self.row_block)
            means.add(self._terms(batch, made), made.l0, len(x))
        return means.values()


def _as_stored(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or tensor.is_contiguous() else tensor.T


def _clip_gradients(tensors: list[Tensor]) -> None:
    norm = torch.nn.utils.get_total_norm([t.grad for t in tensors if t.grad is not None])
    if norm > MAX_GRADIENT_NORM:
        torch.nn.utils.clip_grads_with_norm_(tensors, MAX_GRADIENT_NORM, norm)


class _Means:
    """Means over tokens of the terms of many batches; of each, over the batches that have it."""

    def __init__(self) -> None:
        self.tokens: Counter[str] = Counter()
        self.sums: Counter[str] = Counter()

    def add(self, terms: Terms, l0: float, n_tokens: int) -> None:
        named = terms.by_name()
        values = torch.stack(list(named.values())).cpu().double() * n_tokens
        self.sums.update(dict(zip(named, values.tolist(), strict=True)))
        self.sums["sparsity"] += l0 * n_tokens
        self.tokens.update(dict.fromkeys([*named, "sparsity"], n_tokens))

    def values(self) -> dict[str, float]:
        return {name: total / self.tokens[name] for name, total in self.sums.items()}
