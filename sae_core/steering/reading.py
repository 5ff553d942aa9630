"""Which features each token of a text has."""

from typing import NamedTuple

import torch
from torch import Tensor

from sae_core.activations.token_windows import seen_tokens
from sae_core.corpus.tokens import token_ids
from sae_core.evaluation.words import Pieces
from sae_core.models.language_model import LanguageModel
from sae_core.models.model_configuration import context_length
from sae_core.sae_base import SparseAutoencoder
from sae_core.steering.splice import hooks_of
from sae_core.utils.errors import SAEError


class TokenFeatures(NamedTuple):
    """A token, and its strongest features."""

    token: str
    features: list[tuple[int, float]]
    """Number and activation, the strongest first."""
    n_active: int


@torch.no_grad()
def read_text(
    model: LanguageModel, sae: SparseAutoencoder, text: str, most: int
) -> list[TokenFeatures]:
    """The `most` strongest features of every token of a text.

    The model reads the token that begins its texts first, as in the windows of a training: no SAE
    is trained on the first position. Tokens that the training left out have no features, nor have
    outliers.

    Raises:
        SAEError: the text is empty, or longer than the model reads.
    """
    tokens = model.tokenizer(text, add_special_tokens=False).input_ids
    if not tokens:
        raise SAEError("the text is empty; give a sentence")
    first = _first_token(model, sae)
    most_tokens = context_length(model.model.config)
    if most_tokens is not None and len(tokens) >= most_tokens:
        raise SAEError(
            f"the text has {len(tokens)} tokens, and the model reads {most_tokens - 1}; give less"
        )
    hook, _ = hooks_of(sae)
    window = torch.tensor([[first, *tokens]])
    x = model.activations(window, [hook])[hook]
    seen = seen_tokens(window, token_ids(model.tokenizer, sae.spec.excluded_tokens))
    seen = seen.to(x.device) & ~sae.is_outlier(x)
    features = sae.encode(x[0, 1:].float()) * seen[0, 1:, None]
    pieces = Pieces(model.tokenizer).of(tokens)
    return [_strongest(piece, row, most) for piece, row in zip(pieces, features, strict=True)]


def _first_token(model: LanguageModel, sae: SparseAutoencoder) -> int:
    """The beginning-of-text token if the SAE's windows had one, else the one between texts."""
    tokenizer = model.tokenizer
    bos = sae.spec.metadata.get("prepend_bos") and tokenizer.bos_token_id is not None
    token = tokenizer.bos_token_id if bos else tokenizer.eos_token_id
    return 0 if token is None else int(token)


def _strongest(token: str, features: Tensor, most: int) -> TokenFeatures:
    """(F,) features of one token."""
    values, numbers = features.topk(min(most, len(features)))
    active = [
        (number, value)
        for number, value in zip(numbers.tolist(), values.tolist(), strict=True)
        if value > 0
    ]
    return TokenFeatures(token, active, int((features > 0).sum()))
