"""The event source's contract, over the journal itself and over a real Kafka."""

from collections.abc import Sequence

from roads import Item, Road, read_batch, read_items, take_items
from sample_events import COLUMNS, outcome, prediction

from phoenix_ml.application.ports import EventSource, RecordedEvent
from phoenix_ml.domain.events import Event


def read(source: EventSource, count: int) -> list[Event]:
    """So many events, without a commit between them."""
    events = events_of(read_items(source, count))
    assert len(events) == count
    return events


def events_of(items: Sequence[Item]) -> list[Event]:
    return [item.event for item in items if isinstance(item, RecordedEvent)]


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

    (item,) = read_items(road.source(), 1)

    assert isinstance(item, RecordedEvent)
    assert item.row_format is not None
    assert item.row_format.columns == COLUMNS


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
    take_items(source, 5)
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
    in_hand = events_of(read_batch(source, 5))

    source.rewind()
    first = events_of(source.read(5))
    source.rewind()
    second = events_of(source.read(5))
    source.commit()
    later = events_of(take_items(source, 5 - len(second)))

    count = len(in_hand)
    assert first[:count] == second[:count] == in_hand
    assert by_id([*second, *later]) == by_id(made)


def test_a_rewound_source_goes_on_after_its_commit(road: Road) -> None:
    """When the database is back, the stream flows again without a new start."""
    road.record([prediction() for _ in range(3)])
    source = road.source()
    read_batch(source, 3)
    source.rewind()
    again = source.read(3)
    source.commit()
    take_items(source, 3 - len(again))
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
