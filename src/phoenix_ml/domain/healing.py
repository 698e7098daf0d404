"""How a model is healed: a retrain job from its request to its challenger."""

import hashlib
from collections.abc import Sequence
from enum import StrEnum
from typing import Any, Final

from msgspec import Struct

from phoenix_ml.domain.errors import JobConflict


class JobStatus(StrEnum):
    """Where a retrain job is. ``requested`` jobs wait for a healer, or until ``not_before_ms``."""

    REQUESTED = "requested"
    TRAINING = "training"
    CHECKING = "checking"
    REGISTERED = "registered"
    REJECTED = "rejected"
    FAILED = "failed"


# Who owns a job while a system outside trains its model.
OUTSIDE: Final = "outside"
ENDED: Final = frozenset({JobStatus.REGISTERED, JobStatus.REJECTED, JobStatus.FAILED})
_NEXT: Final = {
    # To checking: whoever heard of the request elsewhere, such as in Kafka, has handed in a model.
    # To itself: it is put off. To rejected: its data has turned out to be broken.
    JobStatus.REQUESTED: {
        JobStatus.REQUESTED,
        JobStatus.TRAINING,
        JobStatus.CHECKING,
        JobStatus.REJECTED,
        JobStatus.FAILED,
    },
    # Back to requested: what failed is tried again, and what a killed healer left is taken up again.
    JobStatus.TRAINING: {JobStatus.REQUESTED, JobStatus.CHECKING, JobStatus.FAILED},
    JobStatus.CHECKING: {JobStatus.REQUESTED, JobStatus.REGISTERED, JobStatus.REJECTED, JobStatus.FAILED},
}


class RetrainJob(Struct, frozen=True):
    """One request to train a model again, with its evidence, and what became of it.

    ``id`` is made of what was seen, so that a request that is made twice is one. ``owner`` works on the job
    until ``owned_until_ms``; after that another healer may take it up. ``log_tail`` is the end of the trainer's output.
    """

    id: str
    model_id: str
    model_version: str
    reason: str
    evidence: dict[str, Any]
    status: JobStatus
    requested_at_ms: int
    updated_at_ms: int
    attempts: int = 0
    not_before_ms: int = 0
    owner: str | None = None
    owned_until_ms: int = 0
    new_version: str | None = None
    error: str | None = None
    result: dict[str, Any] | None = None
    log_tail: str = ""


def check_step(current: JobStatus, wanted: JobStatus) -> None:
    """Raises JobConflict for a step that a job cannot take."""
    if wanted not in _NEXT.get(current, set()):
        raise JobConflict(
            f"a retrain job that is {current} cannot become {wanted}", current=current, wanted=wanted
        )


def request_id(model_id: str, model_version: str, baseline_sha256: str, window: Sequence[object]) -> str:
    """The id of a request, the same whenever the same window of the same version is blamed.

    >>> request_id("m", "1.0.0", "ab", [1, 64]) == request_id("m", "1.0.0", "ab", (1, 64))
    True
    """
    parts = [model_id, model_version, baseline_sha256, *map(str, window)]
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()


class HealingPolicy(StrEnum):
    """What becomes of a retrained version besides its registration in ``staging``."""

    SHADOW = "shadow"
    AB = "ab"
    NONE = "none"


def may_request(
    now_ms: int, latest_request_ms: int | None, cooldown_ms: int, requests_in_budget_period: int, budget: int
) -> str | None:
    """Why no retraining may be asked for now; None where it may.

    >>> may_request(now_ms=10, latest_request_ms=None, cooldown_ms=5, requests_in_budget_period=0, budget=3)
    >>> may_request(now_ms=10, latest_request_ms=7, cooldown_ms=5, requests_in_budget_period=1, budget=3)
    'cooldown'
    """
    if latest_request_ms is not None and now_ms - latest_request_ms < cooldown_ms:
        return "cooldown"
    if requests_in_budget_period >= budget:
        return "budget"
    return None
