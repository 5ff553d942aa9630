"""The weights of an SAE for one of another kind, or with more features.

At inference every kind but TopK is a gated SAE, with the gate's bias b_g and the magnitude's b_m:

    p = (x - b_dec) @ W_enc    f = relu(p exp(r) + b_m) where p + b_g > 0

A feature with a threshold theta has r = 0, b_m = b_enc and b_g = b_enc - theta, and the other way
round theta = b_m - exp(r) b_g. So between gated and JumpReLU, and to these from BatchTopK and
standard, nothing is lost. A standard SAE cannot have a threshold: the same features are active
there, each weaker by theta. BatchTopK has one threshold for all features and TopK none; where the
origin has others, they are found from activations.

Shapes: N tokens, D = d_in, F = d_sae.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae_core.sae import sparse_ops
from sae_core.sae_base import SparseAutoencoder


class Gated(NamedTuple):
    """An SAE as a gated one, its decoder rows of unit norm."""

    W_enc: Tensor
    gate_bias: Tensor
    magnitude_bias: Tensor
    r: Tensor
    W_dec: Tensor
    b_dec: Tensor
    is_known: bool
    """Whether the gate's bias is; a TopK SAE has none."""

    @property
    def encoder(self) -> Tensor:
        """(D, F) with the pre-activations of one path."""
        return self.W_enc * self.r.exp()

    @property
    def threshold(self) -> Tensor:
        """(F,) of the same SAE with one path."""
        return (self.magnitude_bias - self.r.exp() * self.gate_bias).clamp(min=0.0)


@torch.no_grad()
def take_over(sae: SparseAutoencoder, origin: SparseAutoencoder, x: Tensor) -> None:
    """Give the first features of `sae` the weights of `origin`; the others stay as they are.

    Args:
        sae: initialised; as many features as `origin` or more.
        origin: of any kind, on the same device and for activations in the same units.
        x: (N, D) activations, from which thresholds are found that `origin` does not have.
    """
    found, kind, own = _as_gated(origin), sae.spec.sae_type, _tensors_of(sae)
    if not found.is_known and kind in ("gated", "jumprelu", "standard"):
        found = found._replace(gate_bias=found.gate_bias - _threshold_for_k(origin, found, x))
    n = len(found.W_dec)
    own.W_enc[:, :n] = found.W_enc if kind == "gated" else found.encoder
    own.W_dec[:n] = found.W_dec
    own.b_dec.copy_(found.b_dec)
    own.b_enc[:n] = found.gate_bias if kind == "gated" else found.magnitude_bias
    if kind == "gated":
        own.r_mag[:n], own.b_mag[:n] = found.r, found.magnitude_bias
    elif kind == "jumprelu":
        own.threshold[:n] = found.threshold
    elif kind == "standard":
        own.b_enc[:n] -= found.threshold
    elif kind != "topk":  # one threshold for all
        one = found.threshold.mean()
        if found.is_known and torch.allclose(found.threshold, one, rtol=1e-4, atol=0.0):
            own.threshold.copy_(one)
        else:
            sae.calibrate(x)


def _tensors_of(sae: SparseAutoencoder) -> Any:
    """The SAE, of which each kind has tensors of its own. The kinds are not imported: a change of
    one would then be one of the code that trains the others."""
    return sae


def _as_gated(sae: SparseAutoencoder) -> Gated:
    has_threshold = sae.spec.sae_type != "topk" and sae.threshold is not None
    zero = torch.zeros_like(sae.b_enc)
    if sae.spec.sae_type == "gated":
        own = _tensors_of(sae)
        gate_bias, magnitude_bias, r = own.b_enc, own.b_mag, own.r_mag
    else:
        theta = sae.known_threshold if has_threshold else zero
        gate_bias, magnitude_bias, r = sae.b_enc - theta, sae.b_enc, zero
    norms = sae.W_dec.norm(dim=1)
    norms = torch.where(norms > 0, norms, 1.0)
    return Gated(
        W_enc=sae.W_enc * norms,
        gate_bias=gate_bias * norms,
        magnitude_bias=magnitude_bias * norms,
        r=r,
        W_dec=sae.W_dec / norms[:, None],
        b_dec=sae.b_dec,
        is_known=has_threshold,
    )


def _threshold_for_k(origin: SparseAutoencoder, found: Gated, x: Tensor) -> Tensor:
    """The one threshold with which tokens `x` have the origin's k active features on average."""
    weights = sparse_ops.Weights(
        found.encoder, found.magnitude_bias, found.W_dec, origin.input_bias
    )
    total = len(x) * origin.spec.top_k
    largest = sparse_ops.batch_topk(x, weights, total + 1).value
    if len(largest) <= total:  # fewer are positive
        return x.new_zeros(())
    return largest.topk(2, largest=False).values.mean()
