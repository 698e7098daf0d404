"""The demonstration, as a newcomer runs it, and the same models held against scikit-learn."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from msgspec import convert
from phoenix_server import PhoenixServer
from pyarrow import parquet
from servers import free_port, wait_until

from phoenix_ml.demo.training import CLASS_LABELS, Training, arrange_for_sklearn, train
from phoenix_ml.domain.features import FeatureRule

pytestmark = [pytest.mark.system]
MODEL = "credit-risk"


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Training:
    return train(tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="module")
def server(training: Training, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PhoenixServer]:
    """Both versions active, the features of all applicants loaded by the command line."""
    server = PhoenixServer(tmp_path_factory.mktemp("server"))
    contract = convert(json.loads(training.contract_path.read_text()), dict[str, FeatureRule])
    for trained in training.versions:
        server.register(trained.onnx_path, MODEL, trained.version, contract=contract)
    loaded = server.command("features", "load", str(training.features_path), "--entity", "entity_id")
    assert loaded.returncode == 0, loaded.stderr
    with server:
        yield server


@pytest.mark.parametrize("version", ["1.0.0", "1.1.0"])
def test_every_applicant_gets_the_answer_that_scikit_learn_gives(
    server: PhoenixServer, training: Training, version: str
) -> None:
    """The whole road, store and graph included, must not change what the data scientist trained."""
    estimator = next(trained.estimator for trained in training.versions if trained.version == version)
    arranged = arrange_for_sklearn(training.data)
    expected_labels = estimator.predict(arranged).tolist()
    expected_probabilities = estimator.predict_proba(arranged)

    answers: list[dict[str, Any]] = []
    for start in range(0, len(training.data.ids), 500):
        instances = [{"entity_id": entity_id} for entity_id in training.data.ids[start : start + 500]]
        body = {"model_id": MODEL, "model_version": version, "instances": instances}
        response = httpx.post(f"{server.url}/predict/batch", json=body, timeout=60)
        answers += response.json()["predictions"]

    assert len(answers) == 4454
    assert [answer["result"] for answer in answers] == expected_labels
    probabilities = np.array([answer["probabilities"] for answer in answers])
    assert np.abs(probabilities - expected_probabilities).max() < 1e-5
    confidences = np.array([answer["confidence"] for answer in answers])
    columns = [CLASS_LABELS.index(label) for label in expected_labels]
    assert np.abs(confidences - expected_probabilities[np.arange(4454), columns]).max() < 1e-5


@pytest.mark.parametrize("version", ["1.0.0", "1.1.0"])
def test_every_applicant_of_a_file_gets_the_answer_that_scikit_learn_gives(
    server: PhoenixServer, training: Training, tmp_path: Path, version: str
) -> None:
    """A file takes another road than a request, by columns, and must lead to the same answers."""
    estimator = next(trained.estimator for trained in training.versions if trained.version == version)
    expected = estimator.predict_proba(arrange_for_sklearn(training.data))
    scored = tmp_path / "scored.parquet"
    files = ["--input", str(training.features_path), "--output", str(scored)]

    done = server.command("predict", MODEL, "--version", version, *files)

    assert done.returncode == 0, done.stderr
    table = parquet.read_table(scored)
    assert table["entity_id"].to_pylist() == list(training.data.ids)
    assert table["_result"].to_pylist() == [CLASS_LABELS[i] for i in expected.argmax(axis=1)]
    assert np.abs(table["_confidence"].to_numpy() - expected.max(axis=1)).max() < 1e-5


def test_missing_values_are_named_as_such(server: PhoenixServer, training: Training) -> None:
    """An applicant without an income is not one who earns nothing, and the answer says so."""
    row = training.data.columns["income"].index(None)

    body = {"model_id": MODEL, "entity_id": training.data.ids[row]}
    answer = httpx.post(f"{server.url}/predict", json=body).json()

    assert answer["feature_sources"]["income"] == "missing"
    assert answer["feature_sources"]["age"] == "store"


def test_demo_trains_serves_replays_and_reports_from_the_log(tmp_path: Path) -> None:
    """It is the first thing that a newcomer runs: it must end well and show what it promises."""
    command = [sys.executable, "-m", "phoenix_ml.cli", "demo", "--exit", "--data", str(tmp_path / "demo")]

    ended = subprocess.run(
        [*command, "--port", str(free_port())], capture_output=True, text=True, timeout=150, check=False
    )

    assert ended.returncode == 0, ended.stderr
    shown = " ".join(ended.stdout.split())
    assert "1336/1336" in shown
    assert "1,336 answers" in shown
    assert "accuracy AUC" in shown
    assert "Where to look next" in shown
    assert "/docs" not in shown  # nobody serves there any more
    [listed] = [line for line in ended.stdout.splitlines() if "models list --data" in line]
    again = subprocess.run(listed.split(), capture_output=True, text=True, timeout=60, check=False)
    assert "1.1.0" in again.stdout, again.stderr


def test_demo_is_the_same_whatever_the_settings_of_its_caller_are(tmp_path: Path) -> None:
    """It never writes into a database that somebody's environment happens to name, nor fails because of it."""
    (tmp_path / "phoenix.toml").write_text('workers = 3\nno_setting = "x"\n')
    foreign = {
        "PHOENIX_DATA": str(tmp_path / "foreign"),
        "PHOENIX_DATABASE": f"postgresql://phoenix@127.0.0.1:{free_port()}/production",
        "PHOENIX_FEATURES": f"redis://127.0.0.1:{free_port()}",
        "PHOENIX_ARTIFACTS": "ftp://nowhere",
        "PHOENIX_HOST": "0.0.0.0",
        "PHOENIX_ROLES": "none",
        "PHOENIX_LOG_LEVEL": "loud",
    }
    command = [sys.executable, "-m", "phoenix_ml.cli", "demo", "--exit", "--data", "demo"]

    with socket.create_server(("127.0.0.1", 0)) as foreign_server:
        port = foreign_server.getsockname()[1]
        ended = subprocess.run(
            [*command, "--port", str(port)],
            env=os.environ | foreign,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=150,
            check=False,
        )

    assert ended.returncode == 0, ended.stderr
    assert f"port {port} is in use, taking " in ended.stdout
    assert "1,336 answers" in " ".join(ended.stdout.split())
    assert (tmp_path / "demo" / "phoenix.db").exists()
    assert not (tmp_path / "foreign").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_demo_that_is_ended_takes_its_server_along(tmp_path: Path, number: signal.Signals) -> None:
    """Whoever ends it, or closes its terminal, must not find the port taken by a server that nobody sees."""
    # Tests that were started with nohup would hand down that SIGHUP is ignored.
    obeying = ["env", f"--default-signal={number.name}"]
    command = [*obeying, sys.executable, "-m", "phoenix_ml.cli", "demo", "--data", str(tmp_path / "demo")]
    port = free_port()
    with (tmp_path / "demo.log").open("w") as log:
        demo = subprocess.Popen([*command, "--port", str(port)], stdout=log, stderr=log)
    try:
        wait_until(lambda: listens(port) or demo.poll() is not None, 120, "its server listens")
        demo.send_signal(number)
        code = demo.wait(60)
    finally:
        demo.kill()
        demo.wait()

    assert code == 128 + number, (tmp_path / "demo.log").read_text()
    assert not listens(port)
    assert "Traceback" not in (tmp_path / "demo.log").read_text()


def listens(port: int) -> bool:
    """Whether somebody takes connections there."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_demo_never_removes_a_folder_that_it_did_not_make(tmp_path: Path) -> None:
    """Whoever points it at a folder of their own by mistake keeps what is in it."""
    (tmp_path / "thesis.txt").write_text("final")
    command = [sys.executable, "-m", "phoenix_ml.cli", "demo", "--exit", "--data", str(tmp_path)]

    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    assert ended.returncode == 1
    assert "was not made by the demo" in " ".join(ended.stderr.split())
    assert (tmp_path / "thesis.txt").read_text() == "final"


def test_demo_leaves_alone_a_demo_that_still_serves(tmp_path: Path) -> None:
    """A second `make demo` in another terminal must not pull the data from under the first."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "made-by-phoenix-demo").touch()
    command = [sys.executable, "-m", "phoenix_ml.cli", "demo", "--exit", "--data", str(tmp_path / "data")]

    with PhoenixServer(tmp_path) as server:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        still = httpx.get(f"{server.url}/health/ready").json()

    assert ended.returncode == 1
    assert "is being served already" in " ".join(ended.stderr.split())
    assert still["status"] == "ok"
