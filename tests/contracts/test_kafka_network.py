"""What a network that fails does to those who wait for Kafka."""

import contextlib
from contextlib import closing

import msgspec
import pytest
from proxy import FaultProxy
from sample_events import SCHEMA, prediction
from servers import HOST, KafkaServer, wait_until

from phoenix_ml.domain.errors import EventsUnavailable
from phoenix_ml.infrastructure.events.cloudevents import encode_record
from phoenix_ml.infrastructure.events.kafka import INFERENCE_EVENTS, Kafka, KafkaEvents, KafkaOutbox


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

            def note_trouble(words: str) -> bool:
                try:
                    events.read(10)
                except EventsUnavailable as exc:
                    troubles.append(exc.message)
                return any(words in trouble.lower() for trouble in troubles)

            wait_until(lambda: note_trouble("unknown topic"), 30, "the worker has looked for the topic")
            network.hang()
            wait_until(lambda: note_trouble("timed out"), 60, "the worker has lost its brokers")
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
