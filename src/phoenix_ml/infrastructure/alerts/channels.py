"""Ways to tell people, each named by a URL: the log, signed webhooks, everything that Apprise knows, Kafka."""

import base64
import functools
import hashlib
import hmac
import logging
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import msgspec

from phoenix_ml.application.ports import Channel, Delivery, DeliveryFailed
from phoenix_ml.application.reports import iso_time
from phoenix_ml.domain.errors import EventsUnavailable, Misconfigured
from phoenix_ml.extras import install
from phoenix_ml.infrastructure.webhooks import request_within

if TYPE_CHECKING:  # Kafka's library is an extra
    from phoenix_ml.infrastructure.events.kafka import Kafka

log = logging.getLogger(__name__)
KAFKA = "kafka"
_TIMEOUT_S = 10.0
_SECRET_PREFIX = "whsec_"  # noqa: S105 - as the standard writes secrets
_SECRET_SETTING = "PHOENIX_ALERTS_SECRET"  # noqa: S105 - its name


def channel_names(urls: str, secret: str, *, has_kafka: bool) -> tuple[str, ...]:
    """The channels that the URLs, separated by spaces or commas, stand for, by names that hold no secrets.

    Raises Misconfigured for a URL that is no channel, and for a secret that is none.
    """
    signing_key(secret, _SECRET_SETTING)
    # A channel twice would be one row twice in the monitor's commit.
    names = list(dict.fromkeys(_name(url) for url in _split(urls)))
    return (*names, KAFKA) if has_kafka else tuple(names)


def open_channels(urls: str, secret: str, kafka: "Kafka | None") -> dict[str, Channel]:
    """The channels by name. Raises Misconfigured, saying which setting to change."""
    found: dict[str, Channel] = {}
    for url in _split(urls):
        name = _name(url)
        found[name] = _open(url, secret)
    if kafka is not None:
        found[KAFKA] = KafkaChannel(kafka)
    return found


def _split(urls: str) -> list[str]:
    return urls.replace(",", " ").split()


def _name(url: str) -> str:
    """The same for the same URL, and without what a URL may keep secret: its user, path and query, and with
    Apprise its host as well, where many services have their token.
    """
    if url == "log:":
        return "log"
    scheme, colon, _ = url.partition(":")
    kind, _, target = scheme.partition("+")
    try:
        parts = urlsplit(url)
        host = target if kind == "apprise" else parts.hostname
    except ValueError:  # such as a bracket that is not closed
        host = None
    is_known = scheme in ("webhook+http", "webhook+https", f"apprise+{target}")
    if not (is_known and host and parts.netloc) or (kind == "webhook" and not _can_be_asked(url)):
        raise Misconfigured(
            f"PHOENIX_ALERTS: {f'the {scheme}: URL' if colon else 'an entry without a scheme'} is no channel: give "
            "log:, webhook+https://HOST/…, webhook+http://HOST/… or apprise+ before a URL of Apprise, such as "
            "apprise+mailtos://…; a space or a comma in a URL is written %20 or %2C",
            setting="PHOENIX_ALERTS",
        )
    digest = hashlib.sha256(url.encode()).hexdigest()[:8]
    return f"{kind}:{host[:100]}-{digest}"


def _can_be_asked(url: str) -> bool:
    """Whether the client and the resolver take the webhook's host and port; what they refuse is no error of the
    network to them.
    """
    import httpx

    try:
        target = httpx.URL(url.removeprefix("webhook+"))
        target.host.encode("idna")
    except (httpx.InvalidURL, UnicodeError):
        return False
    return target.port is None or target.port < 65536


def _open(url: str, secret: str) -> Channel:
    if url == "log:":
        return LogChannel()
    kind, _, target = url.partition("+")
    if kind == "webhook":
        return WebhookChannel(target, secret)
    return AppriseChannel(target)


def describe_delivery(delivery: Delivery) -> dict[str, Any]:
    """What other programs are sent: the kind, when, and the alert or the request itself."""
    return {
        "type": f"phoenix-ml.{delivery.kind}",
        "timestamp": iso_time(delivery.created_at_ms),
        "data": delivery.payload,
    }


class LogChannel:
    """Into the log of the process."""

    def tell(self, delivery: Delivery) -> None:
        payload = delivery.payload
        log.warning(
            "%s",
            payload["title"],
            extra={"alert_id": payload["id"], "severity": payload["severity"], "text": payload["text"]},
        )

    def close(self) -> None:
        """Nothing is held."""


