"""Registering a version, and the routing table in memory, on real files, real SQLite and ONNX Runtime."""

import asyncio
import gc
import math
import sqlite3
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import numpy as np
import onnx_models
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from phoenix_ml.application import catalogue as use_cases
from phoenix_ml.application.catalogue import (
    Registration,
    activate,
    notes_on,
    register,
    set_routing,
    settle_labels,
)
from phoenix_ml.application.ports import Engine, ModelHints, Placement
from phoenix_ml.application.serving import INLINE_LIMIT_S, LiveModels, ServedVersion
from phoenix_ml.application.statistics.baseline import describe_reference
from phoenix_ml.domain.baselines import FeatureBaseline
from phoenix_ml.domain.errors import (
    DatabaseUnavailable,
    InferenceFailed,
    InvalidField,
    InvalidRequest,
    ModelLoadFailed,
    ModelRefused,
    ModelUnknown,
    Overloaded,
    VersionConflict,
    VersionInactive,
    VersionUnknown,
)
from phoenix_ml.domain.features import FeatureRule, FeatureType
from phoenix_ml.domain.models import Metadata, ModelVersion, Signature, Stage, Task
from phoenix_ml.domain.routing import Arm, Role, Routing, Strategy
from phoenix_ml.domain.rows import ColumnOutputs, Execution, Outputs, Rows, Scalar
from phoenix_ml.domain.tensors import Tensor
from phoenix_ml.infrastructure.artifacts.files import FileArtifacts
from phoenix_ml.infrastructure.engines.onnx import OnnxEngines
from phoenix_ml.infrastructure.sql.database import Database
from phoenix_ml.infrastructure.sql.registry import SqlRegistry
from phoenix_ml.infrastructure.telemetry import catalogue
from phoenix_ml.infrastructure.telemetry.meter import MetricsMeter
from phoenix_ml.infrastructure.telemetry.metrics import MetricsWriter, render

FLOAT, INTEGER, STRING = FeatureType.FLOAT, FeatureType.INTEGER, FeatureType.STRING
Reference = Mapping[str, Sequence[Scalar | None]]


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Platform:
    """The parts that a real process has, in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = f"sqlite:///{folder / 'phoenix.db'}"
        self.database = Database(self.url)
        self.database.upgrade()
        self.registry = SqlRegistry(self.database)
        self.artifacts = FileArtifacts(folder / "artifacts")
        self.engines = OnnxEngines()
        self.clock = Clock()
        self.metrics = MetricsWriter(folder / "metrics" / "api-0.mmap")
        self.live = LiveModels(
            self.registry, self.artifacts, self.engines, MetricsMeter(self.metrics), self.clock
        )

    def register(
        self,
        model: bytes,
        number: str = "1.0.0",
        *,
        model_id: str = "risk",
        reference: Reference | None = None,
        time: str | None = None,
        outcome: str | None = None,
        activate: bool = False,
        **said: Any,
    ) -> ModelVersion:
        path = onnx_models.write(self.folder / "given.onnx", model)
        registration = Registration(model_id, number, **said)
        version = register(
            self.registry,
            self.artifacts,
            self.engines,
            path,
            registration,
            actor="ann",
            reference=None if reference is None else use_cases.Reference(reference, time, outcome),
        )
        if activate:
            return self.registry.set_active(model_id, number, True, "ann")
        return version

    def activate(self, number: str = "1.0.0") -> ModelVersion:
        return activate(self.registry, self.artifacts, self.engines, "risk", number, actor="ann")

    def stored(self) -> list[str]:
        """Every file in the store, temporary ones included."""
        folder = self.folder / "artifacts"
        return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())

    def path_of(self, version: ModelVersion) -> Path:
        return self.folder / "artifacts" / version.uri

    def damage(self, version: ModelVersion, content: bytes = b"damage") -> None:
        self.path_of(version).unlink(missing_ok=True)
        self.path_of(version).write_bytes(content)

    def served(self, version: str | None = None, model_id: str = "risk") -> ServedVersion:
        return self.live.model(model_id).pick(version, "key")[0]

    def loads(self, number: str, outcome: str) -> float:
        """How often the version was loaded, or failed to, by the metrics that a scrape would show."""
        wanted = f'model="risk",version="{number}",outcome="{outcome}"'
        text = render(self.folder / "metrics", [catalogue.MODEL_LOADS]).decode()
        return sum(float(line.split()[-1]) for line in text.splitlines() if wanted in line)

    def close(self) -> None:
        self.metrics.close()
        self.database.close()


@pytest.fixture
def platform(tmp_path: Path) -> Iterator[Platform]:
    with closing(Platform(tmp_path)) as platform:
        yield platform


def answer(served: ServedVersion, *row: Scalar) -> Any:
    return served.engine.run(Rows([row], [served.format.pack(row)])).results[0]


# --- registering -----------------------------------------------------------------------------------------


def test_a_registered_version_knows_its_graph_and_a_row_that_it_answers(platform: Platform) -> None:
    """Whatever serves it later needs no second look at the file."""
    contract = {
        "income": FeatureRule(FLOAT),
        "age": FeatureRule(INTEGER, 40),
        "debt": FeatureRule(FLOAT, None),
    }
    version = platform.register(onnx_models.binary_classifier(3), features=contract)
    assert platform.registry.get("risk", "1.0.0") == version
    assert (version.framework, version.stage, version.is_active) == ("onnx", Stage.DEV, False)
    assert platform.stored() == [version.uri]
    assert version.metadata.features == ("income", "age", "debt")
    assert version.metadata.contract == contract
    assert version.metadata.task is Task.CLASSIFICATION
    assert version.metadata.class_labels == (0, 1)
    assert version.metadata.sample == (0.0, 40, None)
    assert version.metadata.baseline is None
    assert [entry.action for entry in platform.registry.audit()] == ["register"]


def test_a_stage_that_is_given_is_taken(platform: Platform) -> None:
    """A version may come from another installation where it was staged already."""
    assert platform.register(onnx_models.linear_regressor(), stage=Stage.STAGING).stage is Stage.STAGING


def test_features_without_a_contract_are_required_and_named_after_the_graph(platform: Platform) -> None:
    """Nothing said means nothing may be missing."""
    version = platform.register(onnx_models.column_model())
    assert version.metadata.contract == {
        "age": FeatureRule(FLOAT),
        "visits": FeatureRule(INTEGER),
        "city": FeatureRule(STRING),
        "member": FeatureRule(FeatureType.BOOLEAN),
    }
    assert version.metadata.sample == (0.0, 0, "", False)


def test_a_contract_may_speak_of_some_columns_only(platform: Platform) -> None:
    """Columns have names of their own, in the graph's order, whatever the contract's."""
    rules = {"city": FeatureRule(STRING, None), "age": FeatureRule(FLOAT, 30.5, 60.0, "in years")}
    version = platform.register(onnx_models.column_model(), features=rules)
    assert version.metadata.features == ("age", "visits", "city", "member")
    assert version.metadata.contract["age"] == rules["age"]
    assert version.metadata.contract["visits"] == FeatureRule(INTEGER)
    assert version.metadata.sample == (30.5, 0, None, False)


def test_a_nameless_tensor_takes_names_in_the_order_of_the_contract(platform: Platform) -> None:
    """JSON objects keep their order: it says which column is which."""
    rules = {name: FeatureRule(FLOAT) for name in ("z", "a", "m")}
    platform.register(onnx_models.linear_regressor(3), features=rules, activate=True)
    platform.live.refresh()
    assert platform.served().contract.names == ("z", "a", "m")


REFUSED: list[tuple[bytes, dict[str, Any], str]] = [
    (b"garbage", {}, "not an ONNX model"),
    (b"", {}, "it has no graph"),
    (onnx_models.linear_regressor()[:-20], {}, "not an ONNX model"),
    (onnx_models.unknown_operator(), {}, "No Op registered for NoSuchOperator"),
    (onnx_models.external_data_in_subgraph(), {}, "stored outside of the model file"),
    (onnx_models.three_dimensional_input(), {"task": "regression"}, "a tabular input is [rows]"),
    (onnx_models.no_inputs(), {"task": "regression"}, "takes no inputs"),
    (onnx_models.total_of_all_rows(), {"task": "regression"}, "answers 1 results for 2 rows"),
    (onnx_models.probabilities_of_all_rows(), {"task": "classification"}, "1 results for 2 rows"),
    (onnx_models.multi_label_classifier(3), {"task": "classification"}, "3 results for 1 row;"),
    (onnx_models.strict_one_hot_model(), {}, "Unknown Category and zeros = 0.; give --reference"),
    (onnx_models.linear_regressor(2), {"task": "clustering"}, "is not known"),
    (
        onnx_models.linear_regressor(2),
        {"features": {"a": FeatureRule(FLOAT)}},
        "takes 2 features, 1 are named",
    ),
    (onnx_models.column_model(), {"features": {"cty": FeatureRule(STRING)}}, "names ['cty']"),
    (onnx_models.column_model(), {"features": {"age": FeatureRule(STRING)}}, "'age' is of type string"),
    (onnx_models.column_model(), {"features": {"visits": FeatureRule(FLOAT)}}, "'visits' is of type float"),
    (onnx_models.column_model(), {"features": {"visits": FeatureRule(INTEGER, None)}}, "cannot be null"),
    (onnx_models.column_model(), {"features": {"member": FeatureRule(FeatureType.BOOLEAN, None)}}, "null"),
    (onnx_models.column_model(), {"features": {"age": FeatureRule(FLOAT, "old")}}, "not of type float"),
    (onnx_models.column_model(), {"features": {"age": FeatureRule(FLOAT, True)}}, "not of type float"),
    (onnx_models.column_model(), {"features": {"age": FeatureRule(FLOAT, max_age_s=0.0)}}, "above 0"),
]


@pytest.mark.parametrize(("model", "said", "words"), REFUSED, ids=lambda value: str(value)[:24])
def test_what_is_refused_leaves_nothing_behind(
    platform: Platform, model: bytes, said: dict[str, Any], words: str
) -> None:
    """No artifact, no row, no temporary file, no entry in the audit log: as if it had never been tried."""
    before = platform.registry.revision()
    with pytest.raises(ModelRefused) as caught:
        platform.register(model, **said)
    assert words in caught.value.message
    assert platform.stored() == []
    assert platform.registry.list_versions() == []
    assert platform.registry.audit() == []
    assert platform.registry.revision() == before


@pytest.mark.parametrize(
    ("model_id", "number"), [("../x", "1.0.0"), ("", "1.0.0"), ("risk", "v1"), ("risk", "1.0")]
)
def test_names_that_are_not_usable_are_refused_before_anything_is_stored(
    platform: Platform, model_id: str, number: str
) -> None:
    """They appear in URLs, file names and metric labels."""
    with pytest.raises(InvalidField):
        platform.register(onnx_models.linear_regressor(), number, model_id=model_id)
    assert platform.stored() == []


def test_a_default_that_its_column_cannot_hold_is_refused(platform: Platform) -> None:
    """It would fail only on the day when the feature is missing."""
    with pytest.raises(InvalidRequest, match="visits"):
        platform.register(onnx_models.column_model(), features={"visits": FeatureRule(INTEGER, 2**70)})
    assert platform.stored() == []


def test_the_same_version_with_the_same_bytes_is_a_no_op(platform: Platform) -> None:
    """A deployment script may run twice."""
    model = onnx_models.linear_regressor()
    version = platform.register(model)
    before = platform.registry.revision(), platform.registry.audit(), platform.stored()
    assert platform.register(model) == version
    assert (platform.registry.revision(), platform.registry.audit(), platform.stored()) == before


def test_what_is_described_elsewhere_is_asked_for_once_and_not_for_what_is_there(platform: Platform) -> None:
    """It costs a process; and whoever registers the same again would hear of faults that nobody asks about."""
    path = onnx_models.write(platform.folder / "given.onnx", onnx_models.linear_regressor())
    registration = Registration("risk", "1.0.0")
    asked: list[str] = []

    def described() -> use_cases.Described:
        asked.append("once")
        return use_cases.describe(platform.engines, path, registration, None, platform.folder)

    where = platform.registry, platform.artifacts, platform.engines, path, registration
    first = register(*where, actor="ann", described=described)
    again = register(*where, actor="ann", described=described)

    assert again == first
    assert asked == ["once"]


def test_the_same_version_with_other_bytes_is_refused(platform: Platform) -> None:
    """Versions are immutable: what answered yesterday under this name answers today."""
    version = platform.register(onnx_models.linear_regressor(bias=0.0))
    with pytest.raises(VersionConflict, match="versions are immutable") as caught:
        platform.register(onnx_models.linear_regressor(bias=1.0))
    assert caught.value.details["registered_sha256"] == version.sha256
    assert platform.stored() == [version.uri]
    assert platform.registry.list_versions() == [version]


def test_other_bytes_that_another_version_has_stay_with_it(platform: Platform) -> None:
    """Undoing a refused registration must not take another version's artifact away."""
    one = platform.register(onnx_models.linear_regressor(bias=0.0), "1.0.0")
    two = platform.register(onnx_models.linear_regressor(bias=1.0), "2.0.0")
    with pytest.raises(VersionConflict):
        platform.register(onnx_models.linear_regressor(bias=1.0), "1.0.0")
    with pytest.raises(ModelRefused):
        platform.register(onnx_models.linear_regressor(bias=1.0), "3.0.0", task="clustering")
    assert platform.stored() == sorted([one.uri, two.uri])


