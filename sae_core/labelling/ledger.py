"""Answers on disk, and the ceiling on their tokens.

The file has one JSON object a line, for each answer, and only grows. An answer is found again by a
hash of all that led to it, so what was answered is not asked again: after a kill, with more
features, or with another choice of scores. A line that a killed process left unfinished is cut off.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sae_core.labelling.chat import Reply, estimated_tokens
from sae_core.labelling.config import LabellerConfig
from sae_core.labelling.prompts import Question
from sae_core.utils.errors import SAEError
from sae_core.utils.files import writing

DOUBT = 2
"""How many times as many tokens as estimated a request may have, for the ceiling."""


class CeilingReached(Exception):
    """The next request might exceed the ceiling on tokens."""


class Ledger:
    """The answers about one SAE.

    Args:
        path: the file; None keeps answers in memory only.

    Raises:
        SAEError: the file cannot be read.
    """

    def __init__(self, path: Path | None, config: LabellerConfig) -> None:
        self.path, self.config = path, config
        self.tokens_in = self.tokens_out = 0
        """Of the answers that were used or given so far."""
        self._reserved = 0
        self._answers: dict[str, Reply] = {}
        self._whole = 0
        """Length of the file's finished lines, in bytes."""
        if path is not None and path.exists():
            self._answers, self._whole = _read(path)

    @property
    def spent(self) -> int:
        return self.tokens_in + self.tokens_out

    def key(self, question: Question, attempt: int) -> str:
        """What an answer is found by."""
        config = self.config
        how = (config.answer_tokens, config.label_temperature, config.structured_answers)
        whole = json.dumps([question, how, config.labeller_backend, attempt], sort_keys=True)
        return hashlib.sha256(whole.encode(errors="surrogatepass")).hexdigest()

    def known(self, question: Question, attempt: int) -> Reply | None:
        """An earlier answer."""
        return self._answers.get(self.key(question, attempt))

    def find(self, question: Question, attempt: int) -> Reply | None:
        """An earlier answer, whose tokens count as spent."""
        reply = self.known(question, attempt)
        if reply is not None:
            self.add(reply.tokens_in, reply.tokens_out)
        return reply

    def add(self, tokens_in: int, tokens_out: int) -> None:
        """Count tokens as spent."""
        self.tokens_in += tokens_in
        self.tokens_out += tokens_out

    def add_lost(self, question: Question) -> None:
        """Count a request whose answer may have been charged and was not read."""
        self.add(estimated_tokens(question.n_bytes), self.config.answer_tokens)

    @contextmanager
    def reserved(self, question: Question) -> Iterator[None]:
        """A block that sends a request: no other may use the tokens that it might take.

        Raises:
            CeilingReached: there are not enough left.
        """
        most = DOUBT * estimated_tokens(question.n_bytes) + self.config.answer_tokens
        if self.spent + self._reserved + most > self.config.most_tokens:
            raise CeilingReached
        self._reserved += most
        try:
            yield
        finally:
            self._reserved -= most

    def record(self, question: Question, attempt: int, feature: int, reply: Reply) -> None:
        """Append an answer to the file.

        Raises:
            SAEError: it cannot be written.
        """
        self.add(reply.tokens_in, reply.tokens_out)
        key = self.key(question, attempt)
        self._answers[key] = reply
        if self.path is None:
            return
        about = {"key": key, "feature": feature, "asked": question.name, "attempt": attempt}
        line = (json.dumps(about | reply._asdict(), ensure_ascii=True) + "\n").encode()
        with writing(self.path, len(line)):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.truncate(self._whole)
                file.write(line)
            self._whole += len(line)


def _read(path: Path) -> tuple[dict[str, Reply], int]:
    """The answers of a file, by key, and the length of its finished lines."""
    found = {}
    try:
        content = path.read_bytes()
        end = content.rfind(b"\n") + 1
        for line in content[:end].splitlines():
            values = json.loads(line)
            found[values["key"]] = Reply(*(values[name] for name in Reply._fields))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SAEError(
            f"{path}: not readable answers; mend it, or delete it to ask everything again"
        ) from error
    return found, end
