"""Other people's SAE directories as SAEs of ours: SAELens's, and dictionary_learning's.

Each of theirs computes what one of our kinds does, but for two things that are folded into the
weights here, with the same reconstructions. An encoder may take x as it is, not `x - b_dec`:

    x @ W_enc + b = (x - b_dec) @ W_enc + (b + b_dec @ W_enc)

And decoder rows may have norms n other than 1: they are divided by n, and what leads to the
features is multiplied by it, so that features are n times as large. A TopK SAE that ranks its
features without their norms would choose others then, and keeps its rows as they are.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sae_core.checkpoint import read_tensors
from sae_core.errors import SAEError
from sae_core.kinds import build
from sae_core.naming import hook_spec
from sae_core.publishing.saelens import TRANSCODERS
from sae_core.records import read_json
from sae_core.sae_base import SparseAutoencoder
from sae_core.sae_config import SAESpec
from sae_core.train_config import DataConfig, HookConfig

SAELENS_KINDS = ("standard", "gated", "jumprelu", "topk")
"""SAELens's architectures; ours have the same names."""

SAELENS_TRANSCODERS = {ours: theirs for theirs, ours in TRANSCODERS.items()}
"""Their encoders, by SAELens's transcoders."""

SAELENS_SETTINGS = {
    "normalize_activations": "none",
    "reshape_activations": "none",
    "finetuning_scaling_factor": False,
}
"""What SAELens can do besides, and what it is called when it does not."""

DICTIONARY_KINDS = {
    "AutoEncoder": "standard",
    "AutoEncoderNew": "standard",
    "GatedAutoEncoder": "gated",
    "JumpReluAutoEncoder": "jumprelu",
    "AutoEncoderTopK": "topk",
    "BatchTopKSAE": "batch_topk",
    "MatryoshkaBatchTopKSAE": "matryoshka_batch_topk",
}
"""Our kinds by dictionary_learning's classes."""

CALIBRATED = ("batch_topk", "matryoshka_batch_topk")
"""Kinds with one threshold for all features."""

TAKES_X = ("AutoEncoderNew", "JumpReluAutoEncoder")
"""Classes whose encoder takes x, not `x - b_dec`."""

DICTIONARY_TENSORS = {
    "encoder.weight": "W_enc",
    "decoder.weight": "W_dec",
    "encoder.bias": "b_enc",
    "gate_bias": "b_enc",
    "mag_bias": "b_mag",
    "bias": "b_dec",
    "decoder_bias": "b_dec",
    "decoder.bias": "b_dec",
}
"""Our tensors by dictionary_learning's, where they differ; its weights lie the other way round."""

HOOKS = {"resid_pre": "hook_resid_pre", "resid_mid": "hook_resid_mid", "attn": "hook_attn_out",
         "attention": "hook_attn_out", "mlp": "hook_mlp_out"}  # fmt: skip
"""Hooks by words in dictionary_learning's names of submodules; any other is a `hook_resid_post`."""

UNIT = 1e-4
"""By how much a norm may differ from 1 and count as rounded."""


class Foreign(NamedTuple):
    """What a directory holds."""

    kind: str
    tensors: dict[str, Tensor]
    """Under our names."""
    k: int
    sizes: list[int]
    """Of the nested SAEs of a Matryoshka SAE."""
    takes_x: bool
    """The encoder takes x, not `x - b_dec`."""
    ranks_by_norm: bool
    """Features are ranked as they would be with unit decoder rows."""
    layer: int
    hook_name: str
    origin: dict[str, Any]
    target_hook_name: str = ""
    """Of a transcoder, which takes x."""


def import_sae(folder: Path) -> SparseAutoencoder:
    """The SAE in a directory of SAELens (`cfg.json`, `sae_weights.safetensors`) or of
    dictionary_learning (`config.json`, `ae.pt`), with the same reconstructions.

    Raises:
        SAEError: it is neither, damaged, or does something that no kind of ours does.
    """
    if (folder / "cfg.json").is_file():
        return _as_ours(_read_saelens(folder), folder)
    if (folder / "ae.pt").is_file():
        return _as_ours(_read_dictionary(folder), folder)
    raise SAEError(
        f"{folder}: neither a directory of SAELens (cfg.json, sae_weights.safetensors) nor of "
        "dictionary_learning (config.json, ae.pt)"
    )


