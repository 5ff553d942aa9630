"""One pass of a language model -> several SAE directories, with no activations on disk."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from sae_core.model_training.wandb_session import log_in
from sae_core.sae.config import SAEConfig
from sae_core.settings.services import TrackingConfig
from sae_core.train_config import (
    DataConfig,
    EndToEndConfig,
    HookConfig,
    LoadConfig,
    ModelConfig,
    RuntimeConfig,
    TrainingConfig,
)
from sae_core.utils import cli
from sae_core.utils.errors import SAEError

if TYPE_CHECKING:
    from sae_core.activations.shared_stream import SharedStream
    from sae_core.models.language_model import Hook
    from sae_core.models.model_sources import ModelRecord
    from sae_core.trainer.checked_run import Named
    from sae_core.trainer.training_inputs import Activations


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
    finished: Path
    """Folder of finished SAEs, where one is looked for that a training begins with."""
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


class Wanted(NamedTuple):
    """One of the SAEs, as `saes` has it."""

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
    from sae_core.trainer.training_inputs import Settings, warn_of_density
    from sae_core.utils.files import write_file

    login = log_in(job.tracking)
    wanted = [Wanted.parse(text) for text in job.saes]
    for each in wanted:
        warn_of_density(each.sae)
    settings = [
        Settings(each.sae, job.data, job.training, job.end_to_end, job.runtime) for each in wanted
    ]
    stream, activations = stream_of(job, wanted)
    plans = [
        Plan.of_job(job.output / each.name, job.checkpoints / each.name, login, how, own)
        for each, how, own in zip(wanted, settings, activations, strict=True)
    ]
    with tracked_runs(plans, settings, lambda: (stream, activations)):
        pass
    for each, sha256 in zip(wanted, job.settings, strict=True):
        note = {"stream": job.stream, "settings": sha256}
        write_file(job.notes / f"{each.name}.json", json.dumps(note, indent=1) + "\n")
    print(f"{len(wanted)} SAEs: {job.output}")


def stream_of(job: Job, wanted: Sequence[Wanted]) -> "tuple[SharedStream, list[Activations]]":
    """The model's activations, for each SAE those at its hook.

    Raises:
        SAEError: the model or the texts are not what the settings say.
    """
    from sae_core.activations.token_windows import corpus_notes, token_windows
    from sae_core.corpus.token_file import TokenFile, check_tokenizer
    from sae_core.models.language_model import LanguageModel
    from sae_core.models.model_sources import ModelRecord
    from sae_core.trainer.schedule import step_size
    from sae_core.trainer.streamed import Streamed
    from sae_core.trainer.training_inputs import Provenance
    from sae_core.utils.devices import pick_device
    from sae_core.utils.files import folder_stamp

    file, record = TokenFile.open(job.tokens), ModelRecord.load(job.record)
    saes = [named(job, record, each) for each in wanted]
    config = ModelConfig(model_name=record.path, **asdict(job.load))
    deepest = 1 + max(sae.hook.layer for sae in saes)
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
    streamed = Streamed(model, windows, provenance, files)
    return streamed.shared(
        saes, partial(step_size, job.training), job.data.seed, job.runtime.batch_size
    )


def named(job: Job, record: "ModelRecord", wanted: Wanted) -> "Named":
    """An SAE whose hooks the model has, with what its training begins with.

    Raises:
        SAEError: the model lacks one, or there is nothing to begin with.
    """
    from sae_core.models.model_facts import check_hook
    from sae_core.trainer.checked_run import Named
    from sae_core.trainer.end_to_end import later_layers
    from sae_core.trainer.origin import origin_of

    hook, target = wanted.hook, wanted.hook.target(job.target_hook_name)
    for at in filter(None, (hook, target)):
        check_hook(at, record.n_layers, record.hook_names)
    later_layers(job.end_to_end, target or hook, record.n_layers)
    finished, output = job.finished / wanted.name, job.output / wanted.name
    origin = origin_of(wanted.sae, hook, target, record.d_model, record.name, finished)
    return Named(wanted.name, hook, output, job.checkpoints / wanted.name, target, origin)


if __name__ == "__main__":
    cli.run(run, Job, __doc__)
