"""The background process: the roles that must never cost a request its latency. Now: ``log``."""

import fcntl
import logging
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from phoenix_ml.application.recording import record_events
from phoenix_ml.bootstrap import Phoenix, bootstrap
from phoenix_ml.domain.errors import DatabaseUnavailable, Misconfigured, PhoenixError
from phoenix_ml.infrastructure.events.local import DeadLetters, LocalEvents
from phoenix_ml.infrastructure.telemetry import catalogue
from phoenix_ml.infrastructure.telemetry.logs import configure_logs
from phoenix_ml.infrastructure.telemetry.metrics import MetricsWriter
from phoenix_ml.settings import load_settings

log = logging.getLogger(__name__)
ROLES = ("log",)
_MAX_EVENTS = 2000
# A transaction costs about as much as 30 rows: with a pause after each batch that was not full the role
# took 55 CPU µs an event at 5,000 requests a second on a busy machine, without it 130.
_PAUSE_S = 0.1
_LONGEST_BACKOFF_S = 5.0
_GAUGES_EVERY_S = 1.0
_UNMATCHED_EVERY_S = 10.0


class LogRole:
    """Moves events from the journals to the prediction log until it is told to stop."""

    def __init__(self, phoenix: Phoenix, metrics: MetricsWriter) -> None:
        self._phoenix = phoenix
        self._events = LocalEvents(phoenix.settings.journal_folder)
        self._dead = DeadLetters(phoenix.settings.data / "dead" / "inference-events.dead.jsonl")
        self._rows = metrics.counter(catalogue.LOG_ROWS)
        self._dead_total = metrics.counter(catalogue.LOG_DEAD)
        self._failures = metrics.counter(catalogue.LOG_FAILURES)
        self._damage = metrics.counter(catalogue.JOURNAL_DAMAGE)
        self._damage_seen = 0
        self._pending = metrics.gauge(catalogue.JOURNAL_PENDING_BYTES)
        self._lag = metrics.gauge(catalogue.JOURNAL_LAG_SECONDS)
        self._heartbeat = metrics.gauge(catalogue.LOG_HEARTBEAT)
        self._heartbeat.set(time.time())
        self._unmatched = metrics.gauge(catalogue.OUTCOMES_UNMATCHED)
        self._gauges_at = self._unmatched_at = 0.0

    def run(self, stopping: threading.Event) -> None:
        """Returns after ``stopping`` is set and the journals are read to their end, or at once when the
        database is down then: what is not logged waits in the journals.
        """
        backoff_s = _PAUSE_S
        while True:
            was_stopping = stopping.is_set()
            try:
                moved = self.step()
                backoff_s = _PAUSE_S
            except DatabaseUnavailable as exc:
                self._failures.add()
                self._lag.set(self._events.reader.oldest_pending_s)
                log.warning("the log waits: %s", exc.message)
                if was_stopping:
                    return
                stopping.wait(backoff_s)
                backoff_s = min(_LONGEST_BACKOFF_S, backoff_s * 2)
                continue
            if moved < _MAX_EVENTS:
                if was_stopping and not moved:
                    return
                stopping.wait(_PAUSE_S)

    def step(self) -> int:
        """How many events were moved. Raises DatabaseUnavailable."""
        moved = record_events(
            self._events, self._phoenix.prediction_log, self._dead.bury, max_events=_MAX_EVENTS
        )
        self._rows.add(moved.new_rows)
        self._dead_total.add(moved.dead)
        now = time.time()
        self._heartbeat.set(now)
        self._lag.set(0.0 if moved.oldest_at_ms is None else max(0.0, now - moved.oldest_at_ms / 1000))
        if now - self._gauges_at > _GAUGES_EVERY_S:
            self._gauges_at = now
            self._set_gauges(now)
        return moved.read

    def _set_gauges(self, now: float) -> None:
        reader = self._events.reader
        pending_bytes = reader.pending_bytes
        self._pending.set(pending_bytes)
        damage = reader.corrupt_regions + reader.torn_tails
        self._damage.add(max(0, damage - self._damage_seen))
        self._damage_seen = damage
        if now - self._unmatched_at > _UNMATCHED_EVERY_S:
            self._unmatched_at = now
            count, _ = self._phoenix.prediction_log.unmatched_outcomes(0)
            self._unmatched.set(count)

    def close(self) -> None:
        self._events.close()


@contextmanager
def sole_log_worker(phoenix: Phoenix) -> Iterator[None]:
    """Raises Misconfigured when another process logs these journals already."""
    folder = phoenix.settings.run_folder
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise Misconfigured(
                f"another process logs the journals in {phoenix.settings.data} already ('serve' does it too)"
            ) from exc
        yield


def work(
    phoenix: Phoenix, slot: str, stopping: threading.Event, on_ready: Callable[[], None] = lambda: None
) -> None:
    """Runs the log role; returns when ``stopping`` is set and all that can be logged is."""
    with (
        sole_log_worker(phoenix),
        MetricsWriter(phoenix.settings.metrics_folder / f"{slot}.mmap") as metrics,
    ):
        role = LogRole(phoenix, metrics)
        on_ready()
        try:
            role.run(stopping)
        finally:
            role.close()


def stop_on_signals() -> threading.Event:
    """An event that SIGTERM and SIGINT set."""
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    return stopping


def main() -> None:
    """Entry of the process under the supervisor: arguments are slot, lifeline, ready pipe."""
    slot = sys.argv[1]
    lifeline_fd, ready_fd = (int(argument) for argument in sys.argv[2:4])
    settings = load_settings()
    configure_logs(settings.log_level, settings.log_format, slot)
    stopping = stop_on_signals()

    def watch_supervisor() -> None:
        # Becomes readable only when the supervisor's end closes, because nobody ever writes to it.
        select.select([lifeline_fd], [], [])
        stopping.set()

    threading.Thread(target=watch_supervisor, daemon=True).start()

    def ready() -> None:
        os.write(ready_fd, b"+")
        os.close(ready_fd)

    try:
        work(bootstrap(settings), slot, stopping, ready)
    except PhoenixError as exc:
        log.critical("%s", exc.message)
        sys.exit(1)


if __name__ == "__main__":
    main()
