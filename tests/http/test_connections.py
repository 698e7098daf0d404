"""What comes over raw connections: heads without end, clients that leave in the middle, many requests on one."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from contextlib import suppress

import pytest
from lanes import Lane, RoutesLane, ok, unique
from phoenix_server import PhoenixServer
from servers import wait_until

pytestmark = pytest.mark.system

LIMIT_BYTES = 64 * 1024
MUCH_BYTES = 16 * 1024 * 1024
BODY = b'{"model_id":"abc","features":[1,2,3]}'


def request(method: str, path: str, body: bytes = b"", *headers: str) -> bytes:
    """The bytes of a request."""
    head = [f"{method} {path} HTTP/1.1", "host: localhost", f"content-length: {len(body)}", *headers]
    return "\r\n".join([*head, "", ""]).encode() + body


@pytest.fixture
def connection(server: PhoenixServer) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as opened:
        yield opened


def answers(connection: socket.socket, count: int) -> list[tuple[int, bytes]]:
    """Status and body of so many answers; fewer where the server closes before."""
    found: list[tuple[int, bytes]] = []
    received = b""
    while len(found) < count:
        head, end, rest = received.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        if end and length and len(rest) >= int(length[1]):
            found.append((int(head[9:12]), rest[: int(length[1])]))
            received = rest[int(length[1]) :]
        elif chunk := receive(connection):
            received += chunk
        else:
            break
    return found


def receive(connection: socket.socket) -> bytes:
    """What comes next; nothing where the server has closed."""
    try:
        return connection.recv(65_536)
    except ConnectionResetError:  # it closed before it had read all that was sent
        return b""


def send_without_end(connection: socket.socket, piece: bytes) -> int:
    """How many bytes the server took, sent piece by piece, before it closed; at most MUCH_BYTES."""
    sent = 0
    with suppress(ConnectionError):
        while sent < MUCH_BYTES:
            connection.sendall(piece)
            sent += len(piece)
    return sent


def is_too_large(answer: tuple[int, bytes]) -> bool:
    """Whether an answer is the documented refusal of a head."""
    status, body = answer
    error = json.loads(body)["error"]
    return (status, error["code"], error["details"]) == (
        431,
        "headers_too_large",
        {"limit_bytes": LIMIT_BYTES},
    )


ENDLESS = {
    "headers": (b"GET /health/live HTTP/1.1\r\n", b"x-some: value\r\n" * 1000),
    "header value": (b"GET /health/live HTTP/1.1\r\nx-some: ", b"v" * 16_000),
    "header name": (b"POST /predict HTTP/1.1\r\n", b"n" * 16_000),
    "path": (b"GET /", b"p" * 16_000),
    "first line": (b"", b"\r\n" * 8_000),
}


@pytest.mark.parametrize(("start", "piece"), ENDLESS.values(), ids=ENDLESS.keys())
def test_a_head_without_end_is_broken_off(
    connection: socket.socket, http: Lane, start: bytes, piece: bytes
) -> None:
    """A few connections could otherwise fill the memory, and no limit of bodies would see it."""
    connection.sendall(start)
    sent = send_without_end(connection, piece)
    found = answers(connection, 1)

    assert sent < MUCH_BYTES
    assert [is_too_large(answer) for answer in found] == [True] * bool(start)
    assert receive(connection) == b""
    assert ok(http.request("GET", "/health/live")) == {"status": "ok"}


@pytest.mark.parametrize(
    ("method", "path", "body"), [("GET", "/health/live", b""), ("POST", "/predict", BODY)]
)
def test_a_head_over_the_limit_is_refused_in_our_form(
    connection: socket.socket, method: str, path: str, body: bytes
) -> None:
    """It came at once and is complete, so nothing but its size is wrong."""
    connection.sendall(request(method, path, body, "x-some: " + "v" * LIMIT_BYTES))

    found = answers(connection, 2)

    assert [is_too_large(answer) for answer in found] == [True]


@pytest.mark.parametrize("url_bytes", [LIMIT_BYTES, LIMIT_BYTES + 5_000])
def test_a_url_over_the_limit_is_refused_as_a_head_is(connection: socket.socket, url_bytes: int) -> None:
    """Its sender should hear that it is too long, not that it is no HTTP."""
    connection.sendall(b"GET /%b HTTP/1.0\r\n\r\n" % (b"p" * (url_bytes - 1)))

    found = answers(connection, 2)

    assert [is_too_large(answer) for answer in found] == [True]


NO_HTTP = {
    "unknown method": b"BREW / HTTP/1.1\r\nhost: localhost\r\n\r\n",
    "no HTTP": b"hello\r\n\r\n",
    "TLS": bytes.fromhex("16030100c8010000c40303") + bytes(190),
    "header without a colon": b"GET / HTTP/1.1\r\nhost localhost\r\n\r\n",
    "two lengths": b"POST /predict HTTP/1.1\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\n{}",
    "path that is not ASCII": "GET /features/é HTTP/1.1\r\nhost: localhost\r\n\r\n".encode(),
}


@pytest.mark.parametrize("sent", NO_HTTP.values(), ids=NO_HTTP.keys())
def test_what_is_no_http_is_refused_in_our_form(connection: socket.socket, sent: bytes) -> None:
    """Clients read every refusal alike, and an id leads to it."""
    connection.sendall(sent)
    received = b""
    while chunk := receive(connection):
        received += chunk
    head, _, body = received.partition(b"\r\n\r\n")
    headers = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:])

    assert head.startswith(b"HTTP/1.1 400 ")
    assert headers[b"content-type"] == b"application/json"
    assert headers[b"connection"] == b"close"
    assert len(headers[b"x-request-id"]) == 36
    assert int(headers[b"content-length"]) == len(body)
    assert json.loads(body)["error"]["code"] == "malformed_body"


def test_a_head_just_below_the_limit_is_read(connection: socket.socket) -> None:
    """Large cookies and tokens are legal."""
    connection.sendall(request("POST", "/predict", BODY, "x-some: " + "v" * (LIMIT_BYTES - 200)))

    ((status, _),) = answers(connection, 1)

    assert status == 200


def test_a_connection_that_is_kept_counts_each_head_by_itself(connection: socket.socket) -> None:
    """A pool sends millions of requests over one connection; the sum of their heads is no offence."""
    header = "x-some: " + "v" * (LIMIT_BYTES // 2)
    statuses = []

    for _ in range(10):
        connection.sendall(request("POST", "/predict", BODY, header))
        statuses += [status for status, _ in answers(connection, 1)]
        connection.sendall(request("GET", "/health/live", b"", header))
        statuses += [status for status, _ in answers(connection, 1)]

    assert statuses == [200] * 20


@pytest.mark.parametrize("piece_bytes", [1_000, 100_000, MUCH_BYTES], ids=["small", "large", "one"])
def test_bodies_do_not_count(connection: socket.socket, piece_bytes: int) -> None:
    """Head, body and the next head may come in any pieces."""
    padded = BODY + b" " * 1_000_000
    chunked = b"POST /predict HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
    chunks = b"%x\r\n%b\r\n0\r\n\r\n" % (len(padded), padded)
    header = "x-some: " + "v" * (LIMIT_BYTES // 2)
    sent = request("POST", "/predict", padded, header) + chunked + chunks
    sent += request("POST", "/predict", BODY, header)

    for start in range(0, len(sent), piece_bytes):
        connection.sendall(sent[start : start + piece_bytes])
    found = answers(connection, 3)

    assert [status for status, _ in found] == [200] * 3


def test_pipelined_heads_do_not_add_up(connection: socket.socket) -> None:
    """All of them may come in one piece."""
    connection.sendall(request("GET", "/health/live", b"", "x-some: " + "v" * 1_000) * 200)

    found = answers(connection, 200)

    assert [status for status, _ in found] == [200] * 200


@pytest.mark.parametrize("end", [b"", b"\r\n\r\n"], ids=["without end", "complete"])
def test_the_refusal_waits_for_the_answers_before_it(connection: socket.socket, end: bytes) -> None:
    """A client takes the first answer for that to its first request."""
    before = request("POST", "/predict", BODY) + request("GET", "/models") * 5

    with suppress(ConnectionError):
        connection.sendall(before + b"GET / HTTP/1.1\r\nx-some: " + b"v" * 400_000 + end)
        connection.sendall(b"v" * LIMIT_BYTES * 2)
    found = answers(connection, 8)

    assert [status for status, _ in found] == [200] * 6 + [431]
    assert is_too_large(found[-1])


@pytest.mark.parametrize(
    "start", [b"PUT /features/trailing", b"POST /predict", b"GET /health/live"], ids=["put", "predict", "get"]
)
def test_trailers_without_end_are_broken_off(connection: socket.socket, start: bytes) -> None:
    """They come after the body, and the parser keeps them as it keeps headers."""
    head = start + b" HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
    connection.sendall(head + b"2\r\n{}\r\n0\r\n")

    sent = send_without_end(connection, b"x-some: value\r\n" * 1000)

    assert sent < MUCH_BYTES


LEAVERS = {
    "features": ("PUT", "/features/leaver", "content-type: application/json"),
    "routing": ("PUT", "/models/abc/routing", "content-type: application/json"),
    "upload": ("POST", "/models", "content-type: multipart/form-data; boundary=x"),
}


@pytest.mark.parametrize("how", ["end", "reset"])
@pytest.mark.parametrize(("method", "path", "header"), LEAVERS.values(), ids=LEAVERS.keys())
def test_a_client_that_leaves_in_the_middle_is_no_defect_of_ours(
    server: PhoenixServer, method: str, path: str, header: str, how: str
) -> None:
    """A traceback each time a laptop is closed hides the one that matters."""
    request_id = unique("leaver")
    body = b'--x\r\ncontent-disposition: form-data; name="model"\r\n\r\n{'
    whole = request(method, path, body + b" " * 1000, header, f"x-request-id: {request_id}")
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        if how == "reset":
            linger_not = b"\x01\0\0\0\0\0\0\0"
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger_not)
        connection.sendall(whole[:-1000])

    wait_until(lambda: request_id in server.log(), 30, "the request is logged")
    said = [record for record in server.log_records() if record.get("request_id") == request_id]

    assert [(record["level"], record["message"]) for record in said] == [("INFO", f"{method} {path} 499")]


@pytest.mark.parametrize("path", ["/predict", "/predict/batch", "/feedback", "/features"])
@pytest.mark.parametrize("lane", ["routes"], indirect=True)
def test_a_client_that_leaves_another_server_than_ours_is_no_defect_either(
    lane: RoutesLane, caplog: pytest.LogCaptureFixture, path: str
) -> None:
    """There the loaded calls are ordinary routes, which have to answer something."""
    statuses = lane.leave("POST", path)

    assert statuses == [499]
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == []
