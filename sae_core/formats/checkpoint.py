"""SAE directories: written completely or not at all, and read without unpickling anything but
tensors."""

import hashlib
import io
import json
import os
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_core.sae.config import SAESpec
from sae_core.sae.kinds import build
from sae_core.sae_base import SparseAutoencoder
from sae_core.utils.errors import SAEError
from sae_core.utils.files import file_sha256, new_folder, writing
from sae_core.utils.naming import SAE_FILES
from sae_core.utils.records import fits, read_json

History = dict[str, list[float | None]]
"""One list per metric, one entry per epoch; None for an epoch without end-to-end steps."""

NUMBERS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
NUMBERS |= {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
"""Number formats that a file of tensors may have."""

COUNTERS = ("ever_fired", "num_batches_not_active")
"""Tensors that a directory need not have, in whatever format they are."""

OLDER_KINDS = ("batch_topk", "standard")
"""Kinds that this trainer's predecessor had; it stored no threshold with either."""


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    """Make `folder` contain exactly `files`: never some of the old ones and some of the new.

    Raises:
        SAEError: it cannot be written.
    """
    with writing(folder, sum(map(len, files.values()))), new_folder(folder) as staging:
        for name, content in files.items():
            with (staging / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())


def sae_files(sae: SparseAutoencoder, history: History) -> dict[str, bytes]:
    """The files of an SAE directory: `weights.pt`, `config.json` and `history.json`."""
    file = io.BytesIO()
    torch.save(sae.tensors(), file)
    weights = file.getvalue()
    spec = replace(sae.spec, weights_sha256=hashlib.sha256(weights).hexdigest())
    return {
        "weights.pt": weights,
        "config.json": spec.to_json().encode(),
        "history.json": (json.dumps(history, indent=1) + "\n").encode(),
    }


def save_sae(folder: Path, sae: SparseAutoencoder, history: History) -> None:
    """Write an SAE directory, replacing what is there."""
    write_files(folder, sae_files(sae, history))


def load_sae(folder: Path) -> SparseAutoencoder:
    """Read an SAE directory, a final export or a checkpoint, onto the CPU.

    Raises:
        SAEError: it is missing, damaged, or its weights do not fit its configuration.
    """
    if not folder.is_dir():
        raise SAEError(f"{folder}: no such SAE directory")
    path, config = folder / "weights.pt", folder / "config.json"
    if not path.exists() and not config.exists():
        raise SAEError(f"{folder}: no SAE directory; give one with a config.json and a weights.pt")
    spec, stored = SAESpec.load(config), read_tensors(path)
    # First, so that a wrong size is found before anything of that size is allocated.
    _check_shape(path, stored, "W_dec", (spec.d_sae, spec.d_in))
    try:
        sae = build(spec)
    except SAEError as error:
        raise SAEError(f"{config}: {error}") from error
    has_no_threshold = spec.is_older_form and "threshold" not in stored
    for name, tensor in sae.state_dict().items():
        if name in COUNTERS:
            stored[name] = stored.get(name, tensor)
        if name == "threshold" and has_no_threshold and spec.sae_type in OLDER_KINDS:
            stored[name] = tensor
        _check_tensor(path, stored, name, tensor)
    if spec.weights_sha256 not in ("", file_sha256(path)):
        raise SAEError(f"{path}: not the weights that config.json was written with")
    sae = sae.to(stored["W_dec"].dtype)
    sae.load_state_dict({name: stored[name] for name in sae.state_dict()})
    if has_no_threshold and spec.sae_type == "batch_topk":
        _encode_as_older_trainer(sae, folder)
    return sae.eval().requires_grad_(False)


@torch.no_grad()
def _encode_as_older_trainer(sae: SparseAutoencoder, folder: Path) -> None:
    """Make a BatchTopK SAE of this trainer's predecessor encode as it did there: by
    `relu((x - b_dec) @ W_enc)`, to which its `b_enc` was never added. Its features were the N*k
    largest of a batch even at inference; here it needs a threshold."""
    sae.threshold = None
    if sae.b_enc.any():
        print(
            f"{folder}: b_enc is left out, as the trainer that wrote this SAE never added it",
            file=sys.stderr,
        )
        sae.b_enc.zero_()
        sae.spec.metadata["left_out"] = "b_enc, which the trainer that wrote this SAE never added"


def _check_tensor(path: Path, stored: dict[str, Tensor], name: str, like: Tensor) -> None:
    tensor = _check_shape(path, stored, name, tuple(like.shape))
    if tensor.is_floating_point() != like.is_floating_point() and name not in COUNTERS:
        raise SAEError(f"{path}: {name} holds numbers of type {tensor.dtype}")
    if not torch.isfinite(tensor).all():
        raise SAEError(f"{path}: {name} holds NaN or infinite values")


def _check_shape(
    path: Path, stored: dict[str, Tensor], name: str, shape: tuple[int, ...]
) -> Tensor:
    if name not in stored:
        raise SAEError(f"{path}: has no tensor {name}; the file is incomplete")
    if stored[name].shape != shape:
        raise SAEError(
            f"{path}: {name} has shape {tuple(stored[name].shape)}, but config.json says {shape}"
        )
    return stored[name]


def load_history(folder: Path) -> History:
    """Read the training history of an SAE directory.

    Raises:
        SAEError: it is missing or not JSON.
    """
    path, what = folder / SAE_FILES[2], "training history"
    history = read_json(path, what, "fetch or train the SAE again")
    if not fits(history, History):
        raise SAEError(f"{path}: not a readable {what}; it must be one list of numbers per metric")
    return history


def is_whole_checkpoint(folder: Path) -> bool:
    """Whether an SAE directory is there and can be read."""
    try:
        load_sae(folder)
        load_history(folder)
    except SAEError:
        return False
    return True


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A PyTorch file of named tensors, on the CPU; nothing else is unpickled.

    Raises:
        SAEError: it is missing, damaged, or holds anything else.
    """
    try:
        _check_size(path)
        stored: Any = torch.load(path, map_location="cpu", weights_only=True)
    except SAEError:
        raise
    except FileNotFoundError as error:
        raise SAEError(f"{path}: no such file; the SAE directory is incomplete") from error
    except Exception as error:  # an unpickler that is fed garbage may raise anything
        raise SAEError(
            f"{path}: not a readable file of tensors; fetch or train it again"
        ) from error
    if not isinstance(stored, dict) or not all(isinstance(v, Tensor) for v in stored.values()):
        raise SAEError(f"{path}: holds something other than named tensors")
    for name, tensor in stored.items():
        if not _is_plain(tensor):
            raise SAEError(f"{path}: {name} is not a plain tensor; fetch or train it again")
    return stored


def _check_size(path: Path) -> None:
    """Check, before unpacking, that an archive of tensors is not compressed: PyTorch does not
    compress them, and a compressed archive could unpack to any size."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return  # PyTorch's older form, which is no archive
        with zipfile.ZipFile(file) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    held = path.stat().st_size
    if unpacked > held:
        raise SAEError(
            f"{path}: unpacks to {unpacked:,} bytes from {held:,}; PyTorch does not compress "
            "tensors, so PyTorch did not write this file; fetch or train it again"
        )


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is dense and all of its numbers are in the file."""
    if tensor.layout is not torch.strided or tensor.device.type != "cpu":
        return False
    nbytes = tensor.numel() * tensor.element_size()
    return tensor.dtype in NUMBERS and tensor.untyped_storage().nbytes() >= nbytes
