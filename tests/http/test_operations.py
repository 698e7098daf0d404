"""What operators see: health, metrics, logs, the documentation pages, and how the server starts and stops."""

from __future__ import annotations

import json
import re
import select
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import zoo
from lanes import Lane, ServerLane, ask_anew, error_of, eventually, logged, ok, refused, unique
from phoenix_server import PhoenixServer
from prometheus_client.openmetrics import parser as openmetrics_parser
from prometheus_client.parser import text_string_to_metric_families as parse_metrics
from servers import wait_until

pytestmark = pytest.mark.system

Labels = dict[str, str]
parse_openmetrics: Any = openmetrics_parser.text_string_to_metric_families


def samples(text: str) -> dict[str, list[tuple[Labels, float]]]:
    """The samples of a scrape by their names."""
    found: dict[str, list[tuple[Labels, float]]] = {}
    for family in parse_metrics(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((dict(sample.labels), sample.value))
    return found


def total(lane: Lane, name: str, **labels: str) -> float:
    """The sum of a metric's samples with these labels."""
    response = lane.request("GET", "/metrics")
    assert response.status_code == 200
    return sum(
        value for found, value in samples(response.text).get(name, []) if labels.items() <= found.items()
    )


def test_health_is_live_and_ready_and_names_each_dependency(http: Lane) -> None:
    """An orchestrator restarts on the one and routes by the other."""
    assert ok(http.request("GET", "/health/live")) == {"status": "ok"}
    ready = ok(http.request("GET", "/health/ready"))
    assert ready["status"] == "ok"
    assert ready["checks"] == {
        "models": "ok",
        "devices": "ok",
        "journal": "ok",
        "features": "ok",
        "database": "ok",
        "log": "ok",
    }
    assert ready["models_failed"] == ready["models_displaced"] == {}


def test_requests_are_counted_once_whichever_process_answered(http: Lane, server: PhoenixServer) -> None:
    """A counter per process would show a half of the truth, another half at each scrape."""
    labels = {"model": "abc", "version": "1.0.0", "role": "champion", "code": "200"}
    body = {"model_id": "abc", "model_version": "1.0.0", "features": [1, 2, 3]}
    # A pinned version has the role that the routing gives it: it is not the default's champion.
    labels["role"] = ok(http.request("POST", "/predict", json=body))["role"]
    before = total(http, "phoenix_requests_total", **labels)
    processes = set()

    for _ in range(40):
        answer = ask_anew(server.url, body).json()
        processes.add(answer["prediction_id"][-11:])

    for _ in range(5):  # whichever process is scraped
        with httpx.Client(base_url=server.url, verify=False) as client:
            scraped = samples(client.get("/metrics").text)["phoenix_requests_total"]
        counted = sum(value for found, value in scraped if found == labels)
        assert counted == before + 40


def test_what_is_measured_of_a_prediction(http: Lane) -> None:
    """Latency, the store's and the engine's part of it, and where the values came from."""
    model = {"model": "people", "version": "1.0.0"}
    entity = unique()
    ok(http.request("PUT", f"/features/{entity}", json={"features": {"income": 1, "visits": 2}}))

    def measured() -> list[float]:
        return [
            total(http, "phoenix_request_seconds_count", **model),
            total(http, "phoenix_inference_seconds_count", **model),
            total(http, "phoenix_feature_read_seconds_count", model="people"),
            total(http, "phoenix_predictions_total", **model, strategy="single", role="champion"),
            total(http, "phoenix_feature_values_total", model="people", source="store"),
            total(http, "phoenix_feature_values_total", model="people", source="request"),
            total(http, "phoenix_feature_values_total", model="people", source="default"),
            total(http, "phoenix_feature_values_total", model="people", source="missing"),
        ]

    before = measured()
    body = {"model_id": "people", "entity_id": entity, "features": {"age": 3}}
    ok(http.request("POST", "/predict", json=body))

    rise = [now - then for now, then in zip(measured(), before, strict=True)]
    assert rise == [1, 1, 1, 1, 2, 1, 1, 1]
    assert total(http, "phoenix_request_seconds_sum", **model) > 0


@pytest.mark.parametrize(
    ("path", "body", "labels"),
    [
        ("/predict", {"model_id": "abc", "features": [1]}, {"model": "abc", "code": "422"}),
        ("/predict", {"model_id": "nowhere", "features": [1]}, {"model": "other", "code": "404"}),
        ("/predict", [], {"model": "other", "code": "422"}),
        (
            "/predict/batch",
            {"model_id": "abc", "instances": [{"features": [1, 2, 3]}]},
            {"model": "abc", "role": "batch", "code": "200"},
        ),
        (
            "/feedback",
            {"prediction_id": "01928c5a-0000-7000-8000-000000000000", "outcome": 1},
            {"role": "feedback", "code": "202"},
        ),
    ],
)
def test_every_answer_is_counted_under_its_code(
    http: Lane, path: str, body: Any, labels: dict[str, str]
) -> None:
    """An alert on errors needs the errors."""
    before = total(http, "phoenix_requests_total", **labels)

    http.request("POST", path, json=body)

    assert total(http, "phoenix_requests_total", **labels) == before + 1


INFER = {"inputs": [{"name": "row", "shape": [1, 1], "datatype": "INT64", "data": [99]}]}


@pytest.mark.parametrize(
    ("path", "body", "labels"),
    [
        ("/predict", {"model_id": "abc", "features": [1]}, ("abc", "1.1.0", "champion", "422")),
        (
            "/predict",
            {"model_id": "abc", "model_version": "1.0.0", "features": [1]},
            ("abc", "1.0.0", "challenger", "422"),
        ),
        ("/predict", {"model_id": "abc", "entity_id": "nobody"}, ("abc", "1.1.0", "champion", "404")),
        ("/predict", {"model_id": "lookup", "features": [99]}, ("lookup", "1.0.0", "champion", "422")),
        (
            "/predict/batch",
            {"model_id": "lookup", "instances": [{"features": [1]}, {"features": [99]}]},
            ("lookup", "1.0.0", "batch", "422"),
        ),
        (
            "/predict/batch",
            {"model_id": "abc", "instances": [{"features": [1]}]},
            ("abc", "1.1.0", "batch", "422"),
        ),
        ("/v2/models/lookup/infer", INFER, ("lookup", "1.0.0", "champion", "400")),
        ("/v2/models/lookup/infer", {"inputs": []}, ("lookup", "1.0.0", "champion", "400")),
        ("/v2/models/outer/versions/1.0.0/infer", {"inputs": []}, ("outer", "1.0.0", "champion", "400")),
        ("/predict", {"model_id": "outer", "features": [1]}, ("outer", "1.0.0", "champion", "422")),
        (
            "/predict",
            {"model_id": "abc", "model_version": "9.9.9", "features": [1]},
            ("abc", "", "", "404"),
        ),
    ],
)
def test_a_request_that_fails_is_counted_for_the_version_that_was_to_answer(
    lane: Lane, http: Lane, path: str, body: Any, labels: tuple[str, ...]
) -> None:
    """A new version that fails has to show beside the old one that does not."""
    named = dict(zip(("model", "version", "role", "code"), labels, strict=True))
    before = total(http, "phoenix_requests_total", **named)

    lane.request("POST", path, json=body)

    assert total(http, "phoenix_requests_total", **named) == before + 1


def test_names_from_outside_never_become_labels(http: Lane) -> None:
    """Else anybody could fill the metrics with names until they no longer fit into memory."""
    stranger = unique("stranger")

    http.request("POST", "/predict", json={"model_id": stranger, "features": [1]})
    http.request("POST", "/predict", json={"model_id": "abc", "model_version": stranger, "features": [1]})
    http.request("GET", f"/models/{stranger}")

    assert stranger not in http.request("GET", "/metrics").text


def test_metrics_are_in_the_format_that_is_asked_for(http: Lane) -> None:
    """Prometheus asks for OpenMetrics, a person with curl for text."""
    plain = http.request("GET", "/metrics")
    wanted = {"accept": "application/openmetrics-text;version=1.0.0,text/plain;q=0.5"}
    openmetrics = http.request("GET", "/metrics", headers=wanted)

    assert plain.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert openmetrics.headers["content-type"].startswith("application/openmetrics-text")
    assert openmetrics.text.endswith("# EOF\n")
    names = {family.name for family in parse_openmetrics(openmetrics.text)}
    assert {"phoenix_requests", "phoenix_request_seconds", "phoenix_journal_lag_seconds"} <= names


def test_journal_bytes_and_lag_rise_while_nothing_is_logged_and_fall_after(
    http: Lane, server: PhoenixServer
) -> None:
    """The gauges that tell of a log that stands still, before the disk is full."""
    ok(http.request("POST", "/predict", json={"model_id": "abc", "features": [1, 2, 3]}))
    wait_until(lambda: total(http, "phoenix_journal_bytes") > 0, 60, "the gauge tells of the journal's bytes")
    server.kill_child("background", signal.SIGSTOP)
    try:
        answer = ok(http.request("POST", "/predict", json={"model_id": "abc", "features": [1, 2, 3]}))
        refused(http.request("GET", f"/predictions/{answer['prediction_id']}"), 404, "prediction_unknown")
    finally:
        server.kill_child("background", signal.SIGCONT)

    logged(http, answer["prediction_id"])
    wait_until(
        lambda: (
            total(http, "phoenix_journal_pending_bytes") == 0 == total(http, "phoenix_journal_lag_seconds")
        ),
        60,
        "the gauges say that nothing waits",
    )
    assert total(http, "phoenix_log_rows_total") > 0
    assert total(http, "phoenix_log_dead_total") == 0
    assert total(http, "phoenix_journal_damage_total") == 0


def test_the_documentation_page_loads_nothing_from_elsewhere(http: Lane) -> None:
    """It has to work on a machine without internet, and must not tell anybody who reads it."""
    page = http.request("GET", "/docs")

    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    linked = re.findall(r"(?:src|href)=[\"']([^\"']+)[\"']", page.text)
    assert linked
    for address in linked:
        assert address.startswith("/"), address
        asset = http.request("GET", address)
        assert asset.status_code == 200, address
        assert asset.content
    assert "://" not in re.sub(r"http://www\.w3\.org\S*", "", page.text)


def test_the_api_describes_itself_completely(http: Lane) -> None:
    """Clients are generated from it."""
    described = ok(http.request("GET", "/openapi.json"))

    operations = {f"{method.upper()} {path}" for path, item in described["paths"].items() for method in item}
    assert {
        "POST /predict",
        "POST /predict/batch",
        "POST /feedback",
        "GET /models",
        "POST /models",
        "GET /models/{model_id}",
        "GET /models/{model_id}/versions/{version}",
        "POST /models/{model_id}/versions/{version}/stage",
        "POST /models/{model_id}/versions/{version}/activate",
        "POST /models/{model_id}/versions/{version}/deactivate",
        "GET /models/{model_id}/routing",
        "PUT /models/{model_id}/routing",
        "GET /features/{entity_id}",
        "PUT /features/{entity_id}",
        "POST /features",
        "GET /predictions",
        "GET /predictions/{prediction_id}",
        "GET /health/live",
        "GET /health/ready",
        "GET /metrics",
    } <= operations
    body = described["paths"]["/predict"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert set(body["properties"]) >= {"model_id", "entity_id", "features", "routing_key", "request_id"}
    assert "$ref" not in str(body)


def test_the_root_leads_to_something(http: Lane) -> None:
    """The first thing that anybody opens."""
    response = http.request("GET", "/")

    assert response.status_code in (200, 307)


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "path_unknown"),
        ("POST", "/predict/nowhere", 404, "path_unknown"),
        ("GET", "/PREDICT", 404, "path_unknown"),
        ("GET", "/../etc/passwd", 404, "path_unknown"),
        ("GET", "/docs/%2e%2e/%2e%2e/etc/passwd", 404, "path_unknown"),
        ("GET", "/predict", 405, "method_not_allowed"),
        ("PUT", "/predict", 405, "method_not_allowed"),
        ("DELETE", "/predict/batch", 405, "method_not_allowed"),
        ("GET", "/feedback", 405, "method_not_allowed"),
        ("DELETE", "/models", 405, "method_not_allowed"),
        ("POST", "/predictions", 405, "method_not_allowed"),
        ("POST", "/metrics", 405, "method_not_allowed"),
        ("PATCH", "/predict", 405, "method_not_allowed"),
    ],
)
def test_paths_and_methods_that_do_not_exist_are_errors_like_all_others(
    lane: Lane, method: str, path: str, status: int, code: str
) -> None:
    """A client parses one shape."""
    error = refused(lane.request(method, path), status, code)

    assert "/docs" in error["message"]


