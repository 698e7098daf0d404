"""Models are registered from MLflow: by alias and version from a registry, and from a folder."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightgbm
import mlflow.lightgbm
import mlflow.onnx
import mlflow.sklearn
import mlflow.xgboost
import numpy as np
import onnx
import pytest
import xgboost
import zoo
from click.testing import Result
from mlflow import MlflowClient
from onnx import TensorProto, helper, numpy_helper
from pyarrow import parquet, table
from sklearn.linear_model import LogisticRegression

pytestmark = [
    pytest.mark.system,
    # It warns of itself, of its type hints and of pickles, where a model is saved.
    pytest.mark.filterwarnings("ignore:::mlflow"),
]

Run = Callable[..., Result]
ROWS = np.random.default_rng(3).normal(size=(100, 3))
LABELS = (ROWS @ [1.0, -2.0, 0.5] > 0).astype(int)


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither the environment nor a phoenix.toml of whoever runs the tests."""
    for name in [name for name in os.environ if name.startswith(("PHOENIX_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "1000")  # so that no line is folded
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> str:
    """MLflow's registry in a file, with two versions of `credit`: the sum of three numbers weighted 1, 2, 3, which
    is champion and candidate, and that weighted 10, 20, 30.
    """
    folder = tmp_path_factory.mktemp("mlflow")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    client = MlflowClient(uri, uri)
    client.create_registered_model("credit")
    for number, weights in enumerate(([1.0, 2, 3], [10.0, 20, 30]), 1):
        saved = save_onnx(zoo.linear(folder / "linear.onnx", weights), folder / f"credit-{number}")
        client.create_model_version("credit", source=str(saved))
    client.set_registered_model_alias("credit", "champion", "1")
    client.set_registered_model_alias("credit", "candidate", "1")
    return uri


@pytest.fixture
def credit(registry: str, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    """The registry, where the environment says that it is."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry)
    mlflow.set_tracking_uri(registry)
    return MlflowClient(registry, registry)


def register(run: Run, model: str | Path, *options: str, code: int = 0) -> Result:
    return run("models", "register", model, "--id", "m", "--version", "1.0.0", *options, code=code)


def save_onnx(file: Path, folder: Path) -> Path:
    mlflow.onnx.save_model(onnx.load(file), folder, pip_requirements=[])
    return folder


def refused(done: Result) -> str:
    """The message of the refusal: one line on standard error, after the warnings."""
    lines = [line for line in done.stderr.splitlines() if not line.startswith("warning ")]
    assert len(lines) == 1, done.stderr
    found = re.fullmatch(r"error model_refused (.+)", lines[0])
    assert found is not None, lines[0]
    return found[1]


def write(rows: Any, path: str) -> None:
    """A table with the columns x_0, x_1, …, as an ONNX file names them whose only input is x."""
    parquet.write_table(table({f"x_{i}": column for i, column in enumerate(np.asarray(rows).T)}), path)


def answers_of(run: Run, rows: Any) -> list[Any]:
    write(rows, "in.parquet")
    run("predict", "m", "--input", "in.parquet", "--output", "out.parquet")
    return list(parquet.read_table("out.parquet")["_result"].to_pylist())


@pytest.mark.parametrize(
    ("uri", "answer"),
    [
        ("models:/credit@champion", 14.0),
        ("models:/credit/1", 14.0),
        ("models:/credit/2", 140.0),
        ("models:/credit/latest", 140.0),
    ],
)
def test_a_version_is_fetched_by_alias_or_number(
    run: Run, credit: MlflowClient, uri: str, answer: float
) -> None:
    """Who keeps models in MLflow promotes them there: the alias leads to the version that it names."""
    register(run, uri, "--activate")

    answered = answers_of(run, [[1.0, 2.0, 3.0]])

    assert answered == [answer]


def test_an_alias_that_moves_is_another_version_here(run: Run, credit: MlflowClient) -> None:
    """Versions are immutable: what was registered as 1.0.0 does not change with the alias."""
    register(run, "models:/credit@candidate")
    credit.set_registered_model_alias("credit", "candidate", "2")

    done = register(run, "models:/credit@candidate", code=1)

    assert "version_conflict" in done.stderr


def test_a_folder_is_taken_without_a_registry(run: Run) -> None:
    """Runs and build servers hand on folders."""
    folder = save_onnx(zoo.linear(Path("linear.onnx"), [1, 2, 3]), Path("model"))

    register(run, folder, "--activate")

    assert answers_of(run, [[1.0, 2.0, 3.0]]) == [14.0]


def test_tensors_beside_the_onnx_file_are_put_into_it(run: Run) -> None:
    """MLflow writes large tensors beside the file by default, and such a file could not be stored alone."""
    weights = np.arange(400, dtype=np.float32).reshape(400, 1)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "wide",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ("n", 400))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ("n", 1))],
        [numpy_helper.from_array(weights, "w")],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), "wide.onnx"
    )
    folder = save_onnx(Path("wide.onnx"), Path("model"))

    register(run, folder, "--activate")

    assert len(list(folder.glob("*.data"))) == 1, "what this test is about"
    assert answers_of(run, np.ones((1, 400))) == [400 * 399 / 2]


def test_tensors_that_are_not_there_are_missed(run: Run) -> None:
    """A folder may have been copied in part."""
    folder = save_onnx(zoo.linear(Path("linear.onnx"), list(map(float, range(400)))), Path("model"))
    data = list(folder.glob("*.data"))
    data[0].unlink()

    message = refused(register(run, folder, code=1))

    assert message.startswith("MLflow's model.onnx cannot be read: ")


def save_xgboost(folder: Path) -> Any:
    model = xgboost.XGBClassifier(n_estimators=5, n_jobs=1).fit(ROWS, LABELS)
    mlflow.xgboost.save_model(model, folder, pip_requirements=[])
    return model.predict(ROWS)


def save_lightgbm(folder: Path) -> Any:
    parameters = {"objective": "binary", "verbose": -1, "num_threads": 1}
    model = lightgbm.train(parameters, lightgbm.Dataset(ROWS, LABELS), 5)
    mlflow.lightgbm.save_model(model, folder, pip_requirements=[])
    return (model.predict(ROWS) > 0.5).astype(int)


def save_sklearn(folder: Path) -> Any:
    model = LogisticRegression().fit(ROWS, LABELS)
    mlflow.sklearn.save_model(model, folder, serialization_format="cloudpickle", pip_requirements=[])
    return model.predict(ROWS)


@pytest.mark.parametrize("save", [save_xgboost, save_lightgbm, save_sklearn])
def test_a_model_of_another_flavour_is_converted(run: Run, save: Callable[[Path], Any]) -> None:
    """Few people log ONNX: what MLflow has of other libraries goes the way that their files go."""
    answers = save(Path("model"))
    write(ROWS, "sample.parquet")

    register(run, Path("model"), "--sample", "sample.parquet", "--trust", "--activate")

    assert answers_of(run, ROWS) == answers.tolist()


def test_a_pickle_of_mlflow_is_not_trusted_more_than_another(run: Run) -> None:
    """Whoever can write to the registry could run code here."""
    save_sklearn(Path("model"))
    write(ROWS, "sample.parquet")

    message = refused(register(run, Path("model"), "--sample", "sample.parquet", code=1))

    assert message.startswith("model.pkl is a pickle")
    assert "--trust" in message


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("models:/credit@nobody", "alias nobody not found"),
        ("models:/credit/7", "(name=credit, version=7) not found"),
        ("models:/debit/1", "name=debit not found"),
        ("models:/credit", "'credit' not found"),
        ("models:/", "Not a proper models:/ URI"),
    ],
)
def test_what_mlflow_does_not_have_is_told_in_its_words(
    run: Run, credit: MlflowClient, uri: str, words: str
) -> None:
    """A name is misspelt more often than anything else."""
    message = refused(register(run, uri, code=1))

    assert message.startswith(f"MLflow does not give {uri}: ")
    assert words in message


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", "nonsense://x", "mysql://127.0.0.1/x"])
def test_an_mlflow_that_cannot_be_reached_is_one_line(run: Run, credit: MlflowClient, uri: str) -> None:
    """Whatever its store raises, and without minutes of trying."""
    message = refused(register(run, "models:/credit@champion", "--tracking-uri", uri, code=1))

    assert message.startswith("MLflow does not give models:/credit@champion: ")


def test_where_mlflow_is_can_be_forgotten(tmp_path: Path) -> None:
    """Without an address MLflow looks into the current folder, and finds nothing there."""
    command = [sys.executable, "-m", "phoenix_ml.cli", "models", "register", "models:/credit@champion"]

    done = subprocess.run(
        [*command, "--id", "m", "--version", "1.0.0", "--data", "data"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert done.returncode == 1
    assert "--tracking-uri or MLFLOW_TRACKING_URI say where" in done.stderr


FLAVOURS = "flavors:\n  python_function:\n    loader_module: x\n"


@pytest.mark.parametrize(
    ("mlmodel", "words"),
    [
        (FLAVOURS, "has the flavours python_function; onnx, sklearn, xgboost, lightgbm can be registered"),
        ("flavors:\n  onnx:\n    data: gone.onnx\n", "no file gone.onnx"),
        ("flavors:\n  onnx:\n    data: ../secret.onnx\n", "does not say where the onnx file is"),
        ("flavors:\n  onnx: {}\n", "does not say where the onnx file is"),
        ("flavors:\n  onnx:\n    data: MLmodel\n", "MLmodel cannot be read"),
        ("flavors:\n  sklearn:\n    pickled_model: model.skops\n", "skops files are not read"),
        ("flavors: [", "is no model of MLflow"),
        ("flavors: 1\n", "is no model of MLflow"),
        ("- 1\n", "is no model of MLflow"),
        ("", "is no model of MLflow"),
    ],
)
def test_a_folder_without_a_model_that_can_be_registered_is_refused(
    run: Run, mlmodel: str, words: str
) -> None:
    """The file MLmodel is a text that anybody can write: it may name no file outside its folder."""
    folder = Path("model")
    folder.mkdir()
    (folder / "MLmodel").write_text(mlmodel)
    (folder / "model.skops").write_text("no model")
    Path("secret.onnx").touch()

    message = refused(register(run, folder, code=1))

    assert words in message
    assert json.loads(run("models", "list", "--json").stdout) == []


def test_another_folder_is_wrong_usage(run: Run) -> None:
    """A model's folder was meant, or a file in it."""
    Path("model").mkdir()

    assert "is a folder, and has no MLmodel" in register(run, Path("model"), code=2).stderr


def without(libraries: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """`phoenix-ml ARGUMENTS` in a process where these libraries cannot be imported."""
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({libraries.split()!r})); "
        "from phoenix_ml.cli import main; main()"
    )
    command = [sys.executable, "-c", program, *map(str, arguments), "--data", "data"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("model", ["models:/credit@champion", "model"])
def test_mlflow_that_is_not_installed_is_named_with_its_extra(model: str) -> None:
    """It is an extra: who has no MLflow needs none of it."""
    save_onnx(zoo.linear(Path("linear.onnx"), [1, 2, 3]), Path("model"))

    done = without("mlflow yaml", "models", "register", model, "--id", "m", "--version", "1.0.0")

    assert done.returncode == 1
    assert "pip install mlflow-skinny" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_onnx_flavour_takes_no_library_but_mlflow(credit: MlflowClient) -> None:
    """A deployment machine has neither the training libraries nor pandas."""
    others = "pandas sklearn skl2onnx onnxmltools xgboost lightgbm joblib"

    done = without(others, "models", "register", "models:/credit@champion", "--id", "m", "--version", "1.0.0")

    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
