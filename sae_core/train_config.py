"""Every setting of a training run, grouped; each field's docstring is its command-line help.

The groups that change the trained SAE (`ModelConfig`, `HookConfig`, `SAEConfig`, `DataConfig`,
`TrainingConfig`, `EndToEndConfig`) are separate from the ones that do not (`RuntimeConfig`,
`OutputConfig`, `TrackingConfig`, `PublishingConfig`): the workflow retrains only for the former.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from sae_core.sae.config import TAGS, SAEConfig, SAEType
from sae_core.utils.errors import SAEError
from sae_core.utils.limits import (
    InConfiguration,
    Limits,
    NaturalFloat,
    NaturalInt,
    PositiveFloat,
    PositiveInt,
    Text,
    check_limits,
)
from sae_core.utils.naming import (
    MiddleLayerStrategy,
    check_model_name,
    check_repo_id,
    hook_label,
    own_name,
)

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


Settings = TypeVar("Settings")


def part_of(kind: type[Settings], settings: Any) -> Settings:
    """The settings of one of a dataclass's base classes alone."""
    own = fields(kind)  # type: ignore[arg-type]
    return kind(**{f.name: getattr(settings, f.name) for f in own})


@dataclass(frozen=True)
class FromEnvironment:
    """A default that an environment variable replaces, unchecked: an option that is given takes its
    place."""

    variable: str
    otherwise: str | None = None
    kind: Callable[[str], Any] = str
    """What makes the setting of the variable's text."""

    def __call__(self) -> Any:
        text = os.environ.get(self.variable)
        return self.kind(text) if text else self.otherwise


@dataclass(frozen=True)
class LoadConfig:
    """How the language model is loaded."""

    model_dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    """Number format of the language model; `auto` takes bfloat16 where the hardware is fast at it
    and float32 elsewhere."""

    load_in_4bit: bool = False
    """Quantise the model to 4 bits while loading (needs CUDA and bitsandbytes)."""

    trust_remote_code: bool = False
    """Fetch and run the Python code that ships with the model's repository."""


@dataclass(frozen=True)
class ModelConfig(LoadConfig):
    """The language model."""

    model_name: str = "Qwen/Qwen3-0.6B"
    """Hugging Face Hub id or local directory of the language model."""

    revision: Text | None = None
    """Branch, tag or commit of the model on the Hub, by default `main`."""

    model_id: str | None = None
    """Name of the model in run names, config.json and model cards; by default its Hub id, or the
    last part of its directory's path."""

    def __post_init__(self) -> None:
        check_limits(self)
        if self.model_id is not None:
            check_model_name(self.model_id, "--model-id")

    @property
    def name(self) -> str:
        """The model's name wherever others may read it; never a path."""
        return self.model_id or own_name(self.model_name)


@dataclass(frozen=True)
class WindowsConfig:
    """How texts become windows of tokens."""

    max_text_length: Annotated[int, Limits(minimum=2)] = 512
    """Length of a window in tokens, at most the model's context."""

    val_fraction: Annotated[
        float,
        Limits(minimum=0, exclusive_maximum=1),
        InConfiguration(Limits(exclusive_minimum=0, exclusive_maximum=1)),
    ] = 0.1
    """Share of the texts that is held out. Half of the held-out windows are for validation (early
    stopping, threshold), half for evaluation."""

    seed: NaturalInt = 420
    """Seed of everything random: split, crops, order, initial weights."""

    def __post_init__(self) -> None:
        check_limits(self)


@dataclass(frozen=True)
class DataConfig(WindowsConfig):
    """The texts, and how they become windows of tokens."""

    excluded_tokens: tuple[Text, ...] = ()
    """Tokens whose activations are left out of training and validation, such as `<|endoftext|>`,
    written as in the tokenizer's vocabulary. The evaluation neither counts nor replaces them. The
    model reads them as ever."""


