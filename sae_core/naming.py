"""Run names, hook names and paths: every name that appears on disk is made here."""

from pathlib import Path
from typing import Literal

from sae_core.errors import SAEError

MiddleLayerStrategy = Literal["lower", "upper"]

SAE_FILES = ("weights.pt", "config.json", "history.json")
"""What every SAE directory holds, a checkpoint and a final export alike."""

EXPORT_FILES = (*SAE_FILES, "cfg.json", "sae_weights.safetensors")
"""What a final SAE directory holds: the last two are SAELens's format."""

BEST_CHECKPOINT = "best_model.pt"


def model_id(model_name: str) -> str:
    """The model name as one path component: `Qwen/Qwen3-0.6B` -> `Qwen_Qwen3-0.6B`."""
    return model_name.replace("/", "_")


def hook_spec(layer: int, hook_name: str) -> str:
    """TransformerLens's full name of a hook: `blocks.<layer>.<hook_name>`."""
    return f"blocks.{layer}.{hook_name}"


def middle_layer(n_layers: int, strategy: MiddleLayerStrategy = "lower") -> int:
    """The 0-based middle layer of `n_layers`; they differ only when `n_layers` is even."""
    return (n_layers - 1) // 2 if strategy == "lower" else n_layers // 2


def run_name(model_name: str, layer: int, hook_name: str, tag: str, expansion: int) -> str:
    """`<model_id>.blocks.<layer>.<hook_name>.<tag>.exp<expansion>`, the name of one SAE."""
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
        SAEError: it is empty, starts with a dot, or holds a separator or a control character.
    """
    if not name or name.startswith(".") or not name.isprintable() or set(name) & set("/\\"):
        raise SAEError(
            f"{option}: {name!r} cannot name a folder; use letters, digits, '.', '_' and '-', "
            "and do not start with '.'"
        )
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
        probe.unlink()
    except OSError as error:
        raise SAEError(
            f"{option}: cannot write to {folder} ({error.strerror}); choose another folder"
        ) from error
    return folder
