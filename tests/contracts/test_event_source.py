"""The event source's contract, over the journal itself and over a real Kafka."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Protocol

import msgspec
import pytest
from sample_events import COLUMNS, DIGEST, SCHEMA, outcome, prediction
from servers import wait_until

from phoenix_ml.application.ports import EventSource, RecordedEvent, UnreadableEvent
from phoenix_ml.domain.events import Event
from phoenix_ml.infrastructure.events.cloudevents import encode_record
from phoenix_ml.infrastructure.events.journal import JournalWriter
from phoenix_ml.infrastructure.events.kafka import INFERENCE_EVENTS, Kafka, KafkaEvents, KafkaOutbox
from phoenix_ml.infrastructure.events.local import LocalEvents

ARRIVAL_DEADLINE_S = 30.0


class Road(Protocol):
    """Where events are put on record, and come out again."""

    def record(self, events: Sequence[Event]) -> None: ...

    def source(self) -> EventSource:
        """A source that begins where the previous one has committed; the previous one is closed."""
        ...


class LocalRoad:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer = JournalWriter(folder / "api-0")
        self._source = LocalEvents(folder)

    def record(self, events: Sequence[Event]) -> None:
        for event in events:
            self._writer.append(msgspec.msgpack.encode(event), DIGEST, SCHEMA)
        # Only a finished segment can be forgotten as a whole.
        self._writer.close()
        self._writer = JournalWriter(self._folder / "api-0")

    def source(self) -> EventSource:
        self._source.close()
        self._source = LocalEvents(self._folder)
        return self._source

    def close(self) -> None:
        self._source.close()
        self._writer.close()


class KafkaRoad:
    def __init__(self, url: str) -> None:
        self._kafka = Kafka(url, partitions=3)
        self._kafka.create_topics()
        self._outbox = KafkaOutbox(self._kafka)
        self._source: KafkaEvents | None = None

    def record(self, events: Sequence[Event]) -> None:
        messages = [encode_record(msgspec.msgpack.encode(event), SCHEMA) for event in events]
        assert self._outbox.send(INFERENCE_EVENTS, messages) == []

    def source(self) -> EventSource:
        if self._source is not None:
            self._source.close()
        self._source = KafkaEvents(self._kafka)
        return self._source

    def close(self) -> None:
        if self._source is not None:
            self._source.close()
        self._outbox.close()


@pytest.fixture(params=["local", "kafka"])
def road(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Road]:
    if request.param == "local":
        with closing(LocalRoad(tmp_path / "journal")) as local:
            yield local
    else:
        with closing(KafkaRoad(request.getfixturevalue("kafka_url"))) as kafka:
            yield kafka


def read(source: EventSource, count: int) -> list[Event]:
    """So many events, without a commit between them; a source may need a moment to begin."""
    batches: list[RecordedEvent | UnreadableEvent] = []

    def all_read() -> bool:
        batches.extend(source.read(count - len(batches)))
        return len(batches) >= count

    wait_until(all_read, ARRIVAL_DEADLINE_S, f"{count} events come")
    events = [item.event for item in batches if isinstance(item, RecordedEvent)]
    assert len(events) == count
    return events


def by_id(events: Sequence[Event]) -> list[Event]:
    return sorted(events, key=lambda event: event.id)


def test_what_was_recorded_is_read_as_it_was(road: Road) -> None:
    """The log can only be as true as the events that reach it."""
    made: list[Event] = [
        prediction(),
        prediction((-0.0, "Ærø", -(2**63)), probabilities=None),
        outcome(prediction().id),
    ]
    road.record(made)

    events = read(road.source(), 3)

    assert by_id(events) == by_id(made)


def test_inputs_come_with_the_columns_that_they_were_packed_by(road: Road) -> None:
    """Without names and types the exact values would be bytes that nobody can read."""
    road.record([prediction()])

    (item,) = road_items(road.source(), 1)

    assert isinstance(item, RecordedEvent)
    assert item.row_format is not None
    assert item.row_format.columns == COLUMNS


def road_items(source: EventSource, count: int) -> list[RecordedEvent | UnreadableEvent]:
    items: list[RecordedEvent | UnreadableEvent] = []

    def there() -> bool:
        items.extend(source.read(count))
        return len(items) >= count

    wait_until(there, ARRIVAL_DEADLINE_S, f"{count} items come")
    return items


def test_what_was_not_committed_comes_again(road: Road) -> None:
    """A log worker that dies between reading and storing must lose nothing."""
    made = [prediction() for _ in range(5)]
    road.record(made)
    read(road.source(), 5)

    events = read(road.source(), 5)

    assert by_id(events) == by_id(made)


def test_what_was_committed_does_not_come_again(road: Road) -> None:
    """Else every start would read the whole history."""
    road.record([prediction() for _ in range(5)])
    source = road.source()
    read(source, 5)
    source.commit()
    source.read(1)
    source.commit()
    later = [prediction()]
    road.record(later)

    events = read(road.source(), 1)

    assert events == later


def test_what_was_rewound_comes_again_at_once(road: Road) -> None:
    """While the database is down, the same batch is tried again and again, and nothing overtakes it."""
    made = [prediction() for _ in range(5)]
    road.record(made)
    source = road.source()
    read(source, 5)

    source.rewind()
    first = read(source, 5)
    source.rewind()
    second = read(source, 5)

    assert by_id(first) == by_id(second) == by_id(made)


def test_a_rewound_source_goes_on_after_its_commit(road: Road) -> None:
    """When the database is back, the stream flows again without a new start."""
    road.record([prediction() for _ in range(3)])
    source = road.source()
    read(source, 3)
    source.rewind()
    read(source, 3)
    source.commit()
    later = [prediction()]

    road.record(later)

    assert read(source, 1) == later


def test_events_of_one_prediction_keep_their_order(road: Road) -> None:
    """An outcome that was corrected must not be overtaken by the one that it corrects."""
    first = prediction()
    made: list[Event] = [first, *[outcome(first.id, value) for value in range(20)]]
    road.record(made)

    events = read(road.source(), 21)

    assert events == made