def test_a_request_keeps_the_id_it_came_with_and_else_gets_one(http: Lane) -> None:
    """A trace goes through several services."""
    given = http.request("GET", "/health/live", headers={"x-request-id": "trace-1"})
    made = [http.request("GET", "/health/live").headers["x-request-id"] for _ in range(2)]

    assert given.headers["x-request-id"] == "trace-1"
    assert made[0] != made[1]


@pytest.mark.parametrize("given", ["", "x" * 129, "a\tb", "ü".encode()])
def test_a_request_id_that_is_unfit_for_a_header_is_replaced(http: Lane, given: str | bytes) -> None:
    """What comes in goes out again, into logs and headers."""
    response = http.request("GET", "/health/live", headers={"x-request-id": given})

    assert re.fullmatch(r"[0-9a-f-]{36}", response.headers["x-request-id"])


def test_a_request_id_that_could_split_a_header_is_not_echoed(lane: Lane) -> None:
    """A line break in a header is an answer of the attacker's own."""
    body = {"model_id": "abc", "features": [1, 2, 3], "request_id": "a\r\nset-cookie: x=1"}

    response = lane.request("POST", "/predict", json=body)

    answer = ok(response)
    assert "set-cookie" not in response.headers
    assert logged(lane, answer["prediction_id"])["request_id"] == body["request_id"]


