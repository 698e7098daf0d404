"""The monitor role: models are watched beside the log, never in a process that answers requests."""

import logging
import random
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING

from phoenix_ml.application.ports import IncidentQuery
from phoenix_ml.bootstrap import Phoenix
from phoenix_ml.domain.errors import DatabaseUnavailable
from phoenix_ml.domain.incidents import IncidentKind
from phoenix_ml.domain.monitoring import DriftPolicy
from phoenix_ml.infrastructure.telemetry import catalogue
from phoenix_ml.infrastructure.telemetry.metrics import MetricsWriter

if TYPE_CHECKING:
    from phoenix_ml.application.monitoring import Monitor, Seen
    from phoenix_ml.application.watched_version import Figures

log = logging.getLogger(__name__)
# Between two looks at a log that has nothing new.
_PAUSE_S = 0.5
_LONGEST_BACKOFF_S = 30.0
_COMPLAIN_EVERY_S = 30.0
_COUNT_INCIDENTS_EVERY_S = 5.0
# Each is a series of the metrics; reports have all of them.
_MOST_FEATURES = 100


class MonitorRole:
    """Watches the models until it is told to stop. Belongs to one thread."""

    def __init__(self, phoenix: Phoenix, metrics: MetricsWriter) -> None:
        self._phoenix = phoenix
        self._metrics = metrics
        self._rows = metrics.counter(catalogue.MONITOR_ROWS)
        self._outcomes = metrics.counter(catalogue.MONITOR_OUTCOMES)
        self._failures = metrics.counter(catalogue.MONITOR_FAILURES)
        self._lag = metrics.gauge(catalogue.MONITOR_LAG_ROWS)
        self._failed_models = metrics.gauge(catalogue.MONITOR_FAILED_MODELS)
        self._heartbeat = metrics.gauge(catalogue.MONITOR_HEARTBEAT)
        self._heartbeat.set(time.time())
        self._complained_at = float("-inf")
        self._counted_at = float("-inf")
        self._open_series: set[tuple[str, str]] = set()

    def run(self, stopping: threading.Event) -> None:
        """Returns soon after ``stopping`` is set; what is not counted by then waits in the log."""
        monitor = self._open()
        backoff_s = _PAUSE_S
        while not stopping.is_set():
            try:
                seen = monitor.step()
                self._tell(seen)
                self._count_incidents()
                backoff_s = _PAUSE_S
            except DatabaseUnavailable as exc:
                self._failures.add()
                if time.monotonic() - self._complained_at > _COMPLAIN_EVERY_S:
                    self._complained_at = time.monotonic()
                    log.warning("the monitor waits: %s", exc.message)
                stopping.wait(backoff_s * random.uniform(0.5, 1.0))  # noqa: S311 - jitter, not a secret
                backoff_s = min(_LONGEST_BACKOFF_S, backoff_s * 2)
                continue
            if not seen.rows and not seen.outcomes:
                stopping.wait(_PAUSE_S)

    def close(self) -> None:
        """Nothing is held."""

    def _open(self) -> "Monitor":
        # Its statistics take a second to import, which the log beside it need not wait for.
        from phoenix_ml.application.monitoring import Monitor

        phoenix, settings = self._phoenix, self._phoenix.settings
        return Monitor(
            phoenix.monitoring,
            phoenix.registry,
            phoenix.artifacts,
            policy=DriftPolicy(settings.drift_policy),
            group_ms=settings.alerts_group_s * 1000,
        )

    def _tell(self, seen: "Seen") -> None:
        self._rows.add(seen.rows)
        self._outcomes.add(seen.outcomes)
        self._lag.set(seen.lag_rows)
        self._failed_models.set(len(seen.failed))
        self._heartbeat.set(time.time())
        for figures in seen.figures:
            self._show(figures)

    def _show(self, figures: "Figures") -> None:
        labels = {"model": figures.model_id, "version": figures.model_version}
        for feature, distance in list(figures.distances.items())[:_MOST_FEATURES]:
            self._metrics.gauge(catalogue.DRIFT_DISTANCE, **labels, feature=feature).set(distance)
        if figures.quality is not None:
            if figures.quality.accuracy is not None:
                self._metrics.gauge(catalogue.MODEL_ACCURACY, **labels).set(figures.quality.accuracy)
            if figures.quality.mae is not None:
                self._metrics.gauge(catalogue.MODEL_MAE, **labels).set(figures.quality.mae)
        if figures.estimate is not None:
            is_error = figures.estimate.metric == "mae"
            estimated = catalogue.MODEL_ESTIMATED_MAE if is_error else catalogue.MODEL_ESTIMATED_ACCURACY
            self._metrics.gauge(estimated, **labels).set(figures.estimate.value)

    def _count_incidents(self) -> None:
        if time.monotonic() - self._counted_at < _COUNT_INCIDENTS_EVERY_S:
            return
        self._counted_at = time.monotonic()
        unresolved, _ = self._phoenix.monitoring.incidents(IncidentQuery(unresolved=True, limit=1000))
        counts = Counter((one.model_id, one.kind.value) for one in unresolved)
        models = self._phoenix.monitoring.standings()
        self._open_series |= {(model, kind.value) for model in models for kind in IncidentKind}
        for model, kind in self._open_series:
            self._metrics.gauge(catalogue.INCIDENTS_OPEN, model=model, kind=kind).set(counts[model, kind])
