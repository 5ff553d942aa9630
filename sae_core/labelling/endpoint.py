"""A service with OpenAI's interface for chat, asked with the `openai` client.

The client's own retries are switched off: all requests share one pause when the service is busy,
every try is bounded as a whole, also one whose answer comes a byte at a time, and the log says
what is waited for (`asking.py`). Redirects are not followed, so that no text goes to another
address than the one that is configured.
"""

import asyncio
import email.utils
import time
import urllib.request
from typing import Any
from urllib.parse import urlsplit

import httpx2
import openai

from sae_core.labelling.answers import without_limits
from sae_core.labelling.chat import Busy, Refused, Reply, estimated_tokens
from sae_core.labelling.config import KEY, AskingConfig, LabellerConfig, api_key
from sae_core.labelling.prompts import Question
from sae_core.utils.errors import SAEError, one_line

NO_KEY = "none"
"""Sent to services that need no key, as the client sends one always."""

NO_COMPLETION = (
    "the answer is not a chat completion; check that OPENAI_BASE_URL is the address of an "
    "OpenAI-compatible service"
)

AGAIN = (408, 409, 425, 429)
"""Statuses of the client's faults that may pass."""

ADVICE = {
    401: f"the key is missing or not valid: set {KEY}",
    402: "the account has no credit",
    403: f"the key in {KEY} may not do this",
    404: "no such model, or not the address of an OpenAI-compatible service, which often ends in "
    "/v1: check the labeller's name and OPENAI_BASE_URL",
    405: "not the address of an OpenAI-compatible service, which often ends in /v1: check "
    "OPENAI_BASE_URL",
}


class Endpoint:
    """The service.

    Raises:
        SAEError: the key cannot be sent, or the environment has a proxy or a certificate that the
            client cannot use.
    """

    def __init__(self, config: LabellerConfig, asking: AskingConfig) -> None:
        assert asking.endpoint is not None
        self.config, self.asking = config, asking
        self.url = asking.endpoint
        proxy = _proxy(self.url)
        self._way = f" (by the proxy {proxy}, see NO_PROXY)" if proxy else ""
        self.where = f"windows of the texts are sent to {self.url}{self._way}"
        key = api_key()
        if key and not (key.isascii() and key.isprintable() and " " not in key):
            raise SAEError(f"{KEY}: contains a character that no key has; set it again")
        self._key = key
        try:
            http = openai.DefaultAsyncHttpxClient(follow_redirects=False)
        except (ImportError, ValueError, OSError, httpx2.InvalidURL) as error:
            raise SAEError(
                f"--endpoint {self.url}: a variable of the environment does not fit ({error}); see "
                "HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY, SSL_CERT_FILE and SSL_CERT_DIR"
            ) from None
        self._client = openai.AsyncOpenAI(
            api_key=key or NO_KEY,
            base_url=self.url,
            max_retries=0,
            timeout=asking.request_seconds,
            http_client=http,
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
            reason = f"{type(cause).__name__}: {self._said(cause)}{self._way}"
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
            text = _text(choice.message)
        except (AttributeError, LookupError, TypeError):
            text = None
        if text is None:
            said = getattr(found, "error", None) or NO_COMPLETION
            raise Busy(self._without_key(one_line(said)), was_read=True)
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
            place = error.response.headers.get("location", "it does not say where").split("?")[0]
            place = self._without_key(one_line(place))
            return SAEError(f"{self.url}: leads elsewhere ({place}); set OPENAI_BASE_URL to that")
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


def _text(message: Any) -> str | None:
    """What a message says, in one string or in parts; None if it is no message."""
    content = message.content or getattr(message, "refusal", None) or ""
    if isinstance(content, list):
        content = "".join(part.get("text", "") for part in content)
    return content if isinstance(content, str) else None


def _proxy(url: str) -> str | None:
    """The host of the proxy that the environment names for an address, if it names one."""
    parts, proxies = urlsplit(url), urllib.request.getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if not proxy or urllib.request.proxy_bypass(parts.hostname or ""):
        return None
    return proxy.rpartition("@")[2].rpartition("//")[2].rstrip("/")


def _count(usage: Any, name: str, n_bytes: int) -> int:
    """A number of tokens, estimated if the service gives none."""
    value = getattr(usage, name, None)
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
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
