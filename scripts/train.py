"""Stored activations -> one SAE directory; the end-to-end phase also runs the language model."""

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from sae_core.distributed.torchrun import launched
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
    from sae_core.activations.store import CachedSource
    from sae_core.activations.token_windows import TokenWindows
    from sae_core.models.language_model import LanguageModel
    from sae_core.trainer.training_inputs import Activations


@dataclass(frozen=True)
class Job:
    """The SAE to train."""

    tokens: Path
    """Folder of the tokenised texts that the activations are of."""
    record: Path
    """The model's record."""
    shards: tuple[Path, ...]
    """Folders of activations."""
    hook: str
    """Full name of the hook, blocks.<layer>.<hook_name>."""
    checkpoints: Path
    """Folder for this SAE's checkpoints."""
    output: Path
    """SAE directory to write."""
    target_hook_name: str = HookConfig.target_hook_name
    """Of a transcoder: the hook of the same layer whose activation it makes."""
    sae: SAEConfig = field(default_factory=SAEConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    end_to_end: EndToEndConfig = field(default_factory=EndToEndConfig)
    load: LoadConfig = field(default_factory=LoadConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


def run(job: Job) -> None:
    # The last state stays until the evaluation deletes it: for Snakemake, a job that is killed as
    # it ends has failed. It deletes the SAE and begins the job again.
    login = log_in(job.tracking)
    if not launched(job.runtime.gpus):
        train(job, login)


def train(job: Job, login: TrackingConfig) -> None:
    """Train the SAE, in this process alone or as one of several."""
    from sae_core.distributed.process_group import join
    from sae_core.model_training.tracked_run import Plan, tracked_run
    from sae_core.trainer.training_inputs import Settings, warn_of_density

    group = join(job.runtime.device)
    if group.is_first:
        warn_of_density(job.sae)
    activations = stored_activations(job)
    settings = Settings.of(job)
    plan = Plan.of_job(job.output, job.checkpoints, login, settings, activations)
    with tracked_run(plan, settings, lambda: activations, group) as done:
        pass
    print(f"SAE: {done.folder}")


def stored_activations(job: Job) -> "Activations":
    """The activations in the job's shards, and what loads the model for an end-to-end phase.

    Raises:
        SAEError: they are damaged, or of another model or other texts than the job's.
    """
    from sae_core.activations.store import CachedSource
    from sae_core.corpus.token_manifest import TokenManifest
    from sae_core.models.language_model import Hook
    from sae_core.models.model_sources import ModelRecord
    from sae_core.trainer.end_to_end import later_layers
    from sae_core.trainer.origin import origin_of
    from sae_core.trainer.schedule import step_size
    from sae_core.trainer.training_inputs import Activations, Provenance
    from sae_core.utils.devices import pick_device
    from sae_core.utils.files import folder_stamp

    record, hook = ModelRecord.load(job.record), Hook.parse(job.hook)
    target, uses_model = hook.target(job.target_hook_name), job.end_to_end.use_end_to_end
    config = ModelConfig(model_name=record.path, **asdict(job.load))
    windows = windows_of(job, config) if uses_model or job.data.excluded_tokens else None
    source = CachedSource(
        job.shards,
        hook,
        tokens_per_step=partial(step_size, job.training),
        seed=job.data.seed,
        target=target,
        device=pick_device(job.runtime.device),
        windows=windows,
    )
    if windows:
        check_windows(job, source, windows)
    origin = origin_of(job.sae, hook, target, source.d_in, record.name, job.output)
    model = None
    if uses_model:
        later_layers(job.end_to_end, target or hook, record.n_layers)
        model = loader(job, config, source)
    texts = TokenManifest.load(job.tokens)
    provenance = Provenance.recorded(record, texts, source.dtype, source.bos is not None)
    model_files = None if record.commit else folder_stamp(Path(record.path))
    return Activations(
        source, hook, source.d_in, provenance, target, model, windows, model_files, origin
    )


def windows_of(job: Job, config: ModelConfig) -> "TokenWindows":
    """The windows of the job's texts.

    Raises:
        SAEError: the texts are in the tokens of another model, or one to be excluded is none.
    """
    from sae_core.activations.token_windows import token_windows
    from sae_core.corpus.token_file import TokenFile, check_tokenizer
    from sae_core.models.loading import load_tokenizer

    file, tokenizer = TokenFile.open(job.tokens), load_tokenizer(config)
    check_tokenizer(job.tokens, file, tokenizer)
    return token_windows(file, tokenizer, job.data)


def check_windows(job: Job, source: "CachedSource", windows: "TokenWindows") -> None:
    """Check that the stored activations are of these windows.

    Raises:
        SAEError: they are of others.
    """
    given = windows.n_train, windows.n_validation, windows.positions, windows.bos
    stored = source.n_train, source.n_validation, source.positions, source.bos
    if given != stored:
        raise other_activations(job)
    if not source.is_of(windows):
        raise SAEError(
            f"{job.shards[0]}: has activations of other texts than the given ones, or of another "
            "split; harvest again"
        )


def loader(job: Job, config: ModelConfig, source: "CachedSource") -> "Callable[[], LanguageModel]":
    """What loads the model for an end-to-end phase.

    Raises:
        SAEError: the stored activations are of a model in another number format.
    """
    from sae_core.models.language_model import LanguageModel
    from sae_core.utils.devices import pick_device, pick_dtype

    device = pick_device(job.runtime.device)
    if str(pick_dtype(config.model_dtype, device)).removeprefix("torch.") != source.dtype:
        raise other_activations(job)
    return lambda: LanguageModel.load(config, device, job.data.max_text_length)


def other_activations(job: Job) -> SAEError:
    """The error of shards that do not fit the job."""
    return SAEError(
        f"{job.shards[0]}: has activations of other texts, windows or model settings than the "
        "given ones; harvest again"
    )


if __name__ == "__main__":
    cli.run(run, Job, __doc__)
