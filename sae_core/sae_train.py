"""One training run: the loop around which states and checkpoints are stored, and the SAE that it
exports."""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sae_core.distributed.interrupts import Interrupts
from sae_core.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from sae_core.formats.checkpoint import (
    is_whole_checkpoint,
    load_sae,
    sae_files,
    save_sae,
    write_files,
)
from sae_core.formats.saelens import saelens_files
from sae_core.sae.kinds import build
from sae_core.sae.precision import pick_precision
from sae_core.sae.reconstruction import Compute
from sae_core.sae_base import SparseAutoencoder
from sae_core.train_config import RunConfig
from sae_core.trainer.batches import Batch
from sae_core.trainer.checked_run import check_run
from sae_core.trainer.events import EpochRecord, Observer
from sae_core.trainer.observers import MetricsFile, Observers
from sae_core.trainer.resume import SavedStates, StateWriter, Timer, forget_states
from sae_core.trainer.streamed import activations_of
from sae_core.trainer.training_inputs import (
    Activations,
    Settings,
    end_to_end_phase,
    resolved_spec,
)
from sae_core.trainer.training_state import TrainingState
from sae_core.training import Trainer, Validation
from sae_core.utils.code_hash import code_hash
from sae_core.utils.devices import keep_freed_memory, pick_device
from sae_core.utils.errors import Interrupted, SAEError, one_line
from sae_core.utils.files import bring_back
from sae_core.utils.naming import (
    BEST_CHECKPOINT,
    FIRST_CHECKPOINT,
    METRICS_FILE,
    STATES,
    epoch_checkpoint,
)
from sae_core.utils.seeding import generator

Piece = Callable[[], None]
"""Work of a training that is done as a whole."""

Start = tuple[SparseAutoencoder, Validation]
"""The SAE that a training began with, and what it is worth."""


