"""The evaluation's figures once more, from plain transformers and forward hooks, in float64."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from synthetic import closed_form
from tiny_model import N_LAYERS
from torch import Tensor, nn

from sae_core.evaluation.identity import density_histogram
from sae_core.evaluation.metrics import QUANTILES
from sae_core.models.language_model import Hook
from sae_core.sae_base import SparseAutoencoder


def module_at(model: nn.Module, hook: Hook) -> nn.Module:
    block = model.model.layers[hook.layer]
    return block.mlp if hook.hook_name in ("mlp.hook_in", "hook_mlp_out") else block


@torch.no_grad()
def mlp_input(model: nn.Module, tokens: Tensor, layer: int) -> Tensor:
    """What the MLP of a layer reads, float64."""
    seen: list[Tensor] = []
    mlp = model.model.layers[layer].mlp
    handle = mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    model(tokens)
    handle.remove()
    return seen[0].double()


@torch.no_grad()
def forward(
    model: nn.Module, tokens: Tensor, hook: Hook, value: Tensor | None = None
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Log probabilities, the activation at the hook and every block's output, all float64."""
    outputs: list[Tensor] = []
    handles = []

    def replace(_: Any, args: Any, output: Any) -> Any:
        seen.append(output.clone())
        return None if value is None else value.to(output.dtype)

    seen: list[Tensor] = []
    handles.append(module_at(model, hook).register_forward_hook(replace))
    for block in model.model.layers:
        handles.append(block.register_forward_hook(lambda _, a, out: outputs.append(out.double())))
    log_p = torch.log_softmax(model(tokens).logits.double(), -1)
    for handle in handles:
        handle.remove()
    return log_p, seen[0].double(), outputs


def masks(
    sae: SparseAutoencoder, x: Tensor, source: Tensor, excluded: Tensor | None
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(W, L - 1) bool: the tokens that the training saw, and those among them that are no outliers;
    and by suffix of a figure, (W, L) bool, the tokens that keep their activation."""
    shape = x.shape[:2]
    unseen = torch.zeros(shape, dtype=torch.bool) if excluded is None else excluded.clone()
    unseen[:, 0] = True
    seen = ~unseen[:, 1:]
    kept = seen.clone()
    for norm in (of[:, 1:].norm(dim=-1) for of in (x, source)):
        kept &= norm <= 10 * norm[seen].median()
    alone = {"": unseen, "_all_spliced": unseen & False, "_sinks_kept": unseen.clone()}
    alone["_sinks_kept"][:, 1:] = ~kept
    recorded = sae.spec.metadata.get("outlier_norm", torch.inf)
    of_target = sae.spec.metadata.get("target_outlier_norm", torch.inf)
    alone["_by_norm"] = source.norm(dim=-1) > recorded
    if sae.spec.target_hook_name:
        alone["_by_norm"] |= x.norm(dim=-1) > of_target
    return seen, kept, alone


def loss_figures(
    model: nn.Module,
    tokens: Tensor,
    hook: Hook,
    at_hook: tuple[Tensor, Tensor, Tensor],
    alone: dict[str, Tensor],
) -> tuple[dict[str, Any], list[Tensor]]:
    """What the reconstruction and the ablations cost, and every block's output with it.

    `at_hook` has the clean log probabilities, the activations and the reconstructions.
    """
    clean, x, x_hat = at_hook
    mean, _, _ = forward(model, tokens, hook, x.mean((0, 1)).expand_as(x))
    zero, _, _ = forward(model, tokens, hook, torch.zeros_like(x))

    def ce(log_p: Tensor) -> float:
        return float(F.nll_loss(log_p[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()))

    names = ("ce_clean", "ce_mean_ablation", "ce_zero_ablation")
    losses: dict[str, Any] = dict(zip(names, map(ce, (clean, mean, zero)), strict=True))
    later: dict[str, list[Tensor]] = {}
    for suffix, mask in alone.items():
        value = torch.where(mask[..., None], x, x_hat)
        log_p, _, later[suffix] = forward(model, tokens, hook, value)
        kl = (clean.exp() * (clean - log_p)).sum(-1)[:, :-1].mean()
        figures = {"ce_sae": ce(log_p), "kl": float(kl), "n_left_alone": int(mask.sum())}
        losses |= {f"{name}{suffix}": figure for name, figure in figures.items()}
        losses[f"loss_recovered{suffix}"] = None
    return losses, later[""]


def direct(
    model: nn.Module,
    sae: SparseAutoencoder,
    tokens: Tensor,
    hook: Hook,
    excluded: Tensor | None = None,
) -> dict[str, Any]:
    """The same figures, all windows at once, in float64.

    `hook` is where the SAE's output goes: of a transcoder, which reads the MLP's input, the target.
    `excluded` (W, L) bool are the tokens that its training left out.
    """
    sae = sae.double()
    clean, x, outputs = forward(model, tokens, hook)
    source = mlp_input(model, tokens, hook.layer) if sae.spec.target_hook_name else x
    features = closed_form(sae, source).detach()
    x_hat = (features @ sae.W_dec + sae.b_dec).detach()

    def fvu(mask: Tensor) -> float:
        rows = x[:, 1:][mask]
        error = (rows - x_hat[:, 1:][mask]).pow(2).sum()
        return float(error / (rows - rows.mean(0)).pow(2).sum())

    seen, kept, alone = masks(sae, x, source, excluded)
    losses, later = loss_figures(model, tokens, hook, (clean, x, x_hat), alone)
    l0 = (features[:, 1:][kept] > 0).sum(1).numpy()
    density = (features[:, 1:][kept] > 0).double().mean(0)
    behind = range(hook.layer + (hook.hook_name == "hook_resid_post"), N_LAYERS)
    errors = [float((later[i] - outputs[i])[:, 1:][kept].pow(2).mean()) for i in behind]
    return {
        **losses,
        "fvu": fvu(kept),
        "fvu_with_outliers": fvu(seen),
        "mse": float((x - x_hat)[:, 1:][kept].pow(2).mean()),
        "l0": float(l0.mean()),
        "dead_fraction": float((density == 0).double().mean()),
        "block_mse_mean": float(np.mean(errors)) if errors else None,
        "block_mse_min": min(errors, default=None),
        "block_mse_max": max(errors, default=None),
        "n_tokens": int(kept.sum()),
        "n_windows": len(tokens),
        "n_outlier_tokens": int((seen & ~kept).sum()),
        "l0_quantiles": {str(q): float(np.quantile(l0, q)) for q in QUANTILES},
        "block_mse": {str(i): error for i, error in zip(behind, errors, strict=True)},
        "density_histogram": density_histogram(density),
    }
