"""What the routes on FastAPI share: JSON in and out through msgspec, described for OpenAPI."""

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import msgspec
from fastapi import Request
from fastapi.responses import Response

from phoenix_ml.infrastructure.http.bodies import read_body
from phoenix_ml.infrastructure.http.codec import decode_json, encode_json

T = TypeVar("T")


def answer(content: Any, status: int = 200) -> Response:
    return Response(encode_json(content), status, media_type="application/json")


def describe_body(kind: Any) -> dict[str, Any]:
    """The OpenAPI description of a JSON body that msgspec decodes."""
    (schema,), definitions = msgspec.json.schema_components([kind], ref_template="#/$defs/{name}")
    return {
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": _inline(schema, definitions)}},
        }
    }


def _inline(schema: Any, definitions: dict[str, Any]) -> Any:
    """The schema with its references resolved: FastAPI keeps no components for bodies it does not know."""
    if isinstance(schema, list):
        return [_inline(item, definitions) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inline(definitions[schema["$ref"].removeprefix("#/$defs/")], definitions)
    return {key: _inline(value, definitions) for key, value in schema.items()}


def json_body(kind: type[T], limit_bytes: int) -> Callable[[Request], Awaitable[T]]:
    """A FastAPI dependency: the request's body, decoded as strictly as those of the loaded calls."""

    async def decode(request: Request) -> T:
        return decode_json(await read_body(request.receive, limit_bytes), kind)

    return decode
