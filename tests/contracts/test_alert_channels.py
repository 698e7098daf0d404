"""Each way to people, held against a real receiver: a web server, a mail server, Kafka."""

import json
import logging
import socket
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from email import message_from_bytes
from typing import Any

import pytest
from aiosmtpd.controller import Controller
from confluent_kafka import Consumer
from receiver import Received, receiving, trickling
from sample_events import AT_MS
from servers import HOST, KafkaServer, free_port, wait_until
from standardwebhooks import Webhook

from phoenix_ml.application.ports import Channel, Delivery, DeliveryFailed
from phoenix_ml.domain.errors import Misconfigured
from phoenix_ml.domain.ids import new_id
from phoenix_ml.infrastructure.alerts.channels import (
    KAFKA,
    KafkaChannel,
    WebhookChannel,
    channel_names,
    open_channels,
)
from phoenix_ml.infrastructure.events.kafka import MODEL_ALERTS, RETRAIN_REQUESTS, Kafka

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


def delivery(kind: str = "alert") -> Delivery:
    alert_id = new_id()
    payload = {
        "id": alert_id,
        "model_id": "risk",
        "model_version": "1.0.0",
        "severity": "critical",
        "title": "risk 1.0.0: income drifted",
        "text": "income drifted, higher: distance 0.4 over 1000 rows",
    }
    return Delivery(alert_id, "x", kind, payload, AT_MS, 0)


def channel(url: str, secret: str = "") -> Channel:
    (opened,) = open_channels(url, secret, None).values()
    return opened


@pytest.fixture
def web() -> Iterator[Received]:
    with receiving() as server:
        yield server


def test_a_webhook_is_signed_so_that_the_standards_own_library_accepts_it(web: Received) -> None:
    """A receiver must be able to tell our alert from anybody's; an attempt that is repeated has the same id."""
    told = delivery()
    with closing(channel(f"webhook+http://{web.host}/hook?team=ml", SECRET)) as webhook:
        webhook.tell(told)

    ((path, headers, body),) = web.calls
    verified = Webhook(SECRET).verify(body, headers)

    assert (path, headers["webhook-id"]) == ("/hook?team=ml", told.id)
    assert verified == {
        "type": "phoenix-ml.alert",
        "timestamp": "2025-10-09T08:53:20.123Z",
        "data": told.payload,
    }


def test_without_a_secret_a_webhook_is_not_signed(web: Received) -> None:
    """A signature of nothing would only look like one."""
    with closing(channel(f"webhook+http://{web.host}/")) as webhook:
        webhook.tell(delivery())

    assert "webhook-signature" not in web.calls[0][1]


@pytest.mark.parametrize("status", [302, 404, 500])
def test_a_webhook_that_is_not_taken_has_failed(web: Received, status: int) -> None:
    """Only a 2xx says that somebody has it."""
    web.status = status
    with (
        closing(channel(f"webhook+http://{web.host}/")) as webhook,
        pytest.raises(DeliveryFailed, match=str(status)),
    ):
        webhook.tell(delivery())


def test_a_dead_port_is_a_failure_that_does_not_tell_the_url() -> None:
    """The errors are on record for many to read; a webhook's path is its password."""
    with closing(channel(f"webhook+http://{HOST}:{free_port()}/very-secret")) as webhook:
        with pytest.raises(DeliveryFailed) as caught:
            webhook.tell(delivery())

    assert "refused" in str(caught.value)
    assert "very-secret" not in str(caught.value)


def test_chat_hears_the_title_and_the_text(web: Received) -> None:
    """Slack-compatible webhooks take {"text": …}; Mattermost's are such, on any host."""
    with closing(channel(f"apprise+mmost://{web.host}/3ccdd113474722377935511fc85d3dd4")) as chat:
        chat.tell(delivery())

    ((path, _, body),) = web.calls
    assert path == "/hooks/3ccdd113474722377935511fc85d3dd4"
    assert "income drifted, higher" in json.loads(body)["text"]


def test_chat_that_refuses_has_failed(web: Received) -> None:
    """The library says only false; that must not pass as told."""
    web.status = 500
    with (
        closing(channel(f"apprise+mmost://{web.host}/3ccdd113474722377935511fc85d3dd4")) as chat,
        pytest.raises(DeliveryFailed),
    ):
        chat.tell(delivery())


class Mailbox:
    """What a mail server received."""

    def __init__(self) -> None:
        self.mails: list[tuple[list[str], bytes]] = []

    async def handle_DATA(self, _: Any, __: Any, envelope: Any) -> str:  # noqa: N802 - aiosmtpd's name
        self.mails.append((envelope.rcpt_tos, envelope.content))
        return "250 taken"


