"""Changes activations of a model while it runs; gradients flow through the change."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from sae_core.models.architectures import block_component
from sae_core.models.language_model import (
    Hook,
    LanguageModel,
    Site,
    find_site,
    input_of,
    output_of,
    own_copy,
    with_output,
)
from sae_core.utils.errors import SAEError

Edit = Callable[[Tensor, int], Tensor]
"""(B, L, D) an activation, and the position of its first token in the text, which is above 0 where
earlier ones are in the cache -> what takes its place."""


class _Place(NamedTuple):
    """Where a hook is in a model."""

    base: nn.Module
    """The model without its head."""
    block: nn.Module
    site: Site


@contextmanager
def editing(model: Any, hook: Hook, edit: Edit) -> Iterator[None]:
    """While this is open, every forward pass has `edit(activation)` in place of the activation at
    `hook`.

    Args:
        model: a `LanguageModel`, or a causal language model of transformers, which stays as it is.

    Raises:
        SAEError: the model has no such hook.
    """
    place = _place(model, hook)
    position = [0]
    difference: list[Tensor] = []

    def note_position(_: Any, __: Any, kwargs: dict) -> None:
        cache = kwargs.get("past_key_values")
        position[0] = 0 if cache is None else int(cache.get_seq_length())

    def edited(x: Tensor) -> Tensor:
        value = own_copy(edit(x, position[0]), x)
        difference[:] = [value - x] if hook.hook_name == "hook_resid_mid" else []
        return value

    def new_input(_: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        value = edited(input_of(args, kwargs))
        if args:
            return (value, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": value}

    def new_output(_: Any, __: Any, output: Any) -> Any:
        return with_output(output, edited(output_of(output)))

    def past_the_mlp(_: Any, __: Any, output: Any) -> Any:
        """The residual in mid-block also goes past the MLP."""
        return with_output(output, output_of(output) + difference.pop())

    with ExitStack() as stack:
        handles = [place.base.register_forward_pre_hook(note_position, with_kwargs=True)]
        module, is_input = place.site
        if is_input:
            handles.append(module.register_forward_pre_hook(new_input, with_kwargs=True))
        else:
            handles.append(module.register_forward_hook(new_output))
        if hook.hook_name == "hook_resid_mid":
            handles.append(place.block.register_forward_hook(past_the_mlp))
        for handle in handles:
            stack.callback(handle.remove)
        yield


def _place(model: Any, hook: Hook) -> _Place:
    plain = model.model if isinstance(model, LanguageModel) else model
    component = block_component(plain.config, type(plain).__name__)
    blocks = plain.get_submodule(component.name)
    base = plain.get_submodule(component.name.rpartition(".")[0])
    if hook.layer >= len(blocks):
        raise SAEError(f"{hook.spec}: the model's layers are 0 to {len(blocks) - 1}")
    if isinstance(model, LanguageModel):
        return _Place(base, blocks[hook.layer], model.site(hook))
    try:
        return _Place(base, blocks[hook.layer], find_site(blocks, component, hook))
    except (KeyError, AttributeError, TypeError, IndexError) as error:
        name = type(plain).__name__
        raise SAEError(f"{hook.spec}: {name} has no one module that gives it") from error
