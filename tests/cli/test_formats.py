"""Models of other libraries are registered as ONNX, answer as before, and are refused where they would not."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import joblib
import lightgbm
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import xgboost
from click.testing import Result
from numpy.typing import NDArray
from pyarrow import parquet
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.cluster import KMeans
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import (
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    RandomForestClassifier,
)
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.svm import LinearSVC

from phoenix_ml.demo.training import CATEGORIES, load_credit_data

pytestmark = pytest.mark.system

Run = Callable[..., Result]
Columns = Mapping[str, Any]
TOLERANCE = 1e-4
REGISTER = ("--id", "m", "--version", "1.0.0")

# Numbers that float32 cannot hold, every tenth of them missing, and a category as a number.
_RANDOM = np.random.default_rng(7)
NUMBERS = _RANDOM.normal(size=(300, 3))
WHOLE = np.column_stack([NUMBERS, _RANDOM.integers(0, 6, 300)]).astype(np.float64)
HOLED = np.where(_RANDOM.random(WHOLE.shape) < 0.1, np.nan, WHOLE)
NAMES = ["amount", "income", "age", "branch"]
SIGNAL = WHOLE[:, 0] - WHOLE[:, 1] + np.isin(WHOLE[:, 3], [1, 4])
BINARY = (SIGNAL > 0).astype(int)
THREE = np.digitize(SIGNAL, [-0.7, 0.9])
MONEY = 1000 * SIGNAL


@dataclass(frozen=True)
class Case:
    """A model's file, a sample, and what the model's own library answers for it."""

    file: Path
    sample: Columns
    results: NDArray[Any]
    probabilities: NDArray[Any] | None = None


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither the environment nor a phoenix.toml of whoever runs the tests."""
    for name in [name for name in os.environ if name.startswith("PHOENIX_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "1000")  # so that no line is folded
    monkeypatch.chdir(tmp_path)


def by_column(table: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    return dict(zip(NAMES, table.T, strict=True))


def write(columns: Columns, path: Path = Path("sample.parquet")) -> Path:
    """A table as pandas writes it: where it has NaN, the file has no value."""
    pd.DataFrame(columns).to_parquet(path)
    return path


def pickled(model: Any, name: str = "model.joblib") -> Path:
    path = Path(name)
    joblib.dump(model, path)
    return path


def refused(done: Result, code: str = "model_refused") -> str:
    """The message of the refusal: one line on standard error, after the warnings."""
    lines = [line for line in done.stderr.splitlines() if not line.startswith("warning ")]
    assert len(lines) == 1, done.stderr
    found = re.fullmatch(r"error (\w+) (.+)", lines[0])
    assert found is not None, lines[0]
    assert found[1] == code
    return found[2]


def register(run: Run, file: Path, sample: Columns, *options: str, code: int = 0) -> Result:
    """Registers a model that its owner trusts, with the sample beside it."""
    trust = ["--trust"] if file.suffix in (".joblib", ".pkl") else []
    return run("models", "register", file, *REGISTER, "--sample", write(sample), *trust, *options, code=code)


def nothing_is_registered(run: Run) -> bool:
    return bool(json.loads(run("models", "list", "--json").stdout) == [])


def answers_of(run: Run, sample: Columns) -> pa.Table:
    """What the version answers when it is served: a file's rows are answered as requests."""
    run("predict", "m", "--input", write(sample, Path("in.parquet")), "--output", "out.parquet")
    return parquet.read_table("out.parquet")


# Originals, and their own answers.


def classifier(model: Any, table: Any, sample: Columns, name: str = "model.joblib") -> Case:
    return Case(pickled(model, name), sample, model.predict(table), model.predict_proba(table))


def sklearn_logistic_regression() -> Case:
    labels = np.array(["bad", "good"])[BINARY]
    return classifier(LogisticRegression().fit(WHOLE, labels), WHOLE, by_column(WHOLE))


def sklearn_forest_of_three_classes() -> Case:
    model = RandomForestClassifier(10, random_state=0).fit(WHOLE, THREE)
    return classifier(model, WHOLE, by_column(WHOLE), "model.pkl")


def sklearn_histogram_boosting_with_missing_values() -> Case:
    frame = pd.DataFrame(by_column(HOLED))
    model = HistGradientBoostingClassifier(max_iter=20, random_state=0).fit(frame, BINARY)
    return classifier(model, frame, frame)


def sklearn_histogram_boosting_regressor() -> Case:
    model = HistGradientBoostingRegressor(max_iter=20, random_state=0).fit(HOLED, MONEY)
    return Case(pickled(model), by_column(HOLED), model.predict(HOLED))


def sklearn_linear_regression() -> Case:
    model = make_pipeline(StandardScaler(), Ridge()).fit(WHOLE, MONEY)
    return Case(pickled(model), by_column(WHOLE), model.predict(WHOLE))


def sklearn_without_probabilities() -> Case:
    model = LinearSVC(random_state=0).fit(WHOLE, THREE)
    return Case(pickled(model), by_column(WHOLE), model.predict(WHOLE))


def credit_pipeline(classify: Any) -> Case:
    """Real applicants: categories, missing numbers, and whole numbers as integers beside them."""
    data = load_credit_data()
    chosen = list(range(0, 4454, 4))
    frame = pd.DataFrame(
        {
            name: ["" if value is None else value for value in column] if name in CATEGORIES else column
            for name, column in data.columns.items()
        }
    ).iloc[chosen]
    frame["age"] = frame["age"].astype(int)
    numbers = [name for name in frame if name not in CATEGORIES]
    prepare = ColumnTransformer(
        [
            ("numbers", make_pipeline(SimpleImputer(strategy="median"), StandardScaler()), numbers),
            ("categories", OneHotEncoder(handle_unknown="ignore", sparse_output=False), sorted(CATEGORIES)),
        ]
    )
    outcomes = np.array(data.outcomes)[chosen]
    return classifier(make_pipeline(prepare, classify).fit(frame, outcomes), frame, frame)


def sklearn_pipeline_over_categories() -> Case:
    return credit_pipeline(LogisticRegression(max_iter=500))


def sklearn_pipeline_with_scaled_trees() -> Case:
    return credit_pipeline(HistGradientBoostingClassifier(max_iter=30, random_state=0))


def sklearn_pipeline_with_lightgbm() -> Case:
    return credit_pipeline(lightgbm.LGBMClassifier(n_estimators=10, verbose=-1, n_jobs=1))


def xgboost_booster(objective: str, target: Any, suffix: str = "json", **parameters: int) -> Case:
    rows = xgboost.DMatrix(HOLED, target, feature_names=NAMES)
    booster = xgboost.train({"objective": objective, "max_depth": 3, "nthread": 1} | parameters, rows, 8)
    file = Path(f"model.{suffix}")
    booster.save_model(file)
    answers = booster.predict(rows)
    if objective == "binary:logistic":
        return Case(file, by_column(HOLED), answers > 0.5, np.column_stack([1 - answers, answers]))
    if objective == "multi:softprob":
        return Case(file, by_column(HOLED), answers.argmax(axis=1), answers)
    return Case(file, by_column(HOLED), answers)


def xgboost_binary_json() -> Case:
    return xgboost_booster("binary:logistic", BINARY)


def xgboost_three_classes_ubj() -> Case:
    return xgboost_booster("multi:softprob", THREE, "ubj", num_class=3)


def xgboost_labels_alone() -> Case:
    return xgboost_booster("multi:softmax", THREE, num_class=3)


def xgboost_regression() -> Case:
    return xgboost_booster("reg:squarederror", MONEY)


def xgboost_counts() -> Case:
    return xgboost_booster("count:poisson", np.abs(MONEY).round())


def xgboost_estimator_pickled() -> Case:
    frame = pd.DataFrame(by_column(HOLED))
    model = xgboost.XGBClassifier(n_estimators=8, n_jobs=1).fit(frame, BINARY)
    return classifier(model, frame, frame)


def xgboost_booster_pickled() -> Case:
    case = xgboost_booster("binary:logistic", BINARY)
    return Case(pickled(xgboost.Booster(model_file=case.file)), case.sample, case.results, case.probabilities)


def lightgbm_booster(objective: str, target: Any, **parameters: Any) -> Case:
    # Small groups, so that the category is split by sets of its values.
    small = {"min_data_in_leaf": 5, "min_data_per_group": 1, "max_cat_to_onehot": 1, "cat_smooth": 0}
    rows = lightgbm.Dataset(HOLED, target, feature_name=NAMES, categorical_feature=["branch"])
    booster = lightgbm.train(
        {"objective": objective, "verbose": -1, "num_threads": 1} | small | parameters, rows, 8
    )
    file = Path("model.txt")
    booster.save_model(file)
    answers = booster.predict(HOLED)
    if objective == "binary":
        return Case(file, by_column(HOLED), answers > 0.5, np.column_stack([1 - answers, answers]))
    if objective == "multiclass":
        return Case(file, by_column(HOLED), answers.argmax(axis=1), answers)
    return Case(file, by_column(HOLED), answers)


def lightgbm_binary_with_categories() -> Case:
    return lightgbm_booster("binary", BINARY)


def lightgbm_three_classes() -> Case:
    return lightgbm_booster("multiclass", THREE, num_class=3)


def lightgbm_regression() -> Case:
    return lightgbm_booster("regression", MONEY)


def lightgbm_estimator_pickled() -> Case:
    frame = pd.DataFrame(by_column(HOLED))
    model = lightgbm.LGBMClassifier(n_estimators=8, verbose=-1, n_jobs=1)
    model.fit(frame, np.array(["no", "yes"])[BINARY])
    return classifier(model, frame, frame, "model.pkl")


ORIGINALS = [
    sklearn_logistic_regression,
    sklearn_forest_of_three_classes,
    sklearn_histogram_boosting_with_missing_values,
    sklearn_histogram_boosting_regressor,
    sklearn_linear_regression,
    sklearn_without_probabilities,
    sklearn_pipeline_over_categories,
    sklearn_pipeline_with_scaled_trees,
    sklearn_pipeline_with_lightgbm,
    xgboost_binary_json,
    xgboost_three_classes_ubj,
    xgboost_labels_alone,
    xgboost_regression,
    xgboost_counts,
    xgboost_estimator_pickled,
    xgboost_booster_pickled,
    lightgbm_binary_with_categories,
    lightgbm_three_classes,
    lightgbm_regression,
    lightgbm_estimator_pickled,
]


@pytest.mark.parametrize("make", ORIGINALS, ids=lambda make: make.__name__)
def test_the_registered_version_answers_as_the_original(run: Run, make: Callable[[], Case]) -> None:
    """A model that changes its answers on the way in is another one than the one that was validated."""
    case = make()

    shown = json.loads(register(run, case.file, case.sample, "--activate", "--json").stdout)
    answered = answers_of(run, case.sample)

    assert shown["conversion"]["rows"] == len(case.results)
    assert shown["conversion"]["max_difference"] <= TOLERANCE
    assert shown["conversion"]["rounded_rows"] == 0
    assert list(shown["features"]) == list(case.sample)
    if case.probabilities is None and shown["task"] == "regression":
        spread = np.abs(case.results).mean()
        np.testing.assert_allclose(answered["_result"], case.results, rtol=TOLERANCE, atol=TOLERANCE * spread)
        return
    assert answered["_result"].to_pylist() == case.results.tolist()
    if case.probabilities is not None:
        columns = [answered[name] for name in answered.column_names if name.startswith("_probability_")]
        np.testing.assert_allclose(np.column_stack(columns), case.probabilities, rtol=0, atol=TOLERANCE)


def test_the_terminal_says_what_was_compared(run: Run) -> None:
    """Who registers a model sees how sure they can be, and that a pickle ran code."""
    case = sklearn_logistic_regression()

    done = register(run, case.file, case.sample)

    assert done.stderr == "warning model.joblib is a pickle: opening it runs whatever code it holds, as you\n"
    assert re.search(
        r"converted from scikit-learn \S+: 300 rows answered as before, largest difference \S+, 0 labels differ",
        done.stdout,
    )


def test_the_same_model_becomes_the_same_file(run: Run) -> None:
    """A deployment script that runs twice must not fail the second time."""
    case = lightgbm_binary_with_categories()

    first, again = (json.loads(register(run, case.file, case.sample, "--json").stdout) for _ in range(2))

    assert again == first


def test_the_contract_says_what_the_sample_shows(run: Run) -> None:
    """Types, and which features may be missing, are seen; who wants it otherwise gives a contract."""
    case = sklearn_pipeline_over_categories()
    Path("contract.json").write_text('{"job": {"type": "string", "default": "others"}}')

    done = register(run, case.file, case.sample, "--features", "contract.json", "--json")

    shown = json.loads(done.stdout)["features"]

    assert shown["age"]["type"] == "integer"
    assert "default" not in shown["age"]
    assert shown["income"]["type"] == "float"
    assert shown["income"]["default"] is None
    assert shown["home"]["type"] == "string"
    assert shown["job"]["default"] == "others"


def test_the_reference_is_the_sample_where_none_is_given(run: Run) -> None:
    """Training rows are at hand, with their outcome, and serve for both."""
    case = lightgbm_binary_with_categories()
    reference = write({**case.sample, "outcome": BINARY, "note": "no feature"})

    done = run(
        "models", "register", case.file, *REGISTER, "--reference", reference, "--outcome", "outcome", "--json"
    )

    shown = json.loads(done.stdout)

    assert shown["conversion"]["rows"] == 300
    assert shown["has_baseline"]
    assert list(shown["features"]) == NAMES


def test_a_model_without_names_gets_those_of_its_contract(run: Run) -> None:
    """A model trained on an array knows no names: the contract says which columns, in which order."""
    model = LogisticRegression().fit(WHOLE[:, :2], BINARY)
    Path("contract.json").write_text('{"amount": {"type": "float"}, "income": {"type": "float"}}')
    sample = {"income": WHOLE[:, 1], "note": "x", "amount": WHOLE[:, 0]}
    register(run, pickled(model), sample, "--features", "contract.json", "--activate")

    answered = answers_of(run, {"income": WHOLE[:, 1], "amount": WHOLE[:, 0]})

    assert answered["_result"].to_pylist() == model.predict(WHOLE[:, :2]).tolist()


# Pickles.


class Intruder:
    """A pickle that makes a folder when it is opened."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


class Bomb:
    """A pickle that raises when it is opened."""

    def __reduce__(self) -> Any:
        return int, ("not a number",)


@pytest.mark.parametrize("name", ["model.pkl", "model.joblib", "model.pickle", "MODEL.PKL"])
def test_a_pickle_is_not_opened_unless_it_is_trusted(run: Run, tmp_path: Path, name: str) -> None:
    """Opening a pickle is running a program: it takes somebody who vouches for it."""
    target = tmp_path / "made-by-the-pickle"
    Path(name).write_bytes(pickle.dumps(Intruder(target)))
    register = ["models", "register", name, *REGISTER, "--sample", write(by_column(WHOLE))]

    message = refused(run(*register, code=1))
    was_opened = target.exists()
    trusted = refused(run(*register, "--trust", code=1))

    assert message.startswith(f"{name} is a pickle: opening it runs whatever code it holds")
    assert "--trust" in message
    assert not was_opened
    # So that it is a pickle that would have done it.
    assert target.exists()
    assert trusted == "NoneType is neither a classifier nor a regressor"
    assert nothing_is_registered(run)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (pickle.dumps(Bomb()), "ValueError: invalid literal"),
        (b"", "EOFError"),
        (b"no pickle", "cannot be opened"),
        (pickle.dumps(LogisticRegression().fit(WHOLE, BINARY))[:-100], "cannot be opened"),
        (b"cno_such_library\nModel\n.", "pip install no_such_library"),
        (pickle.dumps({"weights": [1, 2]}), "dict is neither a classifier nor a regressor"),
        (pickle.dumps(KMeans(2)), "KMeans is neither a classifier nor a regressor"),
        (pickle.dumps(LogisticRegression()), "LogisticRegression is not fitted"),
    ],
    ids=["raises", "empty", "no pickle", "cut", "library gone", "a dict", "clusters", "unfitted"],
)
def test_a_pickle_that_holds_no_model_is_refused(run: Run, content: bytes, words: str) -> None:
    """Whatever it raises is one line, not a traceback."""
    Path("model.pkl").write_bytes(content)

    message = refused(register(run, Path("model.pkl"), by_column(WHOLE), code=1))

    assert words in message
    assert nothing_is_registered(run)


# What is not as before.


def test_a_model_beyond_the_tolerance_is_refused(run: Run) -> None:
    """Float32 answers are not float64 answers to the last bit: a tolerance of 0 must say so."""
    case = sklearn_logistic_regression()

    message = refused(register(run, case.file, case.sample, "--tolerance", "0", code=1))

    assert re.search(
        r"in row \d+ of the sample the probability of '(bad|good)' \S+ became \S+ \(difference \S+, tolerance 0\)",
        message,
    )
    assert "0 of 300 labels differ; nothing was registered" in message
    assert nothing_is_registered(run)


def test_a_conversion_that_goes_wrong_is_refused(run: Run) -> None:
    """Converters know no linear trees, and say nothing of it: only the comparison tells."""
    case = lightgbm_booster("regression", MONEY, linear_tree=True)

    message = refused(register(run, case.file, case.sample, code=1))

    assert re.search(r"in row \d+ of the sample the value \S+ became \S+ \(relative difference", message)
    assert nothing_is_registered(run)


def test_a_column_that_float32_cannot_hold_is_named(run: Run) -> None:
    """Seconds since 1970 are all the same in float32: the model would be asked about another time."""
    seconds = 1.7e9 + np.arange(300.0)
    model = HistGradientBoostingClassifier(max_iter=20).fit(seconds[:, None], np.arange(300) % 97 > 40)

    message = refused(register(run, pickled(model), {"asked_at": seconds}, code=1))

    assert message.endswith("It takes numbers as float32, which cannot tell all values of asked_at apart")
    assert nothing_is_registered(run)


def few_on_a_threshold(count: int) -> tuple[Any, Columns]:
    """A tree that divides at 0.5 to the bit, and rows of which so many are just above it."""
    x = np.array([0.0, 1.0] * 100)
    model = lightgbm.train(
        {"objective": "binary", "verbose": -1, "num_threads": 1, "min_data_in_leaf": 1},
        lightgbm.Dataset(x[:, None], x, feature_name=["x"]),
        2,
    )
    threshold = model.trees_to_dataframe()["threshold"].dropna().iloc[0]
    x[:count] = np.nextafter(threshold, 1.0)
    return model, {"x": x}


def test_a_row_beside_a_threshold_is_told_and_many_are_refused(run: Run) -> None:
    """A number that float32 takes across a threshold is nobody's fault; many of them are another model."""
    model, few = few_on_a_threshold(2)
    model.save_model("model.txt")
    _, many = few_on_a_threshold(3)

    message = refused(register(run, Path("model.txt"), many, code=1))
    told = register(run, Path("model.txt"), few, "--json")

    assert json.loads(told.stdout)["conversion"]["rounded_rows"] == 2
    assert told.stderr.startswith(
        "warning 2 of 200 rows are answered as the original answers their numbers rounded"
    )
    assert message.startswith("3 of 200 rows are answered as the original answers their numbers rounded")


def test_missing_texts_that_the_model_tells_from_empty_ones_are_refused(run: Run) -> None:
    """ONNX has no missing text: a model that learned from them would be asked about empty ones."""
    cities = np.array(["Oslo", "Lima", None] * 100, dtype=object)
    frame = pd.DataFrame({"city": cities})
    encode = OneHotEncoder(handle_unknown="ignore", sparse_output=False)
    model = make_pipeline(encode, LogisticRegression()).fit(frame, [0, 1, 1] * 100)

    message = refused(register(run, pickled(model), frame, code=1))

    assert message.endswith('train the model with "" for them')


# What cannot be converted.


class Doubled(TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """A transformer of one's own."""

    def fit(self, table: Any, target: Any = None) -> Doubled:
        self.fitted_ = True
        return self

    def transform(self, table: Any) -> Any:
        return np.asarray(table) * 2


def test_a_transformer_of_ones_own_cannot_be_converted(run: Run) -> None:
    """Nobody but its author knows it in ONNX; the converter's words say which it is."""
    model = make_pipeline(Doubled(), LogisticRegression()).fit(WHOLE, BINARY)

    message = refused(register(run, pickled(model), by_column(WHOLE), code=1))

    assert "the model cannot be converted to ONNX" in message
    assert "Doubled" in message
    assert nothing_is_registered(run)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("model.json", "{}", "model.json is no model of XGBoost"),
        ("model.json", '{"income": {"type": "float"}}', "model.json is no model of XGBoost"),
        ("model.json", "", "model.json is no model of XGBoost"),
        ("model.ubj", "not a model", "model.ubj is no model of XGBoost"),
        ("model.txt", "", "model.txt is no model of LightGBM"),
        ("model.txt", "notes on the model\n", "model.txt is no model of LightGBM"),
        # LightGBM itself would end the process here.
        ("model.txt", "tree\nversion=v4\nnum_class=1\n", "model.txt is no model of LightGBM"),
        ("model.txt", "tree\nversion=v4\n\nend of trees\n", "model.txt is no model of LightGBM"),
    ],
)
def test_a_file_of_another_kind_is_refused_by_its_library(
    run: Run, name: str, content: str, words: str
) -> None:
    """Endings are all that a file's name tells: many files end in .json and .txt."""
    Path(name).write_text(content)

    message = refused(register(run, Path(name), by_column(WHOLE), code=1))

    assert message.startswith(words)
    assert nothing_is_registered(run)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_half_a_model_of_lightgbm_is_refused(run: Run, share: float) -> None:
    """LightGBM ends the process at a file that was cut, with no word of ours."""
    case = lightgbm_binary_with_categories()
    text = case.file.read_text()
    case.file.write_text(text[: int(len(text) * share * 0.9)])

    message = refused(register(run, case.file, case.sample, code=1))

    assert "not a whole one" in message


def test_categories_of_pandas_are_refused(run: Run) -> None:
    """The booster knows their codes, which only pandas can tell: it would take a value for a code."""
    frame = pd.DataFrame(by_column(WHOLE))
    frame["branch"] = (frame["branch"] * 10).astype(int).astype("category")
    rows = lightgbm.Dataset(frame, BINARY)
    lightgbm.train({"objective": "binary", "verbose": -1, "num_threads": 1}, rows, 3).save_model("model.txt")

    message = refused(register(run, Path("model.txt"), by_column(WHOLE), code=1))

    assert "pandas' categories" in message


@pytest.mark.filterwarnings("ignore:.*booster=:UserWarning")
@pytest.mark.parametrize("parameters", [{"booster": "gblinear"}, {"booster": "dart", "rate_drop": 0.5}])
def test_boosters_that_are_no_plain_trees_are_refused(run: Run, parameters: dict[str, Any]) -> None:
    """The converter knows neither linear models nor the weights of dropped trees."""
    rows = xgboost.DMatrix(HOLED, BINARY, feature_names=NAMES)
    booster = xgboost.train({"objective": "binary:logistic", "nthread": 1} | parameters, rows, 8)
    booster.save_model("model.json")

    message = refused(register(run, Path("model.json"), by_column(HOLED), code=1))

    # XGBoost 3.4 no longer says that trees are dropped: then the comparison tells.
    assert "cannot be converted to ONNX" in message or "does not answer as the original" in message
    assert nothing_is_registered(run)


# Samples.


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"amount": [1.0], "income": [1.0], "age": [1.0]}, "the sample has no column branch"),
        (dict.fromkeys(NAMES, np.empty(0)), "the sample has no rows"),
        (by_column(WHOLE) | {"age": pd.Timestamp("2026-01-01")}, "column 'age' of the sample holds datetime"),
    ],
    ids=["lacks a column", "no rows", "a date"],
)
def test_a_sample_that_is_not_the_models_is_refused(run: Run, columns: Columns, words: str) -> None:
    """What was not asked was not compared."""
    case = lightgbm_binary_with_categories()

    message = refused(register(run, case.file, columns, code=1), "invalid_field")

    assert message.startswith(words)
    assert nothing_is_registered(run)


