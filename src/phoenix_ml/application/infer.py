"""From tensors to tensors, on record: what the Open Inference Protocol calls ``infer``."""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import msgspec
import numpy as np

from phoenix_ml.application.ports import Journal, Meter
from phoenix_ml.application.predict import Pending, Predict, Reading, Row, resolve
from phoenix_ml.application.serving import LiveModel, LiveModels, Loaded, ServedVersion, TensorVersion
from phoenix_ml.domain.errors import (
    BatchTooLarge,
    InferenceFailed,
    InternalError,
    PhoenixError,
    TensorInvalid,
)
from phoenix_ml.domain.events import PredictionMade, PredictionsMade
from phoenix_ml.domain.features import StoredFeatures
from phoenix_ml.domain.ids import batch_ids, new_batch_id, new_id
from phoenix_ml.domain.models import Metadata, TensorSpec
from phoenix_ml.domain.predictions import Instance
from phoenix_ml.domain.routing import Choice, Role, Strategy, name_choice
from phoenix_ml.domain.rows import Outputs, Scalar
from phoenix_ml.domain.tensors import DATATYPE_OF, DTYPE_OF, Tensor, describe_tensor, encode_raw, pack_tensor

log = logging.getLogger(__name__)
_encode = msgspec.msgpack.Encoder().encode
_REQUEST: Final = "r"
# The SHA-256 of more takes too long for the event loop: 0.3 ms.
_QUICK_BYTES: Final = 256 * 1024


class InferRequest(msgspec.Struct, gc=False):
    """Tensors for a model; without names of outputs all are wanted, without a version the routing chooses.

    With an ``entity_id``, inputs that are not given are read from the feature store.
    """

    model_id: str
    inputs: dict[str, Tensor]
    model_version: str | None = None
    outputs: Sequence[str] = ()
    request_id: str = ""
    entity_id: str | None = None
    routing_key: str | None = None


class Inferred(msgspec.Struct, gc=False):
    """Named outputs in the order in which they were asked for, on record.

    A row of features is a prediction of its own: ``prediction_id`` is the first one's, and ``row_count`` how many
    there are. Tensors of any other shape are one prediction.
    """

    model_id: str
    model_version: str
    role: Role
    request_id: str
    prediction_id: str
    row_count: int
    outputs: list[tuple[str, Tensor]]
    device: str

    def prediction_ids(self) -> list[str]:
        """The rows' ids, in order."""
        if self.row_count == 1:
            return [self.prediction_id]
        return batch_ids(self.prediction_id, self.row_count)


class _Asked(msgspec.Struct, gc=False):
    """A request on its way, and who was chosen to answer."""

    request: InferRequest
    model: LiveModel
    choice: Choice
    prediction_id: str
    routing_key: str
    names: Sequence[str]
    started: float
    traceparent: str | None


