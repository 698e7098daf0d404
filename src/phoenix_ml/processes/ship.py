"""The ship role: what the journals hold goes to Kafka, and is forgotten when Kafka has acknowledged it."""

import logging
import random
import threading
import time
from collections.abc import Iterable, Iterator

from phoenix_ml.application.ports import UnreadableEvent
from phoenix_ml.domain.errors import EventsUnavailable
from phoenix_ml.infrastructure.events.cloudevents import Message, encode_record
from phoenix_ml.infrastructure.events.deadletters import FileDeadLetters
from phoenix_ml.infrastructure.events.journal import JournalReader, JournalRecord
from phoenix_ml.infrastructure.events.kafka import INFERENCE_EVENTS, Kafka, KafkaOutbox
from phoenix_ml.infrastructure.telemetry import catalogue
from phoenix_ml.infrastructure.telemetry.metrics import MetricsWriter
from phoenix_ml.processes.journals import JournalGauges
from phoenix_ml.settings import Settings

log = logging.getLogger(__name__)
_MAX_EVENTS = 5000
# An answer reaches Kafka this late when there is little traffic, and costs a request to Kafka of its own.
_PAUSE_S = 0.05
# Where there is nothing to ship, Kafka is asked this often whether it would take it.
_ASK_EVERY_S = 5.0
_LONGEST_BACKOFF_S = 10.0
_COMPLAIN_AFTER_S = 2.0
_COMPLAIN_EVERY_S = 30.0
_STOP_PATIENCE_S = 5.0


class ShipRole:
    """Ships until it is told to stop. Belongs to one thread."""

    def __init__(self, settings: Settings, kafka: Kafka, metrics: MetricsWriter) -> None:
        self._settings = settings
        self._kafka = kafka
        self._reader = JournalReader(settings.journal_folder)
        self._outbox = KafkaOutbox(kafka)
        self._dead = FileDeadLetters(settings.dead_letters_file, settings.journal_folder)
        self._gauges = JournalGauges(metrics)
        self._shipped = metrics.counter(catalogue.SHIP_EVENTS)
        self._acknowledged = metrics.counter(catalogue.SHIP_ACKNOWLEDGED)
        self._retries = metrics.counter(catalogue.SHIP_RETRIES)
        self._failures = metrics.counter(catalogue.SHIP_FAILURES)
        self._dead_total = metrics.counter(catalogue.SHIP_DEAD)
        self._heartbeat = metrics.gauge(catalogue.SHIP_HEARTBEAT)
        self._heartbeat.set(time.time())
        self._retries_seen = 0
        self._waits_since = 0.0
        self._heard_at = float("-inf")
        self._unacknowledged = 0
        self._complained_at = float("-inf")

    def run(self, stopping: threading.Event) -> None:
        """Returns after ``stopping`` is set and the journals are shipped to their end, or soon after it when
        Kafka does not take them: what is not acknowledged stays in the journals.
        """
        backoff_s = _PAUSE_S
        topics_are_there = False
        while True:
            was_stopping = stopping.is_set()
            try:
                if not topics_are_there:
                    self._kafka.create_topics()
                    topics_are_there = True
                moved = self.step(stopping)
                backoff_s = _PAUSE_S
            except EventsUnavailable as exc:
                topics_are_there = False
                self._reader.close()
                self._reader = JournalReader(self._settings.journal_folder)
                self._failures.add()
                self._tell()
                self._complain(exc.message)
                if was_stopping:
                    return
                stopping.wait(backoff_s * random.uniform(0.5, 1.0))  # noqa: S311 - jitter, not a secret
                backoff_s = min(_LONGEST_BACKOFF_S, backoff_s * 2)
                continue
            if moved < _MAX_EVENTS:
                if was_stopping and not moved:
                    return
                stopping.wait(_PAUSE_S)

    def step(self, stopping: threading.Event) -> int:
        """How many records were moved, each acknowledged or buried. Raises EventsUnavailable."""
        records = self._reader.read(_MAX_EVENTS)
        unreadable: list[UnreadableEvent] = []
        self._waits_since = time.monotonic()
        if not records and self._waits_since - self._heard_at > _ASK_EVERY_S:
            self._outbox.check(INFERENCE_EVENTS)
            self._heard_at = time.monotonic()
        refused = self._send(self._messages(records, unreadable), stopping)
        too_large = self._too_large(records, unreadable, dict(refused), stopping) if refused else []
        self._acknowledged.add(len(records) - len(unreadable) - len(too_large))
        for event in (*unreadable, *too_large):
            log.error("an event cannot be shipped: %s", event.reason)
            self._dead.bury(event)
            self._dead_total.add()
        self._reader.commit()
        self._heartbeat.set(time.time())
        self._tell()
        return len(records)

    def close(self) -> None:
        self._outbox.close()
        self._reader.close()

    def _send(self, messages: Iterable[Message], stopping: threading.Event) -> list[tuple[bytes, str]]:
        # Fewer than wait in another send is no progress.
        self._unacknowledged = 0
        return self._outbox.send(INFERENCE_EVENTS, messages, lambda: self._keep_waiting(stopping))

    def _messages(self, records: list[JournalRecord], unreadable: list[UnreadableEvent]) -> Iterator[Message]:
        """One at a time: 5,000 at once cost the garbage collector 3 µs each."""
        for record in records:
            try:
                if record.damage:
                    raise ValueError(record.damage)
                yield encode_record(record.payload, record.schema or b"")
            except ValueError as exc:
                unreadable.append(UnreadableEvent(record.payload, str(exc), record))
        self._shipped.add(len(records) - len(unreadable))

    def _too_large(
        self,
        records: list[JournalRecord],
        unreadable: list[UnreadableEvent],
        refused: dict[bytes, str],
        stopping: threading.Event,
    ) -> list[UnreadableEvent]:
        """Of the records whose messages were refused, those that Kafka will never take; it has the others now."""
        not_sent = {id(event.origin) for event in unreadable}
        found = []
        for record in records:
            if id(record) in not_sent:
                continue
            message = encode_record(record.payload, record.schema or b"")
            if message.value in refused:
                alone = self._send([message], stopping)
                found += [UnreadableEvent(record.payload, reason, record) for _, reason in alone]
        return found

    def _keep_waiting(self, stopping: threading.Event) -> None:
        before, self._unacknowledged = self._unacknowledged, self._outbox.unacknowledged
        if self._unacknowledged < before:  # a slow network is not one that lets nothing through
            self._heartbeat.set(time.time())
        self._tell()
        waited_s = time.monotonic() - self._waits_since
        if stopping.is_set() and waited_s > _STOP_PATIENCE_S:
            raise EventsUnavailable(
                "the stop waits no longer: what is not acknowledged stays in the journals"
            )
        if waited_s > _COMPLAIN_AFTER_S:
            self._complain(f"{self._kafka.name} does not acknowledge: {self._outbox.trouble}")

    def _tell(self) -> None:
        self._gauges.set_now_and_then(self._reader)
        retries = self._outbox.retries_total
        # A rebuilt producer counts from 0 again.
        self._retries.add(retries - self._retries_seen if retries >= self._retries_seen else retries)
        self._retries_seen = retries

    def _complain(self, words: str) -> None:
        now = time.monotonic()
        if now - self._complained_at > _COMPLAIN_EVERY_S:
            self._complained_at = now
            log.warning("events wait in the journals: %s", words)
