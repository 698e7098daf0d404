"""The hot lane: ``POST /predict`` and ``POST /v2/models/…/infer`` from bytes to bytes in uvicorn's protocol.

uvicorn with an empty ASGI application costs about 24 µs of CPU a request, this about 5 (docs/adr/0011). Every
other request, and every odd one, goes uvicorn's own way, so what the two do must not differ: one test suite
runs over both.
"""

import logging
import re
from asyncio import Future
from collections.abc import Callable, Coroutine, Generator
from functools import partial
from http import HTTPStatus
from time import perf_counter
from typing import Any, Final, NamedTuple

import httptools

from phoenix_ml.domain.errors import InternalError
from phoenix_ml.domain.events import PredictionMade
from phoenix_ml.infrastructure.http.calls import JSON, Answer, PredictionCalls, read_headers
from phoenix_ml.infrastructure.http.codec import encode_error
from phoenix_ml.infrastructure.http.infer import INFER_PATH, InferCalls, read_infer_headers
from phoenix_ml.infrastructure.http.origins import Check
from phoenix_ml.infrastructure.http.protocol import BoundedHeads
from phoenix_ml.infrastructure.telemetry.refusals import DEFECT

log = logging.getLogger(__name__)
_BEGINNINGS: Final = (b"POST /predict HTTP/1.1\r\n", b"POST /v2/models/")
_REQUEST_LINE: Final = re.compile(rb"POST (/[!-~]*) HTTP/1\.1\r\n")
# What needs no decoding: uvicorn's way for the rest.
_IS_PLAIN: Final = re.compile(r"[A-Za-z0-9._~/+-]+")
_END_OF_HEAD: Final = b"\r\n\r\n"
# Larger ones are rare, and uvicorn's way with them is not much dearer.
_BODY_LIMIT_BYTES: Final = 64 * 1024
# What is larger is odd, and might be too large.
_HEAD_LIMIT_BYTES: Final = 4096
_HEADS_KEPT: Final = 256
_HELD_BYTES: Final = 64 * 1024
_STATUS_LINES: Final = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus
}


class Head(NamedTuple):
    """What the hot lane needs to know of a request's head."""

    body_bytes: int
    answer: Callable[[bytes, float], Coroutine[Any, Any, Answer]]


class Lane:
    """What the connections of one server share."""

    def __init__(
        self, calls: PredictionCalls, infer_calls: InferCalls, check_browser: Check, body_limit_bytes: int
    ) -> None:
        self._predict = calls.predict
        self._infer = infer_calls.infer
        self._check_browser = check_browser
        self._body_limit_bytes = min(body_limit_bytes, _BODY_LIMIT_BYTES)
        self._heads: dict[bytes, Head | None] = {}
        self._default_headers: list[tuple[bytes, bytes]] | None = None
        self._default_lines = b""

    def read_head(self, head: bytes) -> Head | None:
        """What to know of the head; None for one that goes uvicorn's way."""
        # A client sends the same head again and again: finding it costs 0.1 µs, reading it 5.
        try:
            return self._heads[head]
        except KeyError:
            known = self._parse(head)
            if len(self._heads) >= _HEADS_KEPT:
                self._heads.clear()
            self._heads[head] = known
            return known

    def _parse(self, head: bytes) -> Head | None:
        headers: list[tuple[bytes, bytes]] = []
        parser = httptools.HttpRequestParser(_Collector(headers))
        try:
            parser.feed_data(head + _END_OF_HEAD)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            return None
        names = [name for name, _ in headers]
        if (
            not parser.should_keep_alive()
            or parser.should_upgrade()
            or names.count(b"content-length") != 1
            or not {b"transfer-encoding", b"expect", b"upgrade", b"trailer"}.isdisjoint(names)
            or self._check_browser({"method": "POST", "headers": headers}) is not None
        ):
            return None
        request_id, body_bytes, traceparent = read_headers(headers)
        if not 0 < body_bytes <= self._body_limit_bytes:
            return None
        line = _REQUEST_LINE.match(head + _END_OF_HEAD)
        path = "" if line is None else line[1].decode()
        if path == "/predict":
            return Head(
                body_bytes,
                partial(self._predict, request_id=request_id, traceparent=traceparent, new_pending=_Pending),
            )
        found = INFER_PATH.fullmatch(path)
        about = read_infer_headers(headers)
        if found is None or not _IS_PLAIN.fullmatch(path) or about.coding or about.accepted:
            return None
        model_id, version = found.groups()
        return Head(
            body_bytes, partial(self._infer, model_id, version, about, request_id, traceparent, _Pending)
        )

    def default_lines(self, headers: list[tuple[bytes, bytes]]) -> bytes:
        """uvicorn's own headers, such as the date, which it makes anew each second."""
        if headers is not self._default_headers:
            self._default_headers = headers
            self._default_lines = b"".join(b"%b: %b\r\n" % header for header in headers)
        return self._default_lines


