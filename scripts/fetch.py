"""Fetch a language model onto this machine and write a record of it."""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from sae_core.models.model_sources import FetchConfig, fetch
from sae_core.utils import cli


@dataclass(frozen=True)
class Job:
    """What to fetch, and where to record it."""

    model: FetchConfig
    output: Path
    """JSON file to write: the model's record."""


def run(job: Job) -> None:
    record = fetch(job.model)
    record.save(job.output)
    print(f"{record.name}: {record.n_layers} layers of width {record.d_model} in {record.path}")


if __name__ == "__main__":
    cli.run(run, Job, __doc__)
