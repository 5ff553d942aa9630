"""How dense the code of a JumpReLU SAE is at the start. Without torch: the planner asks, too.

At the start an encoder's directions have the length `ENCODER_SCALE`, and biases are 0. So for
activations of `E||x||^2 = 1` and width d, pre-activations are close to normally distributed, with a
standard deviation of `ENCODER_SCALE / sqrt(d)`. All thresholds start where they leave `START` k
features per token active. A training step works on every pair of a token and a feature that is
above its threshold or less than half a `BANDWIDTH` below it (`sae/kinds/jumprelu.py`), which are
more: in wide activations up to half of all features.
"""

from statistics import NormalDist

ENCODER_SCALE = 0.3
"""Length of the encoder's directions at the start; the decoder's have length 1."""

START = 16
"""Active features per token at the start, as a multiple of k."""

BANDWIDTH = 0.03
"""eps, for activations of `E||x||^2 = 1`. What is within half of it is computed, too: a wider one
costs time."""


def pre_activations(d_in: int) -> NormalDist:
    """How pre-activations are distributed at the start, with an encoder of `ENCODER_SCALE`."""
    return NormalDist(sigma=ENCODER_SCALE * d_in**-0.5)


def active_at_start(d_sae: int, top_k: int) -> float:
    """Active features per token in the first step: `START` k, at most half of all."""
    return min(0.5 * d_sae, START * max(top_k, 1))


def threshold_at_start(d_in: int, d_sae: int, top_k: int) -> float:
    """The threshold that all features start with."""
    return pre_activations(d_in).inv_cdf(1 - active_at_start(d_sae, top_k) / d_sae)


def near_at_start(d_in: int, d_sae: int, top_k: int) -> float:
    """Features per token that the first step works on: those that are active, and those that are
    positive and near their threshold."""
    least = threshold_at_start(d_in, d_sae, top_k) - BANDWIDTH / 2
    return d_sae * (1 - pre_activations(d_in).cdf(max(0.0, least)))
