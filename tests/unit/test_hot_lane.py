"""The hot lane beside uvicorn's own way: the same bytes in, in whatever pieces, the same bytes out."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import httptools
import msgspec
import onnx_models
import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from inprocess import Server
from uvicorn.server import ServerState

from phoenix_ml.infrastructure.http.app import build_app
from phoenix_ml.infrastructure.http.calls import PredictionCalls
from phoenix_ml.infrastructure.http.hot_lane import HotLane, Lane
from phoenix_ml.infrastructure.http.infer import InferCalls
from phoenix_ml.infrastructure.http.origins import browser_check
from phoenix_ml.infrastructure.http.protocol import BoundedHeads

T = TypeVar("T")
DEADLINE_S = 30.0
KEEP_ALIVE_S = 60
BODY_LIMIT_BYTES = 100_000


class MemoryTransport(asyncio.Transport):
    """Keeps what is written; the other end is the test."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.is_closed = False
        self.is_paused = False

    def write(self, data: Any) -> None:
        assert not self.is_closed
        self.written += bytes(data)

    def is_closing(self) -> bool:
        return self.is_closed

    def close(self) -> None:
        self.is_closed = True

    def abort(self) -> None:
        self.is_closed = True

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def pause_reading(self) -> None:
        self.is_paused = True

    def resume_reading(self) -> None:
        self.is_paused = False


class SteppedLoop(asyncio.SelectorEventLoop):
    """An event loop whose time goes on only when the test says so."""

    now_s = 0.0

    def time(self) -> float:
        return self.now_s


class Responses:
    """The responses in a stream of bytes, each as status, headers and body."""

    def __init__(self, stream: bytes) -> None:
        self.found: list[tuple[int, dict[bytes, bytes], bytes]] = []
        self._headers: dict[bytes, bytes] = {}
        self._body = b""
        while stream:
            parser = self._parser = httptools.HttpResponseParser(self)
            end = stream.index(b"\r\n\r\n") + 4
            self._headers, self._body = {}, b""
            parser.feed_data(stream[:end])
            length = int(self._headers.get(b"content-length", b"0"))
            if length:
                parser.feed_data(stream[end : end + length])
            if parser.get_status_code() == 100:
                self.found.append((100, {}, b""))
            stream = stream[end + length :]

    def on_header(self, name: bytes, value: bytes) -> None:
        assert name not in self._headers
        self._headers[name] = value

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        if self._parser.get_status_code() != 100:
            self.found.append((self._parser.get_status_code(), self._headers, self._body))


class Platform:
    """A server's protocols over transports in memory: the hot lane, and uvicorn's without it."""

    def __init__(self, server: Server) -> None:
        self.server = server
        calls = PredictionCalls(
            server.predict,
            server.live,
            server.journal,
            server.meter,
            body_limit_bytes=BODY_LIMIT_BYTES,
            batch_limit=10,
        )
        infer_calls = InferCalls(server.infer, server.live, server.meter, body_limit_bytes=BODY_LIMIT_BYTES)
        app = build_app(server.phoenix, server.features, server.live, calls, infer_calls, lambda: "ok")
        self._config = uvicorn.Config(
            app,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            timeout_keep_alive=KEEP_ALIVE_S,
        )
        self._config.load()
        lane = Lane(calls, infer_calls, browser_check(server.settings), BODY_LIMIT_BYTES)
        self.kinds: dict[str, Callable[..., BoundedHeads]] = {
            "hot": partial(HotLane, lane=lane),
            "uvicorn": BoundedHeads,
        }

    def connect(self, kind: str) -> tuple[BoundedHeads, MemoryTransport]:
        """To be called in a running loop."""
        state = ServerState()
        state.default_headers = [(b"date", b"Mon, 23 Nov 2026 00:00:00 GMT")]
        protocol = self.kinds[kind](self._config, state, {})
        transport = MemoryTransport()
        protocol.connection_made(transport)
        return protocol, transport

    def send(self, kind: str, pieces: Sequence[bytes]) -> tuple[list[Any], bool]:
        """The responses to bytes that come in these pieces, comparable, and whether the connection was closed."""

        async def send() -> tuple[list[Any], bool]:
            protocol, transport = self.connect(kind)
            for piece in pieces:
                if transport.is_closed:
                    break
                if piece:
                    protocol.data_received(piece)
                await asyncio.sleep(0)
            await eventually(lambda: is_idle(protocol) or transport.is_closed)
            protocol._unset_keepalive_if_required()
            was_closed = transport.is_closed
            if not was_closed:
                protocol.connection_lost(None)
            return [comparable(*response) for response in Responses(transport.written).found], was_closed

        return asyncio.run(send())


