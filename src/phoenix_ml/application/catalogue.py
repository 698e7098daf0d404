"""The catalogue of models: registering versions, their stages, activation and routing."""

import hashlib
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from msgspec import UnsetType

from phoenix_ml.application.independence import are_rows_independent
from phoenix_ml.application.ports import ArtifactStore, Engine, Engines, ModelHints, Registry
from phoenix_ml.application.serving import load_version
from phoenix_ml.application.statistics.baseline import (
    describe_reference,
    reference_columns,
    times_of,
    write_reference,
)
from phoenix_ml.application.statistics.design_effect import short_reference_note
from phoenix_ml.domain.errors import (
    FeatureInvalid,
    InferenceFailed,
    InvalidField,
    ModelLoadFailed,
    ModelRefused,
    NotFound,
    RowCountWrong,
    VersionConflict,
)
from phoenix_ml.domain.features import FeatureContract, FeatureRule, FeatureType
from phoenix_ml.domain.models import (
    Framework,
    Metadata,
    ModelVersion,
    Stage,
    Task,
    check_model_id,
    check_version,
)
from phoenix_ml.domain.routing import Routing, check_routing
from phoenix_ml.domain.rows import ElementType, Outputs, RowFormat, Rows, Scalar

T = TypeVar("T")
_SAMPLE_ROWS = 8
# A model runs over so many rows of its reference, evenly spaced; over all where their order in time matters.
SCORED_ROWS = 10_000
_SCORED_AT_ONCE = 1024
_PLAIN: Mapping[FeatureType, Scalar] = {
    FeatureType.FLOAT: 0.0,
    FeatureType.INTEGER: 0,
    FeatureType.BOOLEAN: False,
    FeatureType.STRING: "",
}
_NULLABLE = frozenset({FeatureType.FLOAT, FeatureType.STRING})


class Registration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a caller says of a version; the rest is read from the artifact."""

    id: str
    version: str
    stage: Stage = Stage.DEV
    features: dict[str, FeatureRule] = {}
    task: str | None = None
    framework: Framework = Framework.ONNX


class Reference(msgspec.Struct, frozen=True):
    """Rows that a version was trained on, or tested with: what its predictions are compared with.

    ``time`` names the column that orders them, ``outcome`` the one with the truth; neither needs to be a feature.
    ``unseen`` are the places of rows that the version was not trained on: its errors are measured over these alone.
    """

    columns: Mapping[str, Sequence[Any]]
    time: str | None = None
    outcome: str | None = None
    unseen: Sequence[int] | None = None

    def column(self, name: str | None, field: str) -> Sequence[Any] | None:
        """Raises InvalidField for a name that no column has."""
        if name is None:
            return None
        if name not in self.columns:
            raise InvalidField(
                f"the reference has no column {name!r}; it has {', '.join(self.columns)}", field=field
            )
        return self.columns[name]


class Described(msgspec.Struct, frozen=True):
    """What was found of an artifact. ``columns`` is the file of its reference's columns, where it has a reference."""

    metadata: Metadata
    columns: Path | None = None


def register(
    registry: Registry,
    artifacts: ArtifactStore,
    engines: Engines,
    artifact: Path,
    registration: Registration,
    *,
    actor: str,
    reference: Reference | None = None,
    described: Callable[[], Described] | None = None,
) -> ModelVersion:
    """The registered version: its artifact stored, loaded and run on sample rows, and over its reference.

    Where ``described`` says what there is to know of the artifact, it is neither loaded nor run here; only of a version
    that is new it is asked. The same version with the same bytes is a no-op that repairs a damaged artifact. Raises VersionConflict for other bytes, or for another feature contract,
    and ModelRefused with the runtime's own words for what will not run; nothing of it was stored then.
    """
    check_model_id(registration.id)
    check_version(registration.version)
    sha256 = _digest(artifact)
    existing = _find(registry, registration)
    if existing is not None:
        _check_same(existing, sha256, registration)
        _store(artifacts, artifact, sha256)
        return existing
    # Looked at before it is stored: what is refused need not be taken away, which another version of the
    # same bytes, registered at this moment, would miss.
    with tempfile.TemporaryDirectory() as folder:
        known = (
            describe(engines, artifact, registration, reference, Path(folder))
            if described is None
            else described()
        )
        metadata = _keep_columns(artifacts, known)
    version = ModelVersion(
        model_id=registration.id,
        version=registration.version,
        framework=registration.framework,
        uri=_store(artifacts, artifact, sha256),
        sha256=sha256,
        stage=registration.stage,
        is_active=False,
        created_at_ms=time.time_ns() // 1_000_000,
        metadata=metadata,
    )
    try:
        registry.add(version, actor)
    except VersionConflict:
        # Somebody else was faster; with the same bytes that is what was wanted.
        existing = _find(registry, registration)
        if existing is None:
            raise
        _check_same(existing, sha256, registration)
        return existing
    return version


