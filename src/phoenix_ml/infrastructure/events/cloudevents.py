"""Recorded events on Kafka's wire: CloudEvents 1.0 in binary mode, the data as msgpack.

The data is what the journal holds, its columns beside it: ``[event, columns]``. Written out as JSON an
event of 13 features took 14 µs to ship, like this 7 (docs/adr/0008). ``docs/reference/events.md`` has the
format with an example, and the JSON Schemas that a test holds real events against.

The schema version, at the end of ``ce_dataschema``, grows when a field is added at an event's end. Fields are
never taken away, so every version up to our own can be read.
"""

import re
import time
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, Final, NamedTuple

import msgspec

from phoenix_ml.application.ports import RecordedEvent, UnreadableEvent
from phoenix_ml.domain.events import Event, PredictionMade
from phoenix_ml.domain.rows import Column, ElementType, RowFormat

SCHEMA_VERSION: Final = 3
CONTENT_TYPE: Final = b"application/msgpack"

Headers = list[tuple[str, bytes]]

_PREDICTION_MADE: Final = "phoenix-ml.prediction-made"
_OUTCOME_REPORTED: Final = "phoenix-ml.outcome-reported"
_PREDICTION_TAG: Final = b"\xaaprediction\xd9\x24"
_OUTCOME_TAG: Final = b"\xa7outcome\xd9\x24"
_ID_BYTES: Final = 36
_NIL: Final = b"\xc0"
_TRACEPARENT_BYTES: Final = 55
_TRACEPARENT_TAG: Final = b"\xd9\x37"
# 23 fields, the tag among them, of which the last is the device: a text of up to 31 letters of ASCII.
_VERSION_3: Final = b"\xdc\x00\x17"
_CPU: Final = b"\xa3cpu"
_DEVICE: Final = re.compile(rb"[\xa0-\xbf][ -~]*\Z")
_MILLISECONDS: Final = [b".%03dZ" % milliseconds for milliseconds in range(1000)]
_DATA_SCHEMA: Final = re.compile(rb"urn:phoenix-ml:(?:prediction-made|outcome-reported):(\d{1,6})")

_encode = msgspec.msgpack.Encoder().encode
_columns = msgspec.msgpack.Decoder(list[tuple[str, ElementType]])
_schemas = msgspec.msgpack.Decoder(dict[str, tuple[Column, ...]])
_messages: "msgspec.msgpack.Decoder[tuple[msgspec.Raw, msgspec.Raw]]" = msgspec.msgpack.Decoder(
    tuple[msgspec.Raw, msgspec.Raw]
)
_events: "msgspec.msgpack.Decoder[Event]" = msgspec.msgpack.Decoder(Event)


class Message(NamedTuple):
    key: bytes
    value: bytes
    headers: Headers


def encode_record(payload: bytes, schema: bytes) -> Message:
    """A journal's event as a message. Its key is the prediction's id, so that a prediction and its outcomes
    keep their order.

    Raises ValueError for bytes that are no event of ours.
    """
    # The bytes are cut, not decoded, because every prediction passes here: docs/adr/0008.
    start = 3 if payload[:1] == b"\xdc" else 1
    try:
        if payload.startswith(_PREDICTION_TAG, start):
            id_at = start + len(_PREDICTION_TAG)
            end = id_at + _ID_BYTES
            event_id = key = payload[id_at:end]
            model_id_end = _text_end(payload, end)
            version = payload[model_id_end : _text_end(payload, model_id_end)]
            columns = _columns_by_version(schema)[version]
            constant = _constant_headers(_PREDICTION_MADE, payload[:start])
        elif payload.startswith(_OUTCOME_TAG, start):
            id_at = start + len(_OUTCOME_TAG)
            end = id_at + _ID_BYTES
            event_id = payload[id_at:end]
            key = payload[end + 2 : _text_end(payload, end)]
            columns = _NIL
            constant = _constant_headers(_OUTCOME_REPORTED, payload[:start])
        else:
            raise ValueError("neither a prediction nor an outcome begins like this")
        headers = [*constant, ("ce_id", event_id), ("ce_time", _time_of(event_id))]
    except (LookupError, msgspec.DecodeError) as exc:
        raise ValueError(f"not an event, or one whose schema lacks its version: {exc!r}") from exc
    end = len(payload)
    if payload[:start] == _VERSION_3:  # the device comes after it
        end -= len(_CPU) if payload.endswith(_CPU) else len(_DEVICE.findall(payload)[0])
    trace_at = end - _TRACEPARENT_BYTES
    if payload[end - 1 : end] != _NIL and payload[trace_at - 2 : trace_at] == _TRACEPARENT_TAG:
        headers.append(("traceparent", payload[trace_at:end]))
    return Message(key, b"\x92" + payload + columns, headers)


