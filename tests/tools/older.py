"""SAE directories as the trainer before this one wrote them, and what their SAEs compute."""

import json
from pathlib import Path
from typing import Any

import torch
from synthetic import normal
from torch import Tensor

K = 5


def older_config(kind: str, d_in: int, d_sae: int, layer: int | str) -> dict[str, Any]:
    """A whole `config.json`."""
    is_topk = kind == "batch_topk"
    return {
        "d_in": d_in,
        "d_sae": d_sae,
        "l1_coefficient": 0.0 if is_topk else 0.001,
        "dtype": "torch.float32" if isinstance(layer, str) else "float32",
        "device": "cuda:3",
        "hook_layer": layer,
        "hook_name": "hook_resid_post",
        "hook_spec": f"blocks.{layer}.hook_resid_post",
        "top_k": K if is_topk else None,
        "top_k_aux": 2 * K if is_topk else None,
        "n_batches_to_dead": 200,
        "aux_penalty": 0.03125,
    }


def older_tensors(kind: str, d_in: int, d_sae: int) -> dict[str, Tensor]:
    """What `weights.pt` holds. A BatchTopK SAE has a `b_enc` that its training never moved."""
    W_dec = normal(d_sae, d_in, seed=1, dtype=torch.float32)
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    tensors = {
        "W_enc": W_dec.T.clone() + 0.1 * normal(d_in, d_sae, seed=2, dtype=torch.float32),
        "b_enc": torch.zeros(d_sae),
        "W_dec": W_dec,
        "b_dec": normal(d_in, seed=3, dtype=torch.float32),
        "ever_fired": torch.arange(d_sae) % 7 > 0,
    }
    if kind == "batch_topk":
        return tensors | {"num_batches_not_active": torch.arange(d_sae).float()}
    return tensors | {"b_enc": 0.3 * normal(d_sae, seed=4, dtype=torch.float32)}


def write_older_sae(
    folder: Path,
    kind: str = "batch_topk",
    layer: int | str = "1",
    d_in: int = 32,
    d_sae: int = 64,
    **changes: Tensor,
) -> dict[str, Tensor]:
    """Write such a directory, with `changes` to its tensors, and return these."""
    folder.mkdir(parents=True)
    tensors = older_tensors(kind, d_in, d_sae) | changes
    torch.save(tensors, folder / "weights.pt")
    (folder / "config.json").write_text(json.dumps(older_config(kind, d_in, d_sae, layer)))
    history = {name: [1.5, 1.0] for name in ("loss", "sparsity", "dead_feature_percentage")}
    (folder / "history.json").write_text(json.dumps(history))
    return tensors


def older_features(kind: str, tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    """(N, D) -> (N, F) features of a batch, by that trainer's formulas."""
    pre = (x - tensors["b_dec"]) @ tensors["W_enc"]
    if kind == "standard":
        return torch.relu(pre + tensors["b_enc"])
    found = torch.relu(pre)
    least = found.flatten().topk(K * len(x)).values[-1]
    return found * (found >= least)
