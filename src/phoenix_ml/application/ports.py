"""What the use cases need from the world outside. The docstrings are the contracts; one suite a port
in ``tests/contracts`` runs over every adapter.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from msgspec import Struct
from numpy.typing import NDArray

from phoenix_ml.domain.events import Event, PredictionMade, PredictionsMade
from phoenix_ml.domain.features import FeatureType, PackedFeatures, PackedSignature, StoredFeatures
from phoenix_ml.domain.healing import JobStatus, RetrainJob
from phoenix_ml.domain.incidents import Alert, Incident
from phoenix_ml.domain.models import Framework, Metadata, ModelVersion, Stage
from phoenix_ml.domain.monitoring import MonitorSettings
from phoenix_ml.domain.routing import Routing
from phoenix_ml.domain.rows import ON_CPU, ColumnOutputs, Execution, Outputs, RowFormat, Rows, Scalar
from phoenix_ml.domain.tensors import Tensor


class Placement(Struct, frozen=True):
    """The device that an engine runs on now, and ``reason``, why it is not the one that was wanted: for one, that
    the device is ``out_of_memory``.
    """

    device: str = ON_CPU.device
    reason: str = ""
    out_of_memory: bool = False


class TensorEngine(Protocol):
    """One loaded version. It runs one batch at a time and knows no queue; any thread may call it."""

    @property
    def placement(self) -> Placement: ...

    def infer(self, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> tuple[list[Tensor], Execution]:
        """The outputs of these names, in this order, for all inputs of the graph.

        Raises InferenceFailed with the runtime's own words.
        """
        ...


class Engine(TensorEngine, Protocol):
    """One loaded version whose inputs are rows of features."""

    def run(self, rows: Rows) -> Outputs:
        """One result a row, in order.

        Raises InferenceFailed with the runtime's own words, and RowCountWrong when there are more or fewer results.
        """
        ...

    def run_columns(self, columns: Mapping[str, NDArray[Any]], count: int) -> ColumnOutputs:
        """As ``run``, of rows that are there as a column a feature, with the elements that the engine takes."""
        ...

    def infer_rows(
        self, inputs: Mapping[str, Tensor], outputs: Sequence[str], count: int
    ) -> tuple[list[Tensor], Outputs]:
        """As ``infer``, and what ``run`` answers for these rows; each input's first dimension is their count."""
        ...


class Engines(Protocol):
    """Makes engines from artifacts; ``runtime`` is what runs them, with its version."""

    runtime: str

    def inspect(self, artifact: Path, hints: "ModelHints") -> Metadata:
        """What the artifact itself says: signature, task, class labels, output roles.

        Refuses what is unsafe or cannot run. Raises ModelRefused with the runtime's own words.
        """
        ...

    def load(
        self,
        artifact: Path,
        metadata: Metadata,
        framework: Framework = Framework.ONNX,
        *,
        on_cpu: bool = False,
    ) -> Engine:
        """An engine that is ready to run rows, on the best device there is, or ``on_cpu``.

        Raises ModelRefused with the runtime's own words, and EngineUnavailable for an artifact that only an engine
        that is not installed could run.
        """
        ...

    def load_tensors(
        self,
        artifact: Path,
        metadata: Metadata,
        framework: Framework = Framework.ONNX,
        *,
        on_cpu: bool = False,
    ) -> TensorEngine:
        """As ``load``, an engine that is ready to run tensors of any shape."""
        ...


class ModelHints(Struct, frozen=True):
    """What whoever registers a model knows of it that the graph may not say."""

    task: str | None = None
    feature_names: tuple[str, ...] = ()
    framework: Framework = Framework.ONNX


