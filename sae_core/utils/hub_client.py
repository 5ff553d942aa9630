"""The Hub's client as this project uses it: every wait is bounded, calls that may succeed later
are tried again, and every failure is one line."""

import math
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import httpcore2
import httpx2
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import disable_progress_bars, set_client_factory

from sae_core.utils.errors import PassingError, SAEError, one_line

T = TypeVar("T")

TIMEOUT = 30.0
"""Seconds without a byte after which a request has failed; the client itself waits for ever."""

LEAST_SPEED = 20_000.0
"""Bytes a second that a transfer has to move, each way, or it has failed."""

WAITS = (1.0, 2.0, 4.0, 8.0)
"""Seconds before each further try of a failed request, unless the Hub asks for more."""

MAX_WAIT = 60.0
"""Seconds that the Hub may ask for, of this module or of the client within a try."""

PATIENCE = 300.0
"""Seconds that all tries of a request may take together, in addition to what its bytes need at
`LEAST_SPEED`, whether the client waits, the client of its storage, or this module."""

BLOCK = 1 << 16
"""Bytes handed to the network at a time."""

_give_up = math.inf
"""When the request that is being made has taken too long, by the monotonic clock."""


def connect() -> HfApi:
    """The Hub's client, with a bound on every wait."""

    def client() -> httpx2.Client:
        made = _plain_client()
        made.event_hooks["request"].append(_check_time)
        made.event_hooks["response"].append(_shorten_wait)
        _connect_through(made, PacedNetwork())
        return made

    set_client_factory(client)
    if not sys.stderr.isatty():
        disable_progress_bars()
    return HfApi()


# What has no public way: tests/unit/test_private_interfaces.py says which release of which library
# ends it.


def _plain_client() -> httpx2.Client:
    """The client that the Hub's library makes if nobody sets a factory."""
    from huggingface_hub.utils._http import default_client_factory

    return default_client_factory()


def _connect_through(client: httpx2.Client, network: httpcore2.NetworkBackend) -> None:
    """Have a client make its connections with `network`. Its connection pools take one, but neither
    the client nor its transports hand one on."""
    for transport in (client._transport, *client._mounts.values()):
        if isinstance(transport, httpx2.HTTPTransport):
            transport._pool._network_backend = network


def _abort_xet() -> None:
    """End what the client of Xet's storage is doing."""
    from huggingface_hub.utils._xet import abort_xet_session

    abort_xet_session()


class PacedNetwork(httpcore2.SyncBackend):
    """Connections that fail if no data arrives."""

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.NetworkStream:
        return PacedStream(
            super().connect_tcp(host, port, _seconds(timeout), local_address, socket_options)
        )


