"""One API process's ASGI application: the loaded calls first, everything else to FastAPI."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import unquote_to_bytes

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import RedirectResponse, Response
from fastapi_offline import FastAPIOffline
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from phoenix_ml import __version__
from phoenix_ml.application.ports import FeatureStore
from phoenix_ml.application.serving import LiveModels
from phoenix_ml.bootstrap import Phoenix
from phoenix_ml.domain.errors import (
    DatabaseUnavailable,
    FeatureStoreUnavailable,
    InternalError,
    InvalidField,
    MalformedBody,
    MethodNotAllowed,
    PathUnknown,
    PhoenixError,
)
from phoenix_ml.domain.ids import new_id
from phoenix_ml.domain.predictions import BatchRequest, Feedback, PredictionRequest
from phoenix_ml.infrastructure.http.bodies import ClientDisconnected, Receive
from phoenix_ml.infrastructure.http.calls import PredictionCalls, Send
from phoenix_ml.infrastructure.http.codec import encode_error
from phoenix_ml.infrastructure.http.errors import inference_status_of, retry_after_s, status_of
from phoenix_ml.infrastructure.http.features import feature_routes
from phoenix_ml.infrastructure.http.infer import INFER_PATH, InferCalls, encode_inference_error
from phoenix_ml.infrastructure.http.models import model_routes
from phoenix_ml.infrastructure.http.monitoring import monitoring_routes
from phoenix_ml.infrastructure.http.open_inference import inference_routes
from phoenix_ml.infrastructure.http.openapi import describe_api
from phoenix_ml.infrastructure.http.origins import browser_check
from phoenix_ml.infrastructure.http.records import record_routes
from phoenix_ml.infrastructure.http.retraining import retraining_routes
from phoenix_ml.infrastructure.http.routes import answer, describe_body
from phoenix_ml.infrastructure.http.tensors import InferBody
from phoenix_ml.infrastructure.telemetry.catalogue import CATALOGUE, LOG_HEARTBEAT, SHIP_HEARTBEAT
from phoenix_ml.infrastructure.telemetry.logs import request_id_var
from phoenix_ml.infrastructure.telemetry.metrics import negotiate, render
from phoenix_ml.infrastructure.telemetry.refusals import DEFECT

log = logging.getLogger(__name__)
# The log role takes a step at least every 100 ms, and waits 5 s at most while the database is down.
_LOG_SILENT_S = 15.0
# Well below the 5 s and more that load balancers wait for an answer.
_DATABASE_PATIENCE_S = 2.0
# The status that nginx, too, logs for a client that left before its answer.
_CLIENT_GONE = 499
Asgi = Callable[[Mapping[str, Any], Receive, Send], Awaitable[None]]

_DESCRIPTION = """Answers predictions, records every one of them, and manages the models behind them.
Errors are `{"error": {"code", "message", "details"}}`."""


def build_app(
    phoenix: Phoenix,
    features: FeatureStore,
    live: LiveModels,
    calls: PredictionCalls,
    infer_calls: InferCalls,
    journal_state: Callable[[], str],
) -> Asgi:
    """The application. The calls that carry the load never enter FastAPI."""
    explored = explored_app(phoenix, features, live, calls, infer_calls, journal_state)
    check_browser = browser_check(phoenix.settings)

    async def app(scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            path = scope["path"]
            if path in calls.by_path:
                if check_browser(scope) is None:  # else FastAPI's side answers the refusal
                    await calls(scope, receive, send)
                    return
            elif (target := INFER_PATH.fullmatch(path)) is not None and check_browser(scope) is None:
                await infer_calls(scope, receive, send, (target[1], target[2]))
                return
        # What fails there is answered and logged by our handler; Starlette raises it again all the same.
        with contextlib.suppress(Exception):
            await explored(scope, receive, send)  # type: ignore[arg-type]

    return app


def explored_app(
    phoenix: Phoenix,
    features: FeatureStore,
    live: LiveModels,
    calls: PredictionCalls,
    infer_calls: InferCalls,
    journal_state: Callable[[], str],
) -> FastAPI:
    """All routes on FastAPI, the loaded calls among them: for servers other than ours, and for tests."""
    # Its documentation pages bring their scripts along: they work on a machine without internet.
    app: FastAPI = FastAPIOffline(
        title="Phoenix ML",
        version=__version__,
        description=_DESCRIPTION,
        redoc_url=None,
        redirect_slashes=False,
        dependencies=[Depends(_check_url)],
    )
    _map_errors(app)
    _mount_calls(app, calls)
    _mount_infer(app, infer_calls)
    check_browser = browser_check(phoenix.settings)
    database_probe = _DatabaseProbe(phoenix)
    goes_on_when_full = phoenix.settings.journal_full == "drop"
    for router in (
        model_routes(phoenix, live),
        feature_routes(features, live.packed_signatures, phoenix.settings.body_limit_bytes),
        record_routes(phoenix),
        monitoring_routes(phoenix),
        retraining_routes(phoenix),
    ):
        app.include_router(router, dependencies=[Depends(_refuse_unknown_parameters)])
    app.include_router(inference_routes(phoenix, live))
    describe_api(app)

    @app.middleware("http")
    async def name_request(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        given = request.headers.get("x-request-id", "")
        request_id = given if 0 < len(given) <= 128 and given.isascii() and given.isprintable() else new_id()
        request.state.request_id = request_id
        token = request_id_var.set(request_id)
        started = time.perf_counter()
        try:
            refusal = check_browser(request.scope)
            response = await call_next(request) if refusal is None else _respond(request, refusal)
        finally:
            request_id_var.reset(token)
        # The loaded calls have named theirs already, by the id that is on record.
        response.headers.setdefault("x-request-id", request_id)
        if request.method != "GET":
            log.info(
                "%s %s %d",
                request.method,
                request.url.path,
                response.status_code,
                extra={
                    "request_id": request_id,
                    "duration_ms": round((time.perf_counter() - started) * 1000, 3),
                },
            )
        return response

    @app.get("/", include_in_schema=False)
    def console() -> Response:
        return RedirectResponse("/docs")

    @app.head("/health/live", include_in_schema=False)
    @app.get("/health/live", tags=["operations"])
    async def live_check() -> Response:
        """200 while the process answers at all."""
        return answer({"status": "ok"})

    @app.head("/health/ready", include_in_schema=False)
    @app.get("/health/ready", tags=["operations"])
    async def ready_check() -> Response:
        """What each dependency says. 503 only when predictions cannot be answered at all."""
        checks = {
            "models": _models_state(live),
            "devices": _devices_state(live),
            "journal": await run_in_threadpool(journal_state),
            "features": await _features_state(features),
            "database": await database_probe.state(),
            "log": await run_in_threadpool(_log_state, phoenix),
        }
        able = live.is_ready and (checks["journal"] == "ok" or goes_on_when_full)
        status = "unavailable" if not able else "ok" if set(checks.values()) == {"ok"} else "degraded"
        described = {
            "status": status,
            "checks": checks,
            "models_failed": live.failures(),
            "models_displaced": live.displaced(),
        }
        return answer(described, 200 if able else 503)

    @app.get("/metrics", tags=["operations"])
    def metrics(request: Request) -> Response:
        """All processes' metrics, summed, for Prometheus."""
        openmetrics, content_type = negotiate(request.headers.get("accept", ""))
        text = render(phoenix.settings.metrics_folder, CATALOGUE, openmetrics=openmetrics)
        return Response(text, media_type=None, headers={"content-type": content_type})

    return app


