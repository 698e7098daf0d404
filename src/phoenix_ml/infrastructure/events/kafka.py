"""``PHOENIX_EVENTS=kafka://…`` — Kafka between the journals and the log.

The journals' events go to ``inference-events`` (``KafkaOutbox``), from where log workers of one group take
them (``KafkaEvents``). What cannot be logged goes on to ``inference-events.dead`` (``KafkaDeadLetters``).
Registry changes are told on ``model-events`` (``ModelAnnouncer``, ``follow_changes``).
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, TypeVar, cast
from urllib.parse import parse_qsl, unquote, urlsplit

import msgspec
from confluent_kafka import (
    OFFSET_END,
    Consumer,
    KafkaError,
    KafkaException,
    Message,
    Producer,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from phoenix_ml.application.ports import DeadLetter, RecordedEvent, UnreadableEvent
from phoenix_ml.domain.errors import EventsUnavailable, Misconfigured
from phoenix_ml.domain.events import ModelChanged
from phoenix_ml.infrastructure.events import cloudevents

INFERENCE_EVENTS: Final = "inference-events"
DEAD_EVENTS: Final = "inference-events.dead"
MODEL_EVENTS: Final = "model-events"
MODEL_ALERTS: Final = "model-alerts"
RETRAIN_REQUESTS: Final = "retrain-requests"

_LOG_GROUP: Final = "phoenix-log"
_REQUEUE_GROUP: Final = "phoenix-dead-requeue"
_PATIENCE_S: Final = 5.0
# A stop waits for these.
_TOPIC_PATIENCE_S: Final = 2.0
_LEAVE_PATIENCE_S: Final = 5.0
# Twice of what Kafka takes by default: a letter is larger than its message, and must not be refused as well.
_LETTER_BYTES: Final = 2 * 1024 * 1024
_REASON_CHARACTERS: Final = 1000
_NOT_SETTLED: Final = {
    KafkaError.LEADER_NOT_AVAILABLE,
    KafkaError.NOT_LEADER_FOR_PARTITION,
    KafkaError.NOT_COORDINATOR,
    KafkaError.COORDINATOR_NOT_AVAILABLE,
    KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
}
_TOO_LARGE: Final = {
    KafkaError.MSG_SIZE_TOO_LARGE,
    KafkaError.RECORD_LIST_TOO_LARGE,
    KafkaError.INVALID_RECORD,
}

log = logging.getLogger(__name__)
_Answer = TypeVar("_Answer")
_Client = TypeVar("_Client", AdminClient, Producer, Consumer)


class Kafka:
    """One cluster as the setting names it: ``kafka://HOST[:PORT],…[/PREFIX][?PROPERTY=VALUE&…]``.

    Topics and groups are named ``PREFIX.NAME``, where there is a prefix. The properties are librdkafka's own,
    such as ``security.protocol=SASL_SSL``. Raises Misconfigured for a URL or a property that it refuses.
    """

    def __init__(self, url: str, partitions: int) -> None:
        parts = urlsplit(url)
        brokers = [host for host in unquote(parts.netloc).split(",") if host]
        if parts.scheme != "kafka" or not brokers or "@" in parts.netloc:
            raise Misconfigured(
                "PHOENIX_EVENTS: give kafka://HOST[:PORT],…[/PREFIX][?security.protocol=SASL_SSL&…]; user and "
                "password are the properties sasl.username and sasl.password",
                setting="PHOENIX_EVENTS",
            )
        self.name = f"kafka://{','.join(brokers)}{parts.path}"
        self._prefix = unquote(parts.path).strip("/")
        self._partitions = partitions
        self._properties = {
            "bootstrap.servers": ",".join(brokers),
            "client.id": "phoenix-ml",
            "log_level": 2,  # less severe is told by error_cb, in one place and not at each attempt
            "reconnect.backoff.ms": 100,
            "reconnect.backoff.max.ms": 5000,
            "retry.backoff.ms": 100,
            "retry.backoff.max.ms": 5000,
            # A network that swallows packets is noticed this late, and a new connection tried.
            "socket.timeout.ms": 10_000,
            # A consumer that lost its brokers before it saw its topic looks for it again only so often: librdkafka's
            # own 5 minutes were how long nothing was logged.
            "topic.metadata.refresh.interval.ms": 5000,
            "socket.keepalive.enable": True,
        } | dict(parse_qsl(parts.query))
        # What a property says wrongly is told at the start, not by the first thread that needs it.
        self.producer()
        self.consumer("phoenix").close()

    def full_name(self, name: str) -> str:
        """The name with the prefix: of a topic or a group."""
        return f"{self._prefix}.{name}" if self._prefix else name

    def producer(self, **properties: Any) -> Producer:
        """A producer whose messages are there, once and in order, when they are acknowledged."""
        return self._made(Producer, {"enable.idempotence": True, "acks": "all", **properties})

    def consumer(self, group: str, **properties: Any) -> Consumer:
        """A member of the group, or with ``assign`` a reader under its name."""
        return self._made(
            Consumer,
            {
                "group.id": self.full_name(group),
                "enable.auto.commit": False,
                "auto.offset.reset": "earliest",
                "session.timeout.ms": 10_000,
                **properties,
            },
        )

    def announcer(self) -> "ModelAnnouncer":
        """Tells the API processes of changes in the registry."""
        return ModelAnnouncer(self)

    def dead_letters(self) -> "KafkaDeadLetters":
        """The letters of the log workers."""
        return KafkaDeadLetters(self)

    def create_topics(self) -> None:
        """All topics of the platform are there when it returns. Raises EventsUnavailable."""
        partitions = {
            INFERENCE_EVENTS: self._partitions,
            DEAD_EVENTS: 1,
            MODEL_EVENTS: 1,  # changes are read in their order
            MODEL_ALERTS: 1,
            RETRAIN_REQUESTS: 1,
        }
        with self._admin() as admin:
            there = admin.list_topics(timeout=_PATIENCE_S).topics
            missing = [
                NewTopic(
                    self.full_name(name),
                    count,
                    -1,
                    config={"max.message.bytes": str(_LETTER_BYTES)} if name == DEAD_EVENTS else {},
                )
                for name, count in partitions.items()
                if self.full_name(name) not in there
            ]
            created = admin.create_topics(missing, request_timeout=_PATIENCE_S) if missing else {}
            for future in created.values():
                _created(future.result)

    def check(self) -> str:
        """Which cluster answers. Raises EventsUnavailable when none does."""
        with self._admin() as admin:
            return str(admin.list_topics(timeout=_PATIENCE_S).cluster_id)

    def unavailable(self, reason: KafkaError | str, trouble: str = "") -> EventsUnavailable:
        """The error to raise; ``trouble`` is what the connection complained of."""
        words = reason.str() if isinstance(reason, KafkaError) else reason
        told = f"{words}: {trouble}" if trouble else words
        return EventsUnavailable(f"{self.name} does not answer: {told}", events=self.name)

    @contextmanager
    def _admin(self) -> Iterator[AdminClient]:
        """Within the block, what Kafka refuses or does not answer raises EventsUnavailable."""
        trouble = _Trouble()
        admin = self._made(AdminClient, {"error_cb": trouble})
        try:
            yield admin
        except KafkaException as exc:
            admin.poll(0)  # Only now is it told why: the exception knows that time was up.
            raise self.unavailable(exc.args[0], trouble.words) from exc

    def _made(self, kind: Callable[[dict[str, Any]], _Client], properties: dict[str, Any]) -> _Client:
        try:
            return kind(self._properties | properties)
        except KafkaException as exc:
            raise Misconfigured(
                f"PHOENIX_EVENTS: {self.name}: {exc.args[0].str()}", setting="PHOENIX_EVENTS"
            ) from exc


class _Trouble:
    """What a connection last complained of."""

    words = ""

    def __call__(self, error: KafkaError) -> None:
        # That all brokers are down comes last, and says less than why.
        if error.code() != KafkaError._ALL_BROKERS_DOWN:
            self.words = error.str()


class KafkaOutbox:
    """Sends messages, and returns when Kafka has acknowledged them. Belongs to one thread."""

    def __init__(self, kafka: Kafka, **properties: Any) -> None:
        self.retries_total = 0
        self._kafka = kafka
        self._properties = properties
        self._refused: list[tuple[bytes, str]] = []
        self._failure: KafkaError | None = None
        self._trouble = _Trouble()
        self._producer = self._new_producer()

    @property
    def trouble(self) -> str:
        """What the connection last complained of."""
        return self._trouble.words or "no broker has answered yet"

    @property
    def unacknowledged(self) -> int:
        """How many of the messages that are being sent Kafka has not acknowledged yet."""
        return len(self._producer)

    def check(self, topic: str) -> None:
        """Returns when Kafka has answered. Raises EventsUnavailable when it does not."""
        try:
            self._producer.list_topics(self._kafka.full_name(topic), timeout=_TOPIC_PATIENCE_S)
        except KafkaException as exc:
            # Only now is it told why: the exception knows that time was up.
            with contextlib.suppress(KafkaException):  # a fatal error, which the next message tells as well
                self._producer.poll(0)
            raise self._kafka.unavailable(exc.args[0], self._trouble.words) from exc

    def send(
        self,
        topic: str,
        messages: Iterable[cloudevents.Message],
        keep_waiting: Callable[[], None] = lambda: None,
    ) -> list[tuple[bytes, str]]:
        """The values that Kafka does not take, each with its reason; all others are acknowledged. It refuses
        small ones, too, when they came in one batch with others: alone, only what it will never take.

        Waits as long as it takes, and asks ``keep_waiting`` four times a second, which may raise to end it.
        Raises EventsUnavailable when some were not taken: then all should be sent again.
        """
        self._refused, self._failure = [], None
        name = self._kafka.full_name(topic)
        produce = self._producer.produce
        for message in messages:
            key, value, headers = message
            try:
                produce(name, value, key, headers=headers)  # type: ignore[arg-type]
            except (BufferError, KafkaException):
                self._produce(name, message, keep_waiting)
        try:
            while self._producer.flush(0.25):
                keep_waiting()
        except KafkaException as exc:  # a fatal error comes like this
            self._failure = exc.args[0]
        failure = self._noted_failure()
        if failure is not None:
            if failure.fatal() or failure.code() == KafkaError._FATAL:
                # An idempotent producer that lost its place cannot go on; a new one can, and ids are keys.
                self._producer = self._new_producer()
            raise self._kafka.unavailable(failure)
        return self._refused

    def _noted_failure(self) -> KafkaError | None:
        """Set by the callbacks while ``flush`` runs."""
        return self._failure

    def close(self) -> None:
        """Lets go at once; what is not acknowledged may or may not arrive."""
        with contextlib.suppress(KafkaException):
            self._producer.purge()

    def _produce(self, topic: str, message: cloudevents.Message, keep_waiting: Callable[[], None]) -> None:
        key, value, headers = message
        while True:
            try:
                self._producer.produce(
                    topic,
                    value,
                    key,
                    headers=headers,  # type: ignore[arg-type]
                )
            except BufferError:
                with contextlib.suppress(KafkaException):  # a fatal error, which the next call tells as well
                    self._producer.poll(0.25)
                keep_waiting()
            except KafkaException as exc:
                self._note(exc.args[0], value)
                return
            else:
                return

    def _new_producer(self) -> Producer:
        return self._kafka.producer(
            **{
                # For ever: the journal keeps what is not acknowledged, and it alone is bounded.
                "message.timeout.ms": 0,
                "delivery.report.only.error": True,
                "compression.type": "lz4",
                "linger.ms": 20,
                "batch.size": 512 * 1024,
                "on_delivery": self._delivered,
                "statistics.interval.ms": 5000,
                "stats_cb": self._count_retries,
                "error_cb": self._complain,
                **self._properties,
            }
        )

    def _delivered(self, error: KafkaError | None, message: Message) -> None:
        if error is not None:
            self._note(error, _value(message))

    def _note(self, error: KafkaError, value: bytes) -> None:
        if error.code() in _TOO_LARGE:
            self._refused.append((value, error.str()))
        elif self._failure is None or error.fatal():
            self._failure = error

    def _complain(self, error: KafkaError) -> None:
        self._trouble(error)
        if error.fatal():
            self._failure = error

    def _count_retries(self, statistics: str) -> None:
        brokers = msgspec.json.decode(statistics)["brokers"].values()
        self.retries_total = sum(broker["txretries"] for broker in brokers)


class KafkaEvents:
    """The events of ``inference-events`` for one log worker of the group. See ``EventSource`` in the ports."""

    def __init__(self, kafka: Kafka) -> None:
        self._kafka = kafka
        self._trouble: KafkaError | None = None
        self._taken: list[Message] = []
        self._rewound = False
        self._done: dict[int, int] = {}
        self._topic = kafka.full_name(INFERENCE_EVENTS)
        self._consumer = kafka.consumer(
            _LOG_GROUP,
            **{
                # Members come and go without taking the partitions of the others away for a moment.
                "partition.assignment.strategy": "cooperative-sticky",
                "heartbeat.interval.ms": 2000,
                "fetch.wait.max.ms": 100,
                "error_cb": self._complain,
                "on_commit": _tell_failed_commit,
            },
        )
        self._is_member = False

    def read(self, max_events: int) -> list[RecordedEvent | UnreadableEvent]:
        if not self._is_member:
            self._join()
        if self._rewound:
            # Paused, but still asked: a member that does not ask is taken for dead.
            while (message := self._consumer.poll(0)) is not None:
                self._take([message])
            self._pause()
        else:
            self._taken = []
            self._take(self._consumer.consume(max_events, 0.1))
        if not self._taken and self._trouble is not None:
            trouble, self._trouble = self._trouble, None
            raise self._kafka.unavailable(trouble)
        return [cloudevents.decode_message(_value(m), _headers(m), m) for m in self._taken]

    def commit(self) -> None:
        for message in self._taken:
            partition, offset = message.partition(), message.offset()
            assert partition is not None
            assert offset is not None
            self._done[partition] = offset + 1
        if self._taken:
            self._consumer.commit(offsets=self._offsets(self._done), asynchronous=True)
        self._taken = []
        if self._rewound:
            self._rewound = False
            self._consumer.resume(self._consumer.assignment())

    def rewind(self) -> None:
        self._rewound = True
        self._pause()

    def lag_events(self) -> int:
        """How many events of this worker's partitions are not logged yet, as far as it has heard."""
        lag = 0
        for partition in self._consumer.assignment():
            _, end = self._consumer.get_watermark_offsets(partition, cached=True)
            (position,) = self._consumer.position([partition])
            if end > 0 and position.offset >= 0:
                lag += max(0, end - position.offset)
        return lag + (len(self._taken) if self._rewound else 0)

    def close(self) -> None:
        """Leaves the group, so that the other members take over at once. Where Kafka does not answer they do when
        it misses this one, and read again what is not told.
        """
        # In a thread: librdkafka itself waits for a Kafka that hangs, in commit and in close, until it is back.
        leaving = threading.Thread(target=self._leave, name="kafka-leave", daemon=True)
        leaving.start()
        leaving.join(_LEAVE_PATIENCE_S)
        if leaving.is_alive():
            log.warning(
                "%s does not answer: it will notice by itself that this worker is gone", self._kafka.name
            )

    def _leave(self) -> None:
        if self._done:
            with contextlib.suppress(KafkaException):
                self._consumer.commit(offsets=self._offsets(self._done), asynchronous=False)
        self._consumer.close()

    def _join(self) -> None:
        """Only once the topic is there: a member that waits for one and meanwhile loses its brokers may wait
        for ever, with librdkafka 2.x, when they are back.
        """
        try:
            found = self._consumer.list_topics(self._topic, timeout=_TOPIC_PATIENCE_S).topics[self._topic]
        except KafkaException as exc:
            trouble, self._trouble = self._trouble, None
            raise self._kafka.unavailable(trouble or exc.args[0]) from exc
        if found.error is not None:
            raise self._kafka.unavailable(f"{self._topic}: {found.error.str()}")
        self._consumer.subscribe([self._topic], on_revoke=self._revoked, on_lost=self._lost)
        self._is_member = True

    def _take(self, messages: Sequence[Message]) -> None:
        for message in messages:
            if (error := message.error()) is not None:
                self._trouble = error
            else:
                self._taken.append(message)

    def _pause(self) -> None:
        self._consumer.pause(self._consumer.assignment())

    def _offsets(self, done: dict[int, int]) -> list[TopicPartition]:
        return [TopicPartition(self._topic, partition, offset) for partition, offset in done.items()]

    def _revoked(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        leaving = {p.partition for p in partitions}
        done = {number: offset for number, offset in self._done.items() if number in leaving}
        if done:
            # The next member would read and store again what is not told now, for nothing.
            with contextlib.suppress(KafkaException):
                consumer.commit(offsets=self._offsets(done), asynchronous=False)
        self._lost(consumer, partitions)

    def _lost(self, _: Consumer, partitions: list[TopicPartition]) -> None:
        leaving = {p.partition for p in partitions}
        self._done = {number: offset for number, offset in self._done.items() if number not in leaving}
        self._taken = [message for message in self._taken if message.partition() not in leaving]

    def _complain(self, error: KafkaError) -> None:
        # That all brokers are down comes last, and says less than why.
        if self._trouble is None or error.code() != KafkaError._ALL_BROKERS_DOWN:
            self._trouble = error


class KafkaDeadLetters:
    """The topic of what could not be logged: each message as it was, and why, in headers of its own."""

    def __init__(self, kafka: Kafka) -> None:
        self._kafka = kafka
        self._topic = kafka.full_name(DEAD_EVENTS)
        self._outbox: KafkaOutbox | None = None

    def bury(self, event: UnreadableEvent) -> None:
        """Returns when Kafka has acknowledged it. Raises EventsUnavailable."""
        origin: Message = event.origin
        headers = [
            *_own_headers(origin),
            ("phoenix_reason", event.reason[:_REASON_CHARACTERS].encode()),
            ("phoenix_origin", f"{origin.topic()}[{origin.partition()}]@{origin.offset()}".encode()),
            ("phoenix_buried_at", cloudevents.rfc_3339(time.time_ns() // 1_000_000)),
        ]
        self._send([cloudevents.Message(_key(origin), _value(origin), headers)], DEAD_EVENTS)

    def letters(self, limit: int) -> list[DeadLetter]:
        """The oldest that were not requeued yet. Raises EventsUnavailable."""
        with self._reader() as consumer:
            return [_letter(message) for message in self._waiting(consumer, limit)]

    def requeue(self, limit: int) -> int:
        """How many went back to ``inference-events``, the oldest first. Raises EventsUnavailable."""
        with self._reader() as consumer:
            messages = self._waiting(consumer, limit)
            if not messages:
                return 0
            self._send(
                [cloudevents.Message(_key(m), _value(m), _own_headers(m)) for m in messages],
                INFERENCE_EVENTS,
            )
            last = messages[-1].offset()
            assert last is not None
            consumer.commit(offsets=[TopicPartition(self._topic, 0, last + 1)], asynchronous=False)
            return len(messages)

    def _send(self, messages: list[cloudevents.Message], topic: str) -> None:
        give_up_at = time.monotonic() + _PATIENCE_S
        outbox = self._outbox or KafkaOutbox(self._kafka, **{"message.max.bytes": _LETTER_BYTES})
        self._outbox = None

        def keep_waiting() -> None:
            if time.monotonic() > give_up_at:
                raise self._kafka.unavailable(outbox.trouble)

        try:
            in_batches = dict(outbox.send(topic, messages, keep_waiting))
            again = [message for message in messages if message.value in in_batches]
            refused = [one for message in again for one in outbox.send(topic, [message], keep_waiting)]
        except BaseException:
            outbox.close()  # else what was given up would go out with the next letter
            raise
        # Kept: a connection for each letter took 0.4 s, and a log worker may have thousands to bury.
        self._outbox = outbox
        if refused:
            raise EventsUnavailable(f"{topic} takes no message this large: {refused[0][1]}", events=topic)

    @contextmanager
    def _reader(self) -> Iterator[Consumer]:
        """Within the block, what Kafka refuses or does not answer raises EventsUnavailable."""
        trouble = _Trouble()
        consumer = self._kafka.consumer(_REQUEUE_GROUP, error_cb=trouble, **{"enable.partition.eof": True})
        try:
            yield consumer
        except KafkaException as exc:
            consumer.poll(0)  # Only now is it told why: the exception knows that time was up.
            raise self._kafka.unavailable(exc.args[0], trouble.words) from exc
        finally:
            consumer.close()

    def _waiting(self, consumer: Consumer, limit: int) -> list[Message]:
        partition = TopicPartition(self._topic, 0)
        try:
            first, end = _settled(consumer, lambda: consumer.get_watermark_offsets(partition, _PATIENCE_S))
        except KafkaException as exc:
            if exc.args[0].code() != KafkaError._UNKNOWN_PARTITION:
                raise
            return []  # nobody has shipped or logged anything yet: the first to do so creates the topic
        (committed,) = _settled(consumer, lambda: consumer.committed([partition], _PATIENCE_S))
        start = max(first, committed.offset)
        consumer.assign([TopicPartition(self._topic, 0, start)])
        wanted = min(limit, end - start)
        messages: list[Message] = []
        give_up_at = time.monotonic() + _PATIENCE_S
        while len(messages) < wanted:
            if time.monotonic() > give_up_at:
                raise self._kafka.unavailable(f"it gave {len(messages)} of {wanted} dead letters")
            given = consumer.consume(wanted, 0.5)
            if found := [message for message in given if message.error() is None]:
                messages += found
                give_up_at = time.monotonic() + _PATIENCE_S
            # Some offsets have no message: it went meanwhile, or was compacted, or they are a transaction's own.
            if any(_is_at(message, end) for message in given):
                break
        return messages[:limit]


class ModelAnnouncer:
    """Tells the API processes of a change in the registry, from any thread. It never waits and never fails:
    they look by themselves, too, if a little later.
    """

    def __init__(self, kafka: Kafka) -> None:
        self._kafka = kafka
        self._producer: Producer | None = None
        self._lock = threading.Lock()

    def __call__(self, change: ModelChanged) -> None:
        headers = [
            *cloudevents.cloud_headers("phoenix-ml.model-changed", 1, b"application/json"),
            ("ce_id", change.id.encode()),
            ("ce_time", cloudevents.rfc_3339(change.at_ms)),
        ]
        value, key = msgspec.json.encode(change), change.model_id
        with self._lock:
            try:
                if self._producer is None:  # most processes never change anything
                    self._producer = self._kafka.producer(
                        **{"enable.idempotence": False, "message.timeout.ms": 10_000, "linger.ms": 0}
                    )
                self._producer.produce(
                    self._kafka.full_name(MODEL_EVENTS),
                    value,
                    key,
                    headers=headers,  # type: ignore[arg-type]
                )
                self._producer.poll(0)
            except (BufferError, KafkaException) as exc:
                log.warning("a change of %s is not announced: %s", change.model_id, exc)

    def close(self) -> None:
        """Gives what is on its way a second to arrive."""
        if self._producer is not None:
            self._producer.flush(1.0)


def follow_changes(kafka: Kafka, on_change: Callable[[], None], stopping: threading.Event) -> None:
    """Calls ``on_change`` at each announcement, from this thread, until ``stopping`` is set."""
    while not stopping.is_set():
        consumer = kafka.consumer("phoenix-api", **{"fetch.wait.max.ms": 500})
        try:
            consumer.assign([TopicPartition(kafka.full_name(MODEL_EVENTS), 0, OFFSET_END)])
            while not stopping.is_set():
                message = consumer.poll(0.5)
                if message is not None and message.error() is None:
                    on_change()
        except KafkaException as exc:
            log.warning(
                "changes of models are not followed at once, but when the registry is polled: %s", exc
            )
            stopping.wait(_PATIENCE_S)
        finally:
            consumer.close()


def _created(result: Callable[[], Any]) -> None:
    try:
        result()
    except KafkaException as exc:
        if exc.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
            raise


def _settled(consumer: Consumer, ask: Callable[[], _Answer]) -> _Answer:
    """The answer of a cluster that may have started, or made the topic, just now, and needs a moment."""
    give_up_at = time.monotonic() + _PATIENCE_S
    while True:
        try:
            return ask()
        except KafkaException as exc:
            if exc.args[0].code() not in _NOT_SETTLED or time.monotonic() > give_up_at:
                raise
            consumer.poll(0.1)


def _is_at(message: Message, end: int) -> bool:
    """True where the message says that there is nothing more to read, up to the offset ``end`` at least."""
    error, offset = message.error(), message.offset()
    is_end = error is not None and error.code() == KafkaError._PARTITION_EOF
    return is_end and offset is not None and offset >= end


def _key(message: Message) -> bytes:
    return message.key() or b""


def _value(message: Message) -> bytes:
    return message.value() or b""


def _headers(message: Message) -> list[tuple[str, bytes]]:
    """The types of confluent-kafka allow for what only serializers make."""
    return cast("list[tuple[str, bytes]]", message.headers() or [])


def _own_headers(message: Message) -> cloudevents.Headers:
    """The message's headers, without those of an earlier burial."""
    return [(name, value) for name, value in _headers(message) if not name.startswith("phoenix_")]


def _letter(message: Message) -> DeadLetter:
    headers = dict(_headers(message))
    found = cloudevents.decode_message(_value(message), _own_headers(message))

    def text(name: str) -> str:
        return headers.get(name, b"").decode(errors="replace")

    return DeadLetter(
        place=text("phoenix_origin"),
        buried_at=text("phoenix_buried_at"),
        reason=text("phoenix_reason"),
        payload=_value(message),
        event=found.event if isinstance(found, RecordedEvent) else None,
    )


def _tell_failed_commit(error: KafkaError | None, _: list[TopicPartition]) -> None:
    if error is not None:
        # What is stored comes again and is known by its id.
        log.info("the place in %s was not noted: %s", INFERENCE_EVENTS, error.str())
