"""What is wrong with a model: one incident a cause, from its opening to its end, and what is told of it."""

from enum import StrEnum
from typing import Any

from msgspec import Struct


class IncidentKind(StrEnum):
    """What an incident blames. Only drift and quality can lead to a retraining; schema blames the data, and so does drift
    of how many values are missing where that has risen.
    """

    DRIFT = "drift"
    SCHEMA = "schema"
    QUALITY = "quality"
    RETRAINING = "retraining"


class IncidentStatus(StrEnum):
    OPEN = "open"
    ACKNOWLEDGED = "acknowledged"
    RESOLVED = "resolved"


class Severity(StrEnum):
    WARNING = "warning"
    CRITICAL = "critical"


class Incident(Struct, frozen=True):
    """One cause, such as ``drift:income``, that is wrong with one version.

    There is one that is not resolved for a model, version and cause; it is updated while the cause lasts.
    ``evidence`` has the figures of the latest check that saw it, ``resolution`` why it ended.
    """

    id: str
    model_id: str
    model_version: str
    kind: IncidentKind
    cause: str
    severity: Severity
    summary: str
    evidence: dict[str, Any]
    status: IncidentStatus
    opened_at_ms: int
    updated_at_ms: int
    acknowledged_at_ms: int | None = None
    acknowledged_by: str | None = None
    resolved_at_ms: int | None = None
    resolution: str | None = None

    @property
    def is_broken_data(self) -> bool:
        """Whether it says that no model may learn what is sent: values that are none, more than a few of them, or values
        that stay away.
        """
        return bool(self.evidence.get("explains_drift"))


class Alert(Struct, frozen=True):
    """What people are told: all that happened to a model's incidents since the last one, in one message."""

    id: str
    model_id: str
    model_version: str
    severity: Severity
    title: str
    text: str
    incidents: tuple[str, ...]
    at_ms: int
