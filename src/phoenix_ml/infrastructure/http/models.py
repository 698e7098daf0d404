"""Routes of the model catalogue."""

import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import anyio
import msgspec
from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException

from phoenix_ml.application.catalogue import (
    Registration,
    activate,
    notes_on,
    register,
    set_routing,
)
from phoenix_ml.application.reports import describe_version
from phoenix_ml.application.serving import LiveModels
from phoenix_ml.application.trial import Description, Trials, describe_apart
from phoenix_ml.bootstrap import Phoenix, open_trials
from phoenix_ml.domain.errors import InvalidField, MalformedBody
from phoenix_ml.domain.models import ModelVersion, Stage
from phoenix_ml.domain.routing import Routing
from phoenix_ml.infrastructure.http.bodies import limit_body
from phoenix_ml.infrastructure.http.caller import name_caller
from phoenix_ml.infrastructure.http.codec import decode_json
from phoenix_ml.infrastructure.http.routes import answer, describe_body, json_body
from phoenix_ml.settings import UPLOAD_PREFIX

# Each has a process of its own meanwhile, and a thread here: those of other calls must not wait for a model that hangs.
_UPLOADS_AT_ONCE = 4


class StageChange(msgspec.Struct, forbid_unknown_fields=True):
    stage: Stage


class Upload(Registration, frozen=True, forbid_unknown_fields=True):
    """What is said of an uploaded version: ``time`` and ``outcome`` name columns of its reference."""

    time: str | None = None
    outcome: str | None = None


def model_routes(phoenix: Phoenix, live: LiveModels) -> APIRouter:
    """The catalogue's routes in one API process."""
    router = APIRouter(tags=["models"])
    registry = phoenix.registry
    settings = phoenix.settings
    body_limit_bytes = settings.body_limit_bytes
    trials = open_trials(settings, limit_s=settings.upload_limit_s, memory_mib=settings.upload_memory_mib)
    uploads = anyio.CapacityLimiter(_UPLOADS_AT_ONCE)

    def changed(version: ModelVersion) -> Response:
        live.refresh(version.model_id)  # this process at once, the others at their next poll
        return answer(describe_version(version))

    @router.get("/models")
    def list_models(limit: Annotated[int, Query(ge=1, le=1000)] = 100, cursor: str | None = None) -> Response:
        """Versions with stage and activity, and the routings that were set; by model, then by version."""
        routings = registry.routings()
        versions = registry.list_versions()
        if cursor is not None:
            places = {f"{version.model_id}/{version.version}": n for n, version in enumerate(versions)}
            if cursor not in places:
                raise InvalidField("the cursor is not one that a page has answered", field="cursor")
            versions = versions[places[cursor] + 1 :]
        page = versions[:limit]
        items = [{**describe_version(version), "routing": routings.get(version.model_id)} for version in page]
        more = len(versions) > limit
        next_cursor = f"{page[-1].model_id}/{page[-1].version}" if more else None
        return answer({"items": items, "next_cursor": next_cursor})

    @router.post(
        "/models",
        status_code=201,
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {
                    "multipart/form-data": {
                        "schema": {
                            "type": "object",
                            "required": ["artifact", "model"],
                            "properties": {
                                "artifact": {"type": "string", "format": "binary"},
                                "model": {
                                    "type": "string",
                                    "description": "JSON: id and version; optionally stage, features, task, framework, "
                                    "and outcome and time, which name columns of the reference.",
                                },
                                "reference": {
                                    "type": "string",
                                    "format": "binary",
                                    "description": "Training rows, CSV or Parquet: the version's baseline.",
                                },
                            },
                        }
                    }
                },
            }
        },
    )
    async def register_model(request: Request) -> Response:
        """Registers a version from an uploaded artifact: checked, loaded, and run on sample rows."""
        limited = Request(request.scope, limit_body(request.receive, settings.upload_limit_bytes))
        is_given_up = threading.Event()
        try:
            async with limited.form(max_files=2, max_fields=4) as form:
                artifact, model, reference = read_parts(form, "artifact", "model", "reference")
                if not isinstance(artifact, UploadFile):
                    raise InvalidField(
                        "send the model file as the multipart part 'artifact'", field="artifact"
                    )
                if model is None:
                    raise InvalidField(
                        "send the multipart part 'model': JSON with id and version", field="model"
                    )
                text = await model.read() if isinstance(model, UploadFile) else model.encode()
                registration = decode_json(text, Upload)
                if isinstance(reference, str):
                    raise InvalidField("send 'reference' as a file, .csv or .parquet", field="reference")
                if reference is None and (registration.time or registration.outcome):
                    raise InvalidField(
                        "'time' and 'outcome' name columns of the part 'reference', which was not sent",
                        field="reference",
                    )
                version = await anyio.to_thread.run_sync(
                    _register_upload,
                    phoenix,
                    trials,
                    registration,
                    artifact,
                    reference,
                    name_caller(request.scope),
                    lambda: not is_given_up.is_set(),
                    limiter=uploads,
                    abandon_on_cancel=True,
                )
        except MultiPartException as exc:
            raise MalformedBody(f"the body is not multipart/form-data: {exc.message}") from exc
        finally:
            # A stop that has waited long enough ends the model's process as well.
            is_given_up.set()
        await run_in_threadpool(live.refresh, version.model_id)
        return answer(describe_version(version) | {"notes": notes_on(version.metadata)}, 201)

    @router.get("/models/{model_id}")
    def show_model(model_id: str) -> Response:
        """A model's versions and its routing; the routing is null while the default applies."""
        versions = registry.list_versions(model_id)
        return answer(
            {
                "id": model_id,
                "versions": [describe_version(version) for version in versions],
                "routing": registry.routings().get(model_id),
            }
        )

    @router.get("/models/{model_id}/versions/{version}")
    def show_version(model_id: str, version: str, baseline: bool = False) -> Response:
        """One version; `baseline=true` adds the training data's distribution."""
        return answer(describe_version(registry.get(model_id, version), baseline=baseline))

    @router.post(
        "/models/{model_id}/versions/{version}/stage",
        openapi_extra=describe_body(StageChange),
    )
    def change_stage(
        model_id: str,
        version: str,
        request: Request,
        change: Annotated[Any, Depends(json_body(StageChange, body_limit_bytes))],
    ) -> Response:
        """Moves a version one step up or down: dev, staging, prod."""
        return changed(registry.set_stage(model_id, version, change.stage, name_caller(request.scope)))

    @router.post("/models/{model_id}/versions/{version}/activate")
    def activate_version(model_id: str, version: str, request: Request) -> Response:
        """Lets a version that loads answer requests: by name, by default, or under a routing."""
        actor = name_caller(request.scope)
        return changed(activate(registry, phoenix.artifacts, phoenix.engines, model_id, version, actor=actor))

    @router.post("/models/{model_id}/versions/{version}/deactivate")
    def deactivate(model_id: str, version: str, request: Request) -> Response:
        """Takes a version out of service; refused while the routing names it."""
        return changed(registry.set_active(model_id, version, False, name_caller(request.scope)))

    @router.get("/models/{model_id}/routing")
    def show_routing(model_id: str) -> Response:
        """The routing in force; `is_default` when none was set."""
        registry.check_model(model_id)
        routing = registry.routings().get(model_id)
        if routing is not None:
            return answer({"routing": routing, "is_default": False})
        model = live.models.get(model_id)
        in_force = model.router.routing if model is not None and model.router is not None else None
        return answer({"routing": in_force, "is_default": True})

    @router.put("/models/{model_id}/routing", openapi_extra=describe_body(Routing))
    def change_routing(
        model_id: str,
        request: Request,
        routing: Annotated[Any, Depends(json_body(Routing, body_limit_bytes))],
    ) -> Response:
        """Shares a model's requests out over versions; all processes follow within a second."""
        set_routing(registry, model_id, routing, actor=name_caller(request.scope))
        live.refresh(model_id)
        return answer({"routing": routing, "is_default": False})

    @router.delete("/models/{model_id}/routing")
    def clear_routing(model_id: str, request: Request) -> Response:
        """Goes back to the default: the highest stage, then the highest version, answers."""
        registry.check_model(model_id)
        registry.clear_routing(model_id, name_caller(request.scope))
        live.refresh(model_id)
        return show_routing(model_id)

    return router


