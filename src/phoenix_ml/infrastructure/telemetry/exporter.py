"""Metrics and liveness of a process that serves no HTTP otherwise."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from phoenix_ml.infrastructure.telemetry.catalogue import CATALOGUE
from phoenix_ml.infrastructure.telemetry.metrics import negotiate, render


@contextmanager
def export_metrics(folder: Path, host: str, port: int | None) -> Iterator[None]:
    """Serves ``/metrics`` and ``/health/live`` on the port within the block; does nothing without one."""
    if port is None:
        yield
        return

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/metrics":
                openmetrics, content_type = negotiate(self.headers.get("accept", ""))
                self._send(200, content_type, render(folder, CATALOGUE, openmetrics=openmetrics))
            elif self.path == "/health/live":
                self._send(200, "application/json", b'{"status":"ok"}')
            else:
                self._send(404, "text/plain", b"there are /metrics and /health/live\n")

        def _send(self, status: int, content_type: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("content-type", content_type)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
            """Scrapes are not worth a line each."""

    with ThreadingHTTPServer((host, port), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield
        server.shutdown()