class Infer:
    """The use case behind ``POST /v2/models/…/infer`` and ``ModelInfer``."""

    def __init__(
        self,
        live: LiveModels,
        predict: Predict,
        journal: Journal,
        meter: Meter,
        *,
        batch_limit: int = 1000,
        record_limit_bytes: int = 16 * 1024,
    ) -> None:
        self._live = live
        self._predict = predict
        self._journal = journal
        self._meter = meter
        self._batch_limit = batch_limit
        self._record_limit_bytes = record_limit_bytes
        self._shadows: set[asyncio.Task[None]] = set()

    async def __call__(
        self,
        request: InferRequest,
        started: float,
        traceparent: str | None = None,
        new_pending: Callable[[], Pending] | None = None,
    ) -> Inferred:
        """The answer, already on record. ``started``, ``traceparent`` and ``new_pending`` as for ``Predict.one``.

        A version that takes rows of features answers each row as ``/predict`` would, and records it as such; other
        versions run what they are given as it is. Raises what ``Predict.one`` raises, TensorInvalid for inputs that
        are not the version's, and BatchTooLarge for too many rows.
        """
        model = self._live.model(request.model_id)
        prediction_id = new_id()
        key = request.routing_key or request.entity_id or prediction_id
        served, choice = model.pick_any(request.model_version, key)
        try:
            form = form_of(served)
            asked = _Asked(
                request,
                model,
                choice,
                prediction_id,
                key,
                form.check_outputs(request.outputs),
                started,
                traceparent,
            )
            if isinstance(served, TensorVersion):
                form.check_inputs(request.inputs)
                return await self._infer_tensors(served, asked)
            assert isinstance(form, RowForm)
            if request.entity_id is not None:
                return await self._infer_row(served, form, asked, new_pending)
            form.check_inputs(request.inputs)
            count = form.count_rows(request.inputs)
            if count == 1 and form.can_rebuild(asked.names):
                return await self._infer_row(served, form, asked, new_pending)
            if count > self._batch_limit:
                raise BatchTooLarge(
                    f"the tensors have {count} rows, the limit is {self._batch_limit}: split them",
                    limit=self._batch_limit,
                    given=count,
                )
            return await self._infer_rows(served, form, asked, count)
        except Exception as exc:
            name_choice(exc, choice)
            raise

    async def drain(self) -> None:
        """Returns when the shadows of all answers are on record too."""
        while self._shadows:
            await asyncio.wait(self._shadows)

    async def _infer_tensors(self, served: TensorVersion, asked: _Asked) -> Inferred:
        inputs = asked.request.inputs
        answered, execution, took_s = await served.infer(inputs, asked.names)
        self._meter.ran(served.version, took_s, execution)
        outputs = list(zip(asked.names, answered, strict=True))
        kept = await self._keep(served, asked, outputs)
        event = self._record(served, asked, asked.choice, asked.prediction_id, kept, None, execution.device)
        if asked.model.shadows and asked.request.model_version is None:
            for version in asked.model.shadows:
                task = asyncio.get_running_loop().create_task(self._shadow(version, asked, event))
                self._shadows.add(task)
                task.add_done_callback(self._shadows.discard)
        return _inferred(asked, served, event.request_id, asked.prediction_id, 1, outputs, event.device)

    async def _keep(
        self, served: TensorVersion, asked: _Asked, outputs: Sequence[tuple[str, Tensor]]
    ) -> tuple[bytes, dict[str, Any]]:
        """What goes on record of inputs and outputs; the digests of large ones are made on a thread."""
        inputs, limit = asked.request.inputs, self._record_limit_bytes

        def keep() -> tuple[bytes, dict[str, Any]]:
            packed = [pack_tensor(inputs[name], limit) for name in served.format.names]
            described = {name: describe_tensor(tensor, limit) for name, tensor in outputs}
            return served.format.pack_tensors(packed), described

        tensors = [*inputs.values(), *(tensor for _, tensor in outputs)]
        if sum(tensor.array.nbytes for tensor in tensors) <= _QUICK_BYTES:
            return keep()
        return await served.on_thread(keep)

    def _record(
        self,
        served: TensorVersion,
        asked: _Asked,
        choice: Choice,
        prediction_id: str,
        kept: tuple[bytes, dict[str, Any]],
        shadow_of: str | None,
        device: str,
    ) -> PredictionMade:
        version = served.version
        packed, result = kept
        event = PredictionMade(
            prediction_id,
            version.model_id,
            version.version,
            version.sha256,
            choice.strategy,
            choice.role,
            choice.probability,
            None,
            asked.request.request_id or asked.prediction_id,
            asked.routing_key,
            packed,
            _REQUEST,
            result,
            None,
            None,
            int((time.perf_counter() - asked.started) * 1e6) / 1e3,
            time.time_ns() // 1_000_000,
            1,
            0,
            shadow_of,
            asked.traceparent,
            device,
        )
        self._journal.append(_encode(event), asked.model.schema_digest, asked.model.schema)
        self._meter.answered(event, len(asked.request.inputs), None)
        return event

    async def _shadow(self, name: str, asked: _Asked, answered: PredictionMade) -> None:
        """Lets a shadow version answer the same tensors, on record but for nobody's eyes."""
        model = asked.model
        try:
            served, _ = model.pick_any(name, asked.routing_key)
            form = form_of(served)
            form.check_inputs(asked.request.inputs)
            if not isinstance(served, TensorVersion):
                raise TensorInvalid(f"{model.model_id} {name} takes rows of features, the champion tensors")
            started = time.perf_counter()
            names = form.check_outputs(())
            outputs, execution, took_s = await served.infer(asked.request.inputs, names)
            self._meter.ran(served.version, took_s, execution)
            shadowed = msgspec.structs.replace(asked, started=started)
            choice = Choice(name, Strategy.SHADOW, Role.SHADOW, 1.0)
            named = list(zip(names, outputs, strict=True))
            kept = await self._keep(served, shadowed, named)
            self._record(served, shadowed, choice, new_id(), kept, answered.id, execution.device)
        except PhoenixError as exc:
            self._meter.shadow_failed(model.model_id, name, exc.code)
            log.warning(
                "shadow %s %s failed: %s", model.model_id, name, exc.message, extra={"code": exc.code}
            )
        except Exception:
            self._meter.shadow_failed(model.model_id, name, InternalError.code)
            log.exception("shadow %s %s failed: a defect on our side", model.model_id, name)

    async def _infer_row(
        self,
        served: ServedVersion,
        form: "RowForm",
        asked: _Asked,
        new_pending: Callable[[], Pending] | None,
    ) -> Inferred:
        """One row, which may run together with others that are there at the same time."""
        request, model, choice = asked.request, asked.model, asked.choice
        instance = Instance(request.entity_id, None, None, request.request_id or None)
        if len(request.inputs) == len(form.inputs) or request.entity_id is None:
            if request.entity_id is not None:  # else it was checked
                form.check_inputs(request.inputs)
                form.check_one_row(request.inputs)
            values, packed = form.row(request.inputs)
            reading = Reading(model.types[choice.version], None, None, 0, None)
            row = Row(
                model,
                served,
                choice,
                asked.prediction_id,
                request.entity_id,
                request.request_id or asked.prediction_id,
                asked.routing_key,
                values,
                packed,
                _REQUEST,
                reading,
                asked.started,
                asked.traceparent,
            )
        else:
            given = form.given_features(request.inputs)
            instance.features = dict(given) or None
            reading = await self._predict.read(model, choice.version, instance)
            if isinstance(reading.stored, StoredFeatures) and given:
                # The caller's tensors come before what is stored, which only fills in what they leave out.
                kept = {name: value for name, value in reading.stored.values.items() if name not in given}
                reading = msgspec.structs.replace(
                    reading, stored=msgspec.structs.replace(reading.stored, values=kept)
                )
            row = resolve(
                model,
                served,
                choice,
                instance,
                asked.prediction_id,
                asked.routing_key,
                reading,
                asked.started,
                asked.traceparent,
            )
        answered = self._predict.answer(row, new_pending or asyncio.get_running_loop().create_future)
        event = answered if type(answered) is PredictionMade else await answered  # type: ignore[misc]
        if model.shadows and request.model_version is None:
            if row.values or reading.stored is None:
                values = row.values or served.format.unpack(row.packed)
                instance.features = dict(zip(served.contract.names, values, strict=True))
            self._predict.start_shadows(model, instance, event, reading)
        if form.can_rebuild(asked.names):
            outputs = form.rebuild(asked.names, event)
        else:
            outputs = served.engine.infer_rows(form.feeds(served.format.unpack(row.packed)), asked.names, 1)[
                0
            ]
        named = list(zip(asked.names, outputs, strict=True))
        return _inferred(asked, served, event.request_id, event.id, 1, named, event.device)

    async def _infer_rows(
        self, served: ServedVersion, form: "RowForm", asked: _Asked, count: int
    ) -> Inferred:
        """Rows that run as they came, as one batch, and go on record one by one."""
        request, model, choice = asked.request, asked.model, asked.choice
        infer_rows = served.engine.infer_rows
        packed = form.rows(request.inputs)
        ran_at = time.perf_counter()
        if served.runs_inline(count):
            answered, outputs = infer_rows(request.inputs, asked.names, count)
        else:
            answered, outputs = await served.on_thread(infer_rows, request.inputs, asked.names, count)
        ended = time.perf_counter()
        named = list(zip(asked.names, answered, strict=True))
        device = outputs.execution.device
        if not count:
            return _inferred(asked, served, request.request_id, "", 0, named, device)
        version = served.version
        self._meter.ran(version, ended - ran_at, outputs.execution)
        made = PredictionsMade(
            new_batch_id(count),
            version.model_id,
            version.version,
            version.sha256,
            choice.strategy,
            choice.role,
            choice.probability,
            request.request_id or asked.prediction_id,
            asked.routing_key,
            packed,
            _REQUEST,
            outputs.results,
            outputs.confidences,
            outputs.probabilities,
            int((ended - asked.started) * 1e6) / 1e3,
            time.time_ns() // 1_000_000,
            asked.traceparent,
            device,
        )
        self._journal.append_batch(_encode(made), count, model.schema_digest, model.schema)
        self._meter.answered_rows(made, len(served.contract.names))
        if model.shadows and request.model_version is None:
            reading = Reading(model.types[choice.version], None, None, 0, None)
            for event in made.rows():
                values = served.format.unpack(event.inputs)
                instance = Instance(features=dict(zip(served.contract.names, values, strict=True)))
                self._predict.start_shadows(model, instance, event, reading)
        return _inferred(asked, served, made.request_id, made.first_id, count, named, device)


