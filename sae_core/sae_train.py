"""One training run: its texts cut into windows, its source of activations, the loop around which
states and checkpoints are stored, and the SAE that it exports."""

from dataclasses import asdict, replace
from pathlib import Path

import torch

from sae_core.activations.store import StreamingSource
from sae_core.activations.token_windows import (
    TokenWindows,
    corpus_notes,
    token_windows,
)
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
from sae_core.models.language_model import LanguageModel
from sae_core.models.model_sources import model_sha256
from sae_core.sae.config import SAEConfig
from sae_core.sae.kinds import build
from sae_core.sae.precision import pick_precision
from sae_core.sae_base import Compute, SparseAutoencoder
from sae_core.train_config import RunConfig
from sae_core.trainer.checked_run import CheckedRun, check_run
from sae_core.trainer.events import EpochRecord, Observer
from sae_core.trainer.observers import MetricsFile, Observers
from sae_core.trainer.resume import SavedStates, StateWriter, Timer, forget_states
from sae_core.trainer.training_inputs import (
    Activations,
    Provenance,
    Settings,
    end_to_end_phase,
    resolved_spec,
)
from sae_core.trainer.training_state import TrainingState
from sae_core.training import Trainer
from sae_core.utils.code_hash import code_hash
from sae_core.utils.devices import keep_freed_memory, pick_device
from sae_core.utils.errors import Interrupted, SAEError, one_line
from sae_core.utils.files import bring_back, folder_stamp
from sae_core.utils.naming import (
    BEST_CHECKPOINT,
    METRICS_FILE,
    STATES,
    epoch_checkpoint,
)
from sae_core.utils.seeding import generator


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
        what that has begun is in no state yet.

        Raises:
            Interrupted: a signal came; all that was done is stored.
        """
        if self.group.is_first:
            self._restore()
            self.group.barrier()
        else:
            self.group.barrier()
            self._restore()
        with self.interrupts:
            try:
                self._train()
            except Interrupted as interrupted:
                n_done = self.loop.progress.n_done
                if n_done > 0:
                    self._save_state()
                done = f"{n_done} of {self.loop.batches.n_steps} steps"
                raise Interrupted(f"{interrupted} after {done}; run it again to continue") from None
            finally:
                self.state_writer.wait()

    def _train(self) -> None:
        loop, deferred = self.loop, self.interrupts.deferred
        loop.begin()
        while not loop.is_over:
            for batch in loop.rest_of_epoch():
                with deferred():
                    loop.train_on(batch)
                    if self.timer.is_due:
                        self._begin_to_save()
            with deferred():
                loop.look()
            validation = loop.validate()
            with deferred():
                self._write_checkpoints(loop.close_epoch(validation))
                if loop.is_over:
                    self._save_state()  # what is made of the SAE may fail, and begin again
        loop.end()

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
        if self.loop.progress.stopping.best_epoch is not None:
            sae = load_sae(self.checkpoints / BEST_CHECKPOINT)
        else:
            sae = self._folded()
        write_files(folder, sae_files(sae, self.loop.history) | saelens_files(sae))
        return folder

    def _checkpoint(self, name: str) -> None:
        if not self.group.is_first:
            return
        folder = self.checkpoints / name
        save_sae(folder, self._folded(), self.loop.history)
        self.observer.on_checkpoint(folder, best=name == BEST_CHECKPOINT)

    def _folded(self) -> SparseAutoencoder:
        """The SAE as it takes raw activations, with what is known of its training so far."""
        loop, progress, normalise = self.loop, self.loop.progress, self.loop.normalise
        target = normalise.target and (normalise.target.mean, normalise.target.scale)
        sae = self.sae.folded(normalise.mean, normalise.scale, torch.float32, target)
        self._convert(sae)
        sae.spec.metadata |= {
            "epochs": len(progress.history["epoch"]),
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


def _announce(sae: SAEConfig, run: CheckedRun, windows: TokenWindows) -> None:
    width = run.facts.d_model
    target = f" to {run.target.hook_name}" if run.target else ""
    print(f"hook: {run.hook.spec}{target}, width {width}")
    kind = "transcoder" if run.target else "SAE"
    print(f"{kind}: {sae.sae_type} with {sae.n_features(width)} features")
    if run.origin:
        spec = run.origin.sae.spec
        print(f"begins with: {run.origin.name}, {spec.sae_type} with {spec.d_sae} features")
    print(
        f"windows: {windows.n_train} to train, {windows.n_validation} to validate, "
        f"{windows.n_evaluation} for evaluation, {windows.length} tokens each",
        flush=True,
    )


def activations_of(
    config: RunConfig, run: CheckedRun, group: ProcessGroup = SINGLE_PROCESS
) -> Activations:
    """The activations of the run's texts, streamed from its model.

    Raises:
        SAEError: a setting does not fit the model.
    """
    file, given = run.file, config.model.model_name
    assert file.manifest is not None
    texts = f"{file.manifest.n_texts} from {config.output.place}"
    print(f"texts: {texts}\nmodel: {given} on {run.device}", flush=True)
    folder = None if run.facts.commit else Path(given).expanduser()
    model = LanguageModel.load(replace(config.model, revision=run.facts.commit), run.device)
    for note in corpus_notes(file, config.data):
        print(note, flush=True)
    windows = token_windows(file, model.tokenizer, config.data)
    _announce(config.sae, run, windows)
    source = StreamingSource(
        model,
        windows,
        run.hook,
        batch_size=config.runtime.batch_size,
        tokens_per_step=config.training.tokens_per_step,
        seed=config.data.seed,
        target=run.target,
        group=group,
    )
    provenance = Provenance(
        model_name=config.model.name,
        model_commit=run.facts.commit,
        model_dtype=str(model.dtype).removeprefix("torch."),
        data_file=file.manifest.data_file,
        data_sha256=file.manifest.data_sha256,
        prepend_bos=windows.bos is not None,
        model_sha256=model_sha256(folder) if folder else None,
    )
    return Activations(
        source,
        run.hook,
        run.facts.d_model,
        provenance,
        run.target,
        model,
        windows,
        folder_stamp(folder) if folder else None,
        run.origin,
    )


def train_from_model(config: RunConfig, observer: Observer, batch: bool = False) -> Path:
    """A whole training run, neither locked nor tracked."""
    run = check_run(config, batch)
    activations, settings = activations_of(config, run), Settings.of(config)
    folder = train_sae(activations, settings, run.output, run.checkpoints, observer)
    forget_states(run.checkpoints)
    return folder
