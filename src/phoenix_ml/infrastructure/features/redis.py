"""Features in Redis, in a layout that other systems can write: one hash an entity, one text a feature.

``features:<entity>`` holds each feature under its name: floats and integers in decimal, ``true`` and
``false``, strings as they are. A string that would read as something else, such as ``12`` or
``true``, is written as a JSON string, in quotes. ``_updated_at`` and ``_at:<feature>`` hold milliseconds
since the epoch; a read always asks for all of them, which costs less than telling whether it must.

Reads share one connection and their round trips, since redis-py's pool costs about 100 µs a command and a
new connection for each caller at once: what is asked while Redis answers goes out together, next.
"""

import asyncio
import random
import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from hashlib import sha1
from itertools import islice
from math import isfinite, isnan
from typing import Any, Final, NamedTuple

import msgspec
from redis.asyncio.connection import AbstractConnection, ConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisError, ResponseError

from phoenix_ml.domain.errors import FeatureInvalid, FeatureStoreUnavailable, Misconfigured
from phoenix_ml.domain.features import FeatureType, StoredFeatures
from phoenix_ml.domain.rows import Scalar
from phoenix_ml.infrastructure.features.values import Given, as_text, checked

_CONNECT_S: Final = 1.0
_FIRST_RETRY_S: Final = 0.05
_LAST_RETRY_S: Final = 1.0
_ENTITIES_A_ROUND_TRIP: Final = 64
_PREPARED_READS: Final = 256
_CLOSED: Final = "it was closed"

# uvloop raises RuntimeError where asyncio raises OSError: on a write to what the other side has closed.
_FAULTS: Final = (RedisError, OSError, TimeoutError, RuntimeError)

_INTEGER: Final = re.compile(r"-?(?:0|[1-9][0-9]{0,18})")
_FLOAT: Final = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_encode_json = msgspec.json.Encoder().encode
_decode_json_string = msgspec.json.Decoder(str).decode

# ARGV: milliseconds, how many features to set, their names and values in turn, names to remove.
_MERGE: Final = b"""
local set = tonumber(ARGV[2])
local first_removed = 3 + 2 * set
local named = {}
for i = 3, first_removed - 1, 2 do named[ARGV[i]] = true end
for i = first_removed, #ARGV do named[ARGV[i]] = true end
local covers_all, left, times = true, set, {}
for _, field in ipairs(redis.call('HKEYS', KEYS[1])) do
  if string.sub(field, 1, 1) ~= '_' then
    if not named[field] then
      covers_all = false
      left = left + 1
    end
  elseif string.sub(field, 1, 4) == '_at:' then
    times[#times + 1] = field
  end
end
if left == 0 then
  redis.call('DEL', KEYS[1])
  return
end
if covers_all then
  for _, field in ipairs(times) do redis.call('HDEL', KEYS[1], field) end
  redis.call('HSET', KEYS[1], '_updated_at', ARGV[1])
end
for i = 3, first_removed - 1, 2 do
  redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1])
  if not covers_all then redis.call('HSET', KEYS[1], '_at:' .. ARGV[i], ARGV[1]) end
end
for i = first_removed, #ARGV do
  redis.call('HDEL', KEYS[1], ARGV[i], '_at:' .. ARGV[i])
end
"""
_MERGE_DIGEST: Final = sha1(_MERGE, usedforsecurity=False).hexdigest().encode()