def test_logs_are_json_lines_with_level_process_and_request_id(http: Lane, server: PhoenixServer) -> None:
    """A log that machines read is found by what it is about."""
    request_id = unique("trace")

    ok(http.request("POST", "/models/managed/versions/1.0.0/activate", headers={"x-request-id": request_id}))

    wait_until(lambda: request_id in server.log(), 30, "the call is logged")
    record = next(record for record in server.log_records() if record.get("request_id") == request_id)
    assert record["message"] == "POST /models/managed/versions/1.0.0/activate 200"
    assert record["level"] == "INFO"
    assert record["process"].startswith("api-")
    assert record["timestamp"]
    assert record["duration_ms"] > 0
    strange = [line for line in server.log().splitlines() if line and not line.startswith("{")]
    assert all("Phoenix ML" in line or "Ctrl-C" in line for line in strange), strange


def test_answers_do_not_tell_what_the_server_runs_on(http: Lane) -> None:
    """Whoever looks for a hole begins with the version."""
    assert "server" not in http.request("GET", "/health/live").headers
    assert "server" not in http.request("POST", "/predict", json={}).headers


def test_pipelined_requests_are_answered_in_order(server: PhoenixServer) -> None:
    """HTTP/1.1 allows it, and proxies do it."""
    request = (
        b"POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n%b"
        b"GET /health/live HTTP/1.1\r\nhost: localhost\r\n\r\n"
        b"POST /predict HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%b"
    )
    first = b'{"model_id":"abc","features":[1,2,3]}'
    second = b'{"model_id":"signs","features":[1]}'
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(request % (len(first), first, len(second), second))
        received = b""
        while chunk := connection.recv(65_536):
            received += chunk

    assert received.count(b"HTTP/1.1 200 OK") == 3
    places = [received.find(part) for part in (b'"model_id":"abc"', b'{"status":"ok"}', b'"signs"')]
    assert -1 not in places
    assert places == sorted(places)


