"""A service with OpenAI's interface for chat, asked with the `openai` client.

The client's own retries are switched off: all requests share one pause when the service is busy,
every try is bounded as a whole, also one whose answer comes a byte at a time, and the log says
what is waited for (`asking.py`). Redirects are not followed, so that no text goes to another
address than the one that is configured.
"""

import asyncio
import email.utils
import time
from typing import Any

import httpx2
import openai

from sae_core.labelling.answers import without_limits
from sae_core.labelling.chat import Busy, Refused, Reply, estimated_tokens
from sae_core.labelling.config import KEY, AskingConfig, LabellerConfig, api_key
from sae_core.labelling.prompts import Question
from sae_core.utils.errors import SAEError, one_line

NO_KEY = "none"
"""Sent to services that need no key, as the client sends one always."""

AGAIN = (408, 409, 425, 429)
"""Statuses of the client's faults that may pass."""

ADVICE = {
    401: f"the key is missing or not valid: set {KEY}",
    403: f"the key in {KEY} may not do this",
    404: "no such model, or not the address of an OpenAI-compatible service, which often ends in "
    "/v1: check the labeller's name and OPENAI_BASE_URL",
}


class Endpoint:
    """The service.

    Raises:
        SAEError: the key cannot be sent.
    """

    def __init__(self, config: LabellerConfig, asking: AskingConfig) -> None:
        assert asking.endpoint is not None
        self.config, self.asking = config, asking
        self.url = asking.endpoint
        self.where = f"windows of the texts are sent to {self.url}"
        key = api_key()
        if key and not (key.isascii() and key.isprintable() and " " not in key):
            raise SAEError(f"{KEY}: contains a character that no key has; set it again")
        self._key = key
        self._client = openai.AsyncOpenAI(
            api_key=key or NO_KEY,
            base_url=self.url,
            max_retries=0,
            timeout=asking.request_seconds,
            http_client=openai.DefaultAsyncHttpxClient(follow_redirects=False),
        )

    async def ask(self, question: Question) -> Reply:
        """Send a request once, as `Chat` says."""
        try:
            async with asyncio.timeout(self.asking.request_seconds):
                found = await self._client.chat.completions.create(**self._request(question))
        except openai.APIStatusError as error:
            raise self._failure(error) from None
        except TimeoutError:
            raise Busy(f"no answer in {self.asking.request_seconds:g} s", was_read=True) from None
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            was_read = not isinstance(cause, (httpx2.ConnectError, httpx2.ConnectTimeout))
            reason = f"{type(cause).__name__}: {self._said(cause)}"
            raise Busy(reason, was_read=was_read) from None
        except (ValueError, RecursionError):
            raise Busy("the answer is not JSON", was_read=True) from None
        return self._reply(found, question)

    async def close(self) -> None:
        """Close its connections."""
        await self._client.close()

    def _request(self, question: Question) -> dict[str, Any]:
        request: dict[str, Any] = {
            "model": question.model,
            "messages": question.messages,
            "max_completion_tokens": self.config.answer_tokens,
        }
        if self.config.label_temperature is not None:
            request["temperature"] = self.config.label_temperature
        if self.config.structured_answers:
            schema = without_limits(question.schema)
            wanted = {"name": question.name, "strict": True, "schema": schema}
            request["response_format"] = {"type": "json_schema", "json_schema": wanted}
        return request

    def _reply(self, found: Any, question: Question) -> Reply:
        """The answer in a response. The client does not check what it has read."""
        try:
            choice = found.choices[0]
            text = choice.message.content or getattr(choice.message, "refusal", None) or ""
        except (AttributeError, LookupError, TypeError):
            text = None
        if not isinstance(text, str):
            raise Busy("the answer is not a chat completion", was_read=True)
        usage = getattr(found, "usage", None)
        return Reply(
            self._without_key(text),
            _count(usage, "prompt_tokens", question.n_bytes),
            _count(usage, "completion_tokens", len(text.encode(errors="replace"))),
            getattr(choice, "finish_reason", None) == "length",
        )

    def _failure(self, error: openai.APIStatusError) -> Exception:
        status, said = error.status_code, self._said(error)
        if 300 <= status < 400:
            return SAEError(f"{self.url}: leads elsewhere ({said}); set OPENAI_BASE_URL to that")
        if status in ADVICE:
            return SAEError(f"{self.url}: {ADVICE[status]} ({said})")
        if error.code == "insufficient_quota":
            return SAEError(f"{self.url}: the account's quota is used up ({said})")
        if status in AGAIN or status >= 500:
            return Busy(said, retry_after(error.response.headers.get("retry-after")))
        return Refused(said)

    def _said(self, error: BaseException) -> str:
        return self._without_key(one_line(error))

    def _without_key(self, text: str) -> str:
        """What others say may repeat the key, and goes into logs and files."""
        return text.replace(self._key, f"[{KEY}]") if self._key else text


def _count(usage: Any, name: str, n_bytes: int) -> int:
    """A number of tokens, estimated if the service gives none."""
    value = getattr(usage, name, None)
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    return estimated_tokens(n_bytes)


def retry_after(header: str | None) -> float | None:
    """The seconds that a `Retry-After` header asks for: a number or a date."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
        except ValueError:
            return None
    return max(0.0, seconds) if seconds == seconds else None
