"""The catalogue of models: registering versions, their stages, activation and routing."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
from msgspec import UnsetType

from phoenix_ml.application.ports import ArtifactStore, Engines, ModelHints, Registry
from phoenix_ml.application.statistics.baseline import describe_reference
from phoenix_ml.domain.errors import FeatureInvalid, InferenceFailed, ModelRefused, NotFound, VersionConflict
from phoenix_ml.domain.features import FeatureContract, FeatureRule, FeatureType
from phoenix_ml.domain.models import Metadata, ModelVersion, Stage, check_model_id, check_version
from phoenix_ml.domain.routing import Routing, check_routing
from phoenix_ml.domain.rows import RowFormat, Rows, Scalar

_SAMPLE_ROWS = 2
_PLAIN: Mapping[FeatureType, Scalar] = {
    FeatureType.FLOAT: 0.0,
    FeatureType.INTEGER: 0,
    FeatureType.BOOLEAN: False,
    FeatureType.STRING: "",
}


class Registration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a caller says of a version; the rest is read from the artifact."""

    id: str
    version: str
    stage: Stage = Stage.DEV
    features: dict[str, FeatureRule] = {}
    task: str | None = None


def register(
    registry: Registry,
    artifacts: ArtifactStore,
    engines: Engines,
    artifact: Path,
    registration: Registration,
    *,
    actor: str,
    reference: Mapping[str, Sequence[Scalar | None]] | None = None,
) -> ModelVersion:
    """The registered version: its artifact stored, loaded and run once on sample rows.

    The same version with the same bytes is a no-op. Raises VersionConflict for other bytes, or for
    another feature contract, and
    ModelRefused with the runtime's own words for what will not run; then nothing is left behind.
    """
    check_model_id(registration.id)
    check_version(registration.version)
    stored = artifacts.put(artifact)
    try:
        existing = _find(registry, registration)
        if existing is not None:
            if existing.sha256 == stored.sha256:
                _check_same_contract(existing, registration)
                return existing
            raise VersionConflict(
                f"{registration.id} {registration.version} is already registered with other bytes "
                f"(sha256 {existing.sha256[:12]}…, yours {stored.sha256[:12]}…): versions are immutable, "
                "register a new one",
                registered_sha256=existing.sha256,
                given_sha256=stored.sha256,
            )
        path = artifacts.fetch(stored.uri, stored.sha256)
        version = ModelVersion(
            model_id=registration.id,
            version=registration.version,
            framework="onnx",
            uri=stored.uri,
            sha256=stored.sha256,
            stage=registration.stage,
            is_active=False,
            created_at_ms=time.time_ns() // 1_000_000,
            metadata=_describe(engines, path, registration, reference),
        )
        try:
            registry.add(version, actor)
        except VersionConflict:
            # Somebody else was faster; with the same bytes that is what was wanted.
            existing = _find(registry, registration)
            if existing is None or existing.sha256 != stored.sha256:
                raise
            _check_same_contract(existing, registration)
            return existing
    except BaseException:
        # Another version with the same bytes may have come meanwhile.
        if stored.is_new and all(v.uri != stored.uri for v in registry.list_versions()):
            artifacts.remove(stored.uri)
        raise
    return version


def _check_same_contract(existing: ModelVersion, registration: Registration) -> None:
    """Raises VersionConflict when the registration says other things of the features than the version has."""
    given = registration.features
    if given and FeatureContract.check(existing.metadata.columns, given) != existing.metadata.contract:
        raise VersionConflict(
            f"{existing.model_id} {existing.version} is already registered with another feature contract: "
            "versions are immutable, register a new one"
        )


def _find(registry: Registry, registration: Registration) -> ModelVersion | None:
    try:
        return registry.get(registration.id, registration.version)
    except NotFound:
        return None


def _describe(
    engines: Engines,
    path: Path,
    registration: Registration,
    reference: Mapping[str, Sequence[Scalar | None]] | None,
) -> Metadata:
    hints = ModelHints(registration.task, tuple(registration.features))
    metadata = engines.inspect(path, hints)
    contract = FeatureContract.check(metadata.columns, registration.features)
    metadata = msgspec.structs.replace(metadata, contract=contract)
    if reference is not None:
        metadata = msgspec.structs.replace(metadata, baseline=describe_reference(reference, contract))
    return _try_out(engines, path, metadata, reference)


def _try_out(
    engines: Engines,
    path: Path,
    metadata: Metadata,
    reference: Mapping[str, Sequence[Scalar | None]] | None,
) -> Metadata:
    """The metadata with a sample row that the model answered, and class labels that fit its answer."""
    engine = engines.load(path, metadata)
    contract = FeatureContract(metadata.columns, metadata.contract)
    row_format = RowFormat(metadata.columns)
    if reference is not None:
        count = min(_SAMPLE_ROWS, *(len(reference[name]) for name in contract.names))
        given = [[reference[name][i] for name in contract.names] for i in range(count)]
    else:
        given = [[_plain(metadata.contract[name]) for name in contract.names]] * _SAMPLE_ROWS
    samples = [_fill(contract, row) for row in given]
    try:
        values = [contract.resolve(None, sample, 0)[0] for sample in samples]
        packed = [row_format.pack(row) for row in values]
    except FeatureInvalid as exc:
        raise ModelRefused(f"a row of the reference does not fit: {exc.message}", **exc.details) from exc
    try:
        outputs = engine.run(Rows(values, packed))
        engine.run(Rows(values[:1], packed[:1]))
    except InferenceFailed as exc:
        advice = (
            "" if reference is not None else "; give --reference with real rows if zeros are no fair test"
        )
        raise ModelRefused(f"the model loads but cannot answer a sample row: {exc.message}{advice}") from exc
    if len(outputs.results) != len(values):
        raise ModelRefused(
            f"the model answers {len(outputs.results)} results for {len(values)} rows; the first dimension "
            "of its outputs must be the rows"
        )
    labels = metadata.class_labels
    if outputs.probabilities and len(labels) != len(outputs.probabilities[0]):
        labels = tuple(range(len(outputs.probabilities[0]))) if isinstance(outputs.results[0], int) else ()
    return msgspec.structs.replace(metadata, class_labels=labels, sample=tuple(samples[0]))


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
