"""One connection to one Redis, shared by all callers: an asyncio protocol over hiredis's parser.

What is asked within one tick of the event loop leaves in one write; answers reach the futures of those who
asked, first in first out. A question costs a future and no task, no timer and no lock (docs/adr/0009).
"""

import asyncio
import random
import socket
from collections import deque
from collections.abc import Awaitable, Callable
from ssl import SSLContext
from typing import Any, Final, NamedTuple, cast

import hiredis

# To connect and log in, and for each question on the way to it.
_CONNECT_S: Final = 1.0
_ANSWER_S: Final = 1.0
_FIRST_RETRY_S: Final = 0.05
_LAST_RETRY_S: Final = 1.0
_IDLE_BEFORE_PROBE_S: Final = 30
# With the commands of answered batches; more are let go of by each new one.
_BATCHES_KEPT: Final = 16
_NOTHING: Final = object()

# uvloop raises RuntimeError where asyncio raises OSError: on a write to what the other side has closed.
FAULTS: Final = (OSError, TimeoutError, RuntimeError, hiredis.HiredisError)

Refusal = Callable[[str], Exception]


def pack(*parts: bytes) -> bytes:
    """A command as Redis reads it."""
    return b"*%d\r\n" % len(parts) + b"".join([b"$%d\r\n%b\r\n" % (len(part), part) for part in parts])


class Connection(asyncio.Protocol):
    """An open connection; answers go to the futures in ``waiting``, in order."""

    def __init__(self) -> None:
        self.waiting: deque[asyncio.Future[Any]] = deque()
        self.has_answered = False
        # Told once, when the connection has ended by itself.
        self.on_end: Callable[[Connection, BaseException], None] | None = None
        self._reader = hiredis.Reader(notEnoughData=_NOTHING)
        self._transport: asyncio.Transport | None = None
        self._nonsense: BaseException | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        sock: socket.socket | None = transport.get_extra_info("socket")
        if sock is not None and sock.family != socket.AF_UNIX:
            # Finds out that the other side has gone, and keeps what lies between from forgetting an idle connection.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if hasattr(socket, "TCP_KEEPIDLE"):  # not on every system
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _IDLE_BEFORE_PROBE_S)

    def data_received(self, data: bytes) -> None:
        self.has_answered = True
        reader, waiting = self._reader, self.waiting
        try:
            reader.feed(data)
            while (reply := reader.gets()) is not _NOTHING:
                answer = waiting.popleft()
                # The caller may have gone; its answer is then nobody's.
                if not answer.done():
                    answer.set_result(reply)
        except hiredis.HiredisError as error:
            self._break_off(error)
        except IndexError:
            self._break_off(ConnectionError("it answered what nobody had asked"))

    def connection_lost(self, exc: Exception | None) -> None:
        error = self._nonsense or exc or ConnectionError("it closed the connection")
        on_end, self.on_end = self.on_end, None
        if on_end is not None:
            on_end(self, error)
        else:
            for answer in self.waiting:
                if not answer.done():
                    answer.set_exception(ConnectionError(str(error)))

    @property
    def talked_nonsense(self) -> bool:
        """Whether it ended because what it said is no answer of a Redis."""
        return self._nonsense is not None

    @property
    def is_closing(self) -> bool:
        return self._transport is None or self._transport.is_closing()

    def write(self, data: bytes) -> None:
        """Sends the bytes; on a connection that ends, ``on_end`` tells of it soon."""
        if self._transport is None or self._transport.is_closing():
            return
        try:
            self._transport.write(data)
        except (OSError, RuntimeError):
            self._transport.abort()

    async def ask(self, *parts: bytes) -> Any:
        """The answer to one command of a connection that no lane uses yet.

        Raises ConnectionError when it is an error, and TimeoutError when there is none in time.
        """
        answer = asyncio.get_running_loop().create_future()
        self.waiting.append(answer)
        self.write(pack(*parts))
        if self.is_closing:
            raise ConnectionError("it closed the connection")
        async with asyncio.timeout(_ANSWER_S):
            reply = await answer
        if isinstance(reply, hiredis.ReplyError):
            raise ConnectionError(str(reply))
        return reply

    def abort(self) -> None:
        """Ends the connection; nobody is told."""
        self.on_end = None
        self.waiting = deque()
        if self._transport is not None:
            self._transport.abort()

    def _break_off(self, error: BaseException) -> None:
        self._nonsense = error
        if self._transport is not None:
            self._transport.abort()


