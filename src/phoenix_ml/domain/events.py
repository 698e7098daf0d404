"""What is put on record before a caller gets an answer.

Events are arrays on disk: a new field goes to the end and has a default, so that older records
stay readable.
"""

from typing import Any

from msgspec import Struct

from phoenix_ml.domain.routing import Role, Strategy


class PredictionMade(Struct, frozen=True, array_like=True, tag="prediction"):
    """One answer, with all that is needed to explain it or to compute it again.

    ``inputs`` are the engine's exact values (``RowFormat``), ``sources`` one letter a feature or one
    letter for all. The row was number ``batch_position`` of ``batch_size`` that the engine ran at once.
    """

    id: str
    model_id: str
    model_version: str
    sha256: str
    strategy: Strategy
    role: Role
    probability: float
    entity_id: str | None
    request_id: str
    routing_key: str
    inputs: bytes
    sources: str
    result: Any
    confidence: float | None
    probabilities: list[float] | None
    latency_ms: float
    created_at_ms: int
    batch_size: int
    batch_position: int
    shadow_of: str | None = None
    traceparent: str | None = None


class OutcomeReported(Struct, frozen=True, array_like=True, tag="outcome"):
    """The truth about a prediction, as somebody reported it."""

    id: str
    prediction_id: str
    outcome: Any
    observed_at_ms: int
    received_at_ms: int


class ModelChanged(Struct, frozen=True):
    """The registry has changed: who follows it should look. Never on record, only told."""

    id: str
    model_id: str
    model_version: str | None
    action: str
    actor: str
    at_ms: int


Event = PredictionMade | OutcomeReported