class Meeting:
    """Lets a registration that will be refused begin first, and another of the same bytes end last."""

    def __init__(self, platform: Platform) -> None:
        self.other_waits = threading.Event()
        self.refused = threading.Event()
        meeting = self

        class PatientRegistry(SqlRegistry):
            def add(self, version: ModelVersion, actor: str) -> None:
                meeting.other_waits.set()
                assert meeting.refused.wait(60)
                super().add(version, actor)

        class MeetingEngines(OnnxEngines):
            def inspect(self, artifact: Path, hints: ModelHints) -> Metadata:
                if hints.task == "clustering":
                    meeting.other.start()
                    assert meeting.other_waits.wait(60)
                return super().inspect(artifact, hints)

        self.engines = MeetingEngines()
        self.path = onnx_models.write(platform.folder / "same.onnx", onnx_models.linear_regressor())
        self.other = threading.Thread(
            target=lambda: register(
                PatientRegistry(platform.database),
                platform.artifacts,
                self.engines,
                self.path,
                Registration("risk", "1.0.0"),
                actor="ann",
            )
        )


def test_a_refused_registration_takes_nothing_from_one_of_the_same_bytes_at_the_same_moment(
    platform: Platform,
) -> None:
    """A version without its file answers until the next restart, and then never again."""
    meeting = Meeting(platform)
    bad = Registration("risk", "2.0.0", task="clustering")

    with pytest.raises(ModelRefused):
        register(platform.registry, platform.artifacts, meeting.engines, meeting.path, bad, actor="bob")
    meeting.refused.set()
    meeting.other.join()

    (version,) = platform.registry.list_versions()
    assert platform.stored() == [version.uri]


def test_a_refused_file_is_in_the_store_at_no_time(platform: Platform) -> None:
    """What never was there needs no clean-up that a kill could prevent."""
    seen: list[list[str]] = []

    class WatchedEngines(OnnxEngines):
        def inspect(self, artifact: Path, hints: ModelHints) -> Metadata:
            seen.append(platform.stored())
            return super().inspect(artifact, hints)

    platform.engines = WatchedEngines()
    with pytest.raises(ModelRefused):
        platform.register(onnx_models.unknown_operator())

    assert seen == [[]]


