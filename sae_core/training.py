"""The training loop: what is minimised, in what order, and what is recorded.

Per step, on a batch x of N activations, centred and scaled to `E||x||^2 = 1`:

    loss = recon_weight * ||x - x_hat||^2 + sparsity_penalty * ||f||_1 + aux_penalty * aux + own

with f the code, aux the auxiliary loss on dead features and own what the kind of SAE adds; Adam, a
short warm-up, and a linear decay to zero over the last fifth of the steps; the decoder at twice the
learning rate of the rest, its rows kept at unit norm. For a transcoder, the x that `x_hat` is
compared with is its target, centred and scaled like x.

The validation loss is that of the SAE as it is used, and leaves out the auxiliary loss, which would
make it rise when the first features count as dead. The epoch where it is least is exported.

In the end-to-end phase, the last steps, a batch is whole windows, and the loss gains the terms of
`end_to_end.py`. The validation loss changes its meaning there: the best epoch is chosen anew among
those that end in the phase, and if patience runs out before it, training goes on with the phase.

Several processes can share the work of a step (`parallel.py`): each gets the gradients for its own
tokens, and everything else, from the batches to the history, is the same in all of them.

The loop knows no progress bar, no W&B and no workflow: it tells an `Observer`.
"""

import math
from collections.abc import Callable, Iterator
from itertools import chain, islice

import torch
from torch import Tensor

from sae_core import losses
from sae_core.activations.store import ActivationSource
from sae_core.batches import Batch, Terms
from sae_core.checkpoint import History
from sae_core.end_to_end import EndToEnd
from sae_core.errors import SAEError
from sae_core.events import EpochRecord, Observer
from sae_core.memory import Result, WorkingUnit
from sae_core.normalisation import Normalisation
from sae_core.parallel import ALONE, Everyone
from sae_core.sae_base import Reconstruction, SparseAutoencoder
from sae_core.schedule import learning_rate, peak_learning_rate
from sae_core.train_config import RuntimeConfig, TrainingConfig
from sae_core.training_state import Means, TrainingState, learned, put_back

MAX_GRADIENT_NORM = 1.0

DECODER_PACE = 2.0
"""The decoder's learning rate, as a multiple of the others'. What makes features die is the
encoder's, which cannot be as large: docs/recipe.md."""

ADVICE = "use fewer --tokens-per-step, a smaller --sae-expansion or another --device"
"""When there is no memory for a step."""

AUXILIARY_STRIDE = 4
"""The auxiliary loss looks at one in so many tokens: dead features learn from what all lack."""

MEASURED_BATCHES = 8
"""Batches that the mean, the scale and the median norm are measured on."""

PROGRESS = (
    "n_done",
    "epoch",
    "tokens",
    "outliers",
    "skipped",
    "skipped_in_a_row",
    "history",
    "best_epoch",
    "best_loss",
    "epochs_since_best",
    "in_phase",
)
"""Of the loop's attributes, those that a state holds as they are."""


class NotFinite(Exception):
    """A batch's loss or gradient is infinite or NaN."""


