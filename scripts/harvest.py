"""One pass of a language model over the windows -> its activations at every hook."""

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from sae_core.settings.steps import HarvestConfig
from sae_core.train_config import (
    ComputeConfig,
    DataConfig,
    LoadConfig,
    ModelConfig,
    WindowsConfig,
)
from sae_core.utils import cli
from sae_core.utils.limits import NaturalInt, PositiveInt, check_limits


@dataclass(frozen=True)
class Job:
    """The activations to store."""

    tokens: Path
    """Folder of the tokenised texts."""
    record: Path
    """The model's record."""
    hooks: tuple[str, ...]
    """Full names of the hooks, blocks.<layer>.<hook_name>."""
    output: Path
    """Folder to write: a shard."""
    receipt: Path
    """JSON file to write: what the shard contains, which stays when its data is deleted."""
    passes: PositiveInt = HarvestConfig.passes
    """How many different random crops of the corpus to store."""
    shard: NaturalInt = 0
    """Index of this job among the jobs that split the pass, counted from 0."""
    shards: PositiveInt = HarvestConfig.harvest_jobs
    """Number of jobs that split the pass."""
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    load: LoadConfig = field(default_factory=LoadConfig)
    data: WindowsConfig = field(default_factory=WindowsConfig)

    def __post_init__(self) -> None:
        check_limits(self)


def run(job: Job) -> None:
    from sae_core.activations.shards import harvest
    from sae_core.activations.token_windows import corpus_notes, token_windows
    from sae_core.corpus.token_file import TokenFile, check_tokenizer
    from sae_core.models.language_model import Hook, LanguageModel
    from sae_core.models.model_facts import check_hook
    from sae_core.models.model_sources import ModelRecord
    from sae_core.utils.devices import pick_device
    from sae_core.utils.progress import progress_bar
    from sae_core.utils.run_lock import lock

    file, data = TokenFile.open(job.tokens), DataConfig(**asdict(job.data))
    record = ModelRecord.load(job.record)
    hooks = [check_hook(Hook.parse(spec), record.n_layers, record.hook_names) for spec in job.hooks]
    config = ModelConfig(model_name=record.path, **asdict(job.load))
    device, n_blocks = pick_device(job.compute.device), 1 + max(hook.layer for hook in hooks)
    model = LanguageModel.load(config, device, job.data.max_text_length, n_blocks)
    check_tokenizer(job.tokens, file, model.tokenizer)
    for note in corpus_notes(file, data):
        print(note, flush=True)
    windows = token_windows(file, model.tokenizer, data)
    path = job.output.with_name(f".{job.output.name}.lock")
    with lock(path, "is harvesting this shard"), progress_bar("harvest", "window") as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        manifest = harvest(
            model,
            windows,
            hooks,
            job.output,
            batch_size=job.compute.batch_size,
            passes=job.passes,
            shard=job.shard,
            n_shards=job.shards,
            progress=progress,
        )
    manifest.save(job.receipt)
    print(f"{manifest.windows} windows of {windows.length} tokens at {', '.join(job.hooks)}")


if __name__ == "__main__":
    cli.run(run, Job, __doc__)
