"""Tokenised texts: a folder of files that are read memory-mapped, and the manifest that says what
they are.

`tokens.bin` has the tokens of all texts, in their order, each text followed by the end-of-text
token; `token_starts.bin` says where each text begins in it. `texts.bin` has the texts themselves
as UTF-8, `text_starts.bin` where each begins, and `origins.bin` the number of each text's chapter,
if the chapters are known. Numbers are little-endian. Texts that are blank are left out.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np

from sae_core.corpus.token_manifest import MANIFEST, TokenManifest
from sae_core.corpus.tokens import IntArray, Tokens
from sae_core.data_processing.sources import Sources
from sae_core.models.tokenizers import tokenizer_sha256
from sae_core.utils.errors import SAEError
from sae_core.utils.files import file_sha256

TOKENS, TOKEN_STARTS = "tokens.bin", "token_starts.bin"
TEXTS, TEXT_STARTS = "texts.bin", "text_starts.bin"
ORIGINS = "origins.bin"

TYPES = {TOKENS: "<i4", TOKEN_STARTS: "<i8", TEXTS: "u1", TEXT_STARTS: "<i8", ORIGINS: "<u4"}
"""Of the numbers in each file."""

CHECKED = (TOKENS, TOKEN_STARTS, ORIGINS)
"""The files that are read through when they are opened: a training depends on every byte."""


class Texts(Sequence[str]):
    """The texts of a token file, each read when it is asked for."""

    def __init__(self, characters: IntArray, starts: IntArray) -> None:
        self._characters, self._starts = characters, starts

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        at = index % len(self)
        return self._characters[self._starts[at] : self._starts[at + 1]].tobytes().decode()


@dataclass(frozen=True)
class TokenFile:
    """Tokenised texts, in memory or mapped from a folder."""

    bos: int | None
    """The token that windows begin with, if any."""
    end_of_text: int
    tokens: IntArray
    """(T,) of all texts."""
    starts: IntArray
    """(texts + 1,) where each text begins, and where the last one ends."""
    texts: Sequence[str]
    origins: IntArray | None = None
    """(texts,) the number of each text's chapter, if it is known."""
    manifest: TokenManifest | None = None
    """Of texts in a folder."""

    @classmethod
    def of(cls, tokens: Tokens, texts: Sequence[str]) -> "TokenFile":
        """Some texts, none of them blank, tokenised in memory."""
        ids, lengths = tokens.packed(texts)
        starts = np.concatenate([[0], lengths.cumsum()])
        return cls(tokens.bos, tokens.end_of_text, ids, starts, texts)

    @classmethod
    def open(cls, folder: Path) -> "TokenFile":
        """Map the files of a folder.

        Raises:
            SAEError: a file is missing, cut off or changed.
        """
        manifest = TokenManifest.load(folder)
        for name in CHECKED:
            if name in manifest.files:
                _check(folder / name, manifest.files[name])
        found = {name: _mapped(folder / name) for name in manifest.files}
        texts = Texts(found[TEXTS], found[TEXT_STARTS])
        if len(texts) != manifest.n_texts or len(found[TOKENS]) != manifest.n_tokens:
            raise _damaged(folder / MANIFEST)
        return cls(
            manifest.bos,
            manifest.end_of_text,
            found[TOKENS],
            found[TOKEN_STARTS],
            texts,
            found.get(ORIGINS),
            manifest,
        )

    @cached_property
    def sources(self) -> Sources | None:
        """The chapters that the texts are from, if they are known."""
        return self.manifest.sources if self.manifest else None

    def text_of(self, positions: IntArray) -> IntArray:
        """The number of the text that each position in `tokens` belongs to; any shape."""
        return np.searchsorted(self.starts, positions, side="right") - 1


def check_tokenizer(folder: Path, file: TokenFile, tokenizer: Any) -> None:
    """Check that the texts in a folder are in a tokenizer's tokens.

    Raises:
        SAEError: they are in another one's.
    """
    if file.manifest and file.manifest.tokenizer_sha256 != tokenizer_sha256(tokenizer):
        raise SAEError(
            f"--tokens {folder}: made with another tokenizer than the model's; tokenise the texts "
            "with this one"
        )


def content_sha256(hashes: dict[str, str]) -> str:
    """What identifies texts whatever form they had: a hash of their hash as UTF-8, one after the
    other, and of the hash of where each begins in that."""
    return sha256_of(f"{hashes[TEXTS]} {hashes[TEXT_STARTS]}")


def sha256_of(text: str) -> str:
    """The SHA-256 of a text as UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def _mapped(path: Path) -> IntArray:
    kind = np.dtype(TYPES[path.name])
    try:
        if path.stat().st_size == 0:  # which cannot be mapped
            return np.empty(0, kind)
        return np.memmap(path, kind, "r")
    except (OSError, ValueError) as error:
        raise _damaged(path) from error


def _check(path: Path, sha256: str) -> None:
    try:
        found = file_sha256(path)
    except OSError as error:
        raise _damaged(path) from error
    if found != sha256:
        raise _damaged(path)


def _damaged(path: Path) -> SAEError:
    return SAEError(
        f"{path}: missing, or not as it was written; delete its folder to make it again"
    )
