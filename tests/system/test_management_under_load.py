"""Models come, go and change places while requests are answered: none fails, and memory comes back."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec
import onnx_models
import pytest
from phoenix_server import PhoenixServer
from servers import wait_until

from phoenix_ml.bench import Load, Target, run_load

pytestmark = pytest.mark.system

CONNECTIONS = 64
SECONDS = 4.0
WEIGHTS_MIB = 64
WIDTH = 32


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PhoenixServer]:
    """Two versions of a small model, the first active, and a large network that is not."""
    folder = tmp_path_factory.mktemp("managed")
    server = PhoenixServer(folder)
    for version, bias in (("1.0.0", 1.0), ("1.1.0", 2.0)):
        path = onnx_models.write(folder / f"{version}.onnx", onnx_models.linear_regressor(WIDTH, bias=bias))
        server.register(path, "risk", version, activate=version == "1.0.0")
    hidden = WEIGHTS_MIB * 1024 * 1024 // 4 // WIDTH
    network = onnx_models.network_classifier(WIDTH, hidden=hidden)
    server.register(onnx_models.write(folder / "large.onnx", network), "large", "1.0.0", activate=False)
    with server:
        yield server


def ok(answer: httpx.Response) -> None:
    assert answer.is_success, answer.text


def load_and_unload(http: httpx.Client, artifact: bytes) -> None:
    ok(http.post("/v2/repository/models/large/load"))
    ok(http.post("/v2/repository/models/large/unload"))


def change_places(http: httpx.Client, artifact: bytes) -> None:
    for new, old in (("1.1.0", "1.0.0"), ("1.0.0", "1.1.0")):
        ok(http.post(f"/models/risk/versions/{new}/activate"))
        ok(http.put("/models/risk/routing", json={"strategy": "single", "arms": [{"version": new}]}))
        ok(http.post(f"/models/risk/versions/{old}/deactivate"))


def upload_and_promote(http: httpx.Client, artifact: bytes) -> None:
    number = len(http.get("/models/risk").json()["versions"])
    model = msgspec.json.encode({"id": "risk", "version": f"2.{number}.0"})
    ok(http.post("/models", files={"artifact": artifact}, data={"model": model.decode()}))
    for stage in ("staging", "prod"):
        ok(http.post(f"/models/risk/versions/2.{number}.0/stage", json={"stage": stage}))


@pytest.mark.parametrize("change", [load_and_unload, change_places, upload_and_promote])
def test_no_request_fails_while_models_change(server: PhoenixServer, change: object) -> None:
    """Whoever deploys at noon must not be seen by those who ask."""
    assert callable(change)
    target = Target.of(server.url)
    asked = target.post("/predict", msgspec.json.encode({"model_id": "risk", "features": [1.0] * WIDTH}))
    loads: list[Load] = []
    loading = threading.Thread(
        target=lambda: loads.append(run_load(target, [asked], CONNECTIONS, SECONDS)), daemon=True
    )
    artifact = Path(server.folder / "1.1.0.onnx").read_bytes()
    times = 0

    loading.start()
    with httpx.Client(base_url=server.url, timeout=60) as http:
        while loading.is_alive():
            change(http, artifact)
            times += 1

    assert loads[0].errors == {}
    assert loads[0].requests > CONNECTIONS
    assert times > 0


def test_memory_comes_back_after_an_unload(server: PhoenixServer) -> None:
    """A server that models come to and leave for months must not end for lack of memory."""
    pid = server.pids()["api-0"]
    with httpx.Client(base_url=server.url, timeout=60) as http:
        load_and_unload(http, b"")
        wait_until(lambda: memory_mib(pid) < 200, 20, "what the first time left behind is gone")
        empty_mib = memory_mib(pid)
        ok(http.post("/v2/repository/models/large/load"))
        loaded_mib = memory_mib(pid)
        ok(http.post("/v2/repository/models/large/unload"))

    assert loaded_mib > empty_mib + WEIGHTS_MIB / 2
    wait_until(lambda: memory_mib(pid) < empty_mib + WEIGHTS_MIB / 4, 20, "the memory is given back")


def memory_mib(pid: int) -> float:
    """What the process has in memory and shares with nobody."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Private_Dirty:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("smaps_rollup has no Private_Dirty")
