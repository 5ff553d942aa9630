"""SAEs with random weights, and activations made of known sparse directions."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sae_core.activations.store import ActivationSource
from sae_core.kinds import build
from sae_core.sae_base import SparseAutoencoder
from sae_core.sae_config import SAESpec

KINDS = ("batch_topk", "standard")

OLD_KEYS = {
    "d_in": 6,
    "d_sae": 20,
    "l1_coefficient": 0.0,
    "dtype": "float32",
    "device": "cpu",
    "hook_layer": 1,
    "hook_name": "hook_resid_post",
    "hook_spec": "blocks.1.hook_resid_post",
    "top_k": 3,
    "top_k_aux": 4,
    "n_batches_to_dead": 5,
    "aux_penalty": 0.03125,
}
"""A `config.json` with the keys that every one has, and no others."""


def spec(kind: str = "batch_topk", **changes: Any) -> SAESpec:
    """A small SAE's configuration."""
    top_k = OLD_KEYS["top_k"] if kind == "batch_topk" else 0
    return SAESpec(**{**OLD_KEYS, "top_k": top_k, "sae_type": kind, **changes})


def random_sae(
    kind: str = "batch_topk", dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any
) -> SparseAutoencoder:
    """An SAE with random weights in every tensor, and unit decoder rows."""
    sae = build(spec(kind, **changes)).to(dtype)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw))
        sae.normalise_decoder()
        if kind == "batch_topk":
            sae.threshold.fill_(0.4)
    return sae


def normal(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers, always the same."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class SparseDirections(ActivationSource):
    """Each activation is a positive combination of `n_active` of `n_features` unit directions."""

    def __init__(
        self,
        n_train: int = 64,
        n_validation: int = 8,
        d_in: int = 16,
        n_features: int = 32,
        n_active: int = 2,
        tokens_per_step: int = 256,
        seed: int = 0,
    ) -> None:
        super().__init__(n_train, n_validation, 32, tokens_per_step, seed)
        draw = torch.Generator().manual_seed(7)
        directions = F.normalize(torch.randn(n_features, d_in, generator=draw), dim=1)
        n_windows = n_train + n_validation
        scores = torch.rand(n_windows, self.positions, n_features, generator=draw)
        active = scores >= scores.topk(n_active).values[..., -1:]
        strength = 1 + torch.rand(scores.shape, generator=draw)
        self.activations = 3 + 5 * (active * strength) @ directions

    def read(self, part: str, epoch: int, indices: Tensor) -> Tensor:
        return self.activations[indices if part == "train" else indices + self.n_train]
