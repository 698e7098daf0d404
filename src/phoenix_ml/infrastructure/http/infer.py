"""``POST /v2/models/…/infer`` as plain ASGI and for the hot lane, beside ``calls``."""

import asyncio
import logging
import re
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, NamedTuple

from phoenix_ml.application.infer import Infer
from phoenix_ml.application.predict import Pending
from phoenix_ml.application.serving import LiveModels
from phoenix_ml.domain.errors import MalformedBody, PhoenixError
from phoenix_ml.domain.ids import new_id
from phoenix_ml.infrastructure.http.bodies import ClientDisconnected, Receive, read_body, too_large
from phoenix_ml.infrastructure.http.calls import (
    JSON,
    Answer,
    Send,
    read_headers,
    request_id_header,
    send_answer,
)
from phoenix_ml.infrastructure.http.codec import encode_json
from phoenix_ml.infrastructure.http.errors import inference_status_of, retry_after_s
from phoenix_ml.infrastructure.http.tensors import (
    JSON_LIMIT_BYTES,
    compress,
    decode_infer,
    decompress,
    encode_inferred,
)
from phoenix_ml.infrastructure.telemetry.meter import OTHER, MetricsMeter
from phoenix_ml.infrastructure.telemetry.refusals import error_for, record_refusal

log = logging.getLogger(__name__)
INFER_PATH: Final = re.compile(r"/v2/models/([^/]{1,512})(?:/versions/([^/]{1,512}))?/infer")
_HEADER_LENGTH: Final = b"inference-header-content-length"
# Below this a packed answer is hardly smaller.
_PACKED_FROM_BYTES: Final = 1024


class InferHead(NamedTuple):
    """What the headers say of the body, and of the answer's: ``json_bytes`` is None without raw tensors."""

    json_bytes: int | None = None
    is_damaged: bool = False
    coding: str = ""
    accepted: str = ""


def read_infer_headers(headers: Iterable[tuple[bytes, bytes]]) -> InferHead:
    json_bytes, is_damaged, coding, accepted = None, False, "", ""
    for name, value in headers:
        if name == _HEADER_LENGTH:
            is_damaged = not value.isdigit() or len(value) > 12
            json_bytes = None if is_damaged else int(value)
        elif name == b"content-encoding":
            coding = value.decode("latin-1").strip().lower()
        elif name == b"accept-encoding":
            # Many clients accept whatever there is; who names just one coding wants it.
            wanted = value.decode("latin-1").strip().lower()
            accepted = wanted if wanted in ("gzip", "deflate") else ""
    return InferHead(json_bytes, is_damaged, coding, accepted)


class InferCalls:
    """Answers to ``infer``, from the body's bytes to the answer's."""

    def __init__(
        self,
        infer: Infer,
        live: LiveModels,
        meter: MetricsMeter,
        *,
        body_limit_bytes: int,
        json_limit_bytes: int = JSON_LIMIT_BYTES,
    ) -> None:
        self._infer = infer
        self._live = live
        self._meter = meter
        self._body_limit_bytes = body_limit_bytes
        self._json_limit_bytes = json_limit_bytes

    async def __call__(
        self, scope: Mapping[str, Any], receive: Receive, send: Send, target: tuple[str, str | None]
    ) -> None:
        """The ASGI application; ``target`` is the model and version that the path names."""
        started = time.perf_counter()
        headers = scope["headers"]
        request_id, length, traceparent = read_headers(headers)
        head = read_infer_headers(headers)
        limit = self._body_limit_bytes
        try:
            if length > limit:
                raise too_large(limit)
            body = await read_body(receive, limit)
        except ClientDisconnected:
            return
        except PhoenixError as exc:
            status, payload, out = self.refuse(exc, OTHER, request_id, started)
            out.append((b"connection", b"close"))
        else:
            if head.coding:  # on a thread: 64 KiB of gzip can hold 64 MiB
                try:
                    body = await asyncio.to_thread(decompress, body, head.coding, limit)
                except PhoenixError as exc:
                    await send_answer(send, self.refuse(exc, OTHER, request_id, started))
                    return
            status, payload, out = await self.infer(
                *target, head, request_id, traceparent, None, body, started
            )
            if head.accepted and status == 200 and len(payload) >= _PACKED_FROM_BYTES:
                payload = await asyncio.to_thread(compress, payload, head.accepted)
                out.append((b"content-encoding", head.accepted.encode()))
        await send_answer(send, (status, payload, out))

    async def infer(
        self,
        model_id: str,
        model_version: str | None,
        head: InferHead,
        request_id: str,
        traceparent: str | None,
        new_pending: Callable[[], Pending] | None,
        body: bytes,
        started: float,
    ) -> Answer:
        """``request_id`` is the header's; one in the body comes before it. ``new_pending`` as for ``Predict.one``."""
        try:
            if head.is_damaged:
                raise MalformedBody("Inference-Header-Content-Length is not a number of bytes")
            request, wanted = decode_infer(
                model_id, model_version, body, head.json_bytes, self._json_limit_bytes
            )
            request_id = request.request_id = request.request_id or request_id
            answer = await self._infer(request, started, traceparent, new_pending)
            payload, json_bytes = encode_inferred(answer, wanted)
        except Exception as exc:  # noqa: BLE001 - the boundary: every request gets an answer
            return self.refuse(exc, model_id, request_id, started)
        self._meter.requested(model_id, answer.model_version, answer.role, 200, time.perf_counter() - started)
        headers = request_id_header(answer.request_id)
        if json_bytes is None:
            headers.append(JSON)
        else:
            headers += (
                (b"content-type", b"application/octet-stream"),
                (_HEADER_LENGTH, b"%d" % json_bytes),
            )
        return 200, payload, headers

    def refuse(self, exc: Exception, model_id: str, request_id: str, started: float) -> Answer:
        """The answer to a request that failed, in the protocol's form; a defect of ours is logged, not shown."""
        error = error_for(exc)
        status = inference_status_of(error)
        request_id = request_id or new_id()
        record_refusal(
            self._meter,
            self._live,
            exc,
            model_id=model_id,
            request_id=request_id,
            status=status,
            started=started,
        )
        headers = [*request_id_header(request_id), JSON]
        if (seconds := retry_after_s(error)) is not None:
            headers.append((b"retry-after", b"%d" % seconds))
        return status, encode_inference_error(error), headers


def encode_inference_error(error: PhoenixError) -> bytes:
    """The protocol's form of an error: its clients look for nothing else."""
    return encode_json({"error": error.message})
