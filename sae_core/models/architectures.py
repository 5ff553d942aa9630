"""TransformerLens's descriptions of language models: which module a hook name refers to."""

from typing import Any

import torch

from sae_core.utils.errors import SAEError


def hook_paths(component: Any) -> dict[str, str]:
    """The hooks that are the input or output of a module, and where: `ln2.hook_in`."""
    paths = dict(component.hook_aliases)
    if getattr(component.submodules.get("mlp"), "name", None):
        paths["mlp.hook_in"] = "mlp.hook_in"  # has no other name
    return {
        name: path for name, path in paths.items() if path.split(".")[-1] in ("hook_in", "hook_out")
    }


def block_component(config: Any, architecture: str) -> Any:
    """TransformerLens's description of a model's blocks: where each hook name points."""
    from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
    from transformer_lens.model_bridge.sources import build_bridge_config_from_hf

    name = config.name_or_path
    bridge_config = build_bridge_config_from_hf(config, architecture, name, torch.float32)
    try:
        adapter = ArchitectureAdapterFactory.select_architecture_adapter(bridge_config)
        return (adapter.component_mapping or {})["blocks"]
    except (ValueError, KeyError) as error:
        raise SAEError(
            f"--model-name {name}: TransformerLens knows no stack of blocks of {architecture}; "
            "choose a causal language model that it supports"
        ) from error
