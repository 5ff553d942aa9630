"""BatchTopK without the dense code: every step after the encoder product works on N*k pairs.

With N tokens, width D and k active features a token, k << D, a dense implementation spends most
of its time on N x D matrices that are almost all zero. Here

    pre = (x - b_dec) @ W_enc + b_enc            the one dense product, in row blocks
    (row, column, value) = the N*k largest entries of relu(pre)
    x_hat[row] += value * W_dec[column]          a bag of decoder rows a token (CSR order)

and with g = dL/dx_hat the gradients need the same pairs only:

    dL/dvalue  = g[row] . W_dec[column]          a product sampled at the pairs
    dL/dW_dec[column] += value * g[row]          a bag of rows of g a feature (CSC order)
    dL/dW_enc[:, column] += dL/dvalue * (x - b_dec)[row]     likewise
    dL/db_enc[column] += dL/dvalue;  dL/db_dec = sum g - W_enc @ dL/db_enc

because the top-k mask is constant almost everywhere. Shapes: N tokens, F features (D above),
D activation width, P pairs. `W_enc` is (D, F) with the memory layout of its transpose, so that a
feature's encoder direction is contiguous.
"""

import warnings
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

# PyTorch says this once a process of every CSR tensor; the one use here is covered by the tests.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")

BLOCK_ENTRIES = 2**22
"""Pre-activations of one row block: 16 MB in float32, about what a processor's cache holds."""

CANDIDATE_FACTOR = 2
"""Candidates are cut back to the `total` largest when there are this many times as many."""

SAMPLED_PAIRS = 2**16
"""Pairs whose two vectors are gathered at once where there is no sampled product."""


class SparseCode(NamedTuple):
    """A non-negative code of N tokens as P pairs, ordered by token, then by feature."""

    row: Tensor
    """(P,) int64: the token of each pair."""
    column: Tensor
    """(P,) int64: the feature of each pair."""
    value: Tensor
    """(P,) the activation of each pair, above 0."""
    n_rows: int
    n_columns: int

    def row_start(self) -> Tensor:
        """(N + 1,) where each token's pairs begin: CSR offsets."""
        return _offsets(self.row, self.n_rows)

    def by_column(self) -> tuple[Tensor, Tensor]:
        """(P,) the order of the pairs by feature, and (F + 1,) where each begins: CSC."""
        order = torch.argsort(self.column, stable=True)
        return order, _offsets(self.column, self.n_columns)

    def counts(self) -> Tensor:
        """(F,) how many tokens each feature is active on."""
        return torch.bincount(self.column, minlength=self.n_columns)

    def to_dense(self) -> Tensor:
        """(N, F) the same code with its zeros."""
        dense = self.value.new_zeros(self.n_rows, self.n_columns)
        return dense.index_put((self.row, self.column), self.value)


class Weights(NamedTuple):
    """The four tensors of an SAE, as the functions here take them."""

    W_enc: Tensor
    """(D, F), laid out in memory as its transpose."""
    b_enc: Tensor
    """(F,)"""
    W_dec: Tensor
    """(F, D)"""
    b_dec: Tensor
    """(D,)"""


def _offsets(index: Tensor, length: int) -> Tensor:
    out = index.new_zeros(length + 1)
    torch.cumsum(torch.bincount(index, minlength=length), 0, out=out[1:])
    return out


def _bag(rows: Tensor, table: Tensor, offsets: Tensor, weight: Tensor) -> Tensor:
    """Weighted sums of `table`'s rows, one sum a bag."""
    return F.embedding_bag(
        rows,
        table,
        offsets,
        mode="sum",
        per_sample_weights=weight.to(table.dtype),
        include_last_offset=True,
    )


def _sampled_product(a: Tensor, b: Tensor, code: SparseCode) -> Tensor:
    """(P,) dot products `a[row] . b[column]`, without the N x F matrix of all of them."""
    if a.device.type in ("cpu", "cuda"):
        pattern = torch.sparse_csr_tensor(
            code.row_start(),
            code.column,
            torch.zeros_like(code.value),
            (code.n_rows, code.n_columns),
            check_invariants=False,
        )
        return torch.sparse.sampled_addmm(pattern, a, b.T, beta=0.0).values()
    chunks = zip(code.row.split(SAMPLED_PAIRS), code.column.split(SAMPLED_PAIRS), strict=True)
    return torch.cat([(a[row] * b[column]).sum(1) for row, column in chunks])


