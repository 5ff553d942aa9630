"""One training run from settings to SAE directory: source, model, SAE, loop and observer wired."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sae_core.activations.language_model import Hook, LanguageModel
from sae_core.activations.model_configuration import check_window
from sae_core.activations.model_facts import ModelFacts, check_hook, model_facts
from sae_core.activations.store import ActivationSource, StreamingSource
from sae_core.activations.token_windows import (
    TokenWindows,
    read_windows,
    split_texts,
    text_notes,
)
from sae_core.checkpoint import (
    is_whole_checkpoint,
    load_sae,
    sae_files,
    save_sae,
    write_files,
)
from sae_core.code_hash import code_hash
from sae_core.data_processing.texts import read_texts
from sae_core.devices import keep_freed_memory, pick_device, pick_precision
from sae_core.end_to_end import EndToEnd, later_layers
from sae_core.errors import Interrupted, SAEError, one_line
from sae_core.events import EpochRecord, Observer
from sae_core.files import bring_back, file_sha256, folder_stamp
from sae_core.interrupts import Interrupts
from sae_core.kinds import build
from sae_core.model_sources import model_sha256
from sae_core.naming import (
    BEST_CHECKPOINT,
    METRICS_FILE,
    STATES,
    batch_checkpoint_name,
    ensure_writable,
    epoch_checkpoint,
    middle_layer,
    path_component,
    run_name,
)
from sae_core.observers import MetricsFile, Observers
from sae_core.parallel import ALONE, Everyone
from sae_core.publishing.saelens import saelens_files
from sae_core.resume import Periodically, SavedStates, forget_states
from sae_core.sae_base import SparseAutoencoder
from sae_core.sae_config import SAEConfig, SAESpec
from sae_core.seeding import generator
from sae_core.train_config import DataConfig, HookConfig, RunConfig, RuntimeConfig, TrainingConfig
from sae_core.training import Trainer
from sae_core.training_state import TrainingState


@dataclass(frozen=True)
class Origin:
    """What an SAE was made from, as its `config.json` records it."""

    model_name: str
    model_commit: str | None
    model_dtype: str
    data_file: str
    data_sha256: str
    prepend_bos: bool
    model_sha256: str | None = None
    """Of the model's files, where it has no commit."""

    def as_metadata(self) -> dict[str, Any]:
        """What `config.json` says of it."""
        metadata = asdict(self)
        if self.model_sha256 is None:
            del metadata["model_sha256"]
        return metadata


