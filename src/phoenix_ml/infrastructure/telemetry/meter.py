"""The use cases' ``Meter``, and the request counts of the HTTP layer, on bound metrics."""

import logging
from array import array

from phoenix_ml.domain.events import PredictionMade, PredictionsMade
from phoenix_ml.domain.features import SOURCE_OF_LETTER
from phoenix_ml.domain.models import ModelVersion
from phoenix_ml.domain.rows import Execution
from phoenix_ml.infrastructure.telemetry import catalogue
from phoenix_ml.infrastructure.telemetry.metrics import (
    BoundCounter,
    BoundHistogram,
    Counter,
    Histogram,
    MetricsFullError,
    MetricsWriter,
)

log = logging.getLogger(__name__)
OTHER = "other"


class MetricsMeter:
    """Children are bound once and found again by a tuple: 0.1 µs, where ``labels()`` costs 1.5."""

    def __init__(self, metrics: MetricsWriter) -> None:
        self._metrics = metrics
        self._has_complained = False
        self._predictions: dict[tuple[str, str, str, str, str], tuple[BoundCounter, BoundCounter | None]] = {}
        self._requests: dict[tuple[str, str, str, int], tuple[BoundCounter, BoundHistogram]] = {}
        self._inference: dict[tuple[str, str, str], BoundHistogram] = {}
        self._feature_read: dict[str, BoundHistogram] = {}
        self._sources: dict[tuple[str, str], BoundCounter] = {}

    def _counter(self, definition: Counter, **labels: str) -> BoundCounter:
        """The counter; where a full disk has no room for a new one, one that nobody sees."""
        try:
            return self._metrics.counter(definition, **labels)
        except (OSError, MetricsFullError) as exc:
            self._complain(exc)
            return BoundCounter(memoryview(array("d", [0.0])))

    def _histogram(self, definition: Histogram, **labels: str) -> BoundHistogram:
        try:
            return self._metrics.histogram(definition, **labels)
        except (OSError, MetricsFullError) as exc:
            self._complain(exc)
            return BoundHistogram(
                definition.buckets, memoryview(array("d", bytes(8 * (len(definition.buckets) + 2))))
            )

    def _complain(self, exc: Exception) -> None:
        if not self._has_complained:
            self._has_complained = True
            log.error("some metrics of this process are not counted until it is started again: %s", exc)

    def ran(self, version: ModelVersion, inference_s: float, execution: Execution) -> None:
        key = version.model_id, version.version, execution.device
        inference = self._inference.get(key)
        if inference is None:
            inference = self._inference[key] = self._histogram(
                catalogue.INFERENCE_SECONDS,
                model=version.model_id,
                version=version.version,
                device=execution.device,
            )
        inference.observe(inference_s)
        if execution.out_of_memory:
            self.out_of_memory(version.model_id, version.version, "run", execution.out_of_memory)

    def answered(self, event: PredictionMade, feature_count: int, feature_read_s: float | None) -> None:
        model, version = event.model_id, event.model_version
        letters = event.sources
        # Rows whose features all come from one place have both their counters found at once.
        key = (model, version, event.strategy, event.role, letters if len(letters) == 1 else "")
        counters = self._predictions.get(key)
        if counters is None:
            predictions = self._counter(
                catalogue.PREDICTIONS,
                model=model,
                version=version,
                strategy=event.strategy.value,
                role=event.role.value,
            )
            values = self._source(model, letters) if len(letters) == 1 else None
            counters = self._predictions[key] = predictions, values
        predictions, values = counters
        predictions.add()
        if feature_read_s is not None:
            reads = self._feature_read.get(model)
            if reads is None:
                reads = self._feature_read[model] = self._histogram(
                    catalogue.FEATURE_READ_SECONDS, model=model
                )
            reads.observe(feature_read_s)
        if values is not None:
            values.add(feature_count)
        else:
            for letter in letters:
                self._source(model, letter).add()

    def answered_rows(self, rows: PredictionsMade, feature_count: int) -> None:
        count = len(rows.results)
        key = (rows.model_id, rows.model_version, rows.strategy, rows.role, rows.sources)
        counters = self._predictions.get(key)
        if counters is None:
            predictions = self._counter(
                catalogue.PREDICTIONS,
                model=rows.model_id,
                version=rows.model_version,
                strategy=rows.strategy.value,
                role=rows.role.value,
            )
            counters = self._predictions[key] = predictions, self._source(rows.model_id, rows.sources)
        predictions, values = counters
        predictions.add(count)
        if values is not None:
            values.add(count * feature_count)

    def requested(self, model: str, version: str, role: str, code: int, seconds: float) -> None:
        """One HTTP request was answered. The names must be registered ones or ``OTHER``."""
        bound = self._requests.get((model, version, role, code))
        if bound is None:
            counter = self._counter(
                catalogue.REQUESTS, model=model, version=version, role=role, code=str(code)
            )
            histogram = self._histogram(catalogue.REQUEST_SECONDS, model=model, version=version)
            bound = self._requests[model, version, role, code] = counter, histogram
        bound[0].add()
        bound[1].observe(seconds)

    def journal_refused(self) -> None:
        """A request was refused because it could not be put on record."""
        self._counter(catalogue.JOURNAL_REFUSED).add()

    def shadow_failed(self, model_id: str, version: str, code: str) -> None:
        self._counter(catalogue.SHADOW_FAILURES, model=model_id, version=version, code=code).add()

    def loaded(self, model_id: str, version: str, load_s: float) -> None:
        labels = {"model": model_id, "version": version}
        self._counter(catalogue.MODEL_LOADS, **labels, outcome="loaded").add()
        self._histogram(catalogue.MODEL_LOAD_SECONDS, **labels).observe(load_s)

    def load_failed(self, model_id: str, version: str) -> None:
        labels = {"model": model_id, "version": version}
        self._counter(catalogue.MODEL_LOADS, **labels, outcome="failed").add()

    def out_of_memory(self, model_id: str, version: str, phase: str, times: int = 1) -> None:
        self._counter(catalogue.OUT_OF_MEMORY, model=model_id, version=version, phase=phase).add(times)

    def _source(self, model: str, letter: str) -> BoundCounter:
        counter = self._sources.get((model, letter))
        if counter is None:
            counter = self._sources[model, letter] = self._counter(
                catalogue.FEATURE_VALUES, model=model, source=SOURCE_OF_LETTER[letter]
            )
        return counter
