"""A TCP proxy that injects faults between a client and a real server."""

from __future__ import annotations

import asyncio
import math
import socket
import struct
import threading
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from types import TracebackType
from typing import Literal, Self
from urllib.parse import urlsplit

from servers import HOST, free_port

SWITCH_DEADLINE_S = 30.0
CHUNK_BYTES = 65_536
CHUNKS_IN_FLIGHT = 64
DEFAULT_PORTS = {"redis": 6379, "postgresql": 5432, "http": 80}

Mode = Literal["up", "down", "hang", "reset"]
Arrived = tuple[float, bytes]


class FaultProxy:
    """A proxy on `port` of 127.0.0.1 that passes bytes to the upstream, or not, as its mode says.

    It runs in a thread of its own, so sync and async tests use it alike. When a method that sets the mode
    returns, the mode is in force, for connections that exist already, too.
    """

    def __init__(self, upstream_host: str, upstream_port: int, *, port: int | None = None) -> None:
        self.port = port or free_port()
        self._upstream = (upstream_host, upstream_port)
        self._mode: Mode = "up"
        self._latency_s = 0.0
        self._changed = asyncio.Event()
        self._listener: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    @classmethod
    def in_front_of(cls, url: str) -> Self:
        """A proxy before the server that the URL names."""
        parts = urlsplit(url)
        return cls(parts.hostname or HOST, parts.port or DEFAULT_PORTS[parts.scheme])

    def redirect(self, url: str) -> str:
        """The same URL, through this proxy."""
        parts = urlsplit(url)
        login, at, _ = parts.netloc.rpartition("@")
        return parts._replace(netloc=f"{login}{at}{HOST}:{self.port}").geturl()

    def up(self) -> None:
        """Pass everything on at once."""
        self._switch("up")

    def latency(self, delay_ms: float) -> None:
        """Pass everything on, answers no earlier than the delay after they came from the upstream."""
        self._switch("up", delay_ms / 1000)

    def hang(self) -> None:
        """Let packets vanish: connections stay, new ones are accepted, nothing arrives on either side.

        As TCP sends lost packets again, what was sent meanwhile arrives once the mode is `up`.
        """
        self._switch("hang")

    def down(self) -> None:
        """Close every connection and refuse new ones, as if the server had stopped."""
        self._switch("down")

    def reset(self) -> None:
        """Cut every connection with RST, new ones as soon as they are made."""
        self._switch("reset")

    def start(self) -> None:
        """Return when the proxy listens, with mode `up`."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy", daemon=True)
        self._thread.start()
        try:
            self.up()
        except OSError:
            self.stop()
            raise

    def stop(self) -> None:
        """Close every connection and end the thread."""
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(SWITCH_DEADLINE_S)
        self._loop.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _call(self, work: Coroutine[None, None, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(SWITCH_DEADLINE_S)

    def _switch(self, mode: Mode, latency_s: float = 0.0) -> None:
        self._call(self._apply(mode, latency_s))

    async def _apply(self, mode: Mode, latency_s: float) -> None:
        self._mode, self._latency_s = mode, latency_s
        if mode == "down":
            if self._listener is not None:
                self._listener.close()
                self._listener = None
        elif self._listener is None:
            self._listener = await asyncio.start_server(self._serve, HOST, self.port)
        if mode in ("down", "reset"):
            self._cut(with_reset=mode == "reset")
        woken, self._changed = self._changed, asyncio.Event()
        woken.set()

    async def _close(self) -> None:
        await self._apply("down", 0.0)
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _cut(self, *, with_reset: bool) -> None:
        for writer in self._writers:
            _abort(writer, with_reset=with_reset)

    async def _serve(self, from_client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        async with self._held(to_client):
            await self._wait_to_pass(-math.inf)
            if self._mode in ("down", "reset"):
                _abort(to_client, with_reset=self._mode == "reset")
            if to_client.is_closing():
                return
            try:
                from_upstream, to_upstream = await asyncio.open_connection(*self._upstream)
            except OSError:
                _abort(to_client, with_reset=True)
                return
            async with self._held(to_upstream):
                if to_client.is_closing():
                    return
                requests: asyncio.Queue[Arrived] = asyncio.Queue(CHUNKS_IN_FLIGHT)
                answers: asyncio.Queue[Arrived] = asyncio.Queue(CHUNKS_IN_FLIGHT)
                try:
                    async with asyncio.TaskGroup() as relay:
                        relay.create_task(_receive(from_client, requests))
                        relay.create_task(self._deliver(requests, to_upstream, delayed=False))
                        relay.create_task(_receive(from_upstream, answers))
                        relay.create_task(self._deliver(answers, to_client, delayed=True))
                except* OSError:  # also "not connected", which is no ConnectionError
                    _abort(to_client, with_reset=True)
                    _abort(to_upstream, with_reset=True)

    @asynccontextmanager
    async def _held(self, writer: asyncio.StreamWriter) -> AsyncIterator[None]:
        self._writers.add(writer)
        try:
            yield
        finally:
            self._writers.discard(writer)
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()

    async def _deliver(
        self, arrived: asyncio.Queue[Arrived], sink: asyncio.StreamWriter, *, delayed: bool
    ) -> None:
        while True:
            arrived_at, data = await arrived.get()
            await self._wait_to_pass(arrived_at if delayed else -math.inf)
            if not data:
                if sink.can_write_eof():
                    sink.write_eof()
                return
            sink.write(data)
            await sink.drain()

    async def _wait_to_pass(self, arrived_at: float) -> None:
        """Return when the mode of the day lets pass what arrived then; a change of mode is heeded at once."""
        while (wait_s := self._wait_s(arrived_at)) > 0:
            with suppress(TimeoutError):
                async with asyncio.timeout(None if math.isinf(wait_s) else wait_s):
                    await self._changed.wait()

    def _wait_s(self, arrived_at: float) -> float:
        if self._mode == "hang":
            return math.inf
        return arrived_at + self._latency_s - asyncio.get_running_loop().time()


async def _receive(source: asyncio.StreamReader, arrived: asyncio.Queue[Arrived]) -> None:
    """Put all chunks, the empty one at the end included, into the queue with their times."""
    data = b"not yet at the end"
    while data:
        data = await source.read(CHUNK_BYTES)
        await arrived.put((asyncio.get_running_loop().time(), data))


def _abort(writer: asyncio.StreamWriter, *, with_reset: bool) -> None:
    if with_reset and not writer.is_closing():
        # Lingering for zero seconds makes the kernel send RST instead of FIN.
        sock: socket.socket = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