def notes_on(metadata: Metadata) -> list[str]:
    """What whoever registers a version should know of it, and what to do about it."""
    baseline = metadata.baseline
    if baseline is None:
        return []
    notes = []
    gaps = {
        name: {"type": rule.type, "default": None if rule.type in _NULLABLE else _PLAIN[rule.type]}
        for name, rule in metadata.contract.items()
        if isinstance(rule.default, UnsetType) and baseline.features[name].missing
    }
    if gaps:
        notes.append(
            f"the reference lacks values of {', '.join(gaps)}, which requests must have: if they may lack them too, "
            f"register a version with a feature contract that says so: {msgspec.json.encode(gaps).decode()}"
        )
    if (
        baseline.quality is not None
        and baseline.calibration is not None
        and baseline.quality.log_loss is None
    ):
        why = (
            f"the reference has outcomes that are none of the model's labels, {', '.join(map(str, metadata.class_labels))}"
            if metadata.class_labels
            else "the graph does not name its class labels, and the answers to the reference do not tell their order"
        )
        notes.append(
            f"{why}: AUC, Brier score and log loss are left out, and accuracy is estimated by confidence"
        )
    if (note := short_reference_note(baseline)) is not None:
        notes.append(note)
    return notes


def activate(
    registry: Registry, artifacts: ArtifactStore, engines: Engines, model_id: str, version: str, *, actor: str
) -> ModelVersion:
    """The version, which may answer requests from now on.

    Raises ModelRefused, in the loader's own words, for one that no longer loads.
    """
    try:
        load_version(registry.get(model_id, version), artifacts, engines)
    except ModelLoadFailed as exc:
        raise ModelRefused(
            f"{model_id} {version} does not load: {exc.message}; where it cannot be repaired, register a new version",
            **exc.details,
        ) from exc
    return registry.set_active(model_id, version, True, actor)


def _digest(artifact: Path) -> str:
    try:
        if not artifact.is_file():  # what can be read only once cannot be looked at before it is stored
            raise InvalidField(f"{artifact} is not a file: save the model as one first", field="artifact")
        with artifact.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as exc:
        raise InvalidField(f"{artifact} cannot be read: {exc.strerror}", field="artifact") from exc


def _store(artifacts: ArtifactStore, artifact: Path, sha256: str) -> str:
    """The artifact's URI. Raises ModelRefused when the file is no longer the one that was looked at."""
    stored = artifacts.put(artifact)
    if stored.sha256 != sha256:
        raise ModelRefused(f"{artifact.name} was changed while it was registered: register it again")
    return stored.uri


def _check_same(existing: ModelVersion, sha256: str, registration: Registration) -> None:
    """Raises VersionConflict when the version has other bytes, or another contract, than are registered."""
    name = f"{existing.model_id} {existing.version}"
    if existing.sha256 != sha256:
        raise VersionConflict(
            f"{name} is already registered with other bytes (sha256 {existing.sha256[:12]}…, yours "
            f"{sha256[:12]}…): versions are immutable, register a new one",
            registered_sha256=existing.sha256,
            given_sha256=sha256,
        )
    if existing.framework is not registration.framework:
        raise VersionConflict(
            f"{name} is already registered for the framework {existing.framework}: versions are immutable, register "
            "a new one"
        )
    metadata, given = existing.metadata, registration.features
    if not given:
        return
    # The columns of a lone tensor have no names of their own: the order of the contract gives them.
    is_named_in_order = len(metadata.signature.inputs) > 1 or tuple(given) == metadata.features
    if not is_named_in_order or FeatureContract.check(metadata.columns, given) != metadata.contract:
        raise VersionConflict(
            f"{name} is already registered with another feature contract: "
            "versions are immutable, register a new one"
        )


