"""Routes of retrain jobs: what became of them, new ones, and what trainers outside hand in."""

import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException

from phoenix_ml.application.export import RESULT_COLUMN
from phoenix_ml.application.ports import JobQuery
from phoenix_ml.application.reports import describe_job
from phoenix_ml.application.retraining import accept_failure, accept_model, ask_for_retraining
from phoenix_ml.bootstrap import Phoenix
from phoenix_ml.domain.errors import InvalidField, MalformedBody
from phoenix_ml.domain.features import FeatureRule
from phoenix_ml.domain.healing import RetrainJob
from phoenix_ml.infrastructure.http.bodies import limit_body
from phoenix_ml.infrastructure.http.caller import name_caller
from phoenix_ml.infrastructure.http.codec import decode_json
from phoenix_ml.infrastructure.http.models import read_parts, save_upload
from phoenix_ml.infrastructure.http.routes import answer, describe_body, json_body
from phoenix_ml.infrastructure.tables import open_table
from phoenix_ml.settings import UPLOAD_PREFIX


class RetrainRequest(msgspec.Struct, forbid_unknown_fields=True):
    model_id: str


class TrainingFailure(msgspec.Struct, forbid_unknown_fields=True):
    error: Annotated[str, msgspec.Meta(min_length=1, max_length=2000)]


def retraining_routes(phoenix: Phoenix) -> APIRouter:
    """The routes in one API process. Nothing is trained here."""
    router = APIRouter(tags=["monitoring"])
    registry, jobs = phoenix.registry, phoenix.retrain_jobs
    body_limit_bytes = phoenix.settings.body_limit_bytes

    @router.get("/retrain-jobs")
    def list_jobs(
        model_id: str | None = None,
        limit: Annotated[int, Query(ge=1, le=1000)] = 50,
        cursor: str | None = None,
    ) -> Response:
        """Retrain jobs, the latest requested first."""
        if model_id is not None:
            registry.check_model(model_id)
        found, next_cursor = jobs.page(JobQuery(model_id, limit, cursor=cursor))
        return answer({"items": [describe_job(job) for job in found], "next_cursor": next_cursor})

    @router.post("/retrain-jobs", status_code=202, openapi_extra=describe_body(RetrainRequest))
    def request_retraining(
        request: Request,
        wanted: Annotated[Any, Depends(json_body(RetrainRequest, body_limit_bytes))],
    ) -> Response:
        """Asks for a retraining of the champion now, whatever the monitor thinks; 200 for one that is under way."""
        actor = name_caller(request.scope)
        job, is_new = ask_for_retraining(
            registry, jobs, phoenix.monitoring, wanted.model_id, actor, _now_ms()
        )
        return answer(describe_job(job), 202 if is_new else 200)

    @router.get("/retrain-jobs/{job_id}")
    def show_job(job_id: str) -> Response:
        """One retrain job: where it is, and what came of it."""
        return answer(describe_job(jobs.get(job_id)))

    @router.post(
        "/retrain-jobs/{job_id}/model",
        status_code=202,
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {
                    "multipart/form-data": {
                        "schema": {
                            "type": "object",
                            "required": ["artifact"],
                            "properties": {
                                "artifact": {"type": "string", "format": "binary"},
                                "features": {
                                    "type": "string",
                                    "description": "JSON: the feature contract; absent, that of the champion.",
                                },
                                "sample": {
                                    "type": "string",
                                    "format": "binary",
                                    "description": "Parquet: rows of features, and in _result what the trainer's "
                                    "own library answers; the model must answer the same.",
                                },
                            },
                        }
                    }
                },
            }
        },
    )
    async def hand_in_model(job_id: str, request: Request) -> Response:
        """What a trainer outside has made; a healer checks it, and registers it where it is fit."""
        limited = Request(request.scope, limit_body(request.receive, phoenix.settings.upload_limit_bytes))
        try:
            async with limited.form(max_files=2, max_fields=2) as form:
                artifact, features, sample = read_parts(form, "artifact", "features", "sample")
                if not isinstance(artifact, UploadFile):
                    raise InvalidField(
                        "send the model file as the multipart part 'artifact'", field="artifact"
                    )
                if isinstance(features, UploadFile):
                    raise InvalidField("send 'features' as text, not as a file", field="features")
                if isinstance(sample, str):
                    raise InvalidField("send 'sample' as a file of Parquet, not as text", field="sample")
                rules = None if features is None else decode_json(features.encode(), dict[str, FeatureRule])
                job = await run_in_threadpool(_accept_upload, phoenix, job_id, artifact, rules, sample)
        except MultiPartException as exc:
            raise MalformedBody(f"the body is not multipart/form-data: {exc.message}") from exc
        return answer(describe_job(job), 202)

    @router.post(
        "/retrain-jobs/{job_id}/failure", status_code=202, openapi_extra=describe_body(TrainingFailure)
    )
    def hand_in_failure(
        job_id: str, failure: Annotated[Any, Depends(json_body(TrainingFailure, body_limit_bytes))]
    ) -> Response:
        """Why a trainer outside has no model; it is asked again later, or the job is given up."""
        return answer(describe_job(accept_failure(jobs, job_id, failure.error, _now_ms())), 202)

    return router


def _accept_upload(
    phoenix: Phoenix,
    job_id: str,
    artifact: UploadFile,
    features: dict[str, FeatureRule] | None,
    sample: UploadFile | None,
) -> RetrainJob:
    phoenix.settings.data.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=phoenix.settings.data, prefix=UPLOAD_PREFIX) as folder:
        path = save_upload(artifact, Path(folder) / "model.onnx")
        answers = None if sample is None else save_upload(sample, Path(folder) / "sample.parquet")
        if answers is not None:
            _check_sample(answers)
        where = phoenix.registry, phoenix.retrain_jobs, phoenix.artifacts
        return accept_model(*where, job_id, path, features, _now_ms(), sample=answers)


def _check_sample(path: Path) -> None:
    """Whoever sends it hears at once what a healer would find hours later. Raises InvalidField."""
    try:
        with open_table(path) as table:
            names = table.names
    except InvalidField as exc:
        raise InvalidField(f"'sample' is no Parquet file: {exc.message}", field="sample") from exc
    if RESULT_COLUMN not in names:
        raise InvalidField(
            f"'sample' has no column {RESULT_COLUMN} with what the trainer's own library answers; "
            f"it has {', '.join(names)}",
            field="sample",
        )


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
