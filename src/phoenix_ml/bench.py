"""Load on a running server, closed or at a fixed rate, and what it took; ``phoenix-ml bench`` and our own benchmarks.

The generator is one thread with raw protocols on uvloop, as whatever it takes is missing to a server on the
same machine: 18 µs of CPU a request, where an empty echo on uvicorn costs 30.
"""

import asyncio
import itertools
import ssl
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from math import ceil, floor
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast
from urllib.parse import urlsplit

import msgspec
import uvloop
from msgspec import Struct

from phoenix_ml.domain.errors import InvalidField

PATIENCE_S = 30.0
_RECONNECT_AFTER_S = 0.1
_HEAD_START_S = 0.2
_END_OF_HEAD = b"\r\n\r\n"


class Load(NamedTuple):
    """What one run measured: answers, wall seconds, sorted latencies in ms, and what failed, by what it was.

    ``refusal`` are the code and the message of the first answer that was an error, as far as it had them.
    """

    requests: int
    seconds: float
    latencies_ms: list[float]
    errors: Counter[str]
    refusal: str = ""

    @property
    def failures(self) -> int:
        """Answers other than 2xx, and requests without an answer."""
        return self.errors.total()

    def quantile_ms(self, share: float) -> float:
        """Of all that were answered, whatever the status; NaN where none was."""
        if not self.latencies_ms:
            return float("nan")
        return self.latencies_ms[min(len(self.latencies_ms) - 1, int(share * len(self.latencies_ms)))]


