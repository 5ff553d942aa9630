"""A sparse code as pairs of a token and a feature, and the weights that it belongs to.

Shapes: N tokens, F features, D activation width, P pairs.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from sae_core.sae.precision import Precision


@dataclass(frozen=True)
class Pairs:
    """Which features are active on which tokens, ordered by token, then by feature."""

    row: Tensor
    """(P,) int64: the token of each pair."""
    column: Tensor
    """(P,) int64: the feature of each pair."""
    row_start: Tensor
    """(N + 1,) where each token's pairs begin: CSR offsets."""
    n_columns: int

    @classmethod
    def at(cls, index: Tensor, n_rows: int, n_columns: int) -> "Pairs":
        """The pairs at positions `index` (P,), ascending, of the flattened N x F matrix."""
        starts = torch.arange(n_rows + 1, device=index.device) * n_columns
        row_start = torch.searchsorted(index, starts)
        row = torch.repeat_interleave(torch.diff(row_start), output_size=len(index))
        return cls(row, index - row * n_columns, row_start, n_columns)

    @property
    def n_rows(self) -> int:
        return len(self.row_start) - 1

    @cached_property
    def by_column(self) -> tuple[Tensor, Tensor, Tensor]:
        """(P,) the order of the pairs by feature, (P,) their tokens in it, and (F + 1,) where each
        feature begins: CSC."""
        narrow = torch.int16 if self.n_columns < 2**15 else torch.int32  # sorts faster
        order = torch.argsort(self.column.to(narrow), stable=True)
        start = self.column.new_zeros(self.n_columns + 1)
        torch.cumsum(self.counts(), 0, out=start[1:])
        return order, self.row[order], start

    def counts(self) -> Tensor:
        """(F,) how many tokens each feature is active on."""
        return torch.bincount(self.column, minlength=self.n_columns)


@dataclass(frozen=True)
class SparseCode:
    """A non-negative code of N tokens as P pairs and their values."""

    pairs: Pairs
    value: Tensor
    """(P,) the activation of each pair, above 0."""
    least: float = 0.0
    """The smallest value that a top-k keeps; 0 if fewer than wanted were positive."""

    def where(self, kept: Tensor) -> "SparseCode":
        """The pairs for which `kept` (P,) bool is true."""
        pairs = self.pairs
        index = (pairs.row * pairs.n_columns + pairs.column)[kept]
        return SparseCode(Pairs.at(index, pairs.n_rows, pairs.n_columns), self.value[kept])

    def to_dense(self) -> Tensor:
        """(N, F) the same code with its zeros."""
        pairs = self.pairs
        dense = self.value.new_zeros(pairs.n_rows, pairs.n_columns)
        return dense.index_put((pairs.row, pairs.column), self.value)


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

    def precision(self) -> Precision:
        """The plain precision: the weights' own number format throughout."""
        return Precision(self.W_enc.dtype, self.W_enc.dtype)