def _read_saelens(folder: Path) -> Foreign:
    path, weights = folder / "cfg.json", folder / "sae_weights.safetensors"
    config = _read_json(path)
    # Before version 6 all keys stood side by side, and TopK was a standard SAE's activation.
    about = config.get("metadata") or config
    activation = config.get("activation_fn") or config.get("activation_fn_str")
    kind = "topk" if activation == "topk" else config.get("architecture", "standard")
    is_transcoder = kind in SAELENS_TRANSCODERS or bool(about.get("hook_name_out"))
    kind = SAELENS_TRANSCODERS.get(kind, kind)
    _check_kind(path, "architecture", kind, (*SAELENS_KINDS, *SAELENS_TRANSCODERS))
    for key, plain in SAELENS_SETTINGS.items():
        if config.get(key) not in (None, False, plain):
            raise SAEError(f"{path}: {key} is {config[key]!r}, which no kind of SAE here does")
    layer, hook_name = _read_hook(path, about.get("hook_name") or about.get("hook_point"))
    target = layer, ""
    if is_transcoder:
        target = _read_hook(path, about.get("hook_name_out"), "hook_name_out")
        if target[0] != layer:
            raise SAEError(f"{path}: its hooks lie in two layers; no transcoder here does that")
    try:
        tensors = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise SAEError(f"{weights}: not a readable file of tensors ({error})") from error
    if kind == "gated":
        tensors["b_enc"] = tensors.pop("b_gate", torch.empty(0))
    options = config.get("activation_fn_kwargs") or config
    return Foreign(
        kind=kind,
        tensors=tensors,
        k=int(options.get("k", 0)) if kind == "topk" else 0,
        sizes=[],
        takes_x=not config.get("apply_b_dec_to_input", True),
        ranks_by_norm=bool(config.get("rescale_acts_by_decoder_norm")),
        layer=layer,
        hook_name=hook_name,
        target_hook_name=target[1],
        origin={
            "imported_from": f"SAELens {about.get('sae_lens_version', 'before 6')}",
            "model_name": about.get("model_name"),
            "data_file": about.get("dataset_path"),
            "max_text_length": about.get("context_size"),
            "prepend_bos": bool(about.get("prepend_bos", True)),
        },
    )


def _read_hook(path: Path, hook: Any, key: str = "hook_name") -> tuple[int, str]:
    """Layer and name."""
    parts = re.fullmatch(r"blocks\.(\d+)\.(mlp\.hook_in|\w+)", str(hook))
    if parts is None:
        raise SAEError(f"{path}: {key} is '{hook}', and has to be blocks.<layer>.<hook>")
    return int(parts[1]), parts[2]


def _read_dictionary(folder: Path) -> Foreign:
    path = folder / "config.json"
    config = _read_json(path)
    trainer = config.get("trainer") or {}
    name = trainer.get("dict_class")
    _check_kind(path, "dict_class", name, DICTIONARY_KINDS)
    tensors: dict[str, Tensor] = {}
    for key, tensor in read_tensors(folder / "ae.pt").items():
        tensors[DICTIONARY_TENSORS.get(key, key)] = tensor.T if key.endswith(".weight") else tensor
    submodule = str(trainer.get("submodule_name"))
    hooks = [hook for word, hook in HOOKS.items() if word in submodule]
    return Foreign(
        kind=DICTIONARY_KINDS[name],
        tensors=tensors,
        k=int(tensors.get("k", torch.tensor(trainer.get("k", 0)))),
        sizes=tensors.get("group_sizes", torch.zeros(0)).cumsum(0).int().tolist(),
        takes_x=name in TAKES_X,
        ranks_by_norm=False,
        layer=int(trainer.get("layer", 0)),
        hook_name=hooks[0] if hooks else HookConfig.hook_name,
        origin={
            "imported_from": f"dictionary_learning {name}",
            "model_name": trainer.get("lm_name"),
            "data_file": None,
            "max_text_length": (config.get("buffer") or {}).get("ctx_len"),
            "prepend_bos": True,
        },
    )


