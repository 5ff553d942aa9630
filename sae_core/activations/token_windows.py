"""Windows of tokens: packed end to end, cropped at random for training, fixed where they are held
out.

Texts are joined by the end-of-text token, so no window contains padding. The training stream is
a ring: pass p begins at a random offset and lays its windows end to end around it, so a pass
sees every token at most once, and each pass cuts the text at other places. Held-out windows are
fixed; even ones validate (early stopping, threshold), odd ones are left for the evaluation.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from sae_core.corpus.split import Split
from sae_core.corpus.token_file import TokenFile
from sae_core.corpus.tokens import Tokens, token_ids
from sae_core.train_config import DataConfig
from sae_core.utils.errors import SAEError
from sae_core.utils.seeding import generator

COUNTED = 2**20
"""Tokens that are counted at once."""


class TokenStream(Protocol):
    """Tokens by their place; a tensor (T,) is one, too."""

    def __len__(self) -> int: ...

    def __getitem__(self, positions: Tensor) -> Tensor: ...


def seen_tokens(tokens: Tensor, excluded: Sequence[int]) -> Tensor:
    """(W, L) bool: which tokens of windows (W, L) may train an SAE: no window's first, and none
    that is among `excluded`."""
    seen = torch.ones_like(tokens, dtype=torch.bool)
    if excluded:
        seen = ~torch.isin(tokens, torch.tensor(excluded, device=tokens.device))
    seen[:, 0] = False
    return seen


class TokenWindows:
    """Windows of `length` tokens from a training and a held-out stream.

    Args:
        train, held_out: streams, either of them empty if there is no such part.
        length: tokens in a window, BOS included.
        seed: of the crops.
        bos: the token that windows begin with, if any.
        excluded: tokens that train no SAE.

    Raises:
        SAEError: a part that is not empty is shorter than one window.
    """

    def __init__(
        self,
        train: TokenStream,
        held_out: TokenStream,
        length: int,
        seed: int,
        bos: int | None = None,
        excluded: Sequence[int] = (),
    ) -> None:
        self.length, self.seed, self.bos, self.excluded = length, seed, bos, excluded
        self._step = length if bos is None else length - 1
        self._train, self._held_out = train, held_out
        for part, stream in (("training", train), ("held-out", held_out)):
            if 0 < len(stream) < self._step:
                raise SAEError(
                    f"--max-text-length {length}: the {part} texts have {len(stream)} tokens, "
                    "less than one window; give more text or a shorter window"
                    + (", or raise --val-fraction" if part == "held-out" else "")
                )
        self.n_train = len(train) // self._step
        n_held_out = len(held_out) // self._step
        self.n_validation = n_held_out - n_held_out // 2
        self.n_evaluation = n_held_out // 2

    @property
    def positions(self) -> int:
        """Positions of a window that the SAE sees: all but the first."""
        return self.length - 1

    @cached_property
    def n_excluded(self) -> int:
        """How many tokens of the training stream are among the excluded ones."""
        excluded, total = torch.tensor(self.excluded), len(self._train)
        parts = (
            torch.arange(first, min(first + COUNTED, total)) for first in range(0, total, COUNTED)
        )
        return sum(int(torch.isin(self._train[part], excluded).sum()) for part in parts)

    def train(self, pass_index: int, indices: Tensor) -> Tensor:
        """(W, length) the random crops `indices` (W,) of a pass: a pure function of the seed,
        the pass and the index."""
        total = len(self._train)
        draw = generator(self.seed, "crop", pass_index)
        offset = int(torch.randint(total, (), generator=draw))
        start = offset + indices * self._step
        at = (start[:, None] + torch.arange(self._step)) % total
        return self._with_bos(self._train[at])

    def validation(self, indices: Tensor | None = None) -> Tensor:
        """(W, length) the fixed validation windows, or the ones that `indices` names."""
        return self._fixed(0, self.n_validation, indices)

    def evaluation(self, most: int | None = None) -> Tensor:
        """(n_evaluation, length) the fixed windows that only the evaluation sees, or the first
        `most` of them."""
        n = self.n_evaluation if most is None else min(most, self.n_evaluation)
        return self._fixed(1, n, None)

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


def corpus_windows(file: TokenFile, length: int, most: int) -> CorpusWindows:
    """The windows of a whole corpus, or `most` of them, evenly spaced.

    Raises:
        SAEError: it is shorter than one window.
    """
    step = length if file.bos is None else length - 1
    n_windows = len(file.tokens) // step
    if n_windows == 0:
        raise SAEError(
            f"--max-text-length {length}: the texts have {len(file.tokens)} tokens, less than one "
            "window; give more text or a shorter window"
        )
    chosen = np.arange(n_windows)
    if n_windows > most:
        chosen = np.arange(most) * n_windows // most
    at = chosen[:, None] * step + np.arange(step)
    windows = torch.from_numpy(file.tokens[at].astype(np.int64))
    text = torch.from_numpy(file.text_of(at).astype(np.int32))
    if file.bos is not None:
        windows = torch.cat([windows.new_full((len(windows), 1), file.bos), windows], dim=1)
        text = torch.cat([text[:, :1], text], dim=1)
    return CorpusWindows(windows, text)


def corpus_notes(file: TokenFile, data: DataConfig) -> list[str]:
    """Notes on the texts for a log, one line each: what is left out, what is read as ordinary text,
    and how much of the held-out part also occurs in the training part."""
    notes = []
    if (manifest := file.manifest) and manifest.n_empty:
        n_texts = manifest.n_texts + manifest.n_empty
        notes.append(f"empty texts: {manifest.n_empty} of {n_texts}, left out")
    if manifest and manifest.n_spelled:
        notes.append(f"texts that contain a control token: {manifest.n_spelled}, such as "
                     f"{manifest.spelled}; it is read as text")  # fmt: skip
    if data.val_fraction:
        share = 100 * Split(file, data.val_fraction, data.seed).repeated()
        notes.append(f"held-out text that also occurs in training texts: {share:.1f}%")
    return notes


def token_windows(file: TokenFile, tokenizer: Any, data: DataConfig) -> TokenWindows:
    """The windows of both sides of a token file, as the settings say."""
    split, tokens = Split(file, data.val_fraction, data.seed), Tokens(tokenizer)
    train, held_out = (split.stream(tokens, side) for side in (False, True))
    excluded = token_ids(tokenizer, data.excluded_tokens)
    return TokenWindows(train, held_out, data.max_text_length, data.seed, file.bos, excluded)


def read_windows(tokenizer: Any, texts: Sequence[str], data: DataConfig) -> TokenWindows:
    """The windows of texts in memory, none of them blank."""
    return token_windows(TokenFile.of(Tokens(tokenizer), texts), tokenizer, data)
