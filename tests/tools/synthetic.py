"""SAEs with random weights, and activations made of known sparse directions."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sae_core.activations.store import ActivationSource
from sae_core.models.language_model import Hook
from sae_core.sae.config import SAESpec
from sae_core.sae.kinds import build
from sae_core.sae_base import SparseAutoencoder
from sae_core.trainer.training_inputs import Activations, Provenance

KINDS = (
    "batch_topk",
    "topk",
    "matryoshka_batch_topk",
    "multi_batch_topk",
    "jumprelu",
    "gated",
    "standard",
)

BATCH_KINDS = ("batch_topk", "matryoshka_batch_topk", "multi_batch_topk")
"""Those whose inference threshold is calibrated."""

DENSE_KINDS = ("gated", "standard")
"""Those that have no k."""

SIZES = [3, 8, 20]
"""Of the nested SAEs."""

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
    own: dict[str, Any] = {"sae_type": kind}
    if kind in DENSE_KINDS:
        own["top_k"] = 0
    if kind == "matryoshka_batch_topk":
        own["matryoshka_sizes"] = SIZES
    values = {**OLD_KEYS, **own, **changes}
    values["hook_spec"] = f"blocks.{values['hook_layer']}.{values['hook_name']}"
    return SAESpec(**values)


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
        if kind in BATCH_KINDS:
            sae.threshold.fill_(0.4)
        if kind == "jumprelu":
            sae.threshold.abs_()
    return sae


def closed_form(sae: SparseAutoencoder, x: Tensor) -> Tensor:
    """The features of `x` (B, L, D) at inference, from each paper's formula."""
    centred = x if sae.spec.target_hook_name else x - sae.b_dec
    pre = torch.einsum("bld,df->blf", centred, sae.W_enc) + sae.b_enc
    if sae.spec.sae_type == "topk":
        return torch.where(pre >= pre.sort(-1).values[..., -sae.spec.top_k, None], pre, 0).relu()
    if sae.spec.sae_type == "gated":
        magnitude = torch.einsum("bld,df->blf", centred, sae.W_enc * sae.r_mag.exp()) + sae.b_mag
        return torch.where(pre > 0, magnitude.clamp(min=0), 0.0)
    return torch.where(pre > sae.threshold, pre.clamp(min=0), 0.0)


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


HOOK = Hook(1, "hook_resid_post")

PROVENANCE = Provenance("made up", None, "float32", "texts.json", "0" * 64, False)


def made_up(
    source: ActivationSource,
    hook: Hook = HOOK,
    d_in: int = 16,
    provenance: Provenance = PROVENANCE,
    **others: Any,
) -> Activations:
    """A source as what an SAE is trained on."""
    return Activations(source, hook, d_in, provenance, **others)


class SparseMap(SparseDirections):
    """Rows for a transcoder: behind each activation what a matrix makes of it, `y = x @ A + 40`,
    so that each direction of x has an image of its own in y."""

    def __init__(self, **shape: int) -> None:
        super().__init__(**shape)
        x = self.activations
        draw = torch.Generator().manual_seed(8)
        matrix = torch.randn(x.shape[-1], x.shape[-1], generator=draw)
        self.activations = torch.cat([x, x @ matrix + 40], dim=-1)
