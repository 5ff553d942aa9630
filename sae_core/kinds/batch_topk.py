"""BatchTopK SAEs (Bussmann, Leask, Nanda: "BatchTopK Sparse Autoencoders", arXiv 2412.06410).

Training keeps the N*k largest pre-activations of a batch of N tokens, so that tokens may use more
or fewer than k features. Inference replaces the batch by one threshold, so that a token's
features do not depend on its neighbours.
"""

from collections.abc import Iterable
from itertools import islice

import torch
from torch import Tensor

from sae_core import losses, sparse_ops
from sae_core.sae_base import Reconstruction, SparseAutoencoder

BOUND_MARGIN = 0.85
"""The last batch's smallest kept value times this is the next one's lower bound."""

CALIBRATION_BATCHES = 16
"""Held-out batches that the threshold is calibrated on, at most."""


class BatchTopKSAE(SparseAutoencoder):
    """Batch top-k while training, a threshold afterwards."""

    _lower_bound: float = 0.0

    def reconstruct(self, x: Tensor, row_block: int | None = None) -> Reconstruction:
        n = x.shape[0]
        code = sparse_ops.encode(
            x,
            self.weights,
            n * self.spec.top_k,
            lower_bound=self._lower_bound,
            row_block=row_block,
        )
        n_pairs = code.value.numel()
        if n_pairs:
            self._lower_bound = BOUND_MARGIN * float(code.value.detach().min())
        return Reconstruction(
            x_hat=sparse_ops.decode(code, self.weights),
            l1=losses.l1_loss(code.value, n),
            l0=n_pairs / n,
            fired=code.counts() > 0,
        )

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor]) -> None:
        """Set the threshold so that `batches` have `top_k` active features a token on average."""
        x = torch.cat(list(islice(batches, CALIBRATION_BATCHES)))
        total = x.shape[0] * self.spec.top_k
        # One more than are wanted. The threshold lies halfway between the two smallest of them, so
        # that `encode`, which rounds in another order, finds the same `total` above it.
        code = sparse_ops.batch_topk(
            x, self.weights, total + 1, lower_bound=BOUND_MARGIN * float(self.threshold)
        )
        enough = code.value.numel() > total
        least = code.value.topk(2, largest=False).values.mean() if enough else torch.zeros(())
        self.threshold.copy_(least)
