"""Each trainer outside, held against a web server that answers as the interface of its kind is documented."""

import base64
import json
import logging
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from receiver import Received, Request, receiving, trickling
from servers import HOST, free_port
from standardwebhooks import Webhook

from phoenix_ml.application.ports import TrainingFailed, TrainingRequest
from phoenix_ml.domain.errors import Misconfigured
from phoenix_ml.infrastructure.training.webhook import open_remote_trainer
from phoenix_ml.infrastructure.webhooks import request_within

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
TOKEN = "topsecret-token"
REQUEST = TrainingRequest(
    run_id="phoenix-ml-0a1b-2",
    job_id="0a1b",
    model_id="risk",
    model_version="1.0.0",
    new_version="1.1.0",
    reason="income drifted",
    evidence={"income": {"distance": 0.4}},
    since_ms=1_760_000_000_123,
)
FIELDS = {
    "run_id": "phoenix-ml-0a1b-2",
    "job_id": "0a1b",
    "model_id": "risk",
    "model_version": "1.0.0",
    "new_version": "1.1.0",
    "reason": "income drifted",
    "evidence": {"income": {"distance": 0.4}},
    "since_ms": 1_760_000_000_123,
}
AIRFLOW_RUNS = "/team/api/v2/dags/retrain/dagRuns"
KUBEFLOW_RUNS = "/pipeline/apis/v2beta1/runs"
DISPATCHES = "/api/v3/repos/acme/risk/dispatches"


@pytest.fixture
def web() -> Iterator[Received]:
    with receiving() as server:
        yield server


def ask(spec: str, token: str = TOKEN) -> None:
    open_remote_trainer(spec, token).ask(REQUEST)


def shown(request: Request) -> tuple[str, str, str | None, Any]:
    """Method, path, who asks, and what."""
    body = json.loads(request.body) if request.body else None
    return request.method, request.path, request.headers.get("authorization"), body


# Webhooks.


def test_a_webhook_is_signed_so_that_the_standards_own_library_accepts_it(web: Received) -> None:
    """Whoever trains must be able to tell our request from anybody's."""
    ask(f"webhook:http://{web.host}/hook?team=ml", SECRET)

    (request,) = web.requests
    verified = Webhook(SECRET).verify(request.body, request.headers)
    assert (request.method, request.path) == ("POST", "/hook?team=ml")
    assert {key: value for key, value in verified.items() if key != "timestamp"} == {
        "type": "phoenix-ml.retrain-requested",
        "data": FIELDS,
    }
    assert verified["timestamp"].endswith("Z")


def test_a_webhook_that_is_repeated_has_the_run_id_as_its_id(web: Received) -> None:
    """By this a receiver starts one training where it was asked twice."""
    trainer = open_remote_trainer(f"webhook:http://{web.host}/", "")
    trainer.ask(REQUEST)
    trainer.ask(REQUEST)

    assert [REQUEST.run_id] * 2 == [one.headers["webhook-id"] for one in web.requests]
    assert "webhook-signature" not in web.requests[0].headers


def test_the_user_in_the_url_of_a_webhook_is_sent_as_basic_authentication(web: Received) -> None:
    """Receivers behind a proxy often know nothing else."""
    ask(f"webhook:http://ml:p%40ss@{web.host}/hook", "")

    expected = base64.b64encode(b"ml:p@ss").decode()
    assert f"Basic {expected}" == web.requests[0].headers["authorization"]


# Airflow.


def test_airflow_is_asked_for_a_dag_run_of_our_id(web: Received) -> None:
    """Airflow 3 wants ``logical_date``, if only as null, and refuses what it does not know."""
    web.answers["POST", AIRFLOW_RUNS] = (200, {"dag_run_id": REQUEST.run_id, "state": "queued"})
    ask(f"airflow:http://{web.host}/team/retrain")

    (request,) = web.requests
    body = {"dag_run_id": REQUEST.run_id, "logical_date": None, "conf": FIELDS}
    assert ("POST", AIRFLOW_RUNS, f"Bearer {TOKEN}", body) == shown(request)
    assert request.headers["content-type"] == "application/json"


def test_a_dag_run_that_airflow_has_already_is_asked_for(web: Received) -> None:
    """A healer that was killed between the request and its record asks again."""
    conflict = {"detail": {"reason": "Unique constraint violation"}}
    web.answers["POST", AIRFLOW_RUNS] = (409, conflict)

    ask(f"airflow:http://{web.host}/team/retrain")

    assert len(web.requests) == 1


