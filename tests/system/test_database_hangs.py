"""A PostgreSQL that neither answers nor closes its connections, as on a machine that swaps or a disk that hangs."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from onnx_models import linear_regressor, write
from phoenix_server import PhoenixServer
from servers import PostgresServer, wait_until
from traffic import Traffic, await_logged

pytestmark = [pytest.mark.system]

MODEL = "linear"
# A load balancer grants a health check half of it, on a machine that is not busy with this test as well.
HEALTH_DEADLINE_S = 10.0


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresServer]:
    """A server for this module alone: it is frozen."""
    with PostgresServer() as server:
        yield server


@pytest.fixture
def server(postgres: PostgresServer, tmp_path: Path) -> Iterator[PhoenixServer]:
    """A server on a database of its own."""
    postgres.start()
    server = PhoenixServer(
        tmp_path, database=postgres.create_database(), registry_poll_ms=100, stop_timeout_s=5
    )
    assert server.command("db", "upgrade").returncode == 0
    server.register(write(tmp_path / "model.onnx", linear_regressor(3)), MODEL, "1.0.0")
    with server:
        yield server
        server.kill()
    postgres.thaw()


def make_body(number: int) -> Mapping[str, Any]:
    return {"model_id": MODEL, "features": [number, 1.0, 2.0], "request_id": f"r{number}"}


def test_predictions_and_health_checks_are_answered_while_the_database_hangs(
    server: PhoenixServer, postgres: PostgresServer
) -> None:
    """Nobody who asks for a prediction needs the database; an orchestrator that gets no word kills the process."""
    traffic = Traffic(server.url, make_body)
    traffic.ask(20, clients=2)
    postgres.freeze()
    try:
        # More than the threads that could be stuck in a check each.
        checks = [
            httpx.get(f"{server.url}/health/ready", timeout=HEALTH_DEADLINE_S) for _ in range(3)
        ] + ask_at_once(server, 40)
        traffic.ask(20, clients=2)
        live = httpx.get(f"{server.url}/health/live", timeout=HEALTH_DEADLINE_S)
    finally:
        postgres.thaw()

    with server.opened() as phoenix:
        rows = await_logged(phoenix, MODEL, set(traffic.answers))
    wait_until(lambda: is_well(server), 60, "the server says that all is well again")
    assert (live.status_code, traffic.refusals, traffic.broken) == (200, [], 0)
    assert {(check.status_code, check.json()["status"]) for check in checks} == {(200, "degraded")}
    assert all("does not answer" in check.json()["checks"]["database"] for check in checks)
    assert {row.id for row in rows} == set(traffic.answers)
    assert len(rows) == 40


def ask_at_once(server: PhoenixServer, count: int) -> list[httpx.Response]:
    """Health checks by many at the same time."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(count) as pool:
        asked = [
            pool.submit(httpx.get, f"{server.url}/health/ready", timeout=HEALTH_DEADLINE_S)
            for _ in range(count)
        ]
        return [response.result() for response in asked]


def is_well(server: PhoenixServer) -> bool:
    return bool(httpx.get(f"{server.url}/health/ready").json()["status"] == "ok")


def test_a_stop_does_not_wait_for_a_database_that_hangs_and_loses_nothing(
    server: PhoenixServer, postgres: PostgresServer
) -> None:
    """A node that is drained kills what does not end in time; what is not logged yet waits in the journals."""
    traffic = Traffic(server.url, make_body)
    postgres.freeze()
    try:
        traffic.ask(50, clients=2)
        httpx.get(f"{server.url}/health/ready", timeout=HEALTH_DEADLINE_S)
        exit_code = server.stop()
    finally:
        postgres.thaw()
    server.start()

    with server.opened() as phoenix:
        rows = await_logged(phoenix, MODEL, set(traffic.answers))
    assert exit_code == 0
    assert "does not stop and is killed" not in server.log()
    assert "hangs and is left" not in server.log()
    assert {row.id for row in rows} == set(traffic.answers)
    assert len(rows) == 50
