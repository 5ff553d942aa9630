"""JumpReLU SAEs (Rajamanoharan et al.: "Jumping Ahead: Improving Reconstruction Fidelity with
JumpReLU Sparse Autoencoders", arXiv 2407.14435).

Every feature has its own threshold theta, and is `pre` where `pre > theta` and 0 elsewhere.
The loss is flat in theta almost everywhere, so its gradient is estimated from the
pre-activations near it, with a rectangle of width eps as the kernel (equations 11 and 12):

    d JumpReLU / d theta = -theta / eps    d [pre > theta] / d theta = -1 / eps
    where |pre - theta| < eps / 2, and 0 elsewhere

The code is brought to k active features per token by the paper's penalty with a target,
`(L0 / k - 1)^2`, L0 being the mean over the batch. Only the pairs above `theta - eps / 2` matter,
and those below theta, most of all at the start, for its gradient alone.

The code is thinned out little by little: many features are active at the start, and thresholds and
biases move slowly. A code that is sparse from the start recovers far fewer features that are known
to be there (docs/benchmarks.md, "Known features").
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from sae_core.sae import sparse_ops
from sae_core.sae.config import SAESpec
from sae_core.sae.dense_start import BANDWIDTH, threshold_at_start
from sae_core.sae.precision import Precision
from sae_core.sae.reconstruction import PLAIN, Compute, Reconstruction
from sae_core.sae_base import SparseAutoencoder, as_rows

TRAVEL, LEAST_RATE = 0.06, 0.05
"""How far thresholds can move in a training, for activations of `E||x||^2 = 1`, and their least
learning rate, as a multiple of the encoder's. A long training would otherwise be dense for as large
a share of its steps as a short one. A threshold that can move less than this does not bring a dense
code to k features."""


class _Jump(Function):
    """(P,) pre-activations and thresholds -> the features, and 1 where one is active."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(pre, theta)
        active = ((pre > theta) & (pre > 0)).to(pre.dtype)
        return pre * active, active

    @staticmethod
    def backward(ctx: Any, d_value: Tensor, d_active: Tensor) -> tuple[Tensor, Tensor]:
        pre, theta = ctx.saved_tensors
        active = (pre > theta) & (pre > 0)
        near = (pre - theta).abs() < BANDWIDTH / 2
        return d_value * active, -(theta * d_value + d_active) * near / BANDWIDTH


class JumpReLUSAE(SparseAutoencoder):
    """A learned threshold for each feature, in training and at inference."""

    threshold: nn.Parameter

    def __init__(self, spec: SAESpec) -> None:
        super().__init__(spec)
        start = threshold_at_start(spec.d_in, spec.d_sae, spec.top_k)
        del self.threshold
        self.threshold = nn.Parameter(torch.full((spec.d_sae,), start))

    def lr_scales(self, travel: float) -> dict[str, float]:
        of_threshold = min(1.0, max(LEAST_RATE, TRAVEL / travel))
        return {"threshold": of_threshold, "b_enc": min(1.0, 2 * of_threshold)}

    def reconstruct(
        self, x: Tensor, target: Tensor | None = None, compute: Compute = PLAIN
    ) -> Reconstruction:
        threshold = self.known_threshold
        least, how = threshold.detach() - BANDWIDTH / 2, compute.products(x)
        near = sparse_ops.encode_above(
            x, self.encoder, least, row_block=compute.row_block, precision=how
        )
        column = near.pairs.column
        value, active = _Jump.apply(near.value, threshold[column])
        fired = torch.zeros_like(self.ever_fired)
        fired[column[active > 0]] = True
        l0 = active.sum() / len(x)
        mean_l0 = compute.group.mean(l0, len(x), compute.total(x))
        return Reconstruction(
            x_hat=sparse_ops.decode(replace(near, value=value), self.weights, how, has_zeros=True),
            l1=value.sum() / len(x),
            l0=float(l0.detach()),
            fired=fired,
            kind_loss=(mean_l0 / self.spec.top_k - 1).pow(2),
        )

    @torch.no_grad()
    def calibrate(
        self, activations: Tensor | Iterable[Tensor], precision: Precision | None = None
    ) -> None:
        """Shift all thresholds by one amount, at most half a bandwidth down, so that `activations`
        have `top_k` active features per token on average."""
        x = as_rows(activations, self.W_enc)
        total = x.shape[0] * self.spec.top_k
        threshold = self.known_threshold
        how = precision and precision.with_values(x.dtype)
        near = sparse_ops.above(x, self.encoder, threshold - BANDWIDTH / 2, how)
        above = near.value - threshold[near.pairs.column]
        if above.numel() > total:
            threshold.add_(above.topk(total + 1).values[-2:].mean())