class FeatureStore(Protocol):
    """The latest feature values of entities.

    Every method raises FeatureStoreUnavailable, naming the store, when the store is down or misses
    its deadline; a store that is down is asked again in the background, not by each caller.
    """

    name: str

    async def read(self, entity_id: str, types: Mapping[str, FeatureType]) -> StoredFeatures | None:
        """At least those of the named features that are stored, in the types given; None for an unknown entity.

        A value that is not of its type comes back as text, so that the contract can name it. NaN is
        no value: such a feature is absent.
        """
        ...

    async def read_packed(
        self, entity_id: str, signature: PackedSignature
    ) -> PackedFeatures | StoredFeatures | None:
        """The entity's features as a row, where all are stored as numbers that a float32 can hold, else as
        ``read`` answers them. A store may also answer values where it could have made a row.

        The row holds, rounded to float32, the very numbers that ``read`` would answer. Times of single
        features are not promised: this is for contracts without a max age.
        """
        ...

    async def read_all(self, entity_id: str) -> StoredFeatures | None:
        """All that is stored for the entity, or None. Values come back equal to what was written."""
        ...

    async def write(
        self,
        entities: Mapping[str, Mapping[str, Scalar | None]],
        at_ms: int,
        signatures: Sequence[PackedSignature] = (),
    ) -> None:
        """Merges features into entities, each entity as one atomic step; None removes a feature.

        A write that covers all features an entity has sets its ``updated_at_ms``; one that covers a
        part sets ``at_ms`` of what it wrote. An entity without features is unknown. Rows of the given
        signatures are packed where the merged entity has all their features as numbers; all other packed
        rows of the entity go.
        """
        ...

    async def check(self, patience_s: float = 0.0) -> None:
        """Returns when the store answers as quickly as a read needs it, or within the patience at a start."""
        ...

    async def close(self) -> None: ...


class StoredArtifact(Struct, frozen=True):
    """Where an artifact lies, under its digest."""

    uri: str
    sha256: str


class ArtifactStore(Protocol):
    """Immutable files under their SHA-256."""

    def put(self, source: Path) -> StoredArtifact:
        """A copy of the file. Putting the same bytes again is a no-op.

        Raises ArtifactStoreUnavailable when it cannot be written, or the source cannot be read.
        """
        ...

    def fetch(self, uri: str, sha256: str) -> Path:
        """A local file with exactly these bytes.

        Raises ModelLoadFailed, with path and digests, when it is gone or damaged, or when the URI
        leads out of the store.
        """
        ...


class AuditEntry(Struct, frozen=True):
    """Who did what to which model, and when. Ids grow with time."""

    id: int
    at_ms: int
    actor: str
    action: str
    subject: str
    details: dict[str, Any]


class Registry(Protocol):
    """Versions, their stages and routings. Every change is one transaction that also writes the audit
    log and raises the revision. Raises DatabaseUnavailable when the database is.
    """

    def add(self, version: ModelVersion, actor: str) -> None:
        """Raises VersionConflict if the version exists."""
        ...

    def get(self, model_id: str, version: str) -> ModelVersion:
        """Raises ModelUnknown or VersionUnknown."""
        ...

    def check_model(self, model_id: str) -> None:
        """Raises ModelUnknown for a model without any version; cheap, as it reads none."""
        ...

    def list_versions(self, model_id: str | None = None) -> list[ModelVersion]:
        """Versions sorted by model, then precedence. Raises ModelUnknown for a model without any."""
        ...

    def set_stage(self, model_id: str, version: str, stage: Stage, actor: str) -> ModelVersion:
        """The version in its new stage. Raises StageConflict for what is no legal promotion."""
        ...

    def set_active(self, model_id: str, version: str, active: bool, actor: str) -> ModelVersion:
        """The version as it is now. Raises RoutingConflict when a routing still names a version that
        is to be deactivated.
        """
        ...

    def routings(self) -> dict[str, Routing]:
        """The routings that were set, by model."""
        ...

    def set_routing(self, model_id: str, routing: Routing, actor: str) -> None:
        """Raises VersionUnknown and VersionInactive for arms that cannot answer."""
        ...

    def clear_routing(self, model_id: str, actor: str) -> None:
        """The default routing applies again."""
        ...

    def revision(self) -> int:
        """A number that grows with every change; cheap, for polling."""
        ...

    def audit(self, limit: int = 100, before: int | None = None) -> list[AuditEntry]:
        """The newest entries first; with ``before``, the newest of those older than that id."""
        ...