@pytest.mark.parametrize("name", ["model.json", "model.textproto", "model.ort"])
def test_what_the_file_is_named_does_not_matter(platform: Platform, name: str) -> None:
    """The libraries that read it guess its format by the name; the store keeps no names."""
    path = onnx_models.write(platform.folder / name, onnx_models.linear_regressor(2))
    registration = Registration("risk", "1.0.0")

    register(platform.registry, platform.artifacts, platform.engines, path, registration, actor="ann")

    platform.activate()
    platform.live.refresh()
    assert answer(platform.served(), 1.0, 1.0) == pytest.approx(-0.25)


def test_what_is_no_file_is_refused(platform: Platform) -> None:
    """A pipe can be read only once, so nobody could know what is stored."""
    for path in (platform.folder / "gone.onnx", platform.folder):
        with pytest.raises(InvalidField, match="is not a file"):
            register(
                platform.registry,
                platform.artifacts,
                platform.engines,
                path,
                Registration("risk", "1.0.0"),
                actor="ann",
            )


@pytest.mark.parametrize("reference", [{"city": ["Oslo", "a\0b"]}, {"city": ["Oslo", "Lima", "a\0b"]}])
def test_u0000_in_a_reference_is_refused_before_anything_is_stored(
    platform: Platform, reference: Reference
) -> None:
    """SQLite would take it and PostgreSQL would not, after the file had been stored."""
    with pytest.raises(ModelRefused, match=r"U\+0000"):
        platform.register(onnx_models.strict_one_hot_model(), reference=reference)

    assert platform.stored() == []


def test_answers_too_large_to_be_described_are_refused_before_anything_is_stored(platform: Platform) -> None:
    """JSON has no infinity: what was stored could not be read again, and with it no list of any model's versions."""
    x = np.random.default_rng(1).normal(size=(400, 2))
    x[7, 0] = 1e160
    reference: Reference = {"x_0": x[:, 0].tolist(), "x_1": x[:, 1].tolist(), "y": x[:, 1].tolist()}

    with pytest.raises(ModelRefused, match=r"too large to be described.*baseline\.estimate\.se"):
        platform.register(
            onnx_models.double_regressor(2), reference=reference, outcome="y", task="regression"
        )

    assert platform.stored() == []
    assert platform.registry.list_versions() == []


def test_a_text_that_only_looks_like_the_escape_of_u0000_is_taken(platform: Platform) -> None:
    """A backslash is a character like any other."""
    reference: Reference = {"city": ["\\u0000"], "age": [1.0], "visits": [1], "member": [True]}

    assert platform.register(onnx_models.column_model(), reference=reference).metadata.baseline


def test_a_lone_tensor_with_its_features_in_another_order_is_another_contract(platform: Platform) -> None:
    """Income and age would change places, and every answer would be wrong without an error."""
    model = onnx_models.linear_regressor(2)
    one = {"income": FeatureRule(FLOAT), "age": FeatureRule(FLOAT)}
    platform.register(model, features=one)

    with pytest.raises(VersionConflict, match="another feature contract"):
        platform.register(model, features=dict(reversed(one.items())))

    assert platform.register(model, features=dict(one)).metadata.features == ("income", "age")


def test_columns_with_names_of_their_own_may_be_told_of_in_any_order(platform: Platform) -> None:
    """There the graph says which is which."""
    rules = {"age": FeatureRule(FLOAT, 30.0), "city": FeatureRule(STRING)}
    version = platform.register(onnx_models.column_model(), features=rules)

    again = platform.register(onnx_models.column_model(), features=dict(reversed(rules.items())))

    assert again == version


# --- activating ------------------------------------------------------------------------------------------


def test_activating_answers_the_version_as_it_is_now(platform: Platform) -> None:
    """Twice is as good as once."""
    version = platform.register(onnx_models.linear_regressor(2))

    activated = [platform.activate(), platform.activate()]

    assert activated == [msgspec.structs.replace(version, is_active=True)] * 2
    assert [entry.action for entry in platform.registry.audit()] == ["activate", "register"]


@pytest.mark.parametrize("damage", ["gone", "damaged", "no longer a model"])
def test_a_version_that_does_not_load_is_not_activated(platform: Platform, damage: str) -> None:
    """Who activates it is told at once, in the loader's words, and not the first who asks for an answer."""
    version = platform.register(onnx_models.linear_regressor(2))
    if damage == "gone":
        platform.path_of(version).unlink()
    elif damage == "damaged":
        platform.damage(version)
    else:
        platform.engines = OlderEngines()
    before = platform.registry.revision()

    with pytest.raises(ModelRefused) as caught:
        platform.activate()

    words = {"gone": "No such file", "damaged": "is damaged", "no longer a model": "opset 99"}[damage]
    assert words in caught.value.message
    can_be_repaired = damage != "no longer a model"
    assert ("register the same file again to repair it" in caught.value.message) == can_be_repaired
    assert caught.value.details["sha256"] == version.sha256
    assert platform.registry.get("risk", "1.0.0") == version
    assert platform.registry.revision() == before


class OlderEngines(OnnxEngines):
    """A runtime that does not know what the model needs, as after a downgrade."""

    def load(self, artifact: Path, metadata: Metadata, *wishes: Any, **options: Any) -> Engine:
        raise ModelRefused("opset 99 is not supported")


def test_a_version_that_is_not_registered_is_not_activated(platform: Platform) -> None:
    """The loader is not even asked."""
    platform.register(onnx_models.linear_regressor(2))
    with pytest.raises(VersionUnknown):
        platform.activate("2.0.0")


def test_a_version_that_does_not_load_can_be_taken_out_of_service(platform: Platform) -> None:
    """That is what one does with it."""
    platform.damage(platform.register(onnx_models.linear_regressor(2), activate=True))
    platform.live.refresh()

    assert not platform.registry.set_active("risk", "1.0.0", False, "ann").is_active

    platform.live.refresh()
    assert platform.live.failures() == {}


def test_one_artifact_may_serve_under_several_names(platform: Platform) -> None:
    """The same bytes under another version or model are stored once."""
    model = onnx_models.linear_regressor()
    versions = [platform.register(model), platform.register(model, "2.0.0")]
    versions.append(platform.register(model, model_id="churn"))
    assert len({version.uri for version in versions}) == 1
    assert platform.stored() == [versions[0].uri]


def test_of_many_who_register_the_same_bytes_all_succeed_and_one_adds(platform: Platform) -> None:
    """Replicas of a deployment do it at the same moment; the file must still be there afterwards."""
    path = onnx_models.write(platform.folder / "given.onnx", onnx_models.linear_regressor())
    barrier = threading.Barrier(4)
    results: list[object] = []

    def run() -> None:
        barrier.wait()
        try:
            results.append(
                register(
                    platform.registry,
                    platform.artifacts,
                    platform.engines,
                    path,
                    Registration("risk", "1.0.0"),
                    actor="ann",
                ).sha256
            )
        except Exception as exc:  # noqa: BLE001 - the test looks at it
            results.append(exc)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (version,) = platform.registry.list_versions()
    assert results == [version.sha256] * 4
    assert platform.stored() == [version.uri]
    assert len(platform.registry.audit()) == 1


def test_registering_without_a_database_is_unavailable(platform: Platform) -> None:
    """The caller may try again later; nothing was promised."""
    platform.database.close()
    (platform.folder / "phoenix.db").unlink()
    for name in ("phoenix.db-wal", "phoenix.db-shm"):
        (platform.folder / name).unlink(missing_ok=True)
    (platform.folder / "phoenix.db").mkdir()
    with pytest.raises(DatabaseUnavailable):
        platform.register(onnx_models.linear_regressor())


