"""Every setting of a training run, grouped; each field's docstring is its command-line help.

The groups that change the trained SAE (`ModelConfig`, `HookConfig`, `SAEConfig`, `DataConfig`,
`TrainingConfig`, `EndToEndConfig`) are separate from the ones that do not (`RuntimeConfig`,
`OutputConfig`, `TrackingConfig`, `PublishingConfig`): the workflow retrains only for the former.
"""

import math
import os
import re
from dataclasses import dataclass, field, fields
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from sae_core.errors import SAEError
from sae_core.naming import (
    MiddleLayerStrategy,
    check_model_name,
    check_repo_id,
    hook_label,
    own_name,
)
from sae_core.sae_config import SAEConfig

HOOK_NAME = re.compile(r"\w+(\.\w+)*", re.ASCII)
FULL_NAME = re.compile(r"blocks\.([0-9]+)\.(.+)", re.ASCII)
HOOK_NAMES = (
    "hook_resid_pre",
    "hook_attn_out",
    "hook_resid_mid",
    "mlp.hook_in",
    "hook_mlp_out",
    "hook_resid_post",
)
"""The activations of a block, by TransformerLens's names, in the order in which they arise."""

DEFAULT_DATA_PATH = Path("sae_core/data/processed_data/processed_textbooks_all.json")

MOST_FEATURES = 600
"""On one page of features: some 10 MB with the default windows."""


