"""What a network that fails does to those who wait for Kafka."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path

import msgspec
import pytest
from proxy import FaultProxy
from roads import read_batch
from sample_events import DIGEST, SCHEMA, prediction
from servers import HOST, KafkaServer, free_port, wait_until

from phoenix_ml.domain.errors import EventsUnavailable
from phoenix_ml.infrastructure.events.cloudevents import Message, encode_record
from phoenix_ml.infrastructure.events.journal import JournalWriter
from phoenix_ml.infrastructure.events.kafka import INFERENCE_EVENTS, Kafka, KafkaEvents, KafkaOutbox
from phoenix_ml.infrastructure.telemetry.catalogue import SHIP_HEARTBEAT
from phoenix_ml.infrastructure.telemetry.metrics import MetricsWriter, render
from phoenix_ml.processes.ship import ShipRole
from phoenix_ml.settings import fixed_settings


@pytest.mark.timeout(120)
def test_a_worker_that_lost_kafka_before_the_topic_was_there_reads_it_soon_after(
    kafka_server: KafkaServer,
) -> None:
    """By itself librdkafka looks for a topic that it failed to find once in five minutes: so late was the log."""
    kafka_server.start()
    with FaultProxy(HOST, kafka_server.proxied_port, port=kafka_server.proxy_port) as network:
        direct = Kafka(f"{kafka_server.url}/lost", partitions=1)
        through_proxy = Kafka(f"{kafka_server.proxied_url}/lost?socket.timeout.ms=1000", partitions=1)
        with closing(KafkaEvents(through_proxy)) as events, closing(KafkaOutbox(direct)) as outbox:
            troubles: list[str] = []

            def has_looked_in_vain() -> bool:
                try:
                    events.read(10)
                except EventsUnavailable as exc:
                    troubles.append(exc.message.lower())
                return any("unknown topic" in trouble for trouble in troubles)

            def has_lost_its_brokers() -> bool:
                # In which words depends on what librdkafka was about when the network went.
                has_looked_in_vain()
                return bool(troubles) and "unknown topic" not in troubles[-1]

            wait_until(has_looked_in_vain, 30, "the worker has looked for the topic")
            network.hang()
            wait_until(has_lost_its_brokers, 60, "the worker has lost its brokers")
            direct.create_topics()
            event = prediction()
            outbox.send(INFERENCE_EVENTS, [encode_record(msgspec.msgpack.encode(event), SCHEMA)])
            network.up()

            received = []

            def has_received() -> bool:
                with contextlib.suppress(EventsUnavailable):
                    received.extend(events.read(10))
                return bool(received)

            wait_until(has_received, 30, "the worker reads what was shipped")
            assert len(received) == 1


@pytest.mark.timeout(120)
def test_a_worker_that_stops_while_kafka_hangs_does_not_wait_for_it(kafka_server: KafkaServer) -> None:
    """The supervisor would kill it, and the metrics and rows of the roles beside it with it."""
    kafka_server.start()
    with FaultProxy(HOST, kafka_server.proxied_port, port=kafka_server.proxy_port) as network:
        kafka = Kafka(f"{kafka_server.proxied_url}/stops", partitions=1)
        kafka.create_topics()
        events = KafkaEvents(kafka)
        with closing(KafkaOutbox(kafka)) as outbox:
            outbox.send(INFERENCE_EVENTS, [encode_record(msgspec.msgpack.encode(prediction()), SCHEMA)])
        read_batch(events, 10)  # so it is a member
        events.commit()
        network.hang()
        closed = threading.Event()

        def close() -> None:
            events.close()
            closed.set()

        threading.Thread(target=close, daemon=True).start()

        assert closed.wait(30)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("events", [0, 1])
def test_the_heartbeat_of_shipping_stands_still_while_kafka_hangs(
    kafka_server: KafkaServer, tmp_path: Path, events: int
) -> None:
    """Readiness and an alert go by it: one that beats on, be there something to ship or not, says that all is well."""
    kafka_server.start()
    settings = fixed_settings(data=tmp_path)
    stopping = threading.Event()

    def silent_s() -> float:
        return time.time() - float(render(tmp_path, (SHIP_HEARTBEAT,)).rsplit(b" ", 1)[1])

    with (
        FaultProxy(HOST, kafka_server.proxied_port, port=kafka_server.proxy_port) as network,
        MetricsWriter(tmp_path / "ship.mmap") as metrics,
        closing(JournalWriter(settings.journal_folder / "api-0")) as journal,
        closing(
            ShipRole(settings, Kafka(f"{kafka_server.proxied_url}/beats", partitions=1), metrics)
        ) as role,
    ):
        begun = time.time()
        thread = threading.Thread(target=role.run, args=(stopping,), daemon=True)
        thread.start()
        try:
            wait_until(lambda: time.time() - silent_s() > begun + 1, 30, "it has begun to ship")
            network.hang()
            for _ in range(events):
                journal.append(msgspec.msgpack.encode(prediction()), DIGEST, SCHEMA)
            wait_until(lambda: silent_s() > 8, 30, "the heartbeat stands still")
            network.up()
            wait_until(lambda: silent_s() < 1, 30, "the heartbeat goes on")
        finally:
            stopping.set()
            thread.join(30)
    assert not thread.is_alive()


class Outbox(KafkaOutbox):
    """Tells how many messages wait as a test has it, and sends none of them."""

    def __init__(self, kafka: Kafka, waiting: list[int], look: Callable[[], object]) -> None:
        super().__init__(kafka)
        self._waiting = waiting
        self._look = look

    @property
    def unacknowledged(self) -> int:
        return self._waiting.pop(0)

    def send(
        self, topic: str, messages: Iterable[Message], keep_waiting: Callable[[], None] = lambda: None
    ) -> list[tuple[bytes, str]]:
        for _ in messages:
            keep_waiting()
            self._look()
        return []


def test_a_smaller_send_than_the_one_before_is_no_progress(tmp_path: Path) -> None:
    """Where Kafka fails between the two, the heartbeat would beat once while nothing gets through."""
    settings = fixed_settings(data=tmp_path)
    kafka = Kafka(f"kafka://{HOST}:{free_port()}", partitions=1)
    beats: list[float] = []

    def look() -> None:
        beats.append(float(render(tmp_path, (SHIP_HEARTBEAT,)).rsplit(b" ", 1)[1]))

    with (
        MetricsWriter(tmp_path / "ship.mmap") as metrics,
        closing(JournalWriter(settings.journal_folder / "api-0")) as journal,
        closing(ShipRole(settings, kafka, metrics)) as role,
    ):
        role._outbox = Outbox(kafka, [9, 5, 1, 1], look)
        for _ in range(2):
            for _ in range(2):
                journal.append(msgspec.msgpack.encode(prediction()), DIGEST, SCHEMA)
            role.step(threading.Event())
            look()

    first, progress, done, *later = beats
    assert first < progress < done
    assert later[:2] == [done, done]
