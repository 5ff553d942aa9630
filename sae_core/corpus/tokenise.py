"""Texts of any number become a folder of tokens: read once, in bounded memory, by several
processes.

The texts stay in their order, and each is tokenised as a whole, so the number of processes and what
is tokenised together change nothing.
"""

import hashlib
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from itertools import chain, islice
from multiprocessing import get_context
from pathlib import Path
from threading import Thread
from types import MappingProxyType
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from sae_core.corpus.token_file import (
    ORIGINS,
    TEXT_STARTS,
    TEXTS,
    TOKEN_STARTS,
    TOKENS,
    TYPES,
    TokenManifest,
)
from sae_core.corpus.tokens import IntArray, Tokens, is_blank
from sae_core.data_processing.sources import Chapter, Dropped
from sae_core.models.tokenizers import tokenizer_sha256
from sae_core.utils.errors import PassingError, SAEError
from sae_core.utils.files import file_sha256, new_folder, writing

BATCH_TEXTS, BATCH_CHARACTERS = 1024, 2**20
"""What is tokenised together: so many texts, or texts with about so many characters."""

AHEAD = 2
"""Batches per process that are read before they are needed."""

WATCH = 1.0
"""Seconds between two looks of a process at whether the one that started it lives."""

Encoded = tuple[IntArray, IntArray, list[str | None]]
""" `Tokens.packed` of some texts, and `Tokens.spelled` of each."""

_tokens: Tokens
"""Of a process that tokenises."""


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


class Corpus(NamedTuple):
    """Texts to tokenise, and what is known of them."""

    texts: Callable[[], Iterator[Text]]
    data_file: str
    """Name of the file, folder or data set that they are from."""
    key: str
    """What identifies them: the same texts are read wherever this is the same."""
    sha256: str | None = None
    """Of the file, if it is a list of texts and nothing else."""
    commit: str | None = None
    """Of a data set on the Hub."""
    max_tokens: int | None = None
    """After the text that reaches this number no further one is read."""
    labels: list[Label] | None = None
    """Of the origins, by number, once the texts are read; None if the texts have none."""
    dropped: Mapping[str, Dropped] = MappingProxyType({})
    """What was left out before, by reason."""


def tokenise(
    corpus: Corpus, tokenizer: Any, folder: Path, processes: int | None = None
) -> TokenManifest:
    """Write a folder of tokens, in place of what was there.

    Args:
        processes: by default one for every CPU.

    Raises:
        SAEError: there is no text, a text cannot be read, or the folder cannot be written.
    """
    tokens, most = Tokens(tokenizer), corpus.max_tokens
    n_bytes = 0
    with writing(folder, lambda: n_bytes), new_folder(folder) as staging:
        with Writer(staging, corpus.labels) as writer:
            texts = writer.not_blank(corpus.texts())
            for batch in _in_order(tokens, _batches(texts), processes or n_cpus()):
                writer.add(batch, most)
                n_bytes = writer.n_bytes
                if most is not None and writer.n_tokens >= most:
                    break
            else:
                writer.end()
        if not writer.n_texts:
            raise SAEError(f"{corpus.data_file}: has no text that is not empty; give texts")
        hashes = {path.name: file_sha256(path) for path in sorted(staging.iterdir())}
        manifest = TokenManifest(
            tokenizer_sha256=tokenizer_sha256(tokenizer),
            bos=tokens.bos,
            end_of_text=tokens.end_of_text,
            data_file=corpus.data_file,
            data_sha256=corpus.sha256 or content_sha256(hashes),
            n_texts=writer.n_texts,
            n_tokens=writer.n_tokens,
            n_empty=writer.n_empty,
            n_spelled=writer.n_spelled,
            spelled=writer.spelled,
            commit=corpus.commit,
            chapters=writer.chapters(),
            dropped={reason: asdict(what) for reason, what in corpus.dropped.items()},
            files=hashes,
        )
        manifest.save(staging)
    return manifest


def content_sha256(hashes: dict[str, str]) -> str:
    """What identifies texts whatever form they had: a hash of their hash as UTF-8, one after the
    other, and of the hash of where each begins in that."""
    return hashlib.sha256(f"{hashes[TEXTS]} {hashes[TEXT_STARTS]}".encode()).hexdigest()


