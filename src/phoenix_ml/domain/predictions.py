"""What is asked, and what is told later: requests and outcomes.

These are msgspec structs so that a request has one shape from the wire to the log: the decoder
fills them strictly and fast (docs/adr/0001).
"""

from datetime import datetime
from typing import Annotated

from msgspec import Meta, Struct

from phoenix_ml.domain.rows import Scalar

# Bounds are checked by the decoder, at no measurable cost.
EntityId = Annotated[str, Meta(min_length=1, max_length=512)]
Label = Annotated[str, Meta(min_length=1, max_length=128)]
Features = dict[str, Scalar | None] | list[Scalar | None]


class Instance(Struct, forbid_unknown_fields=True):
    """One row to predict: an entity whose features are stored, the features themselves, or both."""

    entity_id: EntityId | None = None
    features: Features | None = None
    routing_key: EntityId | None = None
    request_id: Label | None = None


class PredictionRequest(Instance, forbid_unknown_fields=True, kw_only=True):
    """One row and the model that is asked; without a version the routing chooses."""

    model_id: Label
    model_version: Label | None = None


class BatchRequest(Struct, forbid_unknown_fields=True):
    """Rows for one model, answered all or none."""

    model_id: Label
    instances: list[Instance]
    model_version: Label | None = None


class Feedback(Struct, forbid_unknown_fields=True):
    """The truth about an earlier prediction."""

    prediction_id: Label
    outcome: Scalar | dict[str, Scalar | None]
    observed_at: datetime | None = None
