"""The k largest entries of each token, as a TopK SAE keeps them, in a fixed number of slots.

`torch.topk` finds k per token whatever their values are; what is not positive, or is of a token
that does not count, is left out when the slots are filled. The values are the entries' own.
"""

import torch
from torch import Tensor

from sae_core.sae.static.pairs import Slots, compacted


def largest_of_each(pre: Tensor, rows: Tensor, k: int, n_slots: int) -> Slots:
    """The at most k largest positive entries of each row.

    Args:
        pre: (N, F) bfloat16 or float32.
        rows: (N,) bool: those that count.
        n_slots: at least N k.
    """
    n, n_features = pre.shape
    value, column = pre.topk(min(k, n_features), dim=1, sorted=False)
    column, order = column.sort(dim=1)
    value = value.gather(1, order).float().flatten()
    row = torch.arange(n, dtype=torch.int32, device=pre.device)[:, None].expand_as(column)
    kept = (value > 0) & rows[:, None].expand_as(column).flatten()
    of_each = row.flatten(), column.int().flatten(), value
    pairs, ends = compacted(kept, *of_each, n_slots, n_features)
    ends = ends.view(n, -1)[:, -1]
    least = torch.zeros_like(pairs[2][0])  # no threshold of the batch
    return Slots(*pairs, torch.cat([ends.new_zeros(1), ends]), least)
