"""Products with codes that are dense, in a number format that the hardware multiplies fast.

The standard and the gated kind train with a code that is dense from the start. Other codes are
pairs (`sparse_ops`), and a GPU gathers a pair's row of 4 D bytes in the time of some 300 D products
of bfloat16. So where more than `DENSE_SHARE` of a code is active, its zeros are multiplied, too:
with f the code (N, F) and g = dL/dx_hat,

    x_hat = f @ W_dec        dL/df = g @ W_dec.T at the pairs       dL/dW_dec = f.T @ g
    dL/dW_enc = (x - b_dec).T @ dL/df        dL/db_enc = the sums of the columns of dL/df

which is what `sparse_ops` adds pair by pair, but that factors and products are rounded to the
format. The dense code exists for a block of tokens at a time. Weights and gradients are in float32.

Shapes: N tokens, F features, D activation width, P pairs.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from sae_core.sae.sparse_code import Pairs, SparseCode, Weights

DENSE_SHARE = 0.01
"""Above this share of active entries the dense product is faster. An H100 moves 3e12 bytes and does
6e14 products a second: a pair costs D 1e-12 s, an entry D 3e-15 s and 3e-12 s for its 8 bytes."""


def pre_activations(x: Tensor, weights: Weights, dtype: torch.dtype) -> Tensor:
    """(N, F) `(x - b_dec) @ W_enc + b_enc` in `dtype`, with gradients to the weights."""
    x = x - weights.b_dec
    if dtype == x.dtype:
        return x @ weights.W_enc + weights.b_enc
    return torch.addmm(weights.b_enc.to(dtype), x.to(dtype), weights.W_enc.to(dtype))


def decode(code: Tensor, weights: Weights) -> Tensor:
    """(N, D) `code @ W_dec + b_dec` in the weights' format, multiplied in that of the code (N, F),
    with gradients to both."""
    product = code @ weights.W_dec.to(code.dtype)
    return product.to(weights.b_dec.dtype) + weights.b_dec


def is_dense(pairs: Pairs) -> bool:
    """Whether so much of a code is active that the dense product is faster."""
    return len(pairs.row) > DENSE_SHARE * pairs.n_rows * pairs.n_columns


class DenseEncode(Function):
    """The pairs' values (P,), when the selection has found them: its backward pass is the encoder's
    gradient.

    Args:
        code: what was selected from x (N, D).
        rows: tokens of a block.
        dtype: of the products.
        weights: the four of `Weights`.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, code: SparseCode, rows: int, dtype: torch.dtype, *weights: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, *weights)
        ctx.pairs, ctx.rows, ctx.dtype = code.pairs, rows, dtype
        return code.value.clone()

    @staticmethod
    def backward(ctx: Any, d_value: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc, b_enc, b_dec = ctx.saved_tensors
        half, d_value = (x - b_dec).to(ctx.dtype), d_value.to(ctx.dtype)
        d_W_enc_FD, d_b_enc = torch.zeros_like(W_enc.T), torch.zeros_like(b_enc)
        for tokens, at, entries in _blocks(ctx.pairs, ctx.rows):
            d_code = _filled(ctx.pairs, tokens, entries, d_value[at])
            d_W_enc_FD += d_code.T @ half[tokens]
            d_b_enc += d_code.sum(0, dtype=d_b_enc.dtype)
        return None, None, None, None, d_W_enc_FD.T, d_b_enc, -(W_enc @ d_b_enc)


class DenseDecode(Function):
    """(N, D) `code @ W_dec` of the values (P,) of a code, as pairs.

    Args:
        rows: tokens of a block.
        dtype: of the products.
    """

    @staticmethod
    def forward(
        ctx: Any, pairs: Pairs, value: Tensor, rows: int, dtype: torch.dtype, W_dec: Tensor
    ) -> Tensor:
        ctx.pairs, ctx.rows = pairs, rows
        half, value = W_dec.to(dtype), value.to(dtype)
        ctx.save_for_backward(value, half)
        x_hat = W_dec.new_empty(pairs.n_rows, W_dec.shape[1])
        for tokens, at, entries in _blocks(pairs, rows):
            x_hat[tokens] = _filled(pairs, tokens, entries, value[at]) @ half
        return x_hat

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        value, W_dec = ctx.saved_tensors
        half, d_value = g.to(value.dtype), g.new_empty(len(value))
        d_W_dec = torch.zeros_like(W_dec, dtype=g.dtype)
        for tokens, at, entries in _blocks(ctx.pairs, ctx.rows):
            d_value[at] = (half[tokens] @ W_dec.T)[entries].to(g.dtype)
            d_W_dec += _filled(ctx.pairs, tokens, entries, value[at]).T @ half[tokens]
        return None, d_value, None, None, d_W_dec


def _blocks(pairs: Pairs, rows: int) -> Iterator[tuple[slice, slice, tuple[Tensor, Tensor]]]:
    """The tokens of each block, where its pairs are, and their rows and columns in it."""
    firsts = [*range(0, pairs.n_rows, rows), pairs.n_rows]
    starts = pairs.row_start[firsts].tolist()
    for (first, last), (start, end) in zip(pairwise(firsts), pairwise(starts), strict=True):
        at = slice(start, end)
        yield slice(first, last), at, (pairs.row[at] - first, pairs.column[at])


def _filled(pairs: Pairs, tokens: slice, entries: tuple[Tensor, Tensor], value: Tensor) -> Tensor:
    """(n, F) a block of the dense matrix with these values at the pairs."""
    block = value.new_zeros(tokens.stop - tokens.start, pairs.n_columns)
    return block.index_put_(entries, value)
