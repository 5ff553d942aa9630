"""Converts SAE directories of SAELens and dictionary_learning into ours, and reads directories of
this trainer's predecessor, which load unchanged.

Each of the others computes what one of our kinds does, except for two things that are folded into
the weights here, with the same reconstructions. An encoder may take x itself, not `x - b_dec`:

    x @ W_enc + b = (x - b_dec) @ W_enc + (b + b_dec @ W_enc)

And decoder rows may have norms n other than 1: they are divided by n, and the encoder is
multiplied by n, so features are n times as large. A TopK SAE that ranks its features without
their norms would then choose other features, so it keeps its rows unchanged.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sae_core.formats.checkpoint import NUMBERS, load_sae, read_tensors
from sae_core.formats.foreign_settings import Settings
from sae_core.formats.saelens import TRANSCODERS
from sae_core.sae.config import OUTLIER_NORMS, SAESpec, check_sizes
from sae_core.sae.kinds import build
from sae_core.sae_base import SparseAutoencoder
from sae_core.train_config import HookConfig
from sae_core.utils.errors import SAEError
from sae_core.utils.naming import hook_spec
from sae_core.utils.records import fits

SAELENS_KINDS = {
    "standard": "standard",
    "gated": "gated",
    "jumprelu": "jumprelu",
    "topk": "topk",
    "batchtopk": "batch_topk",
    "matryoshka_batchtopk": "matryoshka_batch_topk",
    **{theirs: ours for ours, theirs in TRANSCODERS.items()},
}
"""Our kinds by SAELens's architectures. Two of them exist only in checkpoints of its training; it
exports them as "jumprelu"."""

SAELENS_SETTINGS = {
    "normalize_activations": "none",
    "reshape_activations": "none",
    "finetuning_scaling_factor": False,
}
"""What SAELens can do in addition, and the value of the setting when it does not."""

FOLDED = "; the last checkpoint of a training in SAELens, final_<tokens>, has it in its weights"

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
"""Our tensors by dictionary_learning's names, where these differ; its weights are transposed."""

HOOKS = {"resid_pre": "hook_resid_pre", "resid_mid": "hook_resid_mid", "attn": "hook_attn_out",
         "attention": "hook_attn_out", "mlp": "hook_mlp_out"}  # fmt: skip
"""Hooks by words in dictionary_learning's names of submodules; any other is a `hook_resid_post`."""

UNIT = 1e-4
"""By how much a norm may differ from 1 and count as rounded."""


class Foreign(NamedTuple):
    """The contents of a directory."""

    kind: str
    tensors: dict[str, Tensor]
    """Under our names."""
    k: int
    sizes: list[int]
    """The sizes of the nested SAEs of a Matryoshka SAE."""
    takes_x: bool
    """The encoder takes x, not `x - b_dec`."""
    ranks_by_norm: bool
    """Features are ranked as they would be with unit decoder rows."""
    layer: int
    hook_name: str
    origin: dict[str, Any]
    target_hook_name: str = ""
    """Hook name of a transcoder's target; a transcoder takes x."""


def import_sae(folder: Path) -> SparseAutoencoder:
    """The SAE in a directory of SAELens (`cfg.json`, `sae_weights.safetensors`), an export or a
    checkpoint of its training; of dictionary_learning (`config.json`, `ae.pt`), with the same
    reconstructions; or of this trainer's predecessor (`config.json`, `weights.pt`).

    Raises:
        SAEError: it is not one, is damaged, or does something that no kind here does.
    """
    if (folder / "cfg.json").is_file():
        return _as_ours(_read_saelens(folder), folder)
    if (folder / "ae.pt").is_file():
        return _as_ours(_read_dictionary(folder), folder)
    if (folder / "weights.pt").is_file():
        return load_sae(folder)
    raise SAEError(
        f"{folder}: neither a directory of SAELens (cfg.json, sae_weights.safetensors) nor of "
        "dictionary_learning (config.json, ae.pt) nor one with weights.pt and config.json"
    )


