"""Metrics and liveness of a process that serves no HTTP otherwise."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from phoenix_ml.domain.errors import Misconfigured
from phoenix_ml.infrastructure.telemetry.catalogue import CATALOGUE
from phoenix_ml.infrastructure.telemetry.metrics import negotiate, render


@contextmanager
def export_metrics(folder: Path, host: str, port: int | None) -> Iterator[None]:
    """Serves ``/metrics`` and ``/health/live`` on the port within the block; does nothing without one.

    Raises Misconfigured for a port that cannot be had.
    """
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

    try:
        server = ThreadingHTTPServer((host, port), Handler)
    except (OSError, OverflowError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else exc
        raise Misconfigured(
            f"cannot listen on {host}:{port}: {reason}; choose another --metrics-port"
        ) from exc
    with server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield
        finally:
            server.shutdown()
