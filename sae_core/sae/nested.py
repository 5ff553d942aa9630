"""Reconstructions from nested parts of a code, for the price of one.

Shapes: M nested parts, N tokens, F features, D activation width, P pairs.
"""

import torch
from torch import Tensor

from sae_core.sae import sparse_ops
from sae_core.sae.precision import Precision


def nested_reconstructions(
    code: sparse_ops.SparseCode,
    group: Tensor,
    n_groups: int,
    weights: sparse_ops.Weights,
    products: Precision | None = None,
) -> Tensor:
    """(M, N, D) what the pairs of the first group reconstruct, of the first two, and so on.

    They are cumulative sums of what the groups decode to, and each pair is in one group: all of
    them cost one decode of the whole code.

    Args:
        group: (P,) the group of each pair, from 0 to M - 1.
        products: as those of `sparse_ops.decode`.
    """
    pairs = code.pairs
    # A token's share in each group is a separate row: row `group * N + token`.
    row = group * pairs.n_rows + pairs.row
    index, order = torch.sort(row * pairs.n_columns + pairs.column)
    shares = sparse_ops.SparseCode(
        sparse_ops.Pairs.at(index, n_groups * pairs.n_rows, pairs.n_columns), code.value[order]
    )
    no_bias = weights._replace(b_dec=torch.zeros_like(weights.b_dec))
    decoded = sparse_ops.decode(shares, no_bias, products)
    return decoded.view(n_groups, pairs.n_rows, -1).cumsum(0) + weights.b_dec