def _read_saelens(folder: Path) -> Foreign:
    config = Settings.load(folder / "cfg.json")
    # Before version 6 all keys stood side by side, and TopK was a standard SAE's activation.
    about = config.part("metadata") if config.values.get("metadata") else config
    is_topk = "topk" in (config.read("activation_fn", str), config.read("activation_fn_str", str))
    name = "topk" if is_topk else config.read("architecture", str, "standard")
    kind = _kind(config, "architecture", name, SAELENS_KINDS)
    for key, plain in SAELENS_SETTINGS.items():
        if config.values.get(key) not in (None, False, plain):
            advice = FOLDED if key == "normalize_activations" else ""
            raise config.error(key, f"{plain}: no kind of SAE here does it{advice}")
    hook_key = "hook_name" if about.values.get("hook_name") else "hook_point"
    layer, hook_name = _read_hook(about, hook_key)
    target = layer, ""
    if name in TRANSCODERS.values() or about.values.get("hook_name_out"):
        target = _read_hook(about, "hook_name_out")
        if target[0] != layer:
            raise SAEError(
                f"{config.path}: its hooks are in two layers; no transcoder here does that"
            )
    tensors = _read_saelens_tensors(folder / "sae_weights.safetensors", kind)
    _check_shape(tensors, config, "d_in", "d_sae")
    options = config.part("activation_fn_kwargs")
    return Foreign(
        kind=kind,
        tensors=tensors,
        k=_read_k(options if options.values else config, kind),
        sizes=_read_widths(config, tensors) if kind == "matryoshka_batch_topk" else [],
        takes_x=not config.read("apply_b_dec_to_input", bool, True),
        ranks_by_norm=config.read("rescale_acts_by_decoder_norm", bool, False),
        layer=layer,
        hook_name=hook_name,
        target_hook_name=target[1],
        origin={
            "imported_from": f"SAELens {about.read('sae_lens_version', str, 'before 6')}",
            "model_name": about.read("model_name", str),
            "data_file": about.read("dataset_path", str),
            "max_text_length": about.read("context_size", int, least=1),
            "prepend_bos": about.read("prepend_bos", bool, True),
            # Only our own exports have these.
            **{name: about.read(name, float) for name in OUTLIER_NORMS},
        },
    )


def _read_saelens_tensors(path: Path, kind: str) -> dict[str, Tensor]:
    """The tensors of a SAELens file under our names."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise SAEError(f"{path}: not a readable file of tensors ({error})") from error
    if kind == "gated":
        tensors["b_enc"] = tensors.pop("b_gate", torch.empty(0))
    if kind in CALIBRATED:
        tensors["threshold"] = tensors.pop("topk_threshold", torch.empty(0))
    if "log_threshold" in tensors:  # of an older checkpoint of a JumpReLU SAE's training
        tensors["threshold"] = tensors.pop("log_threshold").exp()
    return tensors


def _read_k(config: Settings, kind: str) -> int:
    """The number of active features; if a threshold replaces it, only for the record."""
    if kind == "topk":
        return config.require("k", int, least=1)
    if kind in CALIBRATED:  # SAELens's may have a fraction
        return round(config.read("k", float, 0, least=0))
    return 0


def _read_widths(config: Settings, tensors: dict[str, Tensor]) -> list[int]:
    """The sizes of the nested SAEs, ending with the whole SAE."""
    widths, d_sae = config.values.get("matryoshka_widths"), len(tensors.get("W_dec", ()))
    if not fits(widths, list[int]):
        raise config.error("matryoshka_widths", "a list of whole numbers")
    widths = widths if d_sae in widths else [*widths, d_sae]
    check_sizes(config.path, "matryoshka_widths", widths, d_sae)
    return widths


def _read_hook(config: Settings, key: str) -> tuple[int, str]:
    """A hook's layer and name."""
    parts = re.fullmatch(r"blocks\.([0-9]{1,9})\.(mlp\.hook_in|\w+)", str(config.values.get(key)))
    if parts is None:
        raise config.error(key, "blocks.<layer>.<hook>")
    return int(parts[1]), parts[2]


def _read_dictionary(folder: Path) -> Foreign:
    config = Settings.load(folder / "config.json")
    trainer = config.part("trainer")
    name = trainer.read("dict_class", str)
    kind = _kind(trainer, "dict_class", name, DICTIONARY_KINDS)
    tensors = {
        DICTIONARY_TENSORS.get(key, key): tensor.T if _is_turned(key, tensor) else tensor
        for key, tensor in read_tensors(folder / "ae.pt").items()
    }
    _check_shape(tensors, trainer, "activation_dim", "dict_size")
    submodule = str(trainer.read("submodule_name", str))
    hooks = [hook for word, hook in HOOKS.items() if word in submodule]
    return Foreign(
        kind=kind,
        tensors=tensors,
        k=_read_k(_with_stored_k(trainer, tensors, folder), kind),
        sizes=_read_groups(folder, tensors) if kind == "matryoshka_batch_topk" else [],
        takes_x=name in TAKES_X,
        ranks_by_norm=False,
        layer=trainer.require("layer", int, least=0),
        hook_name=hooks[0] if hooks else HookConfig.hook_name,
        origin={
            "imported_from": f"dictionary_learning {name}",
            "model_name": trainer.read("lm_name", str),
            "max_text_length": config.part("buffer").read("ctx_len", int, least=1),
            "prepend_bos": True,
        },
    )


def _is_turned(key: str, tensor: Tensor) -> bool:
    return key.endswith(".weight") and tensor.ndim == 2


def _with_stored_k(trainer: Settings, tensors: dict[str, Tensor], folder: Path) -> Settings:
    """The settings with the `k` that is stored with the weights, if there is one."""
    if "k" not in tensors:
        return trainer
    k = tensors["k"].tolist()
    return Settings(folder / "ae.pt", {"k": k[0] if isinstance(k, list) and len(k) == 1 else k})