class RedisFeatures:
    """A feature store in Redis. A read is answered or refused within the deadline.

    When Redis is down or late, callers are refused at once until a task in the background finds that it
    answers within the deadline again. The deadline is stretched by a fifth before an answer is given up, so
    that a pause of this process is not taken for one of Redis. Raises Misconfigured for a URL that names no Redis.
    """

    name = "redis"

    def __init__(self, url: str, deadline_ms: float = 5.0, write_deadline_ms: float = 5000.0) -> None:
        try:
            # redis-py's own timeout would wrap each write in a task, 40 µs; the lane keeps the time.
            pool = ConnectionPool.from_url(url, protocol=2, socket_timeout=None, retry=Retry(NoBackoff(), 0))
            reads, writes = (pool.make_connection() for _ in range(2))  # type: ignore[no-untyped-call]
        except (ValueError, TypeError, RedisError) as error:
            raise Misconfigured(
                f"the feature store's URL is not usable: {error}", setting="features"
            ) from error
        options = pool.connection_kwargs
        self.address = (
            options.get("path") or f"{options.get('host', 'localhost')}:{options.get('port', 6379)}"
        )
        self._reads = _Lane(reads, deadline_ms / 1000, self._give_up)
        self._writes = _Lane(writes, write_deadline_ms / 1000, self._give_up)
        self._down: str | None = None
        self._closed = False
        self._recovery: asyncio.Task[None] | None = None
        self._prepared: dict[tuple[str, ...], _PreparedRead] = {}

    async def read(self, entity_id: str, types: Mapping[str, FeatureType]) -> StoredFeatures | None:
        """The named features that are stored, in the types given; None for an unknown entity.

        Raises FeatureStoreUnavailable, and FeatureInvalid when the entity's key holds no hash.
        """
        names = tuple(types)
        prepared = self._prepared.get(names)
        if prepared is None or prepared.types != types:
            prepared = self._prepare(names, types)
        key = _key(entity_id)
        command = b"%b$%d\r\n%b\r\n%b" % (prepared.head, len(key), key, prepared.tail)
        reply = await self._ask(self._reads, command, key)
        count = len(names)
        raw, updated_at, times = reply[:count], reply[count], reply[count + 1 :]
        if updated_at is None and not any(value is not None for value in raw):
            return None
        values = _all_floats(names, raw) if prepared.only_floats else None
        if values is None:
            values = _read_as(names, prepared.parsers, raw)
        return StoredFeatures(values, _milliseconds(updated_at), _times(names, times))

    async def read_all(self, entity_id: str) -> StoredFeatures | None:
        """All that is stored for the entity, or None. What others wrote gets the type it looks like.

        Raises FeatureStoreUnavailable, and FeatureInvalid when the entity's key holds no hash.
        """
        key = _key(entity_id)
        reply = await self._ask(self._reads, _pack(b"HGETALL", key), key)
        fields = dict(zip(reply[::2], reply[1::2], strict=True))
        values = {}
        for field, raw in fields.items():
            if not field.startswith(b"_") and (value := _infer(raw)) is not None:
                values[_text(field)] = value
        if not values:
            return None
        times = _times(tuple(values), [fields.get(b"_at:" + name.encode()) for name in values])
        return StoredFeatures(values, _milliseconds(fields.get(b"_updated_at")), times)

    async def write(self, entities: Mapping[str, Given], at_ms: int) -> None:
        """Merges features into entities, each one atomically; many take several round trips.

        Raises InvalidField and FeatureInvalid for what cannot be stored, before anything is;
        FeatureStoreUnavailable; and FeatureInvalid when an entity's key holds no hash.
        """
        remaining = iter((await asyncio.to_thread(checked, entities)).items())
        while chunk := list(islice(remaining, _ENTITIES_A_ROUND_TRIP)):
            commands = [_merge_command(entity_id, features, at_ms) for entity_id, features in chunk]
            replies = await self._exchange(self._writes, commands)
            if any(isinstance(reply, NoScriptError) for reply in replies):
                await self._ask(self._writes, _pack(b"SCRIPT", b"LOAD", _MERGE))
                replies = await self._exchange(self._writes, commands)
            for (entity_id, _), reply in zip(chunk, replies, strict=True):
                self._refuse_error(reply, _key(entity_id))

    async def check(self, patience_s: float = 0.0) -> None:
        """Returns when Redis answers within a read's deadline. Raises FeatureStoreUnavailable.

        With more patience it first opens the connection that reads then find. Not while reads go on: they
        wait behind it.
        """
        await self._ask(self._reads, _pack(b"PING"), patience_s=patience_s)

    async def close(self) -> None:
        """Ends the connections and the background task; whoever still waits is refused."""
        self._closed = True
        self._down = _CLOSED
        if self._recovery is not None:
            self._recovery.cancel()
            await asyncio.wait([self._recovery])
        await self._reads.close()
        await self._writes.close()

    async def _ask(self, lane: "_Lane", command: bytes, key: bytes = b"", patience_s: float = 0.0) -> Any:
        (reply,) = await self._exchange(lane, [command], patience_s)
        self._refuse_error(reply, key)
        return reply

    async def _exchange(self, lane: "_Lane", commands: Sequence[bytes], patience_s: float = 0.0) -> list[Any]:
        if self._down is not None:
            raise self._unavailable(self._down)
        return await lane.exchange(commands, patience_s)

    def _refuse_error(self, reply: object, key: bytes) -> None:
        if isinstance(reply, ResponseError):
            if "WRONGTYPE" in str(reply):
                raise FeatureInvalid(
                    f"the key {_text(key)!r} in redis at {self.address} is no hash, so it holds no features: remove it",
                    store=self.name,
                    key=_text(key),
                ) from reply
            raise self._unavailable(str(reply)) from reply

    def _prepare(self, names: tuple[str, ...], types: Mapping[str, FeatureType]) -> "_PreparedRead":
        fields = [
            *(name.encode() for name in names),
            b"_updated_at",
            *(f"_at:{name}".encode() for name in names),
        ]
        packed = _pack(b"HMGET", b"", *fields)
        head, _, tail = packed.partition(b"$0\r\n\r\n")
        if len(self._prepared) >= _PREPARED_READS:
            self._prepared.clear()
        parsers = tuple(_FROM_RAW[wanted] for wanted in types.values())
        only_floats = set(parsers) == {_float}
        self._prepared[names] = prepared = _PreparedRead(head, tail, dict(types), parsers, only_floats)
        return prepared

    def _unavailable(self, why: str) -> FeatureStoreUnavailable:
        return FeatureStoreUnavailable(
            f"the feature store redis at {self.address} is unavailable: {why}",
            store=self.name,
            address=self.address,
        )

    def _give_up(self, error: BaseException) -> FeatureStoreUnavailable:
        """The error for a caller whose exchange failed; from now on Redis counts as down."""
        if self._down is None:
            self._down = str(error)
            self._recovery = asyncio.get_running_loop().create_task(self._recover())
        unavailable = self._unavailable(_CLOSED if self._closed else str(error))
        unavailable.__cause__ = error
        return unavailable

    async def _recover(self) -> None:
        pause_s = _FIRST_RETRY_S
        while True:
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))  # noqa: S311 - spreads processes out
            try:
                await self._reads.probe()
            except _FAULTS:
                pause_s = min(2 * pause_s, _LAST_RETRY_S)
            else:
                self._down = None
                return