class _Collector:
    """Takes the headers of one head, as uvicorn's protocol does."""

    def __init__(self, headers: list[tuple[bytes, bytes]]) -> None:
        self._headers = headers

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.lower(), value))


class _NoEvent:
    def set(self) -> None:
        """Nobody waits for it."""


class _InFlight:
    """Stands in uvicorn's ``cycle`` while an answer of the hot lane is on its way, so that a stop waits for it."""

    message_event = _NoEvent()
    scope = None

    def __init__(self) -> None:
        self.response_complete = True
        self.disconnected = False
        self.keep_alive = True


class _Pending:
    """An answer to come, for who drives its coroutine by hand.

    A future costs 0.4 µs to make and comes back by way of the event loop, which costs as much again; this calls
    ``wake`` at once.
    """

    __slots__ = ("_exception", "_result", "wake")

    def __init__(self) -> None:
        self._result: PredictionMade | None = None
        self._exception: Exception | None = None
        self.wake: Callable[[], None] | None = None

    def done(self) -> bool:
        return self._result is not None or self._exception is not None

    def set_result(self, result: PredictionMade) -> None:
        self._result = result
        if self.wake is not None:
            self.wake()

    def set_exception(self, exception: Exception) -> None:
        self._exception = exception
        if self.wake is not None:
            self.wake()

    def __await__(self) -> "Generator[_Pending, None, PredictionMade]":
        if not self.done():
            yield self
        if self._exception is not None:
            raise self._exception
        assert self._result is not None
        return self._result