def test_a_sample_of_another_width_is_refused(run: Run) -> None:
    """A model without names takes columns by their place: one too many, and all of them are wrong."""
    case = sklearn_logistic_regression()
    sample = {**case.sample, "outcome": BINARY}

    message = refused(register(run, case.file, sample, code=1), "invalid_field")
    register(run, case.file, sample, "--outcome", "outcome")

    assert message.startswith(
        "the model takes 4 features, the sample has 5 columns: amount, income, age, branch, outcome"
    )


def test_texts_for_a_model_that_takes_numbers_are_refused(run: Run) -> None:
    """In the library's own words, which name the text."""
    case = sklearn_logistic_regression()
    sample = write({**case.sample, "branch": "north"})

    message = refused(run("models", "register", case.file, *REGISTER, "--sample", sample, "--trust", code=1))

    assert "could not convert string to float: 'north'" in message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "give --sample, with rows that it must answer as before"),
        (["--sample", "sample.parquet", "--task", "regression"], "--task is for ONNX files"),
        (["--sample", "sample.parquet", "--tolerance", "-1"], "--tolerance"),
        (["--outcome", "status"], "--time and --outcome name columns of --reference or --sample"),
    ],
    ids=["no sample", "a task", "negative", "outcome of nothing"],
)
def test_options_that_do_not_fit_are_wrong_usage(run: Run, options: list[str], words: str) -> None:
    """Nothing is opened, and a script sees that it is written wrongly."""
    Path("model.txt").write_text("tree\n")
    write(by_column(WHOLE))

    done = run("models", "register", "model.txt", *REGISTER, *options, code=2)

    assert words in done.stderr