@contextmanager
def mail_server(box: Mailbox) -> Iterator[int]:
    controller = Controller(box, hostname=HOST, port=free_port(), ready_timeout=30)
    controller.start()
    yield controller.port
    controller.stop()


def test_mail_arrives_with_the_title_as_its_subject() -> None:
    """Through a real SMTP conversation."""
    box = Mailbox()
    with mail_server(box) as port:
        url = f"apprise+mailto://{HOST}:{port}?from=phoenix@example.com&to=oncall@example.com&mode=insecure"
        with closing(channel(url)) as mail:
            mail.tell(delivery())

    ((receivers, content),) = box.mails
    message = message_from_bytes(content)
    assert (receivers, message["subject"]) == (["oncall@example.com"], "risk 1.0.0: income drifted")


def test_the_log_has_the_alert(caplog: pytest.LogCaptureFixture) -> None:
    """The one channel that everybody has."""
    with caplog.at_level(logging.WARNING), closing(channel("log:")) as log:
        log.tell(delivery())

    assert caplog.messages == ["risk 1.0.0: income drifted"]


def test_kafka_has_alerts_and_requests_to_retrain_on_topics_of_their_own(kafka_url: str) -> None:
    """Other programs follow them: the key is the model, the id the same in every attempt."""
    kafka = Kafka(kafka_url, partitions=1)
    kafka.create_topics()
    alert, request = delivery(), delivery("retrain")
    with closing(open_channels("", "", kafka)[KAFKA]) as told:
        told.tell(alert)
        told.tell(request)

    found = [*read(kafka, MODEL_ALERTS, alert.id), *read(kafka, RETRAIN_REQUESTS, request.id)]

    assert found == [
        (b"risk", alert.payload, b"phoenix-ml.model-alerted", alert.id.encode()),
        (b"risk", request.payload, b"phoenix-ml.retrain-requested", request.id.encode()),
    ]


def read(kafka: Kafka, topic: str, last_id: str) -> list[tuple[Any, Any, Any, Any]]:
    """The messages up to that one: key, value, type and id."""
    consumer: Consumer = kafka.consumer(f"test-{topic}")
    consumer.subscribe([kafka.full_name(topic)])
    found: list[tuple[Any, Any, Any, Any]] = []

    def has_all() -> bool:
        message = consumer.poll(0.2)
        if message is not None and message.error() is None:
            headers = dict(message.headers() or ())
            value = json.loads(message.value() or b"")
            found.append((message.key(), value, headers["ce_type"], headers["ce_id"]))
        return bool(found) and found[-1][3] == last_id.encode()

    wait_until(has_all, 30, f"{last_id} on {topic}")
    consumer.close()
    return found


def test_a_kafka_that_is_down_is_a_failure_within_seconds() -> None:
    """The thread must go on, and the alert be tried again."""
    url = f"kafka://{HOST}:{free_port()}"
    kafka = Kafka(url, partitions=1)
    with closing(open_channels("", "", kafka)[KAFKA]) as told:
        with pytest.raises(DeliveryFailed, match="refused"):
            told.tell(delivery())


def test_attempts_that_failed_do_not_arrive_when_kafka_is_back(
    kafka_server: KafkaServer, kafka_url: str
) -> None:
    """An outage of a day is hundreds of attempts: people must not be told once for each of them."""
    # By default a client that has tried in vain for a while looks up to 7.5 s later whether Kafka is back.
    kafka = Kafka(f"{kafka_url}?reconnect.backoff.max.ms=500", partitions=1)
    kafka.create_topics()
    probe, waited, after = delivery(), delivery(), delivery()
    with closing(KafkaChannel(kafka, timeout_s=5.0)) as told, closing(KafkaChannel(kafka)) as another:
        kafka_server.kill()
        for _ in range(2):
            with pytest.raises(DeliveryFailed):
                told.tell(waited)
        kafka_server.start()
        # A broker that has just started may take a message and acknowledge it too late: that attempt would arrive
        # as well, rightly. So somebody else waits until it acknowledges.
        wait_until(lambda: is_told(another, probe), 90, "Kafka takes it")
        told.tell(waited)
        told.tell(after)

    ids = [found[3].decode() for found in read(kafka, MODEL_ALERTS, after.id)]

    assert [one for one in ids if one != probe.id] == [waited.id, after.id]


def is_told(channel: Channel, delivery: Delivery) -> bool:
    try:
        channel.tell(delivery)
    except DeliveryFailed:
        return False
    return True


