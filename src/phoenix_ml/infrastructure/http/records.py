"""Routes of what is on record: predictions, outcomes without one, the audit log."""

import threading
from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Query
from fastapi.responses import Response

from phoenix_ml.application.ports import PredictionQuery
from phoenix_ml.application.replay import replay
from phoenix_ml.application.reports import describe_prediction, epoch_ms, iso_time, list_unmatched
from phoenix_ml.bootstrap import Phoenix
from phoenix_ml.domain.errors import Overloaded
from phoenix_ml.infrastructure.http.routes import answer


def record_routes(phoenix: Phoenix) -> APIRouter:
    """The records' routes in one API process."""
    router = APIRouter()

    @router.get("/predictions", tags=["predictions"])
    def list_predictions(
        model_id: str | None = None,
        model_version: str | None = None,
        entity_id: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        limit: Annotated[int, Query(ge=1, le=1000)] = 50,
        cursor: str | None = None,
    ) -> Response:
        """The prediction log, newest first; pass `next_cursor` back as `cursor` for the next page."""
        query = PredictionQuery(
            model_id,
            model_version,
            entity_id,
            None if since is None else epoch_ms(since, "since"),
            None if until is None else epoch_ms(until, "until"),
            limit,
            cursor,
        )
        if model_id is not None:
            phoenix.registry.check_model(model_id)
        rows, next_cursor = phoenix.prediction_log.page(query)
        return answer({"items": [describe_prediction(row) for row in rows], "next_cursor": next_cursor})

    @router.get("/predictions/{prediction_id}", tags=["predictions"])
    def show_prediction(prediction_id: str) -> Response:
        """One prediction with its outcome, if one was reported."""
        return answer(describe_prediction(phoenix.prediction_log.get(prediction_id)))

    replaying = threading.Lock()

    @router.get("/predictions/{prediction_id}/replay", tags=["predictions"])
    def replay_prediction(prediction_id: str) -> Response:
        """The prediction, computed again from its exact inputs by its very artifact, and compared bit for bit."""
        # Each loads a model of its own beside those that serve.
        if not replaying.acquire(blocking=False):
            raise Overloaded("another prediction is being replayed: try again", retry_after_s=1)
        try:
            replayed = replay(
                phoenix.prediction_log, phoenix.registry, phoenix.artifacts, phoenix.engines, prediction_id
            )
        finally:
            replaying.release()
        return answer(replayed)

    @router.get("/feedback/unmatched", tags=["predictions"])
    def show_unmatched(
        limit: Annotated[int, Query(ge=1, le=1000)] = 50, cursor: str | None = None
    ) -> Response:
        """Outcomes whose prediction is not in the log: how many, and a page of them, newest first."""
        return answer(list_unmatched(phoenix.prediction_log, limit, cursor))

    @router.get("/audit", tags=["operations"])
    def list_audit(
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
        cursor: Annotated[int | None, Query(ge=0, lt=2**63)] = None,
    ) -> Response:
        """Who changed what, newest first."""
        entries = phoenix.registry.audit(limit + 1, cursor)
        more = len(entries) > limit
        entries = entries[:limit]
        items = [
            {
                "at": iso_time(entry.at_ms),
                "actor": entry.actor,
                "action": entry.action,
                "subject": entry.subject,
                "details": entry.details,
            }
            for entry in entries
        ]
        return answer({"items": items, "next_cursor": str(entries[-1].id) if more else None})

    return router
