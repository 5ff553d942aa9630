"""Standard SAEs: ReLU and an L1 penalty (Bricken et al., "Towards Monosemanticity", 2023;
Cunningham et al., arXiv 2309.08600).

The code is dense while training: half of the features may be active at the start.
"""

from typing import Any

import torch
from torch import Tensor

from sae_core.sae import dense_ops, losses
from sae_core.sae.reconstruction import PLAIN, Compute, Reconstruction
from sae_core.sae_base import SparseAutoencoder


class StandardSAE(SparseAutoencoder):
    """`relu(pre)` in training and at inference; the threshold stays 0."""

    encoder_scale = 1.0

    def reconstruct(
        self, x: Tensor, target: Tensor | None = None, compute: Compute = PLAIN
    ) -> Reconstruction:
        pre = dense_ops.pre_activations(x, self.encoder, compute.values(x))
        code = torch.relu(pre)  # all of it is kept for the gradient
        active = code.detach() > 0
        return Reconstruction(
            x_hat=dense_ops.decode(code, self.weights),
            l1=losses.l1_loss(code, x.shape[0]),
            l0=float(active.sum()) / x.shape[0],
            fired=active.any(0),
            kind_loss=x.new_zeros(()),
        )

    def saelens_config(self) -> dict[str, Any]:
        return {"architecture": "standard"}

    def saelens_tensors(self) -> dict[str, Tensor]:
        return self.weights._asdict()
