"""Which texts train and which are held out, and the two streams of tokens that they give.

The split is drawn among the texts. What a text repeats of the end of the one before it, as chunks
do, is on one side only. Neither side is copied: a stream knows where its stretches of the token
file are.
"""

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sae_core.corpus.repetition import cuts, repeated_share
from sae_core.corpus.token_file import TokenFile, content_sha256, sha256_of
from sae_core.corpus.token_manifest import TokenManifest
from sae_core.corpus.tokens import IntArray, Tokens
from sae_core.models.model_sources import cache_folder
from sae_core.utils.code_hash import code_hash
from sae_core.utils.errors import SAEError
from sae_core.utils.files import write_file
from sae_core.utils.seeding import generator

KEPT_FROM = 20_000_000
"""Tokens of texts from which on the share of repeated ones is kept: it takes two seconds."""


def held_out_texts(n_texts: int, val_fraction: float, seed: int) -> Tensor:
    """(n_texts,) bool: the texts that are held out.

    Raises:
        SAEError: a held-out part is asked for, but there are too few texts for both parts.
    """
    n_held_out = round(n_texts * val_fraction)
    if val_fraction > 0 and (n_held_out == 0 or n_held_out == n_texts):
        raise SAEError(
            f"--val-fraction {val_fraction}: {n_texts} texts are too few to hold some out and "
            "train on the rest; give more texts, another fraction, or 0 for no validation"
        )
    held_out = torch.zeros(n_texts, dtype=torch.bool)
    held_out[torch.randperm(n_texts, generator=generator(seed, "split"))[:n_held_out]] = True
    return held_out


class Stream:
    """Stretches of tokens laid end to end.

    Args:
        parts: arrays of tokens, which count as one after the other.
        first, last: (stretches,) where each stretch begins and ends in them.
    """

    def __init__(self, parts: list[IntArray], first: IntArray, last: IntArray) -> None:
        kept = last > first
        first, last = first[kept], last[kept]
        apart = first[1:] != last[:-1]
        first = first[np.append(True, apart)[: len(first)]]
        last = last[np.append(apart, True)[: len(last)]]
        self._ends = (last - first).cumsum()
        self._shift = last - self._ends  # from a place in the stream to one in the parts
        self._parts = [np.asarray(part) for part in parts]

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, positions: Tensor) -> Tensor:
        """The tokens at `positions`, any shape."""
        at = positions.numpy()
        at = at + self._shift[np.searchsorted(self._ends, at, side="right")]
        found = np.empty(at.shape, np.int64)
        begin = 0
        for part in self._parts:
            here = (at >= begin) & (at < begin + len(part))
            found[here] = part[at[here] - begin]
            begin += len(part)
        return torch.from_numpy(found)


class Split:
    """The two sides of a token file.

    Raises:
        SAEError: it has too few texts for both.
    """

    def __init__(self, file: TokenFile, val_fraction: float, seed: int) -> None:
        self.file = file
        self._drawn = val_fraction, seed
        self._held_out = held_out_texts(len(file.texts), val_fraction, seed)
        self._left = dict(cuts(file.texts, self._held_out))
        """What is left of the texts that repeat something of the other side."""

    def texts(self, held_out: bool) -> "SideTexts":
        """The texts of a side, in their order."""
        return SideTexts(self.file, self._numbers(held_out), self._left)

    def stream(self, tokens: Tokens, held_out: bool) -> Stream:
        """The tokens of a side. Texts that have lost something are tokenised once more."""
        numbers = self._numbers(held_out)
        first, last = self.file.starts[numbers], self.file.starts[numbers + 1]
        changed = np.flatnonzero(np.isin(numbers, list(self._left)))
        texts = [self._left[number] for number in numbers[changed].tolist()]
        first[changed] = last[changed] = 0
        changed = changed[np.array(list(map(bool, texts)), dtype=bool)]
        ids, lengths = tokens.packed(list(filter(None, texts)))
        ends = len(self.file.tokens) + lengths.cumsum()
        first[changed], last[changed] = ends - lengths, ends
        return Stream([self.file.tokens, ids], first, last)

    def repeated(self) -> float:
        """The share of the held-out text that the training texts have too.

        Every evaluation and every start of a training ask for it. For a large corpus, which is read
        twice, the answer is kept in the cache."""
        manifest = self.file.manifest
        if manifest is None or manifest.n_tokens < KEPT_FROM:
            return self._repeated()
        path = self._place(manifest)
        try:
            return float(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):  # not there yet, or damaged
            share = self._repeated()
        with suppress(SAEError):  # a cache that cannot be written costs time, nothing else
            write_file(path, json.dumps(share))
        return share

    def _repeated(self) -> float:
        return repeated_share(self.texts(False), self.texts(True))

    def _place(self, manifest: TokenManifest) -> Path:
        """Where the share of repeated texts is kept."""
        texts, code = content_sha256(manifest.files), code_hash("sae_core/corpus/split.py")
        key = sha256_of(f"{texts} {self._drawn} {code}")
        return cache_folder() / "repeated" / f"{key[:24]}.json"

    def _numbers(self, held_out: bool) -> IntArray:
        return np.flatnonzero(self._held_out.numpy() == held_out)


class SideTexts:
    """The texts of one side of a split, read as often as they are asked for."""

    def __init__(self, file: TokenFile, numbers: IntArray, left: dict[int, str]) -> None:
        self._file, self._numbers, self._left = file, numbers, left

    def __iter__(self) -> Iterator[str]:
        for number in map(int, self._numbers):
            text = self._left.get(number)
            if text is None:
                yield self._file.texts[number]
            elif text:
                yield text
