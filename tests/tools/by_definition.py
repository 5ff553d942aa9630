"""What the windows are made of, in the plainest way: lists of texts, and one text at a time."""

from typing import Any

import torch
from torch import Tensor

from sae_core.corpus.repetition import _is_overlapping, overlap
from sae_core.corpus.token_file import TokenFile
from sae_core.corpus.tokens import Tokens
from sae_core.utils.seeding import generator


def split_texts(texts: list[str], val_fraction: float, seed: int) -> tuple[list[str], list[str]]:
    """Training and held-out texts, each in the order of `texts`; what a text repeats of the one
    before it is on one side only."""
    order = torch.randperm(len(texts), generator=generator(seed, "split")).tolist()
    held_out = set(order[: round(len(texts) * val_fraction)])
    overlapping = _is_overlapping(texts)
    sides: tuple[list[str], list[str]] = ([], [])
    own = 0  # characters at the end of the text before that no text of the other side has
    for index, text in enumerate(texts):
        before = texts[index - 1] if index else ""
        same = (index in held_out) == (index - 1 in held_out)
        cut = 0
        if overlapping and not (same and own == len(before)):
            shared = overlap(before, text)
            cut = shared - min(shared, own) if same else shared
        own = len(text) - cut
        if text := text[cut:].lstrip() if cut else text:
            sides[index in held_out].append(text)
    return sides


def stream(tokenizer: Any, texts: list[str]) -> Tensor:
    """(T,) the tokens of the texts, each followed by the end-of-text token."""
    end = Tokens(tokenizer).end_of_text
    settings = {"add_special_tokens": False, "split_special_tokens": True}
    return torch.tensor([i for t in texts for i in [*tokenizer(t, **settings)["input_ids"], end]])


def in_memory(tokenizer: Any, texts: list[str]) -> TokenFile:
    """Texts as a token file."""
    return TokenFile.of(Tokens(tokenizer), texts)