class Meter(Protocol):
    """Counts what the use cases do; each call costs well under a microsecond."""

    def ran(self, version: ModelVersion, inference_s: float, execution: Execution) -> None:
        """An engine run is over, of one row or of many."""
        ...

    def answered(self, event: PredictionMade, feature_count: int, feature_read_s: float | None) -> None:
        """One prediction was made; ``feature_read_s`` is None when no store was asked."""
        ...

    def answered_rows(self, rows: PredictionsMade, feature_count: int) -> None:
        """Predictions were made of rows that came as one."""
        ...

    def shadow_failed(self, model_id: str, version: str, code: str) -> None: ...

    def loaded(self, model_id: str, version: str, load_s: float) -> None: ...

    def load_failed(self, model_id: str, version: str) -> None: ...

    def out_of_memory(self, model_id: str, version: str, phase: str, times: int = 1) -> None:
        """A device's memory was too small, so often, in the phase ``load`` or ``run``."""
        ...


class Journal(Protocol):
    """The record that is written before the answer. Once a call returns, the death of the process loses
    nothing. A schema tells how the events' inputs are packed; it is kept beside the events that need it.
    """

    def append(self, payload: bytes, schema_digest: bytes = b"", schema: bytes = b"") -> None:
        """Puts one event on record. Raises JournalFull."""
        ...

    def append_many(self, payloads: Sequence[bytes], schema_digest: bytes = b"", schema: bytes = b"") -> None:
        """Puts events on record, all or none. Raises JournalFull."""
        ...

    def append_batch(
        self, payload: bytes, count: int, schema_digest: bytes = b"", schema: bytes = b"", /
    ) -> None:
        """Puts so many events on record as the one ``PredictionsMade`` that stands for them. Raises JournalFull."""
        ...


class RecordedEvent(Struct, frozen=True, gc=False):
    """An event read back, as its bytes too, and the format that a prediction's inputs were packed by.

    ``origin`` is for the adapter that read it: where, and what else it needs to bring the event back.
    """

    event: Event
    payload: bytes
    row_format: RowFormat | None = None
    origin: Any = None


class UnreadableEvent(Struct, frozen=True):
    """Bytes that hold no event, or one that is stored nowhere, and why. ``origin`` as for an event."""

    payload: bytes
    reason: str
    origin: Any = None


class EventSource(Protocol):
    """Recorded events, at least once and in order for each process that made them.

    Each ``read`` is followed by ``commit`` or ``rewind`` before the next. ``read`` and ``commit`` raise
    EventsUnavailable when the events cannot be reached.
    """

    def read(self, max_events: int) -> list[RecordedEvent | UnreadableEvent]:
        """The next events; empty when there are none now."""
        ...

    def commit(self) -> None:
        """All that was read is stored for good and need not come again; called after an empty read too."""
        ...

    def rewind(self) -> None:
        """What was read and not committed comes again."""
        ...


class DeadLetter(Struct, frozen=True):
    """Something that could not be shipped or logged; ``event`` is None where its bytes are none."""

    place: str
    buried_at: str
    reason: str
    payload: bytes
    event: Event | None


class DeadLetters(Protocol):
    """What could not be shipped or logged, kept until somebody has removed the cause.

    Every method raises EventsUnavailable when the letters cannot be reached.
    """

    def bury(self, event: UnreadableEvent) -> None:
        """Returns when the letter is safe: its source may forget it after that."""
        ...

    def letters(self, limit: int) -> list[DeadLetter]:
        """The oldest that were not requeued."""
        ...

    def requeue(self, limit: int) -> int:
        """How many went back on the road to the log, the oldest first. What is no event may stay where it is."""
        ...


class PredictionQuery(Struct, frozen=True):
    """Which predictions to list, newest first. ``cursor`` is what the previous page returned."""

    model_id: str | None = None
    model_version: str | None = None
    entity_id: str | None = None
    since_ms: int | None = None
    until_ms: int | None = None
    limit: int = 50
    cursor: str | None = None


class LoggedPrediction(Struct, frozen=True):
    """A row of the prediction log, with the latest outcome that was reported for it."""

    id: str
    seq: int
    model_id: str
    model_version: str
    features: dict[str, Any]
    result: Any
    confidence: float | None
    probabilities: list[float] | None
    latency_ms: float
    created_at_ms: int
    entity_id: str | None
    request_id: str
    route: dict[str, Any]
    feature_sources: str | dict[str, str]
    sha256: str
    batch_size: int
    batch_position: int
    inputs: bytes
    outcome: Any = None
    outcome_at_ms: int | None = None