class SAETrainer:
    """Trains one SAE and exports it.

    Args:
        source: activations at `hook`.
        origin: where they come from.
        checkpoints: folder that this run's checkpoints go into.
        end_to_end: the losses of the end-to-end phase; None trains without one.
        model_files: a stamp of the language model's files, where it has no commit.
        target: of a transcoder; `source` then has the activations at both hooks.
        everyone: the processes that share the training; the first one alone writes files, and
            tells `observer`.
    """

    def __init__(
        self,
        source: ActivationSource,
        hook: Hook,
        d_in: int,
        origin: Origin,
        *,
        sae: SAEConfig,
        data: DataConfig,
        training: TrainingConfig,
        runtime: RuntimeConfig,
        checkpoints: Path,
        observer: Observer,
        end_to_end: EndToEnd | None = None,
        model_files: str | None = None,
        target: Hook | None = None,
        everyone: Everyone = ALONE,
    ) -> None:
        self.training, self.runtime, self.checkpoints = training, runtime, checkpoints
        self.everyone = everyone
        self.events = MetricsFile(checkpoints / METRICS_FILE, runtime.log_freq)
        self.interrupts = Interrupts(lambda: self.loop.at_rest, everyone)
        states = Periodically(runtime.resume_minutes, self._save_state, self.interrupts.check)
        told = (observer, self.events) if everyone.is_first else ()
        self.observer = Observers(*told, states)
        self.dtype: torch.dtype = getattr(torch, sae.sae_dtype)
        self.told_too_large = False
        device = pick_device(runtime.device)
        metadata = origin.as_metadata() | asdict(data) | {"training": asdict(training)}
        if end_to_end is not None:
            metadata["end_to_end"] = asdict(end_to_end.config)
        if sae.n_tokens_to_dead:
            n_batches = max(1, sae.n_tokens_to_dead // training.tokens_per_step)
            sae = replace(sae, n_batches_to_dead=n_batches)
        spec = sae_spec(sae, hook, d_in, device, metadata, target)
        self.sae = build(spec)
        self.sae.initialise(generator(data.seed, "weights"))
        self.sae.to(device)
        self.sae.precision = pick_precision(training.compute_dtype, device)
        self.states = SavedStates(
            checkpoints / STATES,
            {
                "sae": asdict(replace(spec, device="")),
                "activations": source.identity() | {"model_files": model_files},
                "code": code_hash("sae_core/sae_train.py", sae_type=sae.sae_type),
                "torch": torch.__version__,
            },
        )
        keep_freed_memory()
        rows = runtime.activation_batch_size
        self.loop = Trainer(
            self.sae,
            source,
            training,
            self.observer,
            row_block=None if rows == "auto" else rows,
            end_to_end=end_to_end,
            max_skipped=runtime.max_skipped,
            everyone=everyone,
        )

    def train(self) -> None:
        """Run the loop, writing checkpoints as it goes; from where an interrupted process left it,
        if it has these settings.

        Raises:
            Interrupted: a signal came; all that was done is stored.
        """
        if self.everyone.is_first:
            self._restore()
            self.everyone.wait()
        else:
            self.everyone.wait()
            self._restore()
        with self.interrupts:
            try:
                for record in self.loop.train():
                    self._on_epoch(record)
                    self.interrupts.check()
                    if self.loop.n_done == self.loop.n_steps:
                        self._save_state()  # what is made of the SAE may fail, and begin again
            except Interrupted as interrupted:
                if self.loop.n_done > 0:
                    self._save_state()
                done = f"{self.loop.n_done} of {self.loop.n_steps} steps"
                raise Interrupted(f"{interrupted} after {done}; run it again to go on") from None

    def _on_epoch(self, record: EpochRecord) -> None:
        frequency = self.runtime.checkpoint_freq
        if record.improved:
            self._checkpoint(BEST_CHECKPOINT)
        if frequency and record.epoch % frequency == 0:
            self._checkpoint(epoch_checkpoint(record.epoch))

    def _restore(self) -> None:
        state, best, lost = self.states.newest(), self.checkpoints / BEST_CHECKPOINT, False
        if state is not None and state.values.get("best_epoch") is not None:
            bring_back(best)
            lost = not is_whole_checkpoint(best)
            # The best epoch's own state makes the same checkpoint again.
            again = state.values["epoch"] == state.values["best_epoch"]
            again = again and state.values["means"] is None
            if lost and not again:
                state = self.states.set_aside(f"lacks its {BEST_CHECKPOINT}, or it is damaged")
        if state is None:
            self._save_state()  # so that what has been set aside is so for good
            return
        try:
            self.loop.restore(state)
        except (RuntimeError, KeyError, TypeError, ValueError) as error:
            self.states.set_aside("does not fit")
            raise SAEError(
                f"{self.states.folder}: not a state of this training ({one_line(error)}); run it "
                "again to begin anew"
            ) from error
        if self.everyone.is_first:
            self.events.rewind(state.values["metrics"])
        if lost:
            print(f"{best}: is damaged or missing, and is made again", flush=True)
            self._checkpoint(BEST_CHECKPOINT)
        if state.values["machine"] != self._machine():
            print(
                f"the state is of a machine with {state.values['machine']}, and this one has "
                f"{self._machine()}: the result will be the same but for rounding",
                flush=True,
            )

    def _save_state(self) -> None:
        if not self.everyone.is_first:
            return
        tensors, values = self.loop.state()
        values |= {"metrics": self.events.length(), "machine": self._machine()}
        self.states.save(TrainingState(tensors, values))

    def _machine(self) -> str:
        device, precision = self.sae.b_dec.device.type, self.sae.precision
        threads, n_processes = torch.get_num_threads(), self.everyone.size
        shared = "" if self.everyone.is_alone else f", {n_processes} processes"
        return f"{device}, {threads} threads, {precision.product} products{shared}"

    def export(self, folder: Path) -> Path:
        """Write the final SAE directory: the best checkpoint, or the last state without one."""
        if self.loop.best_epoch is not None:
            sae = load_sae(self.checkpoints / BEST_CHECKPOINT)
        else:
            sae = self._folded()
        write_files(folder, sae_files(sae, self.loop.history) | saelens_files(sae))
        return folder

    def _checkpoint(self, name: str) -> None:
        if not self.everyone.is_first:
            return
        folder = self.checkpoints / name
        save_sae(folder, self._folded(), self.loop.history)
        self.observer.on_checkpoint(folder, best=name == BEST_CHECKPOINT)

    def _folded(self) -> SparseAutoencoder:
        """The SAE as it takes raw activations, with what is known of its training so far."""
        loop = self.loop
        normalise = loop.normalise
        target = normalise.target and (normalise.target.mean, normalise.target.scale)
        sae = self.sae.folded(normalise.mean, normalise.scale, torch.float32, target)
        self._convert(sae)
        sae.spec.metadata |= {
            "epochs": len(loop.history["epoch"]),
            "tokens": loop.tokens,
            "outlier_tokens": loop.outliers,
            "skipped_batches": loop.skipped,
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


def sae_spec(
    sae: SAEConfig,
    hook: Hook,
    d_in: int,
    device: torch.device,
    metadata: dict[str, Any],
    target: Hook | None = None,
) -> SAESpec:
    """The stored configuration of the SAE that `sae` asks for, on activations of width `d_in`."""
    d_sae = sae.n_features(d_in)
    return SAESpec(
        d_in=d_in,
        d_sae=d_sae,
        l1_coefficient=sae.sparsity_penalty,
        dtype=sae.sae_dtype,
        device=str(device),
        hook_layer=hook.layer,
        hook_name=hook.hook_name,
        hook_spec=hook.spec,
        top_k=sae.k,
        top_k_aux=sae.topk_aux or sae.k or max(1, d_in // 2),
        n_batches_to_dead=sae.n_batches_to_dead,
        aux_penalty=sae.aux_penalty,
        sae_type=sae.sae_type,
        matryoshka_sizes=sae.matryoshka_sizes(d_sae),
        target_hook_name=target.hook_name if target else "",
        metadata=metadata,
    )


def warn_of_density(sae: SAEConfig) -> None:
    """Say so if nothing will make the SAE sparse."""
    if not sae.k and not sae.sparsity_penalty:
        print(
            f"--sparsity-penalty 0: nothing makes a {sae.sae_type} SAE sparse, and many of its "
            "features will be active on every token; give a penalty, such as 0.01",
            flush=True,
        )


def choose_hook(config: HookConfig, facts: ModelFacts) -> Hook:
    """The hook that the settings name, checked against the model.

    Raises:
        SAEError: no such layer or hook.
    """
    layer = config.hook_layer
    if layer is None:
        layer = middle_layer(facts.n_layers, config.middle_layer_strategy)
    return check_hook(Hook(layer, config.hook_name), facts.n_layers, facts.hook_names)


def choose_target(config: HookConfig, hook: Hook, facts: ModelFacts) -> Hook | None:
    """The target of a transcoder at `hook`, checked likewise; None for an SAE.

    Raises:
        SAEError: no such hook.
    """
    target = hook.target(config.target_hook_name)
    return target and check_hook(target, facts.n_layers, facts.hook_names, "--target-hook-name")


class CheckedRun(NamedTuple):
    """A run whose settings are known to fit together and the machine."""

    name: str
    texts: list[str]
    device: torch.device
    facts: ModelFacts
    hook: Hook
    output: Path
    """The final SAE directory."""
    checkpoints: Path
    target: Hook | None
    """Of a transcoder."""


def check_run(config: RunConfig, batch: bool = False) -> CheckedRun:
    """Check everything that can be checked before the model is loaded.

    Args:
        batch: name the checkpoints' folder as the batch pipeline does, not by the run name.

    Raises:
        SAEError: a setting is wrong.
    """
    warn_of_density(config.sae)
    texts = read_texts(config.output.data_path)
    split_texts(texts, config.data.val_fraction, config.data.seed)
    device = pick_device(config.runtime.device)
    facts = model_facts(config.model)
    check_window(config.data.max_text_length, facts.context_length)
    hook = choose_hook(config.hook, facts)
    target = choose_target(config.hook, hook, facts)
    later_layers(config.end_to_end, target or hook, facts.n_layers)
    config.sae.n_features(facts.d_model)
    model_name, expansion = config.model.name, config.sae.sae_expansion
    name = path_component(
        config.output.run_name
        or run_name(model_name, hook.layer, config.hook.label, config.sae.tag, expansion),
        "--run-name",
    )
    points = batch_checkpoint_name(model_name, hook.layer, expansion) if batch else name
    return CheckedRun(
        name,
        texts,
        device,
        facts,
        hook,
        ensure_writable(config.output.output_root, "--output-root") / name,
        ensure_writable(config.output.checkpoint_root, "--checkpoint-root") / points,
        target,
    )


def _announce(sae: SAEConfig, run: CheckedRun, windows: TokenWindows) -> None:
    width = run.facts.d_model
    target = f" to {run.target.hook_name}" if run.target else ""
    print(f"hook: {run.hook.spec}{target}, width {width}")
    kind = "transcoder" if run.target else "SAE"
    print(f"{kind}: {sae.sae_type} with {sae.n_features(width)} features")
    print(
        f"windows: {windows.n_train} to train, {windows.n_validation} to validate, "
        f"{windows.n_evaluation} for evaluation, {windows.length} tokens each",
        flush=True,
    )


def train_from_model(config: RunConfig, observer: Observer, batch: bool = False) -> Path:
    """A whole training run: `check_run`, then `train_checked`."""
    run = check_run(config, batch)
    folder = train_checked(config, run, observer)
    forget_states(run.checkpoints)
    return folder


def train_checked(
    config: RunConfig, run: CheckedRun, observer: Observer, everyone: Everyone = ALONE
) -> Path:
    """A training run that streams its activations from the model. Its last state stays, so that
    the same call goes on from there, until `forget_states`.

    Returns:
        The final SAE directory.

    Raises:
        SAEError: a setting does not fit the model, or the training fails.
    """
    texts, given = config.output.data_path, config.model.model_name
    print(f"texts: {len(run.texts)} from {texts}\nmodel: {given} on {run.device}", flush=True)
    folder = None if run.facts.commit else Path(given).expanduser()
    model = LanguageModel.load(replace(config.model, revision=run.facts.commit), run.device)
    for note in text_notes(model.tokenizer, run.texts, config.data):
        print(note, flush=True)
    windows = read_windows(model.tokenizer, run.texts, config.data)
    _announce(config.sae, run, windows)
    source = StreamingSource(
        model,
        windows,
        run.hook,
        batch_size=config.runtime.batch_size,
        tokens_per_step=config.training.tokens_per_step,
        seed=config.data.seed,
        target=run.target,
        everyone=everyone,
    )
    end_to_end = None
    if config.end_to_end.use_end_to_end:
        end_to_end = EndToEnd(
            model,
            windows,
            run.hook,
            config.end_to_end,
            config.runtime.batch_size,
            run.target,
            everyone,
        )
    origin = Origin(
        model_name=config.model.name,
        model_commit=run.facts.commit,
        model_dtype=str(model.dtype).removeprefix("torch."),
        data_file=texts.name,
        data_sha256=file_sha256(texts),
        prepend_bos=windows.bos is not None,
        model_sha256=folder and model_sha256(folder),
    )
    trainer = SAETrainer(
        source,
        run.hook,
        run.facts.d_model,
        origin,
        sae=config.sae,
        data=config.data,
        training=config.training,
        runtime=config.runtime,
        checkpoints=run.checkpoints,
        observer=observer,
        end_to_end=end_to_end,
        model_files=folder and folder_stamp(folder),
        target=run.target,
        everyone=everyone,
    )
    trainer.train()
    everyone.leave()
    return trainer.export(run.output)
