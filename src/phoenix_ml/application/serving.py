"""The versions that serve: loaded, warmed up, and picked for each request from memory."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from hashlib import blake2b
from math import ceil
from typing import Any, TypeVar

import msgspec

from phoenix_ml.application.ports import ArtifactStore, Engine, Engines, Meter, Registry, TensorEngine
from phoenix_ml.domain.errors import (
    DatabaseUnavailable,
    InferenceFailed,
    ModelLoadFailed,
    ModelRefused,
    ModelUnknown,
    Overloaded,
    PhoenixError,
    TakesTensors,
    VersionInactive,
    VersionUnknown,
)
from phoenix_ml.domain.features import FeatureContract, FeatureType, PackedSignature, packed_signature
from phoenix_ml.domain.models import ModelVersion, Task
from phoenix_ml.domain.routing import Choice, Router, Routing, default_routing, name_choice
from phoenix_ml.domain.rows import ON_CPU, Execution, Outputs, RowFormat, Rows
from phoenix_ml.domain.tensors import Tensor

# A hop to another thread and back costs 100 to 120 µs of CPU; a run shorter than this on the event
# loop delays nobody noticeably (docs/adr/0002).
INLINE_LIMIT_S = 0.0005
QUEUE_LIMIT = 256
BATCH_ROWS_LIMIT = 64
# A batch makes rows wait for each other, which a row that costs hardly less in it is not worth.
_CLEARLY_LESS = 0.9
_WARM_UP_RUNS = 10
_WARM_UP_S = 0.5
_WARM_UP_ROWS = 16
_RETRY_FAILED_S = 5.0

T = TypeVar("T")
_Key = tuple[str, str]  # model id and version

log = logging.getLogger(__name__)


class Queue:
    """What waits for a version's runs, as the batcher keeps it."""

    __slots__ = ("arrived", "is_busy", "recent", "rows")

    def __init__(self) -> None:
        self.rows: list[Any] = []
        self.is_busy = False
        self.arrived = 0  # rows in this turn of the event loop
        self.recent = 0.0  # rows a turn, of late


class _OnThread:
    """A version's own thread, on which runs happen that would hold up the event loop."""

    def __init__(self, version: ModelVersion) -> None:
        self.version = version
        self.format = RowFormat(version.metadata.columns)
        self.form: Any = None  # how ``infer`` sees it, once it was asked
        self._waiting = 0

    async def on_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        """What the function returns there. Raises Overloaded when too many wait for the thread already."""
        if self._waiting >= QUEUE_LIMIT:
            raise Overloaded(
                f"{self._waiting} requests wait for {self.version.model_id} {self.version.version} already",
                retry_after_s=1,
            )
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self.executor, function, *arguments)
        finally:
            self._waiting -= 1

    @cached_property
    def executor(self) -> ThreadPoolExecutor:
        # Its thread ends when the version has been dropped and the last run that holds it is done.
        return ThreadPoolExecutor(1, thread_name_prefix=f"engine-{self.version.model_id}")