class WebhookChannel:
    """A POST of JSON, signed as https://www.standardwebhooks.com says where there is a secret."""

    def __init__(self, url: str, secret: str, timeout_s: float = _TIMEOUT_S) -> None:
        import httpx

        self._url = url
        self._key = signing_key(secret, _SECRET_SETTING)
        self._timeout_s = timeout_s
        self._errors = (httpx.HTTPError, httpx.InvalidURL)

    def tell(self, delivery: Delivery) -> None:
        body = msgspec.json.encode(describe_delivery(delivery))
        headers = webhook_headers(self._key, delivery.id, body)
        try:
            # Nothing depends on the body: whatever it holds, and however slowly it comes, the status has said all.
            status, _ = request_within(self._timeout_s, 1, "POST", self._url, content=body, headers=headers)
        except self._errors as exc:
            raise DeliveryFailed(f"{type(exc).__name__}: {exc}") from exc
        if not 200 <= status < 300:
            raise DeliveryFailed(f"HTTP {status}")

    def close(self) -> None:
        """Nothing is held."""


def webhook_headers(key: bytes, message_id: str, body: bytes) -> dict[str, str]:
    """The headers of a webhook that is sent now; without a key it is not signed."""
    at_s = int(time.time())
    headers = {
        "content-type": "application/json",
        "webhook-id": message_id,
        "webhook-timestamp": str(at_s),
    }
    if key:
        headers["webhook-signature"] = sign(key, message_id, at_s, body)
    return headers


def sign(key: bytes, message_id: str, at_s: int, body: bytes) -> str:
    """``v1,`` and base64 of HMAC-SHA256 over ``id.timestamp.body``."""
    digest = hmac.new(key, f"{message_id}.{at_s}.".encode() + body, hashlib.sha256).digest()
    return f"v1,{base64.b64encode(digest).decode()}"


def signing_key(secret: str, setting: str) -> bytes:
    """The key that the secret stands for, none for an empty one. Raises Misconfigured, naming the setting."""
    if not secret:
        return b""
    try:
        return base64.b64decode(secret.removeprefix(_SECRET_PREFIX), validate=True)
    except ValueError as exc:  # binascii.Error, or another where the text is not ASCII
        raise Misconfigured(
            f"{setting}: give base64, with whsec_ before it or not, as `openssl rand -base64 32` prints it",
            setting=setting,
        ) from exc


class AppriseChannel:
    """Slack, Mattermost, e-mail and a hundred more, through the library Apprise."""

    def __init__(self, url: str) -> None:
        try:
            import apprise
        except ModuleNotFoundError as exc:
            raise Misconfigured(f"PHOENIX_ALERTS: apprise+ needs its library: {install('alerts')}") from exc
        self._apprise = apprise.Apprise()
        # It logs a URL that it does not understand, with all that the URL keeps secret.
        apprise_log = logging.getLogger("apprise")
        apprise_log.disabled = True
        is_understood = self._apprise.add(url)
        apprise_log.disabled = False
        if not is_understood:
            raise Misconfigured(
                f"PHOENIX_ALERTS: Apprise does not understand the {urlsplit(url).scheme}:// URL",
                setting="PHOENIX_ALERTS",
            )

    def tell(self, delivery: Delivery) -> None:
        payload = delivery.payload
        # It tells only whether, and logs why.
        if not self._apprise.notify(title=payload["title"], body=payload["text"] or payload["title"]):
            raise DeliveryFailed("Apprise did not deliver it; its own lines in the log say why")

    def close(self) -> None:
        """Nothing is held."""


class KafkaChannel:
    """Topic ``model-alerts`` for alerts, ``retrain-requests`` for requests to retrain; the key is the model."""

    def __init__(self, kafka: "Kafka", timeout_s: float = _TIMEOUT_S) -> None:
        from phoenix_ml.infrastructure.events.kafka import KafkaOutbox

        self._timeout_s = timeout_s
        self._new_outbox = functools.partial(KafkaOutbox, kafka)
        self._outbox = self._new_outbox()

    def tell(self, delivery: Delivery) -> None:
        from phoenix_ml.infrastructure.events import cloudevents
        from phoenix_ml.infrastructure.events.kafka import MODEL_ALERTS, RETRAIN_REQUESTS

        topic = RETRAIN_REQUESTS if delivery.kind == "retrain" else MODEL_ALERTS
        kind = "phoenix-ml.retrain-requested" if delivery.kind == "retrain" else "phoenix-ml.model-alerted"
        headers = [
            *cloudevents.cloud_headers(kind, 1, b"application/json"),
            ("ce_id", delivery.id.encode()),
            ("ce_time", cloudevents.rfc_3339(delivery.created_at_ms)),
        ]
        message = cloudevents.Message(
            delivery.payload["model_id"].encode(), msgspec.json.encode(delivery.payload), headers
        )
        give_up_at = time.monotonic() + self._timeout_s

        def keep_waiting() -> None:
            if time.monotonic() > give_up_at:
                raise DeliveryFailed(f"Kafka does not acknowledge: {self._outbox.trouble}")

        try:
            refused = self._outbox.send(topic, [message], keep_waiting)
        except EventsUnavailable as exc:
            raise DeliveryFailed(exc.message) from exc
        except DeliveryFailed:
            # Else the message would arrive once for each attempt when Kafka is back.
            self._outbox.close()
            self._outbox = self._new_outbox()
            raise
        if refused:
            raise DeliveryFailed(refused[0][1])

    def close(self) -> None:
        self._outbox.close()
