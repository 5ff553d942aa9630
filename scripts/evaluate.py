"""One SAE directory -> its figures on held-out windows, as JSON."""

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from sae_core.settings.services import TrackingConfig
from sae_core.settings.steps import EvaluationConfig
from sae_core.train_config import ComputeConfig, LoadConfig, ModelConfig
from sae_core.utils import cli
from sae_core.utils.files import write_file


@dataclass(frozen=True)
class Job:
    """The SAE to evaluate."""

    sae: Path
    """SAE directory."""
    tokens: Path
    """Folder of the tokenised texts that it was trained on; its held-out windows are evaluated."""
    record: Path
    """The model's record."""
    output: Path
    """JSON file to write."""
    checkpoints: Path
    """Folder of the SAE's checkpoints, which has the note of its W&B run. The last state of its
    training is deleted: the training's job has ended, and will not need it again."""
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    load: LoadConfig = field(default_factory=LoadConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


def run(job: Job) -> None:
    from sae_core.corpus.token_file import TokenFile, check_tokenizer
    from sae_core.evaluation.identity import identity
    from sae_core.evaluation.metrics import evaluate, held_out_repeated, held_out_windows
    from sae_core.evaluation.unseen import ModelIdentity, check_model, check_texts
    from sae_core.formats.checkpoint import load_sae
    from sae_core.model_training.wandb_session import add_to_summary, evaluation_summary
    from sae_core.models.language_model import LanguageModel
    from sae_core.models.model_sources import ModelRecord
    from sae_core.trainer.resume import forget_states
    from sae_core.utils.devices import pick_device

    forget_states(job.checkpoints)
    sae, file = load_sae(job.sae), TokenFile.open(job.tokens)
    assert file.manifest is not None
    record = ModelRecord.load(job.record)
    check_texts(job.sae.name, sae.spec, f"--tokens {job.tokens}", file.manifest.data_sha256)
    check_model(job.sae.name, sae.spec, ModelIdentity.of(record), "--record")
    config = ModelConfig(model_name=record.path, **asdict(job.load))
    model = LanguageModel.load(config, pick_device(job.compute.device), sae.spec.window)
    check_tokenizer(job.tokens, file, model.tokenizer)
    windows = held_out_windows(sae.spec, model.tokenizer, file, job.evaluation.max_windows)
    figures = identity(job.sae.name, sae.spec, record.name) | evaluate(
        model, sae, windows, job.compute.batch_size
    )
    figures["held_out_repeated"] = held_out_repeated(sae.spec, file)
    write_file(job.output, json.dumps(figures, indent=1) + "\n")
    for name in ("l0", "fvu", "ce_clean", "ce_sae", "loss_recovered", "kl", "dead_fraction"):
        print(f"{name:>15} {figures[name]:.4f}")
    add_to_summary(job.tracking, job.checkpoints, evaluation_summary(figures))


if __name__ == "__main__":
    cli.run(run, Job, __doc__)