def n_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Writer:
    """Appends batches to the files of a folder. What it counts is about the texts that it has
    written, however far ahead they were read."""

    def __init__(self, folder: Path, labels: list[Label] | None) -> None:
        self.folder, self._labels = folder, labels
        self._is_whole, self._n_last_blank = False, 0
        self._texts_of: Counter[int] = Counter()
        self._words_of: Counter[int] = Counter()
        self.n_texts = self.n_tokens = self.n_empty = self.n_spelled = self._n_characters = 0
        self.spelled: str | None = None
        self._files: dict[str, BinaryIO] = {}

    def __enter__(self) -> "Writer":
        for name in TYPES.keys() - ({ORIGINS} if self._labels is None else set()):
            self._files[name] = (self.folder / name).open("wb")
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
    def n_bytes(self) -> int:
        """Written so far, about."""
        return self._n_characters + 4 * self.n_tokens + 18 * self.n_texts

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
        self.n_empty += self._n_last_blank

    def add(self, batch: Batch, most: int | None) -> None:
        """Append a batch, up to the text with which there are `most` tokens."""
        ends = self.n_tokens + batch.lengths.cumsum()
        n = len(ends) if most is None else min(len(ends), int(np.searchsorted(ends, most)) + 1)
        encoded = [text.text.encode() for text in batch.texts[:n]]
        self._files[TEXTS].write(b"".join(encoded))
        text_ends = self._n_characters + np.array(list(map(len, encoded))).cumsum()
        self._write(TEXT_STARTS, text_ends)
        self._write(TOKENS, batch.ids[: ends[n - 1] - self.n_tokens])
        self._write(TOKEN_STARTS, ends[:n])
        if self._labels is not None:
            self._write(ORIGINS, [text.origin for text in batch.texts[:n]])
            for text in batch.texts[:n]:
                self._texts_of[text.origin] += 1
                self._words_of[text.origin] += len(text.text.split())
        self.n_texts += n
        self.n_empty += sum(text.n_blank for text in batch.texts[:n])
        self.n_tokens, self._n_characters = int(ends[n - 1]), int(text_ends[-1])
        spelled = list(filter(None, batch.spelled[:n]))
        self.n_spelled += len(spelled)
        self.spelled = self.spelled or next(iter(spelled), None)

    def chapters(self) -> list[dict[str, Any]] | None:
        """The chapters of the texts, as the manifest has them: all, or up to the last that was
        read before the ceiling on tokens."""
        if self._labels is None:
            return None
        labels = self._labels if self._is_whole else self._labels[: max(self._texts_of) + 1]
        return [
            asdict(Chapter(*label, self._texts_of[number], self._words_of[number]))
            for number, label in enumerate(labels)
        ]

    def _write(self, name: str, numbers: Any) -> None:
        self._files[name].write(np.asarray(numbers, TYPES[name]).tobytes())


def _batches(texts: Iterable[Text]) -> Iterator[list[Text]]:
    """The texts in groups that are tokenised together."""
    batch: list[Text] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text.text)
        if len(batch) == BATCH_TEXTS or size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encoded(tokens: Tokens, texts: list[str]) -> Encoded:
    return *tokens.packed(texts), [tokens.spelled(text) for text in texts]


def _in_order(tokens: Tokens, groups: Iterator[list[Text]], processes: int) -> Iterator[Batch]:
    """The tokenised groups in their order; a single one is tokenised in this process."""
    first = list(islice(groups, 2))
    if len(first) < 2 or processes < 2:
        for group in chain(first, groups):
            yield Batch(group, *_encoded(tokens, [text.text for text in group]))
        return
    # A fork shares the vocabulary, and needs no import; nothing here has begun a thread yet.
    pool = ProcessPoolExecutor(processes, get_context("fork"), _begin, (tokens, os.getpid()))
    coming: deque[tuple[list[Text], Future[Encoded]]] = deque()
    with pool:
        try:
            for group in chain(first, groups):
                coming.append((group, pool.submit(_work, [text.text for text in group])))
                if len(coming) >= AHEAD * processes:
                    yield _result(*coming.popleft())
            while coming:
                yield _result(*coming.popleft())
        finally:
            pool.shutdown(cancel_futures=True)


def _result(group: list[Text], encoded: "Future[Encoded]") -> Batch:
    try:
        return Batch(group, *encoded.result())
    except BrokenProcessPool as error:
        raise PassingError(
            "a process that tokenises was killed, perhaps for want of memory; free some, or use "
            "fewer processes"
        ) from error


def _begin(tokens: Tokens, parent: int) -> None:
    """The beginning of a process that tokenises."""
    global _tokens
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # these processes are the parallelism
    _tokens = tokens
    Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this process when its parent was killed: it would wait for texts for ever, because it
    holds the other end of their pipe itself."""
    while os.getppid() == parent:
        time.sleep(WATCH)
    os._exit(1)


def _work(texts: list[str]) -> Encoded:
    return _encoded(_tokens, texts)