def test_airflow_gives_a_token_for_the_user_in_the_url(web: Received) -> None:
    """Its tokens end after a day, so there is a new one for each request."""
    web.answers["POST", "/team/auth/token"] = (201, {"access_token": "jwt-of-today"})
    ask(f"airflow:http://ml:p%40ss@{web.host}/team/retrain", "")

    first, second = map(shown, web.requests)
    assert first == ("POST", "/team/auth/token", None, {"username": "ml", "password": "p@ss"})
    assert second[:3] == ("POST", AIRFLOW_RUNS, "Bearer jwt-of-today")


@pytest.mark.parametrize("answer", [{}, {"access_token": ""}, {"access_token": "two words"}, "a page"])
def test_an_airflow_that_gives_no_token_has_failed(web: Received, answer: Any) -> None:
    """What else a login may answer must not end the healer."""
    web.answers["POST", "/auth/token"] = (201, answer)

    with pytest.raises(TrainingFailed, match=web.host):
        ask(f"airflow:http://ml:pass@{web.host}/retrain", "")
    assert len(web.requests) == 1


def test_what_airflow_says_of_a_login_is_told_without_the_password(web: Received) -> None:
    """An answer of 422 repeats the body that it refuses, and failures are on record for many to read."""
    password = 'top"secret'
    said = {"detail": [{"msg": "no such user", "input": {"username": "ml", "password": password}}]}
    web.answers["POST", "/auth/token"] = (422, said)

    with pytest.raises(TrainingFailed, match=r"HTTP 422.*no such user") as caught:
        ask(f"airflow:http://ml:top%22secret@{web.host}/retrain", "")
    assert "secret" not in str(caught.value)


# Kubeflow Pipelines.


def test_kubeflow_is_asked_for_a_run_of_our_name(web: Received) -> None:
    """Its parameters are text and numbers, which is what a pipeline's signature says."""
    web.answers["GET", KUBEFLOW_RUNS] = (200, {})
    ask(f"kubeflow:http://{web.host}/pipeline/p-1?experiment_id=e-1&version_id=v-1")

    looked, asked = web.requests
    parameters = {**FIELDS, "evidence": '{"income":{"distance":0.4}}'}
    body = {
        "display_name": REQUEST.run_id,
        "pipeline_version_reference": {"pipeline_id": "p-1", "pipeline_version_id": "v-1"},
        "runtime_config": {"parameters": parameters},
        "experiment_id": "e-1",
    }
    predicate = {"operation": "EQUALS", "key": "display_name", "stringValue": REQUEST.run_id}
    query = parse_qs(urlsplit(looked.path).query)
    assert (looked.method, urlsplit(looked.path).path) == ("GET", KUBEFLOW_RUNS)
    assert json.loads(query.pop("filter")[0]) == {"predicates": [predicate]}
    assert query == {"page_size": ["1"], "experiment_id": ["e-1"]}
    assert looked.headers["authorization"] == f"Bearer {TOKEN}"
    assert ("POST", KUBEFLOW_RUNS, f"Bearer {TOKEN}", body) == shown(asked)


def test_kubeflow_takes_its_own_version_and_experiment_where_none_is_named(web: Received) -> None:
    """A new version of the pipeline is then used without a change of settings."""
    web.answers["GET", "/apis/v2beta1/runs"] = (200, {"runs": None})
    ask(f"kubeflow:http://{web.host}/p-1", "")

    _, _, who, body = shown(web.requests[1])
    assert (who, body["pipeline_version_reference"]) == (None, {"pipeline_id": "p-1"})
    assert "experiment_id" not in body


def test_a_run_that_kubeflow_has_already_is_not_asked_for_again(web: Received) -> None:
    """Kubeflow would start another run of the same name."""
    web.answers["GET", KUBEFLOW_RUNS] = (200, {"runs": [{"run_id": "r", "display_name": REQUEST.run_id}]})
    ask(f"kubeflow:http://{web.host}/pipeline/p-1")

    assert [one.method for one in web.requests] == ["GET"]


def test_a_kubeflow_that_answers_something_else_has_failed(web: Received) -> None:
    """The page of a login is no list of runs, and nothing was asked for."""
    web.answers["GET", KUBEFLOW_RUNS] = (200, ["a page"])

    with pytest.raises(TrainingFailed, match="does not answer as its API says"):
        ask(f"kubeflow:http://{web.host}/pipeline/p-1")
    assert [one.method for one in web.requests] == ["GET"]


