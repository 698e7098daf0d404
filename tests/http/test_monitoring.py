"""What monitors found, over HTTP: a server that watches nothing itself shows what is on record."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import msgspec
import onnx_models
import pytest
from lanes import ServerLane, ok, refused
from phoenix_server import PhoenixServer

from phoenix_ml.application.ports import MonitorReport, MonitorStep
from phoenix_ml.domain.ids import new_id
from phoenix_ml.domain.incidents import Alert, Incident, IncidentKind, IncidentStatus, Severity

pytestmark = pytest.mark.system
AT_MS = 1_760_000_000_000
OPEN = Incident(
    id=new_id(),
    model_id="risk",
    model_version="1.0.0",
    kind=IncidentKind.DRIFT,
    cause="drift:income",
    severity=Severity.WARNING,
    summary="income drifted",
    evidence={"d": 0.25},
    status=IncidentStatus.OPEN,
    opened_at_ms=AT_MS,
    updated_at_ms=AT_MS,
)
RESOLVED = msgspec.structs.replace(
    OPEN,
    id=new_id(),
    cause="drift:age",
    status=IncidentStatus.RESOLVED,
    resolved_at_ms=AT_MS,
    resolution="the stream is back",
)
ALERT = Alert(
    new_id(), "risk", "1.0.0", Severity.WARNING, "risk 1.0.0: income drifted", "…", (OPEN.id,), AT_MS
)
REPORT = MonitorReport(new_id(), "risk", "1.0.0", "drift", AT_MS, 1000, {"features": []})
EARLIER = msgspec.structs.replace(REPORT, id=new_id(), created_at_ms=AT_MS - 1, rows=900)


@pytest.fixture(scope="module")
def lane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerLane]:
    """A server without a monitor, whose database holds what one has committed."""
    folder = tmp_path_factory.mktemp("watched")
    server = PhoenixServer(folder, roles="log")
    server.register(onnx_models.write(folder / "m.onnx", onnx_models.linear_regressor(2)), "risk", "1.0.0")
    with server.opened() as phoenix:
        was = phoenix.monitoring.standings()["risk"].position
        step = MonitorStep(
            "risk", was, was, b"", AT_MS, reports=(EARLIER, REPORT), opened=(OPEN, RESOLVED), alert=ALERT
        )
        assert phoenix.monitoring.commit(step)
    with server:
        opened = ServerLane(server.url)
        yield opened
        opened.close()


def test_reports_incidents_and_alerts_are_shown(lane: ServerLane) -> None:
    """The answer of each route is what the monitor has stored."""
    (report,) = ok(lane.request("GET", "/monitoring/risk/drift"))["items"]
    incidents = ok(lane.request("GET", "/monitoring/risk/incidents"))["items"]
    (unresolved,) = ok(lane.request("GET", "/incidents?unresolved=true"))["items"]
    (alert,) = ok(lane.request("GET", "/alerts?model_id=risk"))["items"]

    assert (report["rows"], report["report"]) == (1000, {"features": []})
    assert {one["cause"] for one in incidents} == {"drift:income", "drift:age"}
    assert (unresolved["incident_id"], unresolved["summary"]) == (OPEN.id, "income drifted")
    assert (alert["title"], alert["incidents"]) == (ALERT.title, [OPEN.id])
    performance = ok(lane.request("GET", "/monitoring/risk/performance"))
    assert performance == {"items": [], "next_cursor": None, "state": "insufficient data"}


def test_reports_are_listed_page_by_page(lane: ServerLane) -> None:
    """A chart of the drift over time reads all that are kept."""
    first = ok(lane.request("GET", "/monitoring/risk/drift"))
    second = ok(lane.request("GET", f"/monitoring/risk/drift?cursor={first['next_cursor']}"))
    after = ok(lane.request("GET", f"/monitoring/risk/drift?cursor={EARLIER.created_at_ms}.{EARLIER.id}"))

    assert [page["items"][0]["rows"] for page in (first, second)] == [1000, 900]
    assert second["next_cursor"] is None
    assert after == {"items": [], "next_cursor": None}
    for kind in ("drift", "performance"):
        refused(lane.request("GET", f"/monitoring/risk/{kind}?cursor=nowhere"), 422, "invalid_field")


def test_a_check_is_asked_for_and_the_latest_report_shown(lane: ServerLane) -> None:
    """Nothing is computed where requests are answered: the monitor does it at its next look."""
    asked = lane.request("POST", "/monitoring/risk/drift/check")

    assert asked.status_code == 202
    assert asked.json()["is_watched"] is True
    assert asked.json()["latest"]["report"] == {"features": []}


def test_an_incident_is_acknowledged_once_and_by_name(lane: ServerLane) -> None:
    """Whoever comes second sees who was first; what has ended needs nobody."""
    first = ok(lane.request("POST", f"/incidents/{OPEN.id}/ack"))
    again = ok(lane.request("POST", f"/incidents/{OPEN.id}/ack"))

    assert (first["status"], again) == ("acknowledged", first)
    refused(lane.request("POST", f"/incidents/{RESOLVED.id}/ack"), 409, "incident_resolved")
    refused(lane.request("POST", f"/incidents/{uuid4()}/ack"), 404, "incident_unknown")
    refused(lane.request("POST", "/incidents/seven/ack"), 422, "invalid_field")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/monitoring/nope/drift"),
        ("GET", "/monitoring/nope/performance"),
        ("GET", "/monitoring/nope/incidents"),
        ("GET", "/incidents?model_id=nope"),
        ("GET", "/alerts?model_id=nope"),
        ("POST", "/monitoring/nope/drift/check"),
        ("GET", "/models/nope/monitoring"),
    ],
)
def test_a_model_that_nobody_knows_is_not_found(lane: ServerLane, method: str, path: str) -> None:
    """An empty list would look like a model that is well."""
    refused(lane.request(method, path), 404, "model_unknown")


def test_settings_are_replaced_as_a_whole(lane: ServerLane) -> None:
    """What is left out is the default again, as PUT says."""
    first = ok(
        lane.request("PUT", "/models/risk/monitoring", json={"batch_rows": 500, "left_out": ["_score"]})
    )
    second = ok(lane.request("PUT", "/models/risk/monitoring", json={"batch_rows": 700}))

    assert (first["batch_rows"], first["left_out"]) == (500, ["_score"])
    assert (second["batch_rows"], second["left_out"]) == (700, [])
    assert ok(lane.request("GET", "/models/risk/monitoring")) == second


@pytest.mark.parametrize(
    "settings", [{"batch_rows": 5}, {"nonsense": 1}, {"policy": "lenient"}, [], {"challenger_policy": "ab:2"}]
)
def test_settings_that_cannot_be_are_refused_and_change_nothing(lane: ServerLane, settings: Any) -> None:
    """A monitor with settings it cannot read would watch nothing."""
    before = ok(lane.request("GET", "/models/risk/monitoring"))

    refused(lane.request("PUT", "/models/risk/monitoring", json=settings), 422, "invalid_field")

    assert ok(lane.request("GET", "/models/risk/monitoring")) == before
