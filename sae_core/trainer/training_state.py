"""What a training's next step depends on, as tensors and as values that JSON can hold.

Batches, crops and initial weights are pure functions of the seed and of what they are for, so no
random stream has a state: the number of steps done says which batch comes next.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae_core.formats.checkpoint import History
from sae_core.sae.sparse_ops import LowerBound
from sae_core.sae_base import SparseAutoencoder
from sae_core.trainer.early_stopping import EarlyStopping


class TrainingState(NamedTuple):
    """A training between two steps, as it is stored."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]
    """What JSON can hold."""


@dataclass
class Means:
    """Means over tokens of the terms of many batches, each over the batches that have it."""

    tokens: dict[str, int] = field(default_factory=dict)
    sums: dict[str, float] = field(default_factory=dict)

    def add(self, terms: Mapping[str, Tensor], l0: float, n_tokens: int) -> None:
        """Add a batch: its terms, scalar tensors, and its L0."""
        values = torch.stack(list(terms.values())).cpu().double() * n_tokens
        sums = dict(zip(terms, values.tolist(), strict=True)) | {"sparsity": l0 * n_tokens}
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.tokens[name] = self.tokens.get(name, 0) + n_tokens

    def values(self) -> dict[str, float]:
        return {name: total / self.tokens[name] for name, total in self.sums.items()}


@dataclass
class Progress:
    """How far a training has come, and what it has recorded."""

    n_done: int = 0
    """Steps."""
    epoch: int = 0
    """The last one that began, counted from 1."""
    means: Means | None = None
    """Of the steps of an epoch that is not closed; None between two epochs."""
    tokens: int = 0
    outliers: int = 0
    """Tokens that were left out."""
    skipped: int = 0
    """Batches that were not finite."""
    skipped_in_a_row: int = 0
    in_phase: bool = False
    """The end-to-end phase has begun."""
    history: History = field(default_factory=dict)
    stopping: EarlyStopping = field(default_factory=EarlyStopping)
    bound: LowerBound = field(default_factory=LowerBound)
    """Of the values that a batch's top-k keeps."""
    aux_bound: LowerBound = field(default_factory=LowerBound)
    """The same of the auxiliary loss."""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Progress":
        """From what JSON makes of `dataclasses.asdict`."""
        nested = {
            "means": values["means"] and Means(**values["means"]),
            "stopping": EarlyStopping(**values["stopping"]),
            "bound": LowerBound(**values["bound"]),
            "aux_bound": LowerBound(**values["aux_bound"]),
        }
        return cls(**{**values, **nested})

    def note(self, entry: Mapping[str, float]) -> None:
        """Add an epoch to the history; what it does not have, or no earlier one had, is None."""
        n_before = len(self.history.get("epoch", []))
        for name in [*self.history, *entry]:
            column = self.history.setdefault(name, [None] * n_before)
            if len(column) == n_before:
                column.append(entry.get(name))


def learned(sae: SparseAutoencoder, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The tensors of an SAE and of its optimizer, by name; not copies."""
    tensors = {f"sae.{name}": tensor for name, tensor in sae.state_dict().items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{index}.{name}": tensor for name, tensor in moments.items()}
    return tensors


def put_back(
    sae: SparseAutoencoder, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Give an SAE and its optimizer the tensors that `learned` gave for others like them."""
    sae.load_state_dict(_part(tensors, "sae"))
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in _part(tensors, "adam").items():
        index, _, which = name.partition(".")
        moments.setdefault(int(index), {})[which] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": moments, "param_groups": groups})


def _part(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    start = f"{name}."
    return {key.removeprefix(start): t for key, t in tensors.items() if key.startswith(start)}
