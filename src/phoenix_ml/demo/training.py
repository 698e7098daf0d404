"""Trains the demonstration's two credit-risk models on real applications and exports them to ONNX.

Each model carries its preprocessing inside the ONNX graph, so that a client sends what an applicant wrote,
one value per column, and scikit-learn is needed to train but never to serve. In a model's inputs a missing
number is NaN and a missing string is "".
"""

import csv
import hashlib
import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from phoenix_ml.extras import install

MODEL_NAME = "credit-risk"
OUTCOME = "status"
CLASS_LABELS = ("bad", "good")
CATEGORIES = frozenset({"home", "marital", "records", "job"})
HELD_OUT_SHARE = 0.3

# In the order of the file, which is also the order of the models' inputs.
DESCRIPTIONS = {
    "seniority": "Seniority, in years.",
    "home": "Home: owner, parents, priv, rent, other or ignore.",
    "time": "Duration of the loan asked for, in months.",
    "age": "Age of the applicant.",
    "marital": "Marital status: single, married, separated, divorced or widow.",
    "records": "Whether there is a bad credit history: yes or no.",
    "job": "Job: fixed, freelance, partime or others.",
    "expenses": "Expenses, in the data's currency units.",
    "income": "Income, in the data's currency units.",
    "assets": "Assets, in the data's currency units.",
    "debt": "Debt, in the data's currency units.",
    "amount": "Amount, in the data's currency units.",
    "price": "Price, in the data's currency units.",
}
FEATURES = tuple(DESCRIPTIONS)

# The oldest operators the two graphs need: every ONNX Runtime of the last years can run them.
_TARGET_OPSETS = {"": 18, "ai.onnx.ml": 3}


@dataclass(frozen=True)
class CreditData:
    """The applicants in the order of the file; a missing value is None."""

    ids: tuple[str, ...]
    columns: dict[str, list[float | None] | list[str | None]]
    outcomes: tuple[str, ...]
    train: tuple[int, ...]
    held_out: tuple[int, ...]


@dataclass(frozen=True)
class TrainedVersion:
    """One version of the model; its accuracy and AUC are those on the held-out applicants."""

    version: str
    title: str
    onnx_path: Path
    estimator: Any
    accuracy: float
    auc: float


@dataclass(frozen=True)
class Training:
    """What a training run left in its folder."""

    data: CreditData
    versions: tuple[TrainedVersion, ...]
    reference_path: Path
    features_path: Path
    contract_path: Path


