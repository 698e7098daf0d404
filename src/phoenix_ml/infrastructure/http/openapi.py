"""What ``/docs`` and ``/openapi.json`` say beyond what FastAPI finds: answers, errors, examples, summaries.

Bodies are msgspec's, in and out, so that FastAPI knows neither their shape nor how they are refused.
"""

from functools import cache
from typing import Any, Final, Literal

import msgspec
from fastapi import FastAPI
from msgspec import Struct

from phoenix_ml.application.replay import Replay
from phoenix_ml.domain.monitoring import MonitorSettings
from phoenix_ml.domain.routing import Routing, Strategy
from phoenix_ml.infrastructure.http.codec import AnswerBody
from phoenix_ml.infrastructure.http.tensors import InferAnswer


class Problem(Struct):
    """What is wrong: the code is stable, the message says what to do, the details are for machines."""

    code: str
    message: str
    details: dict[str, Any]


class Refusal(Struct):
    """Every answer that is an error, but those of the Open Inference Protocol."""

    error: Problem


class InferenceRefusal(Struct):
    """An error of the Open Inference Protocol."""

    error: str


class Readiness(Struct):
    """Each check is `ok` or says what is wrong."""

    status: Literal["ok", "degraded", "unavailable"]
    checks: dict[str, str]
    models_failed: dict[str, str]
    models_displaced: dict[str, str]


class Answers(Struct):
    """One answer an instance, in their order."""

    predictions: list[AnswerBody]


class Accepted(Struct):
    """How many outcomes are on record."""

    accepted: int


class Written(Struct):
    """How many entities were written."""

    written: int


class RoutingInForce(Struct):
    """A model's routing; None while no version is active."""

    routing: Routing | None
    is_default: bool


_ANSWERS: Final[dict[str, Any]] = {
    "POST /predict": AnswerBody,
    "POST /predict/batch": Answers,
    "POST /feedback": Accepted,
    "GET /predictions/{prediction_id}/replay": Replay,
    "PUT /features/{entity_id}": Written,
    "POST /features": Written,
    "GET /models/{model_id}/routing": RoutingInForce,
    "PUT /models/{model_id}/routing": RoutingInForce,
    "DELETE /models/{model_id}/routing": RoutingInForce,
    "GET /models/{model_id}/monitoring": MonitorSettings,
    "PUT /models/{model_id}/monitoring": MonitorSettings,
    "GET /health/ready": Readiness,
    "POST /v2/models/{model_id}/infer": InferAnswer,
    "POST /v2/models/{model_id}/versions/{version}/infer": InferAnswer,
}
# FastAPI takes a call for one that answers 200.
_STATUS: Final = {"POST /feedback": "202"}

_INPUT: Final = {"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]}
_CANARY: Final = {
    "strategy": "canary",
    "arms": [
        {"version": "1.0.0", "role": "champion", "weight": 90},
        {"version": "1.1.0", "role": "challenger", "weight": 10},
    ],
}
_EXAMPLES: Final[dict[str, Any]] = {
    "POST /predict": {"model_id": "credit-risk", "entity_id": "cust_0001"},
    "POST /predict/batch": {
        "model_id": "credit-risk",
        "instances": [{"entity_id": "cust_0001"}, {"features": {"income": 2100, "home": "owner"}}],
    },
    "POST /feedback": {"prediction_id": "01a20598-ffc4-7000-8001-307fbe9ff145", "outcome": "good"},
    "PUT /features/{entity_id}": {"features": {"income": 2100, "home": "owner", "debt": None}},
    "POST /features": {"entities": {"cust_0001": {"income": 2100}, "cust_0002": {"income": 1800}}},
    "POST /models/{model_id}/versions/{version}/stage": {"stage": "staging"},
    "PUT /models/{model_id}/routing": _CANARY,
    "PUT /models/{model_id}/monitoring": {"batch_rows": 500, "left_out": ["age"]},
    "POST /retrain-jobs": {"model_id": "credit-risk"},
    "POST /retrain-jobs/{job_id}/failure": {"error": "no rows of this month"},
    "POST /v2/models/{model_id}/infer": {"inputs": [_INPUT]},
    "POST /v2/models/{model_id}/versions/{version}/infer": {"inputs": [_INPUT]},
}


def describe_api(app: FastAPI) -> None:
    """Has the application's OpenAPI document say what is true of its routes; for after the last was added."""
    found = app.openapi

    @cache
    def described() -> dict[str, Any]:
        document = found()
        kinds = dict.fromkeys([*_ANSWERS.values(), Refusal, InferenceRefusal])
        _, schemas = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
        document.setdefault("components", {})["schemas"] = schemas
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                _describe(f"{method.upper()} {path}", operation)
        # What a request gets that names its version; nobody can ask for it.
        change = document["paths"]["/models/{model_id}/routing"]["put"]["requestBody"]["content"]
        change["application/json"]["schema"]["properties"]["strategy"]["enum"].remove(Strategy.PINNED)
        return document

    app.openapi = described  # type: ignore[method-assign]


def _describe(call: str, operation: dict[str, Any]) -> None:
    if description := operation.pop("description", ""):
        first, _, rest = description.partition("\n")
        operation["summary"] = first.replace("`", "")
        operation |= {"description": rest.strip()} if rest.strip() else {}
    responses = operation["responses"]
    responses.pop("422", None)
    if call in _STATUS:
        responses[_STATUS[call]] = responses.pop("200")
    for response in responses.values():
        if call == "GET /metrics":
            response["content"] = {"text/plain": {"schema": {"type": "string"}}}
        else:
            response["content"] = _json(_refer(_ANSWERS[call]) if call in _ANSWERS else {"type": "object"})
    if call == "GET /health/ready":
        responses["503"] = {"description": "Unavailable", "content": _json(_refer(Readiness))}
    refusal = _json(_refer(InferenceRefusal if " /v2" in call else Refusal))
    responses["4XX"] = {"description": "What was sent cannot be answered.", "content": refusal}
    responses["5XX"] = {"description": "Try again later, or a defect.", "content": refusal}
    if call in _EXAMPLES:
        operation["requestBody"]["content"]["application/json"]["example"] = _EXAMPLES[call]


def _refer(kind: Any) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{kind.__name__}"}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
