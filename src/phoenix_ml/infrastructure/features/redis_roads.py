"""From a URL to the Redis that holds a key: one server, the master that sentinels name, or a cluster's node.

Sentinels and clusters are asked where to go over connections of our own, so that their reads cost no more than
those of a single server (docs/adr/0009); redis-py reads the URLs and their TLS options.
"""

import asyncio
import random
from binascii import crc_hqx
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import Any, Final, NamedTuple, Protocol
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

import hiredis
from redis.asyncio.connection import AbstractConnection, ConnectionPool, SSLConnection
from redis.exceptions import RedisError

from phoenix_ml.domain.errors import Misconfigured
from phoenix_ml.infrastructure.features.redis_lane import (
    FAULTS,
    Connection,
    Lane,
    Login,
    Refusal,
    connect,
    pack,
)

_SLOTS: Final = 16384
_MOST_REDIRECTIONS: Final = 4
_FIRST_PAUSE_S: Final = 0.05
_LAST_PAUSE_S: Final = 1.0
_ASKING: Final = pack(b"ASKING")
_PING: Final = pack(b"PING")

Place = str | tuple[str, int]


class Road(Protocol):
    """The way to whichever Redis holds a key."""

    @property
    def down(self) -> str | None:
        """Why nobody is let through at present, if that is so."""
        ...

    def ask(self, key: bytes, command: bytes, patience_s: float = 0.0) -> Awaitable[Any]:
        """The reply to a command that is about that key, an error of Redis among them."""
        ...

    async def check(self, patience_s: float) -> Any:
        """The reply of whoever has to answer for all keys to be reached."""
        ...

    def renew(self) -> None:
        """Has the next question find its way anew, where none is under way."""
        ...

    async def close(self) -> None: ...


class Destination(NamedTuple):
    """What a URL says: where to begin, how to log in, and the service that sentinels know."""

    kind: str
    places: tuple[Place, ...]
    login: Login
    sentinel_login: Login
    service: str

    @property
    def address(self) -> str:
        """For messages: it holds no password."""
        where = ",".join(p if isinstance(p, str) else f"{p[0]}:{p[1]}" for p in self.places)
        return f"{where}/{self.service}" if self.service else where


def read_url(url: str) -> Destination:
    """What the URL says. Raises Misconfigured, without the URL's password."""
    try:
        scheme, _, kind = urlsplit(url).scheme.partition("+")
        if kind:
            return _read_many(url, scheme, kind)
        connection = _as_redis_py_reads(url)
        path = getattr(connection, "path", None)
        place: Place = path if path else _host_and_port(connection)
        login = _login(connection)
    except (ValueError, TypeError, RedisError, OSError) as error:
        raise Misconfigured(f"the feature store's URL is not usable: {error}", setting="features") from error
    return Destination("", (place,), login, login, "")


def open_road(
    destination: Destination,
    deadline_s: float,
    refusal: Refusal,
    *,
    recovers: bool,
    on_failure: Callable[[], None] | None = None,
) -> Road:
    """The road that the URL names; it connects when it is first used."""
    if destination.kind == "cluster":
        return Cluster(destination, deadline_s, refusal, recovers=recovers, on_failure=on_failure)
    dial: Callable[[], Awaitable[Connection]]
    if destination.kind == "sentinel":
        dial = _Sentinels(destination).connect_to_master
    else:
        (place,) = destination.places
        dial = partial(connect, place, destination.login)
    return _OneLane(dial, deadline_s, refusal, recovers=recovers, on_failure=on_failure)


class _OneLane(Lane):
    """The road to a Redis that holds all keys."""

    async def check(self, patience_s: float) -> Any:
        return await self.ask(b"", _PING, patience_s)


class _Sentinels:
    """Finds the master of a service."""

    def __init__(self, destination: Destination) -> None:
        self._destination = destination
        self._places = list(destination.places)

    async def connect_to_master(self) -> Connection:
        """Raises one of FAULTS."""
        connection = await connect(await self._ask_for_master(), self._destination.login)
        try:
            role = await connection.ask(b"ROLE")
            if role[0] != b"master":
                # A sentinel that has not heard of the failover yet.
                raise ConnectionError(f"what the sentinels call the master is a {role[0].decode()}")
        except BaseException:
            connection.abort()
            raise
        return connection

    async def _ask_for_master(self) -> Place:
        service = self._destination.service
        problems = []
        for place in list(self._places):
            try:
                connection = await connect(place, self._destination.sentinel_login)
                try:
                    found = await connection.ask(b"SENTINEL", b"GET-MASTER-ADDR-BY-NAME", service.encode())
                finally:
                    connection.abort()
            except FAULTS as error:
                problems.append(str(error) or type(error).__name__)
                continue
            if found is None:
                problems.append(f"it knows no service {service!r}")
                continue
            # Whoever answered is asked first the next time.
            self._places.remove(place)
            self._places.insert(0, place)
            host, port = found
            return host.decode(), int(port)
        raise ConnectionError(f"no sentinel names the master of {service!r}: {'; '.join(problems)}")


