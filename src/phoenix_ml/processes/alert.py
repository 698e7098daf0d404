"""The alert role: what the monitor has to say reaches people, beside everything else."""

import logging
import random
import threading
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

from phoenix_ml.application.deliver import Deliverer
from phoenix_ml.application.ports import Channel
from phoenix_ml.bootstrap import Phoenix
from phoenix_ml.domain.errors import DatabaseUnavailable
from phoenix_ml.infrastructure.alerts.channels import open_channels
from phoenix_ml.infrastructure.telemetry import catalogue
from phoenix_ml.infrastructure.telemetry.metrics import MetricsWriter

log = logging.getLogger(__name__)
_PAUSE_S = 1.0
_LONGEST_BACKOFF_S = 30.0
_COUNT_EVERY_S = 10.0
_COMPLAIN_EVERY_S = 30.0


class AlertRole:
    """Tells every channel until it is told to stop, each in a thread of its own: one that hangs delays no other."""

    def __init__(self, phoenix: Phoenix, metrics: MetricsWriter) -> None:
        self._phoenix = phoenix
        self._metrics = metrics
        self._heartbeat = metrics.gauge(catalogue.ALERT_HEARTBEAT)
        self._heartbeat.set(time.time())
        settings = phoenix.settings
        self._channels = open_channels(settings.alerts, settings.alerts_secret, phoenix.kafka)

    def run(self, stopping: threading.Event) -> None:
        """Returns soon after ``stopping`` is set; what is not told by then waits in the database.

        Raises a defect of the role itself, after ``stopping`` is set for its other threads; whatever a channel raises
        is a failed delivery.
        """
        with ThreadPoolExecutor(len(self._channels) + 1, "alert") as threads:
            running = [
                threads.submit(self._tell, name, channel, stopping)
                for name, channel in self._channels.items()
            ]
            running.append(threads.submit(self._count, stopping))
            wait(running, return_when=FIRST_EXCEPTION)
            stopping.set()
        for future in running:
            future.result()

    def close(self) -> None:
        for channel in self._channels.values():
            channel.close()

    def _tell(self, name: str, channel: Channel, stopping: threading.Event) -> None:
        settings = self._phoenix.settings
        deliverer = Deliverer(
            self._phoenix.deliveries,
            name,
            channel,
            lambda: time.time_ns() // 1_000_000,
            give_up_ms=round(settings.alerts_give_up_h * 3_600_000),
            most_a_minute=settings.alerts_a_minute,
        )
        results = {
            result: self._metrics.counter(catalogue.ALERT_DELIVERIES, channel=name, result=result)
            for result in ("told", "failed", "given_up")
        }
        backoff_s = _PAUSE_S
        while not stopping.is_set():
            try:
                for result, count in zip(results, deliverer.step(), strict=True):
                    results[result].add(count)
                backoff_s = _PAUSE_S
            except DatabaseUnavailable:  # the counting thread complains
                backoff_s = min(_LONGEST_BACKOFF_S, backoff_s * 2)
            stopping.wait(backoff_s * random.uniform(0.5, 1.0))  # noqa: S311 - jitter, not a secret

    def _count(self, stopping: threading.Event) -> None:
        complained_at = float("-inf")
        while True:
            try:
                waiting = self._phoenix.deliveries.waiting()
                for name in self._channels:
                    self._metrics.gauge(catalogue.ALERTS_WAITING, channel=name).set(waiting.get(name, 0))
                self._heartbeat.set(time.time())
            except DatabaseUnavailable as exc:
                if time.monotonic() - complained_at > _COMPLAIN_EVERY_S:
                    complained_at = time.monotonic()
                    log.warning("alerts wait: %s", exc.message)
            if stopping.wait(_COUNT_EVERY_S):
                return