def _as_ours(found: Foreign, folder: Path) -> SparseAutoencoder:
    _check_tensors(found, folder)
    tensors = _folded(found)
    # One threshold for all features, brought to unit rows, becomes one for each: a JumpReLU SAE.
    by_feature = found.kind in CALIBRATED and tensors["threshold"].ndim > 0
    sae = build(_spec(found, "jumprelu" if by_feature else found.kind))
    sae = sae.to(tensors["W_dec"].dtype)
    sae.load_state_dict({name: tensors.get(name, own) for name, own in sae.state_dict().items()})
    return sae.eval().requires_grad_(False)


def _check_tensors(found: Foreign, folder: Path) -> None:
    if found.tensors.get("W_dec", torch.empty(0)).ndim != 2:
        raise SAEError(f"{folder}: has no matrix W_dec; it is not a whole SAE")
    sae = build(_spec(found, found.kind))
    wanted = dict(sae.named_parameters())
    if found.kind in CALIBRATED:
        wanted["threshold"] = sae.threshold
    for name, tensor in wanted.items():
        given = found.tensors.get(name)
        if given is None or given.shape != tensor.shape:
            shape = "missing" if given is None else f"of shape {tuple(given.shape)}"
            raise SAEError(f"{folder}: {name} is {shape}, and has to be {tuple(tensor.shape)}")
        if not torch.isfinite(given).all():
            raise SAEError(f"{folder}: {name} holds NaN or infinite values")


def _folded(found: Foreign) -> dict[str, Tensor]:
    """The tensors for an encoder that takes `x - b_dec`, unless it is a transcoder's, and unit
    decoder rows."""
    t = dict(found.tensors)
    if "threshold" in t and found.kind == "topk":
        del t["threshold"]  # dictionary_learning keeps one, and does not use it
    if found.takes_x and not found.target_hook_name:
        shift = t["b_dec"] @ t["W_enc"]
        t["b_enc"] = t["b_enc"] + shift
        if found.kind == "gated":
            t["b_mag"] = t["b_mag"] + shift * t["r_mag"].exp()
    norms = t["W_dec"].norm(dim=1)
    is_unit = (norms - 1).abs().max() < UNIT
    is_one_scale = norms.max() - norms.min() < UNIT * norms.max()
    if is_unit or found.kind == "topk" and not (found.ranks_by_norm or is_one_scale):
        return t
    t["W_dec"] = t["W_dec"] / norms[:, None]
    for name in {"W_enc", "b_enc", "b_mag", "threshold"} & set(t):
        t[name] = t[name] * norms
    return t


def _spec(found: Foreign, kind: str) -> SAESpec:
    W_dec = found.tensors["W_dec"]
    defaults = {"model_name": "unknown", "data_file": "unknown"}
    defaults |= {"max_text_length": DataConfig.max_text_length}
    known = {name: value for name, value in found.origin.items() if value is not None}
    return SAESpec(
        d_in=W_dec.shape[1],
        d_sae=W_dec.shape[0],
        l1_coefficient=0.0,
        dtype=str(W_dec.dtype).removeprefix("torch."),
        device="cpu",
        hook_layer=found.layer,
        hook_name=found.hook_name,
        hook_spec=hook_spec(found.layer, found.hook_name),
        top_k=found.k,
        top_k_aux=0,
        n_batches_to_dead=0,
        aux_penalty=0.0,
        sae_type=kind,
        matryoshka_sizes=found.sizes if kind == "matryoshka_batch_topk" else [],
        target_hook_name=found.target_hook_name,
        metadata=defaults | known,
    )


def _check_kind(
    path: Path, key: str, kind: Any, known: tuple[str, ...] | Mapping[str, str]
) -> None:
    if kind not in known:
        raise SAEError(f"{path}: {key} is {kind!r}; those that can be read are {', '.join(known)}")


def _read_json(path: Path) -> dict[str, Any]:
    config = read_json(path, "SAE configuration", "fetch the SAE again")
    if not isinstance(config, dict):
        raise SAEError(f"{path}: not an SAE configuration")
    return config
