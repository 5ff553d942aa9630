"""A corpus as people read it: the text of each token, and the word that it is part of."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

UNKNOWN = "\ufffd"
"""What a part of a character decodes to."""

END_SIGN = "¶"
"""Stands for the token between two texts."""

SIGNS = {" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍"}
"""Stand for white space where it would not be seen."""

WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")

LONGEST = 40
"""Characters of a word that are kept."""

PRINTED = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
"""Bytes that byte-level vocabularies write as the character of the same number (GPT-2, Radford et
al. 2019); the others follow from U+0100 on."""

BYTES = {chr(byte): byte for byte in PRINTED} | {
    chr(0x100 + n): byte for n, byte in enumerate(b for b in range(256) if b not in set(PRINTED))
}


class Pieces:
    """Tokens as text. A character made up of several tokens is assigned to the last of them; a
    part of a character without its rest is written as its bytes, `‹E282›`."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.known: dict[int, str] = {}

    def one(self, token: int) -> str:
        """The text of a token by itself."""
        piece = self._decoded(token)
        return (
            with_bytes(self.tokenizer.convert_ids_to_tokens(token)) if UNKNOWN in piece else piece
        )

    def of(self, tokens: Sequence[int]) -> list[str]:
        """The texts of consecutive tokens."""
        pieces = [self._decoded(token) for token in tokens]
        if UNKNOWN not in "".join(pieces):
            return pieces
        first = 0
        for i, piece in enumerate(pieces):
            if UNKNOWN not in piece:
                first = i + 1
                continue
            begin, whole = first, self.tokenizer.decode(list(tokens[first : i + 1]))
            if whole.endswith(UNKNOWN):  # the rest is to come
                continue
            while UNKNOWN in whole and begin < i:  # the first character begins before the tokens
                begin += 1
                whole = self.tokenizer.decode(list(tokens[begin : i + 1]))
            if UNKNOWN not in whole:
                pieces[begin : i + 1] = [""] * (i - begin) + [whole]
            first = i + 1
        return [
            self.one(token) if UNKNOWN in piece else piece
            for token, piece in zip(tokens, pieces, strict=True)
        ]

    def _decoded(self, token: int) -> str:
        if token not in self.known:
            self.known[token] = self.tokenizer.decode([token])
        return self.known[token]


def with_bytes(name: str) -> str:
    """A token of the vocabulary as text, with the bytes that are no whole character as `‹E282›`.

    Byte-level vocabularies write a byte as a character of `BYTES`, others as `<0xE2>`.
    """
    if match := re.fullmatch(r"<0x([0-9A-F]{2})>", name):
        return f"‹{match[1]}›"
    raw = b"".join(bytes([BYTES[c]]) if c in BYTES else c.encode() for c in name)
    text = raw.decode(errors="surrogateescape")
    return re.sub(
        "[\udc80-\udcff]+",
        lambda match: f"‹{match[0].encode(errors='surrogateescape').hex().upper()}›",
        text,
    )


def signs(text: str) -> str:
    """A text with its white space as signs."""
    return re.sub(r"\s", lambda match: SIGNS.get(match[0], SIGNS[" "]), text)


class Words:
    """The words of a corpus, W windows of L tokens, in lower case.

    A token that is no part of a word, such as a comma or a line break, counts as a word by itself.
    Words contain no white space, and parts of a character have its name. Takes W L (12 + 8) bytes,
    besides the distinct words.
    """

    def __init__(self, pieces: Pieces, tokens: Tensor, end_of_text: int) -> None:
        self.names: list[str] = []
        self.pieces: list[list[str]] = []
        """(W, L) the text of each token."""
        self._end = pieces.one(end_of_text)
        self._ids: dict[str, int] = {}
        rows, before = [], []
        for window in tokens.tolist():
            self.pieces.append(pieces.of(window))
            ids, starts = self._read(self.pieces[-1])
            rows.append(torch.tensor(ids, dtype=torch.int32))
            before.append(torch.tensor(starts, dtype=torch.int32))
        self.ids = torch.stack(rows).flatten()
        """(W L,) index into `names` of each token's word."""
        self.before = torch.stack(before).flatten()
        """(W L,) index of the word before that one, white space left out; -1 if there is none."""
        self.counts = torch.bincount(self.ids, minlength=len(self.names))
        """By word: its tokens."""

    def _read(self, pieces: list[str]) -> tuple[list[int], list[int]]:
        """Of one window's tokens: their words, and the words before them."""
        ids, before = [], []
        last, current, open_span = -1, -1, None
        for word, span in self._words(pieces):
            number = self._ids.setdefault(word, len(self._ids))
            if number == len(self.names):
                self.names.append(word)
            is_space = word[0] in SIGNS.values()
            if not is_space and span != open_span:
                last, current = current, number
            ids.append(number)
            before.append(current if is_space else last)
            open_span = span
        return ids, before

    def _words(self, pieces: list[str]) -> Iterator[tuple[str, tuple[int, int]]]:
        """Each token's word, and where it is in the text."""
        text = "".join(pieces)
        spans = [match.span() for match in WORD.finditer(text)]
        start = at = 0
        for piece, whole in zip(pieces, _whole(pieces), strict=True):
            first = start + len(whole) - len(whole.lstrip())
            while at < len(spans) and spans[at][1] <= first:
                at += 1
            if whole == self._end:
                yield END_SIGN, (start, start + len(whole))
            elif at < len(spans) and spans[at][0] <= first:
                yield text[slice(*spans[at])][:LONGEST].lower(), spans[at]
            else:
                shown = signs(whole.strip() or whole or "◌")[:LONGEST]
                yield shown, (start, start + len(whole))
            start += len(piece)


def _whole(pieces: list[str]) -> list[str]:
    """Each piece, or the character that it is a part of, which its last part stands for."""
    found, later = [], ""
    for piece in reversed(pieces):
        later = piece or later
        found.append(later)
    return found[::-1]
