"""The largest numbers of several processes together, of which each knows its own.

They exchange counts, in as many bytes as there are bit patterns, and never the numbers. Nothing is
asked of the device.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sae_core.distributed.process_group import ProcessGroup


def own_ties(ties: Tensor, own: Tensor, group: ProcessGroup) -> Tensor:
    """() how many of its `own` () entries at the threshold this process keeps, when all together
    keep `ties` (): those of the first processes."""
    return torch.minimum((ties - group.sum_before(own)).clamp(min=0), own).to(own.dtype)


def least_of_all(value: Tensor, total: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """() the smallest of the `total` () largest numbers of all processes, and () how many of those
    of this process that are equal to it are among them.

    Positive float32 numbers are in the order of their bit patterns, which are counted by the upper
    half, and then within the half where the smallest one is. See `largest_entries.largest_of_all`.

    Args:
        value: (C,) float32, not negative; those of all processes are `total` or more.
    """
    pattern = value.view(torch.int32) & 0x7FFFFFFF  # zero and NaN may have a sign
    upper, lower = pattern >> 16, pattern & 0xFFFF
    half, above = _reached(upper, 2**15, total, group)
    in_half = torch.where(upper == half, lower, 2**16)
    rest, more = _reached(in_half, 2**16, total - above, group)
    least = (half << 16 | rest).int()
    ties = own_ties(total - above - more, (pattern == least).sum(), group)
    return least.view(torch.float32), ties


def _reached(
    key: Tensor, n_keys: int, wanted: Tensor, group: ProcessGroup
) -> tuple[Tensor, Tensor]:
    """() the largest key that `wanted` () of all processes' keys (C,) reach, and () how many exceed
    it. The key `n_keys` does not count."""
    count = key.new_zeros(n_keys + 1).scatter_add_(0, key.long(), torch.ones_like(key))
    reach = group.all_reduce(count[:-1]).flip(0).cumsum(0).flip(0)
    least = (reach >= wanted).sum() - 1
    return least, F.pad(reach, (0, 1)).gather(0, least[None] + 1)[0]
