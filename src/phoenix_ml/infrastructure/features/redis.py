"""Features in Redis, in a layout that other systems can write: one hash an entity, one text a feature.

``features:<entity>`` holds each feature under its name: floats and integers in decimal, ``true`` and
``false``, strings as they are. A string that would read as something else, such as ``12`` or
``true``, is written as a JSON string, in quotes. ``_updated_at`` and ``_at:<feature>`` hold milliseconds
since the epoch; a read always asks for all of them, which costs less than telling whether it must.

``_packed:<digest>`` holds the row of an all-float32 signature: ``_updated_at`` as it was then, in 8 bytes, and the
features as the engine takes them. It is true only as long as ``_updated_at`` is the same, and every merge writes
or removes it in the same step.
"""

import asyncio
import re
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from hashlib import sha1
from itertools import islice, repeat
from math import isfinite, isnan
from typing import Any, Final, NamedTuple

import msgspec
from hiredis import ReplyError

from phoenix_ml.domain.errors import FeatureInvalid, FeatureStoreUnavailable
from phoenix_ml.domain.features import FeatureType, PackedFeatures, PackedSignature, StoredFeatures
from phoenix_ml.domain.rows import Scalar
from phoenix_ml.infrastructure.features.redis_lane import pack
from phoenix_ml.infrastructure.features.redis_roads import open_road, read_url
from phoenix_ml.infrastructure.features.values import Given, PackedReads, as_text, checked

_ENTITIES_A_ROUND_TRIP: Final = 64
_PREPARED_READS: Final = 256
_TIME_BYTES: Final = 8

_INTEGER: Final = re.compile(r"-?(?:0|[1-9][0-9]{0,18})")
_FLOAT: Final = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_encode_json = msgspec.json.Encoder().encode
_decode_json_string = msgspec.json.Decoder(str).decode
_decode_floats = msgspec.json.Decoder(list[float]).decode

# ARGV: milliseconds, how many features to set, the signatures to pack (MessagePack: digests and names), the
# names and values to set in turn, names to remove. A text is packed only where Python's float() and Lua's
# tonumber() agree on it, and where it fits a float32.
_MERGE: Final = b"""
local set = tonumber(ARGV[2])
local first_removed = 4 + 2 * set
local given = {}
for i = 4, first_removed - 1, 2 do given[ARGV[i]] = ARGV[i + 1] end
for i = first_removed, #ARGV do given[ARGV[i]] = false end
local covers_all, left, times, packed, values, updated_at = true, set, {}, {}, {}, nil
local stored = redis.call('HGETALL', KEYS[1])
for i = 1, #stored, 2 do
  local field = stored[i]
  if string.sub(field, 1, 1) ~= '_' then
    values[field] = stored[i + 1]
    if given[field] == nil then
      covers_all = false
      left = left + 1
    end
  elseif field == '_updated_at' then
    updated_at = stored[i + 1]
  elseif string.sub(field, 1, 4) == '_at:' then
    times[#times + 1] = field
  elseif string.sub(field, 1, 8) == '_packed:' then
    packed[#packed + 1] = field
  end
end
if left == 0 then
  redis.call('DEL', KEYS[1])
  return
end
if covers_all then
  for _, field in ipairs(times) do redis.call('HDEL', KEYS[1], field) end
  updated_at = ARGV[1]
  redis.call('HSET', KEYS[1], '_updated_at', updated_at)
end
for i = 4, first_removed - 1, 2 do
  redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1])
  if not covers_all then redis.call('HSET', KEYS[1], '_at:' .. ARGV[i], ARGV[1]) end
end
for i = first_removed, #ARGV do
  redis.call('HDEL', KEYS[1], ARGV[i], '_at:' .. ARGV[i])
end
for _, field in ipairs(packed) do redis.call('HDEL', KEYS[1], field) end
if not updated_at or #updated_at > 15 or not string.find(updated_at, '^%d+$') then return end
for name, value in pairs(given) do values[name] = value end
for _, signature in ipairs(cmsgpack.unpack(ARGV[3])) do
  local row = { struct.pack('<i8', tonumber(updated_at)) }
  for i, name in ipairs(signature[2]) do
    local text = values[name]
    if not text or not (string.find(text, '^%-?%d+%.?%d*$') or string.find(text, '^%-?%d+%.?%d*[eE][+-]?%d+$')) then
      row = nil
      break
    end
    local number = tonumber(text)
    if not number or math.abs(number) > 3.4028234e38 then
      row = nil
      break
    end
    row[i + 1] = struct.pack('<f', number)
  end
  if row then redis.call('HSET', KEYS[1], '_packed:' .. signature[1], table.concat(row)) end
end
"""
_MERGE_DIGEST: Final = sha1(_MERGE, usedforsecurity=False).hexdigest().encode()


