"""Texts become windows of tokens: split, packed end to end, cropped at random for training.

Texts are joined by the end-of-text token, so no window contains padding. The training stream is
a ring: pass p begins at a random offset and lays its windows end to end around it, so a pass
sees every token at most once, and each pass cuts the text at other places. Held-out windows are
fixed; even ones validate (early stopping, threshold), odd ones are left for the evaluation.
"""

import re
from collections.abc import Sequence
from itertools import chain, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae_core.activations.repetition import apart, repeated_share
from sae_core.train_config import DataConfig
from sae_core.utils.errors import SAEError
from sae_core.utils.seeding import generator

TEXTS_AT_ONCE = 1024
"""Texts that are tokenised together."""


def split_texts(texts: list[str], val_fraction: float, seed: int) -> tuple[list[str], list[str]]:
    """Training and held-out texts, each in the order of `texts`; empty ones are left out.

    What a text repeats of the end of the one before it, as chunks do, is on one side only.

    Raises:
        SAEError: a held-out part is asked for, but there are too few texts for both parts.
    """
    texts = [text for text in texts if not is_blank(text)]
    n_held_out = round(len(texts) * val_fraction)
    if val_fraction > 0 and (n_held_out == 0 or n_held_out == len(texts)):
        raise SAEError(
            f"--val-fraction {val_fraction}: {len(texts)} texts are too few to hold some out and "
            "train on the rest; give more texts, another fraction, or 0 for no validation"
        )
    order = torch.randperm(len(texts), generator=generator(seed, "split")).tolist()
    return apart(texts, set(order[:n_held_out]))


