"""Every error code is answered over HTTP with the status that its class has."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
from lanes import BATCH_LIMIT, Lane, ok, refused, unique

from phoenix_ml.domain import errors

pytestmark = pytest.mark.system

HERE = Path(__file__).parent
Provoke = Callable[[Lane], httpx.Response]


def predicting(**body: Any) -> Provoke:
    """Asks for a prediction."""
    return lambda lane: lane.request("POST", "/predict", json=body)


def calling(method: str, path: str, **options: Any) -> Provoke:
    """Makes a call."""
    return lambda lane: lane.request(method, path, **options)


def uploading(model: str) -> Provoke:
    """Registers bytes that are no model."""
    return calling("POST", "/models", files={"artifact": b"no model"}, data={"model": model})


def deactivating_what_is_routed(lane: Lane) -> httpx.Response:
    """Takes a version out of service that the routing names."""
    single = {"strategy": "single", "arms": [{"version": "1.0.0"}]}
    ok(lane.request("PUT", "/models/managed/routing", json=single))
    try:
        return lane.request("POST", "/models/managed/versions/1.0.0/deactivate")
    finally:
        ok(lane.request("DELETE", "/models/managed/routing"))


MANY = {"model_id": "abc", "instances": [{"features": [1, 2, 3]}] * (BATCH_LIMIT + 1)}
STAGE = "/models/managed/versions/1.0.0/stage"
PROVOKED: dict[str, tuple[int, Provoke]] = {
    "malformed_body": (400, calling("POST", "/predict", content=b"{")),
    "invalid_field": (422, predicting(model_id="abc", color="red")),
    "feature_missing": (422, predicting(model_id="abc", features={"a": 1})),
    "feature_unknown": (422, predicting(model_id="abc", features={"z": 1})),
    "feature_invalid": (422, predicting(model_id="abc", features=[1, 2, "3"])),
    "feature_count_wrong": (422, predicting(model_id="abc", features=[1])),
    "inference_failed": (422, predicting(model_id="lookup", features=[99])),
    "model_refused": (422, uploading('{"id": "new", "version": "1.0.0"}')),
    "engine_unavailable": (422, uploading('{"id": "new", "version": "1.0.0", "framework": "tensorrt"}')),
    "takes_tensors": (422, predicting(model_id="outer", features=[1])),
    "routing_invalid": (422, calling("PUT", "/models/abc/routing", json={"strategy": "single", "arms": []})),
    "model_unknown": (404, predicting(model_id="nowhere", features=[1])),
    "version_unknown": (404, predicting(model_id="abc", model_version="9.9.9", features=[1, 2, 3])),
    "entity_unknown": (404, predicting(model_id="abc", entity_id=unique())),
    "cross_site_request": (403, calling("POST", "/predict", headers={"origin": "https://evil.example"})),
    "host_not_allowed": (403, calling("GET", "/models", headers={"host": "evil.example"})),
    "prediction_unknown": (404, calling("GET", f"/predictions/{uuid4()}")),
    "path_unknown": (404, calling("GET", "/nowhere")),
    "method_not_allowed": (405, calling("GET", "/predict")),
    "version_conflict": (409, uploading('{"id": "abc", "version": "1.0.0"}')),
    "version_inactive": (409, predicting(model_id="idle", features=[1])),
    "stage_conflict": (409, calling("POST", STAGE, json={"stage": "prod"})),
    "routing_conflict": (409, deactivating_what_is_routed),
    "body_too_large": (413, calling("POST", "/predict", content=b" " * (10 * 1024 * 1024 + 1))),
    "batch_too_large": (413, calling("POST", "/predict/batch", json=MANY)),
}
# Something has to be taken away from a server of their own for these: the status, and the module that does it.
ELSEWHERE = {
    "feature_store_unavailable": (503, "test_dependencies.py"),
    "database_unavailable": (503, "test_dependencies.py"),
    "overloaded": (503, "test_operations.py"),
    "journal_full": (503, "test_operations.py"),
    "artifact_store_unavailable": (503, "test_operations.py"),
    "model_load_failed": (500, "test_operations.py"),
    "headers_too_large": (431, "test_connections.py"),
    "incident_unknown": (404, "test_monitoring.py"),
    "incident_resolved": (409, "test_monitoring.py"),
    "job_unknown": (404, "test_retraining.py"),
    "job_conflict": (409, "test_retraining.py"),
}
# The Open Inference Protocol has no codes: test_infer.py has their words, test_grpc.py the codes that go with a call.
IN_THE_PROTOCOLS_FORM = {"tensor_invalid", "unsupported"}
# The first four are said by the command line; the last is a defect, which no request brings about at will.
NEVER_ANSWERED = {
    "misconfigured",
    "server_unreachable",
    "events_unavailable",
    "no_baseline",
    "internal_error",
}


@pytest.mark.parametrize("code", PROVOKED)
def test_a_code_is_answered_with_its_status(lane: Lane, code: str) -> None:
    """Clients match on codes, proxies on statuses."""
    status, provoke = PROVOKED[code]

    refused(provoke(lane), status, code)


def test_no_code_is_left_out() -> None:
    """Whoever adds an error says here how it comes about."""
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass)]
    codes = {kind.__dict__["code"] for kind in kinds if "code" in kind.__dict__}

    assert codes == set(PROVOKED) | set(ELSEWHERE) | IN_THE_PROTOCOLS_FORM | NEVER_ANSWERED


@pytest.mark.parametrize("code", ELSEWHERE)
def test_what_needs_a_server_in_trouble_is_provoked_in_the_module_named(code: str) -> None:
    """The table above must not claim what nothing does."""
    status, module = ELSEWHERE[code]
    text = (HERE / module).read_text()

    assert f'"{code}"' in text
    assert str(status) in text