# GitHub.


def test_github_is_sent_an_event_for_the_repository(web: Received) -> None:
    """It refuses a payload of more than ten properties, and answers 204 with nothing in it."""
    web.answers["POST", DISPATCHES] = (204, None)
    ask(f"github:http://{web.host}/api/v3/acme/risk")

    (request,) = web.requests
    body = {"event_type": "phoenix-ml-retrain", "client_payload": FIELDS}
    assert ("POST", DISPATCHES, f"Bearer {TOKEN}", body) == shown(request)
    assert request.headers["accept"] == "application/vnd.github+json"
    assert request.headers["x-github-api-version"] == "2022-11-28"
    assert len(body["client_payload"]) <= 10


def test_github_needs_a_token() -> None:
    """Better at the start than in the night in which a model drifts."""
    with pytest.raises(Misconfigured, match="PHOENIX_TRAINER_TOKEN") as caught:
        open_remote_trainer("github:acme/risk", " ")
    assert caught.value.details == {"setting": "PHOENIX_TRAINER_TOKEN"}


# All of them.

SPECS = {
    "webhook": "webhook:http://ml:topsecret-password@{host}/topsecret-path",
    "airflow": "airflow:http://{host}/team/retrain",
    "kubeflow": "kubeflow:http://{host}/pipeline/p-1",
    "github": "github:http://{host}/api/v3/acme/risk",
}


def token_of(kind: str) -> str:
    return SECRET if kind == "webhook" else TOKEN


