"""Events as an API process would record them, for tests of the roads that events take."""

from collections.abc import Sequence
from typing import Any

import msgspec

from phoenix_ml.domain.events import OutcomeReported, PredictionMade
from phoenix_ml.domain.ids import new_id
from phoenix_ml.domain.routing import Role, Strategy
from phoenix_ml.domain.rows import Column, ElementType, RowFormat, Scalar

COLUMNS = (
    Column("income", ElementType.FLOAT32),
    Column("city", ElementType.STRING),
    Column("visits", ElementType.INT64),
)
ROW: tuple[Scalar, ...] = (1.5, "Oslo", 7)
AT_MS = 1_760_000_000_123
SCHEMA = msgspec.msgpack.encode({"1.0.0": COLUMNS, "2.0.0": COLUMNS})
DIGEST = b"columns of risk."


def prediction(row: Sequence[Scalar] = ROW, **facts: Any) -> PredictionMade:
    """A prediction of model `risk`, version 1.0.0, with a new id."""
    event = PredictionMade(
        id=new_id(),
        model_id="risk",
        model_version="1.0.0",
        sha256="ab" * 32,
        strategy=Strategy.CANARY,
        role=Role.CHALLENGER,
        probability=0.25,
        entity_id="cust_99",
        request_id="request-1",
        routing_key="cust_99",
        inputs=RowFormat(COLUMNS).pack(row),
        sources="srd",
        result=1,
        confidence=0.75,
        probabilities=[0.25, 0.75],
        latency_ms=0.375,
        created_at_ms=AT_MS,
        batch_size=4,
        batch_position=2,
    )
    return msgspec.structs.replace(event, **facts)


def outcome(prediction_id: str, value: Any = 1, observed_at_ms: int = AT_MS, **facts: Any) -> OutcomeReported:
    """An outcome with a new id of its own."""
    event = OutcomeReported(new_id(), prediction_id, value, observed_at_ms, AT_MS)
    return msgspec.structs.replace(event, **facts)