class RedisFeatures:
    """A feature store in Redis: one server, the master that sentinels name, or a cluster.

    A read is answered or refused within the deadline. When Redis is down or late, callers are refused at once until
    a task in the background finds that it answers within the deadline again; in a cluster that concerns the keys of
    one node. Raises Misconfigured for a URL that names no Redis.
    """

    name = "redis"

    def __init__(self, url: str, deadline_ms: float = 5.0, write_deadline_ms: float = 5000.0) -> None:
        destination = read_url(url)
        self.address = destination.address
        self._writes = open_road(destination, write_deadline_ms / 1000, self._unavailable, recovers=False)
        # Writes have so much patience that a read is first to find out that Redis has gone, or moved.
        self._reads = open_road(
            destination, deadline_ms / 1000, self._unavailable, recovers=True, on_failure=self._writes.renew
        )
        self._prepared: dict[int, _PreparedRead] = {}
        self._packed: dict[str, _PackedRead] = {}

    async def read(self, entity_id: str, types: Mapping[str, FeatureType]) -> StoredFeatures | None:
        """The named features that are stored, in the types given; None for an unknown entity.

        Raises FeatureStoreUnavailable, and FeatureInvalid when the entity's key holds no hash.
        """
        prepared = self._prepared.get(id(types))
        if prepared is None:
            prepared = self._prepare(types)
        key = _key(entity_id)
        reply = await self._reads.ask(
            key, b"%b$%d\r\n%b\r\n%b" % (prepared.head, len(key), key, prepared.tail)
        )
        if type(reply) is not list:
            raise self._refused(reply, key)
        names = prepared.names
        count = len(names)
        raw = reply[:count]
        numbers = _floats(raw) if prepared.only_floats else None
        if numbers is not None:
            values: dict[str, Scalar] = dict(zip(names, numbers, strict=True))
        else:
            if reply[count] is None and raw.count(None) == count:
                return None
            values = _read_as(names, prepared.parsers, raw)
        return StoredFeatures(values, _milliseconds(reply[count]), _times(names, reply[count + 1 :]))

    async def read_packed(
        self, entity_id: str, signature: PackedSignature
    ) -> PackedFeatures | StoredFeatures | None:
        """The packed row where a true one is stored, else one made of the fields, else the values without
        the times of single features. Raises what ``read`` raises.
        """
        packed = self._packed.get(signature.digest)
        if packed is None:
            packed = self._prepare_packed(signature)
        if packed.misses and packed.are_hopeless():
            return await self._read_row(entity_id, packed)
        key = _key(entity_id)
        # Joined, as formatting costs 0.3 µs more.
        command = b"".join((packed.head, b"%d\r\n" % len(key), key, packed.tail))
        reply = await self._reads.ask(key, command)
        if type(reply) is not list:
            raise self._refused(reply, key)
        row, raw_time = reply
        if row is not None and len(row) == packed.size:
            updated_at_ms = _milliseconds(raw_time)
            if int.from_bytes(row[:_TIME_BYTES], "little") == updated_at_ms:
                packed.misses = 0
                return PackedFeatures(row[_TIME_BYTES:], updated_at_ms)
        packed.misses += 1
        return await self._read_row(entity_id, packed)

    async def _read_row(
        self, entity_id: str, packed: "_PackedRead"
    ) -> PackedFeatures | StoredFeatures | None:
        key = _key(entity_id)
        reply = await self._reads.ask(
            key, b"%b$%d\r\n%b\r\n%b" % (packed.fields_head, len(key), key, packed.fields_tail)
        )
        if type(reply) is not list:
            raise self._refused(reply, key)
        updated_at_ms = _milliseconds(reply.pop())
        numbers = _floats(reply)
        if numbers is not None:
            try:
                return PackedFeatures(packed.packer.pack(*numbers), updated_at_ms)
            except OverflowError:  # suppress() would cost 0.5 µs
                pass
        if updated_at_ms is None and reply.count(None) == len(reply):
            return None
        return StoredFeatures(_read_as(packed.names, repeat(_float), reply), updated_at_ms)

    async def read_all(self, entity_id: str) -> StoredFeatures | None:
        """All that is stored for the entity, or None. What others wrote gets the type it looks like.

        Raises FeatureStoreUnavailable, and FeatureInvalid when the entity's key holds no hash.
        """
        key = _key(entity_id)
        reply = await self._reads.ask(key, pack(b"HGETALL", key))
        if type(reply) is not list:
            raise self._refused(reply, key)
        fields = dict(zip(reply[::2], reply[1::2], strict=True))
        values = {}
        for field, raw in fields.items():
            if not field.startswith(b"_") and (value := _infer(raw)) is not None:
                values[_text(field)] = value
        if not values:
            return None
        times = _times(tuple(values), [fields.get(b"_at:" + name.encode()) for name in values])
        return StoredFeatures(values, _milliseconds(fields.get(b"_updated_at")), times)

    async def write(
        self, entities: Mapping[str, Given], at_ms: int, signatures: Sequence[PackedSignature] = ()
    ) -> None:
        """Merges features into entities, each one atomically; many take several round trips.

        Raises InvalidField and FeatureInvalid for what cannot be stored, before anything is;
        FeatureStoreUnavailable; and FeatureInvalid when an entity's key holds no hash.
        """
        rows = msgspec.msgpack.encode([(s.digest, list(s.types)) for s in signatures])
        remaining = iter((await asyncio.to_thread(checked, entities)).items())
        while chunk := list(islice(remaining, _ENTITIES_A_ROUND_TRIP)):
            if self._reads.down is not None:
                raise self._unavailable(self._reads.down)
            merges = [
                (_key(entity_id), _merge_arguments(features, at_ms, rows)) for entity_id, features in chunk
            ]
            replies = await self._merge(merges, b"EVALSHA", _MERGE_DIGEST)
            # SCRIPT FLUSH, a restart and a failover all lose the script.
            again = [m for m, r in zip(merges, replies, strict=True) if str(r).startswith("NOSCRIPT")]
            replies += await self._merge(again, b"EVAL", _MERGE)
            for (key, _), reply in zip([*merges, *again], replies, strict=True):
                if isinstance(reply, ReplyError) and not str(reply).startswith("NOSCRIPT"):
                    raise self._refused(reply, key)

    async def check(self, patience_s: float = 0.0) -> None:
        """Returns when Redis answers within a read's deadline. Raises FeatureStoreUnavailable.

        With more patience it first opens the connection that reads then find. Not while reads go on: they
        wait behind it.
        """
        reply = await self._reads.check(patience_s)
        if isinstance(reply, ReplyError):
            raise self._refused(reply)

    async def close(self) -> None:
        """Ends the connections and the background task; whoever still waits is refused."""
        await self._reads.close()
        await self._writes.close()

    async def _merge(
        self, merges: Sequence[tuple[bytes, Sequence[bytes]]], how: bytes, script: bytes
    ) -> list[Any]:
        asked = [self._writes.ask(key, pack(how, script, b"1", key, *arguments)) for key, arguments in merges]
        return await asyncio.gather(*asked)

    def _refused(self, reply: object, key: bytes = b"") -> FeatureInvalid | FeatureStoreUnavailable:
        if str(reply).startswith("WRONGTYPE"):
            return FeatureInvalid(
                f"the key {_text(key)!r} in redis at {self.address} is no hash, so it holds no features: remove it",
                store=self.name,
                key=_text(key),
            )
        return self._unavailable(str(reply))

    def _prepare(self, types: Mapping[str, FeatureType]) -> "_PreparedRead":
        """The command for some features: looking at 30 names at each read costs more than the whole answer.

        A contract hands over the same mapping at each read, so it is known by its identity; that it is kept here
        keeps the identity from being given to another.
        """
        names = tuple(types)
        times = [f"_at:{name}".encode() for name in names]
        head, tail = _hmget([*(name.encode() for name in names), b"_updated_at", *times])
        if len(self._prepared) >= _PREPARED_READS:
            self._prepared.clear()
        parsers = tuple(_FROM_RAW[wanted] for wanted in types.values())
        only_floats = set(parsers) == {_float}
        self._prepared[id(types)] = prepared = _PreparedRead(head, tail, names, types, parsers, only_floats)
        return prepared

    def _prepare_packed(self, signature: PackedSignature) -> "_PackedRead":
        if len(self._packed) >= _PREPARED_READS:
            self._packed.clear()
        self._packed[signature.digest] = packed = _PackedRead(signature)
        return packed

    def _unavailable(self, why: str) -> FeatureStoreUnavailable:
        return FeatureStoreUnavailable(
            f"the feature store redis at {self.address} is unavailable: {why}",
            store=self.name,
            address=self.address,
        )


