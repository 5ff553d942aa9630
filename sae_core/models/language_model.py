"""The language model: load it, read activations at hooks, stop early, resume from a layer.

Hooks are named as in TransformerLens. Its architecture adapter says which module of the Hugging
Face model a name refers to, and the model's own forward (with fused attention) does the work. The
numbers are the same as with `TransformerBridge`, whose eager attention is slower.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sae_core.models.architectures import block_component, hook_paths
from sae_core.models.loading import load_causal_model, load_tokenizer
from sae_core.models.offered_hooks import offered_hooks
from sae_core.models.ordered_attention import OrderedAttention
from sae_core.models.stand_ins import BaseOutput, forward_of, rows_of
from sae_core.train_config import HOOK_NAME, BatchSize, ModelConfig, windows_per_pass
from sae_core.utils.errors import SAEError, is_out_of_memory
from sae_core.utils.memory import Microbatch
from sae_core.utils.naming import hook_spec
from sae_core.utils.transfer import to_device

CPU_TOKENS = 1024
"""Tokens in one forward pass on a CPU, about."""

BLOCK_ENDS = ("hook_resid_pre", "hook_resid_post")
"""The input and the output of a block, in every model."""

HOOK_SPEC = re.compile(rf"blocks\.([0-9]{{1,6}})\.({HOOK_NAME.pattern})", re.ASCII)


class Hook(NamedTuple):
    """An activation of the model: `hook_name` in block `layer`."""

    layer: int
    hook_name: str

    @property
    def spec(self) -> str:
        """`blocks.<layer>.<hook_name>`"""
        return hook_spec(self.layer, self.hook_name)

    def target(self, hook_name: str) -> "Hook | None":
        """A transcoder's target, in the same block; None without a name, as for an SAE."""
        return self._replace(hook_name=hook_name) if hook_name else None

    @classmethod
    def parse(cls, spec: str) -> "Hook":
        """The hook of a full name `blocks.<layer>.<hook_name>`.

        Raises:
            SAEError: it has another form.
        """
        found = HOOK_SPEC.fullmatch(spec)
        if found is None:
            raise SAEError(f"hook {spec}: the form is blocks.<layer>.<hook_name>")
        return cls(int(found[1]), found[2])


class Site(NamedTuple):
    """Where a hook sits: the input or the output of a module."""

    module: nn.Module
    is_input: bool


class _Reached(Exception):
    """The last hooked module has run; the rest of the forward pass is not needed."""


