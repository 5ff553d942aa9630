"""What look-alikes of services share: a server on loopback, as a context, and quiet connections."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self


class LoopbackServer:
    """A server on a free port of 127.0.0.1, that answers while its context lasts."""

    url: str
    stopping: threading.Event
    """Set when the context ends; what is silent on purpose waits for it."""

    def bind(self, handler: type[BaseHTTPRequestHandler], name: str) -> None:
        """Take a port. Connections are `handler`s, which know this server as `name`."""
        self.stopping = threading.Event()
        bound = type("BoundHandler", (handler,), {name: self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), bound)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stopping.set()
        self.server.shutdown()
        self.server.server_close()


class QuietHandler(BaseHTTPRequestHandler):
    """A connection that logs nothing and bears a client that goes away."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def handle(self) -> None:
        try:
            super().handle()
        except ConnectionError:  # the client went away
            pass
