"""Reading a language model's weights onto a device: all of it, or its first blocks only."""

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from sae_core.models.architectures import block_component
from sae_core.models.model_configuration import check_window, context_length, read_configuration
from sae_core.models.model_places import Place, cannot_load, model_place
from sae_core.train_config import ModelConfig
from sae_core.utils.devices import device_map, pick_dtype
from sae_core.utils.errors import SAEError
from sae_core.utils.progress import bars_are_wanted


def load_tokenizer(config: ModelConfig) -> Any:
    """The tokenizer of a Hub id or a local directory.

    Raises:
        SAEError: it cannot be found or loaded.
    """
    from transformers import AutoTokenizer

    place = model_place(config)
    try:
        return AutoTokenizer.from_pretrained(place.source, **_where(config, place))
    except Exception as error:  # damaged files raise all kinds
        raise cannot_load(config.model_name, error) from error


def load_causal_model(
    config: ModelConfig, device: torch.device, window: int, n_blocks: int | None
) -> Any:
    """The causal language model of a Hub id or a local directory, in Hugging Face's class.

    Args:
        window: tokens in the windows that it is to read.
        n_blocks: blocks to load, from the first; None for all of them.

    Raises:
        SAEError: it cannot be found or loaded, or it reads no windows of that length.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    if not bars_are_wanted():
        logging.disable_progress_bar()
    name, place = config.model_name, model_place(config)
    configuration = read_configuration(name, place, config.trust_remote_code)
    check_window(window, context_length(configuration))
    dtype = pick_dtype(config.model_dtype, device)
    quantization = _four_bit(dtype, device) if config.load_in_4bit else None
    built = nullcontext() if n_blocks is None else _with_blocks(configuration, n_blocks)
    try:
        with built:
            # Its type knows of no loading information.
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                place.source,
                dtype=dtype,
                quantization_config=quantization,
                device_map=device_map(device),
                output_loading_info=True,
                **_where(config, place),
            )
    except Exception as error:  # damaged files raise all kinds
        raise cannot_load(name, error) from error
    model, report = loaded
    # Only a model that is on several devices has that map.
    if {"cpu", "disk"} & set(getattr(model, "hf_device_map", {}).values()):
        raise cannot_load(name, "it is larger than the memory of the GPUs")
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise cannot_load(name, f"its files lack weights: {missing}")
    return model


def _where(config: ModelConfig, place: Place) -> dict[str, Any]:
    return {"revision": place.revision, "trust_remote_code": config.trust_remote_code}


@contextmanager
def _with_blocks(configuration: Any, n_blocks: int) -> Iterator[None]:
    """While this is open, a model is built with its first `n_blocks` blocks only. transformers
    builds a model before it reads the weights, so it reads and allocates no others.

    Its configuration stays whole: some models compute with their number of layers.
    """
    n_layers = configuration.get_text_config().num_hidden_layers
    path = block_component(configuration, configuration.architectures[0]).name
    name = path.rpartition(".")[2]

    def cut(parent: nn.Module, attribute: str, blocks: nn.Module) -> nn.Module | None:
        if not (attribute == name and isinstance(blocks, nn.ModuleList)):
            return None
        if not n_blocks < len(blocks) == n_layers:
            return None
        kept = blocks[:n_blocks]
        # Otherwise transformers warns of each weight that is not read.
        left_out = "|".join(map(str, range(n_blocks, n_layers)))
        unread: Any = {rf"(^|\.){re.escape(name)}\.({left_out})\."}
        kept._keys_to_ignore_on_load_unexpected = unread
        return kept

    # Its type knows of no hook that returns something.
    handle = register_module_module_registration_hook(cut)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()


def _four_bit(dtype: torch.dtype, device: torch.device) -> Any:
    if device.type != "cuda":
        raise SAEError(f"--load-in-4bit: needs a CUDA GPU, and the device is {device.type}")
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise SAEError(
            "--load-in-4bit: needs bitsandbytes; install it with `pip install '.[4bit]'` "
            "or leave the option out"
        ) from error
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype)
