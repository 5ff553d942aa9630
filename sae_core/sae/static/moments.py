"""What Adam keeps of a parameter's gradients."""

from typing import NamedTuple

from torch import Tensor

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8
"""PyTorch's defaults, which `trainer/optimizer.py` uses."""


class Moments(NamedTuple):
    """Running means, shaped as the parameter lies in memory."""

    first: Tensor
    second: Tensor
