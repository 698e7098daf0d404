"""A version for TensorRT on a server without one: it serves on the CPU, and nobody is told otherwise."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import onnx_models
import pytest
from click.testing import CliRunner
from lanes import Lane, ServerLane, ok, refused
from phoenix_server import PhoenixServer
from servers import wait_until

from phoenix_ml.cli import main

ASK = {"model_id": "vision", "features": [1, 2, 3]}
ROWS = {"inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]}]}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PhoenixServer]:
    with PhoenixServer(tmp_path_factory.mktemp("devices"), device="cpu") as server:
        yield server


@pytest.fixture(scope="module")
def http(server: PhoenixServer) -> Iterator[Lane]:
    """The server, with one active version that is registered for TensorRT."""
    lane = ServerLane(server.url)
    ok(register(lane, onnx_models.linear_regressor(3), "vision", framework="tensorrt"), 201)
    ok(lane.request("POST", "/models/vision/versions/1.0.0/activate"))
    yield lane
    lane.close()


def register(lane: Lane, artifact: bytes, model_id: str, **wishes: Any) -> httpx.Response:
    model = {"id": model_id, "version": "1.0.0"} | wishes
    files = {"artifact": ("artifact", artifact)}
    return lane.request("POST", "/models", files=files, data={"model": json.dumps(model)})


def test_an_answer_says_that_it_is_the_cpus_and_so_does_its_record(http: Lane) -> None:
    """Who paid for a GPU should learn from any answer that it is not used."""
    answer = ok(http.request("POST", "/predict", json=ASK))
    tensors = ok(http.request("POST", "/v2/models/vision/infer", json=ROWS))

    assert (answer["result"], answer["device"]) == (3.25, "cpu")
    assert (tensors["outputs"][0]["data"], tensors["parameters"]["device"]) == ([3.25], "cpu")
    path = f"/predictions/{answer['prediction_id']}"
    wait_until(lambda: http.request("GET", path).status_code == 200, 60, "the answer is in the log")
    assert ok(http.request("GET", path))["route"]["device"] == "cpu"
    replayed = ok(http.request("GET", f"{path}/replay"))
    assert (replayed["identical"], replayed["logged_device"], replayed["device"]) == (True, "cpu", "cpu")


def test_readiness_names_the_version_and_why(http: Lane) -> None:
    """It is no failure, so requests are still routed here; but somebody should look."""
    ready = ok(http.request("GET", "/health/ready"))

    assert ready["status"] == "degraded"
    assert ready["checks"]["devices"] == "not where they should run: vision 1.0.0"
    assert ready["models_displaced"] == {"vision 1.0.0": "cpu: PHOENIX_DEVICE is cpu"}
    assert ready["models_failed"] == {}


def test_the_time_of_runs_is_told_by_device(http: Lane) -> None:
    """A dashboard shows how much of the load the GPU takes."""
    ok(http.request("POST", "/predict", json=ASK))

    shown = http.request("GET", "/metrics").text

    labels = 'model="vision",version="1.0.0",device="cpu"'
    assert f"phoenix_inference_seconds_count{{{labels}}}" in shown


def test_an_engine_that_only_tensorrt_could_run_is_refused(http: Lane) -> None:
    """Here, and before it is stored: active, it would fail each request."""
    error = refused(
        register(http, b"ftrt" + bytes(99), "plan", framework="tensorrt"), 422, "engine_unavailable"
    )

    assert "TensorRT would have to run it" in error["message"]
    assert http.request("GET", "/models/plan").status_code == 404


def test_the_same_version_for_another_framework_is_another_version(http: Lane) -> None:
    """What a version is does not change under those who ask it."""
    model = onnx_models.linear_regressor(3)

    assert register(http, model, "vision", framework="tensorrt").status_code == 201
    refused(register(http, model, "vision"), 409, "version_conflict")
    refused(register(http, model, "other", framework="keras"), 422, "invalid_field")


def test_the_command_line_registers_for_tensorrt_and_doctor_tells_where_it_runs(
    server: PhoenixServer, http: Lane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As over HTTP."""
    monkeypatch.setenv("PHOENIX_DEVICE", "cpu")
    path = onnx_models.write(server.folder / "m.onnx", onnx_models.linear_regressor(2))
    named = ["--id", "terminal", "--version", "1.0.0", "--framework", "tensorrt", "--json"]

    done = CliRunner().invoke(main, ["models", "register", str(path), *named, "--data", str(server.data)])
    looked = CliRunner().invoke(main, ["doctor", "--data", str(server.data)])

    assert json.loads(done.stdout)["framework"] == "tensorrt"
    assert "vision 1.0.0 on cpu (PHOENIX_DEVICE is cpu)" in " ".join(looked.output.split())