class Trainer:
    """Trains one SAE on one source of activations.

    Args:
        sae: initialised, on the device to train on.
        source: batches of raw activations.
        row_block: tokens of SAE work at once; None chooses.
        end_to_end: the losses of the end-to-end phase; None trains without one.
        max_skipped: batches in a row that may be skipped because they are not finite.
        everyone: the processes that share the training.
    """

    def __init__(
        self,
        sae: SparseAutoencoder,
        source: ActivationSource,
        config: TrainingConfig,
        observer: Observer,
        row_block: int | None = None,
        end_to_end: EndToEnd | None = None,
        max_skipped: int = RuntimeConfig.max_skipped,
        everyone: Everyone = ALONE,
    ) -> None:
        self.sae, self.source, self.config = sae, source, config
        self.max_skipped, self.everyone = max_skipped, everyone
        sae.everyone = everyone
        self.observer, self.row_block, self.end_to_end = observer, row_block, end_to_end
        self.rows = WorkingUnit(
            row_block or source.tokens_per_step, "rows of the encoder product", ADVICE
        )
        # As they lie in memory, which is as W_enc's transpose: fused Adam copies anything else.
        self._as_stored = [_as_stored(p.detach()) for p in sae.parameters()]
        self.lr = peak_learning_rate(config.lr, sae.spec.d_sae)
        paces = [DECODER_PACE if p is sae.W_dec else 1.0 for p in sae.parameters()]
        groups = [
            {"params": [stored], "pace": pace}
            for stored, pace in zip(self._as_stored, paces, strict=True)
        ]
        self.optimizer = torch.optim.Adam(groups, lr=self.lr, fused=True)
        self.normalise: Normalisation | None = None
        self.last_batch: Tensor | None = None
        self.n_done = self.epoch = self.tokens = self.outliers = 0
        self.skipped = self.skipped_in_a_row = 0
        self.history: History = {}
        self.best_epoch: int | None = None
        self.best_loss, self.epochs_since_best = math.inf, 0
        self.in_phase = False
        self.means: Means | None = None
        self.n_steps = config.num_epochs * source.steps_per_epoch
        self.n_local_steps = self.n_steps - (end_to_end.n_steps(self.n_steps) if end_to_end else 0)
        self.at_rest = False

    def train(self) -> Iterator[EpochRecord]:
        """Train, and hand over a record after each epoch, when the SAE may be stored."""
        lengths = self.config.num_epochs, self.source.steps_per_epoch
        if self.n_done == 0:
            self.observer.on_start(*lengths)
        else:
            self.observer.on_resume(*lengths, self.n_done)
        while self.means is not None or self.n_done < self.n_steps:
            if self.means is None:
                self.epoch, self.means = self.n_done // self.source.steps_per_epoch + 1, Means()
            for batch in self._waiting_for(self._batches()):
                self._train_on(batch, self.means)
            record = self._record()
            self.observer.on_epoch(record)
            yield record
        self.observer.on_end(self.history, stopped_early=self.epoch < self.config.num_epochs)

    def _waiting_for(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches. While one is made, the training is at rest: an exception may end it,
        and `state` is what the last step left."""
        while True:
            self.at_rest = True
            batch = next(batches, None)
            self.at_rest = False
            if batch is None:
                return
            yield batch

    def _train_on(self, batch: Batch, means: Means) -> None:
        lr = learning_rate(self.n_done, self.n_steps, self.lr)
        number = self.n_done - (self.epoch - 1) * self.source.steps_per_epoch + 1
        self.n_done += 1
        if not batch.finite:
            self._skip(number, "activations")
            return
        self.outliers += batch.n_outliers
        if len(batch.x) == 0:
            return
        if batch.passes and not self.in_phase:
            self._begin_phase(batch)
        try:
            terms, l0 = self.step(batch, lr)
        except NotFinite:
            self._skip(number, "loss")
            return
        self.skipped_in_a_row = 0
        self.tokens += len(batch.x)
        means.add(terms.by_name(), l0, len(batch.x))
        self.observer.on_step(self.epoch, number, terms.loss, l0)

    def _skip(self, number: int, what: str) -> None:
        self.skipped += 1
        self.skipped_in_a_row += 1
        self.observer.on_skip(self.epoch, number, what)
        if self.skipped_in_a_row > self.max_skipped:
            raise self._not_finite(what, self.skipped_in_a_row)

    def _not_finite(self, what: str, n_batches: int) -> SAEError:
        spec = self.sae.spec
        dtype = spec.metadata.get("model_dtype", "its number format")
        advice = "use --model-dtype bfloat16 or float32, or another layer"
        if what == "loss":
            advice = "lower --lr, or use --model-dtype float32"
        return SAEError(
            f"{spec.hook_spec}: {what} not finite in {n_batches} batches in a row, with the "
            f"language model in {dtype}; {advice}; the checkpoints are those of before"
        )

    def state(self) -> TrainingState:
        """All that the next step depends on, of a training at rest. The tensors are its own."""
        values = {name: getattr(self, name) for name in PROGRESS}
        if self.normalise is None:  # nothing is done but what the settings say
            return TrainingState({}, values)
        sites = self.normalise.sites
        means = torch.stack([site.mean for site in sites])
        tensors = learned(self.sae, self.optimizer) | {"mean": means}
        if self.last_batch is not None and self.source.n_validation == 0:
            tensors["last_batch"] = self.last_batch
        values |= {
            "normalise": [[site.scale, site.max_norm] for site in sites],
            "bounds": self.sae.bounds(),
            "means": self.means and [self.means.tokens, self.means.sums],
            "end_to_end": self.end_to_end and self.end_to_end.weights,
        }
        return TrainingState(tensors, values)

    def restore(self, state: TrainingState) -> None:
        """Go on from a state of a training with the same settings."""
        tensors, values = state
        for name in PROGRESS:
            setattr(self, name, values[name])
        if "normalise" not in values:
            return
        put_back(self.sae, self.optimizer, tensors)
        device = self.sae.b_dec.device
        sites = zip(tensors["mean"].to(device), values["normalise"], strict=True)
        self.normalise = Normalisation.of_sites(Normalisation(mean, *rest) for mean, rest in sites)
        if "last_batch" in tensors:
            self.last_batch = tensors["last_batch"].to(device)
        self.sae.set_bounds(values["bounds"])
        self.means = Means(*values["means"]) if values["means"] else None
        if self.end_to_end is not None:
            self.end_to_end.weights = values["end_to_end"]

    def step(self, batch: Batch, lr: float) -> tuple[Terms, float]:
        """One optimizer step: its terms, and L0.

        Raises:
            NotFinite: loss or gradient is; nothing has changed.
        """
        sae = self.sae
        terms, made = self._attempt(lambda rows: self._gradients(batch, rows))
        for group in self.optimizer.param_groups:
            group["lr"] = group["pace"] * lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        sae.zero_grad()
        sae.normalise_decoder()
        sae.record_activity(made.fired)
        self.last_batch = batch.x
        return terms.detached(), made.l0

    def _gradients(self, batch: Batch, rows: int) -> tuple[Terms, Reconstruction]:
        """Leave the gradients for the optimizer; gives what holds for the whole batch."""
        sae, part = self.sae, batch.part()
        with sae.undone_on_failure():
            made = sae.reconstruct(part.x, self._row_block(rows), part.target)
            terms = self._terms(part, made)
            (len(part.x) / len(batch.x) * terms.loss).backward()
            sae.add_dead_gradient()
            for stored, parameter in zip(self._as_stored, sae.parameters(), strict=True):
                stored.grad = _as_stored(parameter.grad)
            self.everyone.add_up([t.grad for t in self._as_stored if t.grad is not None])
            sae.project_decoder_gradient()
            norm = _clip_gradients(self._as_stored)
            terms, made = self._of_everyone(terms, made, len(part.x) / len(batch.x))
            if not math.isfinite(float(terms.loss.detach()) + norm):
                raise NotFinite
        return terms, made

    def _of_everyone(
        self, terms: Terms, made: Reconstruction, share: float
    ) -> tuple[Terms, Reconstruction]:
        """What is known of this process's share of the tokens -> of the whole batch."""
        if self.everyone.is_alone:
            return terms, made
        terms = terms.mapped(lambda term: self.everyone.sum(share * term.detach()))
        l0 = float(self.everyone.sum(torch.tensor(share * made.l0)))
        fired = self.everyone.sum(made.fired.int()) > 0
        return terms, made._replace(l0=l0, fired=fired)

    def _attempt(self, work: Callable[[int], Result]) -> Result:
        """`work`, with fewer rows at once if memory runs out; several processes cannot do that, as
        the others would wait for what the first attempt asked them."""
        return self.rows.attempt(work) if self.everyone.is_alone else work(self.rows.size)

    def _row_block(self, rows: int) -> int | None:
        """`rows`, once memory has run out; until then what was asked for."""
        return self.row_block if rows >= self.source.tokens_per_step else rows

    # Batches

    def _batches(self) -> Iterator[Batch]:
        """The rest of the epoch, from the step after `n_done` on: shuffled activations, then, in
        the phase, whole windows."""
        source, epoch = self.source, self.epoch - 1
        start, length = epoch * source.steps_per_epoch, source.steps_per_epoch
        first, n_local = self.n_done - start, min(max(self.n_local_steps - start, 0), length)
        local = source.train_batches(epoch, n_local, skip=first)
        if self.normalise is None:
            local = self._measure(local)
        yield from map(self._local_batch, local)
        for number in range(max(first, n_local), length):
            assert self.end_to_end is not None
            indices = source.windows_of(epoch, number)
            tokens = self.end_to_end.windows.train(source.pass_of(epoch), indices)
            yield self._window_batch(tokens)

    def _measure(self, batches: Iterator[Tensor]) -> Iterator[Tensor]:
        """Measure on the first of `batches` how activations enter the SAE; gives all of them."""
        sample = list(islice(batches, MEASURED_BATCHES))
        measured = sample or list(self.source.train_batches(0, MEASURED_BATCHES))
        finite = [raw for raw in measured if raw.isfinite().all()]
        if measured and not finite:
            raise self._not_finite("activations", len(measured))
        device = self.sae.b_dec.device
        rows = torch.cat(finite).to(device, torch.float32)
        parts = rows.split(self.sae.spec.d_in, dim=1)
        self.normalise = Normalisation.of_sites(map(Normalisation.measure, parts))
        return chain(sample, batches)

    def _local_batch(self, raw: Tensor) -> Batch:
        x, target = self.normalise.pair(raw)
        n_outliers = len(raw) - len(x)  # what is not finite is among them
        finite = n_outliers == 0 or bool(raw.isfinite().all())
        own = self.everyone.own(len(x)) if len(x) else slice(0)
        return Batch(x, n_outliers, finite=finite, target=target, own=own)

    def _window_batch(self, tokens: Tensor) -> Batch:
        assert self.end_to_end is not None
        normalise, everyone = self.normalise, self.everyone
        passes = self.end_to_end.clean(
            tokens[everyone.own(len(tokens))], normalise.max_norm, normalise.output.max_norm
        )
        parts = everyone.gather(torch.cat([part.x[part.kept].float() for part in passes]))
        first, n = (sum(map(len, parts[:r])) for r in (everyone.rank, everyone.rank + 1))
        target = None
        if normalise.target:
            raw = torch.cat([part.target[part.kept].float() for part in passes])
            target = normalise.target.scaled(torch.cat(everyone.gather(raw)))
        seen = [at[:, 1:] for part in passes for at in (part.x, part.target)]
        n_infinite = everyone.count(sum(not bool(at.isfinite().all()) for at in seen))
        return Batch(
            normalise.scaled(torch.cat(parts)),
            everyone.count(sum(part.n_outliers for part in passes)),
            passes,
            finite=n_infinite == 0,
            target=target,
            own=slice(first, n),
        )

    def _validation_batches(self) -> Iterator[Batch]:
        if not self.in_phase:
            return map(self._local_batch, self.source.validation_batches())
        assert self.end_to_end is not None
        windows = map(self.end_to_end.windows.validation, self.source.validation_windows())
        return map(self._window_batch, windows)

    # Losses and figures

    def _begin_phase(self, batch: Batch) -> None:
        """Forget the best epoch, and balance the end-to-end terms on the phase's first batch."""
        assert self.end_to_end is not None
        self.in_phase = True
        self.best_loss, self.epochs_since_best = math.inf, 0
        if self.n_local_steps > 0:
            part = batch.part()
            x_hat = self._attempt(lambda rows: self._reconstructed(part.x, rows))
            length = self.everyone.sum((x_hat - part.wanted).pow(2).sum()).sqrt()
            pull = 2 * length / (len(batch.x) * self.normalise.output.scale)
            self.end_to_end.balance(batch.passes, self.normalise.raw(x_hat), float(pull))

    @torch.no_grad()
    def _reconstructed(self, x: Tensor, rows: int) -> Tensor:
        return self.sae.reconstruct(x, self._row_block(rows)).x_hat

    def _terms(self, batch: Batch, made: Reconstruction) -> Terms:
        """Of a process's own tokens."""
        recon = losses.reconstruction_loss(batch.wanted, made.x_hat)
        some = slice(-(batch.own.start or 0) % AUXILIARY_STRIDE, None, AUXILIARY_STRIDE)
        aux = self.sae.auxiliary_loss(batch.x[some], made.x_hat[some], batch.wanted[some])
        recon_part = self.config.recon_weight * recon
        l1_part = self.sae.spec.l1_coefficient * made.l1
        loss = recon_part + l1_part + self.sae.spec.aux_penalty * aux + made.kind_loss
        figures: dict[str, Tensor] = {}
        if self.end_to_end is not None and batch.passes:
            added, figures = self.end_to_end.loss(batch.passes, self.normalise.raw(made.x_hat))
            loss = loss + added
        return Terms(loss, recon, made.l1, recon_part, l1_part, aux, made.kind_loss, figures)

    def _record(self) -> EpochRecord:
        """Validate, and close the epoch."""
        epoch, metrics = self.epoch, self.means.values()
        if not metrics:
            raise self._not_finite("loss", self.skipped_in_a_row)
        metrics["skipped_batches"] = self.skipped - sum(self.history.get("skipped_batches", []))
        dead = int(self.sae.dead_features.sum())
        metrics["dead_features"] = dead
        metrics["dead_feature_percentage"] = 100 * dead / self.sae.spec.d_sae
        metrics |= {f"val_{name}": value for name, value in self._validate().items()}
        val_loss = metrics.get("val_loss", math.nan)
        improved = val_loss < self.best_loss - self.config.early_stopping_min_delta
        if improved:
            self.best_epoch, self.best_loss, self.epochs_since_best = epoch, val_loss, 0
        else:
            self.epochs_since_best += 1
        self._note({"epoch": epoch, "tokens": self.tokens, **metrics})
        self.means = None
        if self._patience_is_out():
            in_phase = self.n_done > self.n_local_steps
            self.n_done = self.n_steps if in_phase else self.n_local_steps
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
        return 0 < patience <= self.epochs_since_best and self.source.n_validation > 0

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """Calibrate the inference threshold and measure the SAE as it is used afterwards; at rest,
        as an exception leaves no trace."""
        with self.sae.undone_on_failure():
            self.at_rest = True
            found = self._calibrated_loss()
            self.at_rest = False
        return found

    def _calibrated_loss(self) -> dict[str, float]:
        if self.source.n_validation == 0:
            self.sae.calibrate([self.last_batch])
            return {}
        pairs = map(self.normalise.pair, self.source.calibration_batches())
        self.sae.calibrate(x for x, _ in pairs)
        means, skipped = Means(), 0
        for batch in self._validation_batches():
            if not batch.finite:
                skipped += 1
                continue
            if len(batch.x) == 0:
                continue
            terms, l0 = self._attempt(lambda rows, batch=batch: self._measured(batch, rows))
            by_name = terms.by_name()
            if torch.stack(list(by_name.values())).isfinite().all():
                means.add(by_name, l0, len(batch.x))
            else:
                skipped += 1
        found = means.values()
        if found:
            found["loss"] -= self.sae.spec.aux_penalty * found["aux_loss"]
        return found | {"skipped_batches": skipped}

    def _measured(self, batch: Batch, rows: int) -> tuple[Terms, float]:
        part = batch.part()
        with self.sae.undone_on_failure():
            block = self._row_block(rows)
            made = self.sae.reconstruct_at_inference(part.x, block, part.target)
            share = len(part.x) / len(batch.x)
            terms, made = self._of_everyone(self._terms(part, made), made, share)
            return terms, made.l0


def _as_stored(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or tensor.is_contiguous() else tensor.T


def _clip_gradients(tensors: list[Tensor]) -> float:
    """Bounds the gradients' norm, and says what it was."""
    norm = torch.nn.utils.get_total_norm([t.grad for t in tensors if t.grad is not None])
    if norm > MAX_GRADIENT_NORM:
        torch.nn.utils.clip_grads_with_norm_(tensors, MAX_GRADIENT_NORM, norm)
    return float(norm)
