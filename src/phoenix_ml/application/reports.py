"""What people and tools read of versions and predictions, as plain JSON."""

from datetime import UTC, datetime
from typing import Any

import msgspec

from phoenix_ml.application.ports import LoggedPrediction, MonitorReport, PredictionLog, UnmatchedOutcome
from phoenix_ml.domain.errors import InvalidField
from phoenix_ml.domain.events import Event, OutcomeReported
from phoenix_ml.domain.healing import RetrainJob
from phoenix_ml.domain.incidents import Alert, Incident
from phoenix_ml.domain.models import ModelVersion


def iso_time(at_ms: int | None) -> str | None:
    """RFC 3339 in UTC, with milliseconds.

    >>> iso_time(0)
    '1970-01-01T00:00:00.000Z'
    """
    if at_ms is None:
        return None
    return datetime.fromtimestamp(at_ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def epoch_ms(at: datetime, field: str) -> int:
    """Milliseconds since the epoch; a time without a zone is in UTC.

    Raises InvalidField for the first and the last year there are: in another zone they would be beyond
    what Python and the databases can hold.
    """
    at = at if at.tzinfo else at.replace(tzinfo=UTC)
    if not 1 < at.year < 9999:
        raise InvalidField(f"{field}: the year {at.year} is beyond what can be stored", field=field)
    return int(at.timestamp() * 1000)


def describe_version(version: ModelVersion, *, baseline: bool = False) -> dict[str, Any]:
    """One version; the baseline only on request, it may be long."""
    metadata = version.metadata
    described: dict[str, Any] = {
        "id": version.model_id,
        "version": version.version,
        "stage": version.stage,
        "is_active": version.is_active,
        "framework": version.framework,
        "sha256": version.sha256,
        "uri": version.uri,
        "created_at": iso_time(version.created_at_ms),
        "task": metadata.task,
        "class_labels": metadata.class_labels,
        "features": {name: msgspec.to_builtins(metadata.contract[name]) for name in metadata.features},
        "inputs": msgspec.to_builtins(metadata.signature.inputs),
        "outputs": msgspec.to_builtins(metadata.signature.outputs),
        "runtime": metadata.runtime,
        "row_independent": metadata.row_independent,
        "has_baseline": metadata.baseline is not None,
    }
    if baseline:
        described["baseline"] = msgspec.to_builtins(metadata.baseline)
    return described


def describe_prediction(row: LoggedPrediction) -> dict[str, Any]:
    """One row of the prediction log; its outcome is null until somebody reports it."""
    return {
        "prediction_id": row.id,
        "model_id": row.model_id,
        "model_version": row.model_version,
        "entity_id": row.entity_id,
        "request_id": row.request_id,
        "result": row.result,
        "confidence": row.confidence,
        "probabilities": row.probabilities,
        "features": row.features,
        "feature_sources": row.feature_sources,
        "route": row.route,
        "latency_ms": row.latency_ms,
        "created_at": iso_time(row.created_at_ms),
        "sha256": row.sha256,
        "batch_size": row.batch_size,
        "batch_position": row.batch_position,
        "outcome": row.outcome,
        "outcome_at": iso_time(row.outcome_at_ms),
    }


def list_unmatched(log: PredictionLog, limit: int, cursor: str | None) -> dict[str, Any]:
    """A page of the outcomes whose prediction is not in the log, newest first, and how many there are in all."""
    count, found = log.unmatched_outcomes(limit + 1, cursor)
    page = found[:limit]
    return {
        "count": count,
        "items": [describe_outcome(outcome) for outcome in page],
        "next_cursor": page[-1].cursor if len(found) > limit else None,
    }


def describe_outcome(outcome: UnmatchedOutcome) -> dict[str, Any]:
    return {
        "prediction_id": outcome.prediction_id,
        "outcome": outcome.outcome,
        "observed_at": iso_time(outcome.observed_at_ms),
        "received_at": iso_time(outcome.received_at_ms),
    }


def describe_event(event: Event) -> dict[str, Any]:
    """An event that is on its way; a prediction's values are not named yet."""
    if isinstance(event, OutcomeReported):
        return {
            "kind": "outcome",
            "id": event.id,
            "prediction_id": event.prediction_id,
            "outcome": event.outcome,
            "received_at": iso_time(event.received_at_ms),
        }
    return {
        "kind": "prediction",
        "id": event.id,
        "model_id": event.model_id,
        "model_version": event.model_version,
        "entity_id": event.entity_id,
        "result": event.result,
        "created_at": iso_time(event.created_at_ms),
    }


def describe_report(report: MonitorReport) -> dict[str, Any]:
    """One look at a version: what was found stands under ``report``."""
    return {
        "model_id": report.model_id,
        "model_version": report.model_version,
        "created_at": iso_time(report.created_at_ms),
        "rows": report.rows,
        "report": report.report,
    }


def describe_incident(incident: Incident) -> dict[str, Any]:
    return {
        "incident_id": incident.id,
        "model_id": incident.model_id,
        "model_version": incident.model_version,
        "kind": incident.kind,
        "cause": incident.cause,
        "severity": incident.severity,
        "status": incident.status,
        "summary": incident.summary,
        "evidence": incident.evidence,
        "opened_at": iso_time(incident.opened_at_ms),
        "updated_at": iso_time(incident.updated_at_ms),
        "acknowledged_at": iso_time(incident.acknowledged_at_ms),
        "acknowledged_by": incident.acknowledged_by,
        "resolved_at": iso_time(incident.resolved_at_ms),
        "resolution": incident.resolution,
    }


def describe_alert(alert: Alert) -> dict[str, Any]:
    return {
        "alert_id": alert.id,
        "model_id": alert.model_id,
        "model_version": alert.model_version,
        "severity": alert.severity,
        "title": alert.title,
        "text": alert.text,
        "incidents": alert.incidents,
        "created_at": iso_time(alert.at_ms),
    }


def describe_job(job: RetrainJob) -> dict[str, Any]:
    return {
        "job_id": job.id,
        "model_id": job.model_id,
        "model_version": job.model_version,
        "status": job.status,
        "reason": job.reason,
        "evidence": job.evidence,
        "requested_at": iso_time(job.requested_at_ms),
        "updated_at": iso_time(job.updated_at_ms),
        "attempts": job.attempts,
        "new_version": job.new_version,
        "error": job.error,
        "result": job.result,
        "log_tail": job.log_tail,
    }