class _PreparedRead(NamedTuple):
    """The HMGET of some features, before and after the entity's key."""

    head: bytes
    tail: bytes
    types: dict[str, FeatureType]
    parsers: tuple[Callable[[bytes], Scalar | None], ...]
    only_floats: bool


class _Request(NamedTuple):
    commands: Sequence[bytes]
    answer_by: float
    answer: asyncio.Future[list[Any]]


class _Lane:
    """One connection and the requests that wait for it. Answers are given in the order of the requests.

    An exchange that fails in any way ends the connection, so no answer can ever reach another caller.
    """

    def __init__(
        self,
        connection: AbstractConnection,
        deadline_s: float,
        give_up: Callable[[BaseException], FeatureStoreUnavailable],
    ) -> None:
        self._deadline_s = deadline_s
        self._connection = connection
        self._give_up = give_up
        self._waiting: list[_Request] = []
        self._task: asyncio.Task[None] | None = None

    async def exchange(self, commands: Sequence[bytes], patience_s: float = 0.0) -> list[Any]:
        """One reply a command, errors of Redis among them. Raises FeatureStoreUnavailable."""
        loop = asyncio.get_running_loop()
        answer_by = loop.time() + max(self._deadline_s, patience_s)
        request = _Request(commands, answer_by, loop.create_future())
        self._waiting.append(request)
        if self._task is None:
            self._task = loop.create_task(self._serve())
        return await request.answer

    async def probe(self) -> None:
        """Returns when Redis answers within the deadline, over a new connection."""
        async with asyncio.timeout(_CONNECT_S):
            await self._connection.disconnect(nowait=True)
            await self._connection.connect()  # type: ignore[no-untyped-call]
        async with _time_limit(asyncio.get_running_loop().time() + self._deadline_s, self._deadline_s / 5):
            await self._connection.send_packed_command(_pack(b"PING"), check_health=False)
            await self._connection.read_response()

    async def close(self) -> None:
        """Ends the connection; whoever waits is refused."""
        if self._task is not None:
            task, self._task = self._task, None
            task.cancel()
            await asyncio.wait([task])
        # A task that was cancelled before it began has refused nobody.
        self._refuse(self._waiting, ConnectionError("the connection was closed"))
        with suppress(*_FAULTS):
            await self._connection.disconnect()

    async def _serve(self) -> None:
        batch: list[_Request] = []
        cause: BaseException = ConnectionError("the exchange was broken off")
        try:
            while self._waiting:
                batch, self._waiting = self._waiting, []
                end_at = min(request.answer_by for request in batch)
                async with _time_limit(end_at, self._deadline_s / 5):
                    await self._answer(batch)
        except TimeoutError as error:
            cause = TimeoutError(f"no answer within {self._deadline_s * 1000:g} ms")
            cause.__cause__ = error
            await self._connection.disconnect(nowait=True)
        except _FAULTS as error:
            cause = error
            await self._connection.disconnect(nowait=True)
        finally:
            self._task = None
            self._refuse([*batch, *self._waiting], cause)
            self._waiting = []

    async def _answer(self, batch: Sequence[_Request]) -> None:
        connection = self._connection
        sent = b"".join([command for request in batch for command in request.commands])
        was_connected = connection.is_connected
        try:
            await connection.send_packed_command(sent, check_health=False)
            first = await self._reply()
        except (RedisError, OSError, RuntimeError):
            if not was_connected:
                raise
            # Redis closes idle connections, and all when it restarts: that alone is no failure.
            # Reads and merges may be repeated without harm.
            await connection.disconnect(nowait=True)
            await connection.send_packed_command(sent, check_health=False)
            first = await self._reply()
        for request in batch:
            replies = [first] if request is batch[0] else []
            while len(replies) < len(request.commands):
                replies.append(await self._reply())
            if not request.answer.done():
                request.answer.set_result(replies)

    def _refuse(self, requests: Sequence[_Request], cause: BaseException) -> None:
        for request in requests:
            if not request.answer.done():
                request.answer.set_exception(self._give_up(cause))

    async def _reply(self) -> Any:
        try:
            return await self._connection.read_response(disable_decoding=True)
        except ResponseError as error:
            return error