class LanguageModel:
    """A causal language model whose weights have no gradients.

    Args:
        model: a Hugging Face causal language model.
        tokenizer: its tokenizer.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self._component = block_component(model.config, type(model).__name__)
        self._blocks: nn.ModuleList = model.get_submodule(self._component.name)
        self._base = model.get_submodule(self._component.name.rpartition(".")[0])
        self.n_layers = len(self._blocks)
        self.d_model: int = model.config.get_text_config().hidden_size
        self.device = next(model.parameters()).device
        self.dtype: torch.dtype = model.dtype
        self._blocks_give_tuples = False
        self._blocks[0].register_forward_hook(self._note_block_output)

    @cached_property
    def hook_names(self) -> tuple[str, ...]:
        """The hooks that the model offers."""
        remote = type(self.model).__module__.startswith("transformers_modules")
        return offered_hooks(self.model.config, trust_remote_code=remote)

    @property
    def named_hooks(self) -> list[str]:
        """The hooks that the model has according to TransformerLens."""
        return list(hook_paths(self._component))

    @classmethod
    def load(
        cls,
        config: ModelConfig,
        device: torch.device,
        window: int = 0,
        n_blocks: int | None = None,
    ) -> "LanguageModel":
        """Load the model and tokenizer of a Hub id or a local directory.

        Args:
            window: tokens in the windows that it is to read.
            n_blocks: blocks to load, from the first, for a model that only gives activations of
                these; None for the whole model.

        Raises:
            SAEError: it cannot be found or loaded, or it reads no windows of that length.
        """
        tokenizer = load_tokenizer(config)
        return cls(load_causal_model(config, device, window, n_blocks), tokenizer)

    @torch.no_grad()
    def activations(self, tokens: Tensor, hooks: Sequence[Hook]) -> dict[Hook, Tensor]:
        """(B, L) tokens -> (B, L, D) activations at each hook, in one pass that stops at the last.

        No logits, no cache, and no padding: every token counts.

        On a CPU all passes have one shape, and fewer windows are padded to it, so that a
        window's activations do not depend on which windows it is with.
        """
        n = len(tokens)
        filler = tokens[:1].expand(max(0, self.windows_at_once(tokens.shape[1], n) - n), -1)
        try:
            found = self._activations(torch.cat([tokens, filler]), hooks)
        except RuntimeError as error:
            if not len(filler) or not is_out_of_memory(error):
                raise
            found = self._activations(tokens, hooks)
        return {hook: x[:n] for hook, x in found.items()}

    def _activations(self, tokens: Tensor, hooks: Sequence[Hook]) -> dict[Hook, Tensor]:
        found: dict[Hook, Tensor] = {}
        with self._recording(hooks, found):
            try:
                self.model(to_device(tokens, self.device), use_cache=False)
            except _Reached:
                pass
        return found

    def windows_at_once(self, length: int, batch_size: BatchSize) -> int:
        """Windows of `length` tokens per forward pass: `batch_size`, but on a CPU always as many
        as have about `CPU_TOKENS` tokens.

        The last bits of a matrix product depend on its shape. Larger passes are no faster there.
        """
        if self.device.type == "cpu":
            return max(1, CPU_TOKENS // length)
        return windows_per_pass(length, batch_size)

    def forward_microbatch(self, length: int, batch_size: BatchSize) -> Microbatch:
        """Windows of `length` tokens per forward pass, fewer when memory runs out."""
        advice = (
            "use shorter windows (--max-text-length), a smaller --model-dtype or another --device"
        )
        size = self.windows_at_once(length, batch_size)
        return Microbatch(size, "windows per forward pass", advice)

    @torch.no_grad()
    def hidden(
        self, tokens: Tensor, hooks: Sequence[Hook] = ()
    ) -> tuple[Tensor, dict[Hook, Tensor]]:
        """(B, L) tokens -> (B, L, D) the input of `unembed`, and the activations at
        `hooks` on the way."""
        found: dict[Hook, Tensor] = {}
        with self._recording(hooks, found, stop=False):
            return self._run_base(tokens), found

    @torch.no_grad()
    def logits(
        self, tokens: Tensor, hooks: Sequence[Hook] = ()
    ) -> tuple[Tensor, dict[Hook, Tensor]]:
        """(B, L) tokens -> (B, L, V) logits, and the activations at `hooks` on the way."""
        hidden, found = self.hidden(tokens, hooks)
        return self.unembed(hidden), found

    def resume_hidden(
        self,
        tokens: Tensor,
        residual: Tensor,
        hook: Hook,
        value: Tensor,
        hooks: Sequence[Hook] = (),
    ) -> tuple[Tensor, dict[Hook, Tensor]]:
        """`hidden` when the (B, L, D) activations at `hook` are replaced by `value`, without
        running the blocks before the hook again.

        `residual` is what the clean pass had at `resume_point(hook)`. Gradients flow to `value`,
        and are the same every time.
        """
        found: dict[Hook, Tensor] = {}
        with ExitStack() as stack:
            if value.is_cuda and value.requires_grad:
                stack.enter_context(OrderedAttention())
            if hook.hook_name == "hook_resid_post":
                stack.enter_context(self._skipping(hook.layer + 1, value))
            else:
                stack.enter_context(self._skipping(hook.layer, residual))
                stack.enter_context(self._replacing(self.site(hook), value))
                if hook.hook_name == "hook_resid_mid":
                    stack.enter_context(self._replacing_skip_path(hook, value))
            stack.enter_context(self._recording(hooks, found, stop=False))
            return self._run_base(tokens), found

    def resume(
        self,
        tokens: Tensor,
        residual: Tensor,
        hook: Hook,
        value: Tensor,
        hooks: Sequence[Hook] = (),
    ) -> tuple[Tensor, dict[Hook, Tensor]]:
        """The same with logits: `unembed` applied to `resume_hidden`."""
        hidden, found = self.resume_hidden(tokens, residual, hook, value, hooks)
        return self.unembed(hidden), found

    def unembed(self, hidden: Tensor, tokens: Tensor | None = None) -> Tensor:
        """(..., D) rows of `hidden` -> (..., V) logits, by the model's own forward, which may
        scale or cap them; only those of `tokens` (T,), if given. Gradients flow to `hidden`."""
        rows = hidden.reshape(1, -1, hidden.shape[-1]).clone()
        unread = torch.zeros(rows.shape[:2], dtype=torch.long, device=self.device)
        with ExitStack() as stack:
            stack.enter_context(forward_of([self._base], lambda *_, **__: BaseOutput((rows,))))
            if tokens is not None:
                stack.enter_context(rows_of(self.model.get_output_embeddings(), tokens))
            logits = self.model(unread, use_cache=False).logits
        return logits.to(self.device).view(*hidden.shape[:-1], -1)

    def _run_base(self, tokens: Tensor) -> Tensor:
        """(B, L, D) the model's last hidden state, from which it computes the logits."""
        output = self._base(to_device(tokens, self.device), use_cache=False)
        return output.last_hidden_state.to(self.device)

    def kinds_of_blocks(self) -> list[int]:
        """The first layer of each kind: models that mix attention and other things have several."""
        first: dict[tuple[tuple[str, type], ...], int] = {}
        for layer, block in enumerate(self._blocks):
            parts = tuple((name, type(module)) for name, module in block.named_modules())
            first.setdefault(parts, layer)
        return list(first.values())

    @torch.no_grad()
    def read_block(self, tokens: Tensor, residual: Tensor, layer: int, hook_name: str) -> Tensor:
        """(B, L, D) the activation at a hook of block `layer`, with `residual` (B, L, D) in place
        of what the blocks before it give."""
        hook = Hook(layer, hook_name)
        with self._skipping(layer, residual):
            return self._activations(tokens, [hook])[hook]

    def _note_block_output(self, _: Any, args: tuple, output: Any) -> None:
        self._blocks_give_tuples = isinstance(output, tuple | list)

    def site(self, hook: Hook) -> Site:
        """Where a hook sits.

        Raises:
            SAEError: the model has no such hook.
        """
        if hook.hook_name not in BLOCK_ENDS and hook.hook_name not in self.hook_names:
            raise self._not_given(hook)
        try:
            return find_site(self._blocks, self._component, hook)
        except (KeyError, AttributeError, TypeError, IndexError) as error:
            raise self._not_given(hook) from error

    def _not_given(self, hook: Hook) -> SAEError:
        return SAEError(
            f"--hook-name {hook.hook_name}: {type(self.model).__name__} has no one module that "
            f"gives it in layer {hook.layer}; choose another hook"
        )

    @contextmanager
    def _recording(
        self, hooks: Sequence[Hook], found: dict[Hook, Tensor], stop: bool = True
    ) -> Iterator[None]:
        def record(hook: Hook, value: Tensor) -> None:
            found[hook] = value.to(self.device, copy=True)  # some blocks add to it in place
            if stop and len(found) == len(set(hooks)):
                raise _Reached

        with ExitStack() as stack:
            for hook in set(hooks):
                site = self.site(hook)
                if site.is_input:
                    handle = site.module.register_forward_pre_hook(
                        lambda _, args, kwargs, hook=hook: record(hook, input_of(args, kwargs)),
                        with_kwargs=True,
                    )
                else:
                    handle = site.module.register_forward_hook(
                        lambda _, args, output, hook=hook: record(hook, output_of(output))
                    )
                stack.callback(handle.remove)
            yield

    @contextmanager
    def _replacing(self, site: Site, value: Tensor) -> Iterator[None]:
        def new_input(_: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            if args:
                return (own_copy(value, args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": own_copy(value, kwargs["hidden_states"])}

        def new_output(_: Any, args: tuple, output: Any) -> Any:
            return with_output(output, own_copy(value, output_of(output)))

        if site.is_input:
            handle = site.module.register_forward_pre_hook(new_input, with_kwargs=True)
        else:
            handle = site.module.register_forward_hook(new_output)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def _replacing_skip_path(self, hook: Hook, value: Tensor) -> Iterator[None]:
        """The residual in mid-block also goes past the MLP: replace it in the block's sum."""
        block = self._blocks[hook.layer]
        clean: dict[str, Tensor] = {}
        before = self.site(hook).module.register_forward_pre_hook(
            lambda _, args, kwargs: clean.update(mid=input_of(args, kwargs).clone()),
            prepend=True,
            with_kwargs=True,
        )

        def correct(_: Any, args: tuple, output: Any) -> Any:
            difference = value.to(clean["mid"].device) - clean["mid"]
            total = output_of(output) + difference.to(output_of(output).dtype)
            return with_output(output, total)

        after = block.register_forward_hook(correct, prepend=True)
        try:
            yield
        finally:
            before.remove()
            after.remove()

    @contextmanager
    def _skipping(self, n_blocks: int, residual: Tensor) -> Iterator[None]:
        """The first `n_blocks` blocks do nothing, and the residual after them is `residual`."""
        value = residual.to(self.dtype, copy=True)
        given = (value,) if self._blocks_give_tuples else value
        with forward_of(list(self._blocks)[:n_blocks], lambda *_, **__: given):
            yield


def find_site(blocks: nn.ModuleList, component: Any, hook: Hook) -> Site:
    """Where a hook sits, by the names that TransformerLens's `component` has for the parts of a
    block; an error of a lookup if it is nowhere."""
    *parts, side = hook_paths(component)[hook.hook_name].split(".")
    module = blocks[hook.layer]
    for part in parts:
        component = component.submodules[part]
        module = module.get_submodule(component.name)
    return Site(module, side == "hook_in")


def resume_point(hook: Hook) -> Hook:
    """What the clean pass has to record so that `LanguageModel.resume` can start at `hook`."""
    return hook._replace(hook_name="hook_resid_pre")


def input_of(args: tuple, kwargs: dict) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def output_of(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple | list) else output


def with_output(output: Any, value: Tensor) -> Any:
    """A module's output, with `value` in place of its tensor."""
    if not isinstance(output, tuple | list):
        return value
    replaced = (value, *output[1:])
    return list(replaced) if isinstance(output, list) else replaced


def own_copy(value: Tensor, like: Tensor) -> Tensor:
    """`value` as the model is given it: some blocks add to what they get in place, and a value
    that is the same for all tokens may be one place in memory."""
    return value.to(like).clone(memory_format=torch.contiguous_format)
