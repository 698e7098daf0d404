"""The log role: recorded events become rows, from the journals or from Kafka."""

import logging
import random
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from phoenix_ml.application.ports import EventSource, UnreadableEvent
from phoenix_ml.application.recording import record_events
from phoenix_ml.bootstrap import Phoenix
from phoenix_ml.domain.errors import DatabaseUnavailable, EventsUnavailable
from phoenix_ml.infrastructure.events.deadletters import FileDeadLetters
from phoenix_ml.infrastructure.events.local import LocalEvents
from phoenix_ml.infrastructure.telemetry import catalogue
from phoenix_ml.infrastructure.telemetry.metrics import MetricsWriter
from phoenix_ml.processes.journals import JournalGauges

if TYPE_CHECKING:  # Kafka's library is an extra
    from phoenix_ml.infrastructure.events.kafka import Kafka

log = logging.getLogger(__name__)
_MAX_EVENTS = 2000
# A transaction costs about as much as 30 rows: with a pause after each batch that was not full the role
# took 55 CPU µs an event at 5,000 requests a second on a busy machine, without it 130.
_PAUSE_S = 0.1
_LONGEST_BACKOFF_S = 5.0
_UNMATCHED_EVERY_S = 10.0
_COMPLAIN_EVERY_S = 30.0


class LogRole:
    """Moves events from their source to the prediction log until it is told to stop. Belongs to one thread.

    ``tell`` sets the gauges of what waits; it is told whether the database or Kafka keeps it waiting.
    """

    def __init__(
        self,
        phoenix: Phoenix,
        metrics: MetricsWriter,
        events: EventSource,
        bury: Callable[[UnreadableEvent], None],
        tell: Callable[[bool], None],
        close: Callable[[], None],
        *,
        drains: bool,
    ) -> None:
        self._phoenix = phoenix
        self._events = events
        self._bury = bury
        self._tell = tell
        self._close = close
        self._drains = drains
        self._rows = metrics.counter(catalogue.LOG_ROWS)
        self._dead_total = metrics.counter(catalogue.LOG_DEAD)
        self._failures = metrics.counter(catalogue.LOG_FAILURES)
        self._lag = metrics.gauge(catalogue.JOURNAL_LAG_SECONDS)
        self._heartbeat = metrics.gauge(catalogue.LOG_HEARTBEAT)
        self._heartbeat.set(time.time())
        self._unmatched = metrics.gauge(catalogue.OUTCOMES_UNMATCHED)
        self._unmatched_at = float("-inf")
        self._complained_at = float("-inf")
        self._max_events = _MAX_EVENTS

    def run(self, stopping: threading.Event) -> None:
        """Returns after ``stopping`` is set: with ``drains`` when nothing is left to log, else after the batch
        at hand; at once when the database or Kafka is down then. What is not logged waits where it is.
        """
        backoff_s = _PAUSE_S
        while True:
            was_stopping = stopping.is_set()
            asked = self._max_events
            try:
                moved = self.step()
                backoff_s = _PAUSE_S
            except (DatabaseUnavailable, EventsUnavailable) as exc:
                self._failures.add()
                self._tell(True)
                if time.monotonic() - self._complained_at > _COMPLAIN_EVERY_S:
                    self._complained_at = time.monotonic()
                    log.warning("the log waits: %s", exc.message)
                if was_stopping:
                    return
                stopping.wait(backoff_s * random.uniform(0.5, 1.0))  # noqa: S311 - jitter, not a secret
                backoff_s = min(_LONGEST_BACKOFF_S, backoff_s * 2)
                continue
            if was_stopping and not (moved and self._drains):
                return
            if moved < asked:
                stopping.wait(_PAUSE_S)

    def step(self) -> int:
        """How many events were moved. Raises DatabaseUnavailable and EventsUnavailable."""
        try:
            moved = record_events(
                self._events, self._phoenix.prediction_log, self._bury, max_events=self._max_events
            )
        except DatabaseUnavailable:
            # Perhaps these are more, or larger, than it can take in the time that a statement has.
            self._max_events = max(1, self._max_events // 2)
            raise
        self._max_events = min(_MAX_EVENTS, self._max_events * 2)
        self._rows.add(moved.new_rows)
        self._dead_total.add(moved.dead)
        now = time.time()
        self._heartbeat.set(now)
        self._lag.set(0.0 if moved.oldest_at_ms is None else max(0.0, now - moved.oldest_at_ms / 1000))
        self._tell(False)
        if now - self._unmatched_at > _UNMATCHED_EVERY_S:
            self._unmatched_at = now
            count, _ = self._phoenix.prediction_log.unmatched_outcomes(0)
            self._unmatched.set(count)
        return moved.read

    def close(self) -> None:
        self._close()


def log_from_journals(phoenix: Phoenix, metrics: MetricsWriter) -> LogRole:
    """``PHOENIX_EVENTS=local:`` — the log role reads the journals itself, and at a stop to their end."""
    settings = phoenix.settings
    events = LocalEvents(settings.journal_folder)
    dead = FileDeadLetters(settings.dead_letters_file, settings.journal_folder)
    gauges = JournalGauges(metrics)
    lag = metrics.gauge(catalogue.JOURNAL_LAG_SECONDS)

    def tell(waits: bool) -> None:
        gauges.set_now_and_then(events.reader)
        if waits:
            lag.set(events.reader.oldest_pending_s)

    return LogRole(phoenix, metrics, events, dead.bury, tell, events.close, drains=True)


def log_from_kafka(phoenix: Phoenix, kafka: "Kafka", metrics: MetricsWriter) -> LogRole:
    """``PHOENIX_EVENTS=kafka://…`` — one of any number of workers that share the topic's partitions."""
    from phoenix_ml.infrastructure.events.kafka import KafkaDeadLetters, KafkaEvents

    events = KafkaEvents(kafka)
    lag_events = metrics.gauge(catalogue.LOG_LAG_EVENTS)
    told_at = float("-inf")

    def tell(_: bool) -> None:
        nonlocal told_at
        if time.monotonic() - told_at > 1:
            told_at = time.monotonic()
            lag_events.set(events.lag_events())

    bury = KafkaDeadLetters(kafka).bury
    return LogRole(phoenix, metrics, events, bury, tell, events.close, drains=False)
