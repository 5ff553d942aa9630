"""What a language model writes after a prompt, with and without steering; the same seed gives the
same text."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from sae_core.models.language_model import LanguageModel
from sae_core.sae_base import SparseAutoencoder
from sae_core.steering.splice import steered


class Sampling(NamedTuple):
    """How a continuation is drawn."""

    n_tokens: int
    temperature: float
    """0: always the most likely token."""
    seed: int


@torch.no_grad()
def continuation(model: LanguageModel, prompt: str, sampling: Sampling) -> str:
    """The text that the model writes after `prompt`, with the hooks that are on it now."""
    tokens = model.tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
    draws = sampling.temperature > 0
    options = {"temperature": sampling.temperature, "top_k": 0, "top_p": 1.0} if draws else {}
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(sampling.seed)
        written = model.model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=sampling.n_tokens,
            do_sample=draws,
            pad_token_id=model.tokenizer.eos_token_id,
            **options,
        )
    return model.tokenizer.decode(written[0, tokens.shape[1] :], skip_special_tokens=True)


def steered_continuations(
    sae: SparseAutoencoder,
    model: LanguageModel,
    prompt: str,
    features: Sequence[int],
    strengths: Sequence[float],
    sampling: Sampling,
) -> Iterator[tuple[float, str]]:
    """Each strength with its continuation, the same seed for all; first 0, without steering.

    Raises:
        SAEError: no such feature.
    """
    yield 0.0, continuation(model, prompt, sampling)
    for strength in strengths:
        added: Mapping[int, float] = dict.fromkeys(features, strength)
        with steered(sae, model, added):
            yield strength, continuation(model, prompt, sampling)
