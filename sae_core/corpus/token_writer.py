"""Tokenised texts on their way to the disk: they are appended to files, and from time to time what
has been written is made to stay, so that a later process can append to it."""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from sae_core.corpus.token_file import (
    ORIGINS,
    TEXT_STARTS,
    TEXTS,
    TOKEN_STARTS,
    TOKENS,
    TYPES,
)
from sae_core.corpus.token_manifest import MANIFEST
from sae_core.corpus.tokens import IntArray, is_blank
from sae_core.data_processing.sources import Chapter
from sae_core.utils.files import write_file

STATE = "state.json"
"""How far the files are, while they are written."""


class Text(NamedTuple):
    """A text of a corpus."""

    text: str
    origin: int = 0
    """The number of its chapter."""
    n_blank: int = 0
    """How many blank texts come just before it."""


class Label(NamedTuple):
    """What a text is from."""

    subject: str
    file: str


class Batch(NamedTuple):
    """Some texts, and what they become."""

    texts: list[Text]
    ids: IntArray
    """(T,) int32"""
    lengths: IntArray
    """(texts,) tokens of each, with the end-of-text token."""
    spelled: list[str | None]
    """The first control token that each text spells out."""


@dataclass
class Written:
    """What is known of the texts that have been written."""

    n_texts: int = 0
    n_tokens: int = 0
    n_characters: int = 0
    """Bytes of UTF-8."""
    n_empty: int = 0
    """Texts that are blank, between them."""
    n_spelled: int = 0
    """Texts that spell out a control token."""
    spelled: str | None = None
    """The first of these control tokens."""
    texts_of: list[int] = field(default_factory=list)
    """Of each origin."""
    words_of: list[int] = field(default_factory=list)

    def add_origins(self, texts: list[Text]) -> None:
        """Count texts for their origins."""
        more = max(text.origin for text in texts) + 1 - len(self.texts_of)
        self.texts_of += [0] * more
        self.words_of += [0] * more
        for text in texts:
            self.texts_of[text.origin] += 1
            self.words_of[text.origin] += len(text.text.split())


class Writer:
    """Appends batches to the files of a folder. What it counts is about the texts that it has
    written, however far ahead they were read.

    Args:
        made_of: what identifies the texts and the way in which they become tokens. If the folder
            has the beginning of the same, the writer continues after it; anything else is deleted.
    """

    def __init__(self, folder: Path, labels: list[Label] | None, made_of: str) -> None:
        self.folder, self.made_of, self._labels = folder, made_of, labels
        self.names = sorted(TYPES.keys() - ({ORIGINS} if labels is None else set()))
        self.written = Written()
        self._is_whole, self._n_last_blank = False, 0
        self._files: dict[str, BinaryIO] = {}

    def __enter__(self) -> "Writer":
        begun = self._begun()
        for path in [] if begun else self.folder.iterdir():
            path.unlink()
        for name in self.names:
            self._files[name] = (self.folder / name).open("ab")
        if begun:
            self.written, sizes = begun
            for name, size in sizes.items():
                self._files[name].truncate(size)
        else:
            self._write(TOKEN_STARTS, [0])
            self._write(TEXT_STARTS, [0])
        return self

    def __exit__(self, *failure: object) -> None:
        for file in self._files.values():
            if failure[0] is None:
                file.flush()
                os.fsync(file.fileno())
            file.close()

    @property
    def n_read(self) -> int:
        """Texts up to the last that has been written, blank ones included."""
        return self.written.n_texts + self.written.n_empty

    @property
    def n_bytes(self) -> int:
        """Written so far, about."""
        written = self.written
        return written.n_characters + 4 * written.n_tokens + 18 * written.n_texts

    def not_blank(self, texts: Iterable[Text]) -> Iterator[Text]:
        """The texts that are not blank, each with the number of the others before it."""
        n_blank = 0
        for text in texts:
            if is_blank(text.text):
                n_blank += 1
            else:
                yield text._replace(n_blank=n_blank) if n_blank else text
                n_blank = 0
        self._n_last_blank = n_blank

    def end(self) -> None:
        """Note that all texts were added."""
        self._is_whole = True
        self.written.n_empty += self._n_last_blank

    def add(self, batch: Batch, most: int | None) -> None:
        """Append a batch, up to the text with which there are `most` tokens."""
        written = self.written
        ends = written.n_tokens + batch.lengths.cumsum()
        n = len(ends) if most is None else min(len(ends), int(np.searchsorted(ends, most)) + 1)
        texts = batch.texts[:n]
        encoded = [text.text.encode() for text in texts]
        self._files[TEXTS].write(b"".join(encoded))
        text_ends = written.n_characters + np.array(list(map(len, encoded))).cumsum()
        self._write(TEXT_STARTS, text_ends)
        self._write(TOKENS, batch.ids[: ends[n - 1] - written.n_tokens])
        self._write(TOKEN_STARTS, ends[:n])
        if self._labels is not None:
            self._write(ORIGINS, [text.origin for text in texts])
            written.add_origins(texts)
        written.n_texts += n
        written.n_empty += sum(text.n_blank for text in texts)
        written.n_tokens, written.n_characters = int(ends[n - 1]), int(text_ends[-1])
        spelled = list(filter(None, batch.spelled[:n]))
        written.n_spelled += len(spelled)
        written.spelled = written.spelled or next(iter(spelled), None)

    def store(self) -> None:
        """Make what has been written stay, for a writer after this one."""
        sizes = {}
        for name, file in self._files.items():
            file.flush()
            os.fsync(file.fileno())
            sizes[name] = os.fstat(file.fileno()).st_size
        state = {"made_of": self.made_of, "sizes": sizes, "written": asdict(self.written)}
        write_file(self.folder / STATE, json.dumps(state))

    def forget(self) -> None:
        """Delete what only a writer after this one would need."""
        for path in self.folder.iterdir():
            if path.name not in (*self.names, MANIFEST):
                path.unlink()

    def chapters(self) -> list[dict[str, Any]] | None:
        """The chapters of the texts, as the manifest has them: all, or up to the last that was
        read before the ceiling on tokens."""
        if self._labels is None:
            return None
        counts = [*zip(self.written.texts_of, self.written.words_of, strict=True)]
        labels = self._labels if self._is_whole else self._labels[: len(counts)]
        counts += [(0, 0)] * (len(labels) - len(counts))
        return [asdict(Chapter(*label, *own)) for label, own in zip(labels, counts, strict=True)]

    def _begun(self) -> tuple[Written, dict[str, int]] | None:
        """What a writer before this one has stored, and the sizes of its files, if it was writing
        the same."""
        try:
            state = json.loads((self.folder / STATE).read_text(encoding="utf-8"))
            sizes = {name: state["sizes"][name] for name in self.names}
            is_there = all((self.folder / n).stat().st_size >= size for n, size in sizes.items())
            if is_there and state["made_of"] == self.made_of:
                return Written(**state["written"]), sizes
        except (OSError, ValueError, KeyError, TypeError):  # there is none, or it is no state
            pass
        return None

    def _write(self, name: str, numbers: Any) -> None:
        self._files[name].write(np.asarray(numbers, TYPES[name]).tobytes())
