"""The number of tokens per step, and the learning rate of each step.

`auto` stands for rules that were fitted to trainings of BatchTopK SAEs: docs/recipe.md has the
trials.
"""

import math
from dataclasses import replace
from typing import NamedTuple

from sae_core.train_config import OptimizerName, TrainingConfig

WARM_UP = 0.05
"""Share of the steps in which the learning rate rises to its peak."""

AUTO_TOKENS, AUTO_SIZE = 220 * 4096, 256
"""Tokens of a training, over all epochs, and the tokens per step `auto` for it."""

AUTO_LR_WIDTH, AUTO_LR_K, AUTO_LR_D, AUTO_LR_SIZE = 4608, 32, 576, 4096
"""Features, active features per token, width of the activation and tokens per step of the learning
rates in `AUTO_LR`."""


class SAESize(NamedTuple):
    """What the learning rate `auto` depends on of an SAE."""

    sae_type: str
    d_in: int
    d_sae: int
    top_k: int
    """0 of the kinds without one."""


class AutoRate(NamedTuple):
    """The learning rate `auto` of an optimizer."""

    lr: float
    """For a training on `AUTO_TOKENS`; an SAE of `AUTO_LR_WIDTH`, `AUTO_LR_K` and `AUTO_LR_D` has
    never a larger one."""
    size_power: float
    """It grows with this power of the tokens per step."""
    token_power: float
    """It falls with this power of the tokens of the training."""
    k_power: float
    """It falls with this power of k, if the kind has one."""
    d_power: float
    """It falls with this power of the width of the activation."""
    several_k: float
    """What it is times for a `multi_batch_topk` SAE."""


AUTO_LR: dict[OptimizerName, AutoRate] = {
    "adam": AutoRate(4e-3, 1 / 2, 1 / 3, k_power=0.0, d_power=1 / 2, several_k=1.0),
    "active_adam": AutoRate(6e-3, 1 / 3, 1 / 3, k_power=1 / 2, d_power=0.0, several_k=3 / 4),
}
"""Fitted with an `lr_decay` of 0.2 for `adam`, and of 0.9 for `active_adam`."""

LEAST_AUTO_SIZE, MOST_AUTO_SIZE = 256, 4096
"""Tokens per step that `auto` stays between."""


def step_size(training: TrainingConfig, n_rows: int) -> int:
    """Tokens per step of a training on `n_rows` activations an epoch.

    `auto` grows with the root of the tokens of the whole training, so that the number of steps
    grows with the root, too, and is rounded to a power of two (by its logarithm). It depends on
    nothing else: the SAEs that are trained from one stream take equal steps.
    """
    if training.tokens_per_step != "auto":
        return training.tokens_per_step
    n_tokens = max(1, training.num_epochs * n_rows)
    size = AUTO_SIZE * (n_tokens / AUTO_TOKENS) ** 0.5
    return min(max(2 ** round(math.log2(size)), LEAST_AUTO_SIZE), MOST_AUTO_SIZE)


def peak_learning_rate(
    optimizer: OptimizerName, sae: SAESize, tokens_per_step: int, n_tokens: int
) -> float:
    """The learning rate `auto` of an SAE that is trained on `n_tokens` in all.

    It falls with the root of the width (Gao et al., arXiv 2406.04093, section A.3). With Adam it
    grows with the root of the tokens per step (Malladi et al., arXiv 2205.10287), and falls with
    the third root of the tokens, which the trials have shown; and with the root of the width of the
    activation, since a step of Adam moves every coordinate by about as much, and so a
    pre-activation by more, the more coordinates it sums. `active_adam` moves a feature only in
    the steps in which it is active: a rare one as often whatever the size of a step, so that its
    rate would not grow at all. The trials have a third root for both, so that the rate depends on
    the number of steps alone, falls with the root of k, and is the same for any activation.
    """
    auto = AUTO_LR[optimizer]
    relative = (tokens_per_step / AUTO_LR_SIZE) ** auto.size_power
    relative *= (AUTO_TOKENS / n_tokens) ** auto.token_power
    of_kind = auto.lr * (auto.several_k if sae.sae_type == "multi_batch_topk" else 1.0)
    of_kind *= (AUTO_LR_K / sae.top_k) ** auto.k_power if sae.top_k else 1.0
    of_size = (AUTO_LR_WIDTH / sae.d_sae) ** 0.5 * (AUTO_LR_D / sae.d_in) ** auto.d_power
    return of_kind * of_size * min(relative, 1.0)


def resolved(
    training: TrainingConfig, sae: SAESize, tokens_per_step: int, steps_per_epoch: int
) -> TrainingConfig:
    """The settings with numbers in place of `auto`.

    Args:
        tokens_per_step, steps_per_epoch: of the source that it is trained on.
    """
    if training.tokens_per_step == "auto":
        training = replace(training, tokens_per_step=tokens_per_step)
    if training.lr == "auto":
        n_tokens = training.num_epochs * steps_per_epoch * tokens_per_step
        lr = peak_learning_rate(training.optimizer, sae, tokens_per_step, n_tokens)
        training = replace(training, lr=lr)
    return training


def learning_rate(
    step: int, n_steps: int, peak: float, decay: float = TrainingConfig.lr_decay
) -> float:
    """The learning rate of step `step` (from 0) of `n_steps`: a trapezium, which falls to zero over
    the share `decay` of the steps, the last ones."""
    rise = (step + 1) / max(1.0, WARM_UP * n_steps)
    fall = (n_steps - step) / max(1.0, decay * n_steps)
    return peak * min(1.0, rise, fall)


def travel(n_steps: int, peak: float, decay: float) -> float:
    """The sum of the learning rates of all steps."""
    return math.fsum(learning_rate(step, n_steps, peak, decay) for step in range(n_steps))
