"""The metrics of all processes as numbers, by version: what statistics over a protocol are made of."""

from pathlib import Path
from typing import Final

from prometheus_client.parser import text_string_to_metric_families

from phoenix_ml.infrastructure.telemetry.catalogue import (
    INFERENCE_SECONDS,
    PREDICTIONS,
    REQUEST_SECONDS,
    REQUESTS,
)
from phoenix_ml.infrastructure.telemetry.metrics import render

_READ: Final = (REQUESTS, REQUEST_SECONDS, PREDICTIONS, INFERENCE_SECONDS)
_MEANING: Final = {
    REQUESTS.name: "requests",
    f"{REQUEST_SECONDS.name}_sum": "request_s",
    PREDICTIONS.name: "rows",
    f"{INFERENCE_SECONDS.name}_count": "runs",
    f"{INFERENCE_SECONDS.name}_sum": "run_s",
}


def count_by_version(folder: Path) -> dict[tuple[str, str], dict[str, float]]:
    """Of each (model, version): requests answered, request_s, rows, runs, run_s; seconds in sum."""
    counts: dict[tuple[str, str], dict[str, float]] = {}
    for family in text_string_to_metric_families(render(folder, _READ).decode()):
        for sample in family.samples:
            meaning = _MEANING.get(sample.name)
            if meaning is not None:
                counted = counts.setdefault((sample.labels["model"], sample.labels["version"]), {})
                counted[meaning] = counted.get(meaning, 0.0) + sample.value
    return counts