def test_names_of_channels_hold_no_secrets_and_stay_the_same() -> None:
    """They stand in the database and in metrics."""
    alerts = "log:, webhook+https://hooks.example.com/T0/B0/secret apprise+mailtos://me:secret@example.com"
    names = channel_names(alerts, SECRET, has_kafka=True)

    assert [name.rpartition("-")[0] or name for name in names] == [
        "log",
        "webhook:hooks.example.com",
        "apprise:mailtos",
        "kafka",
    ]
    assert names == channel_names(alerts, SECRET, has_kafka=True)
    assert "secret" not in str(names)


@pytest.mark.parametrize(
    ("alerts", "secret", "words"),
    [
        ("https://hooks.example.com/topsecret", "", "https: URL is no channel"),
        ("topsecret", "", "without a scheme is no channel"),
        ("webhook+http://[topsecret", "", "is no channel"),
        ("webhook+https:topsecret", "", "is no channel"),
        ("webhook+httpx://topsecret", "", "is no channel"),
        ("webhook+http://hooks..example.com/topsecret", "", "is no channel"),
        (f"webhook+https://{'x' * 70}.example.com/topsecret", "", "is no channel"),
        ("webhook+https://xn--/topsecret", "", "is no channel"),
        ("webhook+https://hooks.example.com:65536/topsecret", "", "is no channel"),
        ("webhook+https://hooks.example.com:x/topsecret", "", "is no channel"),
        ("apprise+slack://topsecret", "", "does not understand"),
        ("apprise+nonsense://topsecret", "", "does not understand"),
        ("webhook+https://x.example", "not base64!", "PHOENIX_ALERTS_SECRET"),
        ("webhook+https://x.example", "schlüssel", "PHOENIX_ALERTS_SECRET"),
    ],
)
def test_a_channel_that_cannot_be_is_refused_at_the_start(
    alerts: str, secret: str, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Not on the night when it is needed; neither what is said nor the log repeats the URL."""
    with caplog.at_level(logging.DEBUG), pytest.raises(Misconfigured, match=words) as caught:
        open_channels(alerts, secret, None)

    assert "topsecret" not in str(caught.value) + caplog.text


@pytest.mark.parametrize(
    "host", ["hooks.example.com:8443", "bücher.example", "xn--bcher-kva.example", "[::1]:80"]
)
def test_a_webhook_may_be_on_any_host_that_can_be(host: str) -> None:
    """A check that is too strict would be a company without alerts."""
    names = channel_names(f"webhook+https://ann:secret@{host}/hook", "", has_kafka=False)

    assert len(names) == 1


def test_a_channel_that_is_named_twice_is_one() -> None:
    """The monitor would write the same row twice, and its commit fail for ever."""
    names = channel_names("log: log:", "", has_kafka=False)

    assert names == ("log",)


@pytest.mark.parametrize(
    "url",
    [
        "apprise+slack://T1JJ3T3L2/A1BRTD4JD/TIiajkdn",
        "apprise+tgram://123456789:abcdefg_hij/1",
        "apprise+pover://me@tokentoken",
    ],
)
def test_a_name_has_nothing_of_a_url_that_has_its_token_where_others_have_their_host(url: str) -> None:
    """Names are public: they are labels of metrics."""
    (name,) = channel_names(url, "", has_kafka=False)

    assert name.rpartition("-")[0] == url.partition("://")[0].replace("+", ":")


def test_a_server_that_never_answers_is_given_up() -> None:
    """It accepts the connection and says nothing: the worst kind of dead."""
    with socket.create_server((HOST, 0)) as silent:
        url = f"http://{HOST}:{silent.getsockname()[1]}/"
        webhook = WebhookChannel(url, "", timeout_s=0.2)
        with closing(webhook), pytest.raises(DeliveryFailed, match="ReadTimeout"):
            webhook.tell(delivery())


def test_a_server_whose_answer_trickles_has_it_when_it_has_said_so() -> None:
    """A byte in time each time, the last one tomorrow: meanwhile another process would tell it, too."""
    with trickling(b"HTTP/1.1 200 OK\r\ncontent-length: 1000000\r\n\r\n") as port:
        webhook = WebhookChannel(f"http://{HOST}:{port}/", "", timeout_s=30.0)
        began_at_s = time.monotonic()

        webhook.tell(delivery())

    assert time.monotonic() - began_at_s < 10


def test_a_server_whose_status_trickles_is_given_up() -> None:
    """As one that never answers."""
    with trickling(b"HTTP/1.1 200 OK\r\nx-slow: ") as port:
        webhook = WebhookChannel(f"http://{HOST}:{port}/", "", timeout_s=0.5)
        with pytest.raises(DeliveryFailed, match="ReadTimeout"):
            webhook.tell(delivery())
