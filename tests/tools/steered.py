"""An SAE of the tiny model for splicing and steering, and the model's logits and cross-entropy."""

from typing import Any

import torch
import torch.nn.functional as F
from synthetic import random_sae
from tiny_model import WIDTH
from torch import Tensor

from sae_core.models.language_model import LanguageModel
from sae_core.sae_base import SparseAutoencoder

FEATURES = 64
SITES = (
    "hook_resid_pre",
    "hook_attn_out",
    "hook_resid_mid",
    "mlp.hook_in",
    "hook_mlp_out",
    "hook_resid_post",
)
PROMPT = "The energy of a particle"


def an_sae(**changes: Any) -> SparseAutoencoder:
    """An SAE of the tiny model, active on every token."""
    own = {"d_in": WIDTH, "d_sae": FEATURES, "hook_layer": 1, "hook_name": "hook_resid_post"}
    sae = random_sae("batch_topk", torch.float32, **{**own, **changes})
    return sae.requires_grad_(False)


def logits(model: Any, tokens: Tensor) -> Tensor:
    inner = model.model if isinstance(model, LanguageModel) else model
    return inner(tokens, use_cache=False).logits


def ce(model: LanguageModel, tokens: Tensor) -> float:
    with torch.no_grad():
        found = logits(model, tokens)[:, :-1].flatten(0, 1).float()
    return float(F.cross_entropy(found, tokens[:, 1:].flatten()))