def _mount_calls(app: FastAPI, calls: PredictionCalls) -> None:
    """The loaded calls as ordinary routes: for the documentation, and for servers other than ours."""
    described: list[tuple[str, Any, str, str]] = [
        ("/predict", PredictionRequest, "predict", "One prediction for an entity or for features."),
        ("/predict/batch", BatchRequest, "predict_batch", "Many rows of one model, all or none."),
        ("/feedback", Feedback | list[Feedback], "feedback", "Outcomes of earlier predictions."),
    ]
    for path, kind, name, summary in described:

        async def endpoint(request: Request) -> Response:
            # Reached only where ``build_app`` is not in front.
            return await _answered(lambda keep: calls(request.scope, request.receive, keep))

        app.add_api_route(
            path,
            endpoint,
            methods=["POST"],
            name=name,
            summary=summary,
            tags=["predictions"],
            openapi_extra=describe_body(kind),
        )


def _mount_infer(app: FastAPI, infer_calls: InferCalls) -> None:
    for place in ("/v2/models/{model_id}", "/v2/models/{model_id}/versions/{version}"):

        async def endpoint(request: Request, model_id: str, version: str | None = None) -> Response:
            target = (model_id, version)
            return await _answered(lambda keep: infer_calls(request.scope, request.receive, keep, target))

        app.add_api_route(
            f"{place}/infer",
            endpoint,
            methods=["POST"],
            name="infer_of_version" if "version" in place else "infer",
            summary="Outputs for tensors, in JSON or with raw bytes after it.",
            tags=["open inference protocol"],
            openapi_extra=describe_body(InferBody),
        )


async def _answered(call: Callable[[Send], Awaitable[None]]) -> Response:
    """What one of the loaded calls has sent."""
    sent: list[Mapping[str, Any]] = []

    async def keep(message: Mapping[str, Any]) -> None:
        sent.append(message)

    await call(keep)
    if not sent:
        raise ClientDisconnected
    response = Response(sent[1]["body"], sent[0]["status"])
    response.raw_headers = list(sent[0]["headers"])
    return response


