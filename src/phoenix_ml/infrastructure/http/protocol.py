"""uvicorn's HTTP protocol with a bound on what comes beside a body: uvicorn itself reads headers without end."""

from typing import Any, Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from phoenix_ml.domain.errors import HeadersTooLarge, MalformedBody
from phoenix_ml.domain.ids import new_id
from phoenix_ml.infrastructure.http.codec import encode_error
from phoenix_ml.infrastructure.http.errors import status_of

HEAD_LIMIT_BYTES: Final = 64 * 1024


class BoundedHeads(HttpToolsProtocol):
    """Answers 431 to a request whose head is too large, after those before it, and closes the connection."""

    # All that came since the parser last completed a head or gave out some of a body. The rest of the piece
    # in which it did so is not counted, as it may be another message's: a head may be found out a piece late.
    _unfinished_bytes = 0

    def data_received(self, data: bytes) -> None:
        if self._unfinished_bytes > HEAD_LIMIT_BYTES:
            return  # It is refused; what still comes is not looked at.
        self._unfinished_bytes += len(data)
        super().data_received(data)
        if self._unfinished_bytes > HEAD_LIMIT_BYTES and not self.transport.is_closing():
            self._break_off()

    def on_headers_complete(self) -> None:
        # The pieces may hold a body as well: only when they are large is the head itself worth measuring.
        if self._unfinished_bytes > HEAD_LIMIT_BYTES and self._head_bytes() > HEAD_LIMIT_BYTES:
            self.app = _refuse
            self.url = b"/"  # one beyond the parser's limit would be no URL at all
        self._unfinished_bytes = 0
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        error = MalformedBody(f"{msg.rstrip('.')}: this is no HTTP/1.1 that the server reads")
        payload = encode_error(error)
        headers = [*self.server_state.default_headers, *_last_headers(payload)]
        lines = b"".join(b"%b: %b\r\n" % header for header in headers)
        self.transport.write(b"HTTP/1.1 %d Bad Request\r\n%b\r\n%b" % (status_of(error), lines, payload))
        self.transport.close()

    def on_body(self, body: bytes) -> None:
        self._unfinished_bytes = 0
        super().on_body(body)

    def _head_bytes(self) -> int:
        line_bytes = len(b"GET  HTTP/1.1\r\n") + len(self.url)
        return line_bytes + sum(len(name) + len(value) + len(b": \r\n") for name, value in self.headers)

    def _break_off(self) -> None:
        reads_head = self.scope is not None and (self.cycle is None or self.cycle.scope is not self.scope)
        if not reads_head:
            # Trailers or chunk extensions: their request has its application already, which learns of the end.
            self.transport.close()
            return
        # As if the head were complete: so the answer waits for those of the requests before.
        self.app = _refuse
        self.url = b"/"
        super().on_headers_complete()


async def _refuse(scope: Any, receive: Any, send: Any) -> None:
    error = HeadersTooLarge(
        f"the request line and headers are larger than the {HEAD_LIMIT_BYTES} bytes allowed: send fewer or "
        "shorter ones",
        limit_bytes=HEAD_LIMIT_BYTES,
    )
    payload = encode_error(error)
    headers = _last_headers(payload)
    await send({"type": "http.response.start", "status": status_of(error), "headers": headers})
    await send({"type": "http.response.body", "body": payload})


def _last_headers(payload: bytes) -> list[tuple[bytes, bytes]]:
    """The headers of a connection's last answer."""
    return [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(payload)),
        (b"x-request-id", new_id().encode()),
        (b"connection", b"close"),
    ]