class SAETrainer:
    """Trains one SAE, stores states and checkpoints as it goes, and exports the SAE.

    Args:
        checkpoints: folder for this run's checkpoints and states.
        group: the processes that share the training; the first one alone writes files, and tells
            `observer`.
    """

    def __init__(
        self,
        activations: Activations,
        settings: Settings,
        checkpoints: Path,
        observer: Observer,
        group: ProcessGroup = SINGLE_PROCESS,
    ) -> None:
        runtime, sae, training = settings.runtime, settings.sae, settings.training
        self.runtime, self.checkpoints, self.group = runtime, checkpoints, group
        self.events = MetricsFile(checkpoints / METRICS_FILE, runtime.log_freq)
        self.observer = Observers(*((observer, self.events) if group.is_first else ()))
        self.interrupts, self.timer = Interrupts(group), Timer(runtime.resume_minutes)
        self.dtype: torch.dtype = getattr(torch, sae.sae_dtype)
        self.told_too_large = False
        device = pick_device(runtime.device)
        self.precision = pick_precision(training.compute_dtype, device)
        spec = resolved_spec(activations, settings, device)
        self.sae = build(spec)
        self.sae.initialise(generator(settings.data.seed, "weights"))
        self.sae.to(device)
        self.states = SavedStates(
            checkpoints / STATES,
            {
                "sae": asdict(replace(spec, device="")),
                "activations": activations.source.identity()
                | {"model_files": activations.model_files},
                "code": code_hash("sae_core/sae_train.py", sae_type=sae.sae_type),
                "torch": torch.__version__,
            },
        )
        self.state_writer = StateWriter(self.states, device)
        keep_freed_memory()
        rows = runtime.activation_batch_size
        self.loop = Trainer(
            self.sae,
            activations.source,
            training,
            self.observer,
            Compute(None if rows == "auto" else rows, self.precision, group),
            end_to_end_phase(activations, settings, group),
            runtime.max_skipped,
            runtime.log_freq,
            origin=activations.origin,
        )

    def train(self) -> None:
        """Run the loop, from where an interrupted process with these settings left it.

        A signal ends it between two steps, and at once while it reads activations or validates:
        what that has begun is in no state yet. Several processes stop at the same step.

        Raises:
            Interrupted: a signal came; all that was done is stored. Of several processes, the first
                alone gets there.
        """
        self.restore()
        with self.interrupts:
            try:
                for work in self.pieces():
                    if work:
                        with self.interrupts.deferred(lambda: self._is_settled):
                            work()
            except Interrupted as interrupted:
                self.save_progress()
                self.group.leave()
                raise Interrupted(self.told(interrupted)) from None
            finally:
                self.state_writer.wait()

    def restore(self) -> None:
        """Go on from the newest saved state, if there is one."""
        if self.group.is_first:
            self._restore()
            self.group.barrier()
        else:
            self.group.barrier()
            self._restore()

    @property
    def _is_settled(self) -> bool:
        """Whether no step's outcome is unknown; the same in all processes that share them."""
        return self.loop.ahead is None or self.loop.ahead.is_settled

    def told(self, interrupted: Interrupted) -> str:
        """What a signal ended, and when."""
        done = f"{self.loop.progress.n_done} of {self.loop.batches.n_steps} steps"
        return f"{interrupted} after {done}; run it again to continue"

    def pieces(self) -> Iterator[Piece | None]:
        """The rest of the training in pieces. Between two of them it reads activations or
        validates, which may be broken off. A piece is for the caller to do as a whole; None has
        nothing to do."""
        loop = self.loop
        loop.begin()
        while not loop.is_over:
            for batch in loop.rest_of_epoch():
                yield partial(self._step, batch)
            yield loop.look
            validation, start = (yield from loop.validating()), None
            if self._wants_start():
                sae = self._start()
                start = sae, (yield from loop.validator.measure(sae, loop.progress, None))
            yield partial(self._close_epoch, validation, start)
        loop.end()

    def _step(self, batch: Batch | Tensor) -> None:
        if self.loop.take_over(batch):
            self._checkpoint(FIRST_CHECKPOINT)
        self.loop.train_on(batch)
        # Of several processes the first alone stores states, so none may need a look for it.
        if self.timer.is_due and (self.group.is_single or self._is_settled):
            self._begin_to_save()

    def _close_epoch(self, validation: Validation, start: Start | None) -> None:
        if start and self.loop.progress.stopping.take(0, start[1].figures["loss"]):
            self._keep_start(*start)
        self._write_checkpoints(self.loop.close_epoch(validation))
        if self.loop.is_over:
            self._save_state()  # what is made of the SAE may fail, and begin again

    def _wants_start(self) -> bool:
        """Whether the SAE that the training began with is to be validated as well. It counts as
        epoch 0, and losses of epochs are compared to its own: in the end-to-end phase to another
        one."""
        loop = self.loop
        has_one = loop.origin is not None and loop.source.n_validation > 0
        return has_one and math.isinf(loop.progress.stopping.best_loss)

    def _start(self) -> SparseAutoencoder:
        """The SAE that the training began with, as it takes normalised activations."""
        normalise = self.loop.normalise
        target = normalise.target and (normalise.target.mean, normalise.target.scale)
        stored = load_sae(self.checkpoints / FIRST_CHECKPOINT)
        return stored.unfolded(normalise.mean, normalise.scale, target).to(self.sae.b_dec.device)

    def _keep_start(self, sae: SparseAutoencoder, validation: Validation) -> None:
        """Store the SAE that the training began with as the best so far, calibrated as the others
        are."""
        if validation.threshold is not None:
            sae.known_threshold.data.copy_(validation.threshold)
        if self.group.is_first:
            folded, known = self._folded(sae), sae.spec.metadata
            folded.spec.metadata |= {name: known[name] for name in ("epochs", "tokens")}
            self._store(BEST_CHECKPOINT, folded)

    def save_progress(self) -> None:
        """Store what was done, if anything was."""
        if self.loop.progress.n_done > 0:
            self._save_state()

    def _write_checkpoints(self, record: EpochRecord) -> None:
        frequency = self.runtime.checkpoint_freq
        if record.improved:
            self._checkpoint(BEST_CHECKPOINT)
        if frequency and record.epoch % frequency == 0:
            self._checkpoint(epoch_checkpoint(record.epoch))

    def _restore(self) -> None:
        """Go on from the newest saved state, if there is one."""
        state, lost = self._stored_state()
        if state is None:
            self._save_state()  # what has been set aside is not taken again
            return
        try:
            self.loop.restore(state)
        except (RuntimeError, KeyError, TypeError, ValueError) as error:
            self.states.set_aside("does not fit")
            raise SAEError(
                f"{self.states.folder}: not a state of this training ({one_line(error)}); run it "
                "again to start over"
            ) from error
        if self.group.is_first:
            self.events.rewind(state.values["metrics"])
        if lost:
            best = self.checkpoints / BEST_CHECKPOINT
            print(f"{best}: is damaged or missing; it is written again", flush=True)
            self._checkpoint(BEST_CHECKPOINT)
        if state.values["machine"] != self._machine():
            print(
                f"the state comes from a machine with {state.values['machine']}, and this one has "
                f"{self._machine()}: the result will be the same up to rounding",
                flush=True,
            )

    def _stored_state(self) -> tuple[TrainingState | None, bool]:
        """The newest saved state, and whether the checkpoint of its best epoch is lost.

        The state of the end of the best epoch can make that checkpoint again. A later one cannot,
        and is set aside.
        """
        state, best = self.states.newest(), self.checkpoints / BEST_CHECKPOINT
        if state is None:
            return None, False
        progress = state.values.get("progress", {})
        begun = self.loop.origin is not None and progress.get("tokens")
        if begun and not is_whole_checkpoint(self.checkpoints / FIRST_CHECKPOINT):
            self.states.set_aside(f"lacks its {FIRST_CHECKPOINT}, or it is damaged")
            return None, False
        best_epoch = progress.get("stopping", {}).get("best_epoch")
        if best_epoch is None:
            return state, False
        bring_back(best)
        if is_whole_checkpoint(best):
            return state, False
        if progress["epoch"] == best_epoch and progress["means"] is None:
            return state, True
        self.states.set_aside(f"lacks its {BEST_CHECKPOINT}, or it is damaged")
        return None, False

    def _save_state(self) -> None:
        self._begin_to_save()
        self.state_writer.wait()

    def _begin_to_save(self) -> None:
        """Store the state as it is now, beside the steps that follow."""
        if self.group.is_first:
            tensors, values = self.loop.state()
            values |= {"metrics": self.events.length(), "machine": self._machine()}
            self.state_writer.begin(TrainingState(tensors, values))
        self.timer.restart()

    def _machine(self) -> str:
        device, threads = self.sae.b_dec.device.type, torch.get_num_threads()
        shared = "" if self.group.is_single else f", {self.group.size} processes"
        return f"{device}, {threads} threads, {self.precision.matmul_dtype} products{shared}"

    def export(self, folder: Path) -> Path:
        """Write the final SAE directory: the best checkpoint, or the last state without one."""
        best_epoch = self.loop.progress.stopping.best_epoch
        if best_epoch is not None:
            sae = load_sae(self.checkpoints / BEST_CHECKPOINT)
        else:
            sae = self._folded()
        if best_epoch == 0:
            print(
                f"{folder}: no epoch has a lower validation loss than the SAE that it began with, "
                f"which it is; try a lower --lr than {self.loop.lr:g}, or more tokens",
                flush=True,
            )
        write_files(folder, sae_files(sae, self.loop.history) | saelens_files(sae))
        return folder

    def _checkpoint(self, name: str) -> None:
        if self.group.is_first:
            self._store(name, self._folded())

    def _store(self, name: str, sae: SparseAutoencoder) -> None:
        folder = self.checkpoints / name
        save_sae(folder, sae, self.loop.history)
        self.observer.on_checkpoint(folder, best=name == BEST_CHECKPOINT)

    def _folded(self, of: SparseAutoencoder | None = None) -> SparseAutoencoder:
        """The SAE, or another one, as it takes raw activations, with what is known of the training
        so far."""
        loop, progress, normalise = self.loop, self.loop.progress, self.loop.normalise
        target = normalise.target and (normalise.target.mean, normalise.target.scale)
        sae = (of or self.sae).folded(normalise.mean, normalise.scale, torch.float32, target)
        self._convert(sae)
        sae.spec.metadata |= {
            "epochs": len(progress.history.get("epoch", [])),
            "tokens": progress.tokens,
            "outlier_tokens": progress.outliers,
            "skipped_batches": progress.skipped,
            "outlier_norm": normalise.max_norm,
            "activation_scale": normalise.scale,
            "shuffle_tokens": loop.source.shuffle_windows * loop.source.positions,
            "torch_version": torch.__version__.split("+")[0],
        }
        if normalise.target:
            sae.spec.metadata |= {
                "target_outlier_norm": normalise.target.max_norm,
                "target_activation_scale": normalise.target.scale,
            }
        return sae

    def _convert(self, sae: SparseAutoencoder) -> None:
        """Bring a folded SAE into the number format that it is stored in: that of the settings, or
        float32 if a number of it would be infinite in that."""
        too_large = beyond(sae, self.dtype)
        if not too_large:
            sae.to(self.dtype)
            return
        sae.spec.dtype = "float32"
        if not self.told_too_large:
            self.told_too_large = True
            print(f"{too_large}; the SAE is stored in float32", flush=True)


