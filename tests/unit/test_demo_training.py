"""The demonstration's models answer from ONNX Runtime exactly what scikit-learn answers."""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pyarrow.parquet as pq
import pytest
from msgspec import convert
from sklearn.metrics import accuracy_score, brier_score_loss, log_loss, roc_auc_score

from phoenix_ml.application.catalogue import Reference, Registration, register
from phoenix_ml.demo import training
from phoenix_ml.demo.training import CATEGORIES, CLASS_LABELS, FEATURES, TrainedVersion, Training
from phoenix_ml.domain.features import FeatureRule
from phoenix_ml.infrastructure.artifacts.files import FileArtifacts
from phoenix_ml.infrastructure.engines.onnx import OnnxEngines
from phoenix_ml.infrastructure.sql.database import Database
from phoenix_ml.infrastructure.sql.registry import SqlRegistry
from phoenix_ml.infrastructure.tables import read_columns

VERSIONS = ("1.0.0", "1.1.0")
NUMBERS = tuple(name for name in FEATURES if name not in CATEGORIES)

Inputs = dict[str, npt.NDArray[Any]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Training:
    return training.train(tmp_path_factory.mktemp("demo"))


@pytest.fixture(params=VERSIONS)
def version(trained: Training, request: pytest.FixtureRequest) -> TrainedVersion:
    return next(version for version in trained.versions if version.version == request.param)


@pytest.fixture
def session(version: TrainedVersion) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(version.onnx_path, providers=["CPUExecutionProvider"])


def take_rows(inputs: Inputs, rows: slice) -> Inputs:
    return {name: values[rows] for name, values in inputs.items()}


def assert_agreement(session: onnxruntime.InferenceSession, inputs: Inputs, estimator: Any) -> None:
    labels, probabilities = session.run(["label", "probabilities"], inputs)
    table = np.hstack([inputs[name].astype(object) for name in FEATURES])
    assert labels.tolist() == estimator.predict(table).tolist()
    np.testing.assert_allclose(probabilities, estimator.predict_proba(table), rtol=0, atol=1e-5)


def test_onnx_and_sklearn_agree_on_every_applicant(
    trained: Training, version: TrainedVersion, session: onnxruntime.InferenceSession
) -> None:
    """A model that changes its answers on export is a different model from the one that was validated."""
    inputs = training.arrange_for_onnx(trained.data)

    assert len(inputs["age"]) == 4454
    assert_agreement(session, inputs, version.estimator)


def test_an_applicant_gets_the_same_answer_alone_and_in_a_batch(
    trained: Training, session: onnxruntime.InferenceSession
) -> None:
    """Serving groups requests as they come: the company a request travels in must not change its answer."""
    inputs = training.arrange_for_onnx(trained.data)
    labels, probabilities = session.run(["label", "probabilities"], inputs)

    alone = [session.run(["label", "probabilities"], take_rows(inputs, slice(i, i + 1))) for i in range(4454)]

    assert [label[0] for label, _ in alone] == labels.tolist()
    np.testing.assert_array_equal(np.vstack([row for _, row in alone]), probabilities)


@pytest.mark.parametrize("name", FEATURES)
def test_any_missing_value_is_answered_as_sklearn_does(
    trained: Training, version: TrainedVersion, session: onnxruntime.InferenceSession, name: str
) -> None:
    """Real applicants leave fields empty, also those that nobody left empty in the training data."""
    inputs = take_rows(training.arrange_for_onnx(trained.data), slice(0, 50))
    inputs[name] = np.full_like(inputs[name], "" if name in CATEGORIES else np.nan)

    assert_agreement(session, inputs, version.estimator)


def test_an_application_with_nothing_in_it_is_answered(
    version: TrainedVersion, session: onnxruntime.InferenceSession
) -> None:
    """The worst incomplete request gets a probability, not an error or NaN."""
    inputs: Inputs = {name: np.array([[""]], dtype=object) for name in CATEGORIES}
    inputs |= {name: np.array([[np.nan]], dtype=np.float32) for name in NUMBERS}

    assert_agreement(session, inputs, version.estimator)
    [probabilities] = session.run(["probabilities"], inputs)
    assert np.isfinite(probabilities).all()


@pytest.mark.parametrize("name", sorted(CATEGORIES))
def test_an_unknown_category_is_answered_as_sklearn_does(
    trained: Training, version: TrainedVersion, session: onnxruntime.InferenceSession, name: str
) -> None:
    """The world invents categories after training; one of them must not take a request down."""
    inputs = take_rows(training.arrange_for_onnx(trained.data), slice(0, 50))
    inputs[name] = np.full_like(inputs[name], "never seen before ☂")

    assert_agreement(session, inputs, version.estimator)


def test_the_graph_has_one_column_per_feature_and_two_named_outputs(
    session: onnxruntime.InferenceSession,
) -> None:
    """Clients send features by name, and the platform finds the outputs by name."""
    inputs = {node.name: (node.type, node.shape) for node in session.get_inputs()}
    outputs = {node.name: (node.type, node.shape) for node in session.get_outputs()}

    assert inputs == {
        name: ("tensor(string)" if name in CATEGORIES else "tensor(float)", [None, 1]) for name in FEATURES
    }
    assert outputs == {"label": ("tensor(string)", [None]), "probabilities": ("tensor(float)", [None, 2])}


def test_the_model_carries_its_class_labels_in_the_order_of_its_probabilities(
    version: TrainedVersion, session: onnxruntime.InferenceSession
) -> None:
    """A column of probabilities means nothing until it is known which class it is."""
    properties = session.get_modelmeta().custom_metadata_map

    assert json.loads(properties["class_labels"]) == version.estimator.classes_.tolist() == list(CLASS_LABELS)
    assert properties["version"] == version.version


def test_the_reference_says_of_both_models_what_scikit_learn_says(
    trained: Training, version: TrainedVersion, tmp_path: Path
) -> None:
    """An estimate that stands at 100 %, as that of the regression once did, will never show that a model suffers."""
    database = Database(f"sqlite:///{tmp_path / 'phoenix.db'}")
    database.upgrade()
    columns = read_columns(trained.reference_path)
    registered = register(
        SqlRegistry(database),
        FileArtifacts(tmp_path / "artifacts"),
        OnnxEngines(),
        version.onnx_path,
        Registration(training.MODEL_NAME, version.version, features=contract_of(trained)),
        actor="ann",
        reference=Reference(columns, outcome=training.OUTCOME),
    )
    database.close()
    rows = list(trained.data.train)
    table, truth = training.arrange_for_sklearn(trained.data)[rows], np.array(trained.data.outcomes)[rows]
    good = version.estimator.predict_proba(table)[:, 1]
    accuracy = accuracy_score(truth, version.estimator.predict(table))

    baseline = registered.metadata.baseline

    assert registered.metadata.class_labels == CLASS_LABELS
    assert baseline is not None
    assert baseline.quality is not None
    assert baseline.estimate is not None
    assert baseline.quality.accuracy == pytest.approx(accuracy, abs=1e-9)
    assert baseline.quality.auc == pytest.approx(roc_auc_score(truth == "good", good), abs=1e-5)
    assert baseline.quality.brier == pytest.approx(brier_score_loss(truth == "good", good), abs=1e-5)
    assert baseline.quality.log_loss == pytest.approx(log_loss(truth, good), abs=1e-5)
    assert baseline.estimate.value == pytest.approx(accuracy, abs=0.005)
    assert 0 < baseline.estimate.se < 0.02


def contract_of(trained: Training) -> dict[str, FeatureRule]:
    return convert(json.loads(trained.contract_path.read_text()), dict[str, FeatureRule])


def test_the_models_are_valid_and_small(version: TrainedVersion) -> None:
    """A demonstration uploads its models in a moment and to any ONNX tool."""
    onnx.checker.check_model(onnx.load(version.onnx_path), full_check=True)

    assert version.onnx_path.stat().st_size < 1_000_000


def test_the_models_tell_good_applicants_from_bad_ones_they_never_saw(
    trained: Training, version: TrainedVersion, session: onnxruntime.InferenceSession
) -> None:
    """Monitoring real outcomes is only worth showing on a model that has learnt something."""
    held_out = list(trained.data.held_out)
    truth = np.array(trained.data.outcomes)[held_out] == "good"
    [probabilities] = session.run(["probabilities"], training.arrange_for_onnx(trained.data))

    auc = roc_auc_score(truth, probabilities[held_out, 1])

    assert auc > 0.80
    assert auc == pytest.approx(version.auc, abs=1e-4)
    assert version.accuracy > Counter(truth.tolist())[True] / len(truth)


def test_the_split_covers_everyone_once_with_equal_shares_of_each_outcome() -> None:
    """An applicant on both sides of the split would flatter the held-out measures."""
    data = training.load_credit_data()

    bad_train = sum(data.outcomes[i] == "bad" for i in data.train) / len(data.train)
    bad_held_out = sum(data.outcomes[i] == "bad" for i in data.held_out) / len(data.held_out)

    assert sorted(data.train + data.held_out) == list(range(4454))
    assert len(data.held_out) / 4454 == pytest.approx(0.30, abs=0.001)
    assert bad_train == pytest.approx(bad_held_out, abs=0.001)


def test_the_data_are_those_the_note_describes() -> None:
    """DATA.md counts the missing values: reading the file must find the same ones."""
    data = training.load_credit_data()

    missing = {name: values.count(None) for name, values in data.columns.items() if None in values}

    assert missing == {"home": 6, "marital": 1, "job": 2, "income": 381, "assets": 47, "debt": 18}
    assert (data.ids[0], data.ids[-1]) == ("cust_0001", "cust_4454")
    assert Counter(data.outcomes) == {"good": 3200, "bad": 1254}


def test_training_again_gives_the_same_split_and_the_same_files(trained: Training, tmp_path: Path) -> None:
    """Whoever repeats the demonstration must see the numbers that were written down."""
    again = training.train(tmp_path)

    assert again.data == trained.data
    for first in trained.contract_path.parent.iterdir():
        assert (tmp_path / first.name).read_bytes() == first.read_bytes(), first.name


def test_the_contract_covers_exactly_the_inputs_and_requires_what_was_never_missing(
    trained: Training, session: onnxruntime.InferenceSession
) -> None:
    """The contract is what requests are checked against before they reach the model."""
    contract = json.loads(trained.contract_path.read_text(encoding="utf-8"))

    types = {"tensor(float)": "float", "tensor(string)": "string"}
    optional = {name for name, feature in contract.items() if feature.get("default", "required") is None}

    assert {name: feature["type"] for name, feature in contract.items()} == {
        node.name: types[node.type] for node in session.get_inputs()
    }
    assert optional == {"income", "assets", "debt", "home", "job", "marital"}
    assert all(feature["description"] for feature in contract.values())


def test_the_reference_holds_the_training_applicants_and_their_outcomes(trained: Training) -> None:
    """Drift is measured against what the model was trained on, so held-out rows have no place in it."""
    reference = pq.read_table(trained.reference_path)

    assert reference.column_names == [*FEATURES, "status"]
    for name, values in trained.data.columns.items():
        assert reference[name].to_pylist() == [values[i] for i in trained.data.train], name
    assert reference["status"].to_pylist() == [trained.data.outcomes[i] for i in trained.data.train]


def test_the_features_hold_every_applicant_under_their_identifier(trained: Training) -> None:
    """The feature store answers for an applicant by identifier, with nulls where the data have none."""
    features = pq.read_table(trained.features_path)

    assert features.column_names == ["entity_id", *FEATURES]
    assert features["entity_id"].to_pylist() == list(trained.data.ids)
    for name, values in trained.data.columns.items():
        assert features[name].to_pylist() == values, name


@pytest.mark.parametrize("missing", ["sklearn", "skl2onnx"])
def test_training_without_its_libraries_says_what_to_install(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Serving needs neither library, so their absence must surface as advice and only when training."""
    monkeypatch.setitem(sys.modules, missing, None)

    with pytest.raises(ImportError, match="pip install scikit-learn skl2onnx"):
        training.train(tmp_path)
