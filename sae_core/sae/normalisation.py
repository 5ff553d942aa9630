"""How raw activations enter the SAE: centred, scaled to `E||x||^2 = 1`, outliers left out."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from sae_core.utils.errors import SAEError

OUTLIER_FACTOR = 10.0
"""Tokens with an activation norm this many times the median are left out of training: attention
sinks, whose few directions would take up the whole loss."""


def beyond(x: Tensor, max_norm: float) -> Tensor:
    """(..., D) raw activations -> (...) bool: those that are longer than `max_norm`."""
    return x.float().norm(dim=-1) > max_norm


class Normalisation(NamedTuple):
    """How raw activations enter the SAE: `(x - mean) / scale`, outliers left out."""

    mean: Tensor
    """(D,) float32, on the SAE's device."""
    scale: float
    max_norm: float
    target: "Normalisation | None" = None
    """The normalisation of a transcoder's target. A token is an outlier if either activation is
    one: the input of an MLP is normalised and hides the outliers of its output."""

    @classmethod
    def measure(cls, x: Tensor) -> "Normalisation":
        """The normalisation computed from a sample (N, D) of training activations."""
        norms = x.norm(dim=1)
        max_norm = OUTLIER_FACTOR * float(norms.median())
        x = x[norms <= max_norm]
        mean = x.mean(0)
        scale = float((x - mean).pow(2).sum(1).mean().sqrt())
        if not math.isfinite(scale) or scale == 0:
            raise SAEError(
                f"the activations at this hook have scale {scale}: they are all alike, or overflow "
                "the model's number format (try --model-dtype bfloat16 or float32)"
            )
        return cls(mean, scale, max_norm)

    @classmethod
    def of_sites(cls, sites: "Iterable[Normalisation]") -> "Normalisation":
        """The normalisation of an SAE's activation, or of a transcoder's activation and target."""
        x, *target = sites
        return x._replace(target=target[0]) if target else x

    @property
    def sites(self) -> "list[Normalisation]":
        """What `of_sites` puts together."""
        x = self._replace(target=None)
        return [x] if self.target is None else [x, self.target]

    def __call__(self, x: Tensor) -> Tensor:
        """(N, D) raw activations -> (at most N, D) float32."""
        x = x.to(self.mean.device, torch.float32)
        return self.scaled(x[x.norm(dim=1) <= self.max_norm])

    def pair(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """(N, D) raw activations, or (N, 2 D) for a transcoder -> (at most N, D) x and target."""
        if self.target is None:
            return self(rows), None
        rows = rows.to(self.mean.device, torch.float32)
        x, target = rows.chunk(2, dim=1)
        kept = (x.norm(dim=1) <= self.max_norm) & (target.norm(dim=1) <= self.target.max_norm)
        return self.scaled(x[kept]), self.target.scaled(target[kept])

    def scaled(self, x: Tensor) -> Tensor:
        """(N, D) float32 raw activations -> as they enter the SAE."""
        return (x - self.mean) / self.scale

    @property
    def output(self) -> "Normalisation":
        """The normalisation of the SAE's output."""
        return self if self.target is None else self.target

    def raw(self, x_hat: Tensor) -> Tensor:
        """(N, D) output of the SAE -> raw activations."""
        return x_hat * self.output.scale + self.output.mean
