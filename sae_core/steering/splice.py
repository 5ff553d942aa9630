"""An SAE inside its language model: its reconstruction in place of the activation, or a feature's
direction added to it.

The tokens on which no SAE is trained keep their activations: a text's first, after its padding if
it has some, those that the SAE's training left out (`excluded_tokens`), and outliers, such as
attention sinks, unless the SAE's `keeps_outliers` is False. Nothing else is changed in the model,
and nothing at all once a context is closed.

Shapes: B texts, L positions, D activation width, F features.
"""

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sae_core.corpus.tokens import token_ids
from sae_core.models.editing import Given, editing
from sae_core.models.language_model import Hook, LanguageModel
from sae_core.sae.normalisation import beyond
from sae_core.sae_base import SparseAutoencoder
from sae_core.utils.errors import SAEError

Replace = Callable[[Tensor], Tensor]
"""(B, L, F) features -> those that are decoded in their place."""


@dataclass
class Splice:
    """What the last forward pass had at the SAE."""

    x: Tensor | None = None
    """(B, L, D) what the SAE read."""
    features: Tensor | None = None
    """(B, L, F), before they were replaced. Where gradients are recorded, `features.grad` has that
    of what is differentiated afterwards."""
    x_hat: Tensor | None = None
    """(B, L, D) what they are decoded to, also at tokens that keep their activations."""


def hooks_of(sae: SparseAutoencoder) -> tuple[Hook, Hook]:
    """Where an SAE reads, and where its output belongs."""
    hook = Hook(sae.spec.hook_layer, sae.spec.hook_name)
    return hook, hook.target(sae.spec.target_hook_name) or hook


def _check_width(sae: SparseAutoencoder, x: Tensor) -> None:
    if x.shape[-1] != sae.spec.d_in:
        hook, _ = hooks_of(sae)
        raise SAEError(
            f"the SAE is for {hook.spec} of width {sae.spec.d_in}, and the model has width "
            f"{x.shape[-1]} there; give the SAE's own model"
        )


def _keeps(sae: SparseAutoencoder, x: Tensor, y: Tensor, alone: Tensor) -> Tensor:
    """(B, L, 1) bool: which tokens keep their activation, with the outliers among them."""
    if not sae.keeps_outliers:
        return alone
    return alone | sae.is_outlier(_float_at(sae, x), y)[..., None]


@contextmanager
def spliced(
    sae: SparseAutoencoder,
    model: Any,
    replace: Replace | None = None,
    keep_error: bool = False,
    tokenizer: Any = None,
) -> Iterator[Splice]:
    """While it is open, forward passes have the SAE's reconstruction in place of the activation; a
    transcoder's in place of its target. Gradients flow through it.

    Args:
        sae: it is moved to the model's device.
        model: a `LanguageModel`, or a causal language model of transformers.
        replace: changes the features that are decoded.
        keep_error: add what the features do not reconstruct, so that only `replace` has an effect.
        tokenizer: of a model of transformers, if the SAE's training left tokens out.

    Raises:
        SAEError: the SAE is for a model of another shape, or a tokenizer is needed.
    """
    hook, target = hooks_of(sae)
    excluded = _prepare(sae, model, tokenizer)
    seen = Splice()

    def read(x: Tensor, given: Given) -> Tensor:
        _check_width(sae, x)
        seen.x = x
        seen.features = _with_gradient(sae.encode(_float_at(sae, x)))
        return x

    def put(y: Tensor, given: Given) -> Tensor:
        features = seen.features
        assert features is not None
        decoded = features if replace is None else replace(features)
        seen.x_hat = sae.decode(decoded).float()
        value, y = seen.x_hat, _float_at(sae, y)
        if keep_error:
            value = value + (y - sae.decode(features).float()).detach()
        assert seen.x is not None
        return torch.where(_keeps(sae, seen.x, y, _left_alone(y, given, excluded)), y, value)

    def both(x: Tensor, given: Given) -> Tensor:
        return put(read(x, given), given)

    edits = [(hook, both)] if hook == target else [(hook, read), (target, put)]
    with ExitStack() as stack:
        for place, edit in edits:
            stack.enter_context(editing(model, place, edit))
        yield seen


