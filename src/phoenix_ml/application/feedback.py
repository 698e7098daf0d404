"""Outcomes: the truth about predictions, reported later and put on the same record."""

import time
from collections.abc import Sequence
from uuid import UUID

import msgspec

from phoenix_ml.application.ports import Journal
from phoenix_ml.application.reports import epoch_ms
from phoenix_ml.domain.errors import BatchTooLarge, InvalidField
from phoenix_ml.domain.events import OutcomeReported
from phoenix_ml.domain.ids import new_id
from phoenix_ml.domain.predictions import Feedback
from phoenix_ml.domain.rows import Scalar

_encode = msgspec.msgpack.Encoder().encode


def report_outcomes(journal: Journal, feedback: Sequence[Feedback], *, limit: int) -> int:
    """How many outcomes were put on record: all, or none when one of them is not valid.

    An outcome may come before its prediction's row is in the log, and more than one may come: the one
    observed last counts. Raises InvalidField, naming the position, BatchTooLarge and JournalFull.
    """
    if not feedback:
        raise InvalidField("the list is empty: give at least one outcome", field="prediction_id")
    if len(feedback) > limit:
        raise BatchTooLarge(f"{len(feedback)} outcomes were sent, the limit is {limit}", limit=limit)
    now_ms = time.time_ns() // 1_000_000
    payloads = []
    for position, item in enumerate(feedback):
        observed_at_ms = now_ms
        if item.observed_at is not None:
            observed_at_ms = epoch_ms(item.observed_at, "observed_at")
        _check_outcome(item.outcome, position)
        event = OutcomeReported(
            new_id(), _uuid(item.prediction_id, position), item.outcome, observed_at_ms, now_ms
        )
        payloads.append(_encode(event))
    journal.append_many(payloads)
    return len(payloads)


def _check_outcome(outcome: Scalar | dict[str, Scalar | None], position: int) -> None:
    for value in outcome.values() if isinstance(outcome, dict) else (outcome,):
        if type(value) is int and not -(2**63) <= value < 2**63:
            raise InvalidField(
                f"outcome {position} has a number beyond 64 bits", field="outcome", position=position
            )


def _uuid(text: str, position: int) -> str:
    try:
        return str(UUID(text))
    except ValueError:
        raise InvalidField(
            f"outcome {position}: {text[:60]!r} is not a prediction id",
            field="prediction_id",
            position=position,
        ) from None