def test_a_sample_beside_an_onnx_file_is_wrong_usage(run: Run) -> None:
    """There is no original to compare with: to take it silently would claim a proof that was not made."""
    Path("model.onnx").write_bytes(b"")

    done = run("models", "register", "model.onnx", *REGISTER, "--sample", write(by_column(WHOLE)), code=2)

    assert "model.onnx is taken as ONNX" in done.stderr


# What is not installed.


def without(libraries: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """`phoenix-ml ARGUMENTS` in a process where these libraries cannot be imported."""
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({libraries.split()!r})); "
        "from phoenix_ml.cli import main; main()"
    )
    command = [sys.executable, "-c", program, *map(str, arguments), "--data", "data"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    ("make", "library", "advice"),
    [
        (sklearn_logistic_regression, "sklearn", "pip install scikit-learn skl2onnx onnxmltools"),
        (sklearn_logistic_regression, "skl2onnx", "pip install scikit-learn skl2onnx onnxmltools"),
        (lightgbm_binary_with_categories, "onnxmltools", "pip install scikit-learn skl2onnx onnxmltools"),
        (lightgbm_binary_with_categories, "lightgbm", "pip install lightgbm"),
        (xgboost_binary_json, "xgboost", "pip install xgboost"),
        (xgboost_estimator_pickled, "xgboost", "pip install xgboost"),
        (sklearn_pipeline_over_categories, "pandas", "pip install pandas"),
    ],
    ids=["sklearn", "skl2onnx", "onnxmltools", "lightgbm", "xgboost", "xgboost in a pickle", "pandas"],
)
def test_a_library_that_is_missing_is_named_with_what_installs_it(
    make: Callable[[], Case], library: str, advice: str
) -> None:
    """None of them is needed to serve, so none of them may be there."""
    case = make()
    trust = ["--trust"] if case.file.suffix == ".joblib" else []

    done = without(
        library, "models", "register", case.file, *REGISTER, "--sample", write(case.sample), *trust
    )

    assert done.returncode == 1
    assert advice in done.stderr
    assert "Traceback" not in done.stderr


def test_the_libraries_are_needed_for_conversions_alone() -> None:
    """ONNX files are registered, and help is given, where nothing but the package is installed."""
    optional = "sklearn skl2onnx onnxmltools xgboost lightgbm pandas mlflow joblib"
    Path("model.onnx").write_bytes(b"not a model")

    helped = without(optional, "models", "register", "--help")
    registered = without(optional, "models", "register", "model.onnx", *REGISTER)

    assert helped.returncode == 0
    assert "the file is not an ONNX model" in registered.stderr