@dataclass(frozen=True)
class HookConfig:
    """Where in the model the SAE sits."""

    hook_layer: NaturalInt | None = None
    """0-based layer; the middle one if omitted."""

    middle_layer_strategy: MiddleLayerStrategy = "lower"
    """Which of the two middle layers, if the number of layers is even."""

    hook_name: Text = "hook_resid_post"
    """TransformerLens name of the activation: hook_resid_pre, hook_resid_mid, hook_resid_post,
    hook_attn_out, hook_mlp_out or mlp.hook_in (the MLP's normalised input). Part of the run
    name."""

    target_hook_name: str = ""
    """Train a transcoder (arXiv 2406.11944), which predicts this later activation of the same
    layer from the one at --hook-name, for example hook_mlp_out from mlp.hook_in. Empty for an
    SAE. Part of the run name."""

    def __post_init__(self) -> None:
        check_limits(self)
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

    num_epochs: PositiveInt = 10
    """Passes over the training windows."""

    tokens_per_step: PositiveInt = 4096
    """Tokens per optimizer step. The batch top-k selects among all of them together."""

    lr: PositiveFloat | Literal["auto"] = 1e-3
    """Peak learning rate of Adam; `auto` takes 0.004 for 4,608 features, and otherwise scales it
    with 1 / sqrt(features). The rate rises over the first 5% of the steps and falls to zero over
    the last 20%."""

    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the encoder product, and on a GPU of the products with a code that is dense;
    `auto` takes bfloat16 where the hardware is fast at it. On a CPU it holds for the kinds with a
    top-k over the batch. Weights and their gradients are always in float32."""

    recon_weight: NaturalFloat = 1.0
    """Weight of the reconstruction error in the loss."""

    early_stopping_patience: NaturalInt = 2
    """Epochs without a better validation loss, the auxiliary loss left out, before training stops;
    0 never stops early."""

    early_stopping_min_delta: NaturalFloat = 0.0
    """Minimum decrease of the validation loss that counts as better."""

    def __post_init__(self) -> None:
        check_limits(self)


BatchSize = PositiveInt | Literal["auto"]
"""Windows, or as many as have about `PASS_TOKENS` tokens."""

PASS_TOKENS = 2**14
"""Tokens in one forward pass on a GPU, about: enough to keep one busy with a model of any size."""


def windows_per_pass(length: int, batch_size: BatchSize) -> int:
    """Windows of `length` tokens per forward pass on a GPU."""
    return max(1, PASS_TOKENS // length) if batch_size == "auto" else batch_size


@dataclass(frozen=True)
class ComputeConfig:
    """Where the language model computes, and how much at once."""

    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """Where to compute; `auto` takes CUDA, then Apple's MPS, then the CPU."""

    batch_size: BatchSize = 8
    """Windows per forward pass of the language model on a GPU; `auto` takes about 16,384 tokens,
    and fewer when memory runs out (a CPU always uses about 1,024)."""

    def __post_init__(self) -> None:
        check_limits(self)


@dataclass(frozen=True)
class RuntimeConfig(ComputeConfig):
    """Hardware settings. They do not change the trained SAE beyond rounding."""

    gpus: PositiveInt = 1
    """GPUs that share the training of one SAE; on the CPU, processes."""

    activation_batch_size: PositiveInt | Literal["auto"] = "auto"
    """Tokens that the SAE processes at once, and so the rows of the encoder product in memory;
    rounded to steps of 512, or fewer for a wide SAE."""

    log_freq: PositiveInt = 100
    """Steps between updates of the figures in the progress bar."""

    checkpoint_freq: NaturalInt = 2
    """Epochs between checkpoints; 0 keeps only the best one."""

    resume_minutes: NaturalFloat = 5.0
    """How often, in minutes, the resumable state is saved; 0 saves it after every step."""

    max_skipped: NaturalInt = 10
    """Consecutive batches that may be skipped because they contain NaN or infinite numbers; one
    more stops the training."""


