"""SAE directories: written whole or not at all, and read with nothing unpickled but tensors."""

import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_core.errors import SAEError
from sae_core.files import sync
from sae_core.kinds import build
from sae_core.naming import SAE_FILES
from sae_core.sae_base import SparseAutoencoder
from sae_core.sae_config import SAESpec

History = dict[str, list[float | None]]
"""One list a metric, one entry an epoch; None for an epoch without end-to-end steps."""

OPTIONAL_TENSORS = {"ever_fired", "num_batches_not_active"}


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    """Make `folder` hold exactly `files`: never some of the old ones and some of the new.

    The old folder is moved aside for the new one; should the process die between the two moves,
    the next write brings it back first.

    Raises:
        SAEError: it cannot be written.
    """
    staging = folder.with_name(f".{folder.name}.writing")
    try:
        retired = bring_back(folder)
        for leftover in (staging, retired):
            shutil.rmtree(leftover, ignore_errors=True)
        staging.mkdir(parents=True)
        for name, content in files.items():
            with (staging / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        if folder.exists():
            folder.rename(retired)
        try:
            staging.rename(folder)
            sync(folder.parent)
        except OSError:
            if retired.exists():
                retired.rename(folder)
            raise
        shutil.rmtree(retired, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise SAEError(
            f"{folder}: cannot be written ({error.strerror}); free some space or choose another "
            "folder"
        ) from error


def bring_back(folder: Path) -> Path:
    """Put a folder back in its place, if `write_files` died after it had moved it aside.

    Returns:
        Where it moves it to.
    """
    retired = folder.with_name(f".{folder.name}.replaced")
    if retired.exists() and not folder.exists():
        retired.rename(folder)
    return retired


def sae_files(sae: SparseAutoencoder, history: History) -> dict[str, bytes]:
    """The files of an SAE directory: `weights.pt`, `config.json` and `history.json`."""
    weights = io.BytesIO()
    torch.save(sae.tensors(), weights)
    return {
        "weights.pt": weights.getvalue(),
        "config.json": sae.spec.to_json().encode(),
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
    try:
        sae = build(SAESpec.load(config))
    except SAEError as error:
        raise SAEError(str(error) if str(config) in str(error) else f"{config}: {error}") from error
    stored = read_tensors(path)
    expected = sae.state_dict()
    for name, tensor in expected.items():
        if name not in stored and name in OPTIONAL_TENSORS:
            stored[name] = tensor
        elif name not in stored:
            raise SAEError(f"{path}: has no tensor {name}; the file is not a whole SAE")
        elif stored[name].shape != tensor.shape:
            raise SAEError(
                f"{path}: {name} has shape {tuple(stored[name].shape)}, but config.json says "
                f"{tuple(tensor.shape)}"
            )
        elif stored[name].is_floating_point() != tensor.is_floating_point():
            raise SAEError(f"{path}: {name} holds numbers of type {stored[name].dtype}")
        elif not torch.isfinite(stored[name]).all():
            raise SAEError(f"{path}: {name} holds NaN or infinite values")
    sae = sae.to(stored["W_dec"].dtype)
    sae.load_state_dict({name: stored[name] for name in expected})
    return sae.eval().requires_grad_(False)


def load_history(folder: Path) -> History:
    """Read the training history of an SAE directory.

    Raises:
        SAEError: it is missing or not JSON.
    """
    path = folder / SAE_FILES[2]
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SAEError(f"{path}: not a readable training history ({error})") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A PyTorch file of named tensors, on the CPU; nothing else is unpickled.

    Raises:
        SAEError: it is missing, damaged, or holds anything else.
    """
    try:
        stored: Any = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise SAEError(f"{path}: no such file; the SAE directory is not whole") from error
    except Exception as error:  # an unpickler that is fed garbage may raise anything
        raise SAEError(
            f"{path}: not a readable file of tensors; fetch or train it again"
        ) from error
    if not isinstance(stored, dict) or not all(isinstance(v, Tensor) for v in stored.values()):
        raise SAEError(f"{path}: holds something other than named tensors")
    return stored
