"""A look-alike of a chat service with OpenAI's interface, for the unmodified `openai` client.

    with MiniChat(answer) as server:  # OPENAI_BASE_URL=server.base, OPENAI_API_KEY=KEY
        ...
    server.requests

`server.faults` is what happens to the next requests, one after the other; `server.always` to all of
them. A fault is a status, such as 429, one of the words in `Handler.fault`, or what is sent as JSON
with status 200.
"""

import json
import socket
import threading
from collections.abc import Callable
from typing import Any

from loopback import LoopbackServer, QuietHandler

KEY = "sk-planted-for-this-test"

SILENCE = 60.0
"""Seconds after which a silent server closes the connection."""

Fault = int | str | dict[str, Any]
Answer = Callable[[dict[str, Any]], Any]
"""What is answered to the body of a request; anything but text is sent as JSON."""


class MiniChat(LoopbackServer):
    """The service, as a context."""

    def __init__(self, answer: Answer, faults: tuple[Fault, ...] = ()) -> None:
        self.answer = answer
        self.faults = list(faults)
        self.always: Fault | None = None
        self.retry_after: str | None = None
        """Sent with a 429 or 503."""
        self.usage: dict[str, Any] | None = {"prompt_tokens": 100, "completion_tokens": 10}
        self.gathers = 0
        """No request is answered before this many have waited at a time."""
        self.requests: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        """Those that were sent."""
        self.at_once = self.most_at_once = 0
        self.lock = threading.Condition()
        self.bind(Handler, "chat")

    @property
    def base(self) -> str:
        return f"{self.url}/v1"

    def asked(self, name: str) -> list[dict[str, Any]]:
        """The requests for `label`, `detection` or `fuzzing`."""
        return [request for request in self.requests if kind(request) == name]


def kind(request: dict[str, Any]) -> str:
    """What a request is for."""
    return request["response_format"]["json_schema"]["name"]


class Handler(QuietHandler):
    chat: MiniChat

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.chat
        with server.lock:
            server.requests.append(body)
            server.keys.add(self.headers.get("Authorization", "").removeprefix("Bearer "))
            fault = server.faults.pop(0) if server.faults else server.always
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
            server.lock.notify_all()
            server.lock.wait_for(lambda: server.most_at_once >= server.gathers, SILENCE)
        try:
            if self.path != "/v1/chat/completions":
                self.error(404, "no such path")
            elif fault is None:
                self.reply(server.answer(body))
            else:
                self.fault(fault, body)
        finally:
            with server.lock:
                server.at_once -= 1

    def fault(self, fault: Fault, body: dict[str, Any]) -> None:
        if isinstance(fault, dict):
            self.send(json.dumps(fault).encode(), "application/json")
        elif fault == "silence":
            self.chat.stopping.wait(SILENCE)
            self.close_connection = True
        elif fault == "drip":  # alive for ever, and no timeout between two bytes is too long for it
            self.head("application/json", 1000)
            while not self.chat.stopping.wait(0.05):
                self.wfile.write(b" ")
                self.wfile.flush()
        elif fault == "cut":
            self.head("application/json", 1000)
            self.wfile.write(b'{"choices": [')
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        elif fault == "not JSON":
            self.send(b"{oops", "application/json")
        elif fault == "HTML":
            self.send(b"<html>Welcome</html>", "text/html")
        elif fault == "stream":
            self.send(b'data: {"choices": [{"delta": {"content": "x"}}]}\n\n', "text/event-stream")
        elif fault == "no choices":
            self.send(b'{"choices": null}', "application/json")
        elif fault == "nested":
            self.send(b"[" * 100_000, "application/json")
        elif fault == "null content":
            self.reply(None)
        elif fault == "redirect":
            self.send_response(307)
            self.send_header("Location", "http://127.0.0.1:1/v1/chat/completions")
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif fault == "wrong schema":
            self.reply({"label": 7, "active": "yes"})
        else:
            key = self.headers.get("Authorization", "")
            self.error(int(fault), f"fault {fault} for {key}")

    def reply(self, content: Any) -> None:
        """A completion. Tokens are counted as the server says."""
        text = content if isinstance(content, str | None) else json.dumps(content)
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        whole = {"id": "x", "object": "chat.completion", "created": 0, "model": "m"}
        whole |= {"choices": [choice], "usage": self.chat.usage}
        self.send(json.dumps(whole).encode(), "application/json")

    def error(self, status: int, message: str) -> None:
        self.send(json.dumps({"error": {"message": message}}).encode(), "application/json", status)

    def send(self, data: bytes, content_type: str, status: int = 200) -> None:
        self.head(content_type, len(data), status)
        self.wfile.write(data)

    def head(self, content_type: str, length: int, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(length))
        if self.chat.retry_after is not None and status in (429, 503):
            self.send_header("Retry-After", self.chat.retry_after)
        self.end_headers()
