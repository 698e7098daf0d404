"""Models that strangers send: whatever they do when they are run, the server answers on."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import onnx_models
import pytest
from phoenix_server import PhoenixServer
from servers import _children_of, has_ended, wait_until

pytestmark = pytest.mark.system

ASKED = {"model_id": "risk", "features": [1.0, 2.0]}
ROWS = 20_000


def started(folder: Path, **settings: Any) -> PhoenixServer:
    """A server of one API process that answers for `risk`, not entered yet."""
    server = PhoenixServer(folder, **settings)
    path = onnx_models.write(folder / "risk.onnx", onnx_models.linear_regressor(2))
    server.register(path, "risk", "1.0.0")
    return server


def upload(
    server: PhoenixServer, artifact: bytes, reference: bytes | None = None, **said: str
) -> httpx.Response:
    model: dict[str, Any] = {"id": "sent", "version": "1.0.0", "task": "regression"} | said
    files = {"artifact": ("model.onnx", artifact)}
    if reference is not None:
        model["features"] = {name: {"type": "float"} for name in ("a", "b")}
        files["reference"] = ("rows.csv", reference)
    data = {"model": msgspec.json.encode(model).decode()}
    return httpx.post(f"{server.url}/models", files=files, data=data, timeout=120)


@contextmanager
def in_background(call: Callable[[], httpx.Response]) -> Iterator[Future[httpx.Response]]:
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(call)


def predict_until(done: Callable[[], bool], server: PhoenixServer) -> list[int]:
    """The statuses of predictions that were asked one after the other, with one after it was done."""
    statuses = []
    with httpx.Client(base_url=server.url, timeout=30) as http:
        is_done = False
        while not is_done:
            is_done = done()
            statuses.append(http.post("/predict", json=ASKED).status_code)
    return statuses


def trial_of(server: PhoenixServer) -> int:
    """The process in which an upload is run now."""
    found: list[int] = []

    def is_there() -> bool:
        for pid in _children_of(server.pids()["api-0"]):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if b"phoenix_ml.processes.trial" in words:
                found.append(pid)
        return bool(found)

    wait_until(is_there, 30, "the model has a process of its own")
    return found[0]


def leftovers(server: PhoenixServer) -> list[str]:
    """What of an upload is in the data folder, besides what `risk` has there."""
    stored = [path.name for path in (server.data / "artifacts").rglob("*") if path.is_file()]
    return [path.name for path in server.data.glob("upload-*")] + stored[1:]


def test_the_statistics_of_an_upload_are_none_of_the_api_processs_business(tmp_path: Path) -> None:
    """They took seconds of its CPU, and all that it was asked meanwhile took as long; the library stayed for good."""
    rng = np.random.default_rng(1)
    rows = np.column_stack([rng.normal(size=(ROWS, 3)), np.arange(ROWS)])
    reference = "a,b,y,at\n" + "".join(f"{a:.6f},{b:.6f},{y:.6f},{at:.0f}\n" for a, b, y, at in rows)
    model = onnx_models.linear_regressor(2, bias=3.0)
    with started(tmp_path) as server:
        api = server.pids()["api-0"]
        with in_background(
            lambda: upload(server, model, reference.encode(), time="at", outcome="y")
        ) as answer:
            statuses = predict_until(answer.done, server)
        activated = httpx.post(f"{server.url}/models/sent/versions/1.0.0/activate")
        shown = httpx.get(f"{server.url}/models/sent/versions/1.0.0?baseline=true").json()
        mapped = Path(f"/proc/{api}/maps").read_text()

    assert answer.result().status_code == 201, answer.result().text
    assert activated.status_code == 200
    assert (shown["baseline"]["rows"], shown["baseline"]["quality"]["n"]) == (ROWS, ROWS)
    assert len(statuses) > 1
    assert set(statuses) == {200}
    assert "onnxruntime" in mapped
    for library in ("scipy", "pyarrow"):
        assert f"/{library}/" not in mapped


def test_a_model_that_never_answers_is_refused_while_others_answer(tmp_path: Path) -> None:
    """It hung a thread of the server for good, and took one of its processors along."""
    with started(tmp_path, upload_limit_s=5) as server:
        api = server.pids()["api-0"]
        with in_background(lambda: upload(server, onnx_models.endless())) as answer:
            statuses = predict_until(answer.done, server)
        unknown = httpx.get(f"{server.url}/models/sent")
        still = server.pids()["api-0"]
        left = leftovers(server)

    error = answer.result().json()["error"]
    assert (answer.result().status_code, error["code"]) == (422, "model_refused")
    assert (
        "running the model comes to no good end: it took longer than the 5 s that it has" in error["message"]
    )
    assert set(statuses) == {200}
    assert unknown.status_code == 404
    assert still == api
    assert left == []


def test_a_model_that_kills_its_process_is_refused_while_others_answer(tmp_path: Path) -> None:
    """A graph that brings the runtime down brought the server down, and every request that was in it."""
    with started(tmp_path) as server:
        api = server.pids()["api-0"]
        with in_background(lambda: upload(server, onnx_models.endless())) as answer:
            os.kill(trial_of(server), signal.SIGSEGV)
            statuses = predict_until(answer.done, server)
        still = server.pids()["api-0"]
        left = leftovers(server)

    error = answer.result().json()["error"]
    assert (answer.result().status_code, error["code"]) == (422, "model_refused")
    assert "it was ended by signal SIGSEGV" in error["message"]
    assert set(statuses) == {200}
    assert still == api
    assert left == []


def test_a_stop_does_not_wait_for_a_model_that_never_answers(tmp_path: Path) -> None:
    """A deployment would wait for as long as a stranger likes; and nobody would be there to end what he has sent."""
    with started(tmp_path, stop_timeout_s=1) as server:
        with in_background(lambda: upload(server, onnx_models.endless())):
            trial = trial_of(server)
            code = server.stop()
            wait_until(lambda: has_ended(trial), 10, "the model's process has ended")

    assert code == 0
    assert "does not stop and is killed" not in server.log()
    assert leftovers(server) == []
