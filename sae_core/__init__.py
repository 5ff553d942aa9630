"""Train, evaluate and publish sparse autoencoders on the activations of language models.

`import sae_core` imports no torch, so the workflow and the command lines can check their settings
before they pay for that import. docs/architecture.md lists the rooms, what each is for, and which
may import which.

`load_pretrained` and `list_pretrained` can be imported from here; torch is imported with them.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

__all__ = ["list_pretrained", "load_pretrained"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("sae_core.pretrained"), name)
