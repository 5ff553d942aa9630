"""What an optimizer keeps of a parameter's gradients, and the rule by which it moves them."""

from typing import NamedTuple

from torch import Tensor

EPS = 1e-8
"""PyTorch's default, which `trainer/optimizer.py` uses."""

LEAST_LENGTH = 1e-12
"""A momentum is divided by its length, or by this if it is shorter."""


class Moments(NamedTuple):
    """Running means, shaped as the parameter lies in memory."""

    first: Tensor
    second: Tensor | None
    """None of a decoder that moves by normalised steps."""


class Rule(NamedTuple):
    """How the weights move: by Adam (Kingma, Ba, arXiv 1412.6980), or by `active_adam`, see
    `trainer/optimizer.py`."""

    beta1: float
    beta2: float
    decoder_lr_scale: float
    """The decoder's learning rate, as a multiple of the others'."""
    only_active: bool
    """Whether what belongs to a feature stays where it is in a step that gives it no gradient,
    because the feature is active on no token, and decoder rows move by normalised steps."""


PLAIN = Rule(0.9, 0.999, decoder_lr_scale=2.0, only_active=False)
"""PyTorch's moments. What makes features die is the encoder's learning rate, which cannot be as
large as the decoder's: docs/recipe.md."""

RULES = {
    "adam": PLAIN,
    "active_adam": Rule(0.9, 0.98, decoder_lr_scale=14.0, only_active=True),
}
"""By the names in the settings. The second multiple is that of a whole row's length: 14 learning
rates. Adam moves each of a row's D numbers by about its learning rate, and so a row by D^1/2."""
