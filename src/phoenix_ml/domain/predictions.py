"""What is asked, and what is told later: requests and outcomes.

These are msgspec structs so that a request has one shape from the wire to the log: the decoder
fills them strictly and fast (docs/adr/0001).
"""

from datetime import datetime

from msgspec import Struct

from phoenix_ml.domain.rows import Scalar

Features = dict[str, Scalar | None] | list[Scalar | None]


class Instance(Struct, forbid_unknown_fields=True):
    """One row to predict: an entity whose features are stored, the features themselves, or both."""

    entity_id: str | None = None
    features: Features | None = None
    routing_key: str | None = None
    request_id: str | None = None


class PredictionRequest(Instance, forbid_unknown_fields=True, kw_only=True):
    """One row and the model that is asked; without a version the routing chooses."""

    model_id: str
    model_version: str | None = None


class BatchRequest(Struct, forbid_unknown_fields=True):
    """Rows for one model, answered all or none."""

    model_id: str
    instances: list[Instance]
    model_version: str | None = None


class Feedback(Struct, forbid_unknown_fields=True):
    """The truth about an earlier prediction."""

    prediction_id: str
    outcome: Scalar | dict[str, Scalar | None]
    observed_at: datetime | None = None