def is_idle(protocol: BoundedHeads) -> bool:
    """Whether no answer is due, as far as what came is complete."""
    cycle = protocol.cycle
    if cycle is None or cycle.response_complete:
        return True
    incomplete = getattr(protocol, "_head", None) is not None or getattr(cycle, "more_body", False)
    return incomplete and not protocol.pipeline


async def eventually(holds: Callable[[], bool]) -> None:
    give_up_at = time.monotonic() + DEADLINE_S
    while not holds():
        assert time.monotonic() < give_up_at, "it did not happen in time"
        await asyncio.sleep(0.001)


def comparable(status: int, headers: dict[bytes, bytes], body: bytes) -> Any:
    """The response without what differs from one answer to the next."""
    kept = {name: value for name, value in headers.items() if name != b"content-length"}
    given = kept.get(b"x-request-id", b"")
    if not given.startswith(b"mine"):
        kept.pop(b"x-request-id", None)
    if headers.get(b"content-type") != b"application/json":
        return status, kept, body
    content = msgspec.json.decode(body)
    content.pop("latency_ms", None)
    content.pop("prediction_id", None)
    return status, kept, content


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    folder = tmp_path_factory.mktemp("hot") / "data"
    folder.mkdir()
    server = Server(folder, journal_limit_bytes=1 << 30)
    server.serve(onnx_models.linear_regressor(2), batches=True)
    yield Platform(server)
    server.close()


def post(body: bytes, *headers: bytes, target: bytes = b"/predict", length: int | None = None) -> bytes:
    lines = [b"POST " + target + b" HTTP/1.1", b"host: localhost", *headers]
    lines.append(b"content-length: %d" % (len(body) if length is None else length))
    return b"\r\n".join([*lines, b"", body])


