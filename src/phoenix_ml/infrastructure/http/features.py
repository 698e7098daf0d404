"""Routes of the feature store."""

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Depends
from fastapi.responses import Response

from phoenix_ml.application.features import show_features, store_features
from phoenix_ml.application.ports import FeatureStore
from phoenix_ml.domain.features import PackedSignature
from phoenix_ml.domain.rows import Scalar
from phoenix_ml.infrastructure.http.routes import answer, describe_body, json_body


class EntityFeatures(msgspec.Struct, forbid_unknown_fields=True):
    features: dict[str, Scalar | None]


class ManyEntities(msgspec.Struct, forbid_unknown_fields=True):
    entities: dict[str, dict[str, Scalar | None]]


def feature_routes(
    features: FeatureStore, signatures: Callable[[], Sequence[PackedSignature]], body_limit_bytes: int
) -> APIRouter:
    """The feature store's routes in one API process; writes pack rows of the signatures."""
    router = APIRouter(tags=["features"])

    @router.get("/features/{entity_id:path}")
    async def get_features(entity_id: str) -> Response:
        """An entity's stored features and when each was written."""
        return answer(await show_features(features, entity_id))

    @router.put("/features/{entity_id:path}", openapi_extra=describe_body(EntityFeatures))
    async def put_features(
        entity_id: str, given: Annotated[Any, Depends(json_body(EntityFeatures, body_limit_bytes))]
    ) -> Response:
        """Merges features into an entity's; null removes one."""
        return answer({"written": await store_features(features, {entity_id: given.features}, signatures())})

    @router.post("/features", openapi_extra=describe_body(ManyEntities))
    async def post_features(
        given: Annotated[Any, Depends(json_body(ManyEntities, body_limit_bytes))],
    ) -> Response:
        """Merges features into many entities at once."""
        return answer({"written": await store_features(features, given.entities, signatures())})

    return router
