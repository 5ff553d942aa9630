"""Which hooks a model offers: TransformerLens's names, tried on the model's own code.

No weights are read. A copy of the model, built from its configuration, gets random weights that
take no memory, and each kind of block that it has runs on a few tokens. A hook is offered if it
yields one vector of the model's width per token, and if the residual stream adds up:

    hook_resid_pre + hook_attn_out = hook_resid_mid
    hook_resid_mid + hook_mlp_out = hook_resid_post

If it does not, there is no middle to read or to splice into: a block may normalise what it has
added, or scale it. Blocks with attention and MLP in parallel have no middle either.
"""

import copy
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from sae_core.models.language_model import LanguageModel

TOLERANCE = 1e-4
"""Relative tolerance of a sum that holds: the block adds the same float32 numbers."""

TOKENS = torch.tensor([[1, 2, 3, 4, 5], [5, 3, 1, 2, 4]])
"""(B, L) that the blocks run on."""

PRE, ATTN, MID = "hook_resid_pre", "hook_attn_out", "hook_resid_mid"
MLP, POST = "hook_mlp_out", "hook_resid_post"


def offered_hooks(config: Any, trust_remote_code: bool = False) -> tuple[str, ...]:
    """The names of the hooks that a causal language model with this configuration offers.

    A hook that only some kinds of its blocks have is included; a hook that has wrong values in
    some kind is not.

    Raises:
        SAEError: TransformerLens does not know its architecture.
        Exception: transformers cannot build or run it.
    """
    return _offered(_Key(config, trust_remote_code))


class _Key:
    """A configuration as a cache key."""

    def __init__(self, config: Any, trust_remote_code: bool) -> None:
        self.config, self.trust_remote_code = config, trust_remote_code
        self.text = f"{type(config)} {config.to_json_string()} {trust_remote_code}"

    def __hash__(self) -> int:
        return hash(self.text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.text == other.text


@lru_cache(maxsize=8)
def _offered(key: _Key) -> tuple[str, ...]:
    twin = _twin(key.config, key.trust_remote_code)
    given: set[str] = set()
    refused: set[str] = set()
    for layer in twin.kinds_of_blocks():
        readings = _readings(twin, layer)
        names, wrong = _judged(readings)
        if POST in twin.named_hooks and POST not in readings:
            names = set(twin.named_hooks)  # the block does not run here: nothing can be tried
        given |= names
        refused |= wrong
    return tuple(sorted(given - refused))


def _twin(config: Any, trust_remote_code: bool) -> "LanguageModel":
    """A model of that configuration in float32, with random weights."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    from sae_core.models.language_model import LanguageModel

    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=torch.float32,
            trust_remote_code=trust_remote_code,
            experts_implementation="eager",  # the others touch every expert's weights
        )
    draw = torch.Generator().manual_seed(0)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            made_up = _made_up(parameter.shape, draw)
            setattr(module, name, nn.Parameter(made_up, requires_grad=False))
    twin = LanguageModel(model, tokenizer=None)
    twin.hook_names = tuple(twin.named_hooks)
    return twin


def _made_up(shape: torch.Size, draw: torch.Generator) -> Tensor:
    """Random weights whose rows overlap in memory: `w[i, j] = v[i + j]`."""
    if not shape:
        return torch.ones(shape)
    values = torch.randn(sum(shape) - len(shape) + 1, generator=draw)
    values = values / shape[-1] ** 0.5 if len(shape) > 1 else 1 + values / 10
    return values.as_strided(tuple(shape), (1,) * len(shape))


def _readings(twin: "LanguageModel", layer: int) -> dict[str, Tensor]:
    """The values at each hook of a block, if they are one vector per token."""
    found = dict(_each_reading(twin, layer))
    expected = (*TOKENS.shape, twin.d_model)
    return {name: x for name, x in found.items() if x.shape == expected and x.is_floating_point()}


def _each_reading(twin: "LanguageModel", layer: int) -> Iterator[tuple[str, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    residual = torch.randn(*TOKENS.shape, twin.d_model, generator=draw)
    for name in twin.named_hooks:
        try:
            yield name, twin.read_block(TOKENS, residual, layer, name)
        except Exception:  # noqa: S112  whatever a hook without a tensor ends in: it is not given
            continue


def _judged(x: dict[str, Tensor]) -> tuple[set[str], set[str]]:
    """The hooks that a block has, and the hooks that it has but with wrong values.

    The sums concern the middle: a value spliced in there also has to bypass the MLP unchanged.
    """
    sums = _adds_up(x, PRE, ATTN, MID), _adds_up(x, MID, MLP, POST)
    wrong = {MID} if False in sums else set()
    return set(x) - wrong, wrong


def _adds_up(x: dict[str, Tensor], before: str, added: str, after: str) -> bool | None:
    """Whether the sum holds; None where a part of it is not there."""
    if not {before, added, after} <= set(x):
        return None
    difference = x[before] + x[added] - x[after]
    return bool(difference.norm() <= TOLERANCE * x[after].norm())