class UnmatchedOutcome(Struct, frozen=True):
    """An outcome whose prediction is not in the log."""

    id: str
    prediction_id: str
    outcome: Any
    observed_at_ms: int
    received_at_ms: int

    @property
    def cursor(self) -> str:
        """Where a page that ends with this outcome ends."""
        return f"{self.received_at_ms}.{self.id}"


class PredictionLog(Protocol):
    """Predictions and outcomes for good, each id once. Raises DatabaseUnavailable when the database is."""

    def write(self, events: Sequence[RecordedEvent]) -> int:
        """How many rows were new. One transaction, durable when it returns; ids already there are left
        as they are. Raises EventRejected (a ValueError) when a row cannot be stored at all.
        """
        ...

    def get(self, prediction_id: str) -> LoggedPrediction:
        """Raises PredictionUnknown."""
        ...

    def page(self, query: PredictionQuery) -> tuple[list[LoggedPrediction], str | None]:
        """A page and the cursor of the next one, None at the end."""
        ...

    def unmatched_outcomes(self, limit: int, cursor: str | None = None) -> tuple[int, list[UnmatchedOutcome]]:
        """How many outcomes wait for a prediction that the log does not have, and the newest of them;
        with ``cursor``, the newest of those after the outcome that has it.
        """
        ...


class EventRejected(ValueError):
    """A row that the database will never take, such as one of a model that is not registered."""


class LogPosition(Struct, frozen=True):
    """How far a monitor has read: the last prediction's ``seq``, and the last outcome's with its id."""

    seq: int = 0
    outcome_seq: int = 0
    outcome_id: str = "00000000-0000-0000-0000-000000000000"

    @property
    def outcome(self) -> tuple[int, str]:
        return self.outcome_seq, self.outcome_id


class WatchedPrediction(Struct, frozen=True, gc=False):
    """What a monitor reads of a prediction; ``feature_sources`` as in the log."""

    seq: int
    model_id: str
    model_version: str
    inputs: bytes
    feature_sources: str | dict[str, str]
    result: Any
    confidence: float | None
    probabilities: list[float] | None
    created_at_ms: int


class WatchedOutcome(Struct, frozen=True, gc=False):
    """The first outcome of a prediction, beside what was predicted."""

    seq: int
    id: str
    model_id: str
    model_version: str
    outcome: Any
    result: Any
    confidence: float | None
    probabilities: list[float] | None
    created_at_ms: int


class EndedJob(Struct, frozen=True):
    """The end of a retrain job, for whoever tells people of it."""

    id: str
    model_id: str
    model_version: str
    status: JobStatus
    new_version: str | None
    error: str | None
    updated_at: int


class Standing(Struct, frozen=True):
    """Where a model's monitor stands, when somebody asked for a report at once, and the retrain job that ended last."""

    position: LogPosition
    check_requested_at_ms: int | None = None
    ended_job: EndedJob | None = None


class CountedBatch(Struct, frozen=True):
    """Predictions of one version that were counted together; ``number`` counts the version's batches."""

    model_version: str
    number: int
    rows: int
    first_seq: int
    last_seq: int
    started_at_ms: int
    ended_at_ms: int
    counts: bytes


class MonitorReport(Struct, frozen=True):
    """What a check has found, for people; ``kind`` is ``drift`` or ``performance``."""

    id: str
    model_id: str
    model_version: str
    kind: str
    created_at_ms: int
    rows: int
    report: dict[str, Any]


class MonitorStep(Struct, frozen=True):
    """All that follows from what was read between two positions of one model.

    ``opened`` incidents are new; of the ``changed`` ones the severity, the words, the evidence and the resolution
    count, as a person may have acknowledged them meanwhile. ``answers_check`` is the request that a report answers.
    """

    model_id: str
    was: LogPosition
    now: LogPosition
    state: bytes
    at_ms: int
    batches: tuple[CountedBatch, ...] = ()
    reports: tuple[MonitorReport, ...] = ()
    opened: tuple[Incident, ...] = ()
    changed: tuple[Incident, ...] = ()
    alert: Alert | None = None
    retrain: RetrainJob | None = None
    answers_check: int | None = None


