"""One SAE directory and its evaluation -> the Hub, and a marker file."""

import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from sae_core.settings.services import RepoConfig, TrackingConfig
from sae_core.utils import cli
from sae_core.utils.errors import SAEError


@dataclass(frozen=True)
class Job:
    """The SAE to upload."""

    sae: Path
    """Final SAE directory; its name is the folder's in the repository."""
    marker: Path
    """JSON file to write after the upload: repository, commit and the SHA-256 of every file."""
    evaluation: Path | None = None
    """The SAE's evaluation, JSON."""
    labels: Path | None = None
    """Labels of its features by a language model, JSON lines."""
    features: Path | None = None
    """What its features fire on, CSV."""
    checkpoints: Path | None = None
    """Folder of its checkpoints, which has the note of its W&B run."""
    dry_run: bool = False
    """Print what would be sent, and send nothing."""
    repo: RepoConfig = field(default_factory=RepoConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


def run(job: Job) -> None:
    if not job.repo.hf_repo_id:
        raise SAEError("--hf-repo-id: name the repository, owner/name, or set SAE_HF_REPO_ID")

    from sae_core.model_training.wandb_session import add_to_summary
    from sae_core.publishing import hub
    from sae_core.publishing.model_card import SAEFacts

    if job.dry_run:
        facts = SAEFacts.read(job.sae, job.evaluation, job.repo, job.labels, job.features)
        print(f"would be sent to {job.repo.hf_repo_id}, plus a line in its README.md:")
        for name, content in hub.run_files(job.sae, job.evaluation, facts).items():
            size = len(content) if isinstance(content, bytes) else content.stat().st_size
            print(f"{size:>12,}  {name}")
        return
    marker = hub.upload(job.sae, job.evaluation, job.repo, job.labels, job.features)
    marker.save(job.marker)
    print(f"uploaded: {marker.url}")
    if job.checkpoints is not None:
        add_to_summary(job.tracking, job.checkpoints, marker.summary)


if __name__ == "__main__":
    cli.run(run, Job, __doc__)
