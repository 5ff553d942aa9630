"""Stored activations -> one SAE directory."""

from dataclasses import dataclass, field
from pathlib import Path

from sae_core import cli
from sae_core.sae_config import SAEConfig
from sae_core.train_config import DataConfig, RuntimeConfig, TrainingConfig


@dataclass(frozen=True)
class Job:
    """The SAE to train."""

    texts: Path
    """Processed JSON file that the activations are of."""
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
    sae: SAEConfig = field(default_factory=SAEConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)


def run(job: Job) -> None:
    from sae_core.activations.language_model import Hook
    from sae_core.activations.store import CachedSource
    from sae_core.console import Console
    from sae_core.model_sources import ModelRecord
    from sae_core.sae_train import Origin, SAETrainer, file_sha256

    record, hook = ModelRecord.load(job.record), Hook.parse(job.hook)
    source = CachedSource(
        job.shards, hook, tokens_per_step=job.training.tokens_per_step, seed=job.data.seed
    )
    origin = Origin(
        model_name=record.name,
        model_commit=record.commit,
        model_dtype=source.dtype,
        data_file=job.texts.name,
        data_sha256=file_sha256(job.texts),
        prepend_bos=source.bos is not None,
    )
    trainer = SAETrainer(
        source,
        hook,
        source.d_in,
        origin,
        sae=job.sae,
        data=job.data,
        training=job.training,
        runtime=job.runtime,
        checkpoints=job.checkpoints,
        observer=Console(job.runtime.log_freq),
    )
    trainer.train()
    print(f"SAE: {trainer.export(job.output)}")


if __name__ == "__main__":
    cli.run(run, Job, __doc__)