class TensorVersion(_OnThread):
    """A version that is loaded and whose inputs have any shape."""

    def __init__(
        self, version: ModelVersion, engine: TensorEngine, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        super().__init__(version)
        self.engine = engine
        self._clock = clock
        # What a run takes depends on how much it is given: up to so many bytes it was seen to be short.
        self._inline_bytes = -1
        self._can_inline = engine.placement.device == ON_CPU.device

    async def infer(
        self, inputs: Mapping[str, Tensor], outputs: Sequence[str]
    ) -> tuple[list[Tensor], Execution, float]:
        """The engine's answer and the seconds it took: run here and now when that is short, else on a thread.

        Raises Overloaded when too many runs wait for the thread already, and what the engine raises.
        """
        size = sum(tensor.array.nbytes for tensor in inputs.values())
        if size <= self._inline_bytes:
            answered, execution, took_s = self._timed(inputs, outputs)
        else:
            answered, execution, took_s = await self.on_thread(self._timed, inputs, outputs)
        if took_s < INLINE_LIMIT_S and self._can_inline:
            self._inline_bytes = max(self._inline_bytes, size)
        elif size <= self._inline_bytes:
            self._inline_bytes = size // 2
        return answered, execution, took_s

    def _timed(
        self, inputs: Mapping[str, Tensor], outputs: Sequence[str]
    ) -> tuple[list[Tensor], Execution, float]:
        started = self._clock()
        return *self.engine.infer(inputs, outputs), self._clock() - started


class ServedVersion(_OnThread):
    """A version that is loaded and warm, and whose inputs are rows of features.

    ``batches`` says whether rows of several requests are best run together, and ``batch_rows_limit`` how many
    of them at once.
    """

    def __init__(
        self, version: ModelVersion, engine: Engine, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        super().__init__(version)
        metadata = version.metadata
        columns = metadata.columns
        self.engine = engine
        self.contract = FeatureContract(columns, metadata.contract)
        # On a GPU a short run can become a long one: when its memory runs out the CPU answers.
        self._can_inline = engine.placement.device == ON_CPU.device
        self.first_row_s, self.further_row_s = self._warm_up(clock)
        self.is_inline = self.runs_inline(1)
        self.batches, self.batch_rows_limit = self._weigh_batches()
        self.queue = Queue()

    def _warm_up(self, clock: Callable[[], float]) -> tuple[float, float]:
        """Seconds for a run of one row, and for each row more.

        The shortest of several runs: what else the machine does while a model loads only adds to them.
        """
        metadata = self.version.metadata
        sample, _ = self.contract.resolve(None, list(metadata.sample), 0)
        packed = self.format.pack(sample)

        def measure(count: int) -> float:
            rows = Rows([sample] * count, [packed] * count)
            durations = []
            for _ in range(_WARM_UP_RUNS):
                started = clock()
                self.engine.run(rows)
                durations.append(clock() - started)
                if sum(durations) > _WARM_UP_S:
                    break
            return min(durations)

        one = measure(1)
        if not metadata.row_independent:  # every row is a run of its own
            return one, one
        return one, max(0.0, measure(_WARM_UP_ROWS) - one) / (_WARM_UP_ROWS - 1)

    def _weigh_batches(self) -> tuple[bool, int]:
        """Whether a row costs clearly less in a batch, and for how many rows a run on the loop stays short."""
        first, further = self.first_row_s, self.further_row_s
        in_batch = (first + (_WARM_UP_ROWS - 1) * further) / _WARM_UP_ROWS
        if in_batch > _CLEARLY_LESS * first:
            return False, 1
        if not self.is_inline or self.runs_inline(BATCH_ROWS_LIMIT):
            return True, BATCH_ROWS_LIMIT
        limit = ceil((INLINE_LIMIT_S - first) / further)
        return limit > 1, limit

    def runs_inline(self, rows: int) -> bool:
        """Whether so many rows take so short that they are best run on the event loop itself."""
        return self._can_inline and self.first_row_s + (rows - 1) * self.further_row_s < INLINE_LIMIT_S

    async def run(self, rows: Rows) -> Outputs:
        """The engine's answer: run here and now when that is short, else on the version's own thread.

        Raises Overloaded when too many runs wait for the thread already, and what the engine raises.
        """
        if self.runs_inline(len(rows)):
            return self.engine.run(rows)
        return await self.on_thread(self.engine.run, rows)


Loaded = ServedVersion | TensorVersion


class LiveModel:
    """One model's part of the routing table; immutable."""

    def __init__(
        self,
        model_id: str,
        registered: frozenset[str],
        served: Mapping[str, Loaded | ModelLoadFailed],
        router: Router | None,
    ) -> None:
        self.model_id = model_id
        self.registered = registered
        self.served = served
        self.router = router
        self.shadows = router.shadows if router is not None else ()
        loaded = {v: s for v, s in served.items() if isinstance(s, ServedVersion)}
        # What the store is asked for, by version. What only shadows need is read along with it, so that
        # they see the entity in the very state that the answer was made from.
        beside = {
            name: t for v in self.shadows if v in loaded for name, t in loaded[v].contract.types.items()
        }
        self.types = {v: beside | s.contract.types if beside else s.contract.types for v, s in loaded.items()}
        # Where the store has a whole row packed, it is the engine's input as it is.
        self.packed = {v: _packed(s, self.types[v]) for v, s in loaded.items()}
        # The journal holds packed values; this tells their names and types, by version, to its reader.
        columns = {v: s.version.metadata.columns for v, s in served.items() if isinstance(s, Loaded)}
        self.schema = msgspec.msgpack.encode(columns)
        self.schema_digest = blake2b(self.schema, digest_size=8).digest()

    def pick(self, version: str | None, key: str) -> tuple[ServedVersion, Choice]:
        """Who answers with a row of features, and how it was chosen.

        Raises VersionUnknown, VersionInactive, the version's ModelLoadFailed, or TakesTensors.
        """
        if self.router is None:
            raise self._refusal(version)
        choice = self.router.pin(version) if version is not None else self.router.choose(key)
        served = self.served.get(choice.version)
        if type(served) is ServedVersion:
            return served, choice
        raise self._cannot_answer(choice, served)

    def pick_any(self, version: str | None, key: str) -> tuple[Loaded, Choice]:
        """As ``pick``, of versions that take tensors too."""
        if self.router is None:
            raise self._refusal(version)
        choice = self.router.pin(version) if version is not None else self.router.choose(key)
        served = self.served.get(choice.version)
        if isinstance(served, Loaded):
            return served, choice
        raise self._cannot_answer(choice, served)

    def _cannot_answer(self, choice: Choice, served: Loaded | ModelLoadFailed | None) -> PhoenixError:
        error = self._fault(choice.version, served)
        name_choice(error, choice)
        return error

    def _fault(self, version: str, served: Loaded | ModelLoadFailed | None) -> PhoenixError:
        if isinstance(served, TensorVersion):
            why = served.version.metadata.not_tabular or "it was registered as such"
            return TakesTensors(
                f"{self.model_id} {version} takes tensors, not rows of features ({why}): ask "
                f"POST /v2/models/{self.model_id}/infer",
                model_id=self.model_id,
                version=version,
            )
        if isinstance(served, ModelLoadFailed):
            # A new exception each time: a shared one would collect the tracebacks of all requests.
            return ModelLoadFailed(served.message, **served.details)
        return self._refusal(version)

    def _refusal(self, version: str | None) -> VersionInactive | VersionUnknown:
        if version is None:
            return VersionInactive(
                f"no version of {self.model_id} is active; activate one of {', '.join(sorted(self.registered))}",
                model_id=self.model_id,
            )
        if version not in self.registered:
            return VersionUnknown(
                f"{self.model_id} has no version {version}; it has {', '.join(sorted(self.registered))}",
                model_id=self.model_id,
                version=version,
            )
        return VersionInactive(
            f"{self.model_id} {version} is registered but not active: activate it first",
            model_id=self.model_id,
            version=version,
        )


def _packed(served: ServedVersion, types: Mapping[str, FeatureType]) -> PackedSignature | None:
    """The signature to ask the store for packed rows of; None where the single values are needed."""
    signature = packed_signature(served.version.metadata.columns)
    if signature is None or len(served.version.metadata.signature.inputs) > 1 or served.contract.has_ages:
        return None
    return signature if signature.types == types else None


class LiveModels:
    """The routing table in memory. Requests read it; a change replaces it in one assignment.

    A changed version is loaded and warmed beside the old one, and delays no other change; the old one
    drains because requests in flight hold it, and is freed with the last of them.
    """

    def __init__(
        self,
        registry: Registry,
        artifacts: ArtifactStore,
        engines: Engines,
        meter: Meter,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry = registry
        self._artifacts = artifacts
        self._engines = engines
        self._meter = meter
        self._clock = clock
        self._table: Mapping[str, LiveModel] = {}
        self.dropped = 0  # versions that were taken out of service so far
        self._revision: int | None = None
        self._is_ready = False
        self._retry_at = float("inf")
        # What follows belongs to whoever holds the condition; it is never held while a version loads.
        self._changed = threading.Condition()
        self._registered: dict[str, tuple[list[ModelVersion], Routing | None]] = {}
        self._served: dict[_Key, Loaded | ModelLoadFailed] = {}
        self._due: dict[_Key, ModelVersion] = {}
        self._loading: set[_Key] = set()

    @property
    def is_ready(self) -> bool:
        """Whether the registry was read, and what it had then was loaded, or has failed to."""
        return self._is_ready

    @property
    def is_complete(self) -> bool:
        """Whether there is nothing to load."""
        return not self._due

    @property
    def models(self) -> Mapping[str, LiveModel]:
        return self._table

    def packed_signatures(self) -> list[PackedSignature]:
        """What the store is asked for packed rows of, each once."""
        signatures = (signature for live in self._table.values() for signature in live.packed.values())
        return list(
            {signature.digest: signature for signature in signatures if signature is not None}.values()
        )

    def model(self, model_id: str) -> LiveModel:
        """Raises ModelUnknown, and DatabaseUnavailable while the registry could not be read even once."""
        model = self._table.get(model_id)
        if model is None:
            if not self.is_ready:
                raise DatabaseUnavailable("the registry was not read yet, so no model is known: try again")
            known = ", ".join(sorted(self._table)[:10]) or "none yet"
            raise ModelUnknown(f"no model {model_id!r} is registered; registered: {known}", model_id=model_id)
        return model

    def failures(self) -> dict[str, str]:
        """Active versions that do not load, and why."""
        return {
            f"{model.model_id} {version}": served.message
            for model in self._table.values()
            for version, served in model.served.items()
            if isinstance(served, ModelLoadFailed)
        }

    def displaced(self) -> dict[str, str]:
        """Loaded versions that do not run where they should: on which device they run, and why."""
        return {
            f"{model.model_id} {version}": f"{placement.device}: {placement.reason}"
            for model in self._table.values()
            for version, served in model.served.items()
            if isinstance(served, Loaded) and (placement := served.engine.placement).reason
        }

    def refresh(self, model_id: str | None = None) -> bool:
        """What ``look`` answers, once the model, or without a name every model, is loaded.

        Blocks while versions load, so it is called off the event loop. Raises DatabaseUnavailable; the
        table stays as it was.
        """
        is_changed = self.look()
        self.load(model_id)
        return is_changed

    def look(self) -> bool:
        """Whether there was something to do: the registry changed, or a failed version may load now.

        Follows the registry as far as the versions that are loaded allow; the others are due. Raises
        DatabaseUnavailable; the table stays as it was.
        """
        with self._changed:
            revision = self._registry.revision()
            if revision == self._revision and self._clock() < self._retry_at:
                return False
            while True:
                versions = self._registry.list_versions()
                routings = self._registry.routings()
                read_at, revision = revision, self._registry.revision()
                if revision == read_at:
                    break
                # A change came between the readings, which may not fit together: read anew.
            registered: dict[str, tuple[list[ModelVersion], Routing | None]] = {}
            for version in versions:
                of_model, _ = registered.setdefault(version.model_id, ([], routings.get(version.model_id)))
                of_model.append(version)
            active = {_key(version): version for version in versions if version.is_active}
            self._registered = registered
            kept = {key: served for key, served in self._served.items() if key in active}
            self.dropped += len(self._served) - len(kept)
            self._served = kept
            self._due = {
                key: version
                for key, version in active.items()
                if not isinstance(self._served.get(key), Loaded)
            }
            self._retry_at = float("inf")
            table = {model_id: self._live(model_id) for model_id in registered}
            self._table = {model_id: live for model_id, live in table.items() if live is not None}
            self._revision = revision
            self._is_ready = self._is_ready or self.is_complete
            self._changed.notify_all()
            return True

    def load(self, model_id: str | None = None) -> None:
        """Loads what is due, of the model or of all; returns when nothing is, by whomever it was loaded.

        Each version is put to use as soon as it is loaded. Blocks, so it is called off the event loop.
        """
        while (version := self._claim(model_id)) is not None:
            served = None
            try:
                served = self._load(version)
            finally:
                self._settle(version, served)

    def _claim(self, model_id: str | None) -> ModelVersion | None:
        """A version that is due and that nobody else loads; None when no version is due any more."""
        with self._changed:
            while True:
                due = {key: v for key, v in self._due.items() if model_id in (None, v.model_id)}
                free = next((key for key in due if key not in self._loading), None)
                if free is not None:
                    self._loading.add(free)
                    return due[free]
                if not due:
                    return None
                self._changed.wait()

    def _settle(self, version: ModelVersion, served: Loaded | ModelLoadFailed | None) -> None:
        """Puts a loaded version to use, unless it was taken out of service meanwhile."""
        key = _key(version)
        with self._changed:
            self._loading.discard(key)
            if served is not None and self._due.pop(key, None) is not None:
                self._served[key] = served
                if isinstance(served, ModelLoadFailed):
                    self._retry_at = self._clock() + _RETRY_FAILED_S
                live = self._live(version.model_id)
                if live is not None:
                    self._table = {**self._table, version.model_id: live}
                self._is_ready = self._is_ready or self.is_complete
            self._changed.notify_all()

    def _live(self, model_id: str) -> LiveModel | None:
        """The model as the registry wants it; while what that needs still loads, as it was."""
        versions, routing = self._registered[model_id]
        active = [version for version in versions if version.is_active]
        served = {v.version: self._served[_key(v)] for v in active if _key(v) in self._served}
        # By default nothing moves to a version that does not load while another one can answer.
        able = [version for version in active if isinstance(served.get(version.version), Loaded)]
        chosen = routing or default_routing(able)
        if len(served) < len(active) and not (chosen and served.keys() >= set(chosen.versions)):
            return self._table.get(model_id)
        chosen = chosen or default_routing(active)
        router = Router(model_id, chosen) if chosen else None
        return LiveModel(model_id, frozenset(v.version for v in versions), served, router)

    def _load(self, version: ModelVersion) -> Loaded | ModelLoadFailed:
        started = time.perf_counter()
        where = _where(version)
        try:
            served = load_version(version, self._artifacts, self._engines)
        except ModelLoadFailed as exc:
            self._meter.load_failed(version.model_id, version.version)
            log.error("model does not load: %s", exc.message, extra=where)  # noqa: TRY400 - its words say all
            # Not the exception itself: its traceback would keep alive what the loader's frames hold.
            return ModelLoadFailed(exc.message, **exc.details)
        self._meter.loaded(version.model_id, version.version, time.perf_counter() - started)
        warm = {"first_row_us": round(served.first_row_s * 1e6)} if isinstance(served, ServedVersion) else {}
        placement = served.engine.placement
        log.info("model loaded", extra={**where, **warm, "device": placement.device})
        if placement.reason:
            log.warning("model runs on %s: %s", placement.device, placement.reason, extra=where)
        if placement.out_of_memory:
            self._meter.out_of_memory(version.model_id, version.version, "load")
        return served


def load_version(version: ModelVersion, artifacts: ArtifactStore, engines: Engines) -> Loaded:
    """The version, loaded, and warm where its sample is known. Raises ModelLoadFailed with the loader's own words, and where."""
    try:
        path = artifacts.fetch(version.uri, version.sha256)
        if version.metadata.task is Task.TENSORS:
            return TensorVersion(version, engines.load_tensors(path, version.metadata, version.framework))
        return ServedVersion(version, engines.load(path, version.metadata, version.framework))
    except (ModelLoadFailed, ModelRefused, InferenceFailed) as exc:
        raise ModelLoadFailed(exc.message, **(_where(version) | exc.details)) from exc


def _where(version: ModelVersion) -> dict[str, str]:
    return {
        "model_id": version.model_id,
        "version": version.version,
        "framework": version.framework,
        "uri": version.uri,
        "sha256": version.sha256,
    }


def _key(version: ModelVersion) -> _Key:
    return version.model_id, version.version