def _inferred(
    asked: _Asked,
    served: Loaded,
    request_id: str,
    prediction_id: str,
    row_count: int,
    outputs: list[tuple[str, Tensor]],
    device: str,
) -> Inferred:
    version = served.version
    return Inferred(
        version.model_id,
        version.version,
        asked.choice.role,
        request_id,
        prediction_id,
        row_count,
        outputs,
        device,
    )


class Form:
    """The inputs and outputs of a version, as the protocol sees them."""

    def __init__(self, metadata: Metadata) -> None:
        self.inputs = {spec.name: (DATATYPE_OF[spec.type], spec) for spec in metadata.signature.inputs}
        self.outputs = carried_outputs(metadata)
        self.output_names = tuple(spec.name for spec in self.outputs)

    def check_outputs(self, names: Sequence[str]) -> Sequence[str]:
        """The names, or all there are. Raises TensorInvalid for a name that no output has."""
        for name in names:
            if name not in self.output_names:
                raise TensorInvalid(
                    f"the model has no output {name[:80]!r}; it has {', '.join(self.output_names)}",
                    tensor=name,
                )
        return names or self.output_names

    def check_inputs(self, given: Mapping[str, Tensor]) -> None:
        """Raises TensorInvalid, naming the first that is missing, unknown, or of another datatype or shape."""
        for name in self.inputs:
            if name not in given:
                raise TensorInvalid(
                    f"input {name!r} is missing; the model takes {', '.join(self.inputs)}", tensor=name
                )
        self.check_given(given)

    def check_given(self, given: Mapping[str, Tensor]) -> None:
        for name, tensor in given.items():
            known = self.inputs.get(name)
            if known is None:
                raise TensorInvalid(
                    f"the model has no input {name[:80]!r}; it takes {', '.join(self.inputs) or 'none'}",
                    tensor=name,
                )
            datatype, spec = known
            if tensor.datatype != datatype:
                raise TensorInvalid(
                    f"input {name!r} is of datatype {tensor.datatype}, the model takes {datatype}",
                    tensor=name,
                )
            shape = tensor.shape
            if spec.has_rank and (
                len(shape) != len(spec.shape)
                or any(want not in (None, size) for want, size in zip(spec.shape, shape, strict=True))
            ):
                raise TensorInvalid(
                    f"input {name!r} has shape {list(shape)}, the model takes {describe_shape(spec)}",
                    tensor=name,
                )


