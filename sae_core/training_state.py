"""What a training's next step depends on, as tensors and as values that JSON can hold.

Batches, crops and initial weights are pure functions of the seed and of what they are for, so that
no random stream has a state: where the loop stands says which batch comes next.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae_core.sae_base import SparseAutoencoder


class TrainingState(NamedTuple):
    """A training between two steps."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]
    """What JSON can hold."""


class Means:
    """Means over tokens of the terms of many batches; of each, over the batches that have it."""

    def __init__(
        self, tokens: Mapping[str, int] | None = None, sums: Mapping[str, float] | None = None
    ) -> None:
        self.tokens, self.sums = Counter(tokens), Counter(sums)

    def add(self, terms: Mapping[str, Tensor], l0: float, n_tokens: int) -> None:
        """Add a batch: its terms, scalar tensors, and its L0."""
        values = torch.stack(list(terms.values())).cpu().double() * n_tokens
        self.sums.update(dict(zip(terms, values.tolist(), strict=True)))
        self.sums["sparsity"] += l0 * n_tokens
        self.tokens.update(dict.fromkeys([*terms, "sparsity"], n_tokens))

    def values(self) -> dict[str, float]:
        return {name: total / self.tokens[name] for name, total in self.sums.items()}


def learned(sae: SparseAutoencoder, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The tensors of an SAE and of its optimizer, by name; not copies."""
    tensors = {f"sae.{name}": tensor for name, tensor in sae.state_dict().items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{index}.{name}": tensor for name, tensor in moments.items()}
    return tensors


def put_back(
    sae: SparseAutoencoder, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Give an SAE and its optimizer what `learned` took from others like them."""
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