# --- the reference and its baseline ----------------------------------------------------------------------


def test_a_reference_becomes_the_baseline_and_the_sample(platform: Platform) -> None:
    """Its first row warms the engine up; its distribution is what drift is measured against."""
    reference: Reference = {
        "city": ["Lima", "Oslo", "Oslo", None],
        "member": [True, False, None, True],
        "visits": [3, 1, 2, 2],
        "age": [None, 20.5, math.nan, 40.0],
        "unused": [1, 2, 3, 4],
    }
    reference = {name: list(column) * 10 for name, column in reference.items()}
    version = platform.register(onnx_models.column_model(), reference=reference)
    assert version.metadata.sample == (0.0, 3, "Lima", True)
    visits = FeatureBaseline(
        0, cuts=(1.0, 2.0, 3.0), counts=(10, 20, 10, 0), mean=2.0, std=math.sqrt(0.5), low=1.0, high=3.0
    )
    baseline = version.metadata.baseline
    assert baseline is not None
    assert baseline.rows == 40
    assert baseline.features == {
        "age": FeatureBaseline(
            20, cuts=(20.5, 40.0), counts=(10, 10, 0), mean=30.25, std=9.75, low=20.5, high=40.0
        ),
        "visits": visits,
        "city": FeatureBaseline(10, levels={"Oslo": 20, "Lima": 10}),
        "member": FeatureBaseline(10, levels={"True": 20, "False": 10}),
    }
    assert baseline.score is not None
    assert (baseline.score.missing, sum(baseline.score.counts or ())) == (0, 40)
    assert platform.registry.get("risk", "1.0.0") == version


def test_real_rows_try_out_a_model_that_plain_ones_cannot(platform: Platform) -> None:
    """An encoder that refuses the empty string is registered with a reference."""
    version = platform.register(onnx_models.strict_one_hot_model(), reference={"city": ["Oslo", "Lima"]})
    assert version.metadata.sample == ("Oslo",)
    with pytest.raises(ModelRefused, match="cannot answer a sample row") as caught:
        platform.register(onnx_models.strict_one_hot_model(), "2.0.0", reference={"city": ["Paris"]})
    assert "--reference" not in caught.value.message


def judged_rows(count: int = 2000) -> tuple[dict[str, list[Any]], list[float]]:
    """Rows of one feature with outcomes of which a sigmoid is the probability of "no"; and that probability."""
    rng = np.random.default_rng(8)
    x = rng.normal(0, 2, count).astype(np.float32)
    p = 1 / (1 + np.exp(-x))
    return {"x": x.tolist(), "y": np.where(rng.random(count) < p, "no", "yes").tolist()}, p.tolist()


def test_labels_that_the_graph_does_not_name_are_learned_from_the_reference(platform: Platform) -> None:
    """Without them nobody knows which column of the probabilities is whose: the figures would be of the wrong class."""
    reference, p = judged_rows()
    version = platform.register(onnx_models.unnamed_classifier(), reference=reference, outcome="y")
    assert version.metadata.class_labels == ("yes", "no")
    baseline = version.metadata.baseline
    assert baseline is not None
    assert baseline.quality is not None
    assert baseline.calibration is not None
    assert baseline.calibration.positive == "no"
    truth = [outcome == "no" for outcome in reference["y"]]
    assert baseline.quality.auc == pytest.approx(roc_auc_score(truth, p), abs=1e-6)


@pytest.mark.parametrize("cut", [0.95, 0.0], ids=["answers contradict", "one label is never answered"])
def test_what_nobody_knows_the_class_of_is_not_measured(platform: Platform, cut: float) -> None:
    """An estimate that stands at 100 % hides everything; by confidence it is near the truth."""
    reference, _ = judged_rows()
    version = platform.register(onnx_models.unnamed_classifier(cut=cut), reference=reference, outcome="y")
    baseline = version.metadata.baseline
    assert version.metadata.class_labels == ()
    assert baseline is not None
    assert baseline.quality is not None
    assert baseline.estimate is not None
    assert (baseline.quality.auc, baseline.quality.brier, baseline.quality.log_loss) == (None, None, None)
    assert baseline.estimate.value == pytest.approx(baseline.quality.accuracy, abs=0.005)
    assert [note[:43] for note in notes_on(version.metadata)] == [
        "the graph does not name its class labels, a"
    ]


def test_numbers_that_are_guessed_as_labels_must_fit_the_answers() -> None:
    """0 and 1 are no labels of a model that answers 1 where the first probability is the greatest."""
    probabilities = [[0.1, 0.9], [0.8, 0.2], [0.5, 0.5], [math.nan, math.nan]]
    assert settle_labels(Outputs([1, 0, 1, 0], None, probabilities), (0, 1)) == (0, 1)
    assert settle_labels(Outputs([7, 3, 9, 9], None, probabilities), (0, 1)) == (3, 7)
    assert settle_labels(Outputs([True, False, True, True], None, probabilities), (0, 1)) == (0, 1)
    assert settle_labels(Outputs([0, 0], None, [[0.9, 0.1], [0.8, 0.2]]), (0, 1)) == (0, 1)
    assert settle_labels(Outputs([5, 5], None, [[0.9, 0.1], [0.8, 0.2]]), (0, 1)) == ()
    assert settle_labels(Outputs(["a", "a"], None, [[0.9, 0.1], [0.1, 0.9]]), ()) == ()


def test_who_registers_hears_of_gaps_in_what_requests_must_have(platform: Platform) -> None:
    """Rows like those of the reference would be refused; the contract to write is there to be copied."""
    reference: Reference = {
        "city": ["Oslo", None],
        "age": [1.0, None],
        "visits": [1, None],
        "member": [True, True],
    }
    version = platform.register(onnx_models.column_model(), reference=reference)
    [note] = notes_on(version.metadata)
    assert "lacks values of age, visits, city, which" in note
    contract = msgspec.json.decode(note[note.index("{") :], type=dict[str, FeatureRule])
    again = platform.register(onnx_models.column_model(), "1.1.0", reference=reference, features=contract)
    assert contract == {
        "age": FeatureRule(FLOAT, None),
        "visits": FeatureRule(INTEGER, 0),
        "city": FeatureRule(STRING, None),
    }
    assert notes_on(again.metadata) == []


@pytest.mark.parametrize("count", [1, 2, 31, 1000])
def test_cells_are_cut_at_quantiles_and_count_every_row(count: int) -> None:
    """numpy is the oracle: a cell holds what lies in (previous cut, cut]."""
    values = np.random.default_rng(count).normal(size=count).tolist()
    described = describe_reference({"x": values}, {"x": FeatureRule(FLOAT)})
    entry = described.features["x"]
    cuts = np.unique(np.quantile(values, np.arange(1, 32) / 32, method="inverted_cdf"))
    assert entry.cuts == tuple(cuts.tolist())
    edges = [-math.inf, *cuts, math.inf]
    expected = [sum(low < v <= high for v in values) for low, high in pairwise(edges)]
    assert entry.counts == tuple(expected)
    assert sum(entry.counts) == count == described.rows
    if count == 1000:
        assert set(entry.counts) <= {31, 32}


@given(
    st.lists(
        st.none() | st.just(math.nan) | st.floats(allow_nan=False, allow_infinity=False) | st.integers(-9, 9),
        min_size=1,
        max_size=120,
    )
)
def test_cells_and_missing_values_add_up_to_the_rows(column: list[float | None]) -> None:
    """Every row is counted exactly once, whatever it holds."""
    entry = describe_reference({"x": column}, {"x": FeatureRule(FLOAT)}).features["x"]
    cuts = entry.cuts or ()
    assert sum(entry.counts) + entry.missing == len(column)
    assert len(entry.counts) == len(cuts) + 1 <= 32
    assert list(cuts) == sorted(set(cuts))


