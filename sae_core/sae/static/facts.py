"""What a step on the device records, and what decides whether it is taken."""

from itertools import islice
from typing import NamedTuple

from torch import Tensor

from sae_core.sae.static.moments import PLAIN, Rule


class Figures(NamedTuple):
    """What the host reads of a step: () float32 each."""

    loss: Tensor
    recon_loss: Tensor
    l1_loss: Tensor
    recon_contribution: Tensor
    l1_contribution: Tensor
    aux_loss: Tensor
    kind_loss: Tensor
    pairs: Tensor
    tokens: Tensor
    least: Tensor
    """The smallest value that the code kept."""
    aux_least: Tensor
    """The same of the auxiliary loss; NaN without dead features."""
    taken: Tensor
    """1 if the step was taken."""

    def terms(self) -> dict[str, Tensor]:
        """The loss and its terms, by their names in the history."""
        return dict(islice(self._asdict().items(), 7))


FIGURES = len(Figures._fields)


class Weighting(NamedTuple):
    """Of the terms in the loss."""

    recon: float
    l1: float
    aux: float


class Facts(NamedTuple):
    """What decides whether a step is taken, and what is written when it is."""

    finite: Tensor
    """() bool: every activation is."""
    sure: Tensor
    """() bool: no pair was missed."""
    lr: Tensor
    """() float64"""
    halted: Tensor
    """() bool: no step is taken until the host has looked; written."""
    counts: list[Tensor]
    """Four () float32: the steps that Adam has taken of each parameter; written."""
    at: Tensor
    """() int64: the line of the record that comes next; written."""
    record: Tensor
    """(lines, FIGURES) float32; written."""
    max_length: float
    """Of all gradients together."""
    rule: Rule = PLAIN
