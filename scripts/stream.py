"""One pass of a language model -> several SAE directories, with no activations on disk."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from sae_core.model_training.wandb_session import log_in
from sae_core.sae.config import SAEConfig
from sae_core.train_config import (
    DataConfig,
    EndToEndConfig,
    HookConfig,
    LoadConfig,
    ModelConfig,
    RuntimeConfig,
    TrackingConfig,
    TrainingConfig,
)
from sae_core.utils import cli
from sae_core.utils.errors import SAEError

if TYPE_CHECKING:
    from sae_core.activations.shared_stream import SharedStream
    from sae_core.models.language_model import Hook
    from sae_core.trainer.training_inputs import Activations, Settings


@dataclass(frozen=True)
class Job:
    """The SAEs to train."""

    tokens: Path
    """Folder of the tokenised texts that the model reads."""
    record: Path
    """The model's record."""
    saes: tuple[str, ...]
    """For each SAE a JSON object with its run `name`, the full name of its `hook`,
    blocks.<layer>.<hook_name>, and as `sae` the settings that differ from the defaults."""
    checkpoints: Path
    """Folder that gets a folder of checkpoints for each SAE."""
    output: Path
    """Folder to write: an SAE directory for each."""
    notes: Path
    """Folder that gets a note on each SAE: `stream` and `settings`."""
    stream: str
    """Name of this stream."""
    settings: tuple[str, ...]
    """Hash of the settings of each SAE."""
    target_hook_name: str = HookConfig.target_hook_name
    """Of transcoders: the hook of the same layer whose activation they make."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    end_to_end: EndToEndConfig = field(default_factory=EndToEndConfig)
    load: LoadConfig = field(default_factory=LoadConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


@dataclass(frozen=True)
class Wanted:
    """One of the SAEs."""

    name: str
    hook: "Hook"
    sae: SAEConfig

    @classmethod
    def parse(cls, text: str) -> "Wanted":
        """From its JSON object.

        Raises:
            SAEError: it is none.
        """
        from sae_core.models.language_model import Hook

        try:
            found = json.loads(text)
            given: dict[str, Any] = {
                key: tuple(value) if isinstance(value, list) else value
                for key, value in found["sae"].items()
            }
            return cls(found["name"], Hook.parse(found["hook"]), SAEConfig(**given))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SAEError(f"--saes {text:.80}: not an SAE ({error}); see --help") from error


def run(job: Job) -> None:
    from sae_core.model_training.tracked_run import Plan, tracked_runs
    from sae_core.trainer.resume import forget_states
    from sae_core.trainer.training_inputs import Settings, warn_of_density
    from sae_core.utils.files import write_file

    login, parent = log_in(job.tracking), os.getppid()
    wanted = [Wanted.parse(text) for text in job.saes]
    for each in wanted:
        warn_of_density(each.sae)
    settings = [
        Settings(each.sae, job.data, job.training, job.end_to_end, job.runtime) for each in wanted
    ]
    stream, activations = stream_of(job, wanted)
    plans = [
        Plan(
            each.name,
            job.output / each.name,
            job.checkpoints / each.name,
            login,
            resolved_settings(how, job.target_hook_name, own),
            (each.sae.sae_type, f"layer {each.hook.layer}", own.provenance.model_name),
        )
        for each, how, own in zip(wanted, settings, activations, strict=True)
    ]
    with tracked_runs(plans, settings, lambda: (stream, activations)):
        pass
    for each, sha256 in zip(wanted, job.settings, strict=True):
        note = {"stream": job.stream, "settings": sha256}
        write_file(job.notes / f"{each.name}.json", json.dumps(note, indent=1) + "\n")
    print(f"{len(wanted)} SAEs: {job.output}")
    # If its parent has died, that was Snakemake, which deletes the SAEs when it is back.
    if os.getppid() == parent:
        for plan in plans:
            forget_states(plan.checkpoints)


def resolved_settings(
    settings: "Settings", target_hook_name: str, activations: "Activations"
) -> dict[str, Any]:
    """The settings of a training in groups, for W&B."""
    hooks = {"hook_spec": activations.hook.spec, "target_hook_name": target_hook_name}
    return asdict(settings) | {"model": activations.provenance.as_metadata(), "hook": hooks}


def stream_of(job: Job, wanted: Sequence[Wanted]) -> "tuple[SharedStream, list[Activations]]":
    """The model's activations, for each SAE those at its hook.

    Raises:
        SAEError: the model or the texts are not what the settings say.
    """
    from sae_core.activations.shared_stream import SharedSource, SharedStream
    from sae_core.activations.token_windows import corpus_notes, token_windows
    from sae_core.corpus.token_file import TokenFile, check_tokenizer
    from sae_core.models.language_model import LanguageModel
    from sae_core.models.model_facts import check_hook
    from sae_core.models.model_sources import ModelRecord
    from sae_core.trainer.end_to_end import later_layers
    from sae_core.trainer.origin import origin_of
    from sae_core.trainer.training_inputs import Activations, Provenance
    from sae_core.utils.devices import pick_device
    from sae_core.utils.files import folder_stamp

    file, record = TokenFile.open(job.tokens), ModelRecord.load(job.record)
    hooks = {each.name: each.hook for each in wanted}
    targets = {name: hook.target(job.target_hook_name) for name, hook in hooks.items()}
    for name, hook in hooks.items():
        for at in filter(None, (hook, targets[name])):
            check_hook(at, record.n_layers, record.hook_names)
        later_layers(job.end_to_end, targets[name] or hook, record.n_layers)
    config = ModelConfig(model_name=record.path, **asdict(job.load))
    deepest = 1 + max(hook.layer for hook in hooks.values())
    n_blocks = None if job.end_to_end.use_end_to_end else deepest
    device = pick_device(job.runtime.device)
    model = LanguageModel.load(config, device, job.data.max_text_length, n_blocks)
    check_tokenizer(job.tokens, file, model.tokenizer)
    for note in corpus_notes(file, job.data):
        print(note, flush=True)
    windows = token_windows(file, model.tokenizer, job.data)
    assert file.manifest is not None
    dtype = str(model.dtype).removeprefix("torch.")
    provenance = Provenance.recorded(record, file.manifest, dtype, windows.bos is not None)
    files = None if record.commit else folder_stamp(Path(record.path))
    stream = SharedStream(model, windows, job.runtime.batch_size)

    def activations(each: Wanted) -> Activations:
        target, output = targets[each.name], job.output / each.name
        source = SharedSource(
            stream,
            each.hook,
            tokens_per_step=job.training.tokens_per_step,
            seed=job.data.seed,
            target=target,
        )
        origin = origin_of(each.sae, each.hook, target, model.d_model, record.name, output)
        return Activations(
            source, each.hook, model.d_model, provenance, target, model, windows, files, origin
        )

    return stream, [activations(each) for each in wanted]


if __name__ == "__main__":
    cli.run(run, Job, __doc__)
