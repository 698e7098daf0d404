"""Routes of what monitors have seen: reports, incidents, alerts, and how a model is watched."""

import time
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import Response

from phoenix_ml.application.ports import IncidentQuery
from phoenix_ml.application.reports import describe_alert, describe_incident, describe_report, iso_time
from phoenix_ml.bootstrap import Phoenix
from phoenix_ml.domain.errors import InvalidField
from phoenix_ml.domain.monitoring import MonitorSettings
from phoenix_ml.infrastructure.http.caller import name_caller
from phoenix_ml.infrastructure.http.routes import answer, describe_body, json_body

Limit = Annotated[int, Query(ge=1, le=1000)]


def monitoring_routes(phoenix: Phoenix) -> APIRouter:
    """Monitoring's routes in one API process. They show what a monitor has found; nothing is computed here."""
    router = APIRouter(tags=["monitoring"])
    monitoring, registry = phoenix.monitoring, phoenix.registry

    def reports(
        model_id: str, kind: str, model_version: str | None, limit: int, cursor: str | None
    ) -> Response:
        registry.check_model(model_id)
        found, next_cursor = monitoring.reports(model_id, kind, model_version, limit, cursor)
        content = {"items": [describe_report(report) for report in found], "next_cursor": next_cursor}
        # No report is not "no drift", and not "no errors"; a page after the last one says nothing of that.
        return answer(content if found or cursor else content | {"state": "insufficient data"})

    @router.get("/monitoring/{model_id}/drift")
    def show_drift(
        model_id: str,
        model_version: str | None = None,
        limit: Annotated[int, Query(ge=1, le=200)] = 1,
        cursor: str | None = None,
    ) -> Response:
        """The latest drift reports, the newest first."""
        return reports(model_id, "drift", model_version, limit, cursor)

    @router.get("/monitoring/{model_id}/performance")
    def show_performance(
        model_id: str,
        model_version: str | None = None,
        limit: Annotated[int, Query(ge=1, le=200)] = 1,
        cursor: str | None = None,
    ) -> Response:
        """How good the model is, by the last outcomes and as it is estimated without them, the newest first."""
        return reports(model_id, "performance", model_version, limit, cursor)

    @router.post("/monitoring/{model_id}/drift/check", status_code=202)
    def check_drift(model_id: str) -> Response:
        """Asks the monitor for a report at once, and answers the latest there is.

        The new one is that which `GET /monitoring/{model_id}/drift` shows with a later `created_at` than `requested_at`.
        """
        registry.check_model(model_id)
        at_ms = time.time_ns() // 1_000_000
        is_watched = monitoring.request_check(model_id, at_ms)
        latest, _ = monitoring.reports(model_id, "drift")
        content = {
            "requested_at": iso_time(at_ms) if is_watched else None,
            "is_watched": is_watched,
            "latest": describe_report(latest[0]) if latest else None,
        }
        return answer(content, 202)

    def incidents(query: IncidentQuery) -> Response:
        if query.model_id is not None:
            registry.check_model(query.model_id)
        found, next_cursor = monitoring.incidents(query)
        return answer({"items": [describe_incident(one) for one in found], "next_cursor": next_cursor})

    @router.get("/monitoring/{model_id}/incidents")
    def list_model_incidents(
        model_id: str,
        model_version: str | None = None,
        unresolved: bool = False,
        limit: Limit = 50,
        cursor: str | None = None,
    ) -> Response:
        """A model's incidents, the latest opened first."""
        return incidents(IncidentQuery(model_id, model_version, unresolved, limit, cursor))

    @router.get("/incidents")
    def list_incidents(
        model_id: str | None = None, unresolved: bool = False, limit: Limit = 50, cursor: str | None = None
    ) -> Response:
        """All incidents, the latest opened first."""
        return incidents(IncidentQuery(model_id, None, unresolved, limit, cursor))

    @router.post("/incidents/{incident_id}/ack")
    def acknowledge(incident_id: str, request: Request) -> Response:
        """Says that a person knows of the incident; it goes on being watched."""
        at_ms = time.time_ns() // 1_000_000
        return answer(
            describe_incident(monitoring.acknowledge(incident_id, name_caller(request.scope), at_ms))
        )

    @router.get("/alerts")
    def list_alerts(model_id: str | None = None, limit: Limit = 50, cursor: str | None = None) -> Response:
        """What people were told, the newest first."""
        if model_id is not None:
            registry.check_model(model_id)
        found, next_cursor = monitoring.alerts(model_id, limit, cursor)
        return answer({"items": [describe_alert(one) for one in found], "next_cursor": next_cursor})

    @router.get("/models/{model_id}/monitoring", tags=["models"])
    def show_settings(model_id: str) -> Response:
        """How the model is watched and healed: its own settings over those of all models over the defaults."""
        registry.check_model(model_id)
        return answer(monitoring.settings(model_id))

    @router.put(
        "/models/{model_id}/monitoring", tags=["models"], openapi_extra=describe_body(MonitorSettings)
    )
    def change_settings(
        model_id: str,
        request: Request,
        settings: Annotated[Any, Depends(json_body(Any, phoenix.settings.body_limit_bytes))],
    ) -> Response:
        """Replaces the model's own settings; what is left out is that of all models, or the default."""
        if not isinstance(settings, dict):
            raise InvalidField("send a JSON object of settings", field="settings")
        actor = name_caller(request.scope)
        return answer(monitoring.change_settings(model_id, settings, actor, replace=True))

    return router
