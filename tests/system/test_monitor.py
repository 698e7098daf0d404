"""A real server watches its model: a planted change is told of once, whatever dies in between."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from onnx_models import linear_regressor, write
from phoenix_server import PhoenixServer
from receiver import Received, receiving
from servers import wait_until

from phoenix_ml.application.ports import IncidentQuery
from phoenix_ml.domain.features import FeatureRule, FeatureType

pytestmark = [pytest.mark.system]
MODEL = "linear"
CONTRACT = {name: FeatureRule(FeatureType.FLOAT) for name in ("age", "income")}
BATCH_ROWS = 200


def rows(seed: int, count: int, *, shift: float = 0.0) -> dict[str, list[float]]:
    values = np.random.default_rng(seed).normal(size=(2, count))
    return {"age": values[0].tolist(), "income": (values[1] + shift).tolist()}


@pytest.fixture
def people() -> Iterator[Received]:
    """Whoever hears of alerts."""
    with receiving() as web:
        yield web


@pytest.fixture
def server(tmp_path: Path, people: Received) -> Iterator[PhoenixServer]:
    """One model with a reference, watched in batches of 200; its scores are not looked at."""
    alerts = f"log: webhook+http://{people.host}/hook"
    server = PhoenixServer(tmp_path, registry_poll_ms=100, alerts=alerts)
    artifact = write(tmp_path / "model.onnx", linear_regressor(2))
    server.register(artifact, MODEL, "1.0.0", contract=CONTRACT, reference=rows(1, 4000))
    changes = ("--set", f"batch_rows={BATCH_ROWS}", "--set", "left_out=_score")
    assert server.command("models", "monitoring", MODEL, *changes).returncode == 0
    with server:
        yield server


def ask(server: PhoenixServer, table: dict[str, list[float]]) -> None:
    instances = [
        {"features": {"age": age, "income": income}}
        for age, income in zip(table["age"], table["income"], strict=True)
    ]
    for start in range(0, len(instances), 500):
        body = {"model_id": MODEL, "instances": instances[start : start + 500]}
        httpx.post(f"{server.url}/predict/batch", json=body, timeout=30).raise_for_status()


def counted_rows(server: PhoenixServer) -> list[int]:
    """The rows of each batch that is kept, in order."""
    with server.opened() as phoenix:
        return [batch.rows for batch in phoenix.monitoring.batches(MODEL, "1.0.0")]


def incidents(server: PhoenixServer) -> list[tuple[str, str]]:
    with server.opened() as phoenix:
        found, _ = phoenix.monitoring.incidents(IncidentQuery(MODEL, limit=100))
    return [(one.cause, one.status.value) for one in found]


def test_a_planted_drift_is_one_incident_and_one_alert_in_spite_of_a_killed_monitor(
    server: PhoenixServer,
) -> None:
    """Counted twice it would alarm too early, forgotten never; told twice it would be noise."""
    ask(server, rows(2, 1000))
    wait_until(lambda: len(counted_rows(server)) >= 2, 60, "the monitor has counted a part")
    before = incidents(server)

    killed = server.kill_child("background")
    ask(server, rows(3, 1000, shift=1.0))
    server.wait_for_child("background", after=killed)
    wait_until(lambda: len(counted_rows(server)) == 10, 60, "all batches are counted")
    ask(server, rows(4, 1000, shift=1.0))
    wait_until(lambda: len(counted_rows(server)) == 15, 60, "all batches are counted")

    assert before == []
    assert counted_rows(server) == [BATCH_ROWS] * 15
    assert incidents(server) == [("drift:income", "open")]
    alerts = httpx.get(f"{server.url}/alerts", params={"model_id": MODEL}).json()["items"]
    (alert,) = alerts
    assert alert["title"].startswith("linear 1.0.0: income drifted, higher")


def test_a_receiver_that_is_down_stops_nothing_and_hears_the_alert_once_it_is_back(
    server: PhoenixServer, people: Received
) -> None:
    """The monitor must not wait for whoever listens, and nobody must miss what was said meanwhile."""
    people.status = 503
    ask(server, rows(2, 1000, shift=1.0))
    wait_until(lambda: len(people.calls) >= 1, 60, "the receiver was asked")
    ask(server, rows(3, 1000, shift=1.0))
    wait_until(lambda: len(counted_rows(server)) == 10, 60, "the monitor goes on")

    people.status = 200
    wait_until(lambda: waiting(server) == {}, 60, "the alert is told")

    told = [json.loads(body) for _, _, body in people.calls]
    assert {one["type"] for one in told} == {"phoenix-ml.alert"}
    assert len({one["data"]["id"] for one in told}) == 1
    assert len([1 for line in server.log_records() if "income drifted" in line["message"]]) == 1


def waiting(server: PhoenixServer) -> dict[str, int]:
    with server.opened() as phoenix:
        return phoenix.deliveries.waiting()


def test_a_person_sees_the_drift_and_acknowledges_it(server: PhoenixServer, tmp_path: Path) -> None:
    """From the table to the page to the acknowledgement, as it is typed."""
    ask(server, rows(2, 1000, shift=1.0))
    wait_until(lambda: len(counted_rows(server)) == 5, 60, "all batches are counted")

    page = tmp_path / "report.html"
    checked = server.command("drift", "check", MODEL, "--rows", "1000", "--html", str(page))
    shown = server.command("drift", "show", MODEL, "--json")
    listed = server.command("incidents", "list", "--unresolved", "--json")
    (item,) = json.loads(listed.stdout)["items"]
    acknowledged = server.command("incidents", "ack", item["incident_id"])
    again = server.command("incidents", "list", "--unresolved", "--json")

    assert (
        next(line.split()[1] for line in checked.stdout.splitlines() if line.split()[:1] == ["income"])
        == "drift"
    )
    assert "<svg" in page.read_text()
    assert "http" not in page.read_text().replace("http://www.w3.org/2000/svg", "")
    assert verdicts(json.loads(shown.stdout)) == {"age": "steady", "income": "drift", "_score": "left out"}
    assert acknowledged.returncode == 0
    assert json.loads(again.stdout)["items"][0]["status"] == "acknowledged"


def verdicts(shown: dict[str, Any]) -> dict[str, str]:
    (item,) = shown["items"]
    return {one["feature"]: one["verdict"] for one in item["report"]["features"]}


def test_statistics_are_no_burden_of_the_processes_that_answer(server: PhoenixServer) -> None:
    """scipy costs a second and 60 MB; the monitor alone has it."""
    ask(server, rows(2, 400))
    wait_until(lambda: len(counted_rows(server)) == 2, 60, "the monitor has counted")

    has_scipy = {
        slot: "/scipy/" in Path(f"/proc/{pid}/maps").read_text()
        for slot, pid in server.pids().items()
        if slot in ("api-0", "background")
    }

    assert has_scipy == {"api-0": False, "background": True}
