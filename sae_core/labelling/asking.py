"""Asking with patience: earlier answers first, within the ceiling, again while a model is busy."""

import asyncio
import sys
from collections.abc import Awaitable, Callable
from typing import Any

from sae_core.labelling.answers import parse_answer
from sae_core.labelling.chat import Busy, Chat, Refused, Reply
from sae_core.labelling.ledger import Ledger
from sae_core.labelling.prompts import Question
from sae_core.utils.errors import PassingError, SAEError

FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0
"""Seconds before the second try; each further wait is twice as long, up to the longest."""

MOST_ASKED = 300.0
"""Seconds that an endpoint may ask to wait; longer than that, it is better to start again later."""

PAUSES = 5
"""How many times as often a request is sent that the endpoint asks to send later: it works, and
others may come first."""

ATTEMPTS = 2
"""How often a question is asked whose answer is not in the schema."""

IN_A_ROW = 5
"""Requests without an answer, one after the other, after which no more are sent."""

Sleep = Callable[[float], Awaitable[None]]


class NoAnswer(Exception):
    """A request that failed at every try."""


class Asker:
    """Asks one language model.

    Args:
        tries: how often a request is sent that fails, at most.
        sleep: how it waits.
    """

    def __init__(
        self, chat: Chat, ledger: Ledger, tries: int, sleep: Sleep = asyncio.sleep
    ) -> None:
        self.chat, self.ledger, self.tries, self.sleep = chat, ledger, tries, sleep
        self.n_sent = self.n_cut_off = 0
        self._n_answered = self._n_failed = 0
        """Requests that were answered; and that were not, since the last one that was."""
        self._pause_ends = 0.0
        """When requests may be sent again, by the loop's clock."""

    async def ask(self, question: Question, feature: int) -> dict[str, Any] | None:
        """The answer to a question, or None if it is twice not in the schema.

        Raises:
            CeilingReached: the ceiling on tokens leaves no room for the question.
            Refused: the model does not answer this question.
            NoAnswer: it was busy or failed at every try.
            SAEError: it answers nothing, or not for a long time.
        """
        for attempt in range(ATTEMPTS):
            reply = self.ledger.find(question, attempt)
            if reply is None:
                try:
                    reply = await self._patiently(question)
                except (NoAnswer, Refused) as error:
                    self._count_failure(feature, error)
                    raise
                self.ledger.record(question, attempt, feature, reply)
                self._n_answered, self._n_failed = self._n_answered + 1, 0
            self.n_cut_off += reply.is_cut_off
            answer = parse_answer(reply.text, question.schema)
            if answer is not None:
                return answer
        return None

    async def _patiently(self, question: Question) -> Reply:
        n_failed = n_paused = 0
        while True:
            await self._pause()
            try:
                with self.ledger.reserved(question):
                    self.n_sent += 1
                    return await self.chat.ask(question)
            except Busy as busy:
                reason, asked = str(busy), busy.wait
                if busy.was_read:
                    self.ledger.add_lost(question)
            n_failed, n_paused = n_failed + (not asked), n_paused + bool(asked)
            if n_failed == self.tries or n_paused == PAUSES * self.tries:
                raise NoAnswer(reason)
            if asked:
                self._begin_pause(asked, reason)
            else:
                seconds = min(FIRST_WAIT * 2 ** (n_failed - 1), LONGEST_WAIT)
                _say_wait(seconds, reason)
                await self.sleep(seconds)

    def _begin_pause(self, seconds: float, reason: str) -> None:
        """Let no request start for a time, whichever of them was told to wait."""
        if seconds > MOST_ASKED:
            raise PassingError(
                f"the endpoint asks to wait {seconds:.0f} seconds ({reason}); run it again later: "
                "what was answered is not asked again"
            )
        _say_wait(seconds, reason)
        self._pause_ends = max(self._pause_ends, asyncio.get_running_loop().time() + seconds)

    async def _pause(self) -> None:
        left = self._pause_ends - asyncio.get_running_loop().time()
        if left > 0:
            await self.sleep(left)

    def _count_failure(self, feature: int, error: Exception) -> None:
        """Note a request without an answer.

        Raises:
            SAEError: no request was ever answered, or too many in a row were not.
        """
        print(f"feature {feature}: {error}", file=sys.stderr, flush=True)
        self._n_failed += 1
        if isinstance(error, Refused) and self._n_failed >= IN_A_ROW:
            raise SAEError(
                f"the endpoint refuses one request after the other ({error}); a service without "
                "structured answers needs --no-structured-answers, and some models take no "
                "temperature: --label-temperature None"
            )
        if not isinstance(error, Refused) and (self._n_failed >= IN_A_ROW or not self._n_answered):
            raise PassingError(
                f"the endpoint gives no answer ({error}); run it again later: what was answered "
                "is not asked again"
            )


def _say_wait(seconds: float, reason: str) -> None:
    print(f"waiting {seconds:.0f} s: {reason}", file=sys.stderr, flush=True)
