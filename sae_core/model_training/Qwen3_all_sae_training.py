"""Train one BatchTopK SAE on each of several Qwen3 models: a loop over the single run."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

if not __package__:  # run as a file: import the package from the repository it lies in
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import tyro

from sae_core.model_training.one_run import Trained, check_services, train_one
from sae_core.sae.config import SAEConfig
from sae_core.settings.services import PublishingConfig, TrackingConfig
from sae_core.settings.texts import OutputConfig
from sae_core.train_config import (
    BatchSize,
    DataConfig,
    EndToEndConfig,
    HookConfig,
    ModelConfig,
    RunConfig,
    RuntimeConfig,
    TrainingConfig,
)
from sae_core.utils import cli
from sae_core.utils.errors import SAEError, one_line
from sae_core.utils.naming import model_id, own_name, same_name
from sae_core.utils.progress import quiet
from sae_core.utils.records import Dataclass


class MemoryPlan(NamedTuple):
    """Settings that fit a common GPU."""

    batch_size: BatchSize
    max_text_length: int


PLANS = {
    "Qwen/Qwen3-0.6B": MemoryPlan(8, 512),
    "Qwen/Qwen3-1.7B": MemoryPlan(4, 512),
    "Qwen/Qwen3-4B": MemoryPlan(2, 384),
    "Qwen/Qwen3-8B": MemoryPlan(1, 256),
    "Qwen/Qwen3-14B": MemoryPlan(1, 192),
    "Qwen/Qwen3-32B": MemoryPlan(1, 128),
}


Group = TypeVar("Group", bound=Dataclass)

GROUP = "qwen3_sae_batch"
"""W&B group of the runs, unless another is given."""


@dataclass(frozen=True)
class BatchModelConfig(ModelConfig):
    """The language models."""

    model_name: tyro.conf.Suppress[str] = ""
    model_id: tyro.conf.Suppress[None] = None
    models: tuple[str, ...] = tuple(PLANS)
    """Hub ids or local directories of the models to train on, one after the other."""


@dataclass(frozen=True)
class BatchSAEConfig(SAEConfig):
    """The SAEs: BatchTopK only."""

    sae_type: tyro.conf.Suppress[Literal["batch_topk"]] = "batch_topk"
    matryoshka_fractions: tyro.conf.Suppress[tuple[float, ...]] = SAEConfig.matryoshka_fractions
    init_from: tyro.conf.Suppress[None] = None


@dataclass(frozen=True)
class BatchHookConfig(HookConfig):
    """Where in each model the SAE sits: the middle layer."""

    hook_layer: tyro.conf.Suppress[None] = None


@dataclass(frozen=True)
class BatchOutputConfig(OutputConfig):
    """Where the data comes from and the results go."""

    run_name: tyro.conf.Suppress[None] = None


@dataclass(frozen=True)
class BatchDataConfig(DataConfig):
    """The texts, and how they become windows of tokens."""

    max_text_length: int | None = None  # type: ignore[assignment]  # `run` makes it an int
    """Length of a window in tokens; by default chosen by the model's size."""


@dataclass(frozen=True)
class BatchRuntimeConfig(RuntimeConfig):
    """Hardware settings. They do not change the trained SAEs beyond rounding."""

    batch_size: BatchSize | None = None  # type: ignore[assignment]  # `run` sets it
    """Windows per forward pass of the language model on a GPU, by default chosen by its size;
    `auto` takes about 16,384 tokens, and fewer when memory runs out (a CPU always uses about
    1,024)."""


@dataclass(frozen=True)
class BatchConfig:
    """The options of the batch pipeline."""

    model: BatchModelConfig = field(default_factory=BatchModelConfig)
    output: BatchOutputConfig = field(default_factory=BatchOutputConfig)
    data: BatchDataConfig = field(default_factory=BatchDataConfig)
    hook: BatchHookConfig = field(default_factory=BatchHookConfig)
    sae: BatchSAEConfig = field(default_factory=BatchSAEConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    runtime: BatchRuntimeConfig = field(default_factory=BatchRuntimeConfig)
    end_to_end: EndToEndConfig = field(default_factory=EndToEndConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    publishing: PublishingConfig = field(default_factory=PublishingConfig)

    def run(self, model_name: str) -> RunConfig:
        """The single run for one of the models; options from the command line take precedence."""
        plans = {same_name(name): plan for name, plan in PLANS.items()}
        plan = plans.get(
            same_name(model_name),
            MemoryPlan(RuntimeConfig.batch_size, DataConfig.max_text_length),
        )
        return RunConfig(
            model=_as(ModelConfig, self.model, model_name=model_name),
            output=_as(OutputConfig, self.output),
            data=_as(
                DataConfig,
                self.data,
                max_text_length=self.data.max_text_length or plan.max_text_length,
            ),
            hook=_as(HookConfig, self.hook),
            sae=_as(SAEConfig, self.sae),
            training=self.training,
            runtime=_as(
                RuntimeConfig, self.runtime, batch_size=self.runtime.batch_size or plan.batch_size
            ),
            end_to_end=self.end_to_end,
            tracking=replace(self.tracking, wandb_group=self.tracking.wandb_group or GROUP),
            publishing=self.publishing,
        )


def _as(group: type[Group], settings: object, **changes: object) -> Group:
    """`settings` as the plain `group` that it extends, with `changes`."""
    values = {field.name: getattr(settings, field.name) for field in fields(group)}
    return group(**values | changes)


def train_all(config: BatchConfig) -> None:
    """Train on one model after the other. A model that fails does not stop the rest, and a second
    call with the same settings does not train finished models again.

    Raises:
        SAEError: W&B or the Hub will not let the runs in; or some model failed, and the table that
            is printed says which and why.
    """
    _check_names(config.model.models)
    check_services(config.tracking, config.publishing)
    if config.runtime.gpus > 1:
        raise SAEError(
            "--gpus: this script uses 1; single_sae_training.py and the workflow can use more"
        )
    outcomes: dict[str, str] = {}
    done: list[Trained] = []
    failures: list[Exception] = []
    for name in config.model.models:
        try:
            with quiet(config.output.quiet):
                print(f"\n== {name}", flush=True)
                done.append(train_one(config.run(name), batch=True))
            outcomes[name] = str(done[-1].folder)
        except Exception as error:  # whatever it is, the other models are to be trained
            failures.append(error)
            outcomes[name] = f"FAILED: {one_line(error)}"
            print(outcomes[name], file=sys.stderr, flush=True)
    width = max(map(len, outcomes))
    print("\n" + "\n".join(f"{name:<{width}}  {outcome}" for name, outcome in outcomes.items()))
    if failures:
        failed = f"{len(failures)} of {len(outcomes)} models failed; see the table above"
        raise SAEError(failed) from failures[-1]

    from sae_core.trainer.resume import forget_states

    for trained in done:
        forget_states(trained.checkpoints)


def _check_names(models: tuple[str, ...]) -> None:
    """Check that no two models would write into one folder.

    Raises:
        SAEError: they have the same name.
    """
    named: dict[str, str] = {}
    for model in models:
        other = named.setdefault(same_name(model_id(own_name(model))), model)
        if other != model:
            raise SAEError(
                f"--models: {other} and {model} would have the same name, {own_name(model)}; train "
                "them one by one with single_sae_training.py, each with its own --model-id"
            )


def main(argv: Sequence[str] | None = None) -> None:
    cli.run(train_all, BatchConfig, "Train one BatchTopK SAE on each of several models.", argv)


if __name__ == "__main__":
    main()
