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

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from sae_core.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from sae_core.sae import dense_ops
from sae_core.sae.precision import Precision
from sae_core.sae.sparse_code import Pairs, SparseCode, Weights

# PyTorch says this once a process of every CSR tensor; the one use here is covered by the tests.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")

BLOCK_BYTES = 2**25
"""Pre-activations of one row block: about what fits in a processor's cache."""

TILE_ROWS = 512
"""Tokens in one call of the product, at most. A matrix product's last bits depend on how many rows
it has. So a block is made of tiles, whose size depends on the SAE alone, and how many tokens a
block has changes nothing."""

GPU_FACTOR = 8
"""On a GPU blocks and tiles are so many times as large: it is launches that take time there."""

BOUND_MARGIN = 0.95
"""The lower bound is this share of the smallest kept value that is expected."""

CANDIDATE_FACTOR = 4
"""Candidates are cut back to the `total` largest when there are this many times more."""

SLICE_BYTES = 256
"""On a CPU the pairs' vectors are read this many bytes at a time: such a slice of a whole matrix
stays in a core's cache, where gathering its rows is some four times as fast."""

SLICE_REUSE = 10
"""Slicing copies a matrix, which pays when each of its rows is read this often or more."""

SAMPLED_PAIRS = 2**16
"""Pairs whose two vectors are gathered at a time where there is no sampled product."""

ROUNDING = 1.1 * 2**-8
"""Most that rounding two vectors to bfloat16 moves their product, over the product of their norms;
the tenth is for the sums, which are in float32."""

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By bytes."""


Sliced = tuple[Tensor, ...]
"""A matrix in pieces, side by side."""


def _slices(table: Tensor, n_pairs: int) -> Sliced:
    """The matrix, (N, D) or (F, D), in the pieces from which this many rows are best gathered."""
    if table.device.type == "cpu" and n_pairs >= SLICE_REUSE * len(table):
        parts = table.split(SLICE_BYTES // table.element_size(), dim=1)
    else:
        parts = (table,)
    return tuple(part.contiguous() for part in parts)


def _bag(rows: Tensor, table: Sliced, offsets: Tensor, weight: Tensor) -> Tensor:
    """Weighted sums of a matrix's rows, one sum per bag."""
    out = table[0].new_empty(len(offsets) - 1, sum(part.shape[1] for part in table))
    for part, out_part in zip(table, out.split(table[0].shape[1], dim=1), strict=True):
        out_part[:] = F.embedding_bag(
            rows, part, offsets, mode="sum", per_sample_weights=weight, include_last_offset=True
        )
    return out


def _sampled_product(a: Sliced, b: Sliced, pairs: Pairs) -> Tensor:
    """(P,) dot products `a[row] . b[column]`, without the N x F matrix of all of them."""
    if len(a) != len(b):  # only one of them is worth slicing
        a, b = (torch.cat(a, dim=1),), (torch.cat(b, dim=1),)
    if a[0].device.type not in ("cpu", "cuda"):
        chunks = zip(pairs.row.split(SAMPLED_PAIRS), pairs.column.split(SAMPLED_PAIRS), strict=True)
        return torch.cat([(a[0][row] * b[0][column]).sum(1) for row, column in chunks])
    product = torch.sparse_csr_tensor(
        pairs.row_start,
        pairs.column,
        a[0].new_zeros(len(pairs.row)),
        (pairs.n_rows, pairs.n_columns),
        check_invariants=False,
    )
    for part_a, part_b in zip(a, b, strict=True):
        torch.sparse.sampled_addmm(product, part_a, part_b.T, out=product)
    return product.values()


