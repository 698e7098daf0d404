"""Predictions computed again: asked of a real server, replayed over HTTP and by the command."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import onnx_models
import onnxruntime as ort
import pytest
import zoo
from click.testing import CliRunner, Result
from lanes import ServerLane, logged, ok, refused
from phoenix_server import PhoenixServer

from phoenix_ml.application.ports import Engine
from phoenix_ml.cli import main
from phoenix_ml.domain.errors import Overloaded
from phoenix_ml.domain.models import Metadata
from phoenix_ml.infrastructure.engines.onnx import OnnxEngines
from phoenix_ml.infrastructure.http.records import record_routes

pytestmark = pytest.mark.system

WIDTH = 30


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PhoenixServer]:
    """A running server with models of several kinds."""
    folder = tmp_path_factory.mktemp("replayed")
    phoenix = PhoenixServer(folder)
    network = onnx_models.write(folder / "network.onnx", onnx_models.network_classifier(WIDTH))
    phoenix.register(network, "network", "1.0.0")
    phoenix.register(
        zoo.linear(folder / "people.onnx", [1, 10, 0, 100, 1000]), "people", "1.0.0", contract=zoo.PEOPLE
    )
    phoenix.register(zoo.typed(folder / "typed.onnx"), "typed", "1.0.0", contract=zoo.TYPED)
    phoenix.register(
        onnx_models.write(folder / "maps.onnx", onnx_models.zipmap_classifier(("no", "yes"))), "maps", "1.0.0"
    )
    phoenix.register(
        onnx_models.write(folder / "lost.onnx", onnx_models.linear_regressor(2)), "lost", "1.0.0"
    )
    phoenix.register(zoo.linear(folder / "aged.onnx", [1]), "aged", "1.0.0")
    with phoenix:
        yield phoenix


@pytest.fixture(scope="module")
def lane(server: PhoenixServer) -> Iterator[ServerLane]:
    opened = ServerLane(server.url)
    yield opened
    opened.close()


@pytest.fixture
def row(lane: ServerLane) -> str:
    """The id of a logged prediction of the network, alone in its run."""
    answer = ok(lane.request("POST", "/predict", json={"model_id": "network", "features": features(1)[0]}))
    return str(logged(lane, answer["prediction_id"])["prediction_id"])


def features(count: int) -> list[list[float]]:
    values: list[list[float]] = np.random.default_rng(count).normal(size=(count, WIDTH)).tolist()
    return values


def replay(server: PhoenixServer, prediction_id: str, *options: str) -> Result:
    return CliRunner(env={"COLUMNS": "300"}).invoke(
        main, ["predictions", "replay", prediction_id, "--data", str(server.data), *options]
    )


def replayed(lane: ServerLane, prediction_id: str) -> dict[str, Any]:
    found: dict[str, Any] = ok(lane.request("GET", f"/predictions/{prediction_id}/replay"))
    return found


def alter(server: PhoenixServer, prediction_id: str, column: str, value: Any) -> None:
    """As somebody would who has the database's password."""
    with closing(sqlite3.connect(server.data / "phoenix.db", timeout=30)) as connection, connection:
        sets = f"UPDATE prediction_logs SET {column} = ? WHERE id IN (?, ?)"
        changed = connection.execute(sets, (value, prediction_id, prediction_id.replace("-", ""))).rowcount
    assert changed == 1


@pytest.mark.parametrize(
    "body",
    [
        {"model_id": "network", "features": features(1)[0]},
        {"model_id": "people", "features": {"income": 1.1, "visits": 2}},
        {"model_id": "typed", "features": {"ratio": 0.1, "count": 2, "member": True, "city": "Ørsta €"}},
        {"model_id": "maps", "features": [0.25, -1.5]},
    ],
    ids=lambda body: body["model_id"],
)
def test_a_prediction_is_computed_again_to_the_last_bit(
    server: PhoenixServer, lane: ServerLane, body: dict[str, Any]
) -> None:
    """The record, the artifact and the engine suffice: also with NaN, texts and answers that are maps."""
    answer = ok(lane.request("POST", "/predict", json=body))
    logged(lane, answer["prediction_id"])

    over_http = replayed(lane, answer["prediction_id"])
    by_command = json.loads(replay(server, answer["prediction_id"], "--json").stdout)

    assert over_http == by_command
    assert over_http["identical"] is True
    for name in ("result", "confidence", "probabilities"):
        assert over_http[name] == {"identical": True, "logged": answer[name], "computed": answer[name]}
    assert (over_http["batch_size"], over_http["batch_position"]) == (1, 0)
    assert over_http["runtime"] == over_http["registered_runtime"] == f"onnxruntime {ort.__version__}"