class Login(NamedTuple):
    """How connections begin: TLS or none, then commands that all have to succeed."""

    tls: SSLContext | None
    commands: tuple[tuple[bytes, ...], ...]


async def connect(place: str | tuple[str, int], login: Login) -> Connection:
    """A connection to a socket file, or to a host and port, that is logged in. Raises one of FAULTS."""
    loop = asyncio.get_running_loop()
    connection = Connection()
    try:
        async with asyncio.timeout(_CONNECT_S):
            if isinstance(place, str):
                await loop.create_unix_connection(lambda: connection, place)
            else:
                host, port = place
                name = host if login.tls is not None else None
                await loop.create_connection(
                    lambda: connection, host, port, ssl=login.tls, server_hostname=name
                )
            for command in login.commands:
                await connection.ask(*command)
    except BaseException:
        connection.abort()
        raise
    return connection


class _Batch:
    """What was asked within one tick: since which question of the connection, and until when it can wait."""

    __slots__ = ("answer_by", "commands", "first", "had_last_look")

    def __init__(self, answer_by: float, first: int) -> None:
        self.answer_by = answer_by
        self.first = first
        self.commands: list[bytes] = []
        self.had_last_look = False


class Lane:
    """Asks one Redis, over a connection that is opened when it is first needed, and again when it was lost.

    A question is answered or refused within the deadline. A failure in any way ends the connection, so no
    answer can ever reach another caller. From then on callers are refused at once, until a task in the
    background finds that Redis answers within the deadline again; a lane that does not ``recover`` lets the
    next caller try. The deadline is stretched by a fifth before an answer is given up, so that a pause of this
    process is not taken for one of Redis.
    """

    def __init__(
        self,
        dial: Callable[[], Awaitable[Connection]],
        deadline_s: float,
        refusal: Refusal,
        *,
        recovers: bool = True,
        on_failure: Callable[[], None] | None = None,
    ) -> None:
        self.down: str | None = None
        self._dial = dial
        self._deadline_s = deadline_s
        self._refusal = refusal
        self._recovers = recovers
        self._on_failure = on_failure
        self._connection: Connection | None = None
        self._opening: asyncio.Task[None] | None = None
        self._recovery: asyncio.Task[None] | None = None
        self._waiting: deque[asyncio.Future[Any]] = deque()
        # What was asked in this tick, or since the connection is being opened.
        self._commands: list[bytes] = []
        self._sent = 0
        self._batches: deque[_Batch] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._fires_at = 0.0
        self._loop: asyncio.AbstractEventLoop

    def ask(self, key: bytes, command: bytes, patience_s: float = 0.0) -> "asyncio.Future[Any]":
        """The answer to come: a reply, which may be an error of Redis, or what ``refusal`` makes.

        Raises that at once while Redis is known to be down. All questions of this tick have the patience of
        the first. The key, which is in the command already, is for lanes beside this one.
        """
        if self.down is not None:
            raise self._refusal(self.down)
        if not self._commands:
            self._begin(patience_s)
        self._commands.append(command)
        answer = self._loop.create_future()
        self._waiting.append(answer)
        return answer

    def give_up(self, error: BaseException) -> None:
        """Ends the connection; whoever waits is refused."""
        why = str(error) or type(error).__name__
        if self._connection is not None:
            self._connection.abort()
            self._connection = None
        if self._opening is not None:
            self._opening.cancel()
            self._opening = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        waiting, self._waiting = self._waiting, deque()
        self._commands = []
        self._sent = 0
        self._batches.clear()
        if self.down is None:
            if self._recovers:
                self.down = why
                self._recovery = self._loop.create_task(self._recover())
            if self._on_failure is not None:
                self._on_failure()
        for answer in waiting:
            if not answer.done():
                refusal = self._refusal(why)
                refusal.__cause__ = error
                answer.set_exception(refusal)

    def renew(self) -> None:
        """Has the next question go over a new connection, unless some are under way."""
        if self._connection is not None and not self._waiting:
            self._connection.abort()
            self._connection = None

    async def close(self) -> None:
        """Ends the connection and the background task; whoever waits, or asks later, is refused."""
        recovery, opening = self._recovery, self._opening
        self.down = "it was closed"
        for task in (recovery, opening):
            if task is not None:
                task.cancel()
                await asyncio.wait([task])
        self.give_up(ConnectionError(self.down))

    def _begin(self, patience_s: float) -> None:
        self._loop = loop = asyncio.get_running_loop()
        answer_by = loop.time() + max(self._deadline_s, patience_s)
        if len(self._batches) >= _BATCHES_KEPT:
            self._forget_answered()
        self._batches.append(_Batch(answer_by, self._sent))
        if self._timer is not None and answer_by < self._fires_at:
            # It waits for a question that had more patience, and may be answered.
            self._timer.cancel()
            self._timer = None
        if self._timer is None:
            self._set_timer(answer_by)
        if self._connection is not None:
            loop.call_soon(self._flush)
        elif self._opening is None:
            self._opening = loop.create_task(self._open())

    def _flush(self) -> None:
        # Without a connection, which may be lost by now, the questions wait for the next one.
        if self._connection is None or not self._commands:
            return
        commands, self._commands = self._commands, []
        self._batches[-1].commands = commands
        self._sent += len(commands)
        self._connection.write(b"".join(commands))

    async def _open(self) -> None:
        try:
            connection = await self._dial()
        except FAULTS as error:
            self._opening = None
            self.give_up(error)
        else:
            self._opening = None
            self._use(connection)

    def _use(self, connection: Connection) -> None:
        connection.waiting = self._waiting
        connection.has_answered = False
        connection.on_end = self._on_end
        self._connection = connection
        self._flush()
        if connection.is_closing and self._connection is connection:
            self._on_end(connection, ConnectionError("it closed the connection"))

    def _on_end(self, connection: Connection, error: BaseException) -> None:
        if connection is not self._connection:
            return
        self._connection = None
        if not self._waiting:
            # Redis closes idle connections, and all when it restarts: the next caller opens another one.
            return
        if connection.talked_nonsense or not connection.has_answered:
            self.give_up(error)
            return
        # That alone is no failure while a new connection gets the answers in time: all that is asked over a lane
        # may be repeated without harm.
        self._forget_answered()
        commands = [command for batch in self._batches for command in batch.commands] + self._commands
        self._commands = commands[-len(self._waiting) :]
        again = _Batch(self._batches[0].answer_by, 0)
        self._batches = deque([again])
        self._sent = 0
        self._waiting = deque(self._waiting)
        self._opening = self._loop.create_task(self._open())

    def _forget_answered(self) -> None:
        answered = self._sent + len(self._commands) - len(self._waiting)
        while len(self._batches) > 1 and self._batches[1].first <= answered:
            self._batches.popleft()

    def _look_at_the_clock(self) -> None:
        """One timer for all: it fires when the oldest question is due, not for each question."""
        self._timer = None
        if not self._waiting:
            self._batches.clear()
            return
        self._forget_answered()
        oldest = self._batches[0]
        now = self._loop.time()
        if now < oldest.answer_by:
            self._set_timer(oldest.answer_by)
        elif not oldest.had_last_look:
            # A timer of a loop that stood still fires before the loop sees what arrived meanwhile. So it first
            # sets another one, and the loop reads in between.
            oldest.had_last_look = True
            self._set_timer(now + self._deadline_s / 5)
        else:
            self.give_up(TimeoutError(f"no answer within {self._deadline_s * 1000:g} ms"))

    def _set_timer(self, at: float) -> None:
        self._fires_at = at
        self._timer = self._loop.call_at(at, self._look_at_the_clock)

    async def _recover(self) -> None:
        pause_s = _FIRST_RETRY_S
        while True:
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))  # noqa: S311 - spreads processes out
            try:
                connection = await self._dial()
                try:
                    async with asyncio.timeout(self._deadline_s * 1.2):
                        await connection.ask(b"PING")
                except BaseException:
                    connection.abort()
                    raise
            except FAULTS:
                pause_s = min(2 * pause_s, _LAST_RETRY_S)
            else:
                self.down = None
                self._use(connection)
                return