class RowForm(Form):
    """The inputs and outputs of a version that takes rows of features."""

    def __init__(self, served: ServedVersion) -> None:
        metadata = served.version.metadata
        super().__init__(metadata)
        # A first dimension of one is what the graph was exported with; rows are as many as are given.
        self._format = served.format
        self._names = served.contract.names
        self._slices: list[tuple[TensorSpec, int, int]] = []
        start = 0
        for spec, width in zip(metadata.signature.inputs, metadata.signature.widths, strict=True):
            self._slices.append((spec, start, width))
            start += width
        self._is_packed = len(self.inputs) == 1 and next(iter(self.inputs.values()))[0] != "BYTES"
        self._label, self._scores = metadata.label_output, metadata.scores_output
        # How the outputs of one row look that can be made from its answer alone.
        self._looks = self._find_looks(served)

    def count_rows(self, given: Mapping[str, Tensor]) -> int:
        """Raises TensorInvalid when inputs have different numbers of rows."""
        counts = {tensor.shape[0] for tensor in given.values()}
        if len(counts) > 1:
            raise TensorInvalid(f"the inputs have different numbers of rows: {sorted(counts)}")
        return counts.pop()

    def check_one_row(self, given: Mapping[str, Tensor]) -> None:
        if given and self.count_rows(given) != 1:
            raise TensorInvalid("with an entity_id the inputs have one row: the entity's")

    def row(self, given: Mapping[str, Tensor]) -> tuple[Sequence[Scalar], bytes]:
        """The values of the one row, and its bytes; no values where the bytes are all that the engine takes."""
        if self._is_packed:
            (tensor,) = given.values()
            if tensor.is_listed:
                return tensor.elements, self._format.pack(tensor.elements)
            return (), tensor.array.tobytes()
        values = [value for spec, _, _ in self._slices for value in given[spec.name].elements]
        return values, self._format.pack(values)

    def rows(self, given: Mapping[str, Tensor]) -> bytes | list[bytes]:
        """The rows' bytes, together where all are as long."""
        if self._is_packed:
            (tensor,) = given.values()
            return tensor.array.tobytes()
        columns: list[list[Any]] = []
        for spec, _, width in self._slices:
            array = given[spec.name].array
            columns += array.reshape(len(array), width).T.tolist()
        return [self._format.pack(values) for values in zip(*columns, strict=True)]

    def given_features(self, given: Mapping[str, Tensor]) -> dict[str, Scalar]:
        """The features of the inputs that are there, for one row."""
        self.check_given(given)
        self.check_one_row(given)
        features: dict[str, Scalar] = {}
        for spec, start, width in self._slices:
            if spec.name in given:
                values = given[spec.name].elements
                features |= dict(zip(self._names[start : start + width], values, strict=True))
        return features

    def feeds(self, values: Sequence[Scalar]) -> dict[str, Tensor]:
        """The inputs of one row."""
        feeds = {}
        for spec, start, width in self._slices:
            datatype = DATATYPE_OF[spec.type]
            array = np.array(values[start : start + width], DTYPE_OF[datatype])
            feeds[spec.name] = Tensor(datatype, array.reshape(1, width) if len(spec.shape) == 2 else array)
        return feeds

    def can_rebuild(self, names: Sequence[str]) -> bool:
        """Whether the answer of one row, as it is on record, holds all there is in these outputs."""
        return all(name in self._looks for name in names)

    def rebuild(self, names: Sequence[str], event: PredictionMade) -> list[Tensor]:
        """The outputs of the row, from its answer."""
        return [self._rebuild_one(name, event.result, event.probabilities) for name in names]

    def _rebuild_one(self, name: str, result: Any, probabilities: list[float] | None) -> Tensor:
        look = self._looks[name]
        elements = result if isinstance(result, list) else [result]
        if name == self._scores and probabilities is not None:
            elements = probabilities if look.array.size == len(probabilities) else probabilities[-1:]
        return Tensor.of_elements(name, look.datatype, look.shape, elements)

    def _find_looks(self, served: ServedVersion) -> dict[str, Tensor]:
        """Outputs of the sample that come out the very same when they are made from its answer."""
        metadata = served.version.metadata
        names = [name for name in (self._label, self._scores) if name in self.output_names]
        values, _ = served.contract.resolve(None, list(metadata.sample), 0)
        try:
            tensors, outputs = served.engine.infer_rows(
                self.feeds(self._format.unpack(self._format.pack(values))), [n for n in names if n], 1
            )
        except InferenceFailed:
            return {}
        self._looks = {name: tensor for name, tensor in zip(names, tensors, strict=True) if name}
        return {name: look for name, look in self._looks.items() if self._is_rebuilt(name, look, outputs)}

    def _is_rebuilt(self, name: str, look: Tensor, outputs: Outputs) -> bool:
        probabilities = outputs.probabilities[0] if outputs.probabilities else None
        try:
            rebuilt = self._rebuild_one(name, outputs.results[0], probabilities)
            is_same = encode_raw(rebuilt) == encode_raw(look)
        except TensorInvalid:
            return False
        return is_same


def form_of(served: Loaded) -> Form:
    """The version's form, made when it is asked for first."""
    form = served.form
    if form is None:
        form = RowForm(served) if isinstance(served, ServedVersion) else Form(served.version.metadata)
        served.form = form
    return form  # type: ignore[no-any-return]


def carried_outputs(metadata: Metadata) -> tuple[TensorSpec, ...]:
    """The outputs as the protocol carries them: what a ZipMap puts into maps is a tensor again."""
    labels = len(metadata.class_labels) or None
    return tuple(
        spec if spec.type in DATATYPE_OF else TensorSpec(spec.name, "float32", (None, labels))
        for spec in metadata.signature.outputs
    )


def describe_shape(spec: TensorSpec) -> list[int]:
    """The shape with -1 for what the caller chooses; for any number of dimensions it is [-1]."""
    if not spec.has_rank:
        return [-1]
    return [-1 if size is None else size for size in spec.shape]