def _at_least(owner: object, least: float, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if value is not None and not least <= value < math.inf:
            raise SAEError(f"--{name.replace('_', '-')} {value}: must be at least {least}")


@dataclass(frozen=True)
class LoadConfig:
    """How the language model is loaded."""

    model_dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    """Number format of the language model; `auto` takes bfloat16 where the hardware is fast at it
    and float32 elsewhere."""

    load_in_4bit: bool = False
    """Quantise the model to 4 bits while loading (needs CUDA and bitsandbytes)."""

    trust_remote_code: bool = False
    """Run the Python code that ships with the model's repository."""


@dataclass(frozen=True)
class ModelConfig(LoadConfig):
    """The language model."""

    model_name: str = "Qwen/Qwen3-0.6B"
    """Hugging Face Hub id or local directory of the language model."""

    revision: str | None = None
    """Branch, tag or commit of the model on the Hub."""

    model_id: str | None = None
    """Name of the model in run names, config.json and model cards; by default its Hub id, or the
    last part of its directory's path."""

    def __post_init__(self) -> None:
        if self.model_id is not None:
            check_model_name(self.model_id, "--model-id")

    @property
    def name(self) -> str:
        """The model's name wherever others may read it; never a path."""
        return self.model_id or own_name(self.model_name)


@dataclass(frozen=True)
class DataConfig:
    """The texts, and how they become windows of tokens."""

    max_text_length: int = 512
    """Length of a window in tokens."""

    val_fraction: float = 0.1
    """Share of the texts that is held out. Half of the held-out windows are for validation, half
    for evaluation."""

    seed: int = 420
    """Seed of everything random: split, crops, order, initial weights."""

    def __post_init__(self) -> None:
        _at_least(self, 2, "max_text_length")
        _at_least(self, 0, "seed")
        if not 0 <= self.val_fraction < 1:
            raise SAEError(f"--val-fraction {self.val_fraction}: must be at least 0 and below 1")


@dataclass(frozen=True)
class HookConfig:
    """Where in the model the SAE sits."""

    hook_layer: int | None = None
    """0-based layer; the middle one if omitted."""

    middle_layer_strategy: MiddleLayerStrategy = "lower"
    """Which of the two middle layers, if the number of layers is even."""

    hook_name: str = "hook_resid_post"
    """TransformerLens name of the activation: hook_resid_pre, hook_resid_mid, hook_resid_post,
    hook_attn_out, hook_mlp_out or mlp.hook_in (the MLP's normalised input)."""

    target_hook_name: str = ""
    """Train a transcoder (arXiv 2406.11944), which predicts this later activation of the same
    layer from the one at --hook-name, for example hook_mlp_out from mlp.hook_in. Empty for an
    SAE."""

    def __post_init__(self) -> None:
        _at_least(self, 0, "hook_layer")
        for option in ("hook_name", "target_hook_name"):
            if found := FULL_NAME.fullmatch(getattr(self, option)):
                raise SAEError(
                    f"--{option.replace('_', '-')} {found[0]}: give only the name, {found[2]}, "
                    f"and the layer separately, as --hook-layer {found[1]}"
                )
        if not HOOK_NAME.fullmatch(self.hook_name):
            raise SAEError(f"--hook-name {self.hook_name!r}: not the name of an activation")
        names = (self.hook_name, self.target_hook_name)
        if self.target_hook_name and names not in combinations(HOOK_NAMES, 2):
            raise SAEError(
                f"--target-hook-name {self.target_hook_name}: a transcoder goes from --hook-name "
                f"to a hook that comes after it, and the order is {', '.join(HOOK_NAMES)}"
            )

    @property
    def label(self) -> str:
        """The hooks in a run name."""
        return hook_label(self.hook_name, self.target_hook_name)


@dataclass(frozen=True)
class TrainingConfig:
    """How the SAE is trained."""

    num_epochs: int = 10
    """Passes over the training windows."""

    tokens_per_step: int = 4096
    """Tokens per optimizer step. The batch top-k selects among all of them together."""

    lr: float | Literal["auto"] = 1e-3
    """Peak learning rate of Adam; `auto` takes 0.004 for 4,608 features, and otherwise scales it
    with 1 / sqrt(features)."""

    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the encoder product; `auto` takes bfloat16 where the hardware is fast at
    it. Weights, sums and gradients are always in float32."""

    recon_weight: float = 1.0
    """Weight of the reconstruction error in the loss."""

    early_stopping_patience: int = 2
    """Epochs without a better validation loss, the auxiliary loss left out, before training stops;
    0 never stops early."""

    early_stopping_min_delta: float = 0.0
    """Minimum decrease of the validation loss that counts as better."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "num_epochs", "tokens_per_step")
        _at_least(self, 0, "recon_weight", "early_stopping_patience", "early_stopping_min_delta")
        if self.lr != "auto" and not 0 < self.lr < math.inf:
            raise SAEError(f"--lr {self.lr}: must be above 0")


@dataclass(frozen=True)
class RuntimeConfig:
    """Hardware settings. They do not change the trained SAE beyond rounding."""

    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """Where to compute; `auto` takes CUDA, then Apple's MPS, then the CPU."""

    gpus: int = 1
    """GPUs that share the training of one SAE; with --device cpu, processes."""

    batch_size: int = 8
    """Windows per forward pass of the language model on a GPU (a CPU always uses about 1,024
    tokens)."""

    activation_batch_size: int | Literal["auto"] = "auto"
    """Tokens that the SAE processes at once, and so the rows of the encoder product in memory;
    rounded to steps of 512, or fewer for a wide SAE."""

    log_freq: int = 100
    """Steps between updates of the figures in the progress bar."""

    checkpoint_freq: int = 2
    """Epochs between checkpoints; 0 keeps only the best one."""

    resume_minutes: float = 5.0
    """How often, in minutes, the resumable state is saved; 0 saves it after every step."""

    max_skipped: int = 10
    """Consecutive batches that may be skipped because they contain NaN or infinite numbers; one
    more stops the training."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "gpus", "batch_size", "log_freq")
        _at_least(self, 0, "checkpoint_freq", "resume_minutes", "max_skipped")
        if self.activation_batch_size != "auto":
            _at_least(self, 1, "activation_batch_size")


@dataclass(frozen=True)
class HarvestConfig:
    """The workflow's store of activations."""

    passes: int = 1
    """How many different random crops of the corpus are stored; epochs take them in turn."""

    harvest_jobs: int = 1
    """Jobs that split the pass of one model."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "passes", "harvest_jobs")


@dataclass(frozen=True)
class EvaluationConfig:
    """How an SAE is evaluated."""

    max_windows: int = 256
    """Maximum number of held-out windows evaluated."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "max_windows")


@dataclass(frozen=True)
class FeaturesConfig:
    """What the analysis of an SAE's features reads, and what its page shows."""

    corpus_windows: int = 4096
    """Maximum number of windows read; if there are more, an evenly spaced subset."""

    interesting_features: int = 120
    """Features shown because they are strong, in the texts as a whole or in one subject."""

    random_features: int = 60
    """Features shown at random, from the remaining active ones."""

    top_windows: int = 10
    """Windows shown per feature, the ones in which it is most active."""

    context_tokens: int = 40
    """Tokens shown per window."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "corpus_windows", "top_windows", "context_tokens")
        _at_least(self, 0, "interesting_features", "random_features")
        shown = self.interesting_features + self.random_features
        if not 1 <= shown <= MOST_FEATURES:
            raise SAEError(
                f"--interesting-features {self.interesting_features}, --random-features "
                f"{self.random_features}: together 1 to {MOST_FEATURES}, or the page grows too "
                "large to open"
            )


@dataclass(frozen=True)
class OutputConfig:
    """Where the data comes from and the results go."""

    data_path: Path = DEFAULT_DATA_PATH
    """JSON file with a list of texts."""

    output_root: Path = Path("sae_core/pretrained_models")
    """Folder of the final SAE directories."""

    checkpoint_root: Path = Path("sae_core/checkpoints")
    """Folder of the checkpoints."""

    run_name: str | None = None
    """Name of the SAE's folder; built from model, hook and SAE if omitted."""

    quiet: bool = False
    """Print only the SAE's path and errors."""


@dataclass(frozen=True)
class EndToEndConfig:
    """Losses on what the language model does with the reconstruction."""

    use_end_to_end: bool = True
    """Add end-to-end losses in the last part of the training."""

    use_logit_kl: bool = True
    """Use the KL divergence of the spliced model's predictions from the unmodified model's."""

    use_block_mse: bool = False
    """Use the squared error of the later layers' residual streams."""

    logit_kl_weight: float = 1e-2
    """Weight of the KL divergence. Unless the phase covers the whole training, the default gives
    it the same gradient norm as the reconstruction error; other values scale it proportionally."""

    block_mse_weight: float = 1e-3
    """Weight of the later layers' error, scaled in the same way."""

    block_mse_layers: tuple[int, ...] = ()
    """0-based layers after the hook whose error counts; all of them if omitted."""

    end_to_end_fraction: float = 0.1
    """Share of the optimizer steps, at the end of the training, that use end-to-end losses; 1
    means every step."""

    def __post_init__(self) -> None:
        _at_least(self, 0, "logit_kl_weight", "block_mse_weight")
        if not 0 < self.end_to_end_fraction <= 1:
            raise SAEError(
                f"--end-to-end-fraction {self.end_to_end_fraction}: must be above 0 and at most 1; "
                "without end-to-end losses, use --no-use-end-to-end"
            )
        if self.use_end_to_end and not (self.use_logit_kl or self.use_block_mse):
            raise SAEError(
                "--use-end-to-end needs --use-logit-kl or --use-block-mse; "
                "switch one of them on, or use --no-use-end-to-end"
            )
        if min(self.block_mse_layers, default=0) < 0:
            raise SAEError(f"--block-mse-layers {min(self.block_mse_layers)}: must be at least 0")
        if self.block_mse_layers and not self.use_block_mse:
            raise SAEError("--block-mse-layers needs --use-block-mse")


def _environment(name: str, default: str | None = None) -> Any:
    """What a field has by default, unchecked: an option that is given takes its place."""
    return os.environ.get(name) or default


@dataclass(frozen=True)
class TrackingConfig:
    """Weights & Biases."""

    wandb: bool = False
    """Track the run with Weights & Biases."""

    wandb_project: str = field(
        default_factory=lambda: _environment("WANDB_PROJECT", "sae-training")
    )
    """Project (default: $WANDB_PROJECT, else sae-training)."""

    wandb_entity: str | None = field(default_factory=lambda: _environment("WANDB_ENTITY"))
    """Team or user (default: $WANDB_ENTITY)."""

    wandb_mode: Literal["online", "offline", "disabled"] = field(
        default_factory=lambda: _environment("WANDB_MODE", "online")
    )
    """Send as it happens, store for `wandb sync`, or do neither (default: $WANDB_MODE, else
    online)."""

    wandb_group: str | None = field(default_factory=lambda: _environment("WANDB_RUN_GROUP"))
    """Group that the run belongs to (default: $WANDB_RUN_GROUP)."""

    wandb_tags: tuple[str, ...] = ()
    """Tags of the run."""

    wandb_notes: str | None = None
    """A note on the run."""

    wandb_log_final_artifact: bool = False
    """Also store the final SAE directory as an artifact; checkpoints never."""

    def __post_init__(self) -> None:
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

    hf_repo_id: str | None = field(default_factory=lambda: _environment("SAE_HF_REPO_ID"))
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
        return RepoConfig(**{f.name: getattr(self, f.name) for f in fields(RepoConfig)})


@dataclass(frozen=True)
class RunConfig:
    """Everything that one training run needs: the options of `single_sae_training.py`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    data: DataConfig = field(default_factory=DataConfig)
    hook: HookConfig = field(default_factory=HookConfig)
    sae: SAEConfig = field(default_factory=SAEConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    end_to_end: EndToEndConfig = field(default_factory=EndToEndConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    publishing: PublishingConfig = field(default_factory=PublishingConfig)