@pytest.mark.parametrize("count", [2, 7, 33])
def test_each_row_of_a_batch_is_computed_again_to_the_last_bit(lane: ServerLane, count: int) -> None:
    """What an engine adds up in which order depends on the batch's size and the row's place in it."""
    body = {"model_id": "network", "instances": [{"features": row} for row in features(count)]}
    answers = ok(lane.request("POST", "/predict/batch", json=body))["predictions"]
    for answer in answers:
        logged(lane, answer["prediction_id"])

    found = [replayed(lane, answer["prediction_id"]) for answer in answers]

    assert [one["identical"] for one in found] == [True] * count
    assert [(one["batch_position"], one["batch_size"]) for one in found] == [(i, count) for i in range(count)]


def test_requests_that_came_together_are_computed_again_to_the_last_bit(
    server: PhoenixServer, lane: ServerLane
) -> None:
    """The server may run rows of several callers at once, and writes down how."""
    begin = threading.Barrier(16)

    def ask(row: list[float]) -> str:
        own = ServerLane(server.url)
        begin.wait()
        try:
            answer = ok(own.request("POST", "/predict", json={"model_id": "network", "features": row}))
        finally:
            own.close()
        return str(answer["prediction_id"])

    with ThreadPoolExecutor(16) as pool:
        ids = list(pool.map(ask, features(16)))
    for prediction_id in ids:
        logged(lane, prediction_id)

    assert [replayed(lane, prediction_id)["identical"] for prediction_id in ids] == [True] * 16


def test_the_command_says_that_it_is_identical(server: PhoenixServer, row: str) -> None:
    """A person reads it, a script its exit code."""
    done = replay(server, row)

    assert done.exit_code == 0
    assert done.stdout.startswith("identical  network 1.0.0, row 1 of 1 in its batch\n")
    assert "different" not in done.stdout
    assert "registered with" not in done.stdout


def test_a_result_that_was_altered_in_the_log_differs(
    server: PhoenixServer, lane: ServerLane, row: str
) -> None:
    """A log that anybody could rewrite unnoticed would prove nothing."""
    true = replayed(lane, row)["result"]["logged"]
    alter(server, row, "result", json.dumps(true + 1))

    done = replay(server, row)
    found = replayed(lane, row)

    assert done.exit_code == 1
    assert done.stdout.startswith("different  network 1.0.0")
    assert found["identical"] is False
    assert found["result"] == {"identical": False, "logged": true + 1, "computed": true}
    assert found["confidence"]["identical"] is found["probabilities"]["identical"] is True
    (line,) = [line for line in done.stdout.splitlines() if line.split()[:1] == ["result"]]
    assert line.split() == ["result", str(true + 1), str(true), "different"]


def test_one_bit_of_a_probability_makes_a_difference(
    server: PhoenixServer, lane: ServerLane, row: str
) -> None:
    """Bit for bit means so."""
    true = replayed(lane, row)["confidence"]["logged"]
    alter(server, row, "confidence", float(np.nextafter(true, 2.0)))

    found = replayed(lane, row)

    assert replay(server, row, "--json").exit_code == 1
    assert found["confidence"]["identical"] is False
    assert found["result"]["identical"] is True


def test_inputs_that_were_altered_in_the_log_differ(
    server: PhoenixServer, lane: ServerLane, row: str
) -> None:
    """The answer on record is then not the one to the values on record."""
    alter(server, row, "inputs", np.ones(WIDTH, np.float32).tobytes())

    assert replayed(lane, row)["identical"] is False


