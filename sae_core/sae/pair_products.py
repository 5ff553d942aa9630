"""Products of matrices that are needed at the pairs of a sparse code only.

Shapes: N tokens, F features, D activation width, P pairs.
"""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from sae_core.sae.sparse_code import Pairs

# PyTorch says this once a process of every CSR tensor; the one use here is covered by the tests.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")

SLICE_BYTES = 256
"""On a CPU the pairs' vectors are read this many bytes at a time: such a slice of a whole matrix
stays in a core's cache, where gathering its rows is some four times as fast."""

SLICE_REUSE = 10
"""Slicing copies a matrix, which pays when each of its rows is read this often or more."""

SAMPLED_PAIRS = 2**16
"""Pairs whose two vectors are gathered at a time where there is no sampled product."""

Sliced = tuple[Tensor, ...]
"""A matrix in pieces, side by side."""


def slices(table: Tensor, n_pairs: int) -> Sliced:
    """The matrix, (N, D) or (F, D), in the pieces from which this many rows are best gathered."""
    if table.device.type == "cpu" and n_pairs >= SLICE_REUSE * len(table):
        parts = table.split(SLICE_BYTES // table.element_size(), dim=1)
    else:
        parts = (table,)
    return tuple(part.contiguous() for part in parts)


def bag(rows: Tensor, table: Sliced, offsets: Tensor, weight: Tensor) -> Tensor:
    """Weighted sums of a matrix's rows, one sum per bag."""
    out = table[0].new_empty(len(offsets) - 1, sum(part.shape[1] for part in table))
    for part, out_part in zip(table, out.split(table[0].shape[1], dim=1), strict=True):
        out_part[:] = F.embedding_bag(
            rows, part, offsets, mode="sum", per_sample_weights=weight, include_last_offset=True
        )
    return out


def sampled_product(a: Sliced, b: Sliced, pairs: Pairs) -> Tensor:
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
