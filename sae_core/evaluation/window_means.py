"""Windows as single points: the mean activation and the mean code of each, for the probes.

Shapes: W windows, B of L tokens in a batch, D width, F features.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from sae_core.sae.sparse_ops import SparseCode

TRAINS = 0.75
"""Share of a subject's windows that train the probes."""

Array = NDArray[Any]


class WindowMeans:
    """The means of the windows of one subject, collected while a corpus is read."""

    def __init__(self) -> None:
        self.x: list[Tensor] = []
        self.code: list[sparse.csr_array] = []
        self.subject: list[Tensor] = []

    def add(self, x: Tensor, code: SparseCode, counted: Tensor, subject: Tensor) -> None:
        """Add a batch of B windows of L tokens; windows of several subjects are left out.

        Args:
            x: (B, L, D) activations.
            code: of all B L tokens.
            counted: (B, L) bool: the tokens that the means are over.
            subject: (B, L) index of each token's subject.
        """
        n = counted.sum(1)
        used = (subject == subject[:, :1]).all(1) & (n > 0)
        share = counted / n.clamp(min=1)[:, None]
        pairs = code.pairs
        weight = (share * used[:, None]).flatten()[pairs.row]
        window = torch.div(pairs.row, counted.shape[1], rounding_mode="floor")
        entries = ((code.value * weight).cpu().numpy(), (window.cpu(), pairs.column.cpu()))
        summed = sparse.coo_array(entries, (len(n), pairs.n_columns)).tocsr()
        kept = used.cpu()
        self.code.append(summed[kept.numpy()])
        self.x.append((x.float() * share[..., None]).sum(1).cpu()[kept])
        self.subject.append(subject[:, 0].cpu()[kept])

    def samples(self) -> "Samples | None":
        """All windows, in the order of the corpus; None if nothing was added."""
        if not self.code:
            return None
        code = sparse.vstack(self.code, format="csc")
        return Samples(torch.cat(self.x).numpy(), code, torch.cat(self.subject).numpy())


class Samples(NamedTuple):
    """The windows' means and their subjects."""

    x: Array
    """(W, D)"""
    code: sparse.csc_array
    """(W, F)"""
    subject: Array
    """(W,)"""

    def split(self, chosen: Sequence[int]) -> "tuple[Samples, Samples]":
        """Training and test windows of these subjects."""
        train = np.zeros(len(self.subject), dtype=bool)
        test = train.copy()
        for index in chosen:
            own = np.flatnonzero(self.subject == index)
            n_train = round(TRAINS * len(own))
            train[own[:n_train]], test[own[n_train:]] = True, True
        return self._part(train), self._part(test)

    def _part(self, at: Array) -> "Samples":
        return Samples(self.x[at], self.code[at], self.subject[at])
