"""The dead letters' contract, over the file beside the journal and over a real Kafka; then what each is alone in."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Consumer, Message, TopicPartition
from roads import Item, KafkaRoad, LocalRoad, Road, read_items, take_items
from sample_events import outcome, prediction
from servers import HOST, KafkaServer, free_port

from phoenix_ml.application.ports import DeadLetters, RecordedEvent, UnreadableEvent
from phoenix_ml.domain.errors import EventsUnavailable
from phoenix_ml.domain.events import Event
from phoenix_ml.infrastructure.events.deadletters import FileDeadLetters
from phoenix_ml.infrastructure.events.journal import JournalRecord
from phoenix_ml.infrastructure.events.kafka import DEAD_EVENTS, Kafka
from phoenix_ml.settings import fixed_settings

# Kafka has 5 s to answer; a busy machine and the end of the connection have the rest.
KAFKA_DEADLINE_S = 30.0


def take(road: Road, count: int) -> list[Item]:
    """The next items, which the road then forgets."""
    source = road.source()
    items = take_items(source, count)
    source.read(1)
    source.commit()
    return items


def bury(letters: DeadLetters, items: Sequence[Item], reason: str = "no such model") -> None:
    for item in items:
        letters.bury(UnreadableEvent(item.payload, reason, item.origin))


def place(item: Item) -> str:
    origin = item.origin
    if isinstance(origin, JournalRecord):
        return f"{origin.segment.parent.name}/{origin.segment.name}@{origin.position}"
    return f"{origin.topic()}[{origin.partition()}]@{origin.offset()}"


def buried(road: Road, events: Sequence[Event]) -> list[Item]:
    """The events as they came over the road, each of them a letter now."""
    road.record(events)
    items = take(road, len(events))
    bury(road.dead_letters(), items)
    return items


def test_a_letter_tells_where_it_lay_why_it_was_buried_and_what_it_is(road: Road) -> None:
    """Whoever finds it has to find the cause, and nothing else is left of it."""
    road.record([prediction()])
    (item,) = take(road, 1)
    before = datetime.now(UTC).replace(microsecond=0)

    bury(road.dead_letters(), [item], "no such model: [/risk] Ærø")

    (letter,) = road.dead_letters().letters(10)
    assert isinstance(item, RecordedEvent)
    assert letter.place == place(item)
    assert letter.reason == "no such model: [/risk] Ærø"
    assert (letter.payload, letter.event) == (item.payload, item.event)
    assert before <= datetime.fromisoformat(letter.buried_at) <= datetime.now(UTC)


def test_letters_come_oldest_first_and_no_more_than_asked_for(road: Road) -> None:
    """What has lain longest is what Kafka or a full disk would lose first."""
    items = buried(road, [prediction() for _ in range(5)])

    letters = road.dead_letters().letters(3)

    assert [letter.payload for letter in letters] == [item.payload for item in items[:3]]


def test_letters_stay_until_they_are_requeued(road: Road) -> None:
    """To look is not to take, and a restart of everything forgets nothing."""
    items = buried(road, [prediction(), prediction()])

    first, second = road.dead_letters().letters(10), road.dead_letters().letters(10)

    assert first == second
    assert [letter.payload for letter in first] == [item.payload for item in items]


def test_nothing_buried_is_no_letter(road: Road) -> None:
    """The empty case is the usual one, and no error."""
    letters = road.dead_letters()

    assert (letters.letters(10), letters.requeue(10)) == ([], 0)


def test_a_requeued_event_comes_to_the_log_as_it_was(road: Road) -> None:
    """Once the cause is gone, the log gets the same bytes as if there had never been one."""
    made = prediction((-0.0, "Ærø", -(2**63)), traceparent=f"00-{'a' * 32}-{'b' * 16}-01")
    items = buried(road, [made, outcome(made.id)])

    requeued = road.dead_letters().requeue(10)

    assert requeued == 2
    again = by_payload(take(road, 2))
    assert again.keys() == by_payload(items).keys()
    for payload, item in by_payload(items).items():
        assert again[payload].event == item.event
        assert columns(again[payload]) == columns(item)


def by_payload(items: Sequence[Item]) -> dict[bytes, RecordedEvent]:
    found = {item.payload: item for item in items if isinstance(item, RecordedEvent)}
    assert len(found) == len(items)
    return found


def columns(item: RecordedEvent) -> object:
    return None if item.row_format is None else item.row_format.columns


def test_what_was_requeued_is_no_letter_any_more(road: Road) -> None:
    """A command that is typed twice must not send everything twice."""
    buried(road, [prediction(), prediction()])

    counts = [road.dead_letters().requeue(10), road.dead_letters().requeue(10)]

    assert counts == [2, 0]
    assert road.dead_letters().letters(10) == []


def test_a_requeue_with_a_limit_takes_the_oldest_and_leaves_the_rest(road: Road) -> None:
    """A few first: nobody wants to find out with a million that the cause is still there."""
    items = buried(road, [prediction() for _ in range(5)])

    requeued = road.dead_letters().requeue(2)

    assert requeued == 2
    rest = road.dead_letters().letters(10)
    assert [letter.payload for letter in rest] == [item.payload for item in items[2:]]
    assert sorted(item.payload for item in take(road, 2)) == sorted(item.payload for item in items[:2])
    assert [road.dead_letters().requeue(2), road.dead_letters().requeue(2)] == [2, 1]


def test_what_fails_again_is_buried_again_under_its_new_reason(road: Road) -> None:
    """The cause was not the only one: the letter must tell of the present one, and of no other."""
    buried(road, [prediction()])
    road.dead_letters().requeue(10)
    (again,) = take(road, 1)

    bury(road.dead_letters(), [again], "another reason")

    (letter,) = road.dead_letters().letters(10)
    assert (letter.place, letter.reason, letter.payload) == (place(again), "another reason", again.payload)


def test_bytes_that_are_no_event_are_kept_and_shown_as_such(road: Road) -> None:
    """They may be all that is left of an answer."""
    road.record_bytes(b"\x00garbage\xff")
    (item,) = take(road, 1)
    assert isinstance(item, UnreadableEvent)

    road.dead_letters().bury(item)

    (letter,) = road.dead_letters().letters(10)
    assert (letter.place, letter.reason, letter.payload, letter.event) == (
        place(item),
        item.reason,
        b"\x00garbage\xff",
        None,
    )


# The file alone.


@pytest.fixture
def local(tmp_path: Path) -> Iterator[LocalRoad]:
    with closing(LocalRoad(tmp_path)) as local:
        yield local


def test_a_journals_damaged_bytes_stay_when_events_are_requeued(local: LocalRoad) -> None:
    """The journal cannot bring them to the log, so they would only be buried again."""
    local.record_bytes(b"\x00garbage\xff")
    made = prediction()
    local.record([made])
    bury(local.dead_letters(), take(local, 2))

    requeued = local.dead_letters().requeue(10)

    assert requeued == 1
    assert [letter.payload for letter in local.dead_letters().letters(10)] == [b"\x00garbage\xff"]
    (item,) = take(local, 1)
    assert isinstance(item, RecordedEvent)
    assert item.event == made


@pytest.mark.parametrize("kept_bytes", [-1, -20, 1])
def test_a_letter_that_was_cut_off_in_the_middle_takes_no_other_along(
    local: LocalRoad, tmp_path: Path, kept_bytes: int
) -> None:
    """A full disk or a power cut leaves a part; its journal was told of no burial and has the whole still."""
    first, cut_off = buried(local, [prediction(), prediction()])
    file = fixed_settings(data=tmp_path).dead_letters_file
    whole, part = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(whole + part[:kept_bytes])

    before = local.dead_letters().letters(10)
    bury(local.dead_letters(), [cut_off])
    after = local.dead_letters().letters(10)

    assert [letter.payload for letter in before] == [first.payload]
    assert [letter.payload for letter in after] == [first.payload, cut_off.payload]
    assert local.dead_letters().requeue(10) == 2


def test_a_folder_that_cannot_be_written_is_told_of_by_its_name(tmp_path: Path) -> None:
    """The role that buries waits and tries again; anything else than this error would end it."""
    (tmp_path / "dead").write_text("a file where the folder should be")
    letters = FileDeadLetters(tmp_path / "dead" / "letters.jsonl", tmp_path / "journal")
    segment = tmp_path / "journal" / "api-0" / "1.segment"
    record = JournalRecord(b"", None, segment, 0, "damage")

    for attempt in attempts(letters, UnreadableEvent(b"", "damage", record)):
        with pytest.raises(EventsUnavailable, match=f"dead letters in {tmp_path / 'dead'} cannot be reached"):
            attempt()


def attempts(letters: DeadLetters, event: UnreadableEvent) -> list[Callable[[], object]]:
    """Every method of the port."""
    return [lambda: letters.bury(event), lambda: letters.letters(1), lambda: letters.requeue(1)]


# Kafka alone.


@pytest.fixture
def kafka(kafka_url: str) -> Iterator[KafkaRoad]:
    with closing(KafkaRoad(kafka_url)) as kafka:
        yield kafka


def test_a_message_that_could_not_be_read_is_requeued_as_it_was(kafka: KafkaRoad) -> None:
    """A later version has written it, or an update has taught the worker to read it: it gets another chance."""
    kafka.record_bytes(b"\x00garbage\xff")
    (item,) = take(kafka, 1)
    bury(kafka.dead_letters(), [item])

    requeued = kafka.dead_letters().requeue(10)

    (again,) = take(kafka, 1)
    assert requeued == 1
    assert isinstance(again, UnreadableEvent)
    assert (again.payload, again.origin.key(), again.origin.headers()) == (item.payload, b"key", None)


def test_a_cluster_without_topics_has_no_letters(kafka_url: str) -> None:
    """They are created by the first who ships; whoever looks before that is told that all is well."""
    letters = Kafka(kafka_url, partitions=3).dead_letters()

    assert (letters.letters(10), letters.requeue(10)) == ([], 0)


@pytest.mark.timeout(60)
def test_a_message_as_large_as_kafka_takes_can_still_be_buried(kafka: KafkaRoad) -> None:
    """A letter is larger than its message; refused, it would hold up its partition for ever."""
    payload = b"\xc1" * 999_000
    kafka.record_bytes(payload)
    (item,) = read_items(kafka.source(), 1)
    assert isinstance(item, UnreadableEvent)

    kafka.dead_letters().bury(UnreadableEvent(item.payload, "because " * 10_000, item.origin))

    (letter,) = kafka.dead_letters().letters(10)
    assert letter.payload == payload
    assert letter.reason.startswith("because because")


def test_many_letters_are_buried_within_a_log_workers_patience(kafka: KafkaRoad) -> None:
    """Kafka takes a log worker that buries a batch for minutes, without asking for more, for dead."""
    kafka.record([prediction() for _ in range(500)])
    items = take(kafka, 500)

    bury(kafka.dead_letters(), items)

    assert len(kafka.dead_letters().letters(1000)) == 500


@pytest.mark.parametrize("state", ["absent", "frozen"])
def test_a_kafka_that_does_not_answer_is_told_of_in_time(kafka_server: KafkaServer, state: str) -> None:
    """A log worker that waited for ever would look healthy, and a person would wait for nothing."""
    kafka_server.start()
    with closing(KafkaRoad(f"{kafka_server.url}/{state}-{free_port()}")) as road:
        road.record([prediction()])
        (item,) = take(road, 1)
        url = f"kafka://{HOST}:{free_port()}" if state == "absent" else kafka_server.url
        letters = Kafka(url, partitions=3).dead_letters()
        event = UnreadableEvent(item.payload, "no such model", item.origin)
        if state == "frozen":
            kafka_server.freeze()
        try:
            with ThreadPoolExecutor(3) as pool:
                asked = [pool.submit(attempt) for attempt in attempts(letters, event)]
                errors = [attempt.exception(KAFKA_DEADLINE_S) for attempt in asked]
        finally:
            kafka_server.start()

    for error in errors:
        assert isinstance(error, EventsUnavailable)
        assert f"{url} does not answer: " in error.message


@pytest.mark.parametrize("limit", [10, 2])
def test_letters_with_gaps_between_their_offsets_are_requeued(
    kafka: KafkaRoad, kafka_url: str, limit: int
) -> None:
    """A compacted topic has them, as one written to in transactions: all letters would wait there for ever."""
    items = buried(kafka, [prediction()])
    cluster = Kafka(kafka_url, partitions=3)
    writer = cluster.producer(**{"transactional.id": kafka_url})
    writer.init_transactions(30)
    # The last offset is the end of a transaction, and no message.
    for end in (writer.abort_transaction, writer.commit_transaction):
        writer.begin_transaction()
        writer.produce(cluster.full_name(DEAD_EVENTS), items[0].payload)
        writer.flush(30)
        end(30)

    letters = kafka.dead_letters().letters(limit)
    counts = [kafka.dead_letters().requeue(limit), kafka.dead_letters().requeue(limit)]

    assert [letter.payload for letter in letters] == [items[0].payload] * 2
    assert counts == [2, 0]


@pytest.mark.parametrize("gone", [2, 3])
def test_letters_that_go_while_they_are_looked_for_are_not_waited_for(
    kafka: KafkaRoad, kafka_url: str, gone: int
) -> None:
    """Kafka keeps them for a week: it may be over just now."""
    items = buried(kafka, [prediction() for _ in range(3)])

    letters = ForgetfulKafka(kafka_url, gone).dead_letters().letters(10)

    assert [letter.payload for letter in letters] == [item.payload for item in items[gone:]]


class Forgetful(Consumer):
    """What a consumer sees of a Kafka that forgets messages once it has told how many there are."""

    def __init__(self, properties: dict[str, Any], forget: Callable[[], object]) -> None:
        super().__init__(properties)
        self._forget = forget

    def get_watermark_offsets(self, *args: Any, **options: Any) -> Any:
        told = super().get_watermark_offsets(*args, **options)
        self._forget()
        return told


class ForgetfulKafka(Kafka):
    def __init__(self, url: str, gone: int) -> None:
        super().__init__(url, partitions=3)
        self._gone = gone

    def consumer(self, group: str, **properties: Any) -> Consumer:
        own = {"group.id": self.full_name(group), "auto.offset.reset": "earliest"}
        return self._made(lambda given: Forgetful(given, self._forget), own | properties)

    def _forget(self) -> None:
        first = TopicPartition(self.full_name(DEAD_EVENTS), 0, self._gone)
        with self._admin() as admin:
            admin.delete_records([first])[first].result()


class Mute(Consumer):
    """What a consumer sees of a Kafka that tells how many messages there are, and then gives none of them."""

    def consume(self, *_: Any) -> list[Message]:
        return []


class MuteKafka(Kafka):
    def consumer(self, group: str, **properties: Any) -> Consumer:
        return self._made(Mute, {"group.id": self.full_name(group), **properties})


def test_letters_that_kafka_does_not_give_are_not_passed_over(kafka: KafkaRoad, kafka_url: str) -> None:
    """Who reads that there are no dead letters looks no further."""
    buried(kafka, [prediction()])

    with pytest.raises(EventsUnavailable, match="it gave 0 of 1 dead letters"):
        MuteKafka(kafka_url, partitions=3).dead_letters().letters(10)
