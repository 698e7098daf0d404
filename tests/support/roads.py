"""The two roads from where events are put on record to the log: the journal itself, and a real Kafka."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import msgspec
from sample_events import DIGEST, SCHEMA
from servers import wait_until

from phoenix_ml.application.ports import DeadLetters, EventSource, RecordedEvent, UnreadableEvent
from phoenix_ml.domain.errors import EventsUnavailable
from phoenix_ml.domain.events import Event
from phoenix_ml.infrastructure.events.cloudevents import Message, encode_record
from phoenix_ml.infrastructure.events.deadletters import FileDeadLetters
from phoenix_ml.infrastructure.events.journal import JournalWriter
from phoenix_ml.infrastructure.events.kafka import INFERENCE_EVENTS, Kafka, KafkaEvents, KafkaOutbox
from phoenix_ml.infrastructure.events.local import LocalEvents
from phoenix_ml.settings import fixed_settings

ARRIVAL_DEADLINE_S = 30.0
Item = RecordedEvent | UnreadableEvent


class Road(Protocol):
    """Where events are put on record, and come out again."""

    def record(self, events: Sequence[Event]) -> None: ...

    def record_bytes(self, payload: bytes) -> None:
        """Puts something on record that is no event."""
        ...

    def source(self) -> EventSource:
        """A source that begins where the previous one has committed; the previous one is closed."""
        ...

    def dead_letters(self) -> DeadLetters:
        """As a process would open them that starts now."""
        ...


def read_items(source: EventSource, count: int) -> list[Item]:
    """So many items, without a commit between them; a source, and its Kafka, may need a moment to begin."""
    items: list[Item] = []

    def all_read() -> bool:
        with suppress(EventsUnavailable):
            items.extend(source.read(count - len(items)))
        return len(items) >= count

    wait_until(all_read, ARRIVAL_DEADLINE_S, f"{count} items come")
    return items


def read_batch(source: EventSource, most: int) -> list[Item]:
    """What comes first, at least one item: how many come at once is Kafka's choice."""
    items: list[Item] = []

    def any_read() -> bool:
        with suppress(EventsUnavailable):
            items.extend(source.read(most))
        return bool(items)

    wait_until(any_read, ARRIVAL_DEADLINE_S, "an item comes")
    return items


def take_items(source: EventSource, count: int) -> list[Item]:
    """So many items, as a log worker takes them: each batch is committed before the next is read."""
    items: list[Item] = []
    while len(items) < count:
        items += read_batch(source, count - len(items))
        source.commit()
    return items


class LocalRoad:
    """`PHOENIX_EVENTS=local:`."""

    def __init__(self, data: Path) -> None:
        settings = fixed_settings(data=data)
        self._folder = settings.journal_folder
        self._dead = settings.dead_letters_file
        self._writer = JournalWriter(self._folder / "api-0")
        self._source = LocalEvents(self._folder)

    def record(self, events: Sequence[Event]) -> None:
        for event in events:
            self._writer.append(msgspec.msgpack.encode(event), DIGEST, SCHEMA)
        self._finish_segment()

    def record_bytes(self, payload: bytes) -> None:
        self._writer.append(payload)
        self._finish_segment()

    def source(self) -> EventSource:
        self._source.close()
        self._source = LocalEvents(self._folder)
        return self._source

    def dead_letters(self) -> DeadLetters:
        return FileDeadLetters(self._dead, self._folder)

    def close(self) -> None:
        self._source.close()
        self._writer.close()

    def _finish_segment(self) -> None:
        # Only a finished segment can be forgotten as a whole.
        self._writer.close()
        self._writer = JournalWriter(self._folder / "api-0")


class KafkaRoad:
    """`PHOENIX_EVENTS=kafka://…`, with topics of its own."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._kafka = Kafka(url, partitions=3)
        self._kafka.create_topics()
        self._outbox = KafkaOutbox(self._kafka)
        self._source: KafkaEvents | None = None

    def record(self, events: Sequence[Event]) -> None:
        self._send([encode_record(msgspec.msgpack.encode(event), SCHEMA) for event in events])

    def record_bytes(self, payload: bytes) -> None:
        self._send([Message(b"key", payload, [])])

    def source(self) -> EventSource:
        if self._source is not None:
            self._source.close()
        self._source = KafkaEvents(self._kafka)
        return self._source

    def dead_letters(self) -> DeadLetters:
        return Kafka(self._url, partitions=3).dead_letters()

    def close(self) -> None:
        if self._source is not None:
            self._source.close()
        self._outbox.close()

    def _send(self, messages: list[Message]) -> None:
        assert self._outbox.send(INFERENCE_EVENTS, messages) == []
