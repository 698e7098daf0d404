"""A version's predictions beside the reference that it was registered with."""

import logging
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from phoenix_ml.application.ports import ArtifactStore, WatchedPrediction
from phoenix_ml.application.statistics.alarm import AlarmSettings
from phoenix_ml.application.statistics.baseline import read_reference
from phoenix_ml.application.statistics.report import drift_report
from phoenix_ml.domain.drift import DriftReport
from phoenix_ml.domain.errors import ModelLoadFailed
from phoenix_ml.domain.models import ModelVersion
from phoenix_ml.domain.monitoring import MonitorSettings
from phoenix_ml.domain.rows import Outputs, RowFormat

log = logging.getLogger(__name__)
# Sources of values that nobody has measured.
_ABSENT = frozenset({"default", "stale", "missing"})


class Answer(Protocol):
    """What a model said of one row."""

    @property
    def result(self) -> Any: ...
    @property
    def confidence(self) -> float | None: ...
    @property
    def probabilities(self) -> list[float] | None: ...


def compare_with_reference(
    artifacts: ArtifactStore,
    version: ModelVersion,
    rows: Sequence[WatchedPrediction],
    settings: MonitorSettings,
) -> DriftReport | None:
    """The report that a person reads; None for a version without a baseline."""
    if version.metadata.baseline is None:
        return None
    return compare_rows(version, load_reference(artifacts, version), rows, settings)


def compare_rows(
    version: ModelVersion,
    reference: dict[str, NDArray[np.float64]] | None,
    rows: Sequence[WatchedPrediction],
    settings: MonitorSettings,
) -> DriftReport:
    """The report, with ``reference`` as ``load_reference`` gives it. The version has a baseline."""
    metadata = version.metadata
    assert metadata.baseline is not None, f"{version.model_id} {version.version} has no baseline"
    columns, absent, outputs = columns_of(RowFormat(metadata.columns), rows)
    return drift_report(
        metadata.baseline,
        reference,
        columns,
        absent=absent,
        outputs=outputs,
        task=metadata.task,
        settings=alarm_settings(settings),
    )


def load_reference(artifacts: ArtifactStore, version: ModelVersion) -> dict[str, NDArray[np.float64]] | None:
    """The sorted columns that the version was registered with; None where there are none, or they are lost."""
    baseline = version.metadata.baseline
    if baseline is None or baseline.reference_uri is None or baseline.reference_sha256 is None:
        return None
    try:
        return read_reference(artifacts.fetch(baseline.reference_uri, baseline.reference_sha256))
    except ModelLoadFailed as exc:
        log.warning("reports on %s %s compare cells only: %s", version.model_id, version.version, exc.message)
        return None


def columns_of(
    row_format: RowFormat, rows: Sequence[WatchedPrediction]
) -> tuple[dict[str, Any], dict[str, NDArray[np.bool_]], Outputs]:
    """The rows as columns, which of their values a default has filled in, and the model's answers."""
    columns: dict[str, Any] = dict(row_format.unpack_columns([row.inputs for row in rows]))
    absent: dict[str, NDArray[np.bool_]] = {}
    for i, row in enumerate(rows):
        sources = row.feature_sources
        if isinstance(sources, str):
            sources = dict.fromkeys(columns, sources) if sources in _ABSENT else {}
        for name, source in sources.items():
            if source not in _ABSENT:
                continue
            if name not in absent:
                absent[name] = np.zeros(len(rows), dtype=np.bool_)
            absent[name][i] = True
    return columns, absent, outputs_of(rows)


def outputs_of(answers: Sequence[Answer]) -> Outputs:
    """Many answers as one, as an engine gives them."""
    confidences = [one.confidence for one in answers]
    probabilities = [one.probabilities for one in answers]
    return Outputs(
        [one.result for one in answers],
        None if None in confidences else [one for one in confidences if one is not None],
        None if None in probabilities else [one for one in probabilities if one is not None],
    )


def alarm_settings(settings: MonitorSettings) -> AlarmSettings:
    """What of a model's settings is about the drift alarm."""
    return AlarmSettings(
        settings.arl, settings.batch_rows, settings.effect, settings.effects, settings.left_out
    )
