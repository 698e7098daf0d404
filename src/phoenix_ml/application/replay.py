"""Computing an answer on record again, to show that the record, the artifact and the engine still agree."""

import struct
from typing import Any

import msgspec
from msgspec import Struct

from phoenix_ml.application.ports import ArtifactStore, Engines, LoggedPrediction, PredictionLog, Registry
from phoenix_ml.domain.errors import InferenceFailed, ModelLoadFailed, ModelRefused, TensorInvalid
from phoenix_ml.domain.models import ModelVersion, Task
from phoenix_ml.domain.rows import ON_CPU, RowFormat, Rows
from phoenix_ml.domain.tensors import Tensor, describe_tensor, unpack_tensor

_NOTHING, _EVERYTHING = -1, 2**62


class Compared(Struct, frozen=True):
    """A value on record beside the one that was computed now."""

    identical: bool
    logged: Any
    computed: Any


class Replay(Struct, frozen=True):
    """What came of computing a prediction again.

    ``registered_runtime`` is what the version was registered with, ``runtime`` what computed it now, and
    ``logged_device`` and ``device`` where: another one may round differently.
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
    logged_device: str
    device: str


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
    if version.metadata.task is Task.TENSORS:
        return _replay_tensors(row, version, artifacts, engines)
    try:
        path = artifacts.fetch(version.uri, row.sha256)
        engine = engines.load(path, version.metadata, version.framework, on_cpu=_ran_on_cpu(row))
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
        _device(row),
        outputs.execution.device,
    )


def _replay_tensors(
    row: LoggedPrediction, version: ModelVersion, artifacts: ArtifactStore, engines: Engines
) -> Replay:
    """The outputs on record, computed again. Raises InferenceFailed where an input is on record by its digest alone."""
    inputs: dict[str, Tensor] = {}
    try:
        for name, packed in RowFormat(version.metadata.columns).split_tensors(row.inputs).items():
            tensor = unpack_tensor(packed)
            if tensor is None:
                raise InferenceFailed(
                    f"input {name!r} of prediction {row.id} was larger than is kept: only its SHA-256 is on record "
                    "(PHOENIX_TENSOR_RECORD_LIMIT_BYTES)"
                )
            inputs[name] = tensor
    except (msgspec.DecodeError, TensorInvalid) as exc:
        raise InferenceFailed(f"the tensors on record of prediction {row.id} are damaged: {exc}") from exc
    try:
        path = artifacts.fetch(version.uri, row.sha256)
        engine = engines.load_tensors(path, version.metadata, version.framework, on_cpu=_ran_on_cpu(row))
    except ModelRefused as exc:
        raise ModelLoadFailed(exc.message, **exc.details) from exc
    answered, execution = engine.infer(inputs, list(row.result))
    computed = {
        # As the one on record is: whole, or by its digest.
        name: describe_tensor(tensor, _NOTHING if "sha256" in logged else _EVERYTHING)
        for (name, logged), tensor in zip(row.result.items(), answered, strict=True)
    }
    result = _compare(row.result, computed)
    nothing = Compared(True, None, None)
    return Replay(
        row.id,
        result.identical,
        row.model_id,
        row.model_version,
        row.sha256,
        1,
        0,
        result,
        nothing,
        nothing,
        version.metadata.runtime,
        engines.runtime,
        _device(row),
        execution.device,
    )


def _device(row: LoggedPrediction) -> str:
    # Rows of before there was a choice do not say it.
    return str(row.route.get("device", ON_CPU.device))


def _ran_on_cpu(row: LoggedPrediction) -> bool:
    return _device(row) == ON_CPU.device


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
    if isinstance(logged, dict) and isinstance(computed, dict):
        return logged.keys() == computed.keys() and all(
            _is_same(logged[key], computed[key]) for key in logged
        )
    if isinstance(computed, float) and type(logged) is int:  # PostgreSQL writes 1e23 without an exponent
        logged = float(logged)
    return bool(logged == computed)
