"""The activations of a run, straight from its model: for one SAE, or for several together."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from sae_core.activations.shared_stream import SharedSource, SharedStream
from sae_core.activations.store import ActivationSource, StepSize, StreamingSource
from sae_core.activations.token_windows import TokenWindows, corpus_notes, token_windows
from sae_core.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from sae_core.models.language_model import LanguageModel
from sae_core.models.model_sources import model_sha256
from sae_core.sae.config import SAEConfig
from sae_core.train_config import BatchSize, RunConfig
from sae_core.trainer.checked_run import CheckedRun, Named
from sae_core.trainer.schedule import step_size
from sae_core.trainer.training_inputs import Activations, Provenance
from sae_core.utils.files import folder_stamp


class Streamed(NamedTuple):
    """A model with the texts that it is to read, and what both are."""

    model: LanguageModel
    windows: TokenWindows
    provenance: Provenance
    model_files: str | None
    """A stamp of the model's files, where it has no commit."""

    def activations(self, source: ActivationSource, sae: Named) -> Activations:
        """What an SAE is trained on."""
        return Activations(
            source,
            sae.hook,
            self.model.d_model,
            self.provenance,
            sae.target,
            self.model,
            self.windows,
            self.model_files,
            sae.origin,
        )

    def shared(
        self, saes: Sequence[Named], tokens_per_step: StepSize, seed: int, batch_size: BatchSize
    ) -> tuple[SharedStream, list[Activations]]:
        """What each of several SAEs is trained on, from one stream."""
        stream = SharedStream(self.model, self.windows, batch_size)
        sources = [
            SharedSource(
                stream, sae.hook, tokens_per_step=tokens_per_step, seed=seed, target=sae.target
            )
            for sae in saes
        ]
        return stream, list(map(self.activations, sources, saes))


def activations_of(
    config: RunConfig, run: CheckedRun, group: ProcessGroup = SINGLE_PROCESS
) -> Activations:
    """The activations of the run's texts, streamed from its model.

    Raises:
        SAEError: a setting does not fit the model.
    """
    streamed = _load(config, run)
    _announce(config.sae, run)
    _announce_windows(streamed.windows)
    source = StreamingSource(
        streamed.model,
        streamed.windows,
        run.hook,
        batch_size=config.runtime.batch_size,
        tokens_per_step=partial(step_size, config.training),
        seed=config.data.seed,
        target=run.target,
        group=group,
    )
    return streamed.activations(source, run)


def activations_of_all(
    configs: Sequence[RunConfig], runs: Sequence[CheckedRun]
) -> tuple[SharedStream, list[Activations]]:
    """The same for runs that differ in their SAE and its layer alone, from one stream.

    Raises:
        SAEError: a setting does not fit the model.
    """
    first = configs[0]
    streamed = _load(first, runs[0])
    for config, run in zip(configs, runs, strict=True):
        _announce(config.sae, run)
    _announce_windows(streamed.windows)
    tokens_per_step, batch_size = partial(step_size, first.training), first.runtime.batch_size
    return streamed.shared(runs, tokens_per_step, first.data.seed, batch_size)


def _load(config: RunConfig, run: CheckedRun) -> Streamed:
    file, given = run.file, config.model.model_name
    assert file.manifest is not None
    texts = f"{file.manifest.n_texts} from {config.output.place}"
    print(f"texts: {texts}\nmodel: {given} on {run.device}", flush=True)
    folder = None if run.facts.commit else Path(given).expanduser()
    model = LanguageModel.load(replace(config.model, revision=run.facts.commit), run.device)
    for note in corpus_notes(file, config.data):
        print(note, flush=True)
    windows = token_windows(file, model.tokenizer, config.data)
    provenance = Provenance(
        model_name=config.model.name,
        model_commit=run.facts.commit,
        model_dtype=str(model.dtype).removeprefix("torch."),
        data_file=file.manifest.data_file,
        data_sha256=file.manifest.data_sha256,
        prepend_bos=windows.bos is not None,
        model_sha256=model_sha256(folder) if folder else None,
    )
    return Streamed(model, windows, provenance, folder_stamp(folder) if folder else None)


def _announce(sae: SAEConfig, run: CheckedRun) -> None:
    width = run.facts.d_model
    target = f" to {run.target.hook_name}" if run.target else ""
    print(f"hook: {run.hook.spec}{target}, width {width}")
    kind = "transcoder" if run.target else "SAE"
    print(f"{kind}: {sae.sae_type} with {sae.n_features(width)} features")
    if run.origin:
        spec = run.origin.sae.spec
        print(f"begins with: {run.origin.name}, {spec.sae_type} with {spec.d_sae} features")


def _announce_windows(windows: TokenWindows) -> None:
    print(
        f"windows: {windows.n_train} to train, {windows.n_validation} to validate, "
        f"{windows.n_evaluation} for evaluation, {windows.length} tokens each",
        flush=True,
    )
    if windows.excluded:
        print(f"excluded tokens: {windows.n_excluded} in the training texts", flush=True)