GOOD = b'{"model_id":"risk","features":[1.5,2.5],"request_id":"mine-1"}'
ODD = {
    "chunked": b"POST /predict HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
    + b"%x\r\n%b\r\n0\r\n\r\n" % (len(GOOD), GOOD),
    "chunked and a length": b"POST /predict HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n"
    + b"content-length: 5\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(GOOD), GOOD),
    "two lengths": post(GOOD, b"content-length: %d" % len(GOOD)),
    "two lengths that differ": post(GOOD, b"content-length: 3"),
    "no length": b"POST /predict HTTP/1.1\r\nhost: localhost\r\n\r\n",
    "length of nothing": post(b""),
    "length with a sign": b"POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-length: +5\r\n\r\nabcde",
    "length in letters": b"POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-length: five\r\n\r\nabcde",
    "length beyond the limit": post(b"", length=BODY_LIMIT_BYTES + 1),
    "large, yet within the limit": post(b" " * 80_000 + GOOD),
    "expects a go-ahead": post(GOOD, b"expect: 100-continue"),
    "will close": post(GOOD, b"connection: close"),
    "keeps alive": post(GOOD, b"connection: keep-alive"),
    "asks for an upgrade": post(GOOD, b"connection: upgrade", b"upgrade: websocket"),
    "asks for HTTP/2": post(GOOD, b"connection: upgrade, http2-settings", b"upgrade: h2c"),
    "HTTP/1.0": post(GOOD).replace(b"HTTP/1.1", b"HTTP/1.0"),
    "HTTP/1.0 that keeps alive": post(GOOD, b"connection: keep-alive").replace(b"HTTP/1.1", b"HTTP/1.0"),
    "no host": post(GOOD).replace(b"host: localhost\r\n", b""),
    "a host that is not ours": post(GOOD).replace(b"localhost", b"evil.example"),
    "from a page of another site": post(GOOD, b"origin: https://evil.example"),
    "a header's name with a space": post(GOOD, b"bad name: x"),
    "a header without a colon": post(GOOD, b"nothing"),
    "a header's value with a NUL": post(GOOD, b"x-a: a\0b"),
    "a header that goes on in the next line": post(GOOD, b"x-a: a\r\n b"),
    "bare line feeds": post(GOOD).replace(b"\r\n", b"\n"),
    "header names in capitals": post(GOOD).replace(b"content-length", b"CONTENT-LENGTH"),
    "spaces around values": post(GOOD, b"x-request-id:   mine-2  "),
    "an id in the header": post(b'{"model_id":"risk","features":[1,2]}', b"x-request-id: mine-3"),
    "an id that is no header": post(b'{"model_id":"risk","features":[1,2]}', b"x-request-id: \xff\xfe"),
    "a long id": post(b'{"model_id":"risk","features":[1,2]}', b"x-request-id: mine-" + b"4" * 300),
    "a query": post(GOOD, target=b"/predict?x=1"),
    "a whole URL": post(GOOD, target=b"http://localhost/predict"),
    "escapes in the path": post(GOOD, target=b"/pr%65dict"),
    "a longer path": post(GOOD, target=b"/predictable"),
    "GET": post(GOOD).replace(b"POST", b"GET"),
    "a method in small letters": post(GOOD).replace(b"POST", b"post"),
    "no HTTP": b"hello\r\n\r\n",
    "a large head": post(GOOD, b"x-a: " + b"a" * 5000),
    "a head that is too large": post(GOOD, b"x-a: " + b"a" * 70_000),
    "an empty line first": b"\r\n" + post(GOOD),
    "broken JSON": post(b"{"),
    "a model that is not there": post(b'{"model_id":"none","features":[1,2]}'),
    "too few features": post(b'{"model_id":"risk","features":[1]}'),
    "an entity that is not there": post(b'{"model_id":"risk","entity_id":"nobody"}'),
}


@pytest.mark.parametrize("request_bytes", ODD.values(), ids=ODD)
def test_an_odd_request_is_answered_as_by_uvicorn(platform: Platform, request_bytes: bytes) -> None:
    """A client must not be able to tell which lane it is in, however odd it is; a plain one follows each."""
    stream = [request_bytes, post(GOOD)]

    assert platform.send("hot", stream) == platform.send("uvicorn", stream)


def test_plain_requests_never_enter_uvicorns_parser(platform: Platform) -> None:
    """Else all of these tests would compare uvicorn with itself."""

    async def ask() -> tuple[bool, int]:
        protocol, transport = platform.connect("hot")
        untouched = protocol.parser
        protocol.parser = None  # type: ignore[assignment]
        for _ in range(3):
            protocol.data_received(post(GOOD))
            await eventually(lambda: is_idle(protocol))
        protocol._unset_keepalive_if_required()
        return untouched is not None, len(Responses(transport.written).found)

    assert asyncio.run(ask()) == (True, 3)


REQUESTS = st.sampled_from(
    [
        post(GOOD),
        post(b'{"model_id":"risk","features":[3,4],"request_id":"mine-5"}'),
        post(b"{"),
        post(GOOD, b"x-a: " + b"a" * 100),
        ODD["chunked"],
        ODD["a query"],
        ODD["expects a go-ahead"],
        b"GET /health/live HTTP/1.1\r\nhost: localhost\r\n\r\n",
        post(GOOD, target=b"/nowhere"),
    ]
)


