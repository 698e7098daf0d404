"""The ship role on a real Kafka: what it makes there, and what it does with events that Kafka will never take."""

import random
import string
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import msgspec
import pytest
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic
from roads import read_items
from sample_events import DIGEST, SCHEMA, outcome, prediction
from servers import wait_until

from phoenix_ml.application.ports import RecordedEvent
from phoenix_ml.domain.events import Event
from phoenix_ml.infrastructure.events.deadletters import FileDeadLetters
from phoenix_ml.infrastructure.events.journal import JournalWriter
from phoenix_ml.infrastructure.events.kafka import (
    DEAD_EVENTS,
    INFERENCE_EVENTS,
    MODEL_EVENTS,
    Kafka,
    KafkaEvents,
)
from phoenix_ml.infrastructure.telemetry.metrics import MetricsWriter
from phoenix_ml.processes.ship import ShipRole
from phoenix_ml.settings import Settings, fixed_settings


def noise(length: int) -> str:
    """Text that no compression makes shorter by much."""
    return "".join(random.Random(1).choices(string.ascii_letters + string.digits, k=length))


@pytest.fixture
def settings(tmp_path: Path, kafka_url: str) -> Settings:
    return fixed_settings(data=tmp_path, events=kafka_url, kafka_partitions=3)


@pytest.fixture
def kafka(settings: Settings) -> Kafka:
    return Kafka(settings.events, settings.kafka_partitions)


@pytest.fixture
def ship_role(settings: Settings, kafka: Kafka) -> Iterator[ShipRole]:
    with MetricsWriter(settings.data / "ship.mmap") as metrics:
        with closing(ShipRole(settings, kafka, metrics)) as role:
            yield role


@pytest.fixture
def admin(kafka_url: str) -> AdminClient:
    servers = kafka_url.removeprefix("kafka://").partition("/")[0]
    return AdminClient({"bootstrap.servers": servers, "log_level": 0})


def record(settings: Settings, events: list[Event]) -> None:
    with closing(JournalWriter(settings.journal_folder / "api-0")) as writer:
        for event in events:
            writer.append(msgspec.msgpack.encode(event), DIGEST, SCHEMA)


def ship(role: ShipRole) -> None:
    """Returns when the journals are shipped to their end."""
    stopping = threading.Event()
    stopping.set()
    role.run(stopping)


def shipped(kafka: Kafka, count: int) -> list[Event]:
    with closing(KafkaEvents(kafka)) as source:
        items = read_items(source, count)
    return sorted(
        (item.event for item in items if isinstance(item, RecordedEvent)), key=lambda event: event.id
    )


def partitions(admin: AdminClient, kafka: Kafka) -> dict[str, int]:
    """How many partitions the platform's topics have, once all are known to the broker."""
    counts: dict[str, int] = {}

    def all_there() -> bool:
        there = admin.list_topics(timeout=10).topics
        for name in (INFERENCE_EVENTS, DEAD_EVENTS, MODEL_EVENTS):
            counts[name] = len(there[full].partitions) if (full := kafka.full_name(name)) in there else 0
        return all(counts.values())

    wait_until(all_there, 30, "the topics are there")
    return counts


def test_topics_are_created_with_the_partitions_of_the_setting(
    ship_role: ShipRole, kafka: Kafka, admin: AdminClient
) -> None:
    """It bounds how many log workers can share the load, and cannot be changed without breaking keys' order."""
    ship(ship_role)

    assert partitions(admin, kafka) == {INFERENCE_EVENTS: 3, DEAD_EVENTS: 1, MODEL_EVENTS: 1}


def test_a_topic_that_is_there_is_left_as_it_is(
    ship_role: ShipRole, kafka: Kafka, admin: AdminClient, settings: Settings
) -> None:
    """Whoever runs the cluster has made it with his own partitions and replicas, and knows why."""
    name = kafka.full_name(INFERENCE_EVENTS)
    admin.create_topics([NewTopic(name, 5)])[name].result()
    made = prediction()
    record(settings, [made])

    ship(ship_role)

    assert partitions(admin, kafka) == {INFERENCE_EVENTS: 5, DEAD_EVENTS: 1, MODEL_EVENTS: 1}
    assert shipped(kafka, 1) == [made]


@pytest.mark.parametrize("larger_client_limit", [False, True])
def test_an_event_too_large_for_kafka_becomes_a_letter_and_stops_no_other(
    settings: Settings, kafka_url: str, larger_client_limit: bool
) -> None:
    """It would be sent for ever, and everything after it would wait: whether client or broker refuses it."""
    url = f"{kafka_url}?message.max.bytes=4000000" if larger_client_limit else kafka_url
    kafka = Kafka(url, partitions=3)
    before, after = [prediction() for _ in range(200)], [prediction() for _ in range(200)]
    too_large = outcome(before[0].id, noise(2_000_000))
    record(settings, [*before, too_large, *after])
    with MetricsWriter(settings.data / "ship.mmap") as metrics:
        with closing(ShipRole(settings, kafka, metrics)) as role:
            ship(role)

    assert shipped(kafka, 400) == sorted([*before, *after], key=lambda event: event.id)
    (letter,) = FileDeadLetters(settings.dead_letters_file, settings.journal_folder).letters(10)
    assert letter.event == too_large
    assert "large" in letter.reason.lower()
    assert letter.place.startswith("api-0/")


def test_a_topic_with_a_low_limit_refuses_no_more_than_what_is_too_large(
    settings: Settings, kafka: Kafka, ship_role: ShipRole, admin: AdminClient
) -> None:
    """Kafka refuses a whole batch for its size: the small events in it must not be buried for that."""
    name = kafka.full_name(INFERENCE_EVENTS)
    admin.create_topics([NewTopic(name, 3, config={"max.message.bytes": "2000"})])[name].result()
    made = [prediction() for _ in range(200)]
    too_large = prediction(request_id=noise(10_000))
    record(settings, [*made[:100], too_large, *made[100:]])

    ship(ship_role)

    assert shipped(kafka, 200) == made
    letters = FileDeadLetters(settings.dead_letters_file, settings.journal_folder).letters(1000)
    assert [letter.event for letter in letters] == [too_large]
