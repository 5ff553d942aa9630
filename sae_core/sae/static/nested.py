"""Codes within a code, of which each has to reconstruct.

A code's pairs are cut into disjoint groups, and the first m groups together are the m-th nested
code. What the groups decode to is summed up to the nested reconstructions, and a group's gradient
is the sum of those of all reconstructions that it is in: `trainer/static_step.py` does both. Here
is which group a pair is in: one that depends on its feature, or on its value.

Shapes: P slots, M nested codes.
"""

from typing import Protocol

import torch
from torch import Tensor

from sae_core.distributed.process_group import ProcessGroup
from sae_core.sae.config import MULTIPLES, SAESpec
from sae_core.sae.static.pairs import Slots, largest


class Nesting(Protocol):
    """How a kind of SAE nests its codes."""

    n_codes: int
    main: int
    """Which of them is the SAE's own: its reconstruction has the weight of the reconstruction
    loss, and its pairs are what is recorded."""
    multiple: float
    """Pairs of the largest code, as a multiple of the top-k's."""

    def groups(self, code: Slots, n_wanted: Tensor, group: ProcessGroup) -> Tensor:
        """(P,) int32 the group of each pair, from 0 on; M for the unused slots.

        Args:
            n_wanted: () int32 pairs of the top-k in the batch.
            group: the processes that have pairs of other tokens.
        """


class ByFeature:
    """The first features alone, for each of some numbers of them, as of a Matryoshka SAE."""

    multiple = 1.0

    def __init__(self, sizes: Tensor) -> None:
        self.sizes, self.n_codes = sizes, len(sizes)
        self.main = self.n_codes - 1

    def groups(self, code: Slots, n_wanted: Tensor, group: ProcessGroup) -> Tensor:
        # The unused slots have one feature more than the last size.
        return torch.bucketize(code.column, self.sizes, right=True, out_int32=True)


class ByValue:
    """The largest pairs of the batch, for multiples of the top-k, as of a Multi-BatchTopK SAE; ties
    go to the earlier pair."""

    n_codes, main, multiple = len(MULTIPLES), MULTIPLES.index(1.0), MULTIPLES[-1]

    def __init__(self, device: torch.device) -> None:
        self.multiples = torch.tensor(MULTIPLES[:-1], dtype=torch.float64, device=device)

    def groups(self, code: Slots, n_wanted: Tensor, group: ProcessGroup) -> Tensor:
        totals = (self.multiples * n_wanted).round().int()
        first = (code.value == 0).int()  # an unused slot is in no group
        for kept, _ in largest(code.value, totals, group):
            first += ~kept
        return first


def nesting_of(spec: SAESpec, device: torch.device) -> Nesting | None:
    """That of an SAE's kind, for codes on a device; None for a kind with one code."""
    if spec.sae_type == "matryoshka_batch_topk":
        return ByFeature(torch.tensor(spec.matryoshka_sizes, device=device))
    return ByValue(device) if spec.sae_type == "multi_batch_topk" else None