@settings(max_examples=150, deadline=None)
@given(st.lists(REQUESTS, min_size=1, max_size=6), st.data())
def test_requests_in_any_pieces_are_answered_in_their_order(
    platform: Platform, requests: list[bytes], data: st.DataObject
) -> None:
    """A network cuts where it likes, and clients send the next request before they have the answer."""
    stream = b"".join(requests)
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=8).map(sorted))
    pieces = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]

    answers, was_closed = platform.send("hot", pieces)

    expected, _ = platform.send("uvicorn", requests)
    without_go_ahead = [answer for answer in answers if answer[0] != 100]
    assert without_go_ahead == [answer for answer in expected if answer[0] != 100]
    assert not was_closed


def test_requests_that_come_while_a_batch_gathers_are_answered_after_it(platform: Platform) -> None:
    """The answers of a batch go out from within its run, and what was held then must not go into it."""

    def request(connection: int, number: int) -> bytes:
        return post(b'{"model_id":"risk","features":[1,2],"request_id":"mine-%d-%d"}' % (connection, number))

    async def ask() -> list[list[bytes]]:
        connections = [platform.connect("hot") for _ in range(8)]
        for turn in range(3):  # the first of them makes it a crowd
            for number in range(2):
                for connection, (protocol, _) in enumerate(connections):
                    protocol.data_received(request(connection, 2 * turn + number))
            for _, transport in connections:
                count = 2 * turn + 2
                await eventually(lambda t=transport, c=count: t.written.count(b"HTTP/1.1 200") == c)  # type: ignore[misc]
        for protocol, _ in connections:
            protocol._unset_keepalive_if_required()
        answers = [Responses(transport.written).found for _, transport in connections]
        return [[headers[b"x-request-id"] for _, headers, _ in found] for found in answers]

    expected = [[b"mine-%d-%d" % (connection, number) for number in range(6)] for connection in range(8)]
    assert asyncio.run(ask()) == expected


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[Platform]:
    """A model whose answer takes another thread, so that things can happen meanwhile."""
    (tmp_path / "data").mkdir()
    server = Server(tmp_path / "data")
    server.serve(onnx_models.slow_model(2, loops=64), batches=True)
    yield Platform(server)
    server.close()


SLOW = post(b'{"model_id":"risk","features":[0.5,0.5]}')


def run(work: Callable[[], Awaitable[T]]) -> T:
    async def main() -> T:
        return await work()

    return asyncio.run(main())


@pytest.mark.parametrize("kind", ["hot", "uvicorn"])
def test_a_stop_waits_for_the_answer_and_then_closes(slow: Platform, kind: str) -> None:
    """What was accepted is answered; the client learns that this connection ends."""

    async def ask() -> tuple[bool, list[Any], bool]:
        protocol, transport = slow.connect(kind)
        protocol.data_received(SLOW)
        await asyncio.sleep(0)
        protocol.shutdown()
        was_closed = transport.is_closed
        await eventually(lambda: transport.is_closed)
        found = Responses(transport.written).found
        return was_closed, [(status, headers[b"connection"]) for status, headers, _ in found], True

    assert run(ask) == (False, [(200, b"close")], True)


@pytest.mark.parametrize("kind", ["hot", "uvicorn"])
def test_a_stop_closes_a_connection_on_which_nothing_goes_on(platform: Platform, kind: str) -> None:
    """Else a client that keeps its connection would hold up every stop."""

    async def ask() -> bool:
        protocol, transport = platform.connect(kind)
        protocol.data_received(post(GOOD))
        await eventually(lambda: is_idle(protocol) and bool(transport.written))
        protocol.shutdown()
        protocol._unset_keepalive_if_required()
        return transport.is_closed

    assert run(ask) is True


@pytest.mark.parametrize("kind", ["hot", "uvicorn"])
def test_a_client_that_leaves_gets_nothing_and_its_answer_is_on_record(slow: Platform, kind: str) -> None:
    """A write to a connection that is gone must break nothing."""
    before = len(slow.server.recorded())

    async def ask() -> bytes:
        protocol, transport = slow.connect(kind)
        protocol.data_received(SLOW)
        await asyncio.sleep(0)
        transport.close()
        protocol.connection_lost(None)
        await eventually(lambda: len(slow.server.recorded()) > before)
        await asyncio.sleep(0)
        return transport.written

    assert run(ask) == b""


