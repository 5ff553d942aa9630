"""What a language model writes after a prompt, with and without steering; the same seed gives the
same text."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from sae_core.models.language_model import LanguageModel
from sae_core.models.model_configuration import context_length
from sae_core.sae_base import SparseAutoencoder
from sae_core.steering.splice import steered
from sae_core.utils.errors import SAEError

UNCHANGED: dict[str, Any] = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
"""The model's own probabilities: its generation settings may say otherwise, and hide that steering
makes it repeat itself."""

UNCUT: dict[str, Any] = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
"""Every token may be drawn."""


class Sampling(NamedTuple):
    """How a continuation is drawn."""

    n_tokens: int
    temperature: float
    """0: always the most likely token."""
    seed: int


@torch.no_grad()
def continuation(model: LanguageModel, prompt: str, sampling: Sampling) -> str:
    """The text that the model writes after `prompt`, with the hooks that are on it now.

    Raises:
        SAEError: the prompt is empty, prompt and continuation are longer than the model reads, or
            it predicts no finite probabilities.
    """
    tokens = model.tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
    n_tokens, most = tokens.shape[1], context_length(model.model.config)
    if n_tokens == 0:
        raise SAEError("the prompt is empty; give a word or more")
    if most is not None and n_tokens + sampling.n_tokens > most:
        raise SAEError(
            f"--n-tokens {sampling.n_tokens}: with the {n_tokens} tokens of the prompt more than "
            f"the {most} that the model reads; use fewer, or a shorter prompt"
        )
    draws = sampling.temperature > 0
    options = {"temperature": sampling.temperature} | UNCUT if draws else {}
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(sampling.seed)
        try:
            written = model.model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=sampling.n_tokens,
                do_sample=draws,
                pad_token_id=model.tokenizer.eos_token_id,
                **UNCHANGED,
                **options,
            )
        except RuntimeError as error:
            if "probability tensor" not in str(error):
                raise
            raise SAEError(
                "the model's predictions are no longer finite: give --strengths nearer to 0, or a "
                "larger --temperature"
            ) from error
    return model.tokenizer.decode(written[0, n_tokens:], skip_special_tokens=True)


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
        SAEError: no such feature, or see `continuation`; before anything is written.
    """
    for strength in strengths:
        with steered(sae, model, dict.fromkeys(features, strength)):
            pass
    yield 0.0, continuation(model, prompt, sampling)
    for strength in strengths:
        with steered(sae, model, dict.fromkeys(features, strength)):
            yield strength, continuation(model, prompt, sampling)
