"""Every setting of a training run, grouped; each field's docstring is its command-line help.

The groups that change the trained SAE (`ModelConfig`, `HookConfig`, `SAEConfig`, `DataConfig`,
`TrainingConfig`, `EndToEndConfig`) are separate from the ones that do not (`RuntimeConfig`,
`OutputConfig`, `TrackingConfig`, `PublishingConfig`): the workflow retrains only for the former.
"""

import re
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Annotated, Literal

from sae_core.sae.config import TAGS, SAEConfig, SAEType
from sae_core.settings.groups import part_of
from sae_core.settings.services import PublishingConfig, TrackingConfig
from sae_core.settings.texts import OutputConfig
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


OptimizerName = Literal["adam", "active_adam"]


@dataclass(frozen=True)
class TrainingConfig:
    """How the SAE is trained."""

    num_epochs: PositiveInt = 10
    """Passes over the training windows."""

    tokens_per_step: PositiveInt | Literal["auto"] = 4096
    """Tokens per optimizer step. The batch top-k selects among all of them together. `auto` grows
    with the root of the tokens of the training, over all its epochs: 256 for up to 1.8 million,
    1,024 for 14 million, and 4,096 for 115 million or more. It is meant to go with an --lr of
    `auto`."""

    lr: PositiveFloat | Literal["auto"] = 1e-3
    """Peak learning rate of the optimizer; `auto` takes 0.004 for 4,608 features, 576 numbers in an
    activation, 4,096 tokens per step and up to 900,000 tokens of training. It falls with the root
    of the features, the root of the activation's width and the third root of the training's tokens,
    and grows with the root of those per step. With --optimizer active_adam it takes 0.006, and
    three quarters of that for the kind multi_batch_topk; this falls with the root of the features,
    the third root of the steps and, from its value at 32, the root of topk. The rate rises over the
    first 5% of the steps, and --lr-decay says when it falls."""

    lr_decay: Annotated[float, Limits(exclusive_minimum=0, maximum=1)] = 0.2
    """Share of the steps, the last ones, over which the learning rate falls to zero."""

    optimizer: OptimizerName = "adam"
    """`active_adam` moves a feature only in the steps in which it is active on some token; its
    decoder row has no second moment and moves by the same length as all others, and for the rest
    the second moment is 0.98 instead of 0.999. Fewer features die, and the learning rate can be
    larger. It is meant to go with an --lr-decay of 0.9."""

    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the encoder product, and on a GPU of the products with a code that is dense;
    `auto` takes bfloat16 where the hardware is fast at it. On a CPU it holds for the kinds with a
    top-k over the batch. Weights and their gradients are always in float32."""

    recon_weight: NaturalFloat = 1.0
    """Weight of the reconstruction error in the loss."""

    early_stopping_patience: NaturalInt = 2
    """Epochs without a lower validation loss, which leaves out the auxiliary loss, before training
    stops; 0 never stops early."""

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

    end_to_end_stride: PositiveInt = 1
    """In the phase, one window in this many has the end-to-end losses, in training and validation,
    which saves most of a step's time; the others have the reconstruction error alone. Losses and
    gradients are unbiased estimates of those of all windows."""

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
