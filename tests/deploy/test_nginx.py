"""The nginx of the deployment, before two real servers that share one database and one artifact store."""

from __future__ import annotations

import re
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import onnx
import onnx_models
import pytest
from deploy_servers import DEPLOY, NginxServer
from phoenix_server import PhoenixServer
from servers import wait_until
from traffic import await_logged

from phoenix_ml.settings import Settings

pytestmark = pytest.mark.system

MIB = 1024 * 1024
PREDICT = {"model_id": "linear", "features": [1, 2, 3]}


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[PhoenixServer]]:
    """Two servers with a journal each; what one registers, the other serves."""
    folder = tmp_path_factory.mktemp("deploy")
    shared: dict[str, Any] = {
        "database": f"sqlite:///{folder}/phoenix.db",
        "artifacts": f"file:{folder}/artifacts",
    }
    first, second = (
        PhoenixServer(folder / name, registry_poll_ms=100, **shared) for name in ("api-1", "api-2")
    )
    first.register(
        onnx_models.write(folder / "linear.onnx", onnx_models.linear_regressor()), "linear", "1.0.0"
    )
    with first, second:
        yield [first, second]


@pytest.fixture(scope="module")
def nginx(replicas: list[PhoenixServer]) -> Iterator[NginxServer]:
    """nginx, started as in the container."""
    with NginxServer([server.port for server in replicas]) as server:
        yield server


@pytest.fixture
def client(nginx: NginxServer) -> Iterator[httpx.Client]:
    """A client that trusts the certificate of make_certificate.sh."""
    with nginx.client() as opened:
        yield opened


def _answered(server: PhoenixServer) -> int:
    """How many predictions a server has answered since its start."""
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    counts = [line for line in lines if line.startswith("phoenix_predictions_total{")]
    return sum(int(float(line.rpartition(" ")[2])) for line in counts)


def test_requests_go_to_both_servers_in_turn(client: httpx.Client, replicas: list[PhoenixServer]) -> None:
    """Two replicas carry the load of two, over connections that nginx keeps open."""
    before = [_answered(server) for server in replicas]

    codes = Counter(client.post("/predict", json=PREDICT).status_code for _ in range(200))

    assert codes == {200: 200}
    after = [_answered(server) for server in replicas]
    shares = [there - then for there, then in zip(after, before, strict=True)]
    assert sum(shares) == 200
    assert min(shares) >= 80


def test_http_leads_to_https(nginx: NginxServer) -> None:
    """A POST by a client that follows stays the same POST: 308, not 301."""
    response = httpx.post(f"http://localhost:{nginx.http_port}/predict?a=1", json=PREDICT)

    assert response.status_code == 308
    assert response.headers["location"] == f"{nginx.url}/predict?a=1"


def test_the_certificate_is_checked(nginx: NginxServer) -> None:
    """Who does not know the self-signed certificate does not talk to the server."""
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(f"{nginx.url}/health/live")


def test_a_page_of_the_server_may_send_requests(client: httpx.Client, nginx: NginxServer) -> None:
    """The documentation page works through nginx, as the name under which the browser knows it is passed on."""
    response = client.post("/predict", json=PREDICT, headers={"origin": nginx.url})

    assert response.status_code == 200


def test_a_page_of_another_site_may_not(client: httpx.Client) -> None:
    """nginx does not take the protection against other sites' pages away."""
    response = client.post("/predict", json=PREDICT, headers={"origin": "https://evil.example"})

    assert response.status_code == 403
    assert response.json()["error"]["code"] == "cross_site_request"


def test_a_large_model_passes_without_being_collected(client: httpx.Client, nginx: NginxServer) -> None:
    """An upload far above the limit of other requests is registered, and nginx wrote none of it to its disk."""
    model = onnx.load_from_string(onnx_models.linear_regressor())
    model.doc_string = "x" * 20 * MIB

    response = client.post(
        "/models",
        files={"artifact": model.SerializeToString()},
        data={"model": '{"id": "large", "version": "1.0.0"}'},
    )

    assert response.status_code == 201, response.text
    assert nginx.buffered_bodies() == 0


def test_a_large_batch_passes(client: httpx.Client, nginx: NginxServer) -> None:
    """What does not fit into nginx's memory goes through its own folder, which its workers may write to."""
    instances = [{"features": [1, 2, 3], "entity_id": "e" * 200}] * 1000

    response = client.post("/predict/batch", json={"model_id": "linear", "instances": instances})

    assert response.status_code == 200
    assert nginx.buffered_bodies() >= 1
    assert len(response.json()["predictions"]) == 1000


