"""The largest positive entries of a matrix of bfloat16, exactly, in Triton.

Positive numbers have the order of their bit patterns, and bfloat16 has 2^15 of those. So

    count[p] = how many entries have pattern p                      (integers: any order of adding)
    T = the largest pattern with count[T] + count[T + 1] + ... >= total
    kept = entries above T, and the first `total` minus so many of those at T, row by row

is the stable sort of all entries, cut after `total`, without a sort. Where a kept entry goes is how
many are kept before it: tiles of a row count theirs, a prefix sum over the tiles says where each
begins, and a second pass writes. With fewer than `total` positive entries T is 0, and all are kept.

Most entries lie far below T, and counting them would take longest. They are counted only if those
above `floor`, half of the last step's T, are not enough: the result is the same.

Of several processes, each with some rows, each counts its own entries. They add up the counts, find
the same T, and give what is left at T to the first of them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae_core.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from sae_core.sae.static import launching
from sae_core.sae.static.pairs import Slots
from sae_core.sae.static.sharing import own_ties

PATTERNS = 2**15
"""Positive numbers of 16 bits, NaN among them: it counts as the largest."""

BELOW = 128
"""How far below the threshold the next floor is, in patterns: a factor of 2."""

TILE = 2048
"""Entries of a row that one program looks at."""


@triton.jit
def _count_patterns(
    pre, rows, columns, total, floor, seen, count, F, ABOVE: tl.constexpr, TILE: tl.constexpr
):
    """Add a tile's patterns above the floor, or those below it if too few were seen above."""
    row = tl.program_id(0).to(tl.int64)
    wanted = tl.load(total)
    needed = (tl.load(rows + row) != 0) & (wanted > 0)
    if not ABOVE:
        needed = needed & (tl.load(seen) < wanted)
    if needed:
        column = tl.program_id(1) * TILE + tl.arange(0, TILE)
        key = tl.load(pre + row * F + column, mask=column < F, other=0).to(tl.int32)
        inside = tl.load(columns + column, mask=column < F, other=0) != 0
        bottom = tl.load(floor)
        if ABOVE:
            counted = inside & (key > bottom)
        else:
            counted = inside & (key > 0) & (key <= bottom)
        tl.atomic_add(count + key, 1, mask=counted, sem="relaxed")


@triton.jit
def _threshold(count, total, limits, floor, PATTERNS: tl.constexpr, BELOW: tl.constexpr):
    """`limits`: the threshold, how many entries at it are kept, and how many are kept in all."""
    pattern = tl.arange(0, PATTERNS)
    number = tl.load(count + pattern)
    wanted = tl.load(total)
    reached = tl.cumsum(number, 0, reverse=True) >= wanted
    least = tl.max(tl.where(reached, pattern, 0))
    above = tl.sum(tl.where(pattern > least, number, 0))
    at = tl.sum(tl.where((pattern == least) & (pattern > 0), number, 0))
    ties = tl.minimum(wanted - above, at)
    tl.store(limits, least)
    tl.store(limits + 1, ties)
    tl.store(limits + 2, above + ties)
    tl.store(floor, tl.maximum(least - BELOW, 0))


@triton.jit
def _count_kept(pre, rows, columns, limits, numbers, F, TILE: tl.constexpr):
    """How many entries of a tile lie above the threshold, and, behind those of all tiles, at it."""
    row, tile, n_tiles = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    n_above, n_at = 0, 0
    if tl.load(rows + row) != 0:
        column = tile * TILE + tl.arange(0, TILE)
        key = tl.load(pre + row * F + column, mask=column < F, other=0).to(tl.int32)
        inside = tl.load(columns + column, mask=column < F, other=0) != 0
        least = tl.load(limits)
        n_above = tl.sum((inside & (key > least)).to(tl.int32))
        n_at = tl.sum((inside & (key == least) & (key > 0)).to(tl.int32))
    tl.store(numbers + row * n_tiles + tile, n_above)
    tl.store(numbers + (row + tl.num_programs(0)) * n_tiles + tile, n_at)