def decode_message(
    value: bytes | None, headers: Iterable[tuple[str, bytes | None]], origin: Any = None
) -> RecordedEvent | UnreadableEvent:
    """The event of a message, or its bytes and the reason why they are none."""
    value = value or b""
    schema = next((given for name, given in headers if name == "ce_dataschema"), None) or b""
    version = _version(schema)
    if version is None:
        words = f"header ce_dataschema is {schema[:80]!r}" if schema else "there is no header ce_dataschema"
        return UnreadableEvent(value, f"not an event of ours: {words}", origin)
    if version > SCHEMA_VERSION:
        words = f"schema version {version}, and this log worker reads up to {SCHEMA_VERSION}: update it"
        return UnreadableEvent(value, f"{words}, then 'phoenix-ml events dead requeue'", origin)
    try:
        payload, columns = _messages.decode(value)
        event = _events.decode(payload)
        row_format = _row_format(bytes(columns)) if isinstance(event, PredictionMade) else None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        return UnreadableEvent(value, f"not an event: {exc}", origin)
    return RecordedEvent(event, value, row_format, origin)


def cloud_headers(kind: str, schema_version: int, content_type: bytes) -> Headers:
    """The attributes that CloudEvents ask for, as Kafka's headers; id and time differ from event to event."""
    return [
        ("ce_specversion", b"1.0"),
        ("ce_type", kind.encode()),
        ("ce_source", b"/phoenix-ml"),
        ("ce_dataschema", f"urn:{kind.replace('.', ':')}:{schema_version}".encode()),
        ("content-type", content_type),
    ]


def rfc_3339(at_ms: int) -> bytes:
    """The instant in UTC, with milliseconds."""
    # Events come in order of time: the text of a second serves for thousands, at 0.3 µs instead of 1.4.
    second, milliseconds = divmod(at_ms, 1000)
    return _second_text(second) + _MILLISECONDS[milliseconds]


def _time_of(event_id: bytes) -> bytes:
    """When the event happened: a UUIDv7 begins with the milliseconds of its making."""
    second, milliseconds = divmod(int(event_id[:8] + event_id[9:13], 16), 1000)
    return _second_text(second) + _MILLISECONDS[milliseconds]


@lru_cache(8)
def _second_text(second: int) -> bytes:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second)).encode()


@lru_cache(64)
def _constant_headers(kind: str, array_header: bytes) -> Headers:
    if kind == _OUTCOME_REPORTED:
        return cloud_headers(kind, SCHEMA_VERSION, CONTENT_TYPE)
    # A version adds fields at the end, so their number tells it: 21 with the first, the tag among them.
    return cloud_headers(kind, int.from_bytes(array_header[1:]) - 20, CONTENT_TYPE)


@lru_cache(4096)
def _columns_by_version(schema: bytes) -> dict[bytes, bytes]:
    """The columns of each version, both as msgpack: ``[[name, element], ...]``."""
    return {
        _encode(version): _encode([(column.name, column.element) for column in columns])
        for version, columns in _schemas.decode(schema).items()
    }


@lru_cache(4096)
def _row_format(columns: bytes) -> RowFormat:
    return RowFormat([Column(name, element) for name, element in _columns.decode(columns)])


@lru_cache(64)
def _version(data_schema: bytes) -> int | None:
    found = _DATA_SCHEMA.fullmatch(data_schema)
    return int(found[1]) if found else None


def _text_end(payload: bytes, start: int) -> int:
    """Where the msgpack text ends that starts here."""
    first = payload[start]
    if 0xA0 <= first <= 0xBF:
        return start + 1 + (first & 0x1F)
    if first == 0xD9:
        return start + 2 + payload[start + 1]
    raise ValueError(f"no short text is at byte {start}")
