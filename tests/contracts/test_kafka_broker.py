"""What everything else rests on: the broker keeps what it has acknowledged, however it dies."""

import pytest
from confluent_kafka import Consumer, KafkaError, Message, Producer
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic
from servers import KafkaServer, wait_until

TOPIC = "acknowledged"
# Many more than are on their way, and far fewer than librdkafka has room for when the broker is slow.
UNACKNOWLEDGED_LIMIT = 10_000


@pytest.mark.timeout(240)
def test_a_killed_broker_keeps_what_it_acknowledged(kafka_server: KafkaServer) -> None:
    """Events are dropped from the journal when Kafka says that it has them: then it must have them."""
    kafka_server.start()
    admin = AdminClient({"bootstrap.servers": kafka_server.bootstrap_servers})
    admin.create_topics([NewTopic(TOPIC, 3)])[TOPIC].result()
    acknowledged: set[bytes] = set()

    def delivered(error: KafkaError | None, message: Message) -> None:
        assert error is None
        acknowledged.add(message.value() or b"")

    producer = Producer(
        {
            "bootstrap.servers": kafka_server.bootstrap_servers,
            "enable.idempotence": True,
            "acks": "all",
            "message.timeout.ms": 0,
            "log_level": 0,
            "on_delivery": delivered,
        }
    )
    sent = 0

    def send_until(count: int) -> None:
        nonlocal sent
        while len(acknowledged) < count:
            if len(producer) >= UNACKNOWLEDGED_LIMIT:
                producer.poll(0.1)
                continue
            producer.produce(TOPIC, b"%d" % sent, b"%d" % sent)
            sent += 1
            producer.poll(0 if sent % 50 else 0.001)

    for round_number in range(1, 3):
        send_until(5000 * round_number)
        kafka_server.kill()  # with messages on their way
        kafka_server.start()
    wait_until(lambda: producer.flush(1) == 0, 60, "the last messages are acknowledged")

    assert read_all(kafka_server, sent) == sorted(acknowledged, key=int)
    assert len(acknowledged) == sent


def read_all(server: KafkaServer, count: int) -> list[bytes]:
    """The values in the topic, each as often as it is there."""
    consumer = Consumer(
        {"bootstrap.servers": server.bootstrap_servers, "group.id": "check", "auto.offset.reset": "earliest"}
    )
    consumer.subscribe([TOPIC])
    values: list[bytes] = []

    def have_all() -> bool:
        found = consumer.consume(10_000, 1.0)
        values.extend(message.value() or b"" for message in found if message.error() is None)
        return len(values) >= count

    try:
        wait_until(have_all, 60, f"{count} messages are read")
    finally:
        consumer.close()
    return sorted(values, key=int)
