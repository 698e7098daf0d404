"""Clients of other servers, as they are on PyPI and with their defaults, against one of ours."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zoo
from environments import python_of
from perf_analyzer import perf_analyzer
from phoenix_server import PhoenixServer
from servers import HOST, free_port

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

SESSIONS = Path(__file__).resolve().parents[1] / "support" / "sessions"
SESSION_LIMIT_S = 120
SUMS = [[14.0 + 1000], [32.0 + 1000]]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PhoenixServer]:
    """One API process, so that a client that unloads a model sees it unloaded in its next call."""
    phoenix = PhoenixServer(
        tmp_path_factory.mktemp("clients"), grpc_port=free_port(), batch_limit=100, registry_poll_ms=250
    )
    zoo.stock(phoenix)
    with phoenix:
        yield phoenix


def grpc_address(server: PhoenixServer) -> str:
    return f"{HOST}:{server.settings.grpc_port}"


def run(command: list[str], **options: Any) -> str:
    """What a command prints; its errors are in the failure."""
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=SESSION_LIMIT_S, check=False, **options
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return str(done.stdout)


@pytest.fixture(scope="module")
def triton(server: PhoenixServer) -> dict[str, Any]:
    """What Triton's clients have found."""
    command = [str(python_of("triton")), str(SESSIONS / "with_triton.py")]
    printed = run([*command, f"{HOST}:{server.port}", grpc_address(server), "people"])
    found: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return found


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_tritons_client_infers_and_manages(triton: dict[str, Any], protocol: str) -> None:
    """Raw tensors are its default; metadata, configuration, statistics and repository are asked for by its tools."""
    found = triton[protocol]
    assert found["ready"] == [True, True, True]
    assert found["y"] == [[14.0], [32.0]]
    assert found["types"] == list(zoo.EVERY_TYPE)
    assert (found["label"], found["others"]) == ([1], True)
    assert "no model 'nobody' is registered" in found["error"]
    assert found["async"] == 2
    assert (found["unloaded"], found["loaded"]) == (False, True)
    assert [tensor["name"] for tensor in found["metadata"]["inputs"]] == ["x", "y", "factor"]
    assert found["config"] == 100
    assert {"abc", "outer", "types"} <= set(found["index"])
    assert found["counted"]


def test_tritons_client_may_use_json_and_compression(triton: dict[str, Any]) -> None:
    """Both ways, with an algorithm each."""
    assert triton["http"]["json"] == [[14.0], [32.0]]
    assert triton["http"]["compressed"] == 50 * 6.0


@pytest.mark.parametrize("client", ["http.aio", "grpc.aio"])
def test_tritons_asyncio_clients_infer(triton: dict[str, Any], client: str) -> None:
    """Many requests at a time over one client."""
    assert triton[client] == [[[14.0], [32.0]]] * 8


def test_kserves_clients_infer(server: PhoenixServer) -> None:
    """REST with JSON and with raw tensors, gRPC with typed and with raw contents."""
    command = [str(python_of("kserve")), str(SESSIONS / "with_kserve.py")]
    printed = run([*command, f"http://{HOST}:{server.port}", grpc_address(server)])
    found = json.loads(printed.splitlines()[-1])
    for protocol in ("rest", "grpc"):
        assert found[f"{protocol}.ready"] == [True, True, True]
        for binary in (False, True):
            assert found[f"{protocol}.{binary}"] == ["abc", "y", SUMS], (protocol, binary)
    assert "no model 'nobody' is registered" in found["rest.error"]


@pytest.mark.parametrize("options", [[], ["--binary-data"], ["--batch-size", "4"]], ids=str)
def test_mlservers_batch_command_scores_a_file(
    server: PhoenixServer, tmp_path: Path, options: list[str]
) -> None:
    """`mlserver infer` reads a request a line and writes an answer a line."""
    asked = tmp_path / "in.jsonl"
    asked.write_text(
        "".join(
            json.dumps({"inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [n, 0, 0]}]})
            + "\n"
            for n in range(10)
        )
    )
    answered = tmp_path / "out.jsonl"
    command = [str(python_of("mlserver").with_name("mlserver")), "infer", "-u", f"{HOST}:{server.port}"]
    run([*command, "-m", "abc", "-i", str(asked), "-o", str(answered), *options])
    found = []
    for line in answered.read_text().splitlines():
        (output,) = json.loads(line)["outputs"]
        data = output["data"]
        found.append((data[0] if isinstance(data, list) else data, output["name"]))
    assert sorted(found) == [(1000.0 + n, "y") for n in range(10)]


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_perf_analyzer_measures(server: PhoenixServer, tmp_path: Path, protocol: str) -> None:
    """NVIDIA's own load generator, with batches and with several requests at a time."""
    analyzer = perf_analyzer()
    report = tmp_path / "report.csv"
    address = f"{HOST}:{server.port}" if protocol == "http" else grpc_address(server)
    command = [str(analyzer.program), "-m", "abc", "-i", protocol, "-u", address, "-b", "8"]
    # As few requests as it takes, however unsteady this machine is.
    command += ["--concurrency-range", "2", "--request-count", "200", "-f", str(report)]
    printed = run(command, env=analyzer.environment, cwd=tmp_path)
    assert "Request count: 200" in printed, printed
    assert float(report.read_text().splitlines()[1].split(",")[1]) > 0
