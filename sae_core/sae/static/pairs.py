"""Pairs of a token and a feature, in a fixed number of slots.

Shapes: N tokens, F features, P slots, M codes of the same tokens.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sae_core.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from sae_core.sae.static.sharing import least_of_all


class Slots(NamedTuple):
    """One code: pairs ordered by token, then by feature, followed by the unused slots."""

    row: Tensor
    """(P,) int32: the token of each pair; 0 where there is none."""
    column: Tensor
    """(P,) int32: the feature of each pair; F where there is none."""
    value: Tensor
    """(P,) float32: the activation of each pair; 0 where there is none."""
    start: Tensor
    """(N + 1,) int32: where each token's pairs begin, and after the last where they end."""
    least: Tensor
    """() float32: the smallest value that a top-k keeps; 0 if fewer than wanted were positive."""

    @classmethod
    def empty(cls, n: int, n_features: int, n_slots: int, pattern: Tensor) -> "Slots":
        """No pair yet; the least value is the bfloat16 of this () int32 bit pattern."""
        column = pattern.new_full((n_slots,), n_features)
        value = torch.zeros(n_slots, device=pattern.device)
        least = pattern.to(torch.int16).view(torch.bfloat16).float()
        return cls(torch.zeros_like(column), column, value, pattern.new_empty(n + 1), least)

    @property
    def n_pairs(self) -> Tensor:
        """() int32: how many pairs there are."""
        return self.start[-1]


class Codes(NamedTuple):
    """M codes of the same tokens, one after the other: token r of code m is row `m N + r`."""

    row: Tensor
    """(P,) int32"""
    column: Tensor
    """(P,) int32"""
    value: Tensor
    """(P,) float32"""
    start: Tensor
    """(M, N + 1) int32"""
    n_first: int
    """Slots of the first code."""

    @classmethod
    def of(cls, *codes: Slots) -> "Codes":
        """These codes together."""
        n, first = len(codes[0].start) - 1, 0
        rows, starts = [], []
        for m, code in enumerate(codes):
            rows.append(code.row + m * n)
            starts.append(code.start + first)
            first += len(code.row)
        column, value = (torch.cat([code[at] for code in codes]) for at in (1, 2))
        return cls(torch.cat(rows), column, value, torch.stack(starts), len(codes[0].row))

    @classmethod
    def nested(cls, main: Slots, group: Tensor, n_groups: int, aux: Slots) -> "Codes":
        """A code as the codes of its groups, then another code.

        Args:
            group: (P,) int32 the group of each pair of `main`; `n_groups` for the unused slots.
        """
        n = len(main.start) - 1
        key, order = torch.sort(group * n + main.row, stable=True)
        ends = torch.arange(n_groups * n + 1, dtype=torch.int32, device=key.device)
        start = torch.searchsorted(key, ends, out_int32=True)
        row = torch.where(key < n_groups * n, key, 0)
        return cls(
            torch.cat([row, aux.row + n_groups * n]),
            torch.cat([main.column[order], aux.column]),
            torch.cat([main.value[order], aux.value]),
            torch.cat([start.unfold(0, n + 1, n), aux.start[None] + len(main.row)]),
            len(main.row),
        )

    @property
    def n_tokens(self) -> int:
        return self.start.shape[1] - 1

    @property
    def n_rows(self) -> int:
        return len(self.start) * self.n_tokens


class Prepared(NamedTuple):
    """A batch as it enters the SAE; rows that are not kept are 0 before they are centred."""

    x: Tensor
    """(N, D) centred on the input's bias."""
    half: Tensor
    """(N, D) the same in bfloat16."""
    wanted: Tensor
    """(N, D) what is to be reconstructed."""
    kept: Tensor
    """(N,) bool: no outlier."""
    finite: Tensor
    """(N,) bool"""


class Gradients(NamedTuple):
    """Of the loss with respect to the weights, one row per feature."""

    W_dec: Tensor
    """(F, D)"""
    W_enc: Tensor
    """(F, D), transposed"""
    b_enc: Tensor
    """(2, F): what the pairs of the first code add, and those of the others."""


def entries(matrix: Tensor, slots: Slots) -> Tensor:
    """(P,) the positive entries of (N, F) at the pairs; 0 where none is."""
    n_features = matrix.shape[1]
    at = slots.row.long() * n_features + slots.column.clamp(max=n_features - 1)
    return torch.where(slots.column < n_features, matrix.view(-1)[at].clamp(min=0.0), 0.0)


def refine(
    slots: Slots,
    value: Tensor,
    total: Tensor,
    n_slots: int,
    n_features: int,
    group: ProcessGroup = SINGLE_PROCESS,
) -> Slots:
    """The `total` largest of the pairs by another value, ties to the earlier one.

    Args:
        slots: C candidates.
        value: (C,) float32; 0 where there is no pair.
        total: () int32; at most `n_slots`.
        group: the processes that have pairs of other tokens.
    """
    [(kept, least)] = largest(value, total[None], group)
    pairs, ends = compacted(kept, slots.row, slots.column, value, n_slots, n_features)
    start = torch.cat([ends.new_zeros(1), ends])[slots.start.long()]
    return Slots(*pairs, start, least)


def largest(value: Tensor, totals: Tensor, group: ProcessGroup) -> Iterator[tuple[Tensor, Tensor]]:
    """For each of some totals, (C,) bool which of the pairs are so many of the largest, ties to the
    earlier one, and () the smallest value of these; 0 if fewer are positive.

    Args:
        value: (C,) float32; 0 where there is no pair.
        totals: (M,) int32.
        group: the processes that have pairs of other tokens.
    """
    ranked = value.sort(descending=True).values if group.is_single else value
    for total in totals.unbind():
        if group.is_single:
            last = (total - 1).clamp(0, len(value) - 1)
            least = ranked.gather(0, last.long()[None])[0].clamp(min=0.0)
            above = value > least
            ties = total - above.sum()
        else:
            least, ties = least_of_all(value, total, group)
            above = value > least
        is_tie = (value == least) & (value > 0)
        yield above | (is_tie & (is_tie.cumsum(0) <= ties)), least


def compacted(
    kept: Tensor, row: Tensor, column: Tensor, value: Tensor, n_slots: int, n_features: int
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Those of the pairs (C,) that are kept, in the first of (P,) slots: rows, columns and values;
    and (C,) int32 how many are kept up to each."""
    ends = kept.cumsum(0, dtype=torch.int32)
    place = torch.where(kept, ends - 1, n_slots).long()

    def compact(given: Tensor, unused: int) -> Tensor:
        return given.new_full((n_slots + 1,), unused).scatter_(0, place, given)[:n_slots]

    return (compact(row, 0), compact(column, n_features), compact(value, 0)), ends
