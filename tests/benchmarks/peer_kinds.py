"""The peers' other kinds of SAE, for the benchmark of known features."""

from collections.abc import Callable
from importlib import import_module
from itertools import pairwise
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


def sae_lens(data: Data, config: SAEConfig, lr: float, seed: int) -> Trained:
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


class Trainer(NamedTuple):
    """Where dictionary-learning has a kind, and how it is asked for as much sparsity as ours."""

    module: str
    name: str
    options: Callable[[SAEConfig, int], dict[str, Any]]
    """From our configuration, and the steps of the training."""


def _warm_up(n_steps: int) -> int:
    return n_steps // 20


def _penalised(config: SAEConfig, n_steps: int) -> dict[str, Any]:
    return {"l1_penalty": config.sparsity_penalty, "sparsity_warmup_steps": _warm_up(n_steps)}


def _targeted(config: SAEConfig, n_steps: int) -> dict[str, Any]:
    return {"target_l0": config.topk, "sparsity_warmup_steps": _warm_up(n_steps)}


def _groups(config: SAEConfig, n_steps: int) -> dict[str, Any]:
    """Its groups are what each of our levels adds to the one before."""
    shares = pairwise([0, *config.matryoshka_fractions, 1])
    return {
        "k": config.topk,
        "group_fractions": [level - before for before, level in shares],
        "threshold_start_step": n_steps // 2,
        "threshold_beta": 0.9,
    }


TRAINERS = {
    "matryoshka_batch_topk": Trainer(
        "matryoshka_batch_top_k", "MatryoshkaBatchTopKTrainer", _groups
    ),
    "jumprelu": Trainer("jumprelu", "JumpReluTrainer", _targeted),
    "gated": Trainer("gdm", "GatedSAETrainer", _penalised),
    "standard": Trainer("standard", "StandardTrainer", _penalised),
    "topk": Trainer("top_k", "TopKTrainer", lambda config, _: {"k": config.topk}),
}


def dictionary_learning(data: Data, config: SAEConfig, lr: float, seed: int) -> Trained:
    """dictionary-learning's SAE of our configuration's kind, with our warm-up and decay."""
    kind, d_in, n_steps = TRAINERS[config.sae_type], data.held_out.shape[1], len(data.batches)
    module = import_module(f"dictionary_learning.trainers.{kind.module}")
    trainer = getattr(module, kind.name)(
        steps=n_steps,
        activation_dim=d_in,
        dict_size=config.sae_expansion * d_in,
        layer=0,
        lm_name="none",
        lr=lr,
        warmup_steps=_warm_up(n_steps),
        decay_start=n_steps - n_steps // 5,
        seed=seed,
        device=DEVICE.type,
        **kind.options(config, n_steps),
    )
    for step, x in enumerate(data.batches):
        trainer.update(step, x)

    def code(x: Tensor) -> Tensor:
        """The nested kind takes rows only."""
        features: Tensor = trainer.ae.encode(torch.atleast_2d(x))
        return features.view(*x.shape[:-1], -1)

    return Trained(code, trainer.ae.decode, 0.0)