def _positive_entries(block: Tensor, floor: float = 0.0) -> Tensor:
    """(C,) ascending positions of the positive entries of a flattened matrix, if above `floor`.

    The matrix is overwritten: other entries become 0 (negative ones are negative integers too), and
    the few that remain are searched in whole machine words, several entries at a time. On a GPU one
    comparison is as fast.
    """
    flat = block.view(-1)
    if flat.device.type != "cpu":
        return (flat <= max(floor, 0.0)).logical_not_().nonzero().squeeze(1)  # NaN is kept
    if floor > 0:
        torch.threshold_(flat, floor, 0.0)
    else:
        flat.view(INTEGERS[flat.element_size()]).clamp_(min=0)
    per_word = math.gcd(8 // flat.element_size(), flat.numel())  # a power of 2
    words = flat.view(INTEGERS[per_word * flat.element_size()])
    word = words.nonzero().squeeze(1)
    entry = flat.view(-1, per_word).index_select(0, word).view(-1).nonzero().squeeze(1)
    first = (word * per_word).index_select(0, entry >> per_word.bit_length() - 1)
    return first.add_(entry & per_word - 1)


class _Product:
    """The encoder product of a batch, of which only entries above a bound are kept.

    Args:
        x: (N, D) centred activations.
        total: how many entries are wanted.
        bound: the product returns the numbers above it, so it rounds these finely; of all features,
            or (F,) of each.
    """

    def __init__(
        self, x: Tensor, weights: Weights, total: int, bound: float | Tensor, precision: Precision
    ) -> None:
        self.x, self.W_enc, self.b_enc = x, weights.W_enc, weights.b_enc
        self.total, self.bound = total, bound
        self.factors = x.to(precision.matmul_dtype), self.W_enc.to(precision.matmul_dtype)
        self.finds_only = precision.matmul_dtype != precision.value_dtype
        self.shift = self.b_enc - bound
        if self.finds_only:
            self.shift += ROUNDING * x.norm(dim=1).max() * self.W_enc.norm(dim=0)
            self.shift += ROUNDING * self.shift.abs()  # this sum is rounded too

    def candidates(self, first: int, rows: int, floor: float = 0.0) -> tuple[Tensor, Tensor | None]:
        """(C,) positions in the flattened N x F matrix, in `rows` rows from `first` on, of all
        entries that exceed the bound by more than `floor`, and of some that do not; and (C,) their
        values, unless the product only finds them."""
        x, W_enc = self.factors
        block = _tiled_product(x[first : first + rows], W_enc, self.shift.to(x.dtype))
        index = _positive_entries(block, floor)
        if self.finds_only:
            return index + first * len(self.shift), None
        bound = self.bound
        if isinstance(bound, Tensor):
            bound = bound[index % len(bound)]
        value = block.view(-1)[index].to(self.x.dtype) + bound
        return index + first * len(self.shift), value

    def values(self, index: Tensor) -> Tensor:
        """(C,) the entries at positions `index`, ascending."""
        pairs = Pairs.at(index, len(self.x), len(self.b_enc))
        x, W_enc_FD = (_slices(table, self.total) for table in (self.x, self.W_enc.T))
        return _sampled_product(x, W_enc_FD, pairs) + self.b_enc[pairs.column]


def _tiled_product(x: Tensor, W_enc: Tensor, bias: Tensor) -> Tensor:
    """(N, D) -> (N, F) `x @ W_enc + bias`; the same for a row whatever the number of tiles."""
    rows = tile_rows(W_enc.shape[1], x.dtype, x.device)
    block = x.new_empty(len(x), W_enc.shape[1])
    for part, out in zip(x.split(rows), block.split(rows), strict=True):
        torch.addmm(bias, part, W_enc, out=out)
    return block


def kth_largest(value: Tensor, k: int) -> Tensor:
    """(scalar) the `k` largest of (C,) numbers are this or more."""
    if value.device.type == "cpu":  # NumPy's is ten times as fast there
        return torch.from_numpy(np.partition(value.numpy(), len(value) - k)[len(value) - k, None])
    return torch.topk(value, k, sorted=False).values.amin()  # ten times as fast as `kthvalue`


class _Largest:
    """The largest entries of a product, found block by block in bounded memory."""

    def __init__(self, product: _Product, bound: float) -> None:
        self.product, self.total = product, product.total
        self.first_bound = self.bound = bound
        self.indices: list[Tensor] = []
        self.values: list[Tensor] = []

    def look_at(self, first: int, rows: int) -> None:
        """Take the candidates of some rows, which come after all earlier ones."""
        # A little lower, as both numbers and their difference are rounded.
        floor = 0.98 * (self.bound - self.first_bound) - 2**-20 * self.bound
        index, value = self.product.candidates(first, rows, floor)
        self.indices.append(index)
        if value is not None:
            self.values.append(value)
        if sum(map(len, self.indices)) > CANDIDATE_FACTOR * self.total:
            index, value = self.result()
            self.indices, self.values = [index], [value] if self.values else []
            if len(value):  # nothing compares with NaN
                self.bound = max(self.bound, float(value.min()))  # none below it can be among them

    def result(self) -> tuple[Tensor, Tensor]:
        """(at most `total`,) positions, ascending, and values."""
        index = torch.cat(self.indices)
        value = torch.cat(self.values) if self.values else self.product.values(index)
        if len(value) <= self.total:
            return index, value
        kept = _largest(value, self.total)
        return index[kept], value[kept]


def _largest(value: Tensor, total: int) -> Tensor:
    """(total,) ascending, which of (C,) numbers are the largest; ties go to the earlier one."""
    least = kth_largest(value, total)
    kept = (value >= least).nonzero().squeeze(1)
    if len(kept) > total:
        is_tie = value[kept] == least
        surplus = is_tie.nonzero().squeeze(1)[total - len(kept) :]
        is_tie[surplus] = False
        kept = kept[(value[kept] > least) | is_tie]
    return kept


def _largest_of_all(value: Tensor, total: int, group: ProcessGroup) -> tuple[Tensor | slice, float]:
    """Which of the numbers (C,), at most `total`, that this process found are among the `total`
    largest of all processes, and the smallest of these; 0 if all together have fewer."""
    parts = group.all_gather(value)
    values = value if group.is_single else torch.cat(parts)
    if len(values) <= total:
        return slice(None), float(values.min()) if len(values) == total else 0.0
    kept = _largest(values, total)
    first = sum(map(len, parts[: group.rank]))
    own = kept[(kept >= first) & (kept < first + len(value))]
    return own - first, float(values[kept].min())


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


def _factor(device: torch.device) -> int:
    return 1 if device.type == "cpu" else GPU_FACTOR


def _rows_of_a_block(n_features: int, dtype: torch.dtype, device: torch.device) -> int:
    return _factor(device) * BLOCK_BYTES // (n_features * dtype.itemsize)


def tile_rows(n_features: int, dtype: torch.dtype, device: torch.device) -> int:
    """How many tokens' pre-activations are computed at once: a power of 2."""
    most = _rows_of_a_block(n_features, dtype, device)
    return min(_factor(device) * TILE_ROWS, 1 << max(0, most.bit_length() - 1))


def block_rows(
    n_features: int, dtype: torch.dtype, device: torch.device, wanted: int | None = None
) -> int:
    """How many tokens' pre-activations are in memory at once, in whole tiles: about `wanted`, or
    as many as a block holds."""
    tile = tile_rows(n_features, dtype, device)
    rows = wanted or _rows_of_a_block(n_features, dtype, device)
    return max(tile, rows // tile * tile)


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
        found = _Largest(_Product(x, weights, total, least_wanted, formats), least_wanted)
        rows = block_rows(n_features, formats.matmul_dtype, x.device, row_block)
        for first in range(0, n, rows):
            found.look_at(first, rows)
        index, value = found.result()
        own, least = _largest_of_all(value, total, group)
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


class _Encode(Function):
    """The gradient of the kept pre-activations; their values come from the selection."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, code: SparseCode, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, *weights)
        ctx.pairs = code.pairs
        return code.value.clone()

    @staticmethod
    def backward(ctx: Any, d_value: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc, b_enc, b_dec = ctx.saved_tensors
        order, rows, offsets = ctx.pairs.by_column
        ordered = d_value[order]
        d_W_enc_FD = _bag(rows, _slices(x - b_dec, len(rows)), offsets, ordered)
        if x.device.type == "cuda":  # where `index_add_` adds in another order every time
            d_b_enc = torch.segment_reduce(ordered, "sum", offsets=offsets)
        else:
            d_b_enc = torch.zeros_like(b_enc).index_add_(0, ctx.pairs.column, d_value)
        return None, None, d_W_enc_FD.T, d_b_enc, -(W_enc @ d_b_enc)


class _Decode(Function):
    """`code @ W_dec` as bags of decoder rows, with both gradients on the pairs."""

    @staticmethod
    def forward(ctx: Any, pairs: Pairs, value: Tensor, W_dec: Tensor) -> Tensor:
        ctx.pairs, ctx.W_dec = pairs, _slices(W_dec, len(value))
        ctx.save_for_backward(value)
        return _bag(pairs.column, ctx.W_dec, pairs.row_start, value)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (value,) = ctx.saved_tensors
        order, rows, offsets = ctx.pairs.by_column
        g_slices = _slices(g, len(value))
        d_value = _sampled_product(g_slices, ctx.W_dec, ctx.pairs)
        return None, d_value, _bag(rows, g_slices, offsets, value[order])


def _dense_format(pairs: Pairs, weights: Weights, products: Precision | None) -> torch.dtype | None:
    """The number format in which the code is multiplied as a dense matrix; None: it is not."""
    if products is None or products.value_dtype == weights.W_dec.dtype:
        return None
    return products.value_dtype if dense_ops.is_dense(pairs) else None


def _with_gradient(
    x: Tensor, code: SparseCode, weights: Weights, products: Precision | None
) -> SparseCode:
    """The code with a gradient to the weights."""
    given = weights.W_enc, weights.b_enc, weights.b_dec
    if dtype := _dense_format(code.pairs, weights, products):
        rows = block_rows(code.pairs.n_columns, dtype, x.device)
        value = dense_ops.DenseEncode.apply(x, code, rows, dtype, *given)
    else:
        value = _Encode.apply(x, code, *given)
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


def decode(code: SparseCode, weights: Weights, products: Precision | None = None) -> Tensor:
    """(N, D) reconstructions `code @ W_dec + b_dec`, with gradients to the code and weights.

    Args:
        products: of those with a code that is dense; by default there are none.
    """
    W_dec = weights.W_dec
    if dtype := _dense_format(code.pairs, weights, products):
        rows = block_rows(code.pairs.n_columns, dtype, W_dec.device)
        x_hat = dense_ops.DenseDecode.apply(code.pairs, code.value, rows, dtype, W_dec)
    else:
        x_hat = _Decode.apply(code.pairs, code.value, W_dec)
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
        pre = _tiled_product(factor[first : first + rows], W_enc, b_enc)
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
    product = _Product(x - weights.b_dec, weights, 0, bound, precision)
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
        index = _positive_entries(block)
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
    """`above` whose `value` carries gradients, as that of `encode` does."""
    code = above(x, weights, threshold, precision, row_block=row_block)
    return _with_gradient(x, code, weights, precision)
