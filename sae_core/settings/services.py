"""Whom a training reports to: Weights & Biases, and the Hugging Face Hub."""

from dataclasses import dataclass, field
from typing import Literal

from sae_core.settings.groups import FromEnvironment, part_of
from sae_core.utils.errors import SAEError
from sae_core.utils.limits import Text, check_limits
from sae_core.utils.naming import check_repo_id


@dataclass(frozen=True)
class TrackingConfig:
    """Weights & Biases."""

    wandb: bool = False
    """Track the run with Weights & Biases."""

    wandb_project: Text = field(default_factory=FromEnvironment("WANDB_PROJECT", "sae-training"))
    """Project (default: $WANDB_PROJECT, else sae-training)."""

    wandb_entity: str | None = field(default_factory=FromEnvironment("WANDB_ENTITY"))
    """Team or user (default: $WANDB_ENTITY)."""

    wandb_mode: Literal["online", "offline", "disabled"] = field(
        default_factory=FromEnvironment("WANDB_MODE", "online")
    )
    """`online` sends as it happens, `offline` stores for `wandb sync`, `disabled` does neither
    (default: $WANDB_MODE, else online)."""

    wandb_group: str | None = field(default_factory=FromEnvironment("WANDB_RUN_GROUP"))
    """Group that the run belongs to (default: $WANDB_RUN_GROUP)."""

    wandb_tags: tuple[str, ...] = ()
    """Tags of the run."""

    wandb_notes: str | None = None
    """A note on the run."""

    wandb_log_final_artifact: bool = False
    """Also store the final SAE directory as an artifact; checkpoints never."""

    def __post_init__(self) -> None:
        check_limits(self)
        if self.wandb_mode not in ("online", "offline", "disabled"):
            raise SAEError(
                f"WANDB_MODE={self.wandb_mode}: must be online, offline or disabled; or give "
                "--wandb-mode"
            )
        if self.wandb_log_final_artifact and not self.wandb:
            raise SAEError("--wandb-log-final-artifact needs --wandb; give both or neither")


@dataclass(frozen=True)
class RepoConfig:
    """A repository on the Hugging Face Hub, and what its model cards say."""

    hf_repo_id: str | None = field(default_factory=FromEnvironment("SAE_HF_REPO_ID"))
    """Repository to upload to, `owner/name` (default: $SAE_HF_REPO_ID)."""

    hf_private: bool = False
    """Upload to a private repository only: a new one is created private, a public one is
    refused."""

    hf_license: str | None = None
    """License of the SAEs, as the Hub names it (mit, apache-2.0), for the model card."""

    hf_base_model: str | None = None
    """Hub id of the language model, for the model card; by default its name, if that is a Hub
    id."""

    hf_dataset: str | None = None
    """Hub id of the dataset that the texts come from, for the model card."""

    def __post_init__(self) -> None:
        for option in ("hf_repo_id", "hf_base_model", "hf_dataset"):
            if getattr(self, option):
                check_repo_id(getattr(self, option), f"--{option.replace('_', '-')}")


@dataclass(frozen=True)
class PublishingConfig(RepoConfig):
    """The Hugging Face Hub."""

    upload_to_hf: bool = False
    """Upload the final SAE directory."""

    def __post_init__(self) -> None:
        if self.upload_to_hf and not self.hf_repo_id:
            raise SAEError(
                "--upload-to-hf needs a repository: give --hf-repo-id owner/name or set "
                "SAE_HF_REPO_ID"
            )
        super().__post_init__()

    @property
    def repo(self) -> RepoConfig:
        """Only the settings of the repository."""
        return part_of(RepoConfig, self)
