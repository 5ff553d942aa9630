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


class Given(NamedTuple):
    """What a forward pass was given."""

    position: int
    """Of its first tokens in their texts: above 0 where earlier ones are in the cache."""
    tokens: Tensor | None
    """(B, L); None where it was given embeddings."""
    mask: Tensor | None
    """(B, position + L): 0 for padding; None where it was given none, or one of another form."""

    @classmethod
    def of(cls, args: tuple, kwargs: dict) -> "Given":
        """What is in the arguments of a model's `forward`."""
        cache, tokens = kwargs.get("past_key_values"), kwargs.get("input_ids", *args[:1])
        position = 0 if cache is None else int(cache.get_seq_length())
        mask = kwargs.get("attention_mask")
        is_plain = isinstance(mask, Tensor) and mask.dim() == 2
        return cls(position, tokens, mask if is_plain else None)


Edit = Callable[[Tensor, Given], Tensor]
"""(B, L, D) an activation -> what takes its place."""


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
    given = Given(0, None, None)
    difference: list[Tensor] = []

    def note(_: Any, args: tuple, kwargs: dict) -> None:
        nonlocal given
        given = Given.of(args, kwargs)

    def edited(x: Tensor) -> Tensor:
        value = own_copy(edit(x, given), x)
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
        handles = [place.base.register_forward_pre_hook(note, with_kwargs=True)]
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