@pytest.mark.parametrize(
    ("column", "value"),
    [("inputs", b"short"), ("inputs", bytes(4 * WIDTH + 1)), ("batch_position", 1), ("batch_position", -1)],
)
def test_a_row_that_cannot_be_run_is_said_to_be_damaged(
    server: PhoenixServer, lane: ServerLane, row: str, column: str, value: Any
) -> None:
    """It must neither look like a defect of ours nor be computed from something else."""
    alter(server, row, column, value)

    done = replay(server, row)
    error = refused(lane.request("GET", f"/predictions/{row}/replay"), 422, "inference_failed")

    assert done.exit_code == 1
    assert "is damaged" in done.stderr
    assert "is damaged" in error["message"]


def test_another_runtime_than_at_the_registration_is_named(server: PhoenixServer, lane: ServerLane) -> None:
    """It is the first thing to look at when a bit differs."""
    answer = ok(lane.request("POST", "/predict", json={"model_id": "aged", "features": [0.1]}))
    logged(lane, answer["prediction_id"])
    with closing(sqlite3.connect(server.data / "phoenix.db", timeout=30)) as connection, connection:
        connection.execute(
            "UPDATE models SET metadata = replace(metadata, ?, 'onnxruntime 1.0.0') WHERE id = 'aged'",
            (f"onnxruntime {ort.__version__}",),
        )

    done = replay(server, answer["prediction_id"])

    assert done.exit_code == 0
    assert f"registered with onnxruntime 1.0.0, computed now by onnxruntime {ort.__version__}" in done.stdout


def test_while_one_prediction_is_replayed_another_has_to_wait(server: PhoenixServer, row: str) -> None:
    """Each loads a model of its own: many at once would take the memory of those that serve."""
    loading, go_on = threading.Event(), threading.Event()

    class GatedEngines(OnnxEngines):
        def load(self, artifact: Path, metadata: Metadata, *wishes: Any, **options: Any) -> Engine:
            loading.set()
            assert go_on.wait(30)
            return super().load(artifact, metadata, *wishes, **options)

    with server.opened() as phoenix, ThreadPoolExecutor(1) as pool:
        routes = record_routes(replace(phoenix, engines=GatedEngines())).routes
        ask: Any = next(
            getattr(r, "endpoint", None) for r in routes if getattr(r, "path", "").endswith("/replay")
        )
        first = pool.submit(ask, row)
        assert loading.wait(30)
        with pytest.raises(Overloaded, match="another prediction is being replayed"):
            ask(row)
        go_on.set()
        assert json.loads(first.result().body)["identical"] is True
        assert json.loads(ask(row).body)["identical"] is True


def test_a_prediction_that_is_not_in_the_log_is_unknown(server: PhoenixServer, lane: ServerLane) -> None:
    """Nothing is computed for it."""
    stranger = str(uuid4())

    done = replay(server, stranger)

    assert done.exit_code == 1
    assert done.stderr.startswith(f"error prediction_unknown prediction {stranger} is not in the log")
    refused(lane.request("GET", f"/predictions/{stranger}/replay"), 404, "prediction_unknown")
    refused(lane.request("GET", "/predictions/nonsense/replay"), 422, "invalid_field")


@pytest.mark.parametrize("damage", ["changed", "gone"])
def test_without_the_very_artifact_nothing_is_computed(
    server: PhoenixServer, lane: ServerLane, tmp_path: Path, damage: str
) -> None:
    """An answer from another file would prove nothing; the server goes on with what it has loaded."""
    answer = ok(lane.request("POST", "/predict", json={"model_id": "lost", "features": [1.0, 2.0]}))
    logged(lane, answer["prediction_id"])
    with server.opened() as phoenix:
        version = phoenix.registry.get("lost", "1.0.0")
    artifact = server.data / "artifacts" / version.uri
    artifact.unlink(missing_ok=True)
    if damage == "changed":
        artifact.write_bytes(onnx_models.linear_regressor(2, bias=7.0))

    done = replay(server, answer["prediction_id"])
    error = refused(
        lane.request("GET", f"/predictions/{answer['prediction_id']}/replay"), 500, "model_load_failed"
    )

    assert done.exit_code == 1
    assert done.stderr.startswith("error model_load_failed the artifact ")
    assert error["details"]["path"] == str(artifact)