@dataclass(frozen=True)
class HarvestConfig:
    """The workflow's store of activations."""

    passes: PositiveInt = 1
    """How many different random crops of the corpus are stored; epochs take them in turn. Disk use
    grows in proportion."""

    harvest_jobs: PositiveInt = 1
    """Jobs that split the pass of one model, each writing one shard."""

    store: bool = True
    """Store the activations. Without a store, one job runs the model and trains the SAEs of a batch
    of layers on what comes out of it; each epoch is another pass, over other crops."""

    layers_per_job: PositiveInt | None = None
    """Layers whose SAEs a job without a store trains, by default all of a model's that are to be
    trained. Each job runs the model up to the last of its layers, on a GPU of its own."""

    def __post_init__(self) -> None:
        check_limits(self)
        if self.store and self.layers_per_job:
            raise SAEError("--layers-per-job is for --no-store; give both or neither")
        if not self.store and (self.passes, self.harvest_jobs) != (1, 1):
            raise SAEError("--passes and --harvest-jobs are for a store; leave them out")


@dataclass(frozen=True)
class EvaluationConfig:
    """How an SAE is evaluated."""

    max_windows: PositiveInt = 256
    """Maximum number of held-out windows evaluated."""

    def __post_init__(self) -> None:
        check_limits(self)


@dataclass(frozen=True)
class FeaturesConfig:
    """What the analysis of an SAE's features reads, and what its page shows."""

    corpus_windows: PositiveInt = 4096
    """Maximum number of windows read; if there are more, an evenly spaced subset."""

    top_windows: PositiveInt = 10
    """Windows shown per feature, the ones in which it is most active."""

    context_tokens: PositiveInt = 40
    """Tokens shown per window."""

    map_features: NaturalInt = 1000
    """Features on the map, the ones with the most activation in total; 0 for no map."""

    probes: bool = True
    """Train linear probes for the texts' subjects on a few features, and on the activations."""

    absorption_words: NaturalInt = 2000
    """Words of the model's vocabulary, at most, on which absorption of first-letter features is
    measured; 0 to leave it out."""

    def __post_init__(self) -> None:
        check_limits(self)


@dataclass(frozen=True)
class CorpusConfig:
    """Texts of any form: a file, a folder of files, or a data set of the Hugging Face Hub."""

    data_path: Path | None = None
    """A JSON list of texts, JSON lines (also `.gz` and `.zst`), Parquet, a text file, or a folder
    of such files."""

    data_pattern: Text = "*"
    """Which files of a folder are read, in alphabetical order; `**/*.txt` also reads its
    subfolders. Hidden files never are."""

    dataset_id: Text | None = None
    """A data set of the Hugging Face Hub, in place of --data-path."""

    dataset_name: Text | None = None
    """Configuration of the data set, where it has several."""

    dataset_split: Text = "train"
    """Split of the data set."""

    dataset_revision: Text | None = None
    """Branch, tag or commit of the data set, by default `main`."""

    dataset_streaming: bool = False
    """Read the data set from the Hub as it is tokenised, and keep no copy of its files; otherwise
    they are downloaded into the Hub's cache."""

    text_field: Text = "text"
    """Field that has the text; `a.b` is a field in another one."""

    subject_field: Text | None = None
    """Field that names the subject of a text, which is shown on the pages of features."""

    subjects: tuple[Text, ...] = ()
    """Subjects that are read, by default all."""

    max_tokens: PositiveInt | None = None
    """Number of tokens after which no further text is read."""

    def __post_init__(self) -> None:
        check_limits(self)
        if self.dataset_id:
            check_repo_id(self.dataset_id, "--dataset-id")
            if self.data_path not in (None, DEFAULT_DATA_PATH):
                raise SAEError(
                    f"--dataset-id {self.dataset_id}: give either --dataset-id or --data-path"
                )
        elif self.data_path is None:
            raise SAEError("--data-path: give it, or --dataset-id for a data set of the Hub")
        if self.subjects and not self.subject_field:
            raise SAEError("--subjects needs --subject-field, the field that names the subject")

    @property
    def place(self) -> str:
        """The option that names the texts, with its value."""
        return (
            f"--dataset-id {self.dataset_id}"
            if self.dataset_id
            else f"--data-path {self.data_path}"
        )


@dataclass(frozen=True)
class TextsConfig(CorpusConfig):
    """Where the texts come from; an SAE is evaluated on those that it was trained on."""

    data_path: Path = DEFAULT_DATA_PATH
    """A JSON list of texts, JSON lines (also `.gz` and `.zst`), Parquet, a text file, or a folder
    of such files."""

    token_root: Path | None = field(default_factory=FromEnvironment("SAE_CORE_TOKENS", kind=Path))
    """Folder of the tokenised texts, which later runs on the same texts with the same tokenizer
    use; by default `tokens` in the cache (default: $SAE_CORE_TOKENS)."""


