"""How a tokenizer turns texts into a stream of tokens."""

import re
from collections.abc import Sequence
from itertools import chain, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from sae_core.utils.errors import SAEError

IntArray = npt.NDArray[np.integer[Any]]


def is_blank(text: str) -> bool:
    """Whether a text has nothing to tokenise; such texts are left out."""
    return not text.strip()


SHOWN = 20
"""Special tokens that a message names, at most."""


def token_ids(tokenizer: Any, tokens: Sequence[str]) -> tuple[int, ...]:
    """The ids of tokens that are written as in the vocabulary (`--excluded-tokens`).

    Raises:
        SAEError: the vocabulary lacks one.
    """
    if not tokens:
        return ()
    vocabulary = tokenizer.get_vocab()
    for token in tokens:
        if token not in vocabulary:
            added = (str(t) for t in tokenizer.added_tokens_decoder.values() if t.special)
            special = [*dict.fromkeys((*tokenizer.all_special_tokens, *added))]
            more = f" and {len(special) - SHOWN} more" if len(special) > SHOWN else ""
            raise SAEError(
                f"--excluded-tokens {token}: the tokenizer has no such token; its special tokens "
                f"are {', '.join(special[:SHOWN])}{more}, and others are written as in its "
                "vocabulary"
            )
    return tuple(vocabulary[token] for token in tokens)


def is_plain(tokenizer: Any) -> bool:
    """Whether a tokenizer is one of the `tokenizers` library and does nothing besides, so that the
    library may be called in its place: it is a fifth faster where nobody wants to know which
    characters a token has."""
    from transformers import PreTrainedTokenizerFast

    return tokenizer.is_fast and all(
        getattr(type(tokenizer), name, None) is getattr(PreTrainedTokenizerFast, name, None)
        for name in ("__call__", "_encode_plus")
    )


class Tokens:
    """How a tokenizer's texts are packed: what separates them, and whether windows begin with
    BOS (which Gemma needs, and Qwen3 and SmolLM2 do not have).

    A control token that is spelled out in a text, such as `<|endoftext|>` in a chapter on
    tokenizers, is read as ordinary text: it neither ends the text nor begins one.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        first = tokenizer("a")["input_ids"][0]
        self.bos: int | None = first if first == tokenizer.bos_token_id else None
        end = tokenizer.get_vocab().get("<|endoftext|>", tokenizer.eos_token_id)
        if end is None:
            raise SAEError(
                f"{tokenizer.name_or_path}: the tokenizer has no end-of-text token to join texts "
                "with; set its eos_token"
            )
        self.end_of_text: int = end
        added = tokenizer.added_tokens_decoder
        control = {*tokenizer.all_special_ids, *(i for i, t in added.items() if t.special), end}
        # The token for what the vocabulary lacks is no control token, unless it is one as well.
        control -= {tokenizer.unk_token_id} - {end, self.bos}
        self._control: set[int] = control
        words = filter(None, tokenizer.convert_ids_to_tokens(sorted(control)))
        self._spelled = re.compile("|".join(map(re.escape, words)))
        self._is_plain = is_plain(tokenizer)

    def spelled(self, text: str) -> str | None:
        """The first control token that is spelled out in a text."""
        found = self._spelled.search(text)
        return found[0] if found else None

    def packed(self, texts: Sequence[str]) -> tuple[IntArray, IntArray]:
        """(T,) int32 token ids of texts that are not blank, each followed by the end-of-text token,
        and (texts,) the number of tokens of each with it."""
        encoded = self._encode(list(texts))
        ids = chain.from_iterable(chain(text, (self.end_of_text,)) for text in encoded)
        lengths = np.fromiter((len(text) + 1 for text in encoded), np.int64, len(encoded))
        return np.fromiter(ids, np.int32, int(lengths.sum())), lengths

    def _encode(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        encoded = self._encode_batch(texts)
        for at, ids in enumerate(encoded):
            if not self._control.isdisjoint(ids):  # the vocabulary of words has them, too
                encoded[at] = [*chain(*self._encode_batch(self._cut(texts[at])))]
        return encoded

    def _encode_batch(self, texts: list[str]) -> list[list[int]]:
        if not self._is_plain:
            settings = {"add_special_tokens": False, "split_special_tokens": True}
            return self.tokenizer(texts, **settings)["input_ids"]
        backend = self.tokenizer.backend_tokenizer
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        return [text.ids for text in backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _cut(self, text: str) -> list[str]:
        """The text in pieces, cut after the first character of each control token it contains."""
        ends = [found.start() + 1 for found in self._spelled.finditer(text)]
        return [text[a:b] for a, b in pairwise([0, *ends, len(text)])]
