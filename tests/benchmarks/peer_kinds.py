"""sae-lens's other kinds of SAE, for the benchmark of known features."""

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch
from machine import DEVICE
from peer_training import fit_sae_lens
from sae_figures import Data, Trained
from torch import Tensor

from sae_core.sae.config import SAEConfig


class Kind(NamedTuple):
    """Where sae-lens has a kind, and how it is asked for as much sparsity as ours."""

    module: str
    name: str
    """What stands before `TrainingSAE` in the name of its class."""
    options: Callable[[SAEConfig, float, int], dict[str, Any]]
    """From our configuration, the factor by which its activations are larger, and the features."""


def _levels(config: SAEConfig, scale: float, features: int) -> dict[str, Any]:
    widths = [round(share * features) for share in config.matryoshka_fractions]
    return {"k": config.topk, "matryoshka_widths": [*widths, features]}


def _l1(config: SAEConfig, scale: float, features: int) -> dict[str, Any]:
    """Squares grow with the square of the scale, the norm with the scale."""
    return {"l1_coefficient": config.sparsity_penalty * scale}


def _target(config: SAEConfig, scale: float, features: int) -> dict[str, Any]:
    return {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": config.topk}


KINDS = {
    "topk": Kind("topk_sae", "TopK", lambda config, *_: {"k": config.topk}),
    "matryoshka_batch_topk": Kind("matryoshka_batchtopk_sae", "MatryoshkaBatchTopK", _levels),
    "jumprelu": Kind("jumprelu_sae", "JumpReLU", _target),
    "gated": Kind("gated_sae", "Gated", _l1),
    "standard": Kind("standard_sae", "Standard", _l1),
}


def train(data: Data, config: SAEConfig, lr: float, seed: int) -> Trained:
    """sae-lens's SAE of our configuration's kind, size and sparsity, with our warm-up and decay."""
    torch.manual_seed(seed)
    kind = KINDS[config.sae_type]
    module = import_module(f"sae_lens.saes.{kind.module}")
    cls = getattr(module, f"{kind.name}TrainingSAE")
    d_in = data.held_out.shape[1]
    scale, features = d_in**0.5, config.sae_expansion * d_in
    options = kind.options(config, scale, features)
    of_sae = getattr(module, f"{kind.name}TrainingSAEConfig")
    sae = cls(of_sae(d_in=d_in, d_sae=features, device=DEVICE.type, **options))
    fit_sae_lens(sae, data, scale, lr)
    return _trained(sae, scale)


def _trained(sae: Any, scale: float) -> Trained:
    """What a batch top-k leaves out depends on the batch: its kind has a threshold instead."""
    threshold = getattr(sae, "topk_threshold", None)

    def code(x: Tensor) -> Tensor:
        active, pre = sae.encode_with_hidden_pre(scale * x)
        return active if threshold is None else pre

    least = 0.0 if threshold is None else float(threshold)
    return Trained(code, lambda code: sae.decode(code) / scale, least)