@asynccontextmanager
async def _time_limit(end_at: float, last_look_s: float) -> AsyncIterator[None]:
    """Raises TimeoutError in the block when it takes longer.

    A timer of a loop that stood still fires before the loop sees what arrived meanwhile. So the
    first timer only sets a second one, and the loop reads in between.
    """
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(None) as timeout:
        timers: list[asyncio.TimerHandle] = []

        def allow_a_last_look() -> None:
            timers.append(loop.call_later(last_look_s, timeout.reschedule, loop.time()))

        timers.append(loop.call_at(end_at, allow_a_last_look))
        try:
            yield
        finally:
            for timer in timers:
                timer.cancel()


def _pack(*parts: bytes) -> bytes:
    return b"*%d\r\n" % len(parts) + b"".join([b"$%d\r\n%b\r\n" % (len(part), part) for part in parts])


def _key(entity_id: str) -> bytes:
    # Lone surrogates, such as a shell can pass, make a key that no write ever made.
    return b"features:" + entity_id.encode("utf-8", "surrogatepass")


def _merge_command(entity_id: str, features: Mapping[str, Scalar | None], at_ms: int) -> bytes:
    removed = [name.encode() for name, value in features.items() if value is None]
    parts: list[bytes] = []
    for name, value in features.items():
        if value is not None:
            parts += name.encode(), _raw(value)
    return _pack(
        b"EVALSHA",
        _MERGE_DIGEST,
        b"1",
        _key(entity_id),
        b"%d" % at_ms,
        b"%d" % (len(parts) // 2),
        *parts,
        *removed,
    )


def _raw(value: Scalar) -> bytes:
    """The value as it is stored."""
    if isinstance(value, str) and _reads_as_something_else(value):
        return _encode_json(value)
    return as_text(value).encode()


def _reads_as_something_else(text: str) -> bool:
    if text in ("true", "false") or text.startswith('"'):
        return True
    try:
        float(text)
    except ValueError:
        return False
    return True


def _unquoted(raw: bytes) -> str | None:
    """The string that was written in quotes; None for what is no JSON string."""
    if raw.startswith(b'"'):
        with suppress(msgspec.DecodeError, UnicodeDecodeError):
            return _decode_json_string(raw)
    return None


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")


def _infer(raw: bytes) -> Scalar | None:
    """The value in the type it looks like; None for NaN."""
    quoted = _unquoted(raw)
    if quoted is not None:
        return quoted
    text = _text(raw)
    if text in ("true", "false"):
        return text == "true"
    if _INTEGER.fullmatch(text) and -(2**63) <= int(text) < 2**63:
        return int(text)
    if _FLOAT.fullmatch(text) and not _INTEGER.fullmatch(text) and isfinite(float(text)):
        return float(text)
    return None if text.lower() == "nan" else text


def _read_as(
    names: Sequence[str], parsers: Sequence[Callable[[bytes], Scalar | None]], raw: Sequence[bytes | None]
) -> dict[str, Scalar]:
    values: dict[str, Scalar] = {}
    for name, parse, stored in zip(names, parsers, raw, strict=True):
        if stored is not None and (value := parse(stored)) is not None:
            values[name] = value
    return values


def _all_floats(names: Sequence[str], raw: Sequence[bytes | None]) -> dict[str, Scalar] | None:
    """The values where each is a plain number, else None: the usual row of 30 in 9 µs instead of 16."""
    try:
        numbers = list(map(float, raw))  # type: ignore[arg-type]
        # Python also reads 1_0 as a number.
        plain = isfinite(sum(numbers)) and b"_" not in b"".join(raw)  # type: ignore[arg-type]
    except (ValueError, TypeError):
        return None
    return dict(zip(names, numbers, strict=True)) if plain else None


def _float(raw: bytes) -> Scalar | None:
    try:
        number = float(raw)
    except ValueError:
        return _string(raw)
    if isfinite(number) and b"_" not in raw:
        return number
    return None if isnan(number) else _string(raw)


def _integer(raw: bytes) -> Scalar:
    with suppress(ValueError):
        if b"_" not in raw:
            return int(raw)
    return _string(raw)


def _boolean(raw: bytes) -> Scalar:
    return raw == b"true" if raw in (b"true", b"false") else _string(raw)


def _string(raw: bytes) -> str:
    quoted = _unquoted(raw)
    return _text(raw) if quoted is None else quoted


_FROM_RAW: Final[dict[FeatureType, Callable[[bytes], Scalar | None]]] = {
    FeatureType.FLOAT: _float,
    FeatureType.INTEGER: _integer,
    FeatureType.BOOLEAN: _boolean,
    FeatureType.STRING: _string,
}


def _milliseconds(raw: bytes | None) -> int | None:
    """The time that was stored; None where what is stored is no time."""
    with suppress(ValueError):
        return None if raw is None else int(raw)
    return None


def _times(names: Sequence[str], raw: Sequence[bytes | None]) -> dict[str, int]:
    if not any(raw):
        return {}
    times = zip(names, map(_milliseconds, raw), strict=True)
    return {name: at_ms for name, at_ms in times if at_ms is not None}