def _read_groups(folder: Path, tensors: dict[str, Tensor]) -> list[int]:
    """The sizes of the nested SAEs, computed from the sizes of their groups."""
    groups = tensors.get("group_sizes", torch.empty(0, dtype=torch.long))
    if groups.ndim != 1 or groups.is_floating_point():
        raise SAEError(f"{folder / 'ae.pt'}: group_sizes are not whole numbers in one row")
    sizes = groups.cumsum(0).tolist()
    check_sizes(folder / "ae.pt", "group_sizes, summed up,", sizes, len(tensors.get("W_dec", ())))
    return sizes


def _as_ours(found: Foreign, folder: Path) -> SparseAutoencoder:
    _check_tensors(found, folder)
    tensors = _folded(found)
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise SAEError(f"{folder}: its numbers overflow with unit decoder rows")
    # One threshold for all features, brought to unit rows, becomes one for each: a JumpReLU SAE.
    by_feature = found.kind in CALIBRATED and tensors["threshold"].ndim > 0
    spec = _spec(found, "jumprelu" if by_feature else found.kind)
    spec.check(folder)
    sae = build(spec)
    sae = sae.to(tensors["W_dec"].dtype)
    sae.load_state_dict({name: tensors.get(name, own) for name, own in sae.state_dict().items()})
    return sae.eval().requires_grad_(False)


def _check_tensors(found: Foreign, folder: Path) -> None:
    W_dec = found.tensors.get("W_dec", torch.empty(0))
    if W_dec.ndim != 2 or W_dec.numel() == 0:
        raise SAEError(f"{folder}: has no matrix W_dec; it is not a whole SAE")
    wanted = _wanted(found)
    for name, tensor in wanted.items():
        given = found.tensors.get(name)
        if given is None or given.shape != tensor.shape:
            shape = "missing" if given is None else f"of shape {tuple(given.shape)}"
            raise SAEError(f"{folder}: {name} is {shape}, but must be {tuple(tensor.shape)}")
        if given.dtype not in NUMBERS or not given.is_floating_point():
            raise SAEError(f"{folder}: {name} holds numbers of type {given.dtype}")
        if not torch.isfinite(given).all():
            raise SAEError(f"{folder}: {name} holds NaN or infinite values")
        found.tensors[name] = given.to(W_dec.dtype)


def _wanted(found: Foreign) -> dict[str, Tensor]:
    """The tensors that its kind needs, with their shapes."""
    sae = build(_spec(found, found.kind))
    wanted: dict[str, Tensor] = dict(sae.named_parameters())
    return wanted | ({"threshold": sae.known_threshold} if found.kind in CALIBRATED else {})


def _check_shape(tensors: dict[str, Tensor], said: Settings, d_in: str, d_sae: str) -> None:
    """Check the sizes in a configuration, if it has any, against the sizes of the weights."""
    shape = tensors["W_enc"].shape if "W_enc" in tensors else ()
    if len(shape) == 2:
        for key, size in ((d_in, shape[0]), (d_sae, shape[1])):
            if said.read(key, int, size) != size:
                raise said.error(key, f"{size}, as the weights have it")


def _folded(found: Foreign) -> dict[str, Tensor]:
    """The tensors for an encoder that takes `x - b_dec`, unless it is a transcoder's, and unit
    decoder rows."""
    # The rest is left out: dictionary_learning keeps a threshold for TopK, and does not use it.
    t = {name: found.tensors[name] for name in _wanted(found)}
    if found.takes_x and not found.target_hook_name:
        shift = t["b_dec"] @ t["W_enc"]
        t["b_enc"] = t["b_enc"] + shift
        if found.kind == "gated":
            t["b_mag"] = t["b_mag"] + shift * t["r_mag"].exp()
    norms = t["W_dec"].norm(dim=1)
    norms = torch.where(norms > 0, norms, 1.0)  # a row of zeros stays one
    is_unit = (norms - 1).abs().max() < UNIT
    is_one_scale = norms.max() - norms.min() < UNIT * norms.max()
    if is_unit or found.kind == "topk" and not (found.ranks_by_norm or is_one_scale):
        return t
    t["W_dec"] = t["W_dec"] / norms[:, None]
    before_the_norm = {"W_enc", "b_enc", "b_mag"}
    if not found.ranks_by_norm:  # else the threshold already is one for unit rows
        before_the_norm.add("threshold")
    for name in before_the_norm & set(t):
        t[name] = t[name] * norms
    return t


def _spec(found: Foreign, kind: str) -> SAESpec:
    W_dec = found.tensors["W_dec"]
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
        metadata={name: value for name, value in found.origin.items() if value is not None},
    )


def _kind(config: Settings, key: str, name: str | None, known: dict[str, str]) -> str:
    """Our name of an SAE's kind."""
    if name not in known:
        raise config.error(key, f"one of those that can be read: {', '.join(known)}")
    return known[name]
