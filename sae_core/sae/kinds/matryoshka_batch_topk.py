"""Matryoshka BatchTopK SAEs (Bussmann, Nabeshima, Karvonen, Nanda: "Learning Multi-Level Features
with Matryoshka Sparse Autoencoders", arXiv 2503.17547).

The first m features, for each m of `matryoshka_sizes`, have to reconstruct without the rest, so
general features come first and specific ones do not absorb them. With the code f of
BatchTopK over all features, every m has a term in the loss:

    ||x - (f[:m] @ W_dec[:m] + b_dec)||^2

The term of all features is the reconstruction loss, and the `kind_loss` is the mean of the others.
The paper sums them; the mean costs less of the whole's reconstruction.

The nested reconstructions are cumulative sums of what disjoint groups of features decode to, and
each pair of the code is in one group: all of them cost one decode of the N*k pairs.
"""

import torch
from torch import Tensor

from sae_core.sae import losses, sparse_ops
from sae_core.sae.kinds.batch_topk import BatchTopKSAE
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
        pairs = code.pairs
        sizes = torch.tensor(self.spec.matryoshka_sizes, device=pairs.column.device)
        group = torch.bucketize(pairs.column, sizes, right=True)
        # A token's share in each group is a separate row: row `group * N + token`.
        row = group * pairs.n_rows + pairs.row
        index, order = torch.sort(row * pairs.n_columns + pairs.column)
        shares = sparse_ops.SparseCode(
            sparse_ops.Pairs.at(index, len(sizes) * pairs.n_rows, pairs.n_columns),
            code.value[order],
        )
        no_bias = self.weights._replace(b_dec=torch.zeros_like(self.b_dec))
        decoded = sparse_ops.decode(shares, no_bias, compute.products(self.b_dec))
        return decoded.view(len(sizes), pairs.n_rows, -1).cumsum(0) + self.b_dec