def is_blank(text: str) -> bool:
    """Whether a text has nothing to tokenise; such texts are left out."""
    return not text.strip()


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

    def spelled(self, text: str) -> str | None:
        """The first control token that is spelled out in a text."""
        found = self._spelled.search(text)
        return found[0] if found else None

    def stream(self, texts: list[str], enough: int | None = None) -> Tensor:
        """(T,) int32 token ids of the texts, each followed by the end-of-text token; empty texts
        have none. Texts after the first `enough` tokens are left out, a batch at a time."""
        parts, n_tokens = [torch.empty(0, dtype=torch.int32)], 0
        for first in range(0, len(texts), TEXTS_AT_ONCE):
            if enough is not None and n_tokens >= enough:
                break
            parts.append(self.labelled(texts[first : first + TEXTS_AT_ONCE])[0])
            n_tokens += len(parts[-1])
        return torch.cat(parts)

    def labelled(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """`stream`, and (T,) int32 the index of the text that each token belongs to."""
        parts = [torch.empty(0, dtype=torch.int32)]
        lengths: list[int] = []
        for first in range(0, len(texts), TEXTS_AT_ONCE):
            batch = texts[first : first + TEXTS_AT_ONCE]
            ended = [
                [] if is_blank(text) else [*ids, self.end_of_text]
                for text, ids in zip(batch, self._encode(batch), strict=True)
            ]
            parts.append(torch.tensor([i for ids in ended for i in ids], dtype=torch.int32))
            lengths += map(len, ended)
        text = torch.arange(len(texts), dtype=torch.int32)
        return torch.cat(parts), text.repeat_interleave(torch.tensor(lengths, dtype=torch.long))

    def _encode(self, texts: list[str]) -> list[list[int]]:
        settings = {"add_special_tokens": False, "split_special_tokens": True}
        encoded = self.tokenizer(texts, **settings)["input_ids"]
        for at, ids in enumerate(encoded):
            if not self._control.isdisjoint(ids):  # the vocabulary of words has them, too
                pieces = self._cut(texts[at])
                encoded[at] = [*chain(*self.tokenizer(pieces, **settings)["input_ids"])]
        return encoded

    def _cut(self, text: str) -> list[str]:
        """The text in pieces, cut after the first character of each control token it contains."""
        ends = [found.start() + 1 for found in self._spelled.finditer(text)]
        return [text[a:b] for a, b in pairwise([0, *ends, len(text)])]


class TokenWindows:
    """Windows of `length` tokens from a training and a held-out stream.

    Args:
        tokens: the tokenizer's way of packing.
        train, held_out: texts.
        length: tokens in a window, BOS included.
        seed: of the crops.
        enough: held-out windows that are needed; texts after them need not be read.

    Raises:
        SAEError: a part that is not empty is shorter than one window.
    """

    def __init__(
        self,
        tokens: Tokens,
        train: list[str],
        held_out: list[str],
        length: int,
        seed: int,
        enough: int | None = None,
    ) -> None:
        self.length, self.seed, self.bos = length, seed, tokens.bos
        self._step = length if tokens.bos is None else length - 1
        self._train = tokens.stream(train)
        self._held_out = tokens.stream(held_out, enough and enough * self._step)
        for part, stream, texts in (
            ("training", self._train, train),
            ("held-out", self._held_out, held_out),
        ):
            if texts and stream.numel() < self._step:
                raise SAEError(
                    f"--max-text-length {length}: the {part} texts have {stream.numel()} tokens, "
                    "less than one window; give more text or a shorter window"
                    + (", or raise --val-fraction" if part == "held-out" else "")
                )
        self.n_train = self._train.numel() // self._step
        n_held_out = self._held_out.numel() // self._step
        self.n_validation = n_held_out - n_held_out // 2
        self.n_evaluation = n_held_out // 2

    @property
    def positions(self) -> int:
        """Positions of a window that the SAE sees: all but the first."""
        return self.length - 1

    def train(self, pass_index: int, indices: Tensor) -> Tensor:
        """(W, length) the random crops `indices` (W,) of a pass: a pure function of the seed,
        the pass and the index."""
        total = self._train.numel()
        draw = generator(self.seed, "crop", pass_index)
        offset = int(torch.randint(total, (), generator=draw))
        start = offset + indices * self._step
        at = (start[:, None] + torch.arange(self._step)) % total
        return self._with_bos(self._train[at])

    def validation(self, indices: Tensor | None = None) -> Tensor:
        """(W, length) the fixed validation windows, or the ones that `indices` names."""
        return self._fixed(0, self.n_validation, indices)

    def evaluation(self) -> Tensor:
        """(n_evaluation, length) the fixed windows that only the evaluation sees."""
        return self._fixed(1, self.n_evaluation, None)

    def _fixed(self, first: int, n: int, indices: Tensor | None) -> Tensor:
        """Every other held-out window, from the one numbered `first` on."""
        indices = torch.arange(n) if indices is None else indices
        start = (2 * indices + first) * self._step
        return self._with_bos(self._held_out[start[:, None] + torch.arange(self._step)])

    def _with_bos(self, windows: Tensor) -> Tensor:
        windows = windows.long()
        if self.bos is None:
            return windows
        return torch.cat([windows.new_full((len(windows), 1), self.bos), windows], dim=1)


class CorpusWindows(NamedTuple):
    """All texts in their order, cut into fixed windows; the last tokens, too few for one, are left
    out."""

    tokens: Tensor
    """(W, length)"""
    text: Tensor
    """(W, length) int32: which text each token is of."""


def corpus_windows(tokens: Tokens, texts: list[str], length: int, most: int) -> CorpusWindows:
    """The windows of a whole corpus, or `most` of them, evenly spaced.

    Raises:
        SAEError: it is shorter than one window.
    """
    step = length if tokens.bos is None else length - 1
    ids, text = tokens.labelled(texts)
    n_windows = len(ids) // step
    if n_windows == 0:
        raise SAEError(
            f"--max-text-length {length}: the texts have {len(ids)} tokens, less than one window; "
            "give more text or a shorter window"
        )
    chosen = torch.arange(n_windows)
    if n_windows > most:
        chosen = torch.arange(most) * n_windows // most
    at = chosen[:, None] * step + torch.arange(step)
    windows, text = ids[at].long(), text[at]
    if tokens.bos is not None:
        windows = torch.cat([windows.new_full((len(windows), 1), tokens.bos), windows], dim=1)
        text = torch.cat([text[:, :1], text], dim=1)
    return CorpusWindows(windows, text)


def text_notes(tokenizer: Any, texts: Sequence[str], data: DataConfig) -> list[str]:
    """Notes on the texts for a log, one line each: what is left out, what is read as ordinary text,
    and how much of the held-out part also occurs in the training part."""
    notes, tokens = [], Tokens(tokenizer)
    if n_blank := sum(map(is_blank, texts)):
        notes.append(f"empty texts: {n_blank} of {len(texts)}, left out")
    if spelled := [word for word in map(tokens.spelled, texts) if word]:
        notes.append(f"texts that contain a control token: {len(spelled)}, such as {spelled[0]}; "
                     "it is read as text")  # fmt: skip
    train, held_out = split_texts(list(texts), data.val_fraction, data.seed)
    if held_out:
        share = 100 * repeated_share(train, held_out)
        notes.append(f"held-out text that also occurs in training texts: {share:.1f}%")
    return notes


def read_windows(tokenizer: Any, texts: Sequence[str], data: DataConfig) -> TokenWindows:
    """Split texts and pack both parts into windows, as the settings say."""
    train, held_out = split_texts(list(texts), data.val_fraction, data.seed)
    return TokenWindows(Tokens(tokenizer), train, held_out, data.max_text_length, data.seed)


def evaluation_windows(tokenizer: Any, texts: Sequence[str], data: DataConfig, most: int) -> Tensor:
    """(at most `most`, length) the first of `read_windows(...).evaluation()`; only the held-out
    texts that they are made of are tokenised."""
    _, held_out = split_texts(list(texts), data.val_fraction, data.seed)
    tokens, length = Tokens(tokenizer), data.max_text_length
    windows = TokenWindows(tokens, [], held_out, length, data.seed, enough=2 * most)
    return windows.evaluation()[:most]
