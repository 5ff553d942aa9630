"""The sums of `pair_kernels` as dense products in bfloat16, for a code of which so much is active
that these are faster (`dense_ops`). Arguments and results are as for the kernels, up to rounding.

A matrix of a code has columns for the unused slots, all of which write a 0 there, and as many as
make a row's length a multiple of 16 bytes, which fast products need.
"""

import torch
from torch import Tensor

from sae_core.sae.static.pairs import Codes, Gradients

ALIGNED = 8
"""Numbers of bfloat16 in 16 bytes."""


def _matrix(codes: Codes, value: Tensor, n_features: int) -> Tensor:
    """(M N, F) bfloat16, with (P,) values at the pairs."""
    width = (n_features // ALIGNED + 1) * ALIGNED
    matrix = torch.zeros(codes.n_rows, width, dtype=torch.bfloat16, device=value.device)
    at = codes.row.long(), codes.column.long()
    return matrix.index_put_(at, value.bfloat16())[:, :n_features]


def decode(codes: Codes, W: Tensor) -> Tensor:
    """See `pair_kernels`."""
    return (_matrix(codes, codes.value, len(W)) @ W.bfloat16()).float()


def sampled(codes: Codes, A: Tensor, W: Tensor) -> Tensor:
    """See `pair_kernels`."""
    n_features = len(W)
    product = A.bfloat16() @ W.bfloat16().T
    at = codes.row.long() * n_features + codes.column.clamp(max=n_features - 1)
    return torch.where(codes.column < n_features, product.view(-1)[at].float(), 0.0)


def gradients(codes: Codes, d_value: Tensor, G: Tensor, X: Tensor, n_features: int) -> Gradients:
    """See `pair_kernels`."""
    of_code = _matrix(codes, codes.value, n_features)
    W_dec = (of_code.T @ G.bfloat16()).float()
    d_code = _matrix(codes, d_value, n_features).view(-1, codes.n_tokens, n_features)
    W_enc = (d_code.sum(0).T @ X.bfloat16()).float()
    sums = d_code.sum(1, dtype=torch.float32)
    return Gradients(W_dec, W_enc, torch.stack([sums[:-1].sum(0), sums[-1]]))