class Monitoring(Protocol):
    """The prediction log as monitors read it, and what they have seen in it.

    Raises DatabaseUnavailable when the database is. What a model's monitor has read and what it concluded are
    stored by one ``commit``, so that one which is killed neither counts twice nor forgets.
    """

    def standings(self) -> dict[str, Standing]:
        """Where each registered model's monitor stands; a model that is new starts at its first prediction."""
        ...

    def state(self, model_id: str) -> tuple[LogPosition, bytes]:
        """A position and the state that the model's monitor left there.

        Raises ModelUnknown for a model without any.
        """
        ...

    def predictions(self, after: int, limit: int) -> list[WatchedPrediction]:
        """The next rows of the log, of all models, in the order of ``seq``."""
        ...

    def outcomes(self, after: tuple[int, str], limit: int) -> tuple[list[WatchedOutcome], tuple[int, str]]:
        """Outcomes that have met their predictions, in that order, of all models; later ones of the same prediction
        are left out. A shadow has the outcome of what it shadowed. Also where to read on.
        """
        ...

    def log_end(self) -> int:
        """The ``seq`` of the log's last row now."""
        ...

    def latest(
        self, model_id: str, model_version: str, rows: int, *, until_seq: int | None = None
    ) -> list[WatchedPrediction]:
        """The version's newest predictions, the oldest of them first; those up to ``until_seq`` if one is given."""
        ...

    def batches(self, model_id: str, model_version: str) -> list[CountedBatch]:
        """The batches that are kept of a version, the oldest first."""
        ...

    def commit(self, step: MonitorStep) -> bool:
        """Stores the step; False, and nothing is stored, when another monitor has moved the model's position.

        Of a version's batches and of each kind of its reports the newest are kept. An incident whose cause is open
        already, and a job whose id is known, are not stored twice.
        """
        ...

    def skip(self, positions: Mapping[str, tuple[LogPosition, LogPosition]]) -> None:
        """Moves models (from, to) between whose positions there is nothing of theirs; as ``commit`` does, each
        only if it still stands there.
        """
        ...

    def retrain_requests(self, model_id: str, since_ms: int) -> tuple[int | None, int]:
        """When a retraining was last asked for, and how often since then."""
        ...

    def reports(
        self,
        model_id: str,
        kind: str,
        model_version: str | None = None,
        limit: int = 1,
        cursor: str | None = None,
    ) -> tuple[list[MonitorReport], str | None]:
        """A page, the newest first, and the cursor of the next one, None at the end."""
        ...

    def request_check(self, model_id: str, at_ms: int) -> bool:
        """Has the model's monitor write a report at once; False when no monitor has seen the model yet."""
        ...

    def incidents(self, query: "IncidentQuery") -> tuple[list[Incident], str | None]:
        """A page, the latest opened first, and the cursor of the next one, None at the end."""
        ...

    def acknowledge(self, incident_id: str, actor: str, at_ms: int) -> Incident:
        """The incident, known to a person from now on. Raises IncidentUnknown, and IncidentResolved for one that
        has ended.
        """
        ...

    def alerts(self, model_id: str | None, limit: int, cursor: str | None) -> tuple[list[Alert], str | None]:
        """A page, the newest first, and the cursor of the next one, None at the end."""
        ...

    def settings(self, model_id: str) -> MonitorSettings:
        """The model's settings over those of all models over the defaults."""
        ...

    def change_settings(
        self, model_id: str, changes: Mapping[str, Any], actor: str, *, replace: bool = False
    ) -> MonitorSettings:
        """Sets what is given (None takes the default back), with ``replace`` also all that is not. Writes the
        audit log. Raises InvalidField and ModelUnknown; ``*`` stands for all models.
        """
        ...


class IncidentQuery(Struct, frozen=True):
    """Which incidents to list; ``cursor`` is what the previous page returned."""

    model_id: str | None = None
    model_version: str | None = None
    unresolved: bool = False
    limit: int = 50
    cursor: str | None = None


