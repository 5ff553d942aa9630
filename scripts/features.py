"""One SAE directory and its texts -> the analysis of its features, as three files."""

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from sae_core.settings.steps import FeaturesConfig
from sae_core.train_config import ComputeConfig, LoadConfig, ModelConfig
from sae_core.utils import cli
from sae_core.utils.files import write_file, write_parts

if TYPE_CHECKING:
    from sae_core.evaluation.feature_files import Writer


@dataclass(frozen=True)
class Job:
    """The SAE to analyse."""

    sae: Path
    """SAE directory."""
    tokens: Path
    """Folder of the tokenised texts that it was trained on."""
    record: Path
    """The model's record."""
    entries: Path
    """JSON lines to write: every active feature, with its label and its windows."""
    table: Path
    """CSV file to write: every feature, with its label."""
    corpus: Path
    """JSON file to write: figures of all features together."""
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    load: LoadConfig = field(default_factory=LoadConfig)
    features: FeaturesConfig = field(default_factory=FeaturesConfig)


def run(job: Job) -> None:
    import torch

    from sae_core.corpus.token_file import TokenFile, check_tokenizer
    from sae_core.evaluation.calibration import calibrated
    from sae_core.evaluation.feature_figures import feature_figures
    from sae_core.evaluation.feature_files import Writer
    from sae_core.evaluation.features import Corpus, feature_table, tally_features
    from sae_core.evaluation.identity import identity
    from sae_core.evaluation.unseen import ModelIdentity, check_model
    from sae_core.evaluation.window_means import WindowMeans
    from sae_core.formats.checkpoint import load_sae
    from sae_core.models.language_model import LanguageModel
    from sae_core.models.model_sources import ModelRecord
    from sae_core.sae.precision import pick_precision
    from sae_core.utils.devices import pick_device
    from sae_core.utils.progress import progress_bar

    sae, file = load_sae(job.sae), TokenFile.open(job.tokens)
    record = ModelRecord.load(job.record)
    check_model(job.sae.name, sae.spec, ModelIdentity.of(record), "--record")
    config = ModelConfig(model_name=record.path, **asdict(job.load))
    model = LanguageModel.load(config, pick_device(job.compute.device), sae.spec.window)
    check_tokenizer(job.tokens, file, model.tokenizer)
    corpus = Corpus.read(file, sae.spec, job.features.corpus_windows)
    precision = pick_precision("float32", model.device)
    windows = corpus.windows.tokens
    n_windows = len(windows)
    sae = sae.to(model.device, torch.float32)
    means = WindowMeans() if job.features.probes else None
    batch_size = job.compute.batch_size
    with calibrated(model, sae, windows, batch_size) as calibration:
        tallies = tally_features(model, sae, corpus, job.features, batch_size, precision, means)
        with progress_bar("features", "window", n_windows) as bar:
            for tally in tallies:
                bar.update(tally.n_windows - bar.n)
        table = feature_table(sae, tally)
        further = feature_figures(
            model, sae, corpus, table, means, job.features, batch_size, precision
        )
    writer = Writer(model, sae, corpus, table)
    figures = identity(job.sae.name, sae.spec, record.name) | writer.corpus_figures()
    n_shown = save(job, writer, figures | calibration | further)
    print(
        f"{n_shown} of {sae.spec.d_sae} features are active on {tally.n_tokens} tokens "
        f"of {n_windows} windows"
    )


def save(job: Job, writer: "Writer", figures: dict[str, Any]) -> int:
    """Write the three files; returns how many features they have."""
    shown = writer.telling_order()
    lines = (json.dumps(entry, ensure_ascii=False) + "\n" for entry in writer.entries(shown))
    write_parts(job.entries, (line.encode() for line in lines))
    write_file(job.table, writer.rows())
    write_file(job.corpus, json.dumps(figures, ensure_ascii=False, indent=1) + "\n")
    return len(shown)


if __name__ == "__main__":
    cli.run(run, Job, __doc__)