@triton.jit
def _write_kept(
    pre, rows, columns, limits, before, row_of, column_of, value_of, start, F, TILE: tl.constexpr
):
    """Write a tile's kept entries where they belong. `before` has the sums of `_count_kept` before
    each tile, in one row: those at the threshold begin with all that lie above it."""
    row, tile, n_tiles = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    ties, at = tl.load(limits + 1), before + tl.num_programs(0).to(tl.int64) * n_tiles
    n_above = tl.load(before + row * n_tiles + tile)
    n_at = tl.load(at + row * n_tiles + tile) - tl.load(at)
    if tile == 0:
        tl.store(start + row, n_above + tl.minimum(n_at, ties))
        tl.store(start + tl.num_programs(0), tl.load(limits + 2))
    if tl.load(rows + row) != 0:
        column = tile * TILE + tl.arange(0, TILE)
        bits = tl.load(pre + row * F + column, mask=column < F, other=0)
        inside = tl.load(columns + column, mask=column < F, other=0) != 0
        key, least = bits.to(tl.int32), tl.load(limits)
        is_above = (inside & (key > least)).to(tl.int32)
        is_tie = (inside & (key == least) & (key > 0)).to(tl.int32)
        before_above = n_above + tl.cumsum(is_above, 0) - is_above
        before_at = n_at + tl.cumsum(is_tie, 0) - is_tie
        kept = (is_above > 0) | ((is_tie > 0) & (before_at < ties))
        slot = before_above + tl.minimum(before_at, ties)
        tl.store(row_of + slot, row.to(tl.int32), mask=kept)
        tl.store(column_of + slot, column, mask=kept)
        value = bits.to(tl.bfloat16, bitcast=True).to(tl.float32)
        tl.store(value_of + slot, value, mask=kept)


def select(
    pre: Tensor,
    rows: Tensor,
    columns: Tensor,
    total: Tensor,
    n_slots: int,
    floor: Tensor,
    group: ProcessGroup = SINGLE_PROCESS,
) -> Slots:
    """The `total` largest positive entries of a matrix, ties to the earlier one.

    Args:
        pre: (N, F) bfloat16.
        rows: (N,) bool: those that count.
        columns: (F,) bool: those that count.
        total: () int32, how many to keep; at most `n_slots`.
        floor: () int32, where counting may begin; is set for the next call. None changes the
            result.
        group: the processes that have the other rows of the matrix.
    """
    n, n_features = pre.shape
    device, keys = pre.device, pre.view(torch.int16)
    tile = min(TILE, triton.next_power_of_2(n_features))
    grid = (n, triton.cdiv(n_features, tile))
    count = torch.zeros(PATTERNS, dtype=torch.int32, device=device)
    given = keys, rows, columns
    launching.launch(
        _count_patterns, grid, *given, total, floor, total, count, n_features, ABOVE=True, TILE=tile
    )
    seen = group.all_reduce(count.sum(dtype=torch.int32))
    launching.launch(
        _count_patterns, grid, *given, total, floor, seen, count, n_features, ABOVE=False, TILE=tile
    )
    limits = torch.empty(3, dtype=torch.int32, device=device)
    launching.launch(
        _threshold, (1,), group.all_reduce(count), total, limits, floor,
        PATTERNS=PATTERNS, BELOW=BELOW, num_warps=32,
    )  # fmt: skip
    if not group.is_single:
        limits = _own(limits, count, group)
    numbers = torch.empty(2 * grid[0] * grid[1], dtype=torch.int32, device=device)
    launching.launch(_count_kept, grid, *given, limits, numbers, n_features, TILE=tile)
    # In one row: of several, CUDA lets a block of threads add each.
    before = numbers.cumsum(0, dtype=torch.int32) - numbers
    slots = Slots.empty(n, n_features, n_slots, limits[0])
    launching.launch(_write_kept, grid, *given, limits, before, *slots[:4], n_features, TILE=tile)
    return slots


def _own(limits: Tensor, count: Tensor, group: ProcessGroup) -> Tensor:
    """The limits (3,) of all processes, with what this one keeps, which has counted (PATTERNS,)."""
    least, ties = limits[:1], limits[1]
    ties = own_ties(ties, count.gather(0, least.long())[0], group)
    pattern = torch.arange(PATTERNS, dtype=torch.int32, device=count.device)
    above = torch.where(pattern > least, count, 0).sum(dtype=torch.int32)
    return torch.cat([least, ties[None], (above + ties)[None]])