class Delivery(Struct, frozen=True):
    """Something that a channel has to be told: an alert or a request to retrain (``kind`` alert, retrain).

    ``id`` is the same in every attempt and on every channel, so that a receiver can tell what it has already.
    """

    id: str
    channel: str
    kind: str
    payload: dict[str, Any]
    created_at_ms: int
    attempts: int


class Deliveries(Protocol):
    """What waits to be told, written by the monitor's ``commit``. Raises DatabaseUnavailable."""

    def take(self, channel: str, now_ms: int, leased_until_ms: int, limit: int) -> list[Delivery]:
        """The oldest that wait for the channel; nobody else gets them before ``leased_until_ms``."""
        ...

    def delivered(self, delivery: Delivery, at_ms: int) -> None: ...

    def failed(self, delivery: Delivery, error: str, again_at_ms: int | None) -> None:
        """It is taken again after ``again_at_ms``; with None it is given up, and stays with its error."""
        ...

    def waiting(self) -> dict[str, int]:
        """How many wait, by channel, those given up left out."""
        ...


class DeliveryFailed(Exception):
    """A channel did not take what it was told; another attempt may succeed."""


class Channel(Protocol):
    """A way to people or to other programs. Belongs to one thread."""

    def tell(self, delivery: Delivery) -> None:
        """Returns when it is told. Raises DeliveryFailed within seconds."""
        ...

    def close(self) -> None: ...


class JobQuery(Struct, frozen=True):
    """Which retrain jobs to list; ``under_way`` leaves out those that have ended. ``cursor`` is what the previous
    page returned.
    """

    model_id: str | None = None
    limit: int = 50
    under_way: bool = False
    cursor: str | None = None


class RetrainJobs(Protocol):
    """Retrain jobs, from a request that the monitor or a person made to its end. Raises DatabaseUnavailable.

    A job belongs to the healer that has leased it, and to nobody else, until the lease is over.
    """

    def add(self, job: RetrainJob) -> bool:
        """False, and nothing is stored, for an id that is known."""
        ...

    def get(self, job_id: str) -> RetrainJob:
        """Raises JobUnknown."""
        ...

    def page(self, query: JobQuery) -> tuple[list[RetrainJob], str | None]:
        """A page, the latest requested first, and the cursor of the next one, None at the end."""
        ...

    def lease(
        self, owner: str, now_ms: int, until_ms: int, *, takes_requests: bool = True
    ) -> RetrainJob | None:
        """The oldest job that waits, or that a healer which is gone had in hand; None where there is none.

        Without ``takes_requests`` it is one with a model that was handed in.
        """
        ...

    def renew(self, job: RetrainJob, until_ms: int, **facts: Any) -> bool:
        """Stores the facts as well. False when the job is somebody else's by now: then it must be left alone."""
        ...

    def hand_over(self, job: RetrainJob, until_ms: int, result: Mapping[str, Any]) -> RetrainJob | None:
        """The job as one that a system outside works on; None when it is somebody else's by now."""
        ...

    def move(self, job: RetrainJob, status: JobStatus, at_ms: int, **facts: Any) -> RetrainJob | None:
        """The job after the step, with these facts; None when it is somebody else's by now.

        Raises JobConflict for a step that a job cannot take.
        """
        ...

    def count_by_status(self) -> dict[str, int]:
        """How many jobs are in each status."""
        ...


class TrainingFailed(Exception):
    """A trainer did not come to a good end; another attempt may."""


class TrainingNotStarted(TrainingFailed):
    """There was no process for it: a shortage of the machine, and no fault of what would have run."""


class TrainingStopped(TrainingFailed):
    """It was ended because its healer stops, or has lost the job: no fault of the trainer's."""


class TrainingRequest(Struct, frozen=True):
    """What an outside trainer is asked: ``run_id`` is the same whenever the same attempt is asked for again, and
    ``since_ms`` how far back its training data should go.
    """

    run_id: str
    job_id: str
    model_id: str
    model_version: str
    new_version: str
    reason: str
    evidence: dict[str, Any]
    since_ms: int


class RemoteTrainer(Protocol):
    """A system outside that trains models, and hands them in when it is done."""

    def ask(self, request: TrainingRequest) -> None:
        """Asks for a training, which goes on by itself; asked twice with one run id it is one training where the
        other side can tell. Raises TrainingFailed.
        """
        ...
