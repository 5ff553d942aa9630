"""Train, evaluate and publish sparse autoencoders on the activations of language models.

Nothing here imports torch, so the workflow and the command lines can check their settings
before they pay for that import. The rooms, from the outside in:

    model_training/                          the command lines
    sae_train, evaluation/, reporting/, publishing/, pretrained
    training, checkpoint, activations/       the loop, its checkpoints, where its data comes from
    sae_base, kinds/, losses, sparse_ops     the SAE and its arithmetic
    train_config, sae_config, naming         settings, run names and paths
    cli, console, devices, files, ...        small things that the rooms share

`load_pretrained` and `list_pretrained` are found here too, and bring torch with them when used.

The workflow asks three more: model_sources (fetch), workflow_config (what is to be made) and
code_hash (what code a job depends on).
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

__all__ = ["list_pretrained", "load_pretrained"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("sae_core.pretrained"), name)