def _find(registry: Registry, registration: Registration) -> ModelVersion | None:
    try:
        return registry.get(registration.id, registration.version)
    except NotFound:
        return None


def describe(
    engines: Engines, path: Path, registration: Registration, reference: Reference | None, folder: Path
) -> Described:
    """The artifact, loaded and run; columns of its reference are a file in the folder. Raises ModelRefused."""
    metadata, outputs = _describe(engines, path, registration, reference)
    if reference is None or metadata.baseline is None:
        return Described(metadata)
    arrays = reference_columns(
        reference.columns,
        metadata.contract,
        elements=_elements(metadata),
        outputs=outputs,
        task=metadata.task,
    )
    columns = folder / "reference.npz"
    write_reference(columns, arrays)
    return Described(metadata, columns)


def _describe(
    engines: Engines,
    path: Path,
    registration: Registration,
    reference: Reference | None,
) -> tuple[Metadata, Outputs | None]:
    """The metadata, and what the model answers to its reference where it has one."""
    framework = registration.framework
    hints = ModelHints(registration.task, tuple(registration.features), framework)
    metadata = engines.inspect(path, hints)
    if metadata.task is not Task.TENSORS:
        try:
            return _describe_rows(engines, path, metadata, registration, reference)
        except RowCountWrong as exc:
            if registration.task or registration.features or reference is not None:
                raise ModelRefused(exc.message) from exc
            metadata = engines.inspect(path, ModelHints(Task.TENSORS, framework=framework))
            metadata = msgspec.structs.replace(metadata, not_tabular=exc.message)
    if reference is not None:
        why = metadata.not_tabular or "it was registered as taking tensors"
        raise ModelRefused(f"a reference holds rows of features, which the model does not take: {why}")
    engines.load_tensors(path, metadata, framework, on_cpu=True)
    return _checked(metadata), None


def _describe_rows(
    engines: Engines,
    path: Path,
    metadata: Metadata,
    registration: Registration,
    reference: Reference | None,
) -> tuple[Metadata, Outputs | None]:
    contract = FeatureContract.check(metadata.columns, registration.features)
    metadata = msgspec.structs.replace(metadata, contract=contract)
    if reference is not None:
        # What is no reference is said before the model runs over it.
        describe_reference(reference.columns, contract, elements=_elements(metadata))
    # Not on a GPU, for which TensorRT would build an engine first, and which need not be there.
    engine = engines.load(path, metadata, registration.framework, on_cpu=True)
    named = metadata.class_labels
    metadata = _try_out(engine, metadata, None if reference is None else reference.columns)
    outputs = None
    if reference is not None:
        is_named = bool(named) and metadata.class_labels == named
        metadata, outputs = _compare_with(reference, engine, metadata, is_named=is_named)
    return _checked(metadata), outputs


def _checked(metadata: Metadata) -> Metadata:
    """The metadata. Raises ModelRefused where it cannot be stored."""
    written = msgspec.json.encode(metadata)
    # In JSON a backslash of a text is itself escaped, so without these pairs only U+0000 looks like this.
    if b"\\u0000" in written.replace(b"\\\\", b""):
        raise ModelRefused("a name or a reference value has U+0000, which no database can store in a text")
    try:
        msgspec.json.decode(written, type=Metadata)
    except msgspec.ValidationError as exc:  # JSON has no word for what is infinite
        raise ModelRefused(
            "the model's answers over its reference, or the outcomes, are too large to be described, as squares and "
            f"sums of them are infinite: {exc}"
        ) from exc
    return metadata


def _elements(metadata: Metadata) -> dict[str, ElementType]:
    return {column.name: column.element for column in metadata.columns}


