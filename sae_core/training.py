"""The training loop: what is minimised, in what order, and what is recorded.

Per step, on a batch x of N activations, centred and scaled to `E||x||^2 = 1`:

    loss = recon_weight * ||x - x_hat||^2 + sparsity_penalty * ||f||_1 + aux_penalty * aux + own

with f the code, aux the auxiliary loss on dead features and own what the kind of SAE adds; Adam, a
short warm-up, and a linear decay to zero over the last fifth of the steps; the decoder at twice the
learning rate of the rest, its rows kept at unit norm (`trainer/optimizer.py` has this, and another
optimizer). For a transcoder, the x that `x_hat` is compared with is its target, centred and scaled
like x.

The validation loss is that of the SAE as it is used, and leaves out the auxiliary loss, which would
make it rise when the first features count as dead. The epoch where it is least is exported.

In the end-to-end phase, the last steps, a batch is whole windows, and the loss gains the terms of
`trainer/end_to_end.py`. The validation loss changes its meaning, so the best epoch is chosen among
those that end in the phase. If patience runs out earlier, training goes on with the phase.

Several processes can share a step (`distributed/process_group.py`): each gets the gradients for its
own tokens, and everything else, from the batches to the history, is the same in all of them.

On an NVIDIA GPU a step of most kinds with a top-k has fixed sizes, and is a CUDA graph if one
process takes it (`trainer/static_step.py`); the host reads its figures at log points
(`trainer/ahead.py`). The ordinary code takes the end-to-end phase, and what the graph does not.

The loop knows no progress bar, no W&B and no workflow: it tells an `Observer`. Signals, saved
states and checkpoints are for whoever runs it: `sae_train.py`.
"""

import math
from collections.abc import Generator, Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from sae_core.activations.store import ActivationSource
from sae_core.distributed.process_group import ProcessGroup
from sae_core.formats.checkpoint import History
from sae_core.pretrained import Origin
from sae_core.sae.losses import Terms
from sae_core.sae.normalisation import Normalisation
from sae_core.sae.reconstruction import PLAIN, AuxiliaryLoss, Compute, Reconstruction
from sae_core.sae.static.backend import backend_for
from sae_core.sae.static.facts import Figures
from sae_core.sae.static.moments import RULES
from sae_core.sae_base import SparseAutoencoder
from sae_core.train_config import RuntimeConfig, TrainingConfig
from sae_core.trainer.ahead import Ahead, Stepping, Waiting, picked
from sae_core.trainer.batches import Batch, Batches, not_finite
from sae_core.trainer.early_stopping import EarlyStopping
from sae_core.trainer.end_to_end import EndToEnd
from sae_core.trainer.events import EpochRecord, Observer
from sae_core.trainer.objective import Objective
from sae_core.trainer.optimizer import adam, clip_gradients, hand_over_gradients, set_learning_rate
from sae_core.trainer.origin import begin_with
from sae_core.trainer.schedule import SAESize, learning_rate, resolved, travel
from sae_core.trainer.static_step import StaticStep
from sae_core.trainer.step_memory import StepMemory
from sae_core.trainer.training_state import Means, Progress, TrainingState, learned, put_back
from sae_core.trainer.validation import Validation, Validator


class NotFinite(Exception):
    """A batch's loss or gradient is infinite or NaN."""


