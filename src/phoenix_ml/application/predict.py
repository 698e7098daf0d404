"""From a request to an answer that is on record."""

import asyncio
import logging
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, Protocol

import msgspec

from phoenix_ml.application.batching import Batcher
from phoenix_ml.application.ports import FeatureStore, Journal, Meter
from phoenix_ml.application.serving import BATCH_ROWS_LIMIT, LiveModel, LiveModels, ServedVersion
from phoenix_ml.domain.errors import (
    BatchTooLarge,
    EntityUnknown,
    FeatureMissing,
    FeatureStoreUnavailable,
    InferenceFailed,
    InternalError,
    InvalidField,
    JournalFull,
    Overloaded,
    PhoenixError,
)
from phoenix_ml.domain.events import PredictionMade
from phoenix_ml.domain.features import SOURCE_LETTER, FeatureType, PackedFeatures, Source, StoredFeatures
from phoenix_ml.domain.ids import new_id
from phoenix_ml.domain.predictions import BatchRequest, Instance, PredictionRequest
from phoenix_ml.domain.routing import Choice, Role, Strategy, name_choice
from phoenix_ml.domain.rows import Outputs, Rows, Scalar

log = logging.getLogger(__name__)
_encode = msgspec.msgpack.Encoder().encode
# Shadows may fall behind the answers by so many; more are counted as failed, not queued.
_SHADOWS_LIMIT = 1000


class Pending(Protocol):
    """An answer to come: a future of asyncio, or what somebody who needs less than that has instead."""

    def done(self) -> bool: ...

    def set_result(self, result: PredictionMade, /) -> None: ...

    def set_exception(self, exception: Exception, /) -> None: ...

    def __await__(self) -> Generator[Any, None, PredictionMade]: ...


class Reading(msgspec.Struct, gc=False):
    """What the store said of an entity, when, and in which types; ``took_s`` is None when it was not asked."""

    types: Mapping[str, FeatureType]
    stored: StoredFeatures | PackedFeatures | None
    error: FeatureStoreUnavailable | None
    at_ms: int
    took_s: float | None


class Row(msgspec.Struct, gc=False):
    """A row that is ready to run, and who waits for its answer."""

    model: LiveModel
    served: ServedVersion
    choice: Choice
    prediction_id: str
    entity_id: str | None
    request_id: str
    routing_key: str
    values: Sequence[Scalar]
    packed: bytes
    sources: str
    reading: Reading
    started: float
    traceparent: str | None
    shadow_of: str | None = None
    answer: Pending | None = None


class Answer(msgspec.Struct, frozen=True, gc=False):
    """A prediction that is on record, with its features' names in signature order."""

    event: PredictionMade
    feature_names: tuple[str, ...]