def test_a_body_above_the_limit_is_refused_in_our_form(client: httpx.Client) -> None:
    """nginx refuses it, and a program finds the error where it looks for Phoenix's."""
    response = client.post("/predict", content=b" " * (10 * MIB + 1))

    assert response.status_code == 413
    assert response.json()["error"]["code"] == "body_too_large"


def test_the_limits_are_those_of_the_settings() -> None:
    """A body that nginx lets through and Phoenix refuses half-way would count as a server that failed."""
    limits = re.findall(r"client_max_body_size (\d+)m;", (DEPLOY / "nginx" / "nginx.conf").read_text())

    fields = (Settings.model_fields[name] for name in ("body_limit_bytes", "upload_limit_bytes"))
    assert [field.default for field in fields] == [int(limit) * MIB for limit in limits]


def test_metrics_are_not_shown_outside(client: httpx.Client) -> None:
    """One replica's numbers, now of this and now of that one, would mislead."""
    response = client.get("/metrics")

    assert response.status_code == 404
    assert response.json()["error"]["code"] == "path_unknown"


def test_a_request_id_is_the_same_inside_and_outside(client: httpx.Client) -> None:
    """The caller's id is found in the logs of both."""
    response = client.post("/predict", json=PREDICT, headers={"x-request-id": "order-17"})

    assert response.headers["x-request-id"] == "order-17"


def test_no_request_fails_after_a_server_died(
    client: httpx.Client, nginx: NginxServer, replicas: list[PhoenixServer]
) -> None:
    """The dead one is passed over, POSTs included, and takes its share again when it is back."""
    dying, _ = replicas
    assert {client.post("/predict", json=PREDICT).status_code for _ in range(10)} == {200}

    dying.kill()
    codes = Counter(client.post("/predict", json=PREDICT).status_code for _ in range(200))

    assert codes == {200: 200}
    dying.start()
    before = _answered(dying)

    def is_asked_again() -> bool:
        assert client.post("/predict", json=PREDICT).status_code == 200
        return _answered(dying) > before

    wait_until(is_asked_again, 30, "the server that came back is asked again")


def test_a_prediction_that_may_be_on_record_is_not_asked_twice(
    nginx: NginxServer, replicas: list[PhoenixServer]
) -> None:
    """When a server dies with requests in hand their callers learn of it: none of them is sent to the other."""
    dying, staying = replicas
    before = _answered(staying)

    def ask() -> httpx.Response:
        with nginx.client() as one:
            return one.post("/predict", json=PREDICT)

    dying.kill_child("api-0", signal.SIGSTOP)
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask) for _ in range(8)]
        wait_until(lambda: sum(one.done() for one in asked) >= 3, 60, "the other server answers its share")
        dying.kill()
        answers = [one.result() for one in asked]
    dying.start()

    lost = [one for one in answers if one.status_code != 200]
    assert lost
    assert {(502, "no_answer")} == {(one.status_code, one.json()["error"]["code"]) for one in lost}
    assert _answered(staying) - before == len(answers) - len(lost)


def test_every_answer_is_on_record_once(client: httpx.Client, replicas: list[PhoenixServer]) -> None:
    """What was answered through nginx by either server is found in the one log."""
    answers: list[dict[str, Any]] = [client.post("/predict", json=PREDICT).json() for _ in range(50)]

    ids = {answer["prediction_id"] for answer in answers}
    with replicas[0].opened() as phoenix:
        rows = await_logged(phoenix, "linear", ids)
    assert dict.fromkeys(ids, 1) == Counter(row.id for row in rows if row.id in ids)


def test_nobody_answers_is_said_in_our_form(tmp_path: Path) -> None:
    """While all servers are away a program gets an error that it can read."""
    with NginxServer([1, 2]) as lonely, lonely.client() as client:
        response = client.post("/predict", json=PREDICT)

    assert response.status_code == 502
    assert response.json()["error"]["code"] == "no_answer"
    assert response.headers["retry-after"] == "1"


def test_a_certificate_is_never_overwritten(tmp_path: Path) -> None:
    """The pair may be a real one by now."""
    script = DEPLOY / "nginx" / "make_certificate.sh"
    environment = {"PHOENIX_SITE": str(tmp_path), "PATH": "/usr/bin:/bin"}
    first = subprocess.run(
        [script, "ml.example", "10.0.0.7"], env=environment, check=True, capture_output=True
    )
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    again = subprocess.run([script], env=environment, check=False, capture_output=True, text=True)

    assert (first.returncode, again.returncode) == (0, 1)
    assert "is there already" in again.stderr
    assert made == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert (tmp_path / "certificate.key").stat().st_mode & 0o077 == 0