class Cluster:
    """The road to the nodes of a cluster: a lane to each master, found by the slot of the key.

    What is wrong with one node concerns its keys alone. The map of slots is read again, in the background,
    when a node answers that a slot has moved, and for as long as a lane is down.
    """

    down: str | None = None

    def __init__(
        self,
        destination: Destination,
        deadline_s: float,
        refusal: Refusal,
        *,
        recovers: bool,
        on_failure: Callable[[], None] | None,
    ) -> None:
        self._destination = destination
        self._deadline_s = deadline_s
        self._refusal = refusal
        self._recovers = recovers
        self._on_failure = on_failure
        self._lanes: dict[Place, Lane] = {}
        self._lane_of_slot: list[Lane | None] = []
        self._reading: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._closing: set[asyncio.Task[None]] = set()

    async def ask(self, key: bytes, command: bytes, patience_s: float = 0.0) -> Any:
        """The reply of the node that has the key's slot, wherever it has moved to."""
        if not self._lane_of_slot:
            await self._map_within(max(self._deadline_s, patience_s))
        for _ in range(_MOST_REDIRECTIONS):
            if self.down is not None:
                raise self._refusal(self.down)
            slot = slot_of(key)
            lane = self._lane_of_slot[slot]
            if lane is None:
                self._read_map()
                raise self._refusal(f"no node of the cluster holds slot {slot}")
            reply = await lane.ask(key, command, patience_s)
            while isinstance(reply, hiredis.ReplyError) and (to := _redirected(reply, "ASK")) is not None:
                # The slot is on its way to another node, which has this key already.
                there = self._lane_to(to)
                let_in, answer = there.ask(key, _ASKING), there.ask(key, command)
                await let_in
                reply = await answer
            if not isinstance(reply, hiredis.ReplyError) or _redirected(reply, "MOVED") is None:
                return reply
            self._read_map()
            await self._map_within(max(self._deadline_s, patience_s))
        raise self._refusal(f"the cluster sent {_MOST_REDIRECTIONS} times elsewhere")

    async def check(self, patience_s: float) -> Any:
        """A PING's reply, once all masters have answered theirs; the first refusal of one that did not."""
        if not self._lane_of_slot:
            await self._map_within(max(self._deadline_s, patience_s))
        if self.down is not None:
            raise self._refusal(self.down)
        lanes = {lane for lane in self._lane_of_slot if lane is not None}
        replies = [lane.ask(b"", _PING, patience_s) for lane in lanes]
        return (await asyncio.gather(*replies))[0]

    def renew(self) -> None:
        for lane in self._lanes.values():
            lane.renew()

    async def close(self) -> None:
        self.down = "it was closed"
        for task in (self._reading, self._watching, *self._closing):
            if task is not None:
                task.cancel()
                await asyncio.wait([task])
        for lane in list(self._lanes.values()):
            await lane.close()

    def _lane_to(self, place: Place) -> Lane:
        lane = self._lanes.get(place)
        if lane is None:
            self._lanes[place] = lane = Lane(
                partial(connect, place, self._destination.login),
                self._deadline_s,
                self._refusal,
                recovers=self._recovers,
                on_failure=self._watch,
            )
        return lane

    async def _map_within(self, patience_s: float) -> None:
        """Returns when the map of slots was read. Raises what ``refusal`` makes."""
        if self.down is not None:
            raise self._refusal(self.down)
        reading = self._read_map()
        loop = asyncio.get_running_loop()
        done = loop.create_future()

        def end(_: object = None) -> None:
            if not done.done():
                done.set_result(None)

        reading.add_done_callback(end)
        timer = loop.call_later(patience_s * 1.2, end)
        try:
            await done
        finally:
            timer.cancel()
        if not reading.done():
            raise self._refusal(f"no answer within {patience_s * 1000:g} ms")
        if not self._lane_of_slot:
            why = self.down or ("it was closed" if reading.cancelled() else str(reading.exception()))
            raise self._refusal(why)

    def _read_map(self) -> "asyncio.Task[None]":
        if self._reading is None or self._reading.done():
            self._reading = asyncio.get_running_loop().create_task(self._read_slots())
            # A caller that waits for it hears of it; else the next one tries again.
            self._reading.add_done_callback(lambda task: task.cancelled() or task.exception())
        return self._reading

    async def _read_slots(self) -> None:
        problems = []
        known = list(self._lanes)
        random.shuffle(known)
        for place in dict.fromkeys([*known, *self._destination.places]):
            try:
                connection = await connect(place, self._destination.login)
                try:
                    ranges = await connection.ask(b"CLUSTER", b"SLOTS")
                finally:
                    connection.abort()
            except FAULTS as error:
                problems.append(str(error) or type(error).__name__)
                continue
            if ranges:
                self._follow(ranges, place)
                return
            problems.append("it knows of no slots")
        raise ConnectionError(f"no node of the cluster tells who holds which keys: {'; '.join(problems)}")

    def _follow(self, ranges: Iterable[list[Any]], told_by: Place) -> None:
        lane_of_slot: list[Lane | None] = [None] * _SLOTS
        for first, last, (host, port, *_), *_replicas in ranges:
            # A node that does not know its own name means the one that was asked.
            lane = self._lane_to((host.decode() if host else told_by[0], int(port)))
            lane_of_slot[first : last + 1] = [lane] * (last + 1 - first)
        self._lane_of_slot = lane_of_slot
        in_use = {lane for lane in lane_of_slot if lane is not None}
        for place, lane in list(self._lanes.items()):
            if lane not in in_use:
                del self._lanes[place]
                closing = asyncio.get_running_loop().create_task(lane.close())
                self._closing.add(closing)
                closing.add_done_callback(self._closing.discard)

    def _watch(self) -> None:
        if self._on_failure is not None:
            self._on_failure()
        if self._watching is None or self._watching.done():
            self._watching = asyncio.get_running_loop().create_task(self._watch_map())

    async def _watch_map(self) -> None:
        pause_s = _FIRST_PAUSE_S
        while True:
            await asyncio.wait([self._read_map()])
            if all(lane.down is None for lane in self._lanes.values()):
                return
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))  # noqa: S311 - spreads processes out
            pause_s = min(2 * pause_s, _LAST_PAUSE_S)