class _PreparedRead(NamedTuple):
    """The HMGET of some features, before and after the entity's key."""

    head: bytes
    tail: bytes
    names: tuple[str, ...]
    types: Mapping[str, FeatureType]
    parsers: tuple[Callable[[bytes], Scalar | None], ...]
    only_floats: bool


class _PackedRead(PackedReads):
    """The HMGETs of a packed row, and of the fields that make one, before and after the entity's key."""

    __slots__ = ("fields_head", "fields_tail", "head", "names", "packer", "size", "tail")

    def __init__(self, signature: PackedSignature) -> None:
        super().__init__()
        self.names = tuple(signature.types)
        self.packer = struct.Struct(f"<{len(self.names)}f")
        self.size = _TIME_BYTES + self.packer.size
        head, tail = _hmget([f"_packed:{signature.digest}".encode(), b"_updated_at"])
        self.head, self.tail = head + b"$", b"\r\n" + tail
        self.fields_head, self.fields_tail = _hmget([*(name.encode() for name in self.names), b"_updated_at"])


def _hmget(fields: Sequence[bytes]) -> tuple[bytes, bytes]:
    head, _, tail = pack(b"HMGET", b"", *fields).partition(b"$0\r\n\r\n")
    return head, tail


def _key(entity_id: str) -> bytes:
    # Lone surrogates, such as a shell can pass, make a key that no write ever made.
    return b"features:" + entity_id.encode("utf-8", "surrogatepass")