@given(st.lists(st.none() | st.text(max_size=2), min_size=1, max_size=150))
def test_levels_other_and_missing_values_add_up_to_the_rows(column: list[str | None]) -> None:
    """A category keeps its most frequent levels and counts the rest; rows that chose the levels are not counted."""
    entry = describe_reference({"x": column}, {"x": FeatureRule(STRING)}).features["x"]
    often = describe_reference({"x": column * 10}, {"x": FeatureRule(STRING)}).features["x"]
    assert entry.levels is not None
    assert often.levels is not None
    assert sum(entry.levels.values()) + entry.other + entry.missing <= len(column)
    if len({value for value in column if value}) <= 50:
        assert sum(often.levels.values()) + often.missing == 10 * len(column)
    assert max(len(entry.levels), len(often.levels)) <= 50


BAD_REFERENCES: list[tuple[Reference, str]] = [
    ({"age": [1.0]}, "no column for visits, city, member; it has age"),
    ({"age": [], "visits": [], "city": [], "member": []}, "no rows"),
    ({"age": ["old"], "visits": [1], "city": ["x"], "member": [True]}, "'age' is not numeric"),
    ({"age": [[1]], "visits": [1], "city": ["x"], "member": [True]}, "age"),  # type: ignore[list-item]
    ({"age": [np.datetime64("2026-01-01")], "visits": [1], "city": ["x"], "member": [True]}, ""),  # type: ignore[list-item]
    ({"age": [math.inf], "visits": [1], "city": ["x"], "member": [True]}, "'age' holds infinite values"),
    ({"age": [1.0], "visits": [2**70], "city": ["x"], "member": [True]}, "visits"),
    ({"age": [1.0], "visits": [1.5], "city": ["x"], "member": [True]}, "visits"),
    ({"age": [1.0], "visits": [1], "city": [7], "member": [True]}, "city"),
]


@pytest.mark.parametrize(("reference", "words"), BAD_REFERENCES, ids=lambda value: str(value)[:40])
def test_a_reference_that_does_not_fit_is_refused_and_leaves_nothing_behind(
    platform: Platform, reference: Reference, words: str
) -> None:
    """Tables come from people: whatever a column holds, the answer is an error of ours that names it."""
    with pytest.raises(InvalidRequest) as caught:
        platform.register(onnx_models.column_model(), reference=reference)
    assert words in str(caught.value)
    assert platform.stored() == []
    assert platform.registry.list_versions() == []


# --- the routing table in memory -------------------------------------------------------------------------


def test_nothing_is_ready_before_the_registry_was_read(platform: Platform) -> None:
    """A process takes no requests before it knows its models; knowing that there are none is knowing."""
    ready = [platform.live.is_ready, platform.live.refresh(), platform.live.is_ready]
    assert ready == [False, True, True]
    assert platform.live.models == {}
    with pytest.raises(ModelUnknown, match="registered: none yet"):
        platform.live.model("risk")


def test_refreshing_loads_only_when_the_revision_changed(platform: Platform) -> None:
    """The poll is cheap, and what is loaded stays loaded over every other change."""
    platform.register(onnx_models.linear_regressor(2), activate=True)
    assert platform.live.refresh()
    first = platform.served()
    assert not platform.live.refresh()
    platform.register(onnx_models.linear_regressor(2, bias=9.0), "2.0.0", activate=True)
    assert platform.live.refresh()
    assert platform.served("1.0.0") is first
    assert platform.loads("1.0.0", "loaded") == 1
    assert platform.loads("2.0.0", "loaded") == 1


def test_a_registered_version_answers_only_once_it_is_active(platform: Platform) -> None:
    """The errors tell what to do."""
    platform.register(onnx_models.linear_regressor(2))
    platform.live.refresh()
    model = platform.live.model("risk")
    with pytest.raises(VersionInactive, match=r"no version of risk is active; activate one of 1\.0\.0"):
        model.pick(None, "key")
    with pytest.raises(VersionInactive, match="activate it first"):
        model.pick("1.0.0", "key")
    with pytest.raises(VersionUnknown, match=r"has no version 2\.0\.0; it has 1\.0\.0"):
        model.pick("2.0.0", "key")
    platform.registry.set_active("risk", "1.0.0", True, "ann")
    platform.live.refresh()
    served, choice = platform.live.model("risk").pick(None, "key")
    assert (choice.version, choice.strategy, choice.role) == ("1.0.0", Strategy.SINGLE, Role.CHAMPION)
    assert answer(served, 1.0, 2.0) == 0.5 - 2.0 + 0.25
    with pytest.raises(ModelUnknown, match="registered: risk"):
        platform.live.model("rsk")


def test_by_default_the_highest_stage_and_then_the_highest_version_answers(platform: Platform) -> None:
    """A new version never takes traffic from one in production merely by being activated."""
    for number in ("1.9.0", "1.10.0", "2.0.0-rc.1"):
        platform.register(onnx_models.linear_regressor(2), number, activate=True)
    platform.register(onnx_models.linear_regressor(2), "3.0.0")

    def chosen() -> str:
        platform.live.refresh()
        return platform.served().version.version

    assert chosen() == "2.0.0-rc.1"
    platform.registry.set_stage("risk", "1.9.0", Stage.STAGING, "ann")
    assert chosen() == "1.9.0"
    platform.registry.set_stage("risk", "1.10.0", Stage.STAGING, "ann")
    assert chosen() == "1.10.0"
    platform.registry.set_stage("risk", "1.9.0", Stage.PROD, "ann")
    assert chosen() == "1.9.0"
    platform.registry.set_active("risk", "1.9.0", False, "ann")
    assert chosen() == "1.10.0"


def test_a_routing_that_was_set_is_followed_and_cleared(platform: Platform) -> None:
    """Roles and probabilities go on record with each answer."""
    for number in ("1.0.0", "2.0.0"):
        platform.register(onnx_models.linear_regressor(2), number, activate=True)
    arms = (Arm("1.0.0"), Arm("2.0.0", Role.SHADOW))
    set_routing(platform.registry, "risk", Routing(Strategy.SHADOW, arms), actor="ann")
    platform.live.refresh()
    model = platform.live.model("risk")
    _, choice = model.pick(None, "key")
    assert (choice.version, choice.role, choice.probability) == ("1.0.0", Role.CHAMPION, 1.0)
    assert list(model.shadows) == ["2.0.0"]
    _, pinned = model.pick("2.0.0", "key")
    assert (pinned.strategy, pinned.version) == (Strategy.PINNED, "2.0.0")
    platform.registry.clear_routing("risk", "ann")
    platform.live.refresh()
    assert platform.served().version.version == "2.0.0"


def test_a_damaged_artifact_fails_its_version_alone(platform: Platform) -> None:
    """The other version, the other model and the default of the model go on."""
    good = platform.register(onnx_models.linear_regressor(2), "1.0.0", activate=True)
    bad = platform.register(onnx_models.linear_regressor(2, bias=3.0), "2.0.0", activate=True)
    platform.register(onnx_models.binary_classifier(2), model_id="churn", activate=True)
    platform.damage(bad)
    set_routing(platform.registry, "risk", Routing(Strategy.SINGLE, (Arm("1.0.0"),)), actor="ann")
    assert platform.live.refresh()
    assert answer(platform.served(), 1.0, 1.0) == pytest.approx(-0.25)
    assert platform.served(model_id="churn").version.model_id == "churn"
    with pytest.raises(ModelLoadFailed, match="damaged") as caught:
        platform.served("2.0.0")
    details = caught.value.details
    assert details["path"] == str(platform.path_of(bad))
    assert (details["sha256"], details["uri"]) == (bad.sha256, bad.uri)
    assert (details["model_id"], details["version"], details["framework"]) == ("risk", "2.0.0", "onnx")
    assert details["found_sha256"] != bad.sha256
    assert platform.live.failures() == {"risk 2.0.0": caught.value.message}
    assert platform.loads("2.0.0", "failed") == 1
    assert platform.path_of(good).exists()


