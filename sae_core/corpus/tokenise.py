"""Texts of any number become a folder of tokens: read once, in bounded memory, by several
processes.

The texts stay in their order, and each is tokenised as a whole, so the number of processes and what
is tokenised together change nothing, nor does an interruption. A text of more than a million
characters is cut into several.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from itertools import chain, islice
from multiprocessing import get_context
from pathlib import Path
from threading import Thread
from types import MappingProxyType
from typing import Any, NamedTuple

from sae_core.corpus.records import LONGEST, pieces
from sae_core.corpus.token_file import content_sha256, sha256_of
from sae_core.corpus.token_manifest import TokenManifest
from sae_core.corpus.token_writer import Batch, Label, Text, Writer
from sae_core.corpus.tokens import IntArray, Tokens
from sae_core.data_processing.sources import Dropped
from sae_core.models.tokenizers import tokenizer_sha256
from sae_core.utils.code_hash import code_hash
from sae_core.utils.errors import PassingError, SAEError
from sae_core.utils.files import file_sha256, new_folder, writing

BATCH_TEXTS, BATCH_CHARACTERS = 1024, 2**18
"""What is tokenised together: so many texts, or texts with about so many characters."""

AHEAD = 2
"""Batches per process that are read before they are needed."""

STORE_SECONDS = 20.0
"""How often what has been written is made to stay: what a killed process loses at most, besides the
time for reading the texts before."""

WATCH = 1.0
"""Seconds between two looks of a process at whether the one that started it lives."""

Encoded = tuple[IntArray, IntArray, list[str | None]]
""" `Tokens.packed` of some texts, and `Tokens.spelled` of each."""

_tokens: Tokens
"""Of a process that tokenises."""


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
    """Write a folder of tokens, in place of what was there. What an interrupted or killed process
    has written of the same tokens is kept, and the work goes on after it.

    Args:
        processes: by default one for every CPU.

    Raises:
        SAEError: there is no text, a text cannot be read, or the folder cannot be written.
    """
    tokens, most = Tokens(tokenizer), corpus.max_tokens
    sha256, code = tokenizer_sha256(tokenizer), code_hash("sae_core/corpus/tokenise.py")
    made_of = sha256_of(f"{corpus.key} {sha256} {code}")
    n_bytes = 0
    with writing(folder, lambda: n_bytes), new_folder(folder, resumes=True) as staging:
        with Writer(staging, corpus.labels, made_of) as writer:
            if writer.n_read:
                print(f"{folder}: goes on after {writer.n_read:,} texts", flush=True)
            texts = writer.not_blank(islice(_cut(corpus.texts()), writer.n_read, None))
            stored = time.monotonic()
            for batch in _in_order(tokens, _batches(texts), processes or n_cpus()):
                writer.add(batch, most)
                n_bytes = writer.n_bytes
                if most is not None and writer.written.n_tokens >= most:
                    break
                if time.monotonic() >= stored + STORE_SECONDS:
                    writer.store()
                    stored = time.monotonic()
            else:
                writer.end()
        if not writer.written.n_texts:
            raise SAEError(
                f"{corpus.data_file}: has no text that is not empty, and {writer.written.n_empty} "
                "that are empty or null; give texts, or name the field that has them"
            )
        manifest = _manifest(corpus, tokens, sha256, writer, staging)
        manifest.save(staging)
        writer.forget()
    return manifest


def _manifest(
    corpus: Corpus, tokens: Tokens, tokenizer: str, writer: Writer, folder: Path
) -> TokenManifest:
    """Of the files that are whole.

    Args:
        tokenizer: its SHA-256.
    """
    written = writer.written
    hashes = {name: file_sha256(folder / name) for name in writer.names}
    return TokenManifest(
        tokenizer_sha256=tokenizer,
        bos=tokens.bos,
        end_of_text=tokens.end_of_text,
        data_file=corpus.data_file,
        data_sha256=corpus.sha256 or content_sha256(hashes),
        n_texts=written.n_texts,
        n_tokens=written.n_tokens,
        n_empty=written.n_empty,
        n_spelled=written.n_spelled,
        spelled=written.spelled,
        commit=corpus.commit,
        chapters=writer.chapters(),
        dropped={reason: asdict(what) for reason, what in corpus.dropped.items()},
        files=hashes,
    )


def n_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cut(texts: Iterable[Text]) -> Iterator[Text]:
    """The texts, long ones in pieces."""
    for text in texts:
        if len(text.text) > LONGEST:
            yield from (text._replace(text=piece) for piece in pieces(text.text))
        else:
            yield text


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