# A server of their own: these tests end it, or take something away from it.


@pytest.fixture(scope="module")
def module_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PhoenixServer]:
    folder = tmp_path_factory.mktemp("troubled")
    limits = {"journal_limit_bytes": 256 * 1024, "journal_segment_bytes": 4096, "queue_deadline_ms": 60_000}
    server = PhoenixServer(folder, **limits)
    server.register(zoo.linear(folder / "abc.onnx", [1, 2, 3]), "abc", "1.0.0")
    # So slow that requests come faster than they are answered, however busy the machine is that sends them.
    server.register(zoo.slow(folder / "slow.onnx", 1000), "slow", "1.0.0")
    yield server
    server.kill()


@pytest.fixture
def troubled(module_server: PhoenixServer) -> PhoenixServer:
    """A running server with the models `abc` and `slow`, and a journal of 64 KiB, that tests may end."""
    if not (module_server.is_ready and module_server.exit_code is None):
        module_server.start()
    return module_server


ABC = {"model_id": "abc", "features": [1, 2, 3]}
ASK_SLOW = b'POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-length: 36\r\n\r\n{"model_id":"slow","features":[1.0]}'


def connect(server: PhoenixServer) -> socket.socket:
    """A connection that the server has accepted: it was used once."""
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    connection.sendall(b"GET /health/live HTTP/1.1\r\nhost: localhost\r\n\r\n")
    assert read_answer(connection).startswith(b"HTTP/1.1 200")
    return connection