def test_by_default_a_damaged_version_leaves_the_requests_to_one_that_loads(platform: Platform) -> None:
    """The newer version would be chosen, and every request would fail until somebody looks."""
    platform.register(onnx_models.linear_regressor(2), "1.0.0", activate=True)
    platform.damage(platform.register(onnx_models.linear_regressor(2, bias=3.0), "2.0.0", activate=True))

    platform.live.refresh()

    assert platform.served().version.version == "1.0.0"
    with pytest.raises(ModelLoadFailed):
        platform.served("2.0.0")
    assert list(platform.live.failures()) == ["risk 2.0.0"]


def test_where_no_version_loads_the_default_says_why(platform: Platform) -> None:
    """Not active would be a lie."""
    platform.damage(platform.register(onnx_models.linear_regressor(2), activate=True))

    platform.live.refresh()

    with pytest.raises(ModelLoadFailed, match="damaged"):
        platform.served()


class BusyRegistry(SqlRegistry):
    """One that changes between the reading of the versions and that of the routings."""

    def __init__(self, database: Database, change: Callable[[], None]) -> None:
        super().__init__(database)
        self.changes = [change]

    def list_versions(self, model_id: str | None = None) -> list[ModelVersion]:
        found = super().list_versions(model_id)
        while self.changes:
            self.changes.pop()()
        return found


def test_a_registry_that_changes_while_it_is_read_is_read_anew(platform: Platform) -> None:
    """A routing with a version that was not active yet when the versions were read is in no registry."""
    platform.register(onnx_models.linear_regressor(2), "1.0.0", activate=True)
    platform.register(onnx_models.linear_regressor(2, bias=3.0), "2.0.0")

    def change() -> None:
        platform.activate("2.0.0")
        set_routing(platform.registry, "risk", Routing(Strategy.SINGLE, (Arm("2.0.0"),)), actor="bob")

    live = LiveModels(
        BusyRegistry(platform.database, change),
        platform.artifacts,
        platform.engines,
        MetricsMeter(platform.metrics),
    )

    assert live.refresh()

    assert live.model("risk").pick(None, "key")[0].version.version == "2.0.0"
    assert not live.refresh()


# While a version loads


class GatedEngines(OnnxEngines):
    """An engine loader that keeps a large model's loader waiting until the test lets it go on."""

    def __init__(self) -> None:
        super().__init__()
        self.gated: set[str] = set()
        self.is_loading = threading.Event()
        self.may_go_on = threading.Event()
        self.fails = False

    def load(self, artifact: Path, metadata: Metadata, *wishes: Any, **options: Any) -> Engine:
        if artifact.name in self.gated:
            self.is_loading.set()
            assert self.may_go_on.wait(60)
            if self.fails:
                raise MemoryError
        return super().load(artifact, metadata, *wishes, **options)


@dataclass
class Slow:
    """A platform on which 2.0.0 of `risk` was activated by somebody, and is being loaded."""

    platform: Platform
    engines: GatedEngines
    live: LiveModels
    loader: threading.Thread
    failures: list[BaseException]

    def version(self, model_id: str = "risk", key: str = "key") -> str:
        return self.live.model(model_id).pick(None, key)[0].version.version

    def routing(self) -> Routing | None:
        router = self.live.model("risk").router
        return router.routing if router is not None else None

    def finish(self) -> None:
        self.engines.may_go_on.set()
        self.loader.join(60)
        assert not self.loader.is_alive()


@pytest.fixture
def slow(platform: Platform) -> Iterator[Slow]:
    platform.register(onnx_models.linear_regressor(2), "1.0.0", activate=True)
    for number in ("1.0.0", "2.0.0"):
        platform.register(onnx_models.linear_regressor(2), number, model_id="churn", activate=True)
    engines = GatedEngines()
    live = LiveModels(platform.registry, platform.artifacts, engines, MetricsMeter(platform.metrics))
    live.refresh()
    heavy = platform.register(onnx_models.linear_regressor(2, bias=9.0), "2.0.0", activate=True)
    engines.gated.add(heavy.sha256)
    live.look()
    failures: list[BaseException] = []

    def load() -> None:
        try:
            live.load()
        except MemoryError as exc:
            failures.append(exc)

    loader = threading.Thread(target=load)
    loader.start()
    assert engines.is_loading.wait(60)
    slow = Slow(platform, engines, live, loader, failures)
    yield slow
    slow.finish()


def test_what_is_loaded_answers_on_until_the_new_version_is_ready(slow: Slow) -> None:
    """Then the new one takes over in one step."""
    during = slow.version()
    slow.finish()

    assert (during, slow.version(), slow.live.is_complete) == ("1.0.0", "2.0.0", True)


def test_a_version_that_loads_does_not_delay_another_models_routing(slow: Slow) -> None:
    """The routing that takes a bad version out of the traffic must not wait for somebody's large model."""
    before = slow.version("churn")
    set_routing(slow.platform.registry, "churn", Routing(Strategy.SINGLE, (Arm("1.0.0"),)), actor="ann")

    assert slow.live.refresh("churn")

    assert (before, slow.version("churn")) == ("2.0.0", "1.0.0")
    assert slow.version() == "1.0.0"
    assert not slow.live.is_complete


def test_a_version_that_loads_does_not_delay_another_one(slow: Slow) -> None:
    """Each is put to use as soon as it is ready."""
    slow.platform.register(
        onnx_models.linear_regressor(2, bias=5.0), "3.0.0", model_id="churn", activate=True
    )

    slow.live.refresh("churn")

    assert slow.version("churn") == "3.0.0"
    assert not slow.live.is_complete


def test_a_version_that_loads_does_not_delay_its_own_models_routing_among_the_others(slow: Slow) -> None:
    """Nothing of what the routing names is missing."""
    single = Routing(Strategy.SINGLE, (Arm("1.0.0"),))
    set_routing(slow.platform.registry, "risk", single, actor="ann")

    slow.live.look()

    assert slow.routing() == single


def test_a_routing_that_names_a_version_that_loads_waits_for_it(slow: Slow) -> None:
    """Until then the old one answers: a share of the requests must not fail."""
    arms = (Arm("1.0.0"), Arm("2.0.0", Role.CHALLENGER))
    canary = Routing(Strategy.CANARY, arms)
    set_routing(slow.platform.registry, "risk", canary, actor="ann")
    slow.live.look()
    during = slow.routing()

    slow.finish()

    assert (during, slow.routing()) == (Routing(Strategy.SINGLE, (Arm("1.0.0"),)), canary)


def test_a_version_taken_out_of_service_while_it_loads_does_not_answer(slow: Slow) -> None:
    """Whoever changed their mind gets what they want, and nobody waits."""
    slow.platform.registry.set_active("risk", "2.0.0", False, "ann")
    slow.live.refresh("risk")
    slow.finish()

    assert slow.version() == "1.0.0"
    with pytest.raises(VersionInactive):
        slow.live.model("risk").pick("2.0.0", "key")


def test_a_change_returns_when_its_model_is_loaded_by_whomever(slow: Slow) -> None:
    """A version that was activated answers the caller's next request, and is loaded once."""
    seen: list[str] = []

    def change() -> None:
        slow.live.refresh("risk")
        seen.append(slow.version())

    caller = threading.Thread(target=change)
    caller.start()
    slow.finish()
    caller.join(60)

    assert seen == ["2.0.0"]
    assert slow.platform.loads("2.0.0", "loaded") == 1


