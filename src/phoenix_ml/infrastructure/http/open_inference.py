"""The routes of the Open Inference Protocol beside ``infer``: health, metadata, statistics, model repository."""

from collections.abc import Callable
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool

from phoenix_ml import __version__
from phoenix_ml.application.protocol import (
    describe_config,
    describe_model,
    describe_server,
    describe_statistics,
    find_version,
    list_index,
    load_model,
    unload_model,
)
from phoenix_ml.application.serving import LiveModels
from phoenix_ml.bootstrap import Phoenix
from phoenix_ml.domain.errors import ModelLoadFailed, VersionInactive
from phoenix_ml.infrastructure.http.bodies import read_body
from phoenix_ml.infrastructure.http.caller import name_caller
from phoenix_ml.infrastructure.http.codec import decode_json
from phoenix_ml.infrastructure.http.routes import answer
from phoenix_ml.infrastructure.telemetry.statistics import count_by_version


class _Index(msgspec.Struct):
    ready: bool = False


class _Repository(msgspec.Struct):
    parameters: dict[str, Any] | None = None


def inference_routes(phoenix: Phoenix, live: LiveModels) -> APIRouter:
    """The protocol's routes in one API process."""
    router = APIRouter(tags=["open inference protocol"])
    settings = phoenix.settings

    def each(path: str) -> Callable[[Callable[[str, str | None], Response]], None]:
        """The route under the model's path, and under the version's."""

        def add(answer_for: Callable[[str, str | None], Response]) -> None:
            name, description = answer_for.__name__, answer_for.__doc__

            def of_champion(model_id: str) -> Response:
                return answer_for(model_id, None)

            def of_version(model_id: str, version: str) -> Response:
                return answer_for(model_id, version)

            place = "/v2/models/{model_id}"
            router.add_api_route(
                place + path, of_champion, methods=["GET"], name=name, description=description
            )
            place += "/versions/{version}"
            router.add_api_route(
                place + path, of_version, methods=["GET"], name=f"{name}_of_version", description=description
            )

        return add

    @router.get("/v2")
    async def server_metadata() -> Response:
        """Name, version and extensions of the server."""
        return answer(describe_server(__version__))

    @router.get("/v2/health/live")
    async def server_live() -> Response:
        """200 while the process answers at all."""
        return answer({"live": True})

    @router.get("/v2/health/ready")
    async def server_ready() -> Response:
        """200 once the registry was read and its active versions are loaded."""
        return answer({"ready": live.is_ready}, 200 if live.is_ready else 503)

    @router.get("/v2/models/stats")  # before the routes of a model, whose name it looks like
    def all_statistics() -> Response:
        """The statistics of every model."""
        return answer(describe_statistics(live, None, None, count_by_version(settings.metrics_folder)))

    @each("/ready")
    def model_ready(model_id: str, version: str | None) -> Response:
        """200 when the version, or without one the champion, answers."""
        try:
            find_version(live, model_id, version)
        except (VersionInactive, ModelLoadFailed) as exc:
            return answer({"name": model_id, "ready": False, "error": exc.message}, 503)
        return answer({"name": model_id, "ready": True})

    @each("")
    def model_metadata(model_id: str, version: str | None) -> Response:
        """Inputs and outputs with their datatypes and shapes; -1 is a dimension that the caller chooses."""
        return answer(describe_model(live, model_id, version))

    @each("/config")
    def model_config(model_id: str, version: str | None) -> Response:
        """The configuration as Triton's clients expect it."""
        return answer(describe_config(live, model_id, version, settings.batch_limit))

    @each("/stats")
    def model_statistics(model_id: str, version: str | None) -> Response:
        """Requests, rows and engine runs of all processes, as Triton counts them."""
        return answer(describe_statistics(live, model_id, version, count_by_version(settings.metrics_folder)))

    @router.post("/v2/repository/index")
    async def repository_index(request: Request) -> Response:
        """Every registered version and whether it is ready."""
        body = await read_body(request.receive, settings.body_limit_bytes)
        asked = decode_json(body, _Index) if body else _Index()  # Triton's client sends none
        return answer(list_index(live, ready_only=asked.ready))

    @router.post("/v2/repository/models/{model_id}/load")
    async def repository_load(model_id: str, request: Request) -> Response:
        """Activates `parameters.version`, or the highest version where none is active."""
        body = await read_body(request.receive, settings.body_limit_bytes)
        asked = decode_json(body, _Repository) if body else _Repository()
        actor = name_caller(request.scope)

        def load() -> None:
            load_model(
                phoenix.registry,
                phoenix.artifacts,
                phoenix.engines,
                model_id,
                asked.parameters or {},
                actor=actor,
            )
            live.refresh(model_id)

        await run_in_threadpool(load)
        return answer({})

    @router.post("/v2/repository/models/{model_id}/unload")
    def repository_unload(model_id: str, request: Request) -> Response:
        """Takes every version of the model out of service, and its routing with them."""
        unload_model(phoenix.registry, model_id, actor=name_caller(request.scope))
        live.refresh(model_id)
        return answer({})

    return router
