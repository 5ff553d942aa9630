"""Texts -> a folder of their tokens, which every model with this tokenizer shares."""

import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from sae_core.settings.texts import CorpusConfig, TextsConfig
from sae_core.train_config import ModelConfig
from sae_core.utils import cli
from sae_core.utils.errors import SAEError
from sae_core.utils.limits import PositiveInt, check_limits


@dataclass(frozen=True)
class Job:
    """The texts, and the tokenizer."""

    tokenizer: str
    """Directory of a model with the tokenizer."""
    output: Path
    """Folder to write."""
    processes: PositiveInt = 1
    """Processes that tokenise."""
    corpus: CorpusConfig = field(default_factory=TextsConfig)
    trust_remote_code: bool = False
    """Run the Python code that ships with the model's repository."""

    def __post_init__(self) -> None:
        check_limits(self)


def run(job: Job) -> None:
    from sae_core.corpus.corpora import read_corpus
    from sae_core.corpus.tokenise import tokenise
    from sae_core.models.loading import load_tokenizer

    corpus = read_corpus(job.corpus)
    config = ModelConfig(model_name=job.tokenizer, trust_remote_code=job.trust_remote_code)
    try:
        tokenizer = load_tokenizer(config)
    except SAEError as error:
        raise SAEError(str(error).replace("--model-name", "--tokenizer")) from error
    manifest = tokenise(corpus, tokenizer, job.output, job.processes)
    print(f"{manifest.n_texts:,} texts, {manifest.n_tokens:,} tokens")


if __name__ == "__main__":
    cli.run(run, Job, __doc__)