def load_credit_data() -> CreditData:
    text = files("phoenix_ml.demo").joinpath("credit.csv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(text.splitlines()))
    ids = tuple(f"cust_{number:04d}" for number in range(1, len(rows) + 1))
    outcomes = tuple(row[OUTCOME] for row in rows)
    columns: dict[str, list[float | None] | list[str | None]] = {}
    for name in FEATURES:
        cells = [row[name] for row in rows]
        if name in CATEGORIES:
            columns[name] = [cell or None for cell in cells]
        else:
            columns[name] = [float(cell) if cell else None for cell in cells]
    held_out = _choose_held_out(ids, outcomes)
    train = tuple(index for index in range(len(rows)) if index not in held_out)
    return CreditData(ids, columns, outcomes, train, tuple(sorted(held_out)))


def _choose_held_out(ids: Sequence[str], outcomes: Sequence[str]) -> frozenset[int]:
    """Take the same share of every outcome."""
    chosen: set[int] = set()
    for outcome in CLASS_LABELS:
        members = [index for index, value in enumerate(outcomes) if value == outcome]
        # Hashes, unlike a seeded generator, give every library version the same split.
        members.sort(key=lambda index: hashlib.sha256(ids[index].encode()).digest())
        chosen.update(members[: round(len(members) * HELD_OUT_SHARE)])
    return frozenset(chosen)


def arrange_for_onnx(data: CreditData) -> dict[str, npt.NDArray[Any]]:
    """Every applicant as a model's inputs: one [N, 1] tensor per feature."""
    inputs: dict[str, npt.NDArray[Any]] = {}
    for name, values in data.columns.items():
        if name in CATEGORIES:
            cells = ["" if value is None else value for value in values]
            inputs[name] = np.array(cells, dtype=object).reshape(-1, 1)
        else:
            inputs[name] = np.array(values, dtype=np.float32).reshape(-1, 1)
    return inputs


def arrange_for_sklearn(data: CreditData) -> npt.NDArray[np.object_]:
    """Every applicant as the estimators take them: one row each, columns in the order of FEATURES.

    The numbers have passed through float32, so that both runtimes compare the same values to a threshold.
    """
    inputs = arrange_for_onnx(data)
    return np.hstack([inputs[name].astype(object) for name in FEATURES])


def _ignore(message: str) -> None:
    """The progress of a caller who wants none."""


def train(folder: Path, on_progress: Callable[[str], None] = _ignore) -> Training:
    """Train both versions and write everything that registering and serving them takes."""
    try:
        for module in ("sklearn", "skl2onnx"):
            importlib.import_module(module)
    except ModuleNotFoundError as error:
        message = f"training the demonstration models takes scikit-learn and skl2onnx: {install('convert')}"
        raise ImportError(message) from error

    folder.mkdir(parents=True, exist_ok=True)
    data = load_credit_data()
    on_progress(f"read {len(data.ids):,} credit applications, {len(data.held_out):,} of them held out")
    versions = []
    for version, title, estimator in (
        ("1.0.0", "logistic regression", _build_logistic_regression()),
        ("1.1.0", "gradient boosting", build_gradient_boosting()),
    ):
        on_progress(f"training {MODEL_NAME} {version}, {title}")
        versions.append(_train_version(folder, data, version, title, estimator))
    on_progress("writing the reference data, the features and the contract")
    return Training(
        data,
        tuple(versions),
        reference_path=_write_reference(folder / "reference.parquet", data),
        features_path=_write_features(folder / "features.parquet", data),
        contract_path=_write_contract(folder / "contract.json", data),
    )


def _build_logistic_regression() -> Any:
    from skl2onnx.sklapi import CastTransformer
    from sklearn.impute import SimpleImputer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    numbers = make_pipeline(SimpleImputer(strategy="median"), StandardScaler())
    # A float32 product depends in its last bit on how many rows share the batch. Multiplied in float64 and
    # then rounded, an applicant gets the same probability alone and in company.
    cast = CastTransformer(dtype=np.float64)
    return make_pipeline(_prepare_columns(numbers), cast, LogisticRegression(max_iter=1000))


def build_gradient_boosting() -> Any:
    # HistGradientBoostingClassifier takes NaN as it is, but skl2onnx 1.20 cannot export it with onnx 1.23.
    from sklearn.ensemble import GradientBoostingClassifier
    from sklearn.impute import SimpleImputer
    from sklearn.pipeline import make_pipeline

    # No column holds a negative number, so the trees can tell a missing one from all others.
    numbers = SimpleImputer(strategy="constant", fill_value=-1.0)
    classifier = GradientBoostingClassifier(
        n_estimators=300,
        learning_rate=0.05,
        max_depth=2,
        min_samples_leaf=10,
        subsample=0.5,
        random_state=0,
    )
    return make_pipeline(_prepare_columns(numbers), classifier)


def _prepare_columns(numbers: Any) -> Any:
    from sklearn.compose import ColumnTransformer
    from sklearn.preprocessing import OneHotEncoder

    # A category never seen in training belongs to no column of the encoding; it must not fail a request.
    categories = OneHotEncoder(handle_unknown="ignore", sparse_output=False)
    return ColumnTransformer(
        [
            ("numbers", numbers, [i for i, name in enumerate(FEATURES) if name not in CATEGORIES]),
            ("categories", categories, [i for i, name in enumerate(FEATURES) if name in CATEGORIES]),
        ]
    )


def _train_version(
    folder: Path, data: CreditData, version: str, title: str, estimator: Any
) -> TrainedVersion:
    from sklearn.metrics import accuracy_score, roc_auc_score

    table, outcomes = arrange_for_sklearn(data), np.array(data.outcomes)
    train_rows, held_out_rows = list(data.train), list(data.held_out)
    estimator.fit(table[train_rows], outcomes[train_rows])
    held_out, truth = table[held_out_rows], outcomes[held_out_rows]
    onnx_path = folder / f"{MODEL_NAME}-{version}.onnx"
    onnx_path.write_bytes(export_onnx(estimator, version))
    return TrainedVersion(
        version,
        title,
        onnx_path,
        estimator,
        accuracy=float(accuracy_score(truth, estimator.predict(held_out))),
        auc=float(roc_auc_score(truth == "good", estimator.predict_proba(held_out)[:, 1])),
    )


def export_onnx(estimator: Any, version: str) -> bytes:
    from onnx.helper import set_model_props
    from skl2onnx import convert_sklearn
    from skl2onnx.common.data_types import FloatTensorType, StringTensorType

    model = convert_sklearn(
        estimator,
        name=MODEL_NAME,
        initial_types=[
            (name, StringTensorType([None, 1]) if name in CATEGORIES else FloatTensorType([None, 1]))
            for name in FEATURES
        ],
        final_types=[
            ("label", StringTensorType([None])),
            ("probabilities", FloatTensorType([None, len(CLASS_LABELS)])),
        ],
        options={id(estimator): {"zipmap": False}},
        target_opset=_TARGET_OPSETS,
    )
    properties = {"name": MODEL_NAME, "version": version, "class_labels": json.dumps(CLASS_LABELS)}
    set_model_props(model, properties)
    # skl2onnx lists them in the order of a set, which would give equal models unequal digests now and then.
    model.opset_import.sort(key=lambda opset: opset.domain)
    return bytes(model.SerializeToString())


def _write_reference(path: Path, data: CreditData) -> Path:
    columns = _arrange_for_parquet(data) | {OUTCOME: pa.array(data.outcomes, pa.string())}
    pq.write_table(pa.table(columns).take(pa.array(data.train)), path)
    return path


def _write_features(path: Path, data: CreditData) -> Path:
    columns = {"entity_id": pa.array(data.ids, pa.string())} | _arrange_for_parquet(data)
    pq.write_table(pa.table(columns), path)
    return path


def _arrange_for_parquet(data: CreditData) -> dict[str, Any]:
    return {
        name: pa.array(values, pa.string() if name in CATEGORIES else pa.float64())
        for name, values in data.columns.items()
    }


def _write_contract(path: Path, data: CreditData) -> Path:
    contract: dict[str, dict[str, str | None]] = {}
    for name, description in DESCRIPTIONS.items():
        contract[name] = {"type": "string" if name in CATEGORIES else "float", "description": description}
        # A default of null lets a client leave the value out; what was never missing is required.
        if None in data.columns[name]:
            contract[name]["default"] = None
    path.write_text(json.dumps(contract, indent=2) + "\n", encoding="utf-8")
    return path
