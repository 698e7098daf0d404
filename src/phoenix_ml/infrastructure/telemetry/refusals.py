"""What every protocol does with a request that failed: count it, and log what is ours to mend."""

import logging
import time

from phoenix_ml.application.serving import LiveModels
from phoenix_ml.domain.errors import InternalError, JournalFull, PhoenixError
from phoenix_ml.domain.routing import choice_of
from phoenix_ml.infrastructure.telemetry.meter import OTHER, MetricsMeter

log = logging.getLogger(__name__)
DEFECT = "a defect on our side; it is logged"


def error_for(exc: Exception) -> PhoenixError:
    """What the caller is told; a defect of ours is logged, not shown."""
    return exc if isinstance(exc, PhoenixError) else InternalError(DEFECT)


def record_refusal(
    meter: MetricsMeter,
    live: LiveModels,
    exc: Exception,
    *,
    model_id: str,
    request_id: str,
    status: int,
    started: float,
    role: str = "",
) -> None:
    """``status`` is HTTP's, of which 500 and above are logged; ``started`` is ``time.perf_counter()`` at arrival,
    ``role`` what is counted instead of the chosen version's.
    """
    error = error_for(exc)
    if isinstance(error, JournalFull):
        meter.journal_refused()
    if status >= 500:
        log.error(
            "%s: %s",
            error.code,
            exc,
            exc_info=None if error is exc else exc,
            extra={"code": error.code, "request_id": request_id, "details": error.details},
        )
    model, choice = live.models.get(model_id), choice_of(exc)
    took_s = time.perf_counter() - started
    # A request may name a version that is none.
    if model is not None and choice is not None and choice.version in model.registered:
        meter.requested(model_id, choice.version, role or choice.role, status, took_s)
    else:
        meter.requested(model_id if model is not None else OTHER, "", "", status, took_s)