def read_answer(connection: socket.socket) -> bytes:
    """One answer with its body; what there is of it when the other side closes."""
    received = b""
    while True:
        head, end, body = received.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        if end and length and len(body) >= int(length[1]):
            return received
        chunk = connection.recv(65_536)
        if not chunk:
            return received
        received += chunk


def test_a_process_that_dies_is_replaced_and_no_request_meets_a_server_that_knows_nothing(
    troubled: PhoenixServer,
) -> None:
    """While the new process reads the registry it must not call every model unknown."""
    answers: list[httpx.Response] = []
    over = threading.Event()

    def keep_asking() -> None:
        while not over.is_set():
            try:
                answers.append(ask_anew(troubled.url, ABC))
            except httpx.HTTPError:
                continue  # the connection of the process that was killed

    askers = [threading.Thread(target=keep_asking) for _ in range(3)]
    killed = troubled.kill_child("api-0")
    for asker in askers:
        asker.start()
    try:
        troubled.wait_for_child("api-0", after=killed)
        wait_until(lambda: len(answers) > 20, 60, "the new process answers")
    finally:
        over.set()
        for asker in askers:
            asker.join()

    assert {answer.status_code for answer in answers} == {200}
    with httpx.Client(base_url=troubled.url, verify=False) as client:
        restarts = samples(client.get("/metrics").text)["phoenix_process_restarts_total"]
    assert restarts == [({"slot": "api-0"}, 1.0)]


def test_a_full_journal_refuses_with_503_until_the_log_has_caught_up(troubled: PhoenixServer) -> None:
    """An answer that cannot be put on record is not given; and nobody has to repair anything afterwards."""
    rows = {"model_id": "abc", "instances": [{"features": [1, 2, 3]}] * 50}
    lane = ServerLane(troubled.url)
    troubled.kill_child("background", signal.SIGSTOP)
    try:
        full = eventually(
            lambda: lane.request("POST", "/predict/batch", json=rows),
            lambda response: response.status_code != 200,
            "the journal is full",
        )
        ready_while_full = lane.request("GET", "/health/ready")
    finally:
        troubled.kill_child("background", signal.SIGCONT)
    caught_up = eventually(
        lambda: lane.request("POST", "/predict/batch", json=rows),
        lambda response: response.status_code == 200,
        "there is room again",
    )
    ready_again = eventually(
        lambda: lane.request("GET", "/health/ready"),
        lambda response: response.json()["checks"]["journal"] == "ok",
        "the journal takes events again",
    )
    lane.close()

    assert (ready_while_full.status_code, ready_while_full.json()["status"]) == (503, "unavailable")
    assert ready_while_full.json()["checks"]["journal"].startswith("full: ")
    assert ready_again.status_code == 200
    assert refused(full, 503, "journal_full")["message"]
    assert int(full.headers["retry-after"]) >= 1
    assert len(caught_up.json()["predictions"]) == 50


def test_a_full_journal_that_drops_degrades_the_server_and_takes_it_out_of_no_rotation(
    tmp_path: Path,
) -> None:
    """Whoever chose answers over records would lose both to a load balancer that hears 503."""
    limits = {"journal_limit_bytes": 64 * 1024, "journal_segment_bytes": 4096}
    server = PhoenixServer(tmp_path, roles="none", journal_full="drop", **limits)
    server.register(zoo.linear(tmp_path / "abc.onnx", [1, 2, 3]), "abc", "1.0.0")
    rows = {"model_id": "abc", "instances": [{"features": [1, 2, 3]}] * 50}
    with server:
        lane = ServerLane(server.url)
        ready = eventually(
            lambda: (lane.request("POST", "/predict/batch", json=rows), lane.request("GET", "/health/ready"))[
                1
            ],
            lambda response: response.json()["checks"]["journal"] != "ok",
            "the journal is full",
        )
        answered = lane.request("POST", "/predict", json=ABC)
        lane.close()

    assert (ready.status_code, ready.json()["status"]) == (200, "degraded")
    assert re.fullmatch(
        r"full: \d+ bytes wait to be logged; predictions are answered and not on record",
        ready.json()["checks"]["journal"],
    )
    assert answered.status_code == 200


