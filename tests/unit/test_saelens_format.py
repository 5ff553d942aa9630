"""The exported folder as SAELens reads it: its keys, its tensors, and its formula in NumPy."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from synthetic import KINDS, normal, random_sae

from sae_core.formats.checkpoint import write_files
from sae_core.formats.saelens import saelens_files
from sae_core.sae_base import SparseAutoencoder

ORIGIN = {
    "model_name": "Qwen/Qwen3-0.6B",
    "max_text_length": 256,
    "prepend_bos": True,
    "data_file": "texts.json",
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
any_kind = pytest.mark.parametrize("kind", KINDS)


def export(
    kind: str, folder: Path, dtype: str = "float32"
) -> tuple[SparseAutoencoder, dict[str, Any], dict[str, np.ndarray]]:
    """An SAE, and its `cfg.json` and tensors read back, in float64."""
    inner = random_sae(kind, torch.float32, metadata=ORIGIN)
    inner.spec.dtype = dtype
    sae = inner.folded(normal(6, dtype=torch.float32), 7.0, DTYPES[dtype])
    write_files(folder, saelens_files(sae))
    with safe_open(folder / "sae_weights.safetensors", framework="pt") as stored:
        assert {stored.get_tensor(name).dtype for name in stored.keys()} == {DTYPES[dtype]}
        tensors = {name: stored.get_tensor(name).double().numpy() for name in stored.keys()}
    return sae, json.loads((folder / "cfg.json").read_text()), tensors


OF_KIND = {
    "batch_topk": {"architecture": "jumprelu"},
    "topk": {"architecture": "topk", "k": 3},
    "matryoshka_batch_topk": {"architecture": "jumprelu"},
    "multi_batch_topk": {"architecture": "jumprelu"},
    "jumprelu": {"architecture": "jumprelu"},
    "gated": {"architecture": "gated"},
    "standard": {"architecture": "standard"},
}


@any_kind
@pytest.mark.parametrize("dtype", DTYPES)
def test_configuration(kind: str, dtype: str, tmp_path: Path) -> None:
    _, config, _ = export(kind, tmp_path / "sae", dtype)
    metadata = config.pop("metadata")
    assert config == {
        **OF_KIND[kind],
        "d_in": 6,
        "d_sae": 20,
        "dtype": dtype,
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
    }
    assert metadata.pop("sae_lens_version").startswith("6.")
    assert metadata == {
        "model_name": "Qwen/Qwen3-0.6B",
        "hook_name": "blocks.1.hook_resid_post",
        "hook_head_index": None,
        "context_size": 256,
        "prepend_bos": True,
        "dataset_path": "texts.json",
        "model_from_pretrained_kwargs": {},
    }


@any_kind
def test_tensors(kind: str, tmp_path: Path) -> None:
    sae, _, tensors = export(kind, tmp_path / "sae")
    shapes = {"W_enc": (6, 20), "W_dec": (20, 6), "b_enc": (20,), "b_dec": (6,)}
    if kind == "gated":
        shapes |= {"b_gate": shapes.pop("b_enc"), "r_mag": (20,), "b_mag": (20,)}
    if OF_KIND[kind]["architecture"] == "jumprelu":
        shapes["threshold"] = (20,)
    assert {name: tensor.shape for name, tensor in tensors.items()} == shapes
    for name, tensor in tensors.items():
        ours = getattr(sae, {"b_gate": "b_enc"}.get(name, name)).detach()
        np.testing.assert_array_equal(tensor, ours.expand(tensor.shape).numpy())
        assert tensor.any()
    np.testing.assert_allclose(np.linalg.norm(tensors["W_dec"], axis=1), 1, rtol=1e-6)


def jumprelu(x: np.ndarray, t: dict[str, np.ndarray], _: dict[str, Any]) -> np.ndarray:
    pre = x @ t["W_enc"] + t["b_enc"]
    return np.maximum(pre, 0) * (pre > t["threshold"])


def topk(x: np.ndarray, t: dict[str, np.ndarray], config: dict[str, Any]) -> np.ndarray:
    pre = x @ t["W_enc"] + t["b_enc"]
    least = np.sort(pre, axis=1)[:, -config["k"], None]
    return np.maximum(np.where(pre >= least, pre, 0), 0)


def gated(x: np.ndarray, t: dict[str, np.ndarray], _: dict[str, Any]) -> np.ndarray:
    gate = x @ t["W_enc"] + t["b_gate"] > 0
    return gate * np.maximum(x @ (t["W_enc"] * np.exp(t["r_mag"])) + t["b_mag"], 0)


def standard(x: np.ndarray, t: dict[str, np.ndarray], _: dict[str, Any]) -> np.ndarray:
    return np.maximum(x @ t["W_enc"] + t["b_enc"], 0)


FORMULAS = {"jumprelu": jumprelu, "topk": topk, "gated": gated, "standard": standard}
"""SAELens's encoders, on activations less `b_dec`."""


@any_kind
def test_saelens_formula_gives_the_same(kind: str, tmp_path: Path) -> None:
    sae, config, tensors = export(kind, tmp_path / "sae")
    x = 10 * normal(50, 6)
    features = FORMULAS[config["architecture"]](x.numpy() - tensors["b_dec"], tensors, config)
    x_hat = features @ tensors["W_dec"] + tensors["b_dec"]
    sae = sae.double().requires_grad_(False)
    np.testing.assert_allclose(sae.encode(x).numpy(), features, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(sae(x).numpy(), x_hat, rtol=1e-9, atol=1e-9)
    assert 0.1 < (features > 0).mean() < 0.9


@any_kind
def test_transcoder(kind: str, tmp_path: Path) -> None:
    """They take x as it is; `transcoder` and `jumprelu_transcoder` are SAELens's own."""
    sae = random_sae(kind, torch.float32, metadata=ORIGIN, target_hook_name="hook_mlp_out")
    write_files(tmp_path / "sae", saelens_files(sae))
    config = json.loads((tmp_path / "sae/cfg.json").read_text())
    plain = OF_KIND[kind]["architecture"]
    own = {"jumprelu": "jumprelu_transcoder", "standard": "transcoder"}.get(plain)
    assert config["architecture"] == (own or plain)
    assert config.get("d_out") == (6 if own else None)
    assert config["apply_b_dec_to_input"] is False
    assert config["metadata"]["hook_name"] == "blocks.1.hook_resid_post"
    assert config["metadata"]["hook_name_out"] == "blocks.1.hook_mlp_out"
    with safe_open(tmp_path / "sae/sae_weights.safetensors", framework="pt") as stored:
        tensors = {name: stored.get_tensor(name).double().numpy() for name in stored.keys()}
    x = normal(50, 6).numpy()
    features = FORMULAS[plain](x, tensors, config)
    x_hat = features @ tensors["W_dec"] + tensors["b_dec"]
    found = sae.double().requires_grad_(False)(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(found, x_hat, rtol=1e-9, atol=1e-9)


@any_kind
def test_same_sae_same_bytes(kind: str) -> None:
    first, second = (
        saelens_files(random_sae(kind, torch.float32, metadata=ORIGIN)) for _ in range(2)
    )
    assert first == second and set(first) == {"cfg.json", "sae_weights.safetensors"}
