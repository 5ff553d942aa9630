"""TopK SAEs (Gao et al.: "Scaling and evaluating sparse autoencoders", arXiv 2406.04093).

Every token keeps its k largest pre-activations, in training and at inference, so there is no
threshold to calibrate. Fewer than k are active if fewer are positive.
"""

from typing import Any

import torch
from torch import Tensor

from sae_core.sae import sparse_ops
from sae_core.sae.precision import Precision
from sae_core.sae.reconstruction import PLAIN, Compute, Reconstruction
from sae_core.sae_base import SparseAutoencoder


class TopKSAE(SparseAutoencoder):
    """The `top_k` largest positive pre-activations of each token; the threshold stays 0."""

    def encode(self, x: Tensor) -> Tensor:
        pre = self.pre_activations(x)
        return torch.relu(pre) * self._largest(pre)

    def encode_sparse(self, x: Tensor, precision: Precision | None = None) -> sparse_ops.SparseCode:
        return self._encode_densely(x)

    def reconstruct(
        self, x: Tensor, target: Tensor | None = None, compute: Compute = PLAIN
    ) -> Reconstruction:
        how = compute.products(x)
        code = sparse_ops.encode_where(
            x,
            self.encoder,
            lambda pre: self._largest(pre) & (pre > 0),
            row_block=compute.row_block,
            precision=how,
        )
        return Reconstruction.of_code(code, sparse_ops.decode(code, self.weights, how))

    def _largest(self, pre: Tensor) -> Tensor:
        """(..., F) bool: the `top_k` largest of each row."""
        index = pre.topk(min(self.spec.top_k, self.spec.d_sae), sorted=False).indices
        return torch.zeros_like(pre, dtype=torch.bool).scatter_(-1, index, True)

    def saelens_config(self) -> dict[str, Any]:
        return {"architecture": "topk", "k": self.spec.top_k}

    def saelens_tensors(self) -> dict[str, Tensor]:
        return self.weights._asdict()