def test_a_defect_while_loading_leaves_the_version_due(slow: Slow) -> None:
    """Nobody waits for ever for a thread that has ended, and the next one tries again."""
    slow.engines.fails = True
    slow.finish()
    failed = [type(exc) for exc in slow.failures], slow.version(), slow.live.is_complete
    slow.engines.fails = False

    slow.live.load()

    assert failed == ([MemoryError], "1.0.0", False)
    assert (slow.version(), slow.live.is_complete) == ("2.0.0", True)


def test_each_caller_gets_an_exception_of_its_own(platform: Platform) -> None:
    """A shared one would collect the tracebacks of all requests."""
    platform.damage(platform.register(onnx_models.linear_regressor(2), activate=True))
    platform.live.refresh()
    raised = []
    for _ in range(2):
        with pytest.raises(ModelLoadFailed) as caught:
            platform.served()
        raised.append(caught.value)
    assert raised[0] is not raised[1]
    assert raised[0].details == raised[1].details


@pytest.mark.parametrize("kind", ["gone", "damaged", "linked"])
def test_a_failed_version_heals_when_its_file_is_back(platform: Platform, kind: str) -> None:
    """It is tried again after some seconds, not at each poll."""
    model = onnx_models.linear_regressor(2)
    version = platform.register(model, activate=True)
    path = platform.path_of(version)
    path.unlink()
    if kind == "damaged":
        path.write_bytes(model[:-1])
    if kind == "linked":
        path.symlink_to(onnx_models.write(platform.folder / "elsewhere", model))
    assert platform.live.refresh()
    assert list(platform.live.failures()) == ["risk 1.0.0"]
    path.unlink(missing_ok=True)
    path.write_bytes(model)
    platform.clock.now_s += 4.9
    assert not platform.live.refresh()
    platform.clock.now_s += 0.2
    assert platform.live.refresh()
    assert platform.live.failures() == {}
    assert answer(platform.served(), 1.0, 1.0) == pytest.approx(-0.25)
    platform.clock.now_s += 100.0
    assert not platform.live.refresh()
    assert (platform.loads("1.0.0", "failed"), platform.loads("1.0.0", "loaded")) == (1, 1)


def test_registering_again_heals_a_version(platform: Platform) -> None:
    """The same bytes are a no-op for the registry and a repair for the store."""
    model = onnx_models.linear_regressor(2)
    version = platform.register(model, activate=True)
    platform.damage(version)
    platform.live.refresh()
    platform.register(model)
    platform.clock.now_s += 6.0
    platform.live.refresh()
    assert platform.live.failures() == {}


def test_a_file_damaged_under_a_loaded_version_disturbs_nobody(platform: Platform) -> None:
    """What is in memory answers on; other changes do not reload it."""
    version = platform.register(onnx_models.linear_regressor(2), activate=True)
    platform.live.refresh()
    platform.damage(version)
    platform.register(onnx_models.linear_regressor(2, bias=2.0), "0.1.0", activate=True)
    platform.live.refresh()
    assert answer(platform.served(), 1.0, 1.0) == pytest.approx(-0.25)
    assert platform.live.failures() == {}


def test_a_version_in_use_works_on_after_a_swap(platform: Platform) -> None:
    """A request in flight holds its version; the new one answers the next request."""
    platform.register(onnx_models.linear_regressor(2, bias=0.0), "1.0.0", activate=True)
    platform.live.refresh()
    held = platform.served()
    table = platform.live.models
    platform.register(onnx_models.linear_regressor(2, bias=10.0), "2.0.0", activate=True)
    platform.registry.set_active("risk", "1.0.0", False, "ann")
    platform.live.refresh()
    assert answer(platform.served(), 0.0, 0.0) == 10.0
    assert answer(held, 0.0, 0.0) == 0.0
    assert table["risk"].pick("1.0.0", "key")[0] is held
    with pytest.raises(VersionInactive):
        platform.served("1.0.0")


def test_a_version_out_of_service_is_freed_with_its_last_request(platform: Platform) -> None:
    """Models are large: an old one must not stay in memory."""
    platform.register(onnx_models.linear_regressor(2), activate=True)
    platform.live.refresh()
    held = platform.served()
    freed = weakref.ref(held)
    platform.registry.set_active("risk", "1.0.0", False, "ann")
    platform.live.refresh()
    assert freed() is held
    del held
    gc.collect()
    assert freed() is None


def test_while_the_database_is_down_the_table_stays(platform: Platform) -> None:
    """Requests never ask the registry, and a failed poll changes nothing."""
    platform.register(onnx_models.linear_regressor(2), activate=True)
    platform.live.refresh()
    before = platform.live.models
    platform.database.close()
    with closing(sqlite3.connect(platform.folder / "phoenix.db")) as connection:
        connection.execute("ALTER TABLE counters RENAME TO hidden")
    with pytest.raises(DatabaseUnavailable):
        platform.live.refresh()
    assert platform.live.models is before
    assert answer(platform.served(), 1.0, 1.0) == pytest.approx(-0.25)


def test_another_process_learns_of_a_change_by_the_revision(platform: Platform) -> None:
    """Two processes share nothing but the database and the store."""
    with (
        closing(Database(platform.url)) as database,
        MetricsWriter(platform.folder / "metrics" / "api-1.mmap") as metrics,
    ):
        other = LiveModels(
            SqlRegistry(database), platform.artifacts, platform.engines, MetricsMeter(metrics), platform.clock
        )
        other.refresh()
        platform.register(onnx_models.linear_regressor(2), activate=True)
        assert other.refresh()
        assert other.model("risk").pick(None, "key")[1].version == "1.0.0"
        assert not other.refresh()


# --- whether rows may run together -----------------------------------------------------------------------

INDEPENDENT = [
    onnx_models.linear_regressor(3),
    onnx_models.double_regressor(2),
    onnx_models.multi_output_regressor(3),
    onnx_models.binary_classifier(3),
    onnx_models.network_classifier(30),
    onnx_models.label_only_classifier(3),
    onnx_models.zipmap_classifier(("z", "m", "a")),
    onnx_models.column_model(),
    onnx_models.mixed_width_model(),
    onnx_models.bool_tensor_model(3),
    onnx_models.gather_model(4),
    onnx_models.slow_model(2, loops=2),
]
DEPENDENT = {
    "the mean of the batch is taken off": onnx_models.batch_mean_removed(2),
    "its input has room for one row": onnx_models.fixed_batch(1),
    "a reshape inside has room for one row": onnx_models.one_row_inside(2),
    "its width depends on all rows": onnx_models.positive_columns(3),
    "whatever the row, it answers alike and only one row was seen": onnx_models.string_tensor_model(2),
}


@pytest.mark.parametrize("model", INDEPENDENT)
def test_a_model_that_answers_each_row_alike_alone_and_in_a_batch_is_said_to(
    platform: Platform, model: bytes
) -> None:
    """Only of such a model may rows of several callers share a run; the verdict is kept with the version."""
    platform.register(model)
    assert platform.registry.get("risk", "1.0.0").metadata.row_independent is True


@pytest.mark.parametrize("model", DEPENDENT.values(), ids=DEPENDENT)
def test_a_model_whose_rows_are_not_seen_to_be_independent_is_never_batched(
    platform: Platform, model: bytes
) -> None:
    """Else one caller's values would change another's answer, or one caller's request would fail another's."""
    version = platform.register(model, activate=True)
    platform.live.refresh()
    served = platform.served()
    assert version.metadata.row_independent is False
    assert (served.batches, served.batch_rows_limit) == (False, 1)
    assert served.further_row_s == served.first_row_s


