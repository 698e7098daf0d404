"""Kafka behind TLS and a password, as every cluster that is not one's own: a server's events go there and come
back, with the trace of the request that made them; what is wrong is said, and the password is not.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import httpx
import pytest
from confluent_kafka import Message, TopicPartition
from numbered import MODEL, features_of, register_champion_and_challenger
from phoenix_server import PhoenixServer
from servers import HOST, KafkaServer, _self_signed, new_prefix, wait_until
from traffic import await_logged

from phoenix_ml.domain.errors import EventsUnavailable
from phoenix_ml.domain.events import PredictionMade
from phoenix_ml.infrastructure.events.cloudevents import decode_message
from phoenix_ml.infrastructure.events.kafka import INFERENCE_EVENTS, Kafka

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]

PARTITIONS = 2
DEADLINE_S = 30.0
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
WRONG_PASSWORD = "not-the-password"


def secured_url(kafka: KafkaServer, *, password: str | None = None, authority: Path | None = None) -> str:
    """The broker's secured listener, with topics that nobody else uses."""
    properties = {
        "security.protocol": "SASL_SSL",
        "ssl.ca.location": str(authority or kafka.certificate),
        "sasl.mechanism": "PLAIN",
        "sasl.username": "phoenix",
        "sasl.password": password or kafka.password,
    }
    return f"kafka://{HOST}:{kafka.secured_port}/{new_prefix()}?{urlencode(properties)}"


def make_server(folder: Path, events: str) -> PhoenixServer:
    server = PhoenixServer(folder, events=events, kafka_partitions=PARTITIONS)
    register_champion_and_challenger(server)
    return server


@pytest.fixture
def kafka(kafka_server: KafkaServer) -> KafkaServer:
    """A broker of our own: only we know its password."""
    kafka_server.start()
    return kafka_server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, kafka_server: KafkaServer) -> Iterator[PhoenixServer]:
    """A server whose events go over the secured listener."""
    kafka_server.start()
    with make_server(tmp_path_factory.mktemp("secured"), secured_url(kafka_server)) as server:
        yield server


def predict(server: PhoenixServer, headers: Mapping[str, str] | None = None) -> str:
    """The prediction's id."""
    body = {"model_id": MODEL, "features": features_of(1)}
    answer = httpx.post(f"{server.url}/predict", json=body, headers=headers)
    return str(answer.raise_for_status().json()["prediction_id"])


def predict_batch(server: PhoenixServer, headers: Mapping[str, str]) -> list[str]:
    body = {"model_id": MODEL, "instances": [{"features": features_of(number)} for number in range(3)]}
    answer = httpx.post(f"{server.url}/predict/batch", json=body, headers=headers)
    return [str(one["prediction_id"]) for one in answer.raise_for_status().json()["predictions"]]


def traces(server: PhoenixServer, ids: list[str]) -> list[tuple[str | None, str | None]]:
    """Of these predictions, what the message's header and what the event itself says."""
    kafka = Kafka(server.settings.events, PARTITIONS)
    consumer = kafka.consumer("check")
    topic = kafka.full_name(INFERENCE_EVENTS)
    consumer.assign([TopicPartition(topic, number, 0) for number in range(PARTITIONS)])
    found: dict[str, Message] = {}

    def all_there() -> bool:
        for message in consumer.consume(100, 0.2):
            if message.error() is None:
                found[(message.key() or b"").decode()] = message
        return set(ids) <= set(found)

    try:
        wait_until(all_there, DEADLINE_S, "the messages are there")
    finally:
        consumer.close()
    return [traces_of(found[prediction_id]) for prediction_id in ids]


def traces_of(message: Message) -> tuple[str | None, str | None]:
    headers: list[tuple[str, Any]] = message.headers() or []  # type: ignore[assignment]
    told = dict(headers).get("traceparent")
    event = decode_message(message.value(), headers).event  # type: ignore[union-attr]
    assert isinstance(event, PredictionMade)
    return None if told is None else told.decode(), event.traceparent


def test_what_was_answered_is_in_the_log(server: PhoenixServer) -> None:
    """Every client has the properties: the ship role's, the log's, and those of the API processes."""
    prediction_id = predict(server)

    with server.opened() as phoenix:
        (row,) = [row for row in await_logged(phoenix, MODEL, {prediction_id}) if row.id == prediction_id]
    assert list(row.features.values()) == features_of(1)
    assert "rdkafka" not in server.log()


def test_a_doctor_finds_the_cluster_and_keeps_the_password(server: PhoenixServer, kafka: KafkaServer) -> None:
    """What it prints is sent around when somebody asks for help."""
    done = server.command("doctor", "--json")

    findings = {finding["check"]: finding for finding in json.loads(done.stdout)}
    assert findings["events"]["ok"]
    assert f"kafka://{HOST}:{kafka.secured_port}/" in findings["events"]["found"]
    assert_secret(done.stdout + done.stderr + server.log(), kafka.password)


def assert_secret(text: str, password: str) -> None:
    """Neither as it is, nor as it stands in the URL."""
    assert password not in text
    assert urlencode({"": password})[1:] not in text


def test_the_trace_of_a_request_goes_with_its_event(server: PhoenixServer) -> None:
    """Whoever follows a request through all systems finds what became of it behind the answer."""
    headers = {"traceparent": TRACEPARENT}

    ids = [predict(server, headers), *predict_batch(server, headers)]

    assert traces(server, ids) == [(TRACEPARENT, TRACEPARENT)] * 4


@pytest.mark.parametrize(
    "traceparent",
    [
        TRACEPARENT.upper(),
        TRACEPARENT[:-1],
        f"{TRACEPARENT}-00",
        TRACEPARENT.replace("00-", "ff-", 1),
        f"00-{'0' * 32}-b7ad6b7169203331-01",
        f"00-0af7651916cd43dd8448eb211c80319c-{'0' * 16}-01",
        "",
    ],
)
def test_a_trace_that_is_none_is_left_out(server: PhoenixServer, traceparent: str) -> None:
    """The standard says so: a wrong one would tie strangers together. The answer is not concerned."""
    prediction_id = predict(server, {"traceparent": traceparent})

    assert traces(server, [prediction_id]) == [(None, None)]


def test_a_wrong_password_is_told_of_and_predictions_go_on(tmp_path: Path, kafka: KafkaServer) -> None:
    """A password that was changed must be found within minutes, and must not cost one answer."""
    reason = "Invalid username or password"
    with make_server(tmp_path, secured_url(kafka, password=WRONG_PASSWORD)) as server:
        predict(server)
        wait_until(lambda: any(reason in line for line in complaints(server)), DEADLINE_S, "the log says why")
        predict(server)
        doctor = server.command("doctor")
        server.kill()

    assert doctor.returncode == 1
    assert reason in doctor.stdout
    assert_secret(doctor.stdout + doctor.stderr + server.log(), WRONG_PASSWORD)
    assert "Traceback" not in server.log()


def complaints(server: PhoenixServer) -> list[str]:
    return [line for line in server.log().splitlines() if "events wait in the journals" in line]


def test_a_broker_under_a_certificate_of_an_unknown_authority_is_refused(
    tmp_path: Path, kafka: KafkaServer
) -> None:
    """It could be anybody, and it would be told the password."""
    (tmp_path / "other.pem").write_text(_self_signed().partition("-----END PRIVATE KEY-----")[2])

    with pytest.raises(EventsUnavailable, match="certificate verify failed") as refusal:
        Kafka(secured_url(kafka, authority=tmp_path / "other.pem"), PARTITIONS).check()

    assert_secret(str(refusal.value) + str(refusal.value.details), kafka.password)
