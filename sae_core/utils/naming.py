"""Run names, hook names and paths: every name that appears on disk is built here."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from sae_core.utils.errors import SAEError

MiddleLayerStrategy = Literal["lower", "upper"]

SAE_FILES = ("weights.pt", "config.json", "history.json")
"""The files of every SAE directory, in checkpoints and final exports alike."""

EXPORT_FILES = (*SAE_FILES, "cfg.json", "sae_weights.safetensors")
"""The files of a final SAE directory; the last two are in SAELens's format."""

BEST_CHECKPOINT = "best_model.pt"

FIRST_CHECKPOINT = "checkpoint_start.pt"
"""The SAE as a training begins that begins with another one."""

STATES = "resume"
"""Folder of the state that an interrupted training resumes from, next to its checkpoints."""

STALE_STATES = "resume.stale"
"""The same of a training with other settings, data or code: not used, and free to be deleted."""

LOCK_FILE = "training.lock"
"""Lock of the process that trains, next to its checkpoints."""

METRICS_FILE = "metrics.jsonl"
"""The events of a training, one per line, next to its checkpoints."""

WANDB_NOTE = "wandb.json"
"""The W&B run of a training, next to its checkpoints."""

EVALUATION_FILE = "evaluation.json"
"""An SAE's evaluation, in its folder on the Hub and next to the checkpoints of a run by hand."""

FEATURES_FILE = "features.csv"
LABELS_FILE = "labels.jsonl"
"""What the features of an SAE fire on, and what a language model says of them, in its folder on the
Hub."""

UPLOAD_MARKER = "upload.json"
"""The result of uploading a run by hand, next to its checkpoints."""

NAME_BYTES = 180
"""Longest name of a folder: file systems take 255 bytes, and files are named after it."""

PUNCTUATION = re.compile(r"[ -,/:-@\[-^`{-~]")
"""The space and ASCII's punctuation but for `-`, `.` and `_`."""

REPO_ID = re.compile(r"(?=.{3,96}$)\w([\w.-]*\w)?/\w([\w.-]*\w)?", re.ASCII)

LOCAL_PATH = re.compile(r"(~|/|\.{1,2}([/\\]|$)|\\\\|[A-Za-z]:[\\/]|file:)")
"""The beginning of a path that reveals a location on a machine."""

CACHED_REPO = re.compile(r"models--(.+)/snapshots/[^/]+$")
"""A model's folder in the Hub's cache."""


def local_name(path: str) -> str:
    """A name for a path: its last part or, in the Hub's cache, the repository's name.

    It is safe as the beginning of a folder's name, and says nothing of where the path leads.
    """
    parts = [part for part in re.split(r"[/\\]", path) if part not in ("", ".", "..")]
    if cached := CACHED_REPO.search("/".join(parts)):
        return cached[1].replace("--", "/")
    return (parts[-1] if parts else "").lstrip(".-~") or "model"


def own_name(model_name: str) -> str:
    """The name of a language model wherever others may read it: its Hub id, or, of a local
    directory, the last part of its path."""
    path = os.path.expanduser(model_name)
    return local_name(os.path.abspath(path)) if os.path.isdir(path) else model_name


def without_paths(value: Any, renamed: Mapping[str, str] = MappingProxyType({})) -> Any:
    """A JSON value in which every path that reveals a location on this machine is replaced by
    its last part, and every text in `renamed` by its new name."""
    if isinstance(value, dict):
        return {key: without_paths(item, renamed) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(item, renamed) for item in value]
    if not isinstance(value, str):
        return value
    if value in renamed:
        return renamed[value]
    return local_name(value) if LOCAL_PATH.match(value) else value


def same_name(name: str) -> str:
    """A form of a name on the Hub, or a part of one, that is equal for names of the same thing:
    the Hub pays no regard to case."""
    return name.casefold()


def model_id(model_name: str) -> str:
    """The model name as one path component: `Qwen/Qwen3-0.6B` -> `Qwen_Qwen3-0.6B`.

    Nothing in it means anything to a shell.
    """
    return PUNCTUATION.sub("_", model_name)


def hook_spec(layer: int, hook_name: str) -> str:
    """TransformerLens's full name of a hook: `blocks.<layer>.<hook_name>`."""
    return f"blocks.{layer}.{hook_name}"


def hook_label(hook_name: str, target_hook_name: str = "") -> str:
    """A hook's name in names on disk; a transcoder's has both: `<hook_name>-<target_hook_name>`."""
    return f"{hook_name}-{target_hook_name}" if target_hook_name else hook_name


def middle_layer(n_layers: int, strategy: MiddleLayerStrategy = "lower") -> int:
    """The 0-based middle layer of `n_layers`; they differ only when `n_layers` is even."""
    return (n_layers - 1) // 2 if strategy == "lower" else n_layers // 2


def run_name(model_name: str, layer: int, hook_name: str, tag: str, expansion: int) -> str:
    """`<model_id>.blocks.<layer>.<hook_name>.<tag>.exp<expansion>`, the name of one SAE.

    `hook_name` is as `hook_label` gives it.
    """
    return f"{model_id(model_name)}.{hook_spec(layer, hook_name)}.{tag}.exp{expansion}"


def batch_checkpoint_name(model_name: str, layer: int, expansion: int) -> str:
    """The folder of the batch pipeline's checkpoints: `<model_id>_layer<layer>_exp<expansion>`."""
    return f"{model_id(model_name)}_layer{layer}_exp{expansion}"


def epoch_checkpoint(epoch: int) -> str:
    """The folder of the checkpoint after `epoch` (counted from 1)."""
    return f"checkpoint_epoch{epoch}.pt"


def path_component(name: str, option: str) -> str:
    """`name`, when it is safe as one folder's name.

    Raises:
        SAEError: it is empty or too long, starts with a dot or a dash, or holds a separator or a
            control character.
    """
    is_safe = name.isprintable() and not set(name) & set("/\\") and name[:1] not in ("", ".", "-")
    if not is_safe or len(name.encode()) > NAME_BYTES:
        raise SAEError(
            f"{option}: {name[:NAME_BYTES]!r} cannot name a folder; use letters, digits, '.', '_' "
            f"and '-', {NAME_BYTES} of them at most, and do not start with '.' or '-'"
        )
    return name


def check_repo_id(name: str, option: str) -> str:
    """`name`, when the Hub would take it as `owner/name`.

    Raises:
        SAEError: it would not.
    """
    if not REPO_ID.fullmatch(name) or "--" in name or ".." in name or name.endswith(".git"):
        raise SAEError(
            f"{option} {name}: not a repository on the Hub; the form is owner/name, of at most 96 "
            "letters, digits, '-', '_' and '.'"
        )
    return name


def check_model_name(name: str, option: str) -> str:
    """`name`, when others may read it: when it is not a path.

    Raises:
        SAEError: it is one, or cannot begin the name of a folder.
    """
    if LOCAL_PATH.match(name):
        raise SAEError(
            f"{option} {name}: a path, which would be published with the SAE; give a name, such as "
            f"{local_name(name)}"
        )
    path_component(model_id(name), option)
    return name


def ensure_writable(folder: Path, option: str) -> Path:
    """Make `folder` and check that files can be made in it.

    Raises:
        SAEError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write-test"
        probe.touch()
        probe.unlink(missing_ok=True)  # another process may check the same folder
    except OSError as error:
        raise SAEError(
            f"{option}: cannot write to {folder} ({error.strerror}); choose another folder"
        ) from error
    return folder