def _compare_with(
    reference: Reference, engine: Engine, metadata: Metadata, *, is_named: bool
) -> tuple[Metadata, Outputs]:
    """The metadata with the baseline, and what the model makes of the reference.

    ``is_named`` says that the class labels are those that the graph names.
    """
    columns = reference.columns
    order = reference.column(reference.time, "time")
    order = None if order is None else times_of(order)
    outcomes = reference.column(reference.outcome, "outcome")
    if outcomes is not None and any(one is None or one != one for one in outcomes):  # noqa: PLR0124 - NaN
        raise InvalidField(
            f"the reference's column {reference.outcome!r} lacks outcomes: leave out the rows without one",
            field="outcome",
        )
    elements = _elements(metadata)
    rows = max(len(column) for column in columns.values())
    scored, scored_order, chosen = columns, order, reference.unseen
    if chosen is None and rows > SCORED_ROWS and order is None:
        chosen = [i * rows // SCORED_ROWS for i in range(SCORED_ROWS)]
    if chosen is not None:
        scored = {name: [column[i] for i in chosen] for name, column in columns.items()}
        outcomes = None if outcomes is None else [outcomes[i] for i in chosen]
        scored_order = None if order is None else [order[i] for i in chosen]
    outputs = score(engine, metadata, scored)
    if outcomes is not None and isinstance(outputs.results[0], list):
        raise InvalidField("a model with several answers a row has no outcome column", field="outcome")
    if not is_named:
        labels = settle_labels(outputs, metadata.class_labels)
        metadata = msgspec.structs.replace(metadata, class_labels=labels)
    baseline = describe_reference(
        scored,
        metadata.contract,
        elements=elements,
        time=scored_order,
        outputs=outputs,
        outcomes=outcomes,
        task=metadata.task,
        class_labels=metadata.class_labels,
    )
    if scored is not columns:
        # The scores are compared over fewer rows than the features, each as many as it has.
        whole = describe_reference(columns, metadata.contract, elements=elements, time=order)
        baseline = msgspec.structs.replace(baseline, rows=whole.rows, features=whole.features)
    return msgspec.structs.replace(metadata, baseline=baseline), outputs


def settle_labels(outputs: Outputs, guessed: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """The labels in the order of the probabilities, as the answers show it.

    A label is that of a column where it is answered whenever the column is the greatest, and never else. The guess
    stays where the answers do not contradict it; where they do, nothing is known.

    >>> settle_labels(Outputs(["good", "bad"], [0.9, 0.8], [[0.1, 0.9], [0.8, 0.2]]), ())
    ('bad', 'good')
    >>> settle_labels(Outputs([1, 0], [0.9, 0.8], [[0.1, 0.9], [0.2, 0.8]]), (0, 1))
    ()
    """
    if not outputs.probabilities or not isinstance(outputs.results[0], str | int):
        return guessed
    answered: dict[int, set[str | int]] = {}
    for result, row in zip(outputs.results, outputs.probabilities, strict=True):
        top = max(row)
        if row.count(top) == 1 and not any(map(math.isnan, row)):
            label = int(result) if isinstance(result, bool) else result
            answered.setdefault(row.index(top), set()).add(label)
    found = {column: next(iter(labels)) for column, labels in answered.items() if len(labels) == 1}
    if len(found) < len(answered) or len(set(found.values())) < len(found):
        return ()
    if len(found) == len(outputs.probabilities[0]):
        return tuple(label for _, label in sorted(found.items()))
    is_possible = bool(guessed) and all(guessed[column] == label for column, label in found.items())
    return guessed if is_possible else ()


def score(engine: Engine, metadata: Metadata, columns: Mapping[str, Sequence[Any]]) -> Outputs:
    """What the model answers for each row. Raises ModelRefused, naming the row, where it cannot."""
    contract = FeatureContract(metadata.columns, metadata.contract)
    row_format = RowFormat(metadata.columns)
    at_once = _SCORED_AT_ONCE if metadata.row_independent else 1
    outputs = Outputs([], [], [])
    given = list(zip(*(columns[name] for name in contract.names), strict=True))
    for start in range(0, len(given), at_once):
        part = given[start : start + at_once]
        try:
            values = [contract.resolve(None, _fill(contract, row), 0)[0] for row in part]
            answered = engine.run(Rows(values, [row_format.pack(row) for row in values]))
        except (FeatureInvalid, InferenceFailed) as exc:
            raise ModelRefused(
                f"the model cannot answer row {start + 1} of the reference, or one of the {len(part) - 1} after it: "
                f"{exc.message}",
                **exc.details,
            ) from exc
        outputs.results += answered.results
        outputs.confidences = _extended(outputs.confidences, answered.confidences)
        outputs.probabilities = _extended(outputs.probabilities, answered.probabilities)
    return outputs


def _extended(known: list[T] | None, more: list[T] | None) -> list[T] | None:
    return None if known is None or more is None else known + more


def _keep_columns(artifacts: ArtifactStore, described: Described) -> Metadata:
    """The metadata, which knows where the reference's columns are stored: exact statistics need them."""
    metadata, baseline = described.metadata, described.metadata.baseline
    if described.columns is None or baseline is None:
        return metadata
    stored = artifacts.put(described.columns)
    baseline = msgspec.structs.replace(baseline, reference_uri=stored.uri, reference_sha256=stored.sha256)
    return msgspec.structs.replace(metadata, baseline=baseline)


def _try_out(
    engine: Engine,
    metadata: Metadata,
    reference: Mapping[str, Sequence[Scalar | None]] | None,
) -> Metadata:
    """The metadata with a sample row that the model answered, class labels that fit its answer, and whether
    rows may run together.
    """
    contract = FeatureContract(metadata.columns, metadata.contract)
    row_format = RowFormat(metadata.columns)
    if reference is not None:
        available = min(len(reference[name]) for name in contract.names)
        count = min(_SAMPLE_ROWS, available)
        given = [[reference[name][i * available // count] for name in contract.names] for i in range(count)]
    else:
        given = [[_plain(metadata.contract[name]) for name in contract.names]]
    samples = [_fill(contract, row) for row in given]
    try:
        values = [contract.resolve(None, sample, 0)[0] for sample in samples]
        packed = [row_format.pack(row) for row in values]
    except FeatureInvalid as exc:
        raise ModelRefused(f"a row of the reference does not fit: {exc.message}", **exc.details) from exc
    try:
        alone = engine.run(Rows(values[:1], packed[:1]))
    except RowCountWrong:
        raise
    except InferenceFailed as exc:
        advice = (
            ""
            if reference is not None
            else "; give --reference with real rows if zeros are no fair test, or --task tensors if it takes no rows"
        )
        raise ModelRefused(f"the model loads but cannot answer a sample row: {exc.message}{advice}") from exc
    try:
        engine.run(Rows(values[:1] * 2, packed[:1] * 2))
        independent = are_rows_independent(engine, row_format, values)
    except RowCountWrong:
        raise
    except InferenceFailed:  # it takes one row at a time
        independent = False
    labels = metadata.class_labels
    if alone.probabilities and len(labels) != len(alone.probabilities[0]):
        labels = tuple(range(len(alone.probabilities[0]))) if isinstance(alone.results[0], int) else ()
    return msgspec.structs.replace(
        metadata, class_labels=labels, sample=tuple(samples[0]), row_independent=independent
    )


def _plain(rule: FeatureRule) -> Scalar | None:
    return _PLAIN[rule.type] if isinstance(rule.default, UnsetType) else rule.default


def _fill(contract: FeatureContract, row: Sequence[Scalar | None]) -> list[Scalar | None]:
    """The row with a plain value where the reference lacks a feature that is required."""
    filled: list[Scalar | None] = []
    for rule, value in zip(contract.rules, row, strict=True):
        absent = value is None or value != value  # noqa: PLR0124 - NaN differs from itself
        filled.append(_plain(rule) if absent else value)
    return filled


def set_routing(registry: Registry, model_id: str, routing: Routing, *, actor: str) -> Routing:
    """The routing, now in force.

    Raises RoutingInvalid for arms that the strategy cannot follow, VersionUnknown and VersionInactive
    for arms that cannot answer.
    """
    check_routing(routing)
    registry.set_routing(model_id, routing, actor)
    return routing
