"""Recorded events as bytes, and back."""

import msgspec

from phoenix_ml.application.ports import RecordedEvent, UnreadableEvent
from phoenix_ml.domain.events import Event, PredictionMade
from phoenix_ml.domain.rows import Column

Schema = dict[str, tuple[Column, ...]]

_events: "msgspec.msgpack.Decoder[Event]" = msgspec.msgpack.Decoder(Event)
_schemas = msgspec.msgpack.Decoder(Schema)
_known_schemas: dict[bytes, Schema] = {}


def decode_event(payload: bytes, schema: bytes) -> RecordedEvent | UnreadableEvent:
    """The event with the columns of its inputs, or the bytes and the reason why they are none."""
    try:
        event = _events.decode(payload)
        if not isinstance(event, PredictionMade):
            return RecordedEvent(event, payload)
        columns_of = _known_schemas.get(schema)
        if columns_of is None:
            columns_of = _known_schemas[schema] = _schemas.decode(schema)
        return RecordedEvent(event, payload, columns_of[event.model_version])
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        return UnreadableEvent(payload, f"not an event: {exc}")
    except KeyError:
        return UnreadableEvent(payload, "the event's schema does not describe its version")
