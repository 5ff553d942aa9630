"""What the benchmark of quality measures of an SAE, whichever library it is of."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sae_core.sae.losses import fraction_of_variance_unexplained

ROWS = 512
"""Tokens whose dense code is in memory at once."""


class Data(NamedTuple):
    """Normalised activations: the steps' batches, and two disjoint held-out parts."""

    batches: list[Tensor]
    calibration: Tensor
    held_out: Tensor


class Trained(NamedTuple):
    """An SAE after training."""

    pre: Callable[[Tensor], Tensor]
    """(N, D) -> (N, F) pre-activations."""
    decode: Callable[[Tensor], Tensor]
    threshold: float


class AtThreshold(NamedTuple):
    """What an SAE is like at a threshold."""

    fvu: float
    """Pooled over the tokens."""
    l0: float
    dead: float
    """Share of the features that are active on no token."""


@torch.no_grad()
def at_threshold(sae: Trained, x: Tensor, threshold: float) -> AtThreshold:
    """The figures on tokens (N, D)."""
    error, n_active, fired = 0.0, 0, torch.zeros_like(sae.pre(x[0]), dtype=torch.bool)
    for rows in x.split(ROWS):
        pre = sae.pre(rows)
        code = torch.relu(pre) * (pre > threshold)
        error += float((sae.decode(code) - rows).pow(2).sum())
        n_active += int((code > 0).sum())
        fired |= (code > 0).any(0)
    fvu = fraction_of_variance_unexplained(error, x.pow(2).sum(), x.sum(0), len(x))
    return AtThreshold(fvu, n_active / len(x), 1 - float(fired.float().mean()))


@torch.no_grad()
def threshold_for(sae: Trained, x: Tensor, l0: float) -> float:
    """The threshold at which (N, D) tokens have `l0` active features on average."""
    total = round(l0 * len(x))
    largest = [torch.relu(sae.pre(rows)).flatten() for rows in x.split(ROWS)]
    kept = torch.cat([part[part > 0] for part in largest])
    return float(kept.kthvalue(max(1, len(kept) - total)).values)


def at_l0(sae: Trained, x: Tensor, l0: float) -> AtThreshold:
    """The figures at the threshold that gives the tokens (N, D) this L0."""
    return at_threshold(sae, x, threshold_for(sae, x, l0))