def _merge_arguments(features: Mapping[str, Scalar | None], at_ms: int, rows: bytes) -> list[bytes]:
    removed = [name.encode() for name, value in features.items() if value is None]
    parts: list[bytes] = []
    for name, value in features.items():
        if value is not None:
            parts += name.encode(), _raw(value)
    return [b"%d" % at_ms, b"%d" % (len(parts) // 2), rows, *parts, *removed]


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
    names: Sequence[str], parsers: Iterable[Callable[[bytes], Scalar | None]], raw: Sequence[bytes | None]
) -> dict[str, Scalar]:
    values: dict[str, Scalar] = {}
    for name, parse, stored in zip(names, parsers, raw, strict=False):
        if stored is not None and (value := parse(stored)) is not None:
            values[name] = value
    return values


def _floats(raw: Sequence[bytes | None]) -> list[float] | None:
    """The values where each is a plain number, else None: a row of 30 in 1.4 µs, where float() takes 8.

    Read as one JSON list. A text with a comma in it would make the list longer, an empty one is no JSON.
    """
    try:
        text = b",".join(raw)  # type: ignore[arg-type]
        numbers = _decode_floats(b"[%b]" % text)
    except (TypeError, msgspec.MsgspecError, UnicodeDecodeError):
        return None
    if len(numbers) != len(raw):
        return None
    # A whole -0 has lost its sign.
    if 0.0 in numbers and text.count(b"-0") != text.count(b"-0."):
        return None
    return numbers


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
    try:
        return None if raw is None else int(raw)
    except ValueError:
        return None


def _times(names: Sequence[str], raw: Sequence[bytes | None]) -> dict[str, int]:
    if not any(raw):
        return {}
    times = zip(names, map(_milliseconds, raw), strict=True)
    return {name: at_ms for name, at_ms in times if at_ms is not None}
