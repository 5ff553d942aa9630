"""BatchTopK without the dense code: every step after the encoder product works on N*k pairs.

With N tokens, width D and k active features per token, k << D, a dense implementation spends most
of its time on N x D matrices that are almost all zero. Here

    pre = (x - b_dec) @ W_enc + b_enc            the one dense product, in row blocks
    (row, column, value) = the N*k largest entries of relu(pre)
    x_hat[row] += value * W_dec[column]          a bag of decoder rows per token (CSR order)

and with g = dL/dx_hat the gradients need the same pairs only:

    dL/dvalue  = g[row] . W_dec[column]          a product sampled at the pairs
    dL/dW_dec[column] += value * g[row]          a bag of rows of g a feature (CSC order)
    dL/dW_enc[:, column] += dL/dvalue * (x - b_dec)[row]     likewise
    dL/db_enc[column] += dL/dvalue;  dL/db_dec = sum g - W_enc @ dL/db_enc

because the top-k mask is constant almost everywhere.

Where the hardware multiplies bfloat16 fast, float32 takes advantage of it and stays exact. The
product then only finds candidates, entries that may exceed a lower bound of the smallest kept
value; their values are computed in float32, and the largest of these are kept. Rounding both
factors to bfloat16 moves a product by at most 2^-8 |x| |w|, and so no entry is missed when the
bound is lowered by that much. With bfloat16 values the product's own numbers are taken instead.

Other kinds choose pairs by a rule (`above`, `select`); the rest is the same. A code that is dense,
which `dense_ops` says, is multiplied as a matrix where that may be done in bfloat16.

Shapes: N tokens, F features (D above), D activation width, P pairs, C candidates. `W_enc` is
(D, F) with the memory layout of its transpose, so a feature's encoder direction is contiguous.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from sae_core.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from sae_core.sae import dense_ops
from sae_core.sae.largest_entries import (
    EncoderProduct,
    LargestEntries,
    block_rows,
    largest_of_all,
    positive_entries,
    tiled_product,
)
from sae_core.sae.pair_products import bag, sampled_product, slices
from sae_core.sae.precision import Precision
from sae_core.sae.sparse_code import Pairs, SparseCode, Weights

BOUND_MARGIN = 0.95
"""The lower bound is this share of the smallest kept value that is expected."""


def add_at(sums: Tensor, index: Tensor, value: Tensor) -> None:
    """Add each of (P,) values to the one of `sums` (n,) that its index (P,) says, in their order.

    On CUDA `index_add_` has no order, so values there are sorted by index and added in runs.
    """
    if sums.device.type != "cuda":
        sums.index_add_(0, index, value)
        return
    ordered, order = torch.sort(index, stable=True)
    offsets = torch.searchsorted(ordered, torch.arange(len(sums) + 1, device=sums.device))
    sums += torch.segment_reduce(value[order], "sum", offsets=offsets)


@torch.no_grad()
def batch_topk(
    x: Tensor,
    weights: Weights,
    total: int,
    *,
    lower_bound: float = 0.0,
    row_block: int | None = None,
    precision: Precision | None = None,
    group: ProcessGroup = SINGLE_PROCESS,
) -> SparseCode:
    """The `total` largest positive pre-activations of a batch (BatchTopK, arXiv 2412.06410).

    Exact: the same pairs as a dense top-k over `relu((x - b_dec) @ W_enc + b_enc)`, ties to the
    earlier entry, fewer when fewer are positive. Memory: one row block and O(total).

    Args:
        x: (N, D) activations, in the number format of the weights.
        total: how many pairs to keep, N*k.
        lower_bound: a guess at the smallest kept value; a good one saves work, none changes
            the result.
        row_block: tokens in one block of the product, about; none changes the result.
        precision: by default that of the weights. A product in another format than the values
            does not change the result; values in another format are rounded.
        group: the processes that share the batch; the `total` pairs are those of all.
    """
    n, n_features = x.shape[0], weights.W_enc.shape[1]
    x = x - weights.b_dec
    given = precision or weights.precision()
    for bound in (lower_bound, lower_bound / 2, 0.0):
        # Without a bound every other entry is a candidate: the product has to give their values.
        formats = given if bound > 0 else Precision(given.value_dtype, given.value_dtype)
        least_wanted = max(bound, 0.0)
        found = LargestEntries(
            EncoderProduct(x, weights, total, least_wanted, formats), least_wanted
        )
        rows = block_rows(n_features, formats.matmul_dtype, x.device, row_block)
        for first in range(0, n, rows):
            found.look_at(first, rows)
        index, value = found.result()
        own, least = largest_of_all(value, total, group)
        if bound <= 0 or least > bound:
            break
    index, value = index[own], value[own]
    return SparseCode(Pairs.at(index, n, n_features), value, least)


@dataclass
class LowerBound:
    """A guess at the smallest value that the next batch keeps, from the last two batches.

    Early in training it falls by several percent per step, which is assumed to continue. Values are
    computed relative to it, so it affects their rounding and is part of a training's state.
    """

    value: float = 0.0
    last: float = 0.0

    def update(self, least: float | None) -> None:
        """Take the smallest value that a batch kept; None if it had no top-k."""
        if least is None:
            return
        fall = min(1.0, least / self.last) if self.last else 1.0
        self.value, self.last = BOUND_MARGIN * fall * least, least


def _without_zeros(pairs: Pairs, value: Tensor) -> tuple[Pairs, Tensor]:
    """On a CPU the pairs whose value (P,) is not 0, and these values: a sum is the same with them
    alone, because it is in the order of the pairs there. Elsewhere all of them."""
    if value.device.type != "cpu":
        return pairs, value
    code = SparseCode(pairs, value).where(value != 0)
    return code.pairs, code.value


class _Encode(Function):
    """The gradient of the kept pre-activations; their values come from the selection.

    Args:
        has_zeros: whether many of the pairs get a gradient of 0; they are left out of the sums.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, code: SparseCode, has_zeros: bool, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, *weights)
        ctx.pairs, ctx.has_zeros = code.pairs, has_zeros
        return code.value.clone()

    @staticmethod
    def backward(ctx: Any, d_value: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc, b_enc, b_dec = ctx.saved_tensors
        pairs = ctx.pairs
        if ctx.has_zeros:
            pairs, d_value = _without_zeros(pairs, d_value)
        order, rows, offsets = pairs.by_column
        ordered = d_value[order]
        d_W_enc_FD = bag(rows, slices(x - b_dec, len(rows)), offsets, ordered)
        if x.device.type == "cuda":  # where `index_add_` adds in another order every time
            d_b_enc = torch.segment_reduce(ordered, "sum", offsets=offsets)
        else:
            d_b_enc = torch.zeros_like(b_enc).index_add_(0, pairs.column, d_value)
        return None, None, None, d_W_enc_FD.T, d_b_enc, -(W_enc @ d_b_enc)


class _Decode(Function):
    """`code @ W_dec` as bags of decoder rows, with both gradients on the pairs.

    Args:
        has_zeros: whether many values are 0. Such a pair is in no bag; its value has a gradient.
    """

    @staticmethod
    def forward(ctx: Any, pairs: Pairs, value: Tensor, has_zeros: bool, W_dec: Tensor) -> Tensor:
        ctx.pairs, ctx.W_dec = pairs, slices(W_dec, len(value))
        ctx.added = pairs
        if has_zeros:
            ctx.added, value = _without_zeros(pairs, value)
        ctx.save_for_backward(value)
        return bag(ctx.added.column, ctx.W_dec, ctx.added.row_start, value)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (value,) = ctx.saved_tensors
        g_slices = slices(g, len(ctx.pairs.row))
        d_value = sampled_product(g_slices, ctx.W_dec, ctx.pairs)
        order, rows, offsets = ctx.added.by_column
        return None, d_value, None, bag(rows, g_slices, offsets, value[order])


def _dense_format(pairs: Pairs, weights: Weights, products: Precision | None) -> torch.dtype | None:
    """The number format in which the code is multiplied as a dense matrix; None: it is not."""
    if products is None or products.value_dtype == weights.W_dec.dtype:
        return None
    return products.value_dtype if dense_ops.is_dense(pairs) else None


def _with_gradient(
    x: Tensor,
    code: SparseCode,
    weights: Weights,
    products: Precision | None,
    has_zeros: bool = False,
) -> SparseCode:
    """The code with a gradient to the weights; `has_zeros` as that of `_Encode`."""
    given = weights.W_enc, weights.b_enc, weights.b_dec
    if dtype := _dense_format(code.pairs, weights, products):
        rows = block_rows(code.pairs.n_columns, dtype, x.device)
        value = dense_ops.DenseEncode.apply(x, code, rows, dtype, *given)
    else:
        value = _Encode.apply(x, code, has_zeros, *given)
    return replace(code, value=value)


def encode(
    x: Tensor,
    weights: Weights,
    total: int,
    *,
    lower_bound: float = 0.0,
    row_block: int | None = None,
    precision: Precision | None = None,
    products: Precision | None = None,
    group: ProcessGroup = SINGLE_PROCESS,
) -> SparseCode:
    """`batch_topk` whose `value` carries gradients to `W_enc`, `b_enc` and `b_dec`.

    `x` gets no gradient: activations are data here.

    Args:
        products: of those in the backward pass with a code that is dense; by default there are
            none.
    """
    code = batch_topk(
        x,
        weights,
        total,
        lower_bound=lower_bound,
        row_block=row_block,
        precision=precision,
        group=group,
    )
    return _with_gradient(x, code, weights, products)


def decode(
    code: SparseCode,
    weights: Weights,
    products: Precision | None = None,
    has_zeros: bool = False,
) -> Tensor:
    """(N, D) reconstructions `code @ W_dec + b_dec`, with gradients to the code and weights.

    Args:
        products: of those with a code that is dense; by default there are none.
        has_zeros: whether many values are 0: pairs that are wanted for their gradient alone.
    """
    W_dec = weights.W_dec
    if dtype := _dense_format(code.pairs, weights, products):
        rows = block_rows(code.pairs.n_columns, dtype, W_dec.device)
        x_hat = dense_ops.DenseDecode.apply(code.pairs, code.value, rows, dtype, W_dec)
    else:
        x_hat = _Decode.apply(code.pairs, code.value, has_zeros, W_dec)
    return x_hat + weights.b_dec


@torch.no_grad()
def select(
    x: Tensor,
    weights: Weights,
    chosen: Callable[[Tensor], Tensor],
    *,
    row_block: int | None = None,
    precision: Precision | None = None,
) -> SparseCode:
    """The pre-activations of a batch that a rule chooses, as pairs.

    Args:
        x: (N, D) activations, in the number format of the weights.
        chosen: from a block of pre-activations (rows, F) to bool of that shape.
        row_block: tokens in one block of the product, about; none changes the result.
        precision: by default that of the weights. The rule sees pre-activations in the format of
            the values, which is that of the product, too.
    """
    n, n_features = x.shape[0], weights.W_enc.shape[1]
    dtype = (precision or weights.precision()).value_dtype
    factor, W_enc, b_enc = (t.to(dtype) for t in (x - weights.b_dec, weights.W_enc, weights.b_enc))
    rows = block_rows(n_features, dtype, x.device, row_block)
    indices, values = [], []
    for first in range(0, n, rows):
        pre = tiled_product(factor[first : first + rows], W_enc, b_enc)
        index = chosen(pre).view(-1).nonzero().squeeze(1)
        indices.append(index + first * n_features)
        values.append(pre.view(-1)[index].to(x.dtype))
    return SparseCode(Pairs.at(torch.cat(indices), n, n_features), torch.cat(values))


@torch.no_grad()
def above(
    x: Tensor,
    weights: Weights,
    threshold: Tensor,
    precision: Precision | None = None,
    *,
    row_block: int | None = None,
) -> SparseCode:
    """The positive pre-activations of a batch above a threshold, of all features or each.

    Args:
        x: (N, D) activations, in the number format of the weights.
        threshold: () or (F,).
        precision: by default that of the weights. A product in another format than the values
            does not change the result; values in another format are rounded.
        row_block: tokens in one block of the product, about; none changes the result.
    """
    n, n_features = x.shape[0], weights.W_enc.shape[1]
    bound = threshold.clamp(min=0.0)
    if precision is None or precision == weights.precision():
        return select(x, weights, lambda pre: pre > bound, row_block=row_block)
    bound = bound.expand(n_features)
    product = EncoderProduct(x - weights.b_dec, weights, 0, bound, precision)
    rows = block_rows(n_features, precision.matmul_dtype, x.device, row_block)
    found = [product.candidates(first, rows) for first in range(0, n, rows)]
    index = torch.cat([index for index, _ in found])
    given = [value for _, value in found if value is not None]
    value = torch.cat(given) if given else product.values(index)
    enough = value > bound[index % n_features]
    return SparseCode(Pairs.at(index[enough], n, n_features), value[enough])


@torch.no_grad()
def sparse(blocks: Iterable[Tensor]) -> SparseCode:
    """The positive entries of features that come in blocks (rows, F), which are overwritten."""
    indices, values, n = [], [], 0
    for block in blocks:
        n_features = block.shape[1]
        index = positive_entries(block)
        indices.append(index + n * n_features)
        values.append(block.view(-1)[index])
        n += len(block)
    return SparseCode(Pairs.at(torch.cat(indices), n, n_features), torch.cat(values))


def encode_where(
    x: Tensor,
    weights: Weights,
    chosen: Callable[[Tensor], Tensor],
    *,
    row_block: int | None = None,
    precision: Precision | None = None,
) -> SparseCode:
    """`select` whose `value` carries gradients, as that of `encode` does."""
    code = select(x, weights, chosen, row_block=row_block, precision=precision)
    return _with_gradient(x, code, weights, precision)


def encode_above(
    x: Tensor,
    weights: Weights,
    threshold: Tensor,
    *,
    row_block: int | None = None,
    precision: Precision | None = None,
) -> SparseCode:
    """`above` whose `value` carries gradients, as that of `encode` does. Many of the gradients may
    be 0: their pairs are left out of the sums."""
    code = above(x, weights, threshold, precision, row_block=row_block)
    return _with_gradient(x, code, weights, precision, has_zeros=True)
