"""What a model was asked and what came of it, as a table to train on."""

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from phoenix_ml.application.ports import LoggedPrediction, PredictionLog, PredictionQuery
from phoenix_ml.application.reports import iso_time
from phoenix_ml.domain.features import FeatureType
from phoenix_ml.domain.models import Metadata, Task, check_takes_rows
from phoenix_ml.domain.routing import Role

PAGE_ROWS = 1000
# Of the predictions with outcomes one in five is kept from trainers: versions are compared over these.
_HELD_OUT_OF = 5
# Beside the features, whose names come from elsewhere: as in reports, what is the platform's own begins with "_".
OWN_COLUMNS = {
    "_prediction_id": FeatureType.STRING,
    "_entity_id": FeatureType.STRING,
    "_model_version": FeatureType.STRING,
    "_created_at": FeatureType.STRING,
    "_confidence": FeatureType.FLOAT,
}
RESULT_COLUMN, OUTCOME_COLUMN, TIME_COLUMN = "_result", "_outcome", "_created_at"


def export_columns(metadata: Metadata) -> dict[str, FeatureType]:
    """The columns of an export and their types: the features of the version, then ours."""
    check_takes_rows(metadata)
    contract = metadata.contract
    answers = _answer_type(metadata)
    features = {name: rule.type for name, rule in contract.items()}
    return features | OWN_COLUMNS | {RESULT_COLUMN: answers, OUTCOME_COLUMN: answers}


def export_rows(
    log: PredictionLog, query: PredictionQuery, metadata: Metadata, *, with_outcomes: bool
) -> Iterator[list[dict[str, Any]]]:
    """The logged predictions, the newest first, in pages of ``PAGE_ROWS`` or less; shadows' answers are left out.

    ``with_outcomes`` leaves out those without. A page is in memory at a time. Raises DatabaseUnavailable.
    """
    answers = _answer_type(metadata)
    cursor: str | None = None
    while True:
        page, cursor = log.page(msgspec.structs.replace(query, limit=PAGE_ROWS, cursor=cursor))
        yield [
            _describe(row, metadata, answers)
            for row in page
            if row.route["role"] != Role.SHADOW and not (with_outcomes and row.outcome is None)
        ]
        if cursor is None:
            return


def is_held_out(prediction_id: str) -> bool:
    """One prediction in five, always the same ones.

    >>> sum(is_held_out(str(i)) for i in range(1000))
    201
    """
    return hashlib.blake2b(prediction_id.encode(), digest_size=2).digest()[0] % _HELD_OUT_OF == 0


def to_train_on(page: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of an export to learn from: those with an outcome, less those that are kept for a comparison."""
    return [
        row
        for row in page
        # What the column cannot hold, such as several numbers, is no outcome to learn from.
        if row[OUTCOME_COLUMN] is not None and not is_held_out(row["_prediction_id"])
    ]


def _describe(row: LoggedPrediction, metadata: Metadata, answers: FeatureType) -> dict[str, Any]:
    # Another version may have had features that this one lacks, and lack some that this one has.
    features = {name: row.features.get(name) for name in metadata.contract}
    return features | {
        "_prediction_id": row.id,
        "_entity_id": row.entity_id,
        "_model_version": row.model_version,
        "_created_at": iso_time(row.created_at_ms),
        "_confidence": row.confidence,
        RESULT_COLUMN: _answer(row.result, answers),
        OUTCOME_COLUMN: _answer(row.outcome, answers),
    }


def _answer_type(metadata: Metadata) -> FeatureType:
    if metadata.task is Task.REGRESSION:
        return FeatureType.FLOAT
    is_numbered = metadata.class_labels and all(isinstance(label, int) for label in metadata.class_labels)
    return FeatureType.INTEGER if is_numbered else FeatureType.STRING


def _answer(value: Any, wanted: FeatureType) -> Any:
    """The answer as its column takes it; None for one that it cannot hold, such as several numbers."""
    if value is None:
        return None
    if wanted is FeatureType.STRING:
        return value if isinstance(value, str) else msgspec.json.encode(value).decode()
    if isinstance(value, bool):  # true is the label 1, as the monitor counts it, and no measurement
        return int(value) if wanted is FeatureType.INTEGER else None
    if not isinstance(value, int | float):
        return None
    return float(value) if wanted is FeatureType.FLOAT else int(value)