def test_rows_of_the_reference_show_what_plain_rows_cannot(platform: Platform) -> None:
    """An encoder refuses most made-up texts: with real ones its rows are seen to be independent."""
    reference = {"city": ["Oslo", "Lima", "Lima", "Oslo"]}
    version = platform.register(onnx_models.strict_one_hot_model(), reference=reference)
    assert version.metadata.row_independent is True


def test_the_verdict_is_the_same_each_time(platform: Platform) -> None:
    """Two installations that register the same file must not serve it differently."""
    verdicts = [
        platform.register(model, f"1.{i}.{j}").metadata.row_independent
        for i, model in enumerate([onnx_models.binary_classifier(30), onnx_models.batch_mean_removed(30)])
        for j in range(3)
    ]
    assert verdicts == [True] * 3 + [False] * 3


def test_metadata_without_a_verdict_means_no_batches() -> None:
    """A version that was registered before there was one was never checked."""
    stored = Metadata(Signature((), ()), (), {}, Task.REGRESSION, row_independent=True)
    document = msgspec.to_builtins(stored)
    del document["row_independent"]
    assert msgspec.convert(document, Metadata).row_independent is False


class Paced:
    """An engine that takes its time by a clock of the test's own: so long for a run, so long for each row."""

    placement = Placement()

    def __init__(self, run_s: float, row_s: float) -> None:
        self.run_s = run_s
        self.row_s = row_s
        self.now_s = 0.0

    def run(self, rows: Rows) -> Outputs:
        self.now_s += self.run_s + self.row_s * len(rows)
        return Outputs([0.0] * len(rows))

    def run_columns(self, columns: Mapping[str, Any], count: int) -> ColumnOutputs:
        raise NotImplementedError

    def infer(self, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> tuple[list[Tensor], Execution]:
        raise NotImplementedError

    def infer_rows(
        self, inputs: Mapping[str, Tensor], outputs: Sequence[str], count: int
    ) -> tuple[list[Tensor], Outputs]:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("run_us", "row_us", "batches", "limit"),
    [
        (4.0, 1.0, True, 64),  # a row 5 alone, 1.25 in a batch
        (4.0, 20.0, True, 24),  # 24 rows take 484, 25 would take 504
        (0.0, 30.0, False, 1),  # a batch saves nothing
        (2.0, 30.0, False, 1),  # 32 alone, 30.1 in a batch: 6 % less
        (4.0, 30.0, True, 16),  # 34 alone, 30.25 in a batch: 11 % less; 17 rows would take 514
        (900.0, 1.0, True, 64),  # no run is short enough for the loop, so nothing bounds its rows
        (300.0, 199.0, False, 1),  # one row is just short enough, two are not
    ],
)
def test_versions_batch_where_a_row_costs_clearly_less_in_a_batch(
    platform: Platform, run_us: float, row_us: float, batches: bool, limit: int
) -> None:
    """Waiting for each other must pay, and no run may hold up the event loop for long."""
    version = platform.register(onnx_models.linear_regressor(2))
    engine = Paced(run_us / 1e6, row_us / 1e6)
    served = ServedVersion(version, engine, lambda: engine.now_s)
    assert served.first_row_s * 1e6 == pytest.approx(run_us + row_us)
    assert served.further_row_s * 1e6 == pytest.approx(row_us)
    assert (served.batches, served.batch_rows_limit) == (batches, limit)


# --- where a run happens ---------------------------------------------------------------------------------


def test_a_fast_model_runs_on_the_event_loop(platform: Platform) -> None:
    """A hop to a thread and back would cost more than the run."""
    platform.register(onnx_models.linear_regressor(2), activate=True)
    platform.live.refresh()
    served = platform.served()
    assert 0 < served.first_row_s < INLINE_LIMIT_S
    assert served.further_row_s >= 0
    assert served.runs_inline(1)
    outputs = asyncio.run(served.run(Rows([[1.0, 1.0]], [served.format.pack([1.0, 1.0])])))
    assert outputs.results == [pytest.approx(-0.25)]
    assert "executor" not in vars(served)


def test_a_slow_model_runs_in_an_executor_of_its_own(platform: Platform) -> None:
    """While it computes, the event loop serves everybody else."""
    platform.register(onnx_models.slow_model(2, loops=12), activate=True)
    platform.live.refresh()
    served = platform.served()
    assert served.first_row_s > INLINE_LIMIT_S
    assert not served.runs_inline(1)
    row = [1.5, 2.0]
    rows = Rows([row] * 3, [served.format.pack(row)] * 3)
    loop_has_turned = threading.Event()
    engine_run = served.engine.run

    def run_once_the_loop_has_turned(given: Rows) -> Outputs:
        assert loop_has_turned.wait(30), "the run holds up the event loop"
        return engine_run(given)

    served.engine = cast("Engine", SimpleNamespace(run=run_once_the_loop_has_turned))

    async def run() -> list[list[Any]]:
        runs = asyncio.gather(*(served.run(rows) for _ in range(5)))
        for _ in range(5):
            await asyncio.sleep(0)
        loop_has_turned.set()
        return [outputs.results for outputs in await runs]

    assert asyncio.run(run()) == [[3.5] * 3] * 5
    served.executor.shutdown()


def test_too_many_waiting_runs_are_turned_away_at_once(platform: Platform) -> None:
    """A queue without an end answers nobody in time."""
    platform.register(onnx_models.slow_model(2, loops=12), activate=True)
    platform.live.refresh()
    served = platform.served()
    rows = Rows([[1.0, 1.0]], [served.format.pack([1.0, 1.0])])

    async def flood() -> list[object]:
        return await asyncio.gather(*(served.run(rows) for _ in range(260)), return_exceptions=True)

    answers = asyncio.run(flood())
    refused = [answer for answer in answers if isinstance(answer, Overloaded)]
    assert len(refused) == 4
    assert all(exc.details["retry_after_s"] == 1 for exc in refused)
    assert len(answers) - len(refused) == 256
    served.executor.shutdown()


def test_a_run_that_fails_in_the_executor_raises_our_error(platform: Platform) -> None:
    """Where a run happens makes no difference to its caller."""
    version = platform.register(onnx_models.gather_model(4), activate=True)
    served = ServedVersion(version, platform.engines.load(platform.path_of(version), version.metadata))
    rows = Rows([[9]], [served.format.pack([9])])
    with pytest.raises(InferenceFailed, match="idx=9"):
        asyncio.run(served.run(rows))
    served.first_row_s = 1.0
    with pytest.raises(InferenceFailed, match="idx=9"):
        asyncio.run(served.run(rows))
    served.executor.shutdown()


def test_the_journals_schema_tells_the_columns_of_every_loaded_version(platform: Platform) -> None:
    """The journal holds packed values only; equal tables have equal digests."""
    platform.register(onnx_models.linear_regressor(2), "1.0.0", activate=True)
    platform.damage(platform.register(onnx_models.column_model(), "2.0.0", activate=True))
    platform.live.refresh()
    before = platform.live.model("risk")
    assert list(msgspec.msgpack.decode(before.schema)) == ["1.0.0"]
    assert len(before.schema_digest) >= 8
    platform.registry.set_stage("risk", "1.0.0", Stage.STAGING, "ann")
    platform.live.refresh()
    assert platform.live.model("risk").schema_digest == before.schema_digest


def test_threads_that_refresh_at_once_load_each_version_once(platform: Platform) -> None:
    """A change made here and the poll may meet."""
    for number in ("1.0.0", "2.0.0"):
        platform.register(onnx_models.linear_regressor(2), number, activate=True)
    refreshed: list[bool] = []
    threads = [threading.Thread(target=lambda: refreshed.append(platform.live.refresh())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(refreshed) == [False, False, False, True]
    assert (platform.loads("1.0.0", "loaded"), platform.loads("2.0.0", "loaded")) == (1, 1)
