"""The learning rate of each step."""

from sae_core.train_config import TrainingConfig

WARM_UP = 0.05
"""Share of the steps in which the learning rate rises to its peak."""

AUTO_LR, AUTO_LR_WIDTH = 4e-3, 4608
"""The learning rate `auto`, and the number of features that it is for."""


def peak_learning_rate(lr: float | str, d_sae: int) -> float:
    """`lr`, or the one for `d_sae` features when it is `auto`.

    It falls with the root of the width (Gao et al., arXiv 2406.04093, section A.3); the constant
    was measured on SmolLM2 with about a million tokens: docs/recipe.md.
    """
    return AUTO_LR * (AUTO_LR_WIDTH / d_sae) ** 0.5 if lr == "auto" else float(lr)


def learning_rate(
    step: int, n_steps: int, peak: float, decay: float = TrainingConfig.lr_decay
) -> float:
    """The learning rate of step `step` (from 0) of `n_steps`: a trapezium, which falls to zero over
    the share `decay` of the steps, the last ones."""
    rise = (step + 1) / max(1.0, WARM_UP * n_steps)
    fall = (n_steps - step) / max(1.0, decay * n_steps)
    return peak * min(1.0, rise, fall)
