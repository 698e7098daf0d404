"""A web server that stands for whoever receives webhooks."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from servers import HOST


class Received(ThreadingHTTPServer):
    """A web server that keeps what it was sent and answers with ``status``."""

    status = 200

    def __init__(self) -> None:
        super().__init__((HOST, 0), _Handler)
        self.calls: list[tuple[str, dict[str, str], bytes]] = []

    @property
    def host(self) -> str:
        return f"{HOST}:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert isinstance(self.server, Received)
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.calls.append((self.path, {k.lower(): v for k, v in self.headers.items()}, body))
        self.send_response(self.server.status)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """The test looks at the calls."""


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
