"""The largest entries of the encoder product, which is computed in tiles and never kept.

Shapes: N tokens, F features, D activation width, C candidates.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sae_core.distributed.process_group import ProcessGroup
from sae_core.sae.pair_products import sampled_product, slices
from sae_core.sae.precision import Precision
from sae_core.sae.sparse_code import Pairs, Weights

BLOCK_BYTES = 2**25
"""Pre-activations of one row block: about what fits in a processor's cache."""

TILE_ROWS = 512
"""Tokens in one call of the product, at most. A matrix product's last bits depend on how many rows
it has. So a block is made of tiles, whose size depends on the SAE alone, and how many tokens a
block has changes nothing."""

GPU_FACTOR = 8
"""On a GPU blocks and tiles are so many times as large: it is launches that take time there."""

CANDIDATE_FACTOR = 4
"""Candidates are cut back to the `total` largest when there are this many times more."""

ROUNDING = 1.1 * 2**-8
"""Most that rounding two vectors to bfloat16 moves their product, over the product of their norms;
the tenth is for the sums, which are in float32."""

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By bytes."""


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


def tiled_product(x: Tensor, W_enc: Tensor, bias: Tensor) -> Tensor:
    """(N, D) -> (N, F) `x @ W_enc + bias`; the same for a row whatever the number of tiles."""
    rows = tile_rows(W_enc.shape[1], x.dtype, x.device)
    block = x.new_empty(len(x), W_enc.shape[1])
    for part, out in zip(x.split(rows), block.split(rows), strict=True):
        torch.addmm(bias, part, W_enc, out=out)
    return block


def positive_entries(block: Tensor, floor: float = 0.0) -> Tensor:
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


class EncoderProduct:
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
        block = tiled_product(x[first : first + rows], W_enc, self.shift.to(x.dtype))
        index = positive_entries(block, floor)
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
        x, W_enc_FD = (slices(table, self.total) for table in (self.x, self.W_enc.T))
        return sampled_product(x, W_enc_FD, pairs) + self.b_enc[pairs.column]


def kth_largest(value: Tensor, k: int) -> Tensor:
    """(scalar) the `k` largest of (C,) numbers are this or more."""
    if value.device.type == "cpu":  # NumPy's is ten times as fast there
        exact = value.float() if value.dtype == torch.bfloat16 else value  # NumPy knows no bfloat16
        kth = np.partition(exact.numpy(), len(value) - k)[len(value) - k, None]
        return torch.from_numpy(kth).to(value.dtype)
    return torch.topk(value, k, sorted=False).values.amin()  # ten times as fast as `kthvalue`


class LargestEntries:
    """The largest entries of a product, found block by block in bounded memory."""

    def __init__(self, product: EncoderProduct, bound: float) -> None:
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
        kept = largest(value, self.total)
        return index[kept], value[kept]


def largest(value: Tensor, total: int) -> Tensor:
    """(total,) ascending, which of (C,) numbers are the largest; ties go to the earlier one."""
    least = kth_largest(value, total)
    kept = (value >= least).nonzero().squeeze(1)
    if len(kept) > total:
        is_tie = value[kept] == least
        surplus = is_tie.nonzero().squeeze(1)[total - len(kept) :]
        is_tie[surplus] = False
        kept = kept[(value[kept] > least) | is_tie]
    return kept


def largest_of_all(value: Tensor, total: int, group: ProcessGroup) -> tuple[Tensor | slice, float]:
    """Which of the numbers (C,), at most `total`, that this process found are among the `total`
    largest of all processes, and the smallest of these; 0 if all together have fewer.

    Positive float32 numbers are in the order of their bit patterns. So the processes count their
    patterns, first by the upper half and then within the half where the smallest one is, and add
    up these counts, not numbers. Ties go to the first processes.
    """
    if group.is_single:
        if len(value) <= total:
            return slice(None), float(value.min()) if len(value) == total else 0.0
        kept = largest(value, total)
        return kept, float(value[kept].min())
    pattern = value.clamp(min=0.0).view(torch.int32) & 0x7FFFFFFF  # NaN may have a sign
    half, n_above = _reached(pattern >> 16, 2**15, total, group)
    if half < 0:
        return slice(None), 0.0
    rest, n_more = _reached(pattern[pattern >> 16 == half] & 0xFFFF, 2**16, total - n_above, group)
    least = half << 16 | rest
    chosen, ties = pattern > least, (pattern == least).nonzero().squeeze(1)
    n_left = total - n_above - n_more - group.before(len(ties))
    chosen[ties[: max(0, n_left)]] = True
    number = torch.tensor(least, dtype=torch.int32).view(torch.float32)
    return chosen.nonzero().squeeze(1), float(number)


def _reached(key: Tensor, n_keys: int, wanted: int, group: ProcessGroup) -> tuple[int, int]:
    """The largest key that `wanted` of all processes' keys (C,) reach, -1 if there are fewer, and
    how many exceed it."""
    count = group.all_reduce(torch.bincount(key, minlength=n_keys).int())
    reach = count.flip(0).cumsum(0).flip(0)
    least = (reach >= wanted).sum() - 1
    exceed = F.pad(reach, (0, 1))[least + 1]
    found, n_exceed = torch.stack([least, exceed]).tolist()
    return found, n_exceed
