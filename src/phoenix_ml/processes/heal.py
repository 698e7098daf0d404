"""The heal role: what the monitor has asked to be trained again is trained, checked and put beside its champion."""

import logging
import os
import random
import socket
import threading
import time

from phoenix_ml.bootstrap import Phoenix, open_trainer, open_trials
from phoenix_ml.domain.errors import Unavailable
from phoenix_ml.domain.healing import JobStatus
from phoenix_ml.domain.ids import new_id
from phoenix_ml.infrastructure.tables import write_table
from phoenix_ml.infrastructure.telemetry import catalogue
from phoenix_ml.infrastructure.telemetry.metrics import MetricsWriter

log = logging.getLogger(__name__)
_PAUSE_S = 1.0
_LONGEST_BACKOFF_S = 30.0
_COMPLAIN_EVERY_S = 30.0


class HealRole:
    """Heals until it is told to stop. Belongs to one thread."""

    def __init__(self, phoenix: Phoenix, metrics: MetricsWriter) -> None:
        self._phoenix = phoenix
        self._metrics = metrics
        self._heartbeat = metrics.gauge(catalogue.HEAL_HEARTBEAT)
        self._heartbeat.set(time.time())
        self._trainer = open_trainer(phoenix.settings)
        self._complained_at = float("-inf")

    def run(self, stopping: threading.Event) -> None:
        """Returns soon after ``stopping`` is set; a training that runs is ended, and begins again later."""
        # Its statistics take a second to import.
        from phoenix_ml.application.heal import Healer, HealerSettings

        phoenix, settings = self._phoenix, self._phoenix.settings
        trials = open_trials(
            settings, limit_s=settings.trainer_limit_s, memory_mib=settings.trainer_memory_mib
        )
        healer = Healer(
            phoenix.retrain_jobs,
            phoenix.monitoring,
            phoenix.registry,
            phoenix.artifacts,
            phoenix.engines,
            phoenix.prediction_log,
            self._trainer,
            trials,
            HealerSettings(
                settings.data / "healing", settings.trainer_days, limit_s=settings.trainer_limit_s
            ),
            owner=f"{socket.gethostname()}:{os.getpid()}:{new_id()[-8:]}",
            now_ms=lambda: time.time_ns() // 1_000_000,
            write_table=write_table,
        )

        def keep_going() -> bool:
            self._heartbeat.set(time.time())
            return not stopping.is_set()

        backoff_s = _PAUSE_S
        while not stopping.is_set():
            try:
                job = healer.step(keep_going)
                self._tell()
                backoff_s = _PAUSE_S
            except Unavailable as exc:
                if time.monotonic() - self._complained_at > _COMPLAIN_EVERY_S:
                    self._complained_at = time.monotonic()
                    log.warning("healing waits: %s", exc.message)
                backoff_s = min(_LONGEST_BACKOFF_S, backoff_s * 2)
                job = None
            if job is None:
                stopping.wait(backoff_s * random.uniform(0.5, 1.0))  # noqa: S311 - jitter, not a secret

    def close(self) -> None:
        """Nothing is held."""

    def _tell(self) -> None:
        counts = self._phoenix.retrain_jobs.count_by_status()
        for status in JobStatus:
            self._metrics.gauge(catalogue.RETRAIN_JOBS, status=status.value).set(counts.get(status, 0))
        self._heartbeat.set(time.time())