def test_too_many_waiting_requests_are_refused_at_once_and_all_others_answered(
    troubled: PhoenixServer,
) -> None:
    """A queue without end answers everybody too late; a bounded one answers most in time."""
    connections = [connect(troubled) for _ in range(400)]
    for connection in connections:
        connection.sendall(ASK_SLOW)
    answers = [read_answer(connection) for connection in connections]
    for connection in connections:
        connection.close()

    refusals = [answer for answer in answers if answer[9:12] == b"503"]
    assert {answer[9:12] for answer in answers} == {b"200", b"503"}
    assert all(b'"overloaded"' in answer and b"retry-after: 1" in answer for answer in refusals)
    assert len(refusals) <= 400 - 256


def test_an_artifact_store_that_cannot_be_written_is_no_fault_of_the_model(troubled: PhoenixServer) -> None:
    """A full disk is the operator's to mend, and the upload may be tried again."""
    store = troubled.data / "artifacts"
    aside = store.rename(troubled.data / "aside")
    store.touch()
    new = zoo.linear(troubled.folder / "new.onnx", [1, 1]).read_bytes()
    model = {"model": '{"id": "new", "version": "1.0.0"}'}
    lane = ServerLane(troubled.url)
    try:
        refusal = lane.request("POST", "/models", files={"artifact": new}, data=model)
        meanwhile = ok(lane.request("POST", "/predict", json=ABC))
    finally:
        store.unlink()
        aside.rename(store)
    registered = ok(lane.request("POST", "/models", files={"artifact": new}, data=model), 201)
    lane.close()

    refused(refusal, 503, "artifact_store_unavailable")
    assert int(refusal.headers["retry-after"]) >= 1
    assert meanwhile["result"] == 14
    assert registered["id"] == "new"


def test_a_stop_finishes_what_is_in_flight_and_exits_with_0(troubled: PhoenixServer) -> None:
    """A deployment stops servers all day long, and nobody should notice."""
    connections = [connect(troubled) for _ in range(60)]
    for connection in connections:
        connection.sendall(ASK_SLOW)
    answers = [read_answer(connections[0])]
    answered, _, _ = select.select(connections[1:], [], [], 0)

    code = troubled.stop()
    answers += [read_answer(connection) for connection in connections[1:]]
    for connection in connections:
        connection.close()

    assert code == 0
    assert len(answered) < 59, "nobody waited when the stop began"
    assert [answer[9:12] for answer in answers] == [b"200"] * 60
    ids = {json.loads(answer.partition(b"\r\n\r\n")[2])["prediction_id"] for answer in answers}
    with troubled.opened() as phoenix:
        on_record = [phoenix.prediction_log.get(one).id for one in ids]
    assert len(on_record) == 60


def test_an_artifact_that_is_gone_fails_its_version_alone(module_server: PhoenixServer) -> None:
    """A damaged disk must cost one model and be found in health, not take the server down."""
    server = module_server
    if server.exit_code is None:
        server.stop()
    lost = server.register(zoo.linear(server.folder / "lost.onnx", [5]), "lost", "1.0.0")
    (server.data / "artifacts" / lost.uri).unlink()
    server.start()

    lane = ServerLane(server.url)
    error = refused(
        lane.request("POST", "/predict", json={"model_id": "lost", "features": [1]}), 500, "model_load_failed"
    )
    other = ok(lane.request("POST", "/predict", json=ABC))
    ready = ok(lane.request("GET", "/health/ready"))
    failed_loads = total(lane, "phoenix_model_loads_total", model="lost", outcome="failed")
    labels = {"model": "lost", "version": "1.0.0", "role": "champion", "code": "500"}
    failed_requests = total(lane, "phoenix_requests_total", **labels)
    lane.close()

    assert error["details"]["sha256"] == lost.sha256
    assert error["details"]["framework"] == "onnx"
    assert lost.sha256 in error["details"]["path"]
    assert other["result"] == 14
    assert ready["status"] == "degraded"
    assert "lost 1.0.0" in ready["checks"]["models"]
    assert list(ready["models_failed"]) == ["lost 1.0.0"]
    assert failed_loads >= 1
    assert failed_requests == 1


def test_an_error_without_a_body_is_an_error_of_the_same_shape(http: Lane) -> None:
    """Nothing answers with a bare text."""
    for path in ("/models/nowhere", "/features/nobody", "/nowhere"):
        error_of(http.request("GET", path))


@pytest.mark.parametrize("path", ["/health/live", "/health/ready"])
def test_health_answers_head_requests(http: Lane, path: str) -> None:
    """Some load balancers ask with HEAD."""
    response = http.request("HEAD", path)

    assert (response.status_code, response.content) == (200, b"")
