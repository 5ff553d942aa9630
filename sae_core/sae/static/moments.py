"""What Adam keeps of a parameter's gradients, and how it moves the parameter by them."""

from typing import NamedTuple

from torch import Tensor

EPS = 1e-8
"""PyTorch's default, which `trainer/optimizer.py` uses."""


class Moments(NamedTuple):
    """Running means, shaped as the parameter lies in memory."""

    first: Tensor
    second: Tensor


class Rule(NamedTuple):
    """How Adam (Kingma, Ba, arXiv 1412.6980) moves the weights."""

    beta1: float
    beta2: float
    only_active: bool
    """Whether the encoder row, decoder row and bias of a feature stay where they are in a step that
    gives them no gradient, because the feature is active on no token. Their moments decay as ever.
    Otherwise the momentum of a rare feature's last gradient goes on moving it for some ten steps,
    by several times the learning rate, since its second moment is small."""


PLAIN = Rule(0.9, 0.999, only_active=False)
"""PyTorch's defaults."""

RULES = {"adam": PLAIN, "active_adam": Rule(0.9, 0.98, only_active=True)}
"""By the names in the settings."""
