"""Gated SAEs (Rajamanoharan et al.: "Improving Dictionary Learning with Gated Sparse Autoencoders",
arXiv 2404.16014).

A gate says which features are active, a magnitude path by how much. They share the encoder's
directions, and the L1 penalty acts only on the gate, so it does not shrink the magnitudes:

    gate = (x - b_dec) @ W_enc + b_enc    magnitude = (x - b_dec) @ (W_enc * exp(r_mag)) + b_mag
    f = [gate > 0] * relu(magnitude)

The gate has no gradient through the step. It learns from the penalty `||relu(gate)||_1` and from
what `relu(gate)` reconstructs with a decoder that is held fixed (equation 8), the `kind_loss`.
The code is dense while training, as that of the standard kind.
"""

from typing import Any

import torch
from torch import Tensor, nn

from sae_core.sae import dense_ops, losses, sparse_ops
from sae_core.sae.config import SAESpec
from sae_core.sae.precision import Precision
from sae_core.sae.reconstruction import PLAIN, Compute, Reconstruction
from sae_core.sae_base import SparseAutoencoder


class GatedSAE(SparseAutoencoder):
    """`b_enc` is the bias of the gate; the threshold stays 0."""

    in_units_of_x = (*SparseAutoencoder.in_units_of_x, "b_mag")

    def __init__(self, spec: SAESpec) -> None:
        super().__init__(spec)
        self.r_mag = nn.Parameter(torch.zeros(spec.d_sae))
        self.b_mag = nn.Parameter(torch.zeros(spec.d_sae))

    def encode(self, x: Tensor) -> Tensor:
        return self._features(self.pre_activations(x))

    def encode_sparse(self, x: Tensor, precision: Precision | None = None) -> sparse_ops.SparseCode:
        return self._encode_densely(x)

    def reconstruct(
        self, x: Tensor, target: Tensor | None = None, compute: Compute = PLAIN
    ) -> Reconstruction:
        # All of it is kept for the gradient.
        gate = dense_ops.pre_activations(x, self.encoder, compute.values(x))
        features, gated = self._features(gate), torch.relu(gate)
        active = features.detach() > 0
        fixed = sparse_ops.Weights(*(weight.detach() for weight in self.weights))
        by_gate = dense_ops.decode(gated, fixed)
        return Reconstruction(
            x_hat=dense_ops.decode(features, self.weights),
            l1=losses.l1_loss(gated, x.shape[0]),
            l0=float(active.sum()) / x.shape[0],
            fired=active.any(0),
            kind_loss=losses.reconstruction_loss(x if target is None else target, by_gate),
        )

    def shift_pre_activations(self, shift: Tensor) -> None:
        super().shift_pre_activations(shift)
        self.b_mag.add_(shift * self.r_mag.exp())

    def _features(self, gate: Tensor) -> Tensor:
        """(..., F) from the pre-activations of the gate, which both paths share up to a scale."""
        b_enc, scale, b_mag = (v.to(gate.dtype) for v in (self.b_enc, self.r_mag.exp(), self.b_mag))
        magnitude = (gate - b_enc) * scale + b_mag
        return torch.relu(magnitude) * (gate > 0)

    def saelens_config(self) -> dict[str, Any]:
        return {"architecture": "gated"}

    def saelens_tensors(self) -> dict[str, Tensor]:
        tensors = self.weights._asdict()
        tensors["b_gate"] = tensors.pop("b_enc")
        return tensors | {"r_mag": self.r_mag, "b_mag": self.b_mag}
