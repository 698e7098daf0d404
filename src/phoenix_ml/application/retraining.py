"""What people and outside trainers say of retrain jobs; healers take it up from there (``heal``)."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import msgspec

from phoenix_ml.application.ports import ArtifactStore, JobQuery, Monitoring, Registry, RetrainJobs
from phoenix_ml.domain.errors import JobConflict
from phoenix_ml.domain.features import FeatureRule
from phoenix_ml.domain.healing import OUTSIDE, JobStatus, RetrainJob, request_id
from phoenix_ml.domain.models import ModelVersion, check_takes_rows, next_version
from phoenix_ml.domain.routing import Role, default_routing


def answering_version(registry: Registry, model_id: str) -> ModelVersion:
    """The champion; of a model that nobody has activated, its highest version. Raises ModelUnknown."""
    versions = registry.list_versions(model_id)
    active = [one for one in versions if one.is_active]
    routing = registry.routings().get(model_id) or default_routing(active)
    arms = () if routing is None else routing.arms
    champion = next((arm.version for arm in arms if arm.role is Role.CHAMPION), None)
    return next((one for one in versions if one.version == champion), versions[-1])


def ask_for_retraining(
    registry: Registry, jobs: RetrainJobs, monitoring: Monitoring, model_id: str, actor: str, now_ms: int
) -> tuple[RetrainJob, bool]:
    """A job for the champion, whatever the monitor thinks, and whether it is new: one is under way at a time.

    Raises ModelUnknown, and TakesTensors for a champion whose answers make no table to train on.
    """
    champion = answering_version(registry, model_id)
    check_takes_rows(champion.metadata)
    is_paused = monitoring.settings(model_id).healing_paused
    under_way, _ = jobs.page(JobQuery(model_id, limit=1000, under_way=True))
    for known in under_way:
        is_put_off = is_paused and bool(known.evidence) and known.status is JobStatus.REQUESTED
        if known.model_version == champion.version and not is_put_off:
            return known, False
    latest, _ = jobs.page(JobQuery(model_id, limit=1))
    job = RetrainJob(
        # Made of what was there, so that two who ask at once ask for one.
        id=request_id(model_id, champion.version, "asked", [one.id for one in latest]),
        model_id=model_id,
        model_version=champion.version,
        reason=f"asked for by {actor}",
        evidence={},
        status=JobStatus.REQUESTED,
        requested_at_ms=now_ms,
        updated_at_ms=now_ms,
    )
    is_new = jobs.add(job)
    return (job, True) if is_new else (jobs.get(job.id), False)


def accept_model(
    registry: Registry,
    jobs: RetrainJobs,
    artifacts: ArtifactStore,
    job_id: str,
    model: Path,
    features: Mapping[str, FeatureRule] | None,
    now_ms: int,
    *,
    sample: Path | None = None,
) -> RetrainJob:
    """The job with the model that an outside trainer has made; a healer checks it, over the ``sample`` of what the
    trainer's own library answers as well. The same model again is a no-op, but with another sample.

    Raises JobUnknown, JobConflict for a job that is not waiting for a model, ArtifactStoreUnavailable.
    """
    job = jobs.get(job_id)
    sha256 = _digest(model)
    known = job.result or {}
    # Once it is checked, nobody knows what sample it came with.
    is_same_sample = (
        "sample" not in known or sample is None or _digest(sample) == (known["sample"] or {}).get("sha256")
    )
    if known.get("sha256") == sha256 and is_same_sample:
        return job
    _check_waits(job)
    stored = artifacts.put(model)
    result = {
        "sha256": sha256,
        "uri": stored.uri,
        "features": None if features is None else msgspec.to_builtins(features),
        "sample": None if sample is None else msgspec.to_builtins(artifacts.put(sample)),
    }
    version = next_version([one.version for one in registry.list_versions(job.model_id)])
    return _hand_in(jobs, job, now_ms, result, new_version=version)


def accept_failure(jobs: RetrainJobs, job_id: str, error: str, now_ms: int) -> RetrainJob:
    """The job of which an outside trainer says why there is no model; a healer asks again later, or gives it up.

    Raises JobUnknown, JobConflict for a job that is not waiting for a model.
    """
    job = jobs.get(job_id)
    _check_waits(job)
    return _hand_in(jobs, job, now_ms, {"error": error})


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_waits(job: RetrainJob) -> None:
    is_waiting = job.status is JobStatus.REQUESTED and job.owner is None
    if not is_waiting and not (job.status is JobStatus.TRAINING and job.owner == OUTSIDE):
        raise JobConflict(
            f"the retrain job {job.id} is {job.status} and waits for nothing from outside",
            job_id=job.id,
            current=job.status,
        )


def _hand_in(
    jobs: RetrainJobs, job: RetrainJob, now_ms: int, result: Mapping[str, object], **facts: object
) -> RetrainJob:
    moved = jobs.move(
        job, JobStatus.CHECKING, now_ms, result=dict(result), owner=None, owned_until=0, **facts
    )
    if moved is None:
        raise JobConflict(f"the retrain job {job.id} has just changed: look at it again", job_id=job.id)
    return moved