def slot_of(key: bytes) -> int:
    """The slot of a key: what stands in its first braces alone decides, if something does."""
    start = key.find(b"{")
    if start >= 0:
        end = key.find(b"}", start + 1)
        if end > start + 1:
            key = key[start + 1 : end]
    return crc_hqx(key, 0) % _SLOTS


def _redirected(error: hiredis.ReplyError, how: str) -> Place | None:
    """Where the error sends, if it is of that kind."""
    kind, _, rest = str(error).partition(" ")
    if kind != how:
        return None
    host, _, port = rest.rpartition(" ")[2].rpartition(":")
    return host, int(port)


def _read_many(url: str, scheme: str, kind: str) -> Destination:
    parts = urlsplit(url)
    credentials, at, hosts = parts.netloc.rpartition("@")
    query = parse_qsl(parts.query, strict_parsing=bool(parts.query))
    service, path = "", parts.path
    if kind == "sentinel":
        service, _, path = path.removeprefix("/").partition("/")
        if not service:
            raise ValueError("name the service that the sentinels know: redis+sentinel://HOST:PORT,…/SERVICE")
    elif kind != "cluster":
        raise ValueError(f"{kind!r} is neither sentinel nor cluster")
    elif path.strip("/") not in ("", "0"):
        raise ValueError("a cluster has database 0 alone")
    default_port = 26379 if kind == "sentinel" else 6379
    places: list[Place] = []
    for part in hosts.split(","):
        host = urlsplit(f"//{part}")
        if not host.hostname:
            raise ValueError("a host is missing")
        places.append((_checked_host(host.hostname), host.port or default_port))
    own = [(name, value) for name, value in query if not name.startswith("sentinel_")]
    connection = _as_redis_py_reads(
        f"{scheme}://{credentials}{at}localhost/{path.strip('/')}?{urlencode(own)}"
    )
    asked = {name.removeprefix("sentinel_"): value for name, value in query if name.startswith("sentinel_")}
    if unknown := sorted(set(asked) - {"username", "password"}):
        raise ValueError(f"sentinel_{unknown[0]} is no option; sentinel_username and sentinel_password are")
    login = _login(connection)
    sentinel_login = Login(login.tls, _auth(asked.get("username"), asked.get("password")))
    return Destination(kind, tuple(places), login, sentinel_login, unquote(service))


def _as_redis_py_reads(url: str) -> AbstractConnection:
    pool = ConnectionPool.from_url(url, protocol=2)
    return pool.make_connection()  # type: ignore[no-any-return,no-untyped-call]


def _host_and_port(connection: Any) -> tuple[str, int]:
    return _checked_host(connection.host), int(connection.port)


def _checked_host(host: str) -> str:
    host.encode("idna")
    return host


def _login(connection: Any) -> Login:
    tls = connection.ssl_context.get() if isinstance(connection, SSLConnection) else None
    commands = list(_auth(connection.username, connection.password))
    if connection.client_name:
        commands.append((b"CLIENT", b"SETNAME", connection.client_name.encode()))
    if connection.db:
        commands.append((b"SELECT", str(connection.db).encode()))
    return Login(tls, tuple(commands))


def _auth(username: str | None, password: str | None) -> tuple[tuple[bytes, ...], ...]:
    if not username and not password:
        return ()
    names = (username.encode(),) if username else ()
    return ((b"AUTH", *names, (password or "").encode()),)