class Trainer:
    """Trains one SAE on one source of activations.

    Args:
        sae: initialised, on the device to train on.
        source: batches of raw activations.
        compute: how a step is computed, and the processes that share it.
        end_to_end: the losses of the end-to-end phase; None trains without one.
        max_skipped: batches in a row that may be skipped because they are not finite.
        log_freq: steps between two looks at what a GPU has done.
        stepping: how steps are taken.
        origin: the SAE whose weights `sae` takes over before the first step.
    """

    def __init__(
        self,
        sae: SparseAutoencoder,
        source: ActivationSource,
        config: TrainingConfig,
        observer: Observer,
        compute: Compute = PLAIN,
        end_to_end: EndToEnd | None = None,
        max_skipped: int = RuntimeConfig.max_skipped,
        log_freq: int = RuntimeConfig.log_freq,
        stepping: Stepping = "auto",
        origin: Origin | None = None,
    ) -> None:
        spec = sae.spec
        size = SAESize(spec.sae_type, spec.d_in, spec.d_sae, spec.top_k)
        config = resolved(config, size, source.tokens_per_step, source.steps_per_epoch)
        self.sae, self.source, self.config, self.observer = sae, source, config, observer
        self.compute, self.end_to_end, self.max_skipped = compute, end_to_end, max_skipped
        self.origin = origin
        self.batches = Batches(
            sae.spec, sae.b_dec.device, source, config.num_epochs, end_to_end, compute.group
        )
        self.objective = Objective(
            sae.spec, config.recon_weight, self.batches, end_to_end, compute.group
        )
        patience = config.early_stopping_patience if source.n_validation else 0
        self.progress = Progress(stopping=EarlyStopping(patience, config.early_stopping_min_delta))
        self.last_batch: Tensor | None = None
        self.memory = StepMemory(compute, source.tokens_per_step, sae.W_enc)
        self.validator = Validator(self.batches, self.objective, self.memory)
        self.lr = float(config.lr)
        length = travel(self.batches.n_steps, self.lr, config.lr_decay)
        self.optimizer = adam(sae, self.lr, RULES[config.optimizer], length)
        self.ahead: Ahead | None = None
        if (how := picked(stepping, sae, compute)) != "ordinary":
            self.ahead = Ahead(self._static_step, how == "graph", log_freq, self._tell, self._redo)

    @property
    def history(self) -> History:
        return self.progress.history

    @property
    def group(self) -> ProcessGroup:
        return self.compute.group

    @property
    def place(self) -> tuple[int, int]:
        """How far it is: the steps done, and of the validation after them."""
        return self.progress.n_done, self.validator.n_stops

    @property
    def normalise(self) -> Normalisation:
        """How activations enter the SAE; known once there has been a batch."""
        return self.batches.normalise

    # The method: batches, steps, epochs

    def train(self) -> Iterator[EpochRecord]:
        """The whole training, or what is left of it; hands over a record after each epoch."""
        self.begin()
        while not self.is_over:
            for batch in self.rest_of_epoch():
                self.take_over(batch)
                self.train_on(batch)
            self.look()
            yield self.close_epoch(self.validate())
        self.end()

    def step(self, batch: Batch, lr: float) -> tuple[Terms, float]:
        """One optimizer step: its terms, and L0.

        Raises:
            NotFinite: loss or gradient is; the SAE is as before.
        """
        sae = self.sae
        terms, made, aux = self.memory.run(
            lambda compute: self._gradients(batch, compute), self.progress
        )
        set_learning_rate(self.optimizer, lr)
        self.optimizer.step()
        self.optimizer.zero_grad()
        sae.zero_grad()
        sae.normalise_decoder()
        sae.record_activity(made.fired)
        self.progress.bound.update(made.least)
        self.progress.aux_bound.update(aux.least)
        self.last_batch = batch.x
        return terms, made.l0

    def _gradients(
        self, batch: Batch, compute: Compute
    ) -> tuple[Terms, Reconstruction, AuxiliaryLoss]:
        """Leave the gradients for the optimizer; gives what holds for the whole batch."""
        sae, part = self.sae, batch.part()
        share, compute = len(part.x) / len(batch.x), compute._replace(n_tokens=len(batch.x))
        sae.zero_grad()
        made = sae.reconstruct(part.x, part.target, compute)
        aux = self.objective.auxiliary_loss(sae, part, made, compute)
        terms = self.objective.terms(part, made, aux)
        (share * terms.loss).backward()
        aux.add_gradient(sae.weights)
        self.group.all_reduce_(hand_over_gradients(sae, self.optimizer))
        sae.project_decoder_gradient()
        norm = clip_gradients(self.optimizer)
        terms, made = self.objective.over_processes(terms, made, share)
        if not math.isfinite(float(terms.loss) + norm):
            raise NotFinite
        return terms, made, aux

    def _record(self, number: int, terms: Mapping[str, Tensor], l0: float, n_tokens: int) -> None:
        """Record a step that was taken."""
        progress = self.progress
        assert progress.means is not None
        progress.skipped_in_a_row = 0
        progress.tokens += n_tokens
        progress.means.add(terms, l0, n_tokens)
        self.observer.on_step(progress.epoch, number, terms["loss"], l0)

    # The pieces of `train`. Between any two of them, `state` is all that the training depends on.

    def begin(self) -> None:
        """Tell the observer."""
        lengths = self.config.num_epochs, self.source.steps_per_epoch
        if self.progress.n_done == 0:
            self.observer.on_start(*lengths)
        else:
            self.observer.on_resume(*lengths, self.progress.n_done)

    @property
    def is_over(self) -> bool:
        """Every step is done, and the last epoch closed."""
        return self.progress.means is None and self.progress.n_done >= self.batches.n_steps

    def rest_of_epoch(self) -> Iterator[Batch | Tensor]:
        """The batches of the epoch from the next step on, raw where the device masks them."""
        progress, length = self.progress, self.source.steps_per_epoch
        if progress.means is None:
            progress.epoch, progress.means = progress.n_done // length + 1, Means()
        skip = progress.n_done - (progress.epoch - 1) * length
        return self.batches.train(progress.epoch - 1, skip, raw=self.ahead is not None)

    def take_over(self, batch: Batch | Tensor) -> bool:
        """Give the SAE its origin's weights before the first batch with tokens; whether it did."""
        if self.origin is None or self.progress.tokens:
            return False
        made = batch if isinstance(batch, Batch) else self.batches.of_activations(batch)
        if is_first := made.finite and len(made.x) > 0:
            begin_with(self.origin, self.sae, self.normalise, made.x)
        return is_first

    def train_on(self, batch: Batch | Tensor) -> None:
        """Take one batch: a step, or a note that it was skipped. A raw one is given to the device,
        and taken by the next `look`."""
        progress = self.progress
        lr = learning_rate(progress.n_done, self.batches.n_steps, self.lr, self.config.lr_decay)
        number = progress.n_done - (progress.epoch - 1) * self.source.steps_per_epoch + 1
        progress.n_done += 1
        if isinstance(batch, Tensor):
            assert self.ahead is not None
            # The origin's weights have just been taken over, which no static step knows.
            is_first = self.origin is not None and progress.tokens == 0
            (self._redo if is_first else self.ahead.take)(Waiting(batch, lr, number))
        else:
            self.look()
            self._take(batch, lr, number)

    def look(self) -> None:
        """Take all batches that were given: between two of the other calls, and before a state."""
        if self.ahead is not None:
            self.ahead.look()

    def _take(self, batch: Batch, lr: float, number: int) -> None:
        progress = self.progress
        if not batch.finite:
            self._skip(number, "activations")
            return
        progress.outliers += batch.n_outliers
        if len(batch.x) == 0:
            return
        if batch.passes is not None and not progress.in_phase:
            self._begin_phase(batch)
        try:
            terms, l0 = self.step(batch, lr)
        except NotFinite:
            self._skip(number, "loss")
            return
        self._record(number, terms.by_name(), l0, len(batch.x))

    def validate(self) -> Validation:
        """All of `validating` at once."""
        steps = self.validating()
        while True:
            try:
                next(steps)
            except StopIteration as end:
                validation: Validation = end.value
                return validation

    def validating(self) -> Generator[None, None, Validation]:
        """Measure the SAE as it is used; stops before each batch, so that several trainings can
        measure on the same one. Changes nothing: `close_epoch` takes the result."""
        return self.validator.measure(self.sae, self.progress, self.last_batch)

    def close_epoch(self, validation: Validation) -> EpochRecord:
        """Record the epoch; after it, the SAE may be stored."""
        progress, sae = self.progress, self.sae
        assert progress.means is not None
        self.validator.n_stops = 0
        if validation.threshold is not None:
            sae.known_threshold.data.copy_(validation.threshold)
        progress.aux_bound = validation.aux_bound
        metrics, progress.means = progress.means.values(), None
        skipped_before = sum(n or 0 for n in progress.history.get("skipped_batches", []))
        metrics["skipped_batches"] = progress.skipped - skipped_before
        dead = int(sae.dead_features.sum())
        metrics |= {"dead_features": dead, "dead_feature_percentage": 100 * dead / sae.spec.d_sae}
        metrics |= {f"val_{name}": value for name, value in validation.figures.items()}
        epoch, tokens = progress.epoch, progress.tokens
        improved = progress.stopping.take(epoch, metrics.get("val_loss", math.nan))
        progress.note({"epoch": epoch, "tokens": tokens, **metrics})
        if progress.stopping.is_out_of_patience:
            in_phase = progress.n_done > self.batches.n_local_steps
            progress.n_done = self.batches.n_steps if in_phase else self.batches.n_local_steps
        record = EpochRecord(epoch, self.config.num_epochs, tokens, metrics, improved)
        self.observer.on_epoch(record)
        return record

    def end(self) -> None:
        """Tell the observer."""
        self.observer.on_end(self.history, self.progress.epoch < self.config.num_epochs)

    # Saved states

    def state(self) -> TrainingState:
        """All that the next step depends on. The tensors are the training's own."""
        self.look()
        values: dict[str, Any] = {"progress": asdict(self.progress)}
        if self.batches.measured is None:  # nothing is done but what the settings say
            return TrainingState({}, values)
        sites = self.normalise.sites
        tensors = learned(self.sae, self.optimizer)
        tensors["mean"] = torch.stack([site.mean for site in sites])
        if self.last_batch is not None and self.source.n_validation == 0:
            tensors["last_batch"] = self.last_batch
        values["normalise"] = [[site.scale, site.max_norm] for site in sites]
        values["end_to_end"] = self.end_to_end and self.end_to_end.weights
        return TrainingState(tensors, values)

    def restore(self, state: TrainingState) -> None:
        """Go on from a state of a training with the same settings."""
        tensors, values = state
        self.progress = Progress.of(values["progress"])
        if "normalise" not in values:
            return
        put_back(self.sae, self.optimizer, tensors)
        if self.ahead is not None:
            self.ahead.forget()
        device = self.sae.b_dec.device
        sites = zip(tensors["mean"].to(device), values["normalise"], strict=True)
        self.batches.measured = Normalisation.of_sites(
            Normalisation(mean, scale, max_norm) for mean, (scale, max_norm) in sites
        )
        if "last_batch" in tensors:
            self.last_batch = tensors["last_batch"].to(device)
        if self.end_to_end is not None:
            self.end_to_end.weights = values["end_to_end"]

    # Parts of a step

    def _skip(self, number: int, what: str) -> None:
        progress = self.progress
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        self.observer.on_skip(progress.epoch, number, what)
        if progress.skipped_in_a_row > self.max_skipped:
            raise not_finite(self.sae.spec, what, progress.skipped_in_a_row)

    def _static_step(self, like: Tensor, n_steps: int) -> StaticStep:
        """For batches like this one, with room for the figures of so many steps."""
        weight, ops = self.config.recon_weight, backend_for(self.sae.b_dec.device)
        how = self.compute.precision or self.sae.weights.precision()
        given = self.sae, self.optimizer, self.normalise, weight, how, like, n_steps, ops
        return StaticStep(*given, self.group)

    def _tell(self, batch: Waiting, figures: Figures) -> None:
        """Record a static step as the ordinary code would."""
        progress, n_tokens = self.progress, int(figures.tokens)
        progress.outliers += len(batch.raw) - n_tokens
        progress.bound.update(float(figures.least))
        aux_least = float(figures.aux_least)
        progress.aux_bound.update(None if math.isnan(aux_least) else aux_least)
        if self.source.n_validation == 0:
            self.last_batch, _ = self.normalise.pair(batch.raw)
        self._record(batch.number, figures.terms(), float(figures.pairs) / n_tokens, n_tokens)

    def _redo(self, batch: Waiting) -> None:
        """Take a batch that the static step did not."""
        self._take(self.batches.of_activations(batch.raw), batch.lr, batch.number)

    def _begin_phase(self, batch: Batch) -> None:
        """Forget the best epoch, and balance the end-to-end terms on the phase's first batch."""
        self.progress.in_phase = True
        if self.ahead is not None:
            self.ahead.forget()  # the language model needs its memory
        self.progress.stopping.start_over()
        # The reconstruction error of random weights is no measure.
        if self.batches.n_local_steps > 0 or self.origin:
            part = batch.part()
            with torch.no_grad():
                made = self.memory.run(
                    lambda compute: self.sae.reconstruct(
                        part.x, part.target, compute._replace(n_tokens=len(batch.x))
                    ),
                    self.progress,
                )
            self.progress.bound.update(made.least)
            self.objective.balance(batch, part, made)
