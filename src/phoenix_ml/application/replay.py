"""Computing an answer on record again, to show that the record, the artifact and the engine still agree."""

import struct
from typing import Any

import msgspec
from msgspec import Struct

from phoenix_ml.application.ports import ArtifactStore, Engines, LoggedPrediction, PredictionLog, Registry
from phoenix_ml.domain.errors import InferenceFailed, ModelLoadFailed, ModelRefused
from phoenix_ml.domain.models import ModelVersion
from phoenix_ml.domain.rows import RowFormat, Rows


class Compared(Struct, frozen=True):
    """A value on record beside the one that was computed now."""

    identical: bool
    logged: Any
    computed: Any


class Replay(Struct, frozen=True):
    """What came of computing a prediction again.

    ``registered_runtime`` is what the version was registered with, ``runtime`` what computed it now: another
    one may round differently.
    """

    prediction_id: str
    identical: bool
    model_id: str
    model_version: str
    sha256: str
    batch_size: int
    batch_position: int
    result: Compared
    confidence: Compared
    probabilities: Compared
    registered_runtime: str
    runtime: str


def replay(
    log: PredictionLog, registry: Registry, artifacts: ArtifactStore, engines: Engines, prediction_id: str
) -> Replay:
    """The prediction, computed again by the very artifact from the very values, and compared bit for bit.

    The row runs where it ran then in a batch of the same size, of copies of itself: how an engine adds up
    depends on both, but not on the rows beside it. Raises PredictionUnknown, ModelLoadFailed when the
    artifact is gone, damaged or does not load, and InferenceFailed when it refuses the values on record.
    """
    row = log.get(prediction_id)
    version = registry.get(row.model_id, row.model_version)
    try:
        path = artifacts.fetch(version.uri, row.sha256)
        engine = engines.load(path, version.metadata)
    except ModelRefused as exc:
        raise ModelLoadFailed(exc.message, **exc.details) from exc
    position = row.batch_position
    outputs = engine.run(_copies(row, version))
    result = _compare(row.result, outputs.results[position])
    confidence = _compare(
        row.confidence, None if outputs.confidences is None else outputs.confidences[position]
    )
    probabilities = _compare(
        row.probabilities, None if outputs.probabilities is None else outputs.probabilities[position]
    )
    return Replay(
        row.id,
        result.identical and confidence.identical and probabilities.identical,
        row.model_id,
        row.model_version,
        row.sha256,
        row.batch_size,
        position,
        result,
        confidence,
        probabilities,
        version.metadata.runtime,
        engines.runtime,
    )


def _copies(row: LoggedPrediction, version: ModelVersion) -> Rows:
    """The row as often as its batch was long."""
    row_format = RowFormat(version.metadata.columns)
    try:
        values = row_format.unpack(row.inputs)
        if len(row_format.pack(values)) != len(row.inputs) or not 0 <= row.batch_position < row.batch_size:
            raise ValueError("left over bytes, or a position outside of the batch")
    except (struct.error, ValueError) as exc:
        raise InferenceFailed(
            f"the row on record of prediction {row.id} is damaged: it does not fit {row.model_id} "
            f"{row.model_version} ({exc})"
        ) from exc
    return Rows([values] * row.batch_size, [row.inputs] * row.batch_size)


def _compare(logged: Any, computed: Any) -> Compared:
    # The log keeps numbers that are not finite as null, as JSON does.
    logged, computed = (msgspec.json.decode(msgspec.json.encode(value)) for value in (logged, computed))
    return Compared(_is_same(logged, computed), logged, computed)


def _is_same(logged: Any, computed: Any) -> bool:
    if isinstance(logged, list) and isinstance(computed, list):
        return len(logged) == len(computed) and all(map(_is_same, logged, computed))
    if isinstance(computed, float) and type(logged) is int:  # PostgreSQL writes 1e23 without an exponent
        logged = float(logged)
    return bool(logged == computed)