class Predict:
    """The use case behind ``POST /predict`` and ``POST /predict/batch``."""

    def __init__(
        self,
        live: LiveModels,
        features: FeatureStore,
        journal: Journal,
        meter: Meter,
        *,
        batch_limit: int = 1000,
        queue_limit: int = 256,
        queue_deadline_s: float = 2.0,
    ) -> None:
        self._live = live
        self._features = features
        self._journal = journal
        self._meter = meter
        self._batch_limit = batch_limit
        self._batcher: Batcher[Row] = Batcher(
            self._finish, queue_limit=queue_limit, patience_s=queue_deadline_s
        )
        self._shadows: set[asyncio.Task[None]] = set()

    async def one(
        self,
        request: PredictionRequest,
        started: float,
        traceparent: str | None = None,
        new_pending: Callable[[], Pending] | None = None,
    ) -> Answer:
        """The answer, already on record. ``started`` is ``time.perf_counter()`` at arrival, ``traceparent`` the
        caller's trace context, which goes on record too. What ``new_pending`` makes is awaited where the row
        runs with others; by default that is a future of the running loop.

        Raises what the steps raise: ModelUnknown, VersionUnknown, VersionInactive, ModelLoadFailed,
        EntityUnknown, FeatureStoreUnavailable, the feature errors, InferenceFailed, Overloaded,
        JournalFull.
        """
        model = self._live.model(request.model_id)
        row = await self._prepare(model, request.model_version, request, started, traceparent)
        try:
            answered = self.answer(row, new_pending or asyncio.get_running_loop().create_future)
            event = answered if type(answered) is PredictionMade else await answered  # type: ignore[misc]
        except Exception as exc:
            name_choice(exc, row.choice)
            raise
        if model.shadows and request.model_version is None:
            self.start_shadows(model, request, event, row.reading)
        return Answer(event, row.served.contract.names)

    async def batch(
        self, request: BatchRequest, started: float, traceparent: str | None = None
    ) -> list[Answer]:
        """One answer an instance, in order, all on record; or an error that names the bad instance.

        Instances that the routing gives to the same version run as one batch, as several where that would
        keep a slow version from others, or one by one where its rows are not independent. Raises
        InvalidField for no instances, BatchTooLarge for too many, else what ``one`` raises.
        """
        self._check_size(request.instances)
        model = self._live.model(request.model_id)
        rows = await self._prepare_all(model, request, started, traceparent)
        answers: dict[int, PredictionMade] = {}
        for together in _divide(rows):
            for numbers, outputs in await self._run(rows, together):
                ended, now_ms = time.perf_counter(), time.time_ns() // 1_000_000
                for position, number in enumerate(numbers):
                    answers[number] = _event(rows[number], outputs, position, len(numbers), ended, now_ms)
        events = [answers[number] for number in range(len(rows))]
        try:
            self._journal.append_many([_encode(event) for event in events], model.schema_digest, model.schema)
        except JournalFull as exc:
            if len({row.choice.version for row in rows}) == 1:
                name_choice(exc, rows[0].choice)
            raise
        for number, row in enumerate(rows):
            self._count(events[number], row)
        if model.shadows and request.model_version is None:
            for instance, event, row in zip(request.instances, events, rows, strict=True):
                self.start_shadows(model, instance, event, row.reading)
        return [Answer(event, row.served.contract.names) for event, row in zip(events, rows, strict=True)]

    async def drain(self) -> None:
        """Returns when the shadows of all answers are on record too."""
        while self._shadows:
            await asyncio.wait(self._shadows)

    def _check_size(self, instances: Sequence[Instance]) -> None:
        if not instances:
            raise InvalidField("the batch is empty: give at least one instance", field="instances")
        if len(instances) > self._batch_limit:
            raise BatchTooLarge(
                f"the batch has {len(instances)} instances, the limit is {self._batch_limit}: split it",
                limit=self._batch_limit,
                given=len(instances),
            )

    async def _prepare_all(
        self, model: LiveModel, request: BatchRequest, started: float, traceparent: str | None
    ) -> list[Row]:
        """A row an instance. Stores that wait for a network are asked for all entities at once."""
        prepared = [
            self._prepare(model, request.model_version, instance, started, traceparent)
            for instance in request.instances
        ]
        rows = []
        for number, found in enumerate(await asyncio.gather(*prepared, return_exceptions=True)):
            if isinstance(found, PhoenixError):
                _name_instance(found, number)
            if isinstance(found, BaseException):
                raise found
            rows.append(found)
        return rows

    async def _run(self, rows: list[Row], numbers: list[int]) -> list[tuple[list[int], Outputs]]:
        """The outputs of the rows with these numbers; where they fail together, of each by itself.

        Raises InferenceFailed that names the first that fails alone.
        """
        members = [rows[number] for number in numbers]
        served = members[0].served
        ran_at = time.perf_counter()
        try:
            outputs = await served.run(Rows([m.values for m in members], [m.packed for m in members]))
        except InferenceFailed as exc:
            if len(numbers) > 1:
                return [part for number in numbers for part in await self._run(rows, [number])]
            _name_instance(exc, numbers[0])
            name_choice(exc, members[0].choice)
            raise
        except Exception as exc:
            name_choice(exc, members[0].choice)
            raise
        self._meter.ran(served.version, time.perf_counter() - ran_at, outputs.execution)
        if len(numbers) < len(rows):  # many short runs on end would hold up everybody else
            await asyncio.sleep(0)
        return [(numbers, outputs)]

    async def _prepare(
        self,
        model: LiveModel,
        version: str | None,
        instance: Instance,
        started: float,
        traceparent: str | None,
    ) -> Row:
        prediction_id = new_id()
        key = instance.routing_key or instance.entity_id or prediction_id
        served, choice = model.pick(version, key)
        try:
            reading = await self.read(model, choice.version, instance)
            return resolve(model, served, choice, instance, prediction_id, key, reading, started, traceparent)
        except Exception as exc:
            name_choice(exc, choice)
            raise

    async def read(self, model: LiveModel, version: str, instance: Instance) -> Reading:
        """What the store has of the instance's entity; it may fail where the request has features too."""
        types = model.types[version]
        entity_id, given = instance.entity_id, instance.features
        stored: StoredFeatures | PackedFeatures | None = None
        error = took_s = None
        if entity_id is not None:
            asked_at = time.perf_counter()
            signature = model.packed[version]
            try:
                if signature is not None and given is None:
                    stored = await self._features.read_packed(entity_id, signature)
                else:
                    stored = await self._features.read(entity_id, types)
            except FeatureStoreUnavailable as exc:
                if not given:
                    raise
                error = exc
            took_s = time.perf_counter() - asked_at
            if stored is None and not given and error is None:
                raise EntityUnknown(
                    f"no features are stored for entity {entity_id!r}: store them or send 'features'",
                    entity_id=entity_id,
                )
        elif given is None:
            raise InvalidField(
                "give an 'entity_id' whose features are stored, or 'features'", field="entity_id"
            )
        return Reading(types, stored, error, time.time_ns() // 1_000_000, took_s)

    def answer(self, row: Row, new_pending: Callable[[], Pending]) -> PredictionMade | Pending:
        """The answer of a row, on record; or to come, where the row runs with others."""
        served = row.served
        if self._batcher.is_alone(served):
            ran_at = time.perf_counter()
            outputs = served.engine.run(Rows((row.values,), (row.packed,)))
            ended = time.perf_counter()
            self._meter.ran(served.version, ended - ran_at, outputs.execution)
            event = _event(row, outputs, 0, 1, ended, time.time_ns() // 1_000_000)
            self._journal.append(_encode(event), row.model.schema_digest, row.model.schema)
            self._count(event, row)
            return event
        pending = row.answer = new_pending()
        self._batcher.add(served, row)
        return pending

    def _finish(self, rows: list[Row], outputs: Outputs | Exception, inference_s: float) -> None:
        """Puts the answers of rows that ran together on record, then gives them to those who wait."""
        if isinstance(outputs, Exception):
            _fail(rows, outputs)
            return
        model = rows[-1].model
        try:
            self._meter.ran(rows[-1].served.version, inference_s, outputs.execution)
            count, ended, now_ms = len(rows), time.perf_counter(), time.time_ns() // 1_000_000
            events = [_event(row, outputs, i, count, ended, now_ms) for i, row in enumerate(rows)]
            # One write for all: by itself each costs 2 µs.
            self._journal.append_many([_encode(event) for event in events], model.schema_digest, model.schema)
        except Exception as exc:  # noqa: BLE001 - every caller gets an answer, and nobody else would tell them
            _fail(rows, exc)
            return
        for row, event in zip(rows, events, strict=True):
            # First: whatever counting comes to, this row has its answer, and the others get theirs.
            if row.answer is not None and not row.answer.done():
                row.answer.set_result(event)
        for row, event in zip(rows, events, strict=True):
            self._count(event, row)

    def _count(self, event: PredictionMade, row: Row) -> None:
        self._meter.answered(event, len(row.served.contract.names), row.reading.took_s)

    def start_shadows(
        self, model: LiveModel, instance: Instance, answered: PredictionMade, reading: Reading
    ) -> None:
        """Lets the model's shadows answer too, after the caller has an answer."""
        for version in model.shadows:
            if len(self._shadows) >= _SHADOWS_LIMIT:
                self._meter.shadow_failed(model.model_id, version, Overloaded.code)
                continue
            shadow = self._shadow(model, version, instance, answered, reading)
            task = asyncio.get_running_loop().create_task(shadow)
            self._shadows.add(task)
            task.add_done_callback(self._shadows.discard)

    async def _shadow(
        self,
        model: LiveModel,
        version: str,
        instance: Instance,
        answered: PredictionMade,
        reading: Reading,
    ) -> None:
        """Lets a shadow version answer the same row, on record but for nobody's eyes.

        A shadow that fails is counted and logged; the caller has long had an answer.
        """
        try:
            served, _ = model.pick(version, answered.routing_key)
            choice = Choice(version, Strategy.SHADOW, Role.SHADOW, 1.0)
            started = time.perf_counter()
            if isinstance(reading.stored, PackedFeatures):
                fits = model.packed[version] == model.packed[answered.model_version]
            else:
                fits = served.contract.types.items() <= reading.types.items()
            if fits:
                reading = msgspec.structs.replace(reading, took_s=None)
            else:
                # It takes a feature in another type than the champion, in which only the store can give it.
                reading = await self.read(model, version, instance)
            traceparent = answered.traceparent
            row = resolve(
                model,
                served,
                choice,
                instance,
                new_id(),
                answered.routing_key,
                reading,
                started,
                traceparent,
            )
            row.request_id, row.shadow_of = answered.request_id, answered.id
            answer = self.answer(row, asyncio.get_running_loop().create_future)
            if not isinstance(answer, PredictionMade):
                await answer
        except PhoenixError as exc:
            self._meter.shadow_failed(model.model_id, version, exc.code)
            log.warning(
                "shadow %s %s failed: %s",
                model.model_id,
                version,
                exc.message,
                extra={"code": exc.code, "prediction_id": answered.id},
            )
        except Exception:
            self._meter.shadow_failed(model.model_id, version, InternalError.code)
            log.exception("shadow %s %s failed: a defect on our side", model.model_id, version)


def resolve(
    model: LiveModel,
    served: ServedVersion,
    choice: Choice,
    instance: Instance,
    prediction_id: str,
    key: str,
    reading: Reading,
    started: float,
    traceparent: str | None,
) -> Row:
    """The row's values: from the store, else from the request, else their defaults."""
    stored = reading.stored
    values: Sequence[Scalar]
    if isinstance(stored, PackedFeatures):
        values, packed, sources = (), stored.row, SOURCE_LETTER[Source.STORE]
    else:
        try:
            values, sources = served.contract.resolve(stored, instance.features, reading.at_ms)
        except FeatureMissing as exc:
            if reading.error is not None:  # the store may well have it: asking again later can succeed
                raise reading.error from exc
            raise
        packed = served.format.pack(values)
    return Row(  # by position, like the event: keywords cost 0.6 µs more
        model,
        served,
        choice,
        prediction_id,
        instance.entity_id,
        instance.request_id or prediction_id,
        key,
        values,
        packed,
        sources,
        reading,
        started,
        traceparent,
    )


def _divide(rows: Sequence[Row]) -> Iterator[list[int]]:
    """The numbers of the rows that run as one."""
    groups: dict[tuple[str, int], list[int]] = {}
    for number, row in enumerate(rows):
        # Rows that would change each other's answers, or cannot run together, run one by one.
        apart = 0 if row.served.version.metadata.row_independent else number
        groups.setdefault((row.choice.version, apart), []).append(number)
    for numbers in groups.values():
        # Who waits for the version's thread gets in between.
        size = len(numbers) if rows[numbers[0]].served.is_inline else BATCH_ROWS_LIMIT
        for start in range(0, len(numbers), size):
            yield numbers[start : start + size]


def _name_instance(error: PhoenixError, number: int) -> None:
    error.message = f"instance {number}: {error.message}"
    error.details["instance"] = number


def _event(
    row: Row, outputs: Outputs, position: int, batch_size: int, ended: float, now_ms: int
) -> PredictionMade:
    version, choice = row.served.version, row.choice
    return PredictionMade(
        row.prediction_id,
        version.model_id,
        version.version,
        version.sha256,
        choice.strategy,
        choice.role,
        choice.probability,
        row.entity_id,
        row.request_id,
        row.routing_key,
        row.packed,
        row.sources,
        outputs.results[position],
        None if outputs.confidences is None else outputs.confidences[position],
        None if outputs.probabilities is None else outputs.probabilities[position],
        int((ended - row.started) * 1e6) / 1e3,  # round() would cost 0.2 µs more
        now_ms,
        batch_size,
        position,
        row.shadow_of,
        row.traceparent,
        outputs.execution.device,
    )


def _fail(rows: list[Row], error: Exception) -> None:
    for row in rows:
        if row.answer is not None and not row.answer.done():
            # A new one each: a shared one would collect the tracebacks of all.
            own = type(error)(error.message, **error.details) if isinstance(error, PhoenixError) else error
            row.answer.set_exception(own)
