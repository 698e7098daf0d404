"""What Kafka says of log workers, and what its topics hold."""

from contextlib import suppress

from confluent_kafka import (
    ConsumerGroupTopicPartitions,
    KafkaError,
    KafkaException,
    Message,
    Producer,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient, OffsetSpec  # type: ignore[attr-defined]
from phoenix_server import PhoenixServer
from servers import wait_until

from phoenix_ml.infrastructure.events.kafka import DEAD_EVENTS, INFERENCE_EVENTS, Kafka

# The default of the setting.
PARTITIONS = 6
_GROUP = "phoenix-log"


class Group:
    """What Kafka says of the log workers and of how far they have come."""

    def __init__(self, server: PhoenixServer) -> None:
        self._kafka = Kafka(server.settings.events, PARTITIONS)
        self._name = self._kafka.full_name(_GROUP)
        self._topic = self._kafka.full_name(INFERENCE_EVENTS)
        servers = server.settings.events.removeprefix("kafka://").partition("/")[0]
        self._admin = AdminClient({"bootstrap.servers": servers, "log_level": 0})

    def assignments(self) -> dict[str, int]:
        """The partitions that each member has; empty while the group is not settled."""
        state, partitions = self._described()
        return partitions if state == "STABLE" else {}

    def await_members(self, *partitions: int, deadline_s: float = 30.0) -> set[str]:
        """Their ids, once there are members with so many partitions each."""
        wait_until(
            lambda: sorted(self.assignments().values()) == sorted(partitions),
            deadline_s,
            f"the group has members with {partitions} partitions",
        )
        return set(self.assignments())

    def recorded(self) -> int:
        """How many events the topic holds."""
        return sum(self._ends().values())

    def await_caught_up(self) -> None:
        """Returns when every event of the topic is told to be logged."""
        wait_until(lambda: self._committed() == self._ends(), 30, "all is logged and committed")

    def rewind(self) -> None:
        """The group begins again with the first event, once Kafka knows of no member any more."""
        wait_until(lambda: self._described()[0] == "EMPTY", 30, "the group has no member")
        first = [TopicPartition(self._topic, number, 0) for number in range(PARTITIONS)]
        request = ConsumerGroupTopicPartitions(self._name, first)
        (future,) = self._admin.alter_consumer_group_offsets([request]).values()
        assert [partition.error for partition in future.result().topic_partitions] == [None] * PARTITIONS

    def dead(self, count: int) -> list[Message]:
        """So many messages of the dead topic, in their order."""
        return self.messages(DEAD_EVENTS, count)

    def messages(self, topic: str, count: int) -> list[Message]:
        """So many messages, or a few more that are there, of a topic with one partition, in their order."""
        messages: list[Message] = []
        consumer = self._kafka.consumer("check")
        consumer.assign([TopicPartition(self._kafka.full_name(topic), 0, 0)])

        def there() -> bool:
            messages.extend(message for message in consumer.consume(1000, 0.5) if message.error() is None)
            return len(messages) >= count

        try:
            wait_until(there, 30, f"{count} messages of {topic}")
        finally:
            consumer.close()
        return messages

    def produce(self, messages: list[tuple[bytes, bytes, list[tuple[str, bytes]]]]) -> list[str]:
        """Where each message (key, value, headers) came to stand: TOPIC[PARTITION]@OFFSET."""
        places: list[str] = []

        def delivered(error: KafkaError | None, message: Message) -> None:
            assert error is None
            places.append(f"{message.topic()}[{message.partition()}]@{message.offset()}")

        producer: Producer = self._kafka.producer()
        for key, value, headers in messages:
            producer.produce(self._topic, value, key, headers=headers, on_delivery=delivered)  # type: ignore[arg-type]
            producer.flush()
        return places

    def _described(self) -> tuple[str, dict[str, int]]:
        """The group's state and the partitions of each member; no state while Kafka cannot tell."""
        with suppress(KafkaException):
            found = self._admin.describe_consumer_groups([self._name])[self._name].result()
            members = {one.member_id: len(one.assignment.topic_partitions) for one in found.members}
            return found.state.name, members
        return "", {}

    def _ends(self) -> dict[int, int]:
        latest = OffsetSpec.latest()  # type: ignore[no-untyped-call]
        asked = {TopicPartition(self._topic, number): latest for number in range(PARTITIONS)}
        ends: dict[int, int] = {}

        def asked_all() -> bool:
            # A broker that was frozen or killed takes a moment to agree with itself about who leads.
            with suppress(KafkaException):
                found = self._admin.list_offsets(asked).items()
                ends.update({p.partition: f.result().offset for p, f in found})
                return True
            return False

        wait_until(asked_all, 30, "Kafka tells the ends of its partitions")
        return {number: end for number, end in ends.items() if end > 0}

    def _committed(self) -> dict[int, int] | None:
        """None while Kafka cannot tell."""
        with suppress(KafkaException):
            (future,) = self._admin.list_consumer_group_offsets(
                [ConsumerGroupTopicPartitions(self._name)]
            ).values()
            return {p.partition: p.offset for p in future.result().topic_partitions}
        return None
