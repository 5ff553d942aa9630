"""The first-letter task of Chanin et al. (arXiv 2409.14507) with the words of a model's vocabulary.

A word is a token of letters. It is read after an example of the task, at the word itself. SAEBench
(arXiv 2503.09532), which this follows, draws ten examples for each word, which takes ten times as
long.
"""

import re
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from sae_core.evaluation.window_means import Samples
from sae_core.models.language_model import Hook, LanguageModel
from sae_core.sae.precision import Precision
from sae_core.sae_base import SparseAutoencoder
from sae_core.train_config import BatchSize

LETTERS = "abcdefghijklmnopqrstuvwxyz"

EXAMPLE = "river"
"""The word of the example, which is not asked for."""

CONTEXT = f"\n {EXAMPLE} has the first letter: R\n"

WORD = re.compile(r"[Ġ▁]?([A-Za-z]{2,})")
"""A token of letters, as vocabularies write it: with a sign for a space before it, or without."""


def vocabulary_words(tokenizer: Any, most: int, seed: int) -> dict[str, int]:
    """Words of the vocabulary in random order, and their tokens.

    A word counts once, whatever its case and the space before it, as its first token. Each letter
    has at most `most` / 26 words, spread evenly over the vocabulary.
    """
    by_letter: dict[str, dict[str, int]] = {letter: {} for letter in LETTERS}
    names = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    for name, token in names:
        if found := WORD.fullmatch(name):
            word = found[1].lower()
            if word != EXAMPLE:
                by_letter[word[0]].setdefault(word, token)
    n = most // len(LETTERS)
    chosen = {word: words[word] for words in by_letter.values() for word in _spread(list(words), n)}
    order = np.random.default_rng(seed).permutation(len(chosen))
    listed = list(chosen.items())
    return dict(listed[i] for i in order)


def _spread(words: list[str], n: int) -> list[str]:
    """At most `n` of them, at even distances."""
    if len(words) <= n:
        return words
    return [words[i] for i in np.linspace(0, len(words) - 1, n).round().astype(int)]


@torch.no_grad()
def read_words(
    model: LanguageModel,
    sae: SparseAutoencoder,
    words: dict[str, int],
    bos: int | None,
    batch_size: BatchSize,
    precision: Precision | None = None,
) -> Samples:
    """The activation and the code at each word after the example; its class is its first letter's
    place in the alphabet.

    Args:
        words: their tokens.
        bos: the token that texts begin with, if any.
    """
    hook = Hook(sae.spec.hook_layer, sae.spec.hook_name)
    context = model.tokenizer(CONTEXT, add_special_tokens=False)["input_ids"]
    begin = [*context] if bos is None else [bos, *context]
    tokens = torch.tensor([[*begin, token] for token in words.values()])
    microbatch = model.forward_microbatch(tokens.shape[1], batch_size)

    def read(at: slice) -> tuple[Tensor, sparse.csr_array]:
        x = model.activations(tokens[at], [hook])[hook][:, -1].float()
        code = sae.encode_sparse(x, precision)
        entries = code.value.float().cpu().numpy(), (code.pairs.row.cpu(), code.pairs.column.cpu())
        shape = len(x), sae.spec.d_sae
        return x.cpu(), sparse.coo_array(entries, shape).tocsr()

    x, codes = zip(*microbatch.parts(len(tokens), read), strict=True)
    letters = np.array([LETTERS.index(word[0]) for word in words])
    return Samples(torch.cat(x).numpy(), sparse.vstack(codes, format="csc"), letters)