@pytest.mark.parametrize("kind", ["hot", "uvicorn"])
def test_what_comes_before_the_answer_waits_for_it(slow: Platform, kind: str) -> None:
    """Answers leave in the order of the requests, and a client cannot fill the memory meanwhile."""
    flood = [post(b'{"model_id":"risk","features":[0.5,0.5]}' + b" " * 8000)] * 20

    async def ask() -> tuple[bool, int]:
        protocol, transport = slow.connect(kind)
        protocol.data_received(SLOW)
        paused = False
        for piece in flood:
            protocol.data_received(piece)
            paused = paused or transport.is_paused
            if paused:
                break
        await eventually(lambda: is_idle(protocol) and bool(transport.written))
        protocol._unset_keepalive_if_required()
        return paused, {status for status, _, _ in Responses(transport.written).found} == {200}

    assert run(ask) == (True, True)


@pytest.mark.parametrize("kind", ["hot", "uvicorn"])
def test_an_idle_connection_is_closed_in_time_and_no_earlier(platform: Platform, kind: str) -> None:
    """The keep-alive time counts from the last answer; a connection in use stays."""
    loop = SteppedLoop()

    async def ask() -> tuple[list[bool], int]:
        protocol, transport = platform.connect(kind)

        async def is_closed_after(idle_s: float) -> bool:
            loop.now_s += idle_s
            for _ in range(5):
                await asyncio.sleep(0)
            return transport.is_closed

        closed = []
        for count in (1, 2):
            protocol.data_received(post(GOOD))
            while transport.written.count(b"HTTP/1.1 200") < count or not is_idle(protocol):
                await asyncio.sleep(0)
            closed.append(await is_closed_after(KEEP_ALIVE_S - 1))
        closed.append(await is_closed_after(1.1))
        return closed, len(Responses(transport.written).found)

    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        assert runner.run(ask()) == ([False, False, True], 2)


def test_a_client_that_does_not_read_its_answers_is_uvicorns_affair(platform: Platform) -> None:
    """uvicorn waits until the client has read what was written; the hot lane would pile answers up."""

    async def ask() -> tuple[bytes, bool]:
        protocol, transport = platform.connect("hot")
        protocol.pause_writing()
        protocol.data_received(post(GOOD))
        for _ in range(20):
            await asyncio.sleep(0)
        written = transport.written
        protocol.resume_writing()
        await eventually(lambda: bool(transport.written) and is_idle(protocol))
        protocol._unset_keepalive_if_required()
        return written, True

    assert run(ask) == (b"", True)


def test_a_head_that_is_too_large_after_an_answer_that_was_waited_for(platform: Platform) -> None:
    """What the hot lane leaves behind on a connection must be what uvicorn's parser expects."""
    head, _, body = post(GOOD).partition(b"\r\n\r\n")
    large = post(GOOD, b"x-a: " + b"a" * 70_000)
    pieces = [head + b"\r\n\r\n", body, large[:40_000], large[40_000:66_000], large[66_000:]]

    answers, was_closed = platform.send("hot", pieces)

    assert ([answer[0] for answer in answers], was_closed) == ([200, 431], True)
    assert (answers, was_closed) == platform.send("uvicorn", pieces)


def test_a_body_that_comes_later_than_its_head_stays_in_the_hot_lane(platform: Platform) -> None:
    """Most client libraries send the two in two pieces."""

    async def ask() -> list[int]:
        protocol, transport = platform.connect("hot")
        protocol.parser = None  # type: ignore[assignment]
        head, _, body = post(GOOD).partition(b"\r\n\r\n")
        for piece in (head + b"\r\n\r\n", body[:5], body[5:]):
            protocol.data_received(piece)
        await eventually(lambda: is_idle(protocol))
        protocol._unset_keepalive_if_required()
        return [status for status, _, _ in Responses(transport.written).found]

    assert run(ask) == [200]