class _Candidates:
    """The largest entries seen so far, in bounded memory; ties go to the earlier entry."""

    def __init__(self, total: int, bound: float) -> None:
        self.total, self.bound = total, bound
        self.indices: list[Tensor] = []
        self.values: list[Tensor] = []
        self.count = 0

    def add(self, pre: Tensor, first_row: int) -> None:
        """Take what exceeds the bound from the (rows, F) block that begins at `first_row`."""
        flat = pre.view(-1)
        index = (flat > self.bound).nonzero().squeeze(1)
        self.indices.append(index + first_row * pre.shape[1])
        self.values.append(flat[index])
        self.count += index.numel()
        if self.count > CANDIDATE_FACTOR * self.total:
            self.prune()

    def prune(self) -> None:
        """Keep the `total` largest, and raise the bound below which none can be among them."""
        index, value = torch.cat(self.indices), torch.cat(self.values)
        if value.numel() > self.total:
            least = torch.kthvalue(value, value.numel() - self.total + 1).values
            keep = value > least
            ties = (value == least).nonzero().squeeze(1)
            keep[ties[: self.total - int(keep.sum())]] = True
            index, value = index[keep], value[keep]
            self.bound = max(self.bound, float(least))
        self.indices, self.values, self.count = [index], [value], value.numel()


@torch.no_grad()
def batch_topk(
    x: Tensor,
    weights: Weights,
    total: int,
    *,
    lower_bound: float = 0.0,
    row_block: int | None = None,
) -> SparseCode:
    """The `total` largest positive pre-activations of a batch (BatchTopK, arXiv 2412.06410).

    Exact: the same pairs as a dense top-k over `relu((x - b_dec) @ W_enc + b_enc)`, ties to the
    earlier entry, fewer when fewer are positive. Memory: one row block and O(total).

    Args:
        x: (N, D) activations.
        total: how many pairs to keep, N*k.
        lower_bound: a guess at the smallest kept value; a good one saves work, none changes
            the result.
        row_block: tokens in one block of the product.
    """
    n, n_features = x.shape[0], weights.W_enc.shape[1]
    rows = row_block or max(1, BLOCK_ENTRIES // n_features)
    bias = weights.b_enc - weights.b_dec @ weights.W_enc
    found = _Candidates(total, max(lower_bound, 0.0))
    for first in range(0, n, rows):
        pre = torch.addmm(bias, x[first : first + rows], weights.W_enc)
        found.add(pre, first)
    if found.count < total and lower_bound > 0:
        return batch_topk(x, weights, total, row_block=row_block)
    found.prune()
    index = found.indices[0]
    row = index // n_features
    return SparseCode(row, index - row * n_features, found.values[0], n, n_features)


class _Encode(Function):
    """The gradient of the kept pre-activations; their values come from the selection."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Weights, code: SparseCode, *_: Tensor) -> Tensor:
        ctx.save_for_backward(x, weights.W_enc, weights.b_dec)
        ctx.code = code
        return code.value.clone()

    @staticmethod
    def backward(ctx: Any, d_value: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc, b_dec = ctx.saved_tensors
        code = ctx.code
        order, offsets = code.by_column()
        d_W_enc_FD = _bag(code.row[order], x - b_dec, offsets, d_value[order])
        d_b_enc = torch.zeros_like(W_enc[0]).index_add_(0, code.column, d_value)
        return None, None, None, d_W_enc_FD.T, d_b_enc, -(W_enc @ d_b_enc)


class _Decode(Function):
    """`code @ W_dec` as bags of decoder rows, with both gradients on the pairs."""

    @staticmethod
    def forward(ctx: Any, code: SparseCode, value: Tensor, W_dec: Tensor) -> Tensor:
        ctx.save_for_backward(value, W_dec)
        ctx.code = code
        return _bag(code.column, W_dec, code.row_start(), value)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        value, W_dec = ctx.saved_tensors
        code, g = ctx.code, g.contiguous()
        order, offsets = code.by_column()
        d_value = _sampled_product(g, W_dec, code)
        return None, d_value, _bag(code.row[order], g, offsets, value[order])


def encode(
    x: Tensor,
    weights: Weights,
    total: int,
    *,
    lower_bound: float = 0.0,
    row_block: int | None = None,
) -> SparseCode:
    """`batch_topk` whose `value` carries gradients to `W_enc`, `b_enc` and `b_dec`.

    `x` gets no gradient: activations are data here.
    """
    code = batch_topk(x, weights, total, lower_bound=lower_bound, row_block=row_block)
    value = _Encode.apply(x, weights, code, weights.W_enc, weights.b_enc, weights.b_dec)
    return code._replace(value=value)


def decode(code: SparseCode, weights: Weights) -> Tensor:
    """(N, D) reconstructions `code @ W_dec + b_dec`, with gradients to the code and weights."""
    return _Decode.apply(code, code.value, weights.W_dec) + weights.b_dec
