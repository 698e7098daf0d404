"""The calls that carry the load, as plain ASGI: ``/predict``, ``/predict/batch``, ``/feedback``.

A FastAPI route with pydantic models costs 160 to 305 µs of CPU a request, this about 15 beside the server.
"""

import logging
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Final

from phoenix_ml.application.feedback import report_outcomes
from phoenix_ml.application.ports import Journal
from phoenix_ml.application.predict import Pending, Predict
from phoenix_ml.application.serving import LiveModels
from phoenix_ml.domain.errors import InvalidField, PhoenixError
from phoenix_ml.domain.ids import new_id
from phoenix_ml.infrastructure.http.bodies import ClientDisconnected, Receive, read_body, too_large
from phoenix_ml.infrastructure.http.codec import (
    decode_batch,
    decode_feedback,
    decode_prediction,
    describe_answer,
    encode_error,
    encode_json,
)
from phoenix_ml.infrastructure.http.errors import retry_after_s, status_of
from phoenix_ml.infrastructure.telemetry.meter import OTHER, MetricsMeter
from phoenix_ml.infrastructure.telemetry.refusals import error_for, record_refusal

log = logging.getLogger(__name__)
# https://www.w3.org/TR/trace-context/#traceparent-header; any other value is as if there were none.
_TRACEPARENT = re.compile(rb"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
JSON: Final = (b"content-type", b"application/json")
Send = Callable[[Mapping[str, Any]], Awaitable[None]]
Answer = tuple[int, bytes, list[tuple[bytes, bytes]]]


class PredictionCalls:
    """Answers to the three calls, from the body's bytes to the answer's."""

    def __init__(
        self,
        predict: Predict,
        live: LiveModels,
        journal: Journal,
        meter: MetricsMeter,
        *,
        body_limit_bytes: int,
        batch_limit: int,
    ) -> None:
        self._predict = predict
        self._live = live
        self._journal = journal
        self._meter = meter
        self._body_limit_bytes = body_limit_bytes
        self._batch_limit = batch_limit
        self.by_path: Mapping[str, Callable[[bytes, float, str, str | None], Awaitable[Answer]]] = {
            "/predict": self.predict,
            "/predict/batch": self.predict_batch,
            "/feedback": self.feedback,
        }

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        """The ASGI application of the calls in ``by_path``."""
        started = time.perf_counter()
        request_id, length, traceparent = read_headers(scope["headers"])
        try:
            if length > self._body_limit_bytes:
                raise too_large(self._body_limit_bytes)
            body = await read_body(receive, self._body_limit_bytes)
        except ClientDisconnected:
            return
        except PhoenixError as exc:
            status, payload, headers = self._refuse(exc, OTHER, request_id, started)
            # The rest of the body is not read, so the connection cannot be used again.
            headers.append((b"connection", b"close"))
        else:
            if scope["query_string"]:
                error = InvalidField(f"POST {scope['path']} has no parameters: see its body", field="query")
                status, payload, headers = self._refuse(error, OTHER, request_id, started)
            else:
                status, payload, headers = await self.by_path[scope["path"]](
                    body, started, request_id, traceparent
                )
        await send_answer(send, (status, payload, headers))

    async def predict(
        self,
        body: bytes,
        started: float,
        request_id: str,
        traceparent: str | None = None,
        new_pending: Callable[[], Pending] | None = None,
    ) -> Answer:
        """``request_id`` is the header's; one in the body comes before it. ``new_pending`` as for ``Predict.one``."""
        model_id = OTHER
        try:
            request = decode_prediction(body)
            model_id = request.model_id
            request_id = request.request_id = request.request_id or request_id
            answer = await self._predict.one(request, started, traceparent, new_pending)
            payload = encode_json(describe_answer(answer))
        except Exception as exc:  # noqa: BLE001 - the boundary: every request gets an answer
            return self._refuse(exc, model_id, request_id, started)
        event = answer.event
        self._meter.requested(
            event.model_id, event.model_version, event.role, 200, time.perf_counter() - started
        )
        return 200, payload, [*request_id_header(event.request_id), JSON]

    async def predict_batch(
        self, body: bytes, started: float, request_id: str, traceparent: str | None = None
    ) -> Answer:
        model_id = OTHER
        try:
            request = decode_batch(body)
            model_id = request.model_id
            answers = await self._predict.batch(request, started, traceparent)
            payload = encode_json({"predictions": [describe_answer(answer) for answer in answers]})
        except Exception as exc:  # noqa: BLE001 - the boundary: every request gets an answer
            return self._refuse(exc, model_id, request_id, started, "batch")
        versions = {answer.event.model_version for answer in answers}
        version = versions.pop() if len(versions) == 1 else "several"
        self._meter.requested(model_id, version, "batch", 200, time.perf_counter() - started)
        return 200, payload, [*request_id_header(request_id or new_id()), JSON]

    async def feedback(self, body: bytes, started: float, request_id: str, _: str | None = None) -> Answer:
        try:
            accepted = report_outcomes(self._journal, decode_feedback(body), limit=self._batch_limit)
        except Exception as exc:  # noqa: BLE001 - the boundary: every request gets an answer
            return self._refuse(exc, OTHER, request_id, started)
        self._meter.requested(OTHER, "", "feedback", 202, time.perf_counter() - started)
        return 202, encode_json({"accepted": accepted}), [*request_id_header(request_id or new_id()), JSON]

    def _refuse(
        self, exc: Exception, model_id: str, request_id: str, started: float, role: str = ""
    ) -> Answer:
        """The answer to a request that failed; a defect of ours is logged, not shown."""
        error = error_for(exc)
        status = status_of(error)
        request_id = request_id or new_id()
        record_refusal(
            self._meter,
            self._live,
            exc,
            model_id=model_id,
            request_id=request_id,
            status=status,
            started=started,
            role=role,
        )
        headers = [*request_id_header(request_id), JSON]
        if (seconds := retry_after_s(error)) is not None:
            headers.append((b"retry-after", b"%d" % seconds))
        return status, encode_error(error), headers


async def send_answer(send: Send, answer: Answer) -> None:
    """Sends an answer by ASGI."""
    status, payload, headers = answer
    headers.append((b"content-length", b"%d" % len(payload)))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": payload})


def read_headers(headers: Iterable[tuple[bytes, bytes]]) -> tuple[str, int, str | None]:
    """The request's id or an empty one, its body's length in bytes or 0, and its trace context, if any."""
    request_id, length, traceparent = "", 0, None
    for name, value in headers:
        if name == b"x-request-id":
            request_id = value.decode("latin-1")[:128]
        elif name == b"content-length" and value.isdigit():
            length = int(value)
        elif name == b"traceparent" and _TRACEPARENT.fullmatch(value):
            traceparent = value.decode()
    return request_id, length, traceparent


def request_id_header(request_id: str) -> list[tuple[bytes, bytes]]:
    """The header; none for an id that could not stand in one, such as one with a line break."""
    if request_id.isascii() and request_id.isprintable():
        return [(b"x-request-id", request_id.encode())]
    return []
