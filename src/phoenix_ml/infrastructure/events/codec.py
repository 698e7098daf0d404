"""Recorded events as bytes, and back."""

from typing import Any

import msgspec

from phoenix_ml.application.ports import RecordedEvent, UnreadableEvent
from phoenix_ml.domain.events import Event, PredictionMade, PredictionsMade
from phoenix_ml.domain.rows import Column, RowFormat

Schema = dict[str, tuple[Column, ...]]

_events: "msgspec.msgpack.Decoder[Event]" = msgspec.msgpack.Decoder(Event)
_batches = msgspec.msgpack.Decoder(PredictionsMade)
_encode = msgspec.msgpack.Encoder().encode
_schemas = msgspec.msgpack.Decoder(Schema)
_known_formats: dict[bytes, dict[str, RowFormat]] = {}


def expand_batch(payload: bytes) -> list[bytes]:
    """The events that the payload of a batch stands for. Raises ValueError for other bytes."""
    try:
        return [_encode(event) for event in _batches.decode(payload).rows()]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, LookupError) as exc:
        raise ValueError(f"not a batch of predictions: {exc!r}") from exc


def decode_event(payload: bytes, schema: bytes, origin: Any = None) -> RecordedEvent | UnreadableEvent:
    """The event with the format of its inputs, or the bytes and the reason why they are none."""
    try:
        event = _events.decode(payload)
        if not isinstance(event, PredictionMade):
            return RecordedEvent(event, payload, None, origin)
        formats = _known_formats.get(schema)
        if formats is None:
            columns_of = _schemas.decode(schema)
            formats = {version: RowFormat(columns) for version, columns in columns_of.items()}
            _known_formats[schema] = formats
        return RecordedEvent(event, payload, formats[event.model_version], origin)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        return UnreadableEvent(payload, f"not an event: {exc}", origin)
    except KeyError:
        return UnreadableEvent(payload, "the event's schema does not describe its version", origin)
