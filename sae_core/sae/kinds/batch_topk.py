"""BatchTopK SAEs (Bussmann, Leask, Nanda: "BatchTopK Sparse Autoencoders", arXiv 2412.06410).

Training keeps the N*k largest pre-activations of a batch of N tokens, so a token may use more or
fewer than k features. Inference replaces the batch top-k by one threshold, so a token's features
do not depend on its neighbours.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from sae_core.sae import sparse_ops
from sae_core.sae.precision import Precision
from sae_core.sae.reconstruction import PLAIN, Compute, Reconstruction
from sae_core.sae_base import SparseAutoencoder, as_rows
from sae_core.utils.errors import SAEError


class BatchTopKSAE(SparseAutoencoder):
    """Batch top-k while training, a threshold afterwards."""

    def reconstruct(
        self, x: Tensor, target: Tensor | None = None, compute: Compute = PLAIN
    ) -> Reconstruction:
        code = self.training_code(x, compute.total(x) * self.spec.top_k, compute)
        made = self._decoded(x if target is None else target, code, compute)
        return made._replace(least=code.least)

    def training_code(self, x: Tensor, total: int, compute: Compute) -> sparse_ops.SparseCode:
        """The `total` largest pre-activations of a batch, of which x (N, D) is this process's part,
        with gradients to the weights."""
        return sparse_ops.encode(
            x,
            self.encoder,
            total,
            lower_bound=compute.lower_bound,
            row_block=compute.row_block,
            precision=compute.precision,
            products=compute.products(x),
            group=compute.group,
        )

    @torch.no_grad()
    def reconstruct_at_inference(
        self, x: Tensor, target: Tensor | None = None, compute: Compute = PLAIN
    ) -> Reconstruction:
        how = compute.products(x)
        code = sparse_ops.above(
            x, self.encoder, self.known_threshold, how, row_block=compute.row_block
        )
        return self._decoded(x if target is None else target, code, compute)

    def _decoded(
        self, target: Tensor, code: sparse_ops.SparseCode, compute: Compute
    ) -> Reconstruction:
        x_hat = sparse_ops.decode(code, self.weights, compute.products(target))
        return Reconstruction.of_code(code, x_hat)

    @torch.no_grad()
    def set_threshold(self, threshold: float) -> None:
        if not 0 <= threshold < math.inf:
            raise SAEError(f"threshold {threshold}: must be a number of at least 0")
        self.threshold = self.W_enc.new_tensor(threshold)

    @torch.no_grad()
    def calibrate(
        self, activations: Tensor | Iterable[Tensor], precision: Precision | None = None
    ) -> None:
        """Set the threshold so that `activations` have `top_k` active features per token on
        average."""
        x = as_rows(activations, self.W_enc)
        guess = 0.0 if self.threshold is None else float(self.threshold)
        total = x.shape[0] * self.spec.top_k
        # One more than needed. The threshold is halfway between the two smallest of them, so
        # that `encode`, which rounds in another order, finds the same `total` above it.
        code = sparse_ops.batch_topk(
            x,
            self.encoder,
            total + 1,
            lower_bound=sparse_ops.BOUND_MARGIN * guess,
            precision=precision and precision.with_values(x.dtype),
        )
        enough = code.value.numel() > total
        least = code.value.topk(2, largest=False).values.mean() if enough else torch.zeros(())
        if self.threshold is None:
            self.threshold = self.W_enc.new_zeros(())
        self.threshold.copy_(least)