@dataclass(frozen=True)
class OutputConfig(TextsConfig):
    """Where the texts come from and the results go."""

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
    """Use the squared error of the later layers' residual streams. An error on the last layer,
    which has no later ones."""

    logit_kl_weight: NaturalFloat = 1e-2
    """Weight of the KL divergence. Unless the phase covers the whole of a training from random
    weights, the default gives it the same gradient norm as the reconstruction error; other values
    scale it proportionally."""

    block_mse_weight: NaturalFloat = 1e-3
    """Weight of the later layers' error, scaled in the same way."""

    block_mse_layers: tuple[NaturalInt, ...] = ()
    """0-based layers after the hook whose error counts; all of them if none is given."""

    end_to_end_fraction: Annotated[
        float,
        Limits(
            exclusive_minimum=0,
            maximum=1,
            hint="; without end-to-end losses, use --no-use-end-to-end",
        ),
    ] = 0.1
    """Share of the optimizer steps, at the end of the training, that use end-to-end losses; 1
    means every step, as for a short training that begins with an SAE (--init-from)."""

    def __post_init__(self) -> None:
        check_limits(self)
        if self.use_end_to_end and not (self.use_logit_kl or self.use_block_mse):
            raise SAEError(
                "--use-end-to-end needs --use-logit-kl or --use-block-mse; "
                "switch one of them on, or use --no-use-end-to-end"
            )
        if self.block_mse_layers and not self.use_block_mse:
            raise SAEError("--block-mse-layers needs --use-block-mse")


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


@dataclass(frozen=True)
class RunConfig:
    """Everything that one training run needs."""

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


@dataclass(frozen=True)
class SeveralConfig:
    """Several SAEs from one stream: all combinations of the layers, kinds and L0s given here. One
    pass of the language model feeds all of them, and each is the SAE that it would be alone."""

    hook_layers: tuple[NaturalInt, ...] = ()
    """0-based layers, in place of --hook-layer."""

    sae_types: tuple[SAEType, ...] = ()
    """Kinds of SAE, in place of --sae-type."""

    topks: tuple[PositiveInt, ...] = ()
    """L0s to train for, in place of --topk. A kind without one is trained once."""

    def __post_init__(self) -> None:
        check_limits(self)


@dataclass(frozen=True)
class RunsConfig(RunConfig):
    """The options of `single_sae_training.py`."""

    several: SeveralConfig = field(default_factory=SeveralConfig)

    def runs(self) -> list[RunConfig]:
        """A run for each SAE; they differ in the SAE and its layer alone.

        Raises:
            SAEError: several SAEs are to have one name, or to share several GPUs.
        """
        several, base = self.several, part_of(RunConfig, self)
        if several.hook_layers and self.hook.hook_layer is not None:
            raise SAEError("--hook-layers: give either --hook-layer or --hook-layers")
        layers = several.hook_layers or (self.hook.hook_layer,)
        kinds = several.sae_types or (self.sae.sae_type,)
        saes = [
            replace(self.sae, sae_type=kind, topk=k)
            for kind in kinds
            for k in (several.topks if "{k}" in TAGS[kind] and several.topks else (self.sae.topk,))
        ]
        runs = [
            replace(base, hook=replace(self.hook, hook_layer=layer), sae=sae)
            for layer in layers
            for sae in saes
        ]
        runs = list(dict.fromkeys(runs))
        if len(runs) > 1 and self.output.run_name:
            raise SAEError(
                f"--run-name {self.output.run_name}: {len(runs)} SAEs cannot have one name; leave "
                "it out, and each is named after its layer, kind and L0"
            )
        if len(runs) > 1 and self.runtime.gpus > 1:
            raise SAEError(
                f"--gpus {self.runtime.gpus}: several SAEs are trained from one stream on 1 GPU; "
                "leave it out, or start a run for each GPU with some of the layers"
            )
        return runs