async def _check_url(request: Request) -> None:
    scope = request.scope
    if "\0" in scope["path"] or b"%00" in scope["query_string"]:
        raise MalformedBody("the URL contains U+0000, which no database can store in a text")
    for part in (scope.get("raw_path") or b"", scope["query_string"]):
        try:
            unquote_to_bytes(part.decode("ascii")).decode()
        except UnicodeDecodeError as exc:
            # It would become U+FFFD, and so would another one: two names would be one.
            raise MalformedBody(
                f"the URL is not percent-encoded UTF-8: {exc.object[exc.start : exc.end]!r}"
            ) from exc


async def _refuse_unknown_parameters(request: Request) -> None:
    known = [parameter.alias for parameter in request.scope["route"].dependant.query_params]
    for name in request.query_params:
        if name not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise InvalidField(
                f"{request.method} {request.url.path} has no parameter {name[:80]!r}; {takes}",
                field=f"query.{name[:80]}",
            )


def _respond(request: Request, error: PhoenixError) -> Response:
    is_inference = request.url.path == "/v2" or request.url.path.startswith("/v2/")
    status = inference_status_of(error) if is_inference else status_of(error)
    if status >= 500:
        log.error("%s: %s", error.code, error.message, extra={"details": error.details})
    body = encode_inference_error(error) if is_inference else encode_error(error)
    response = Response(body, status, media_type="application/json")
    if (seconds := retry_after_s(error)) is not None:
        response.headers["retry-after"] = str(seconds)
    return response


def _map_errors(app: FastAPI) -> None:
    @app.exception_handler(PhoenixError)
    async def known(request: Request, exc: PhoenixError) -> Response:
        return _respond(request, exc)

    @app.exception_handler(ClientDisconnected)
    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, exc: Exception) -> Response:
        # Nobody reads it: it only tells the log what happened.
        return Response(status_code=_CLIENT_GONE)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, exc: RequestValidationError) -> Response:
        first = exc.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        return _respond(request, InvalidField(f"{field}: {first['msg']}", field=field))

    @app.exception_handler(HTTPException)
    async def http(request: Request, exc: HTTPException) -> Response:
        where = f"{request.method} {request.url.path}"
        if exc.status_code == 404:
            return _respond(request, PathUnknown(f"there is no {where}; /docs lists what there is"))
        if exc.status_code == 405:
            return _respond(
                request, MethodNotAllowed(f"{where}: the path exists, the method does not; see /docs")
            )
        return _respond(request, MalformedBody(str(exc.detail)))

    @app.exception_handler(Exception)
    async def unknown(request: Request, exc: Exception) -> Response:
        request_id = getattr(request.state, "request_id", "")
        where = f"{request.method} {request.url.path}"
        log.error("%s failed: %s", where, exc, exc_info=exc, extra={"request_id": request_id})
        response = _respond(request, InternalError(DEFECT))
        response.headers["x-request-id"] = request_id
        return response


def _models_state(live: LiveModels) -> str:
    if not live.is_ready:
        return "the registry was not read yet"
    failed = live.failures()
    return "ok" if not failed else f"{len(failed)} active versions do not load: {', '.join(sorted(failed))}"


def _devices_state(live: LiveModels) -> str:
    displaced = live.displaced()
    return "ok" if not displaced else f"not where they should run: {', '.join(sorted(displaced))}"


async def _features_state(features: FeatureStore) -> str:
    try:
        await features.check()
    except FeatureStoreUnavailable as exc:
        return exc.message
    return "ok"


def _log_state(phoenix: Phoenix) -> str:
    """Whether the role that empties the journal has got on lately; its heartbeat is a metric."""
    kafka = phoenix.kafka
    heartbeat, wrong = (
        (LOG_HEARTBEAT, "no role takes them from there")
        if kafka is None
        else (SHIP_HEARTBEAT, f"no role gets them to {kafka.name}")
    )
    shown = render(phoenix.settings.metrics_folder, (heartbeat,))
    silent_s = time.time() - float(shown.rsplit(b" ", 1)[1])
    return "ok" if silent_s < _LOG_SILENT_S else f"predictions wait in the journal: {wrong}"


class _DatabaseProbe:
    """Asks the database with the patience of a health check, which a database that hangs does not have."""

    def __init__(self, phoenix: Phoenix) -> None:
        self._phoenix = phoenix
        self._asking: asyncio.Task[str] | None = None

    async def state(self) -> str:
        # One question at a time: a database that hangs must not get all threads, one a health check.
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(asyncio.to_thread(_database_state, self._phoenix))
        answered, _ = await asyncio.wait([self._asking], timeout=_DATABASE_PATIENCE_S)
        if not answered:
            return f"the database {self._phoenix.database.name} does not answer within {_DATABASE_PATIENCE_S:g} s"
        return self._asking.result()


def _database_state(phoenix: Phoenix) -> str:
    try:
        phoenix.database.check()
    except DatabaseUnavailable as exc:
        return exc.message
    return "ok"