def _register_upload(
    phoenix: Phoenix,
    trials: Trials,
    upload: Upload,
    artifact: UploadFile,
    reference: UploadFile | None,
    actor: str,
    keep_going: Callable[[], bool],
) -> ModelVersion:
    phoenix.settings.data.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=phoenix.settings.data.absolute(), prefix=UPLOAD_PREFIX) as name:
        folder = Path(name)
        path = save_upload(artifact, folder / "artifact.onnx")
        table = None
        if reference is not None:
            # What a caller names a file is not put into a path: it may hold anything.
            suffix = next((s for s in (".csv", ".parquet") if str(reference.filename).endswith(s)), "")
            table = save_upload(reference, folder / f"reference{suffix}")
        said = {field: getattr(upload, field) for field in Registration.__struct_fields__}
        registration = Registration(**said)
        wanted = Description(path, registration, folder, table, upload.time, upload.outcome)
        return register(
            phoenix.registry,
            phoenix.artifacts,
            phoenix.engines,
            path,
            registration,
            actor=actor,
            described=lambda: describe_apart(trials, wanted, keep_going),
        )


def read_parts(form: FormData, *names: str) -> list[UploadFile | str | None]:
    """The parts of these names, None for one that was not sent. Raises InvalidField for any other."""
    for name in form:
        if name not in names:
            raise InvalidField(
                f"there is no multipart part {name[:80]!r}; there are {', '.join(names)}", field=name[:80]
            )
    return [form.get(name) for name in names]


def save_upload(upload: UploadFile, path: Path) -> Path:
    """The path, where the uploaded file is now."""
    with path.open("wb") as file:
        shutil.copyfileobj(upload.file, file, 1 << 20)
    return path