class PacedStream(httpcore2.NetworkStream):
    """A connection that fails when it is silent for `TIMEOUT` seconds, or slower than `LEAST_SPEED`
    over that time. Only the time spent waiting for it counts."""

    def __init__(self, stream: httpcore2.NetworkStream) -> None:
        self._stream = stream
        self._is_reading = False
        self._waited, self._moved = 0.0, 0

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        began = time.monotonic()
        data = self._stream.read(max_bytes, _seconds(timeout))
        self._note(True, began, len(data), httpcore2.ReadTimeout)
        return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        for at in range(0, len(buffer), BLOCK):
            block = buffer[at : at + BLOCK]
            began = time.monotonic()
            self._stream.write(block, _seconds(timeout))
            self._note(False, began, len(block), httpcore2.WriteTimeout)

    def _note(self, is_reading: bool, began: float, n_bytes: int, failure: type[Exception]) -> None:
        if is_reading != self._is_reading:  # the next request, or its answer
            self._is_reading, self._waited, self._moved = is_reading, 0.0, 0
        self._waited += time.monotonic() - began
        self._moved += n_bytes
        if self._waited > TIMEOUT:
            if self._moved < LEAST_SPEED * self._waited:
                raise failure(f"{self._moved} bytes in {self._waited:.0f} seconds")
            self._waited, self._moved = 0.0, 0

    def start_tls(
        self, ssl_context: Any, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.NetworkStream:
        return PacedStream(self._stream.start_tls(ssl_context, server_hostname, _seconds(timeout)))

    def close(self) -> None:
        self._stream.close()

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


def _seconds(timeout: float | None) -> float:
    """The longest wait for the next bytes, if the client has no limit or a longer one."""
    most = min(TIMEOUT, _give_up - time.monotonic())
    return max(0.01, most if timeout is None else min(timeout, most))


def _check_time(request: httpx2.Request) -> None:
    """Let no request start after its deadline, whoever sends it."""
    if time.monotonic() > _give_up:
        raise TimeoutError(f"{request.url.host}: gave up after too long a wait")


def _shorten_wait(response: httpx2.Response) -> None:
    """Limit the wait that the Hub can ask for, because the client obeys."""
    most = int(max(0.0, min(MAX_WAIT, _give_up - time.monotonic())))
    asked = response.headers.get("Retry-After", "").strip()
    if asked.isdigit():
        response.headers["Retry-After"] = str(min(int(asked), most))
    if limits := response.headers.get("RateLimit"):
        shortened = re.sub(r"\bt=(\d+)", lambda t: f"t={min(int(t[1]), most)}", limits)
        response.headers["RateLimit"] = shortened


def patiently(call: Callable[[], T], n_bytes: int = 0) -> T:
    """`call()`, tried again while its failure may be temporary and there is time; it transfers
    `n_bytes`."""
    with _limited(PATIENCE + n_bytes / LEAST_SPEED):
        for wait in WAITS:
            try:
                return call()
            except Exception as error:  # the client's failures have no common base class
                pause = max(wait, _asked_to_wait(error))
                if not _may_pass(error) or time.monotonic() + pause > _give_up:
                    raise
                time.sleep(pause)
        return call()


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Let everything that waits for the Hub in this block give up after this many seconds."""
    global _give_up
    _give_up = time.monotonic() + seconds
    # Xet's client has its own network, and no limit that lasts.
    alarm = threading.Timer(seconds, _abort_xet)
    alarm.daemon = True
    alarm.start()
    try:
        yield
    finally:
        alarm.cancel()
        _give_up = math.inf


def _status(error: Exception) -> int | None:
    """The HTTP status of a failure; Xet's client has it only in its message."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code
    found = re.search(r"HTTP status \w+ error \((\d{3})", str(error))
    return int(found[1]) if found else None


def _cause(error: Exception) -> Exception:
    """Why the Hub could not be asked for something that is not cached, or the error itself."""
    is_local = isinstance(error, LocalEntryNotFoundError)
    return error.__cause__ if is_local and isinstance(error.__cause__, Exception) else error


def _may_pass(error: Exception) -> bool:
    error = _cause(error)
    status = _status(error)
    if status is not None:
        return status in (408, 429) or status >= 500
    # RuntimeError is how Xet's client says that it lost its connection.
    passing = (httpx2.TransportError, ConnectionError, TimeoutError, RuntimeError)
    return isinstance(error, passing) and not isinstance(error, (OfflineModeIsEnabled, *UNSENDABLE))


def _asked_to_wait(error: Exception) -> float:
    if isinstance(error, HfHubHTTPError):
        asked = error.response.headers.get("Retry-After", "")
        return float(asked) if asked.isdigit() else 0.0
    return 0.0


UNSENDABLE = (UnicodeEncodeError, httpx2.LocalProtocolError)
"""A header that cannot be sent; what is ours in the headers is the token."""

ADVICE = {
    401: "the token is not valid: run `hf auth login` or set a new HF_TOKEN, then try again",
    403: "the token has no permission for this: create one that may write there, then try again",
    404: "no such repository, or the token may not see it",
    413: "a file is larger than the Hub accepts; trying again does not help",
}
"""What to do about a status of the Hub."""


def _advice(error: Exception) -> str:
    """What to do about a failure."""
    error = _cause(error)
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE forbids access to the Hub: unset it"
    if (status := _status(error)) in ADVICE:
        return ADVICE[status]
    if _may_pass(error):
        return "try again when the Hub can be reached"
    return "the Hub or its client rejects this; trying again does not help"


@contextmanager
def named(what: str) -> Iterator[None]:
    """Turn a failure of the client into one line with the way out."""
    try:
        yield
    except SAEError:
        raise
    except UNSENDABLE:  # its message may hold the token
        raise SAEError(
            f"{what}: the token contains a character that no token has; run `hf auth login` or set "
            "a new HF_TOKEN"
        ) from None
    except Exception as error:  # the client's failures have no common base class
        kind = PassingError if _may_pass(error) else SAEError
        raise kind(f"{what}: {_advice(error)} ({one_line(error)})") from error