@pytest.mark.parametrize("status", [302, 401, 422, 500])
@pytest.mark.parametrize("kind", SPECS)
def test_what_is_refused_is_told_without_secrets(
    web: Received, kind: str, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The reason helps whoever repairs it, and is on record for many to read. Nothing follows a redirect."""
    basic = base64.b64encode(b"ml:topsecret-password").decode()
    mine = [SECRET, "topsecret-password", basic] if kind == "webhook" else [TOKEN]
    said = {"message": f"not you: {' '.join(mine)} at /topsecret-path", "more": "x" * 1000}
    for path in ("/topsecret-path", AIRFLOW_RUNS, KUBEFLOW_RUNS, DISPATCHES):
        web.answers["POST", path] = web.answers["GET", path] = (status, said)

    with caplog.at_level(logging.INFO), pytest.raises(TrainingFailed) as caught:
        ask(SPECS[kind].format(host=web.host), token_of(kind))

    told = str(caught.value)
    assert told.startswith(f"{web.host} answers HTTP {status}: ")
    assert "not you: ***" in told
    assert len(told) <= len(f"{web.host} answers HTTP {status}: ") + 200
    assert not [one for one in mine if one in told + caplog.text]
    assert kind != "webhook" or "topsecret" not in told
    assert len(web.requests) == 1


def test_a_refusal_without_words_is_told_with_its_status(web: Received) -> None:
    """An empty reason would look like a message that was cut off."""
    web.status = 503

    with pytest.raises(TrainingFailed, match="HTTP 503: no reason given"):
        ask(f"webhook:http://{web.host}/", "")


@pytest.mark.parametrize("kind", SPECS)
def test_a_dead_port_is_a_failure(kind: str) -> None:
    """Another attempt may find the trainer back."""
    host = f"{HOST}:{free_port()}"
    with pytest.raises(TrainingFailed, match=r"cannot be asked: ConnectError.*refused") as caught:
        ask(SPECS[kind].format(host=host), token_of(kind))
    assert host in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_server_that_never_answers_is_given_up() -> None:
    """It accepts the connection and says nothing: the worst kind of dead."""
    with socket.create_server((HOST, 0)) as silent:
        trainer = open_remote_trainer(f"webhook:http://{HOST}:{silent.getsockname()[1]}/", "", timeout_s=0.2)
        with pytest.raises(TrainingFailed, match="ReadTimeout"):
            trainer.ask(REQUEST)


@pytest.mark.parametrize(
    "start", [b"HTTP/1.1 200 OK\r\ncontent-length: 1000000\r\n\r\n", b"HTTP/1.1 200 OK\r\nx-slow: "]
)
def test_a_server_that_answers_a_byte_at_a_time_is_given_up(start: bytes) -> None:
    """Each byte comes in time, the last one tomorrow: meanwhile no model would be healed."""
    with trickling(start) as port:
        trainer = open_remote_trainer(f"webhook:http://{HOST}:{port}/", "", timeout_s=0.5)
        with pytest.raises(TrainingFailed, match=r"ReadTimeout: no whole answer within 0\.5 s"):
            trainer.ask(REQUEST)


def test_of_an_answer_without_end_no_more_is_read_than_is_wanted(web: Received) -> None:
    """A server of somebody else's decides what it sends, and must not fill our memory."""
    web.answers["POST", "/"] = (200, "x" * 1_000_000)

    assert request_within(10.0, 1000, "POST", f"http://{web.host}/") == (200, b'"' + b"x" * 999)


AIRFLOW = "write airflow:https://HOST/DAG_ID"
KUBEFLOW = "write kubeflow:https://HOST/PIPELINE_ID"
GITHUB = "write github:OWNER/REPO, or github:https://HOST/api/v3/OWNER/REPO"


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("topsecret", "without a kind is no trainer: write process:COMMAND, webhook:…, airflow:…"),
        ("https://x.example/topsecret", "https: is no trainer: write process:COMMAND"),
        ("webhook:", "write webhook:https://HOST/PATH"),
        ("webhook:x.example/topsecret", "no http:// or https:// URL"),
        ("webhook:ftp://x.example/topsecret", "no http:// or https:// URL"),
        ("webhook:http://[topsecret", "no http:// or https:// URL"),
        ("webhook:http:///topsecret", "no http:// or https:// URL"),
        ("airflow:https://x.example", AIRFLOW),
        ("airflow:https://x.example/team//dag", AIRFLOW),
        ("airflow:https://x.example/dag?topsecret=1", AIRFLOW),
        ("airflow:https://topsecret@x.example/dag", "a user in the URL and PHOENIX_TRAINER_TOKEN"),
        ("airflow:https://ml:12/topsecret@x.example/dag", "in a password, @"),
        ("airflow:https://ml:12?topsecret@x.example/dag", "in a password, @"),
        ("airflow:https://ml:topsecret#1@x.example/dag", "in a password, @"),
        ("airflow:https://ml:12#topsecret@x.example/dag", "in a password, @"),
        ("kubeflow:https://x.example/", KUBEFLOW),
        ("kubeflow:https://x.example/p-1?experiment=topsecret", KUBEFLOW),
        ("kubeflow:https://ml:topsecret@x.example/p-1", "PHOENIX_TRAINER_TOKEN"),
        ("github:topsecret", GITHUB),
        ("github:acme/risk/topsecret", GITHUB),
        ("github:acme/top secret", GITHUB),
        ("github:https://x.example/topsecret", GITHUB),
        ("github:https://github.com/acme/topsecret", "not of its API"),
        ("github:https://topsecret@x.example/api/v3/acme/risk", "PHOENIX_TRAINER_TOKEN"),
    ],
)
def test_a_trainer_that_cannot_be_is_refused_with_what_to_write(spec: str, words: str) -> None:
    """At the start, and without the value itself, which may hold a password."""
    with pytest.raises(Misconfigured) as caught:
        open_remote_trainer(spec, "whsec_AAAA" if spec.startswith("webhook") else TOKEN)

    assert words in caught.value.message
    assert "secret" not in caught.value.message
    assert caught.value.details == {"setting": "PHOENIX_TRAINER"}
    assert caught.value.__cause__ is caught.value.__context__ is None


@pytest.mark.parametrize("spec", ["airflow:https://ml@x.example/dag", "airflow:https://:pass@x.example/dag"])
def test_a_user_of_airflow_has_a_name_and_a_password(spec: str) -> None:
    """Half of them would be refused at each request."""
    with pytest.raises(Misconfigured, match=r"without a password.*write airflow:"):
        open_remote_trainer(spec, "")


@pytest.mark.parametrize(
    ("kind", "token"),
    [
        ("webhook", "not base64!"),
        ("webhook", "schlüssel"),
        ("airflow", "two words"),
        ("kubeflow", "schlüssel"),
    ],
)
def test_a_token_that_cannot_be_sent_is_refused_at_the_start(kind: str, token: str) -> None:
    """A header with a line break in it would fail at each request, and name the token."""
    with pytest.raises(Misconfigured, match="PHOENIX_TRAINER_TOKEN: ") as caught:
        open_remote_trainer(f"{kind}:https://x.example/a/b", token)
    assert token not in caught.value.message
    assert caught.value.details == {"setting": "PHOENIX_TRAINER_TOKEN"}