def _is_below(number: Any, end: int) -> bool:
    """Whether it is a whole number of at least 0 and less than `end`."""
    try:
        return 0 <= operator.index(number) < end
    except TypeError:
        return False


@contextmanager
def steered(
    sae: SparseAutoencoder, model: Any, strengths: Mapping[int, float], tokenizer: Any = None
) -> Iterator[None]:
    """While it is open, forward passes have each feature's decoder row, times its strength, added
    to the activation of every token but a text's first, those that training left out, and outliers
    (of a transcoder, those at its target).

    A strength is in the units of the feature's activation. Rows have length 1, so an activation
    moves by the strength along the row.

    Args:
        tokenizer: of a model of transformers, if the SAE's training left tokens out.

    Raises:
        SAEError: no such feature, a strength that is no finite number, or a tokenizer is needed.
    """
    for feature, strength in strengths.items():
        if not _is_below(feature, sae.spec.d_sae):
            raise SAEError(f"feature {feature}: the SAE's features are 0 to {sae.spec.d_sae - 1}")
        if not math.isfinite(strength):
            raise SAEError(f"strength {strength} of feature {feature}: not a finite number")
    excluded = _prepare(sae, model, tokenizer)
    rows = sae.W_dec[list(strengths)].float()
    scales = rows.new_tensor(list(strengths.values()))
    shift = scales @ rows

    def add(x: Tensor, given: Given) -> Tensor:
        x = _float_at(sae, x)
        alone = _left_alone(x, given, excluded)
        if sae.keeps_outliers:
            alone = alone | beyond(x, sae.spec.outlier_norms[1])[..., None]
        return torch.where(alone, x, x + shift)

    with editing(model, hooks_of(sae)[1], add):
        yield


def _prepare(sae: SparseAutoencoder, model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Have the SAE where the model is; the tokens that its training left out."""
    sae.known_threshold  # noqa: B018  an SAE without one cannot encode
    sae.to(model.device)
    if isinstance(model, LanguageModel):
        tokenizer = model.tokenizer
    if sae.spec.excluded_tokens and tokenizer is None:
        raise SAEError(
            f"the SAE's training left out {', '.join(sae.spec.excluded_tokens)}, and a model of "
            "transformers does not know how its tokens are written; give `tokenizer=` as well"
        )
    return token_ids(tokenizer, sae.spec.excluded_tokens)


def _float_at(sae: SparseAutoencoder, x: Tensor) -> Tensor:
    """`x` in float32 where the SAE is: of a model on several GPUs, not every layer is there."""
    return x.to(sae.b_dec.device, torch.float32)


def _left_alone(x: Tensor, given: Given, excluded: Sequence[int]) -> Tensor:
    """(B or 1, L, 1) bool: the tokens that keep their activations, outliers aside."""
    length, mask = x.shape[1], given.mask
    alone = torch.zeros(1, length, dtype=torch.bool, device=x.device)
    if mask is not None and mask.shape[1] == given.position + length:
        read = mask.to(x.device).ne(0)
        alone = (~read | (read.cumsum(1) == 1))[:, -length:]
    elif given.position == 0:
        alone[:, 0] = True
    if excluded:
        if given.tokens is None:
            raise SAEError(
                "the SAE's training left tokens out, and the model was given embeddings; give it "
                "`input_ids`"
            )
        tokens = given.tokens.to(x.device)
        alone = alone | torch.isin(tokens, torch.tensor(excluded, device=x.device))
    return alone[..., None]


def _with_gradient(features: Tensor) -> Tensor:
    """The features as a tensor whose gradient is kept, where gradients are recorded."""
    if torch.is_grad_enabled():
        if features.requires_grad:
            features.retain_grad()
        else:
            features.requires_grad_()
    return features
