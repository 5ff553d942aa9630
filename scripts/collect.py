"""An SAE that a stream has trained -> its place among the SAEs."""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from sae_core.utils import cli
from sae_core.utils.files import writing
from sae_core.utils.naming import EXPORT_FILES


@dataclass(frozen=True)
class Job:
    """The SAE to collect."""

    sae: Path
    """SAE directory among those of the stream."""
    output: Path
    """SAE directory to write."""


def run(job: Job) -> None:
    for name in EXPORT_FILES:
        source, target = job.sae / name, job.output / name
        with writing(target, source.stat().st_size):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    print(f"SAE: {job.output}")


if __name__ == "__main__":
    cli.run(run, Job, __doc__)