class HotLane(BoundedHeads):
    """uvicorn's HTTP protocol with the hot lane before it: one instance a connection."""

    def __init__(self, *args: Any, lane: Lane, **options: Any) -> None:
        super().__init__(*args, **options)
        self._lane = lane
        self._in_flight = _InFlight()
        # The parser is between two messages, and none of them has led it elsewhere.
        self._is_between = True
        self._idle_since = 0.0
        self._head: Head | None = None
        self._held = bytearray()

    def data_received(self, data: bytes) -> None:
        if not self._in_flight.response_complete:
            self._hold(data)
            return
        cycle: Any = self.cycle
        if (
            self._is_between
            and data.startswith(_BEGINNINGS)
            and (cycle is None or cycle.response_complete)
            and not self.flow.write_paused
            and not self.transport.is_closing()
        ):
            end = data.find(_END_OF_HEAD)
            head = self._lane.read_head(data[:end]) if 0 < end <= _HEAD_LIMIT_BYTES else None
            if head is not None:
                missing_bytes = end + len(_END_OF_HEAD) + head.body_bytes - len(data)
                if not missing_bytes:
                    self._answer(head, data[end + len(_END_OF_HEAD) :])
                    return
                if missing_bytes > 0:
                    self._begin()
                    self._head = head
                    self._held += data[end + len(_END_OF_HEAD) :]
                    return
        super().data_received(data)

    def on_message_begin(self) -> None:
        self._is_between = False
        super().on_message_begin()

    def on_message_complete(self) -> None:
        self._is_between = not self.parser.should_upgrade()
        super().on_message_complete()

    def timeout_keep_alive_handler(self) -> None:
        # The hot lane leaves the timer running, which saves cancelling and making one for each request.
        self.timeout_keep_alive_task = None
        if not self._in_flight.response_complete:
            return
        left_s = self._idle_since + self.timeout_keep_alive - self.loop.time()
        if left_s > 0:
            self._arm(left_s)
        else:
            super().timeout_keep_alive_handler()

    def _arm(self, delay_s: float) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(delay_s, self.timeout_keep_alive_handler)

    def _begin(self) -> None:
        in_flight = self._in_flight
        in_flight.response_complete = in_flight.disconnected = False
        self.cycle = in_flight  # type: ignore[assignment]

    def _hold(self, data: bytes) -> None:
        """Keeps the rest of a body, or what comes before the answer, for later."""
        self._held += data
        head = self._head
        if head is not None and len(self._held) >= head.body_bytes:
            self._head = None
            body = bytes(self._held[: head.body_bytes])
            del self._held[: head.body_bytes]
            self._answer(head, body)
        elif len(self._held) > _HELD_BYTES:
            self.flow.pause_reading()

    def _answer(self, head: Head, body: bytes) -> None:
        work = head.answer(body, perf_counter())
        # Driven by hand: a task costs 3 µs, and most answers wait for nothing.
        try:
            awaited = work.send(None)
        except StopIteration as done:
            self._reply(done.value)
        except Exception:  # noqa: BLE001 - logged there; every request gets an answer
            self._break_down()
        else:
            self._begin()
            _resume_after(awaited, work, self)

    def _break_down(self) -> None:
        """What ASGI's errors come to with uvicorn."""
        log.exception("a request could not be answered: a defect on our side")
        self._in_flight.keep_alive = False
        self._reply((500, encode_error(InternalError(DEFECT)), [JSON]))

    def _reply(self, answer: Answer) -> None:
        in_flight = self._in_flight
        transport = self.transport
        state = self.server_state
        state.total_requests += 1
        if not transport.is_closing():
            status, payload, headers = answer
            # Joining pieces costs 0.2 µs, formatting them 0.7.
            pieces = [_STATUS_LINES[status], self._lane.default_lines(state.default_headers)]
            for name, value in headers:
                pieces += (name, b": ", value, b"\r\n")
            if not in_flight.keep_alive:
                pieces.append(b"connection: close\r\n")
            length = b"%d" % len(payload)
            pieces += (b"content-length: ", length, b"\r\n\r\n", payload)
            transport.write(b"".join(pieces))
            if not in_flight.keep_alive:
                transport.close()
        self._idle_since = self.loop.time()
        if self.timeout_keep_alive_task is None and not transport.is_closing():
            self._arm(self.timeout_keep_alive)
        if self._held:
            # Not at once: this may be within the run of a batch, which what was held would go into.
            self.loop.call_soon(self._take_up_held)
        elif not in_flight.response_complete:
            in_flight.response_complete = True
            self.flow.resume_reading()

    def _take_up_held(self) -> None:
        self._in_flight.response_complete = True
        held, self._held = bytes(self._held), bytearray()
        if not self.transport.is_closing():
            self.flow.resume_reading()
            self.data_received(held)


def _resume_after(
    awaited: "Future[Any] | _Pending", work: Coroutine[Any, Any, Answer], connection: HotLane
) -> None:
    """Goes on with the work when what it waits for is there."""

    def resume(_: "Future[Any] | None" = None) -> None:
        try:
            awaited = work.send(None)
        except StopIteration as done:
            connection._reply(done.value)
        except Exception:  # noqa: BLE001 - logged there; every request gets an answer
            connection._break_down()
        else:
            _resume_after(awaited, work, connection)

    if isinstance(awaited, _Pending):
        awaited.wake = resume
    else:  # a future, as in any asyncio task
        awaited._asyncio_future_blocking = False
        awaited.add_done_callback(resume)
