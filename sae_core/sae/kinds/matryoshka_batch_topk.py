"""Matryoshka BatchTopK SAEs (Bussmann, Nabeshima, Karvonen, Nanda: "Learning Multi-Level Features
with Matryoshka Sparse Autoencoders", arXiv 2503.17547).

The first m features, for each m of `matryoshka_sizes`, have to reconstruct without the rest, so
general features come first and specific ones do not absorb them. With the code f of
BatchTopK over all features, every m has a term in the loss:

    ||x - (f[:m] @ W_dec[:m] + b_dec)||^2

The term of all features is the reconstruction loss, and the `kind_loss` is the mean of the others.
The paper sums them; the mean costs less of the whole's reconstruction.
"""

import torch
from torch import Tensor

from sae_core.sae import losses, sparse_ops
from sae_core.sae.kinds.batch_topk import BatchTopKSAE
from sae_core.sae.nested import nested_reconstructions
from sae_core.sae.reconstruction import PLAIN, Compute, Reconstruction


class MatryoshkaBatchTopKSAE(BatchTopKSAE):
    """Batch top-k with nested reconstructions; at inference a BatchTopK SAE."""

    def _decoded(
        self, target: Tensor, code: sparse_ops.SparseCode, compute: Compute
    ) -> Reconstruction:
        *nested, x_hat = self.nested_reconstructions(code, compute)
        errors = [losses.reconstruction_loss(target, part) for part in nested]
        return Reconstruction.of_code(code, x_hat, torch.stack(errors).mean())

    def nested_reconstructions(
        self, code: sparse_ops.SparseCode, compute: Compute = PLAIN
    ) -> Tensor:
        """(M, N, D) what the first m features reconstruct, for each of the M sizes."""
        column = code.pairs.column
        sizes = torch.tensor(self.spec.matryoshka_sizes, device=column.device)
        group = torch.bucketize(column, sizes, right=True)
        products = compute.products(self.b_dec)
        return nested_reconstructions(code, group, len(sizes), self.weights, products)