class Target(NamedTuple):
    """Where a server listens, and what stands before its paths."""

    host: str
    port: int
    tls: bool = False
    prefix: str = ""

    @classmethod
    def of(cls, url: str) -> "Target":
        """Raises InvalidField for what is not the URL of a web server."""
        try:
            parts = urlsplit(url)
            tls = parts.scheme == "https"
            port = parts.port or (443 if tls else 80)
        except ValueError as exc:
            raise InvalidField(f"{url!r} is not a URL: {exc}", field="url") from exc
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InvalidField(f"{url!r}: write http://HOST:PORT or https://HOST:PORT", field="url")
        return cls(parts.hostname, port, tls, parts.path.rstrip("/"))

    def post(self, path: str, body: bytes) -> bytes:
        """A request as it goes over the wire."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        head = (
            f"POST {self.prefix}{path} HTTP/1.1\r\nHost: {host}:{self.port}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}"
        )
        return head.encode() + _END_OF_HEAD + body


def run_load(
    target: Target,
    requests: Sequence[bytes],
    connections: int,
    seconds: float,
    rate: float | None = None,
    patience_s: float = PATIENCE_S,
) -> Load:
    """The requests in turn, over so many connections, each with one in flight.

    Without a rate a connection asks again as soon as it is answered. With one, so many requests a second are due
    at even distances, whether earlier ones are answered or not, and a latency counts from when its request was
    due: a server that halts for a second is charged with every request of that second.
    """
    return uvloop.run(_run(target, requests, connections, seconds, rate, patience_s))


def cpu_seconds(pid: int) -> float:
    """CPU time of all threads of a process so far, in nanosecond resolution (Linux)."""
    return (
        sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9
    )


def listening_pids(port: int) -> list[int]:
    """The processes of this machine that hold the listening socket of a TCP port, as far as we may see (Linux)."""
    if sys.platform != "linux":
        return []
    sockets = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with suppress(FileNotFoundError):
            for line in Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                    sockets.add(f"socket:[{fields[9]}]")
    return sorted(int(folder.name) for folder in Path("/proc").glob("[0-9]*") if sockets & _links(folder))


def _links(process: Path) -> set[str]:
    found = set()
    # Others' processes, and such as end meanwhile.
    with suppress(PermissionError, FileNotFoundError, ProcessLookupError):
        for descriptor in (process / "fd").iterdir():
            with suppress(FileNotFoundError):
                found.add(str(descriptor.readlink()))
    return found


class Run(Struct, frozen=True):
    """One run as it is shown; what cannot be known is None. CPU is that of so many processes that serve."""

    connections: int
    rate: float | None
    seconds: float
    requests: int
    requests_per_second: float
    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    errors: dict[str, int]
    refusal: str
    cpu_us_per_request: float | None
    cpu_processes: int


def run_on(
    target: Target, requests: Sequence[bytes], connections: int, seconds: float, rate: float | None = None
) -> Run:
    """One load, and the CPU time that it took the server where that is on this machine."""
    is_here = target.host in ("localhost", "::1") or target.host.startswith("127.")
    pids = listening_pids(target.port) if is_here else []
    before = sum(map(cpu_seconds, pids))
    load = run_load(target, requests, connections, seconds, rate)
    spent = sum(map(cpu_seconds, pids)) - before
    is_known = bool(pids) and load.requests > 0 and pids == listening_pids(target.port)
    p50, p95, p99 = (round(load.quantile_ms(q), 3) if load.requests else None for q in (0.5, 0.95, 0.99))
    return Run(
        connections=connections,
        rate=rate,
        seconds=round(load.seconds, 3),
        requests=load.requests,
        requests_per_second=round(load.requests / load.seconds, 1),
        p50_ms=p50,
        p95_ms=p95,
        p99_ms=p99,
        errors=dict(load.errors),
        refusal=load.refusal,
        cpu_us_per_request=round(spent / load.requests * 1e6, 1) if is_known else None,
        cpu_processes=len(pids),
    )


class _Pace(Protocol):
    """Says what a connection that has nothing in flight does next."""

    def free(self, connection: "_Connection", now: float) -> None: ...

    def lost(self, connection: "_Connection") -> None: ...


class _Closed:
    """Ask again at once, until the time is over."""

    def __init__(self, until: float) -> None:
        self._until = until

    def free(self, connection: "_Connection", now: float) -> None:
        if now < self._until:
            connection.send(now)
        else:
            connection.close()

    def lost(self, connection: "_Connection") -> None:
        pass


class _Open:
    """Ask when a request is due; what finds no free connection waits, and its latency counts."""

    def __init__(self) -> None:
        self.waiting: deque[float] = deque()
        self._idle: list[_Connection] = []
        self._is_over = False

    def free(self, connection: "_Connection", now: float) -> None:
        if self.waiting:
            connection.send(self.waiting.popleft())
        elif self._is_over:
            connection.close()
        else:
            self._idle.append(connection)

    def lost(self, connection: "_Connection") -> None:
        with suppress(ValueError):  # it was not idle
            self._idle.remove(connection)

    def release(self, due: Sequence[float]) -> None:
        for at in due:
            if self._idle:
                self._idle.pop().send(at)
            else:
                self.waiting.append(at)

    def end(self) -> None:
        self._is_over = True
        for connection in self._idle:
            connection.close()


class _Tally:
    def __init__(self) -> None:
        self.latencies_s: list[float] = []
        self.errors: Counter[str] = Counter()
        self.refusal = ""
        self.last_at = 0.0


class _Connection(asyncio.Protocol):
    """One request in flight, as raw bytes."""

    def __init__(self, requests: Iterator[bytes], pace: _Pace, tally: _Tally) -> None:
        self._requests = requests
        self._pace = pace
        self._tally = tally
        self._buffer = b""
        self._since: float | None = None
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance
        self._pace.free(self, time.perf_counter())

    def data_received(self, data: bytes) -> None:
        if self._buffer:
            data = self._buffer + data
        end = data.find(_END_OF_HEAD)
        head = data[:end].lower()
        if end < 0 or not _is_whole(data, head):
            self._buffer = data
            return
        now = time.perf_counter()
        self._buffer = b""
        tally, since = self._tally, self._since
        if since is None:
            tally.errors["an answer that nobody asked for"] += 1
            self._transport.abort()
            return
        self._since = None
        tally.latencies_s.append(now - since)
        tally.last_at = now
        if data[9:10] != b"2":
            tally.errors[f"status {data[9:12].decode(errors='replace')}"] += 1
            tally.refusal = tally.refusal or _read_refusal(data[len(head) + len(_END_OF_HEAD) :])
        if b"\r\nconnection: close" in head:
            self.close()
        elif not self._transport.is_closing():
            self._pace.free(self, now)

    def connection_lost(self, exc: Exception | None) -> None:
        self._pace.lost(self)
        if self._since is not None:
            self._tally.errors["the connection was closed before the answer"] += 1
        if not self.ended.done():
            self.ended.set_result(None)

    def send(self, since: float) -> None:
        """The next request; its latency counts from ``since``."""
        self._since = since
        self._transport.write(next(self._requests))

    def close(self) -> None:
        self._transport.close()

    def give_up(self) -> None:
        if self._since is not None:
            self._since = None
            self._tally.errors["no answer in time"] += 1
        self._transport.abort()


def _read_refusal(body: bytes) -> str:
    """Code and message of an error of ours; empty for any other."""
    try:
        error = msgspec.json.decode(body)["error"]
        return f"{error['code']} {error['message']}"
    except (msgspec.DecodeError, UnicodeDecodeError, TypeError, KeyError):
        return ""


def _is_whole(data: bytes, head: bytes) -> bool:
    """Whether the answer with this head, in small letters, is all there. Of chunks only the last is looked for."""
    at = head.find(b"\r\ncontent-length:")
    if at >= 0:
        return len(data) >= len(head) + len(_END_OF_HEAD) + int(head[at + 17 :].split(b"\r", 1)[0])
    return b"\r\ntransfer-encoding: chunked" not in head or data.endswith(b"\r\n0\r\n\r\n")


async def _run(
    target: Target,
    requests: Sequence[bytes],
    connections: int,
    seconds: float,
    rate: float | None,
    patience_s: float,
) -> Load:
    loop = asyncio.get_running_loop()
    tally = _Tally()
    # At a rate all connections are made first, or the first requests would be charged with that.
    begun = time.perf_counter() + (0.0 if rate is None else _HEAD_START_S)
    until = begun + seconds
    paced = _Open()
    pace: _Pace = _Closed(until) if rate is None else paced
    turns = itertools.cycle(requests)
    options: dict[str, Any] = {"ssl": ssl.create_default_context()} if target.tls else {}

    async def client() -> None:
        """A connection until the end, made anew where the server closes it, as proxies do now and then."""
        while (now := time.perf_counter()) < until:
            try:
                _, connection = await loop.create_connection(
                    lambda: _Connection(turns, pace, tally), target.host, target.port, **options
                )
            except OSError as exc:
                tally.errors[f"no connection: {exc.strerror or exc}"] += 1
                await asyncio.sleep(_RECONNECT_AFTER_S)
                continue
            done, _ = await asyncio.wait([connection.ended], timeout=until - now + patience_s)
            if not done:
                connection.give_up()

    clients = [asyncio.create_task(client()) for _ in range(connections)]
    if rate is not None:
        await asyncio.to_thread(_keep_pace, loop, paced, rate, begun, seconds)
        paced.end()
    await asyncio.gather(*clients)
    if paced.waiting:
        tally.errors["not sent in time: no connection was free"] += len(paced.waiting)
    latencies_ms = sorted(latency * 1000 for latency in tally.latencies_s)
    # A server that is too slow for the rate is still answering when no more requests are due.
    took = max(tally.last_at, until) - begun
    return Load(len(latencies_ms), took, latencies_ms, tally.errors, tally.refusal)


def _keep_pace(
    loop: asyncio.AbstractEventLoop, paced: _Open, rate: float, begun: float, seconds: float
) -> None:
    """Releases requests when they are due: in a thread, as the loop's own timers are a millisecond coarse.

    Each of them, also where this thread wakes up only after the end.
    """
    # Rounded first: 1.1 s at 10 a second are 11, not 12 because of the eleventh that a float leaves over.
    total = ceil(round(seconds * rate, 6))
    released = 0
    while released < total:
        due = min(total, floor((time.perf_counter() - begun) * rate) + 1)
        if due > released:
            loop.call_soon_threadsafe(paced.release, [begun + turn / rate for turn in range(released, due)])
            released = due
        time.sleep(max(0.0, begun + min(released / rate, seconds) - time.perf_counter()))