def beyond(sae: SparseAutoencoder, dtype: torch.dtype) -> str:
    """What of an SAE does not fit into a number format; empty if everything does."""
    for name, tensor in sae.state_dict().items():
        finite = tensor[tensor.isfinite()] if tensor.is_floating_point() else tensor.new_empty(0)
        if not finite.to(dtype).isfinite().all():
            option = f"--sae-dtype {str(dtype).removeprefix('torch.')}"
            largest, most = float(finite.abs().max()), torch.finfo(dtype).max
            return f"{option}: {name} reaches {largest:,.0f}, and the format ends at {most:,.0f}"
    return ""


def train_sae(
    activations: Activations,
    settings: Settings,
    output: Path,
    checkpoints: Path,
    observer: Observer,
    group: ProcessGroup = SINGLE_PROCESS,
) -> Path:
    """Train and export one SAE. The last state stays, so that the same call goes on from there,
    until `forget_states`. Of several processes, the first alone comes back.

    Returns:
        The final SAE directory, `output`.

    Raises:
        SAEError: the training fails.
    """
    trainer = SAETrainer(activations, settings, checkpoints, observer, group)
    trainer.train()
    group.leave()
    return trainer.export(output)


def train_from_model(config: RunConfig, observer: Observer, batch: bool = False) -> Path:
    """A whole training run, neither locked nor tracked."""
    run = check_run(config, batch)
    activations, settings = activations_of(config, run), Settings.of(config)
    folder = train_sae(activations, settings, run.output, run.checkpoints, observer)
    forget_states(run.checkpoints)
    return folder
