"""What every protocol does with a request that failed: count it, and log what is ours to mend."""

import logging
import time

from phoenix_ml.application.serving import LiveModels
from phoenix_ml.domain.errors import InternalError, JournalFull, PhoenixError
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
) -> None:
    """``status`` is HTTP's, of which 500 and above are logged; ``started`` is ``time.perf_counter()`` at arrival."""
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
    known = model_id if model_id in live.models else OTHER
    meter.requested(known, "", "", status, time.perf_counter() - started)
