"""A small closed-loop HTTP load generator, and the CPU time of other processes."""

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, cast

import uvloop


class Load(NamedTuple):
    """What one run measured: requests, wall seconds, sorted latencies in ms, answers other than 2xx."""

    requests: int
    seconds: float
    latencies_ms: list[float]
    failures: int

    def quantile_ms(self, share: float) -> float:
        return self.latencies_ms[min(len(self.latencies_ms) - 1, int(share * len(self.latencies_ms)))]


class _Connection(asyncio.Protocol):
    """Sends a request, waits for its answer, sends the next: as raw bytes, to leave the CPU to the server."""

    def __init__(self, requests: Sequence[bytes], first: int, until: float) -> None:
        self._requests = requests
        self._next = first
        self._until = until
        self._buffer = b""
        self._sent_at = 0.0
        self.latencies_ms: list[float] = []
        self.failures = 0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance
        self._send()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head_end = self._buffer.find(b"\r\n\r\n")
        if head_end < 0:
            return
        head = self._buffer[:head_end].lower()
        at = head.index(b"content-length:") + 15
        length = int(head[at:].split(b"\r", 1)[0])
        if len(self._buffer) < head_end + 4 + length:
            return
        self._buffer = self._buffer[head_end + 4 + length :]
        now = time.perf_counter()
        self.latencies_ms.append((now - self._sent_at) * 1000)
        self.failures += head[9:10] != b"2"
        if now < self._until:
            self._send()
        else:
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_result(None)

    def _send(self) -> None:
        self._sent_at = time.perf_counter()
        self._transport.write(self._requests[self._next % len(self._requests)])
        self._next += 1


def post(path: str, body: bytes) -> bytes:
    """An HTTP/1.1 request as bytes."""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


def run_load(port: int, requests: Sequence[bytes], connections: int, seconds: float) -> Load:
    """The requests in turn, over so many connections, each with one request in flight."""

    async def run() -> Load:
        loop = asyncio.get_running_loop()
        started = time.perf_counter()
        opened = [
            (
                await loop.create_connection(
                    lambda n=n: _Connection(requests, n * 7919, started + seconds),  # type: ignore[misc]
                    "127.0.0.1",
                    port,
                )
            )[1]
            for n in range(connections)
        ]
        await asyncio.gather(*(connection.done for connection in opened))
        latencies_ms = sorted(ms for connection in opened for ms in connection.latencies_ms)
        failures = sum(connection.failures for connection in opened)
        return Load(len(latencies_ms), time.perf_counter() - started, latencies_ms, failures)

    return uvloop.run(run())


def cpu_seconds(pid: int) -> float:
    """CPU time of all threads of a process so far, in nanosecond resolution."""
    return (
        sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9
    )
