"""A web server that stands for whoever is called over HTTP: receivers of webhooks, trainers."""

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from servers import HOST


class Request(NamedTuple):
    """What the server was sent; ``path`` is with its query."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


class Received(ThreadingHTTPServer):
    """A web server that keeps what it was sent.

    It answers with what ``answers`` has for the method and the path without its query, a status and JSON, else
    with ``status``.
    """

    status = 200

    def __init__(self) -> None:
        super().__init__((HOST, 0), _Handler)
        self.requests: list[Request] = []
        self.answers: dict[tuple[str, str], tuple[int, Any]] = {}

    @property
    def host(self) -> str:
        return f"{HOST}:{self.server_port}"

    @property
    def calls(self) -> list[tuple[str, dict[str, str], bytes]]:
        return [(one.path, one.headers, one.body) for one in self.requests]


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        assert isinstance(self.server, Received)
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        headers = {k.lower(): v for k, v in self.headers.items()}
        self.server.requests.append(Request(self.command, self.path, headers, body))
        place = (self.command, urlsplit(self.path).path)
        status, answer = self.server.answers.get(place, (self.server.status, None))
        self.send_response(status)
        if 300 <= status < 400:
            self.send_header("location", "/elsewhere")
        if answer is not None:
            self.send_header("content-type", "application/json")
        self.end_headers()
        if answer is not None:
            self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_: Any) -> None:
        """The test looks at the requests."""


@contextmanager
def receiving() -> Iterator[Received]:
    """The server, which answers while the block runs."""
    with Received() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def trickling(start: bytes) -> Iterator[int]:
    """The port of a server that says this to whoever calls, and then a byte now and then, until it is left."""
    with socket.create_server((HOST, 0)) as server:

        def answer() -> None:
            caller, _ = server.accept()
            with caller, contextlib.suppress(OSError):
                caller.recv(65536)
                caller.sendall(start)
                caller.settimeout(0.05)
                while True:
                    with contextlib.suppress(TimeoutError):
                        if not caller.recv(65536):
                            return
                    caller.sendall(b"x")

        # Whoever should call may have given up before: then nobody ends its wait.
        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        thread.join(30)
