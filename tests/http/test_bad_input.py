"""What is wrong with a request is said with the right status, over a real server and over the ordinary routes."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from lanes import BATCH_LIMIT, Lane, error_of, log_rows, logged, ok, refused, store_features, unique
from phoenix_server import PhoenixServer

pytestmark = pytest.mark.system

DEEP = 50_000
BODY_LIMIT_BYTES = 10 * 1024 * 1024
ANY_PREDICTION = "01928c5a-0000-7000-8000-000000000000"
SINGLE = {"strategy": "single", "arms": [{"version": "1.1.0"}]}


def predict_with(features: bytes, model_id: bytes = b"abc") -> bytes:
    """A body for /predict with these features, byte for byte."""
    return b'{"model_id":"%b","features":%b}' % (model_id, features)


# A call each, with a place for any value; with 1 in that place it is in order.
CALLS: dict[tuple[str, str], bytes] = {
    ("POST", "/predict"): b'{"model_id":"typed","features":{"ratio":1,"count":1,"member":true,"city":%b}}',
    (
        "POST",
        "/predict/batch",
    ): b'{"model_id":"abc","instances":[{"features":[1,2,3]},{"features":[%b,2,3]}]}',
    ("POST", "/feedback"): b'{"prediction_id":"01928c5a-0000-7000-8000-000000000000","outcome":%b}',
    ("PUT", "/features/fuzz"): b'{"features":{"a":%b}}',
    ("POST", "/features"): b'{"entities":{"fuzz":{"a":%b}}}',
}
NO_JSON_VALUES = {
    "nothing": b"",
    "NaN": b"NaN",
    "Infinity": b"Infinity",
    "-Infinity": b"-Infinity",
    "leading zero": b"01",
    "no digits after the point": b"1.",
    "hexadecimal": b"0x10",
    "single quotes": b"'1'",
    "Python's None": b"None",
    "comment": b"1 /* one */",
    "invalid UTF-8": b'"\xff"',
    "UTF-8 of a surrogate": b'"\xed\xa0\x80"',
    "lone high surrogate": b'"\\ud800"',
    "lone low surrogate": b'"\\udfff x"',
    "surrogates in the wrong order": b'"\\ude00\\ud83d"',
    "raw U+0000": b'"a\x00b"',
    "raw newline": b'"a\nb"',
    "escaped U+0000": b'"a\\u0000b"',
    "escaped U+0000 where no list may be": b'["\\u0000"]',
}
NO_JSON_BODIES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda body: b"",
    "blank": lambda body: b" \n",
    "truncated": lambda body: body[:-1],
    "cut in the middle": lambda body: body[: len(body) // 2],
    "trailing text": lambda body: body + b" x",
    "two bodies": lambda body: body + body,
    "trailing comma": lambda body: body[:-1] + b",}",
    "trailing U+0000": lambda body: body + b"\x00",
    "byte order mark": lambda body: b"\xef\xbb\xbf" + body,
    "UTF-16": lambda body: body.decode().encode("utf-16"),
    "form": lambda body: b"model_id=abc&features=1",
    "lone surrogate in a key": lambda body: body.replace(b'"', b'"\\ud800', 1),
    "raw U+0000 in a key": lambda body: body.replace(b'"', b'"\x00', 1),
    "escaped U+0000 in a key": lambda body: body.replace(b'"', b'"\\u0000', 1),
    "nothing but an escaped U+0000": lambda body: b'"\\u0000"',
}


@pytest.mark.parametrize("value", NO_JSON_VALUES.values(), ids=NO_JSON_VALUES.keys())
@pytest.mark.parametrize(("method", "path"), CALLS)
def test_a_value_that_is_not_json_is_malformed(lane: Lane, method: str, path: str, value: bytes) -> None:
    """Syntax is the caller's serializer's fault, meaning is the caller's: 400 and 422 tell them apart."""
    refused(lane.request(method, path, content=CALLS[method, path] % value), 400, "malformed_body")


@pytest.mark.parametrize("spoil", NO_JSON_BODIES.values(), ids=NO_JSON_BODIES.keys())
@pytest.mark.parametrize(("method", "path"), CALLS)
def test_a_body_that_is_not_json_is_malformed(
    lane: Lane, method: str, path: str, spoil: Callable[[bytes], bytes]
) -> None:
    """Whatever comes behind the JSON, before it or instead of it."""
    refused(lane.request(method, path, content=spoil(CALLS[method, path] % b"1")), 400, "malformed_body")


def test_the_escape_of_a_backslash_is_not_taken_for_u0000(lane: Lane) -> None:
    r"""`\\u0000` in JSON is a backslash and five characters, which any database stores."""
    entity = unique() + "\\u0000"

    answer = ok(
        lane.request("POST", "/predict", json={"model_id": "abc", "entity_id": entity, "features": [1, 2, 3]})
    )

    assert logged(lane, answer["prediction_id"])["entity_id"] == entity


OF_ANOTHER_SHAPE = {
    "null": b"null",
    "number": b"5",
    "string": b'"abc"',
    "list": b"[]",
    "empty object": b"{}",
    "no model": b'{"features":[1,2,3]}',
    "unknown field": b'{"model_id":"abc","features":[1,2,3],"color":"red"}',
    "model id of the wrong type": b'{"model_id":5,"features":[1,2,3]}',
    "empty model id": b'{"model_id":"","features":[1,2,3]}',
    "model id too long": b'{"model_id":"%b","features":[1,2,3]}' % (b"m" * 129),
    "empty entity id": b'{"model_id":"abc","entity_id":""}',
    "entity id of the wrong type": b'{"model_id":"abc","entity_id":7}',
    "entity id too long": b'{"model_id":"abc","entity_id":"%b"}' % (b"e" * 513),
    "request id too long": b'{"model_id":"abc","features":[1,2,3],"request_id":"%b"}' % (b"r" * 129),
    "version of the wrong type": b'{"model_id":"abc","features":[1,2,3],"model_version":1.0}',
    "features of the wrong type": predict_with(b'"1,2,3"'),
    "feature in a list": predict_with(b"[[1],2,3]"),
    "feature in an object": predict_with(b'{"a":{"value":1},"b":2,"c":3}'),
    "number out of range": predict_with(b"[1e999,2,3]"),
    "negative number out of range": predict_with(b"[-1e999,2,3]"),
    "integer of 5000 digits": predict_with(b"[%b,2,3]" % (b"9" * 5000)),
    "neither entity nor features": b'{"model_id":"abc"}',
    "features null and no entity": b'{"model_id":"abc","features":null}',
}


@pytest.mark.parametrize("body", OF_ANOTHER_SHAPE.values(), ids=OF_ANOTHER_SHAPE.keys())
def test_json_of_another_shape_than_documented_is_an_invalid_field(lane: Lane, body: bytes) -> None:
    """A field that is silently ignored is a default that somebody did not choose."""
    response = lane.request("POST", "/predict", content=body)

    refused(response, 422, "invalid_field")


def test_the_message_says_where_the_field_is(lane: Lane) -> None:
    """In a batch of a thousand rows "wrong type" alone helps nobody."""
    body = {"model_id": "abc", "instances": [{"features": [1, 2, 3]}, {"features": [1, [2], 3]}]}

    error = refused(lane.request("POST", "/predict/batch", json=body), 422, "invalid_field")

    assert error["details"]["path"] == "$.instances[1].features[1]"
    assert "$.instances[1].features[1]" in error["message"]


@pytest.mark.parametrize(
    ("model_id", "features", "feature"),
    [
        ("abc", "[1,2,1e39]", "c"),
        ("abc", "[1,2,-1e39]", "c"),
        ("abc", "[1,%s,3]" % ("9" * 400), "b"),
        ("abc", '["1",2,3]', "a"),
        ("abc", "[true,2,3]", "a"),
        ("abc", '{"a":1,"b":"two","c":3}', "b"),
        ("lookup", "[1.5]", "row"),
        ("lookup", "[1.0]", "row"),
        ("lookup", '["1"]', "row"),
        ("lookup", "[9223372036854775808]", "row"),
        ("lookup", "[%s]" % ("9" * 4000), "row"),
        ("typed", '{"ratio":1,"count":2,"member":1,"city":"x"}', "member"),
        ("typed", '{"ratio":1,"count":2,"member":true,"city":5}', "city"),
        ("typed", '{"ratio":1,"count":true,"member":true,"city":"x"}', "count"),
        ("typed", '{"ratio":1e39,"count":2,"member":true,"city":"x"}', "ratio"),
    ],
)
def test_a_value_that_the_feature_cannot_hold_is_named(
    lane: Lane, model_id: str, features: str, feature: str
) -> None:
    """1e39 would become infinity in a float32, and "2" a 2, without anybody noticing."""
    response = lane.request("POST", "/predict", content=predict_with(features.encode(), model_id.encode()))

    error = refused(response, 422, "feature_invalid")
    assert error["details"]["feature"] == feature
    assert len(error["message"]) < 300


def test_a_stored_value_of_the_wrong_type_is_named_with_its_source(lane: Lane) -> None:
    """The caller sent nothing wrong; whoever fills the store must learn of it."""
    entity = unique()
    store_features(lane, entity, a=1, b="two", c=3)

    response = lane.request("POST", "/predict", json={"model_id": "abc", "entity_id": entity})

    error = refused(response, 422, "feature_invalid")
    assert error["details"] == {"feature": "b", "source": "store"}


@pytest.mark.parametrize("features", [[], [1], [1, 2], [1, 2, 3, 4], [None] * 5], ids=len)
def test_a_list_of_another_length_than_the_signature_is_refused(lane: Lane, features: list[Any]) -> None:
    """A value too few shifts all others by one, which a model answers without complaint."""
    response = lane.request("POST", "/predict", json={"model_id": "abc", "features": features})

    error = refused(response, 422, "feature_count_wrong")
    assert error["details"] == {"expected": 3, "given": len(features)}


@pytest.mark.parametrize("name", ["d", "A", "", " a", "ü", "_updated_at", "x" * 10_000])
def test_a_feature_the_model_does_not_have_is_refused(lane: Lane, name: str) -> None:
    """A misspelt name would silently give its feature the default."""
    response = lane.request("POST", "/predict", json={"model_id": "abc", "features": {"a": 1, name: 2}})

    error = refused(response, 422, "feature_unknown")
    assert error["details"]["feature"] == (name if len(name) < 2000 else f"{'x' * 1000}…{'x' * 1000}")
    assert "a, b, c" in error["message"]
    assert len(error["message"]) < 300


LONG = "x" * 1_000_000
LONG_WORDS: list[tuple[str, str, Any]] = [
    ("POST", "/predict", {"model_id": "abc", "features": {LONG: 1}}),
    ("POST", "/predict", {"model_id": "abc", "features": [1, 2, LONG]}),
    ("POST", "/predict", {"model_id": "abc", LONG: 1}),
    ("POST", "/predict", {"model_id": LONG}),
    ("POST", "/predict", {"model_id": "typed", "features": {"city": 1, LONG: 2}}),
    ("PUT", "/features/cust_1", {"features": {"_" + LONG: 1}}),
    ("PUT", "/features/cust_1", {"features": {LONG: 2**64}}),
    ("PUT", "/models/abc/routing", {"strategy": LONG, "arms": []}),
    ("PUT", "/models/abc/monitoring", {LONG: 1}),
    ("POST", "/models/abc/versions/1.0.0/stage", {"stage": LONG}),
    (
        "POST",
        "/v2/models/abc/infer",
        {"inputs": [{"name": LONG, "shape": [1], "datatype": "FP32", "data": [1]}]},
    ),
    (
        "POST",
        "/v2/models/abc/infer",
        {"inputs": [{"name": "x", "shape": [1], "datatype": LONG, "data": [1]}]},
    ),
]


@pytest.mark.parametrize(("method", "path", "body"), LONG_WORDS)
def test_an_answer_repeats_no_more_than_some_of_what_was_sent(
    lane: Lane, method: str, path: str, body: Any
) -> None:
    """Logs and clients keep errors, and who sends megabytes should not fill them."""
    response = lane.request(method, path, json=body)

    assert 400 <= response.status_code < 500
    assert len(response.content) < 12_000


def test_the_last_of_two_equal_keys_counts(lane: Lane) -> None:
    """As in every JSON library; the log tells what was used."""
    answer = ok(
        lane.request("POST", "/predict", content=b'{"model_id":"signs","model_id":"abc","features":[1,2,3]}')
    )

    assert answer["model_id"] == "abc"


WHO = {
    "unknown model": ({"model_id": "nowhere", "features": [1]}, 404, "model_unknown"),
    "unknown version": (
        {"model_id": "abc", "model_version": "9.9.9", "features": [1, 2, 3]},
        404,
        "version_unknown",
    ),
    "version that is none": (
        {"model_id": "abc", "model_version": "latest", "features": [1]},
        404,
        "version_unknown",
    ),
    "inactive version": (
        {"model_id": "abc", "model_version": "2.0.0", "features": [1, 2, 3]},
        409,
        "version_inactive",
    ),
    "model without an active version": ({"model_id": "idle", "features": [1]}, 409, "version_inactive"),
    "unknown version of an idle model": (
        {"model_id": "idle", "model_version": "9.9.9", "features": [1]},
        404,
        "version_unknown",
    ),
    "entity without features": ({"model_id": "abc", "entity_id": "nobody"}, 404, "entity_unknown"),
    "refused by the runtime": ({"model_id": "lookup", "features": [99]}, 422, "inference_failed"),
}


@pytest.mark.parametrize(("body", "status", "code"), WHO.values(), ids=WHO.keys())
def test_who_is_asked_must_exist_and_serve(lane: Lane, body: dict[str, Any], status: int, code: str) -> None:
    """404 says "you misspelt it", 409 "it is there, but not now"."""
    error = refused(lane.request("POST", "/predict", json=body), status, code)

    assert error["message"]


def test_an_unknown_version_is_answered_with_those_that_exist(lane: Lane) -> None:
    """The error that spares a look into the catalogue."""
    body = {"model_id": "abc", "model_version": "9.9.9", "features": [1, 2, 3]}

    error = refused(lane.request("POST", "/predict", json=body), 404, "version_unknown")

    assert error["details"] == {"model_id": "abc", "version": "9.9.9"}
    assert "1.0.0, 1.1.0, 2.0.0" in error["message"]


DEEP_BODIES = {
    "lists": b"[" * DEEP + b"]" * DEEP,
    "objects": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "lists without an end": b"[" * DEEP,
    "in features": predict_with(b"[" * DEEP + b"]" * DEEP),
    "in a named feature": predict_with(b'{"a":' + b"[" * DEEP + b"]" * DEEP + b"}"),
    "in an unknown field": b'{"model_id":"abc","x":' + b"[" * DEEP + b"]" * DEEP + b"}",
    "with an escaped U+0000": b"[" * DEEP + b'"\\u0000"' + b"]" * DEEP,
}


@pytest.mark.parametrize("body", DEEP_BODIES.values(), ids=DEEP_BODIES.keys())
@pytest.mark.parametrize("path", ["/predict", "/predict/batch", "/feedback"])
def test_nesting_without_end_is_refused_and_harms_nobody(lane: Lane, path: str, body: bytes) -> None:
    """A recursive parser that overflows its stack takes the whole process with it."""
    response = lane.request("POST", path, content=body)

    assert response.status_code in (400, 422)
    assert error_of(response)["code"] in ("malformed_body", "invalid_field")
    assert ok(lane.request("GET", "/health/live")) == {"status": "ok"}


LARGE = predict_with(b"[1,2,3]") + b" " * BODY_LIMIT_BYTES
IN_CHUNKS = [LARGE[start : start + 65_536] for start in range(0, len(LARGE), 65_536)]


@pytest.mark.parametrize("chunked", [False, True], ids=["with Content-Length", "in chunks"])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/predict"),
        ("POST", "/predict/batch"),
        ("POST", "/feedback"),
        ("PUT", "/features/nobody"),
        ("PUT", "/models/abc/routing"),
    ],
)
def test_a_body_over_its_limit_is_refused(lane: Lane, method: str, path: str, chunked: bool) -> None:
    """Memory is bounded by the limit, whether or not the caller says beforehand how much will come."""
    options: dict[str, Any] = {"chunks": IN_CHUNKS} if chunked else {"content": LARGE}

    response = lane.request(method, path, **options)

    error = refused(response, 413, "body_too_large")
    assert error["details"] == {"limit_bytes": BODY_LIMIT_BYTES}
    assert ok(lane.request("GET", "/health/live")) == {"status": "ok"}


def test_a_body_of_exactly_the_limit_is_read(lane: Lane) -> None:
    """A limit is the largest that works."""
    body = predict_with(b"[1,2,3]")
    padded = body + b" " * (BODY_LIMIT_BYTES - len(body))

    answer = ok(lane.request("POST", "/predict", content=padded))

    assert answer["result"] == 1014


def test_a_batch_over_its_limit_is_refused(lane: Lane) -> None:
    """One request must not take the place of a thousand."""
    body = {"model_id": "abc", "instances": [{"features": [1, 2, 3]}] * (BATCH_LIMIT + 1)}

    error = refused(lane.request("POST", "/predict/batch", json=body), 413, "batch_too_large")

    assert error["details"] == {"limit": BATCH_LIMIT, "given": BATCH_LIMIT + 1}


def test_feedback_over_the_batch_limit_is_refused(lane: Lane) -> None:
    """The same bound, for the same reason."""
    reports = [{"prediction_id": ANY_PREDICTION, "outcome": 1}] * (BATCH_LIMIT + 1)

    refused(lane.request("POST", "/feedback", json=reports), 413, "batch_too_large")


@pytest.mark.parametrize(
    ("path", "body"),
    [("/predict/batch", {"model_id": "abc", "instances": []}), ("/feedback", [])],
    ids=["batch", "feedback"],
)
def test_nothing_at_all_is_refused(lane: Lane, path: str, body: Any) -> None:
    """An empty list is a mistake of the caller's loop, and a 200 would hide it."""
    error = refused(lane.request("POST", path, json=body), 422, "invalid_field")

    assert "empty" in error["message"]


BAD_ROWS: dict[str, tuple[dict[str, Any], int, str]] = {
    "a missing feature": ({"features": [1, 2, None]}, 422, "feature_missing"),
    "too few features": ({"features": [1, 2]}, 422, "feature_count_wrong"),
    "an unknown feature": ({"features": {"d": 1}}, 422, "feature_unknown"),
    "a wrong type": ({"features": [1, 2, "3"]}, 422, "feature_invalid"),
    "a number too large": ({"features": [1, 2, 1e39]}, 422, "feature_invalid"),
    "an unknown entity": ({"entity_id": "nobody"}, 404, "entity_unknown"),
    "neither entity nor features": ({}, 422, "invalid_field"),
}


@pytest.mark.parametrize(("bad", "status", "code"), BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_a_batch_with_one_bad_row_names_it_and_logs_none(
    lane: Lane, bad: dict[str, Any], status: int, code: str
) -> None:
    """All or none: half a batch on record would be neither answered nor repeatable."""
    entity = unique()
    good = {"entity_id": entity, "features": [1, 2, 3]}

    body = {"model_id": "abc", "instances": [good, good, bad, good]}
    error = refused(lane.request("POST", "/predict/batch", json=body), status, code)
    # The same process answers after it, so what is on record of the batch lies before this in its journal.
    marker = ok(lane.request("POST", "/predict", json={"model_id": "abc", **good}))

    assert error["details"]["instance"] == 2
    assert "instance 2" in error["message"]
    logged(lane, marker["prediction_id"])
    assert [row["prediction_id"] for row in log_rows(lane, entity_id=entity)] == [marker["prediction_id"]]


def test_a_row_that_the_runtime_refuses_is_named_and_leaves_nothing_of_its_batch_on_record(
    lane: Lane,
) -> None:
    """The runtime does not say which of a thousand rows it was, and half a batch on record helps nobody."""
    entity = unique()
    instances = [{"entity_id": entity, "features": [row]} for row in (1, 99, 2)]

    error = refused(
        lane.request("POST", "/predict/batch", json={"model_id": "lookup", "instances": instances}),
        422,
        "inference_failed",
    )
    marker = ok(lane.request("POST", "/predict", json={"model_id": "lookup", **instances[0]}))

    assert error["message"].startswith("instance 1: ")
    assert error["details"] == {"instance": 1}
    logged(lane, marker["prediction_id"])
    assert len(log_rows(lane, entity_id=entity)) == 1


BAD_FEEDBACK = {
    "no outcome": {"prediction_id": ANY_PREDICTION},
    "no prediction": {"outcome": 1},
    "an id that is none": {"prediction_id": "cust_99", "outcome": 1},
    "an outcome of null": {"prediction_id": ANY_PREDICTION, "outcome": None},
    "an outcome in a list": {"prediction_id": ANY_PREDICTION, "outcome": [1]},
    "an outcome beyond 64 bits": {"prediction_id": ANY_PREDICTION, "outcome": 2**63},
    "a named outcome beyond 64 bits": {"prediction_id": ANY_PREDICTION, "outcome": {"n": -(2**70)}},
    "a time that is none": {"prediction_id": ANY_PREDICTION, "outcome": 1, "observed_at": "yesterday"},
    "a time before the first year": {
        "prediction_id": ANY_PREDICTION,
        "outcome": 1,
        "observed_at": "0001-01-01T00:00:00+14:00",
    },
    "a time after the last year": {
        "prediction_id": ANY_PREDICTION,
        "outcome": 1,
        "observed_at": "9999-12-31T23:59:59-14:00",
    },
    "an unknown field": {"prediction_id": ANY_PREDICTION, "outcome": 1, "label": 1},
}


@pytest.mark.parametrize("report", BAD_FEEDBACK.values(), ids=BAD_FEEDBACK.keys())
def test_feedback_that_no_log_could_hold_is_refused(lane: Lane, report: dict[str, Any]) -> None:
    """Once accepted it is in the journal, and whatever reads it later has to live with it."""
    good = {"prediction_id": ANY_PREDICTION, "outcome": 1}

    refused(lane.request("POST", "/feedback", json=report), 422, "invalid_field")
    refused(lane.request("POST", "/feedback", json=[good, report]), 422, "invalid_field")


# The same holds for what only FastAPI answers.

NUL_IN_A_URL = [
    ("GET", "/models/a%00b"),
    ("GET", "/models/abc/versions/%00"),
    ("POST", "/models/abc/versions/%00/activate"),
    ("GET", "/models/%00/routing"),
    ("GET", "/features/a%00b"),
    ("GET", "/predictions/%00"),
    ("GET", "/predictions?model_id=%00"),
    ("GET", "/predictions?model_version=1%00"),
    ("GET", "/predictions?entity_id=a%00b"),
    ("GET", "/predictions?cursor=%00"),
]


@pytest.mark.parametrize(("method", "path"), NUL_IN_A_URL)
def test_u0000_in_a_url_is_refused(lane: Lane, method: str, path: str) -> None:
    """PostgreSQL cannot take it in a text, so it must not get that far."""
    refused(lane.request(method, path), 400, "malformed_body")


NOT_UTF_8 = [
    ("PUT", "/features/{entity}%ff"),
    ("PUT", "/features/{entity}%ed%a0%80"),
    ("GET", "/features/{entity}%c3"),
    ("GET", "/predictions/%ff"),
    ("GET", "/predictions?entity_id={entity}%fe"),
    ("GET", "/predictions?%ff=1"),
    ("GET", "/v2/models/%ff"),
]


@pytest.mark.parametrize(("method", "path"), NOT_UTF_8)
def test_a_url_that_is_not_utf_8_is_refused(lane: Lane, method: str, path: str) -> None:
    """Whatever it would be replaced by, other bytes would be too: two people would share their features."""
    entity = unique()
    response = lane.request(method, path.replace("{entity}", entity), content=b'{"features":{"a":1}}')

    assert response.status_code == 400
    refused(lane.request("GET", f"/features/{entity}%EF%BF%BD"), 404, "entity_unknown")


def test_a_parameter_in_raw_utf_8_is_refused(server: PhoenixServer) -> None:
    """It would be read as Latin-1, and the page would be another person's."""
    line = "GET /predictions?entity_id=é HTTP/1.1\r\n".encode()
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(line + b"host: localhost\r\nconnection: close\r\n\r\n")
        with connection.makefile("rb") as answer:
            assert answer.readline().startswith(b"HTTP/1.1 400 ")


UNKNOWN_PARAMETERS = [
    ("GET", "/predictions?entity=cust_1"),
    ("GET", "/predictions?limit=5&Limit=5"),
    ("GET", "/predictions?="),
    ("GET", f"/predictions/{ANY_PREDICTION}?full=1"),
    ("GET", "/models?stage=prod"),
    ("GET", "/models/abc/versions/1.0.0?base_line=true"),
    ("POST", "/models/abc/versions/1.0.0/deactivate?force=1"),
    ("GET", "/features/cust_1?name=a"),
    ("GET", "/audit?since=2026-01-01"),
    ("GET", "/incidents?model=abc"),
    ("GET", "/monitoring/abc/drift?version=1.0.0"),
    ("GET", "/retrain-jobs?model=abc"),
    ("POST", "/predict?model_version=1.0.0"),
    ("POST", "/predict/batch?model_version=1.0.0"),
    ("POST", "/feedback?dry_run=1"),
]


@pytest.mark.parametrize(("method", "path"), UNKNOWN_PARAMETERS)
def test_a_parameter_that_a_call_does_not_know_is_refused(lane: Lane, method: str, path: str) -> None:
    """A misspelt filter that is ignored shows everybody's rows, and looks like an answer."""
    error = refused(
        lane.request(method, path, content=CALLS.get((method, path.partition("?")[0]), b"%b") % b"1"),
        422,
        "invalid_field",
    )

    assert error["details"]["field"].startswith("query")


@pytest.mark.parametrize("path", ["/health/live?probe=1", "/health/ready?x", "/metrics?module=a", "/v2?x=1"])
def test_probes_and_scrapes_may_carry_parameters(lane: Lane, path: str) -> None:
    """Load balancers and Prometheus add their own, and mean nothing by them."""
    assert lane.request("GET", path).status_code == 200


NUL_IN_A_BODY: list[tuple[str, str, Any]] = [
    ("PUT", "/features/{entity}", {"features": {"a\0": 1}}),
    ("PUT", "/features/{entity}", {"features": {"a": "\0"}}),
    ("POST", "/features", {"entities": {"\0": {"a": 1}}}),
    ("POST", "/features", {"entities": {"{entity}": {"a": "x\0"}}}),
    ("PUT", "/models/managed/routing", {"strategy": "single", "arms": [{"version": "1.1.0\0"}]}),
    ("PUT", "/models/managed/routing", {**SINGLE, "salt": "\0"}),
    ("PUT", "/models/managed/routing", {**SINGLE, "\0": 1}),
    ("POST", "/models/managed/versions/1.0.0/stage", {"stage": "\0"}),
    ("PUT", "/features/a%00b", {"features": {"a": 1}}),
]


@pytest.mark.parametrize(("method", "path", "body"), NUL_IN_A_BODY)
def test_u0000_in_a_management_call_is_refused_and_changes_nothing(
    lane: Lane, method: str, path: str, body: Any
) -> None:
    """A name that one database takes and another does not would make the stores differ."""
    entity = unique()
    sent = json.dumps(body).replace("{entity}", entity).encode()
    before = ok(lane.request("GET", "/models/managed"))

    refused(lane.request(method, path.replace("{entity}", entity), content=sent), 400, "malformed_body")

    refused(lane.request("GET", f"/features/{entity}"), 404, "entity_unknown")
    assert ok(lane.request("GET", "/models/managed")) == before


@pytest.mark.parametrize(
    "model",
    [
        {"id": "a\0", "version": "1.0.0"},
        {"id": "a", "version": "1.0.0\0"},
        {"id": "a", "version": "1.0.0", "features": {"x": {"type": "float", "description": "\0"}}},
        {"id": "a", "version": "1.0.0", "features": {"\0": {"type": "float"}}},
        {"id": "a", "version": "1.0.0", "task": "\0"},
    ],
)
def test_u0000_in_an_upload_is_refused(lane: Lane, model: dict[str, Any]) -> None:
    """The same, in the JSON that comes with an artifact."""
    response = lane.request(
        "POST", "/models", files={"artifact": b"not looked at"}, data={"model": json.dumps(model)}
    )

    refused(response, 400, "malformed_body")


BAD_QUESTIONS = [
    "limit=0",
    "limit=1001",
    "limit=ten",
    "limit=99999999999999999999",
    "since=yesterday",
    "since=0001-01-01T00:00:00",
    "since=0001-01-01T00:00:00%2B14:00",
    "until=9999-12-31T23:59:59-14:00",
    "since=1e20",
    "cursor=nonsense",
    f"cursor=99999999999999999999999.{ANY_PREDICTION}",
    f"cursor=-1.{ANY_PREDICTION}",
    "cursor=1.2",
]


@pytest.mark.parametrize("question", BAD_QUESTIONS)
def test_a_question_to_the_log_that_makes_no_sense_is_refused(lane: Lane, question: str) -> None:
    """The query string is input like any other."""
    refused(lane.request("GET", f"/predictions?{question}"), 422, "invalid_field")


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("PUT", "/features/{entity}", {"features": {}}),
        ("PUT", "/features/{entity}", {"features": {"": 1}}),
        ("PUT", "/features/{entity}", {"features": {"_updated_at": 1}}),
        ("PUT", "/features/{entity}", {"features": {"a": [1]}}),
        ("PUT", "/features/{entity}", {"features": {"a": {"b": 1}}}),
        ("PUT", "/features/{entity}", {"features": [1]}),
        ("PUT", "/features/{entity}", {}),
        ("PUT", "/features/{entity}", {"features": {"a": 1}, "at": 5}),
        ("PUT", "/features/" + "e" * 513, {"features": {"a": 1}}),
        ("POST", "/features", {"entities": {"": {"a": 1}}}),
        ("POST", "/features", {"entities": {"{entity}": {}}}),
        ("POST", "/features", {"entities": []}),
    ],
)
def test_features_that_no_store_could_hold_are_an_invalid_field(
    lane: Lane, method: str, path: str, body: Any
) -> None:
    """Names with an underscore are the store's own; everything else is one scalar a name."""
    entity = unique()

    refused(lane.request(method, path.replace("{entity}", entity), json=body), 422, "invalid_field")


@pytest.mark.parametrize("value", [b"1e999", b"NaN", b"9" * 30, b"-9223372036854775809", b"[" * DEEP])
def test_a_number_that_no_store_gives_back_equal_is_not_stored(lane: Lane, value: bytes) -> None:
    """What is stored must come back as it was, whatever the store."""
    entity = unique()
    before = {"a": 1}
    store_features(lane, entity, **before)

    response = lane.request("PUT", f"/features/{entity}", content=b'{"features":{"a":%b}}' % value)

    assert response.status_code in (400, 422)
    assert error_of(response)["code"] in ("malformed_body", "invalid_field", "feature_invalid")
    assert ok(lane.request("GET", f"/features/{entity}"))["features"] == before


# Whatever is sent: never a 5xx, always the shape of an error.

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=20),
    st.sampled_from(["abc", "1.0.0", "1.1.0", "champion", "shadow", ANY_PREDICTION, "\0", "e", ""]),
)
names = st.one_of(
    st.text(max_size=10),
    st.sampled_from(["model_id", "model_version", "entity_id", "features", "instances", "routing_key"]),
    st.sampled_from(["request_id", "prediction_id", "outcome", "observed_at", "strategy", "arms"]),
    st.sampled_from(["version", "role", "weight", "salt", "entities", "a", "b", "c", "stage"]),
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4)
)


def objects(required: dict[str, Any], **optional: Any) -> st.SearchStrategy[Any]:
    """JSON that is nearly right: each field as documented or anything at all, some left out, some too many."""
    left = {name: value for name, value in required.items() if name not in optional}
    fields = {name: st.just(value) | values for name, value in left.items()}
    return st.fixed_dictionaries(fields, optional={name: value | values for name, value in optional.items()})


rows = st.lists(scalars, max_size=4) | st.dictionaries(names, scalars, max_size=4) | st.just([1, 2, 3])
instances = objects({"features": [1, 2, 3]}, entity_id=scalars, routing_key=scalars, request_id=scalars)
arms = st.lists(objects({"version": "1.1.0"}, role=scalars, weight=scalars), max_size=3)
times = st.datetimes().map(lambda at: at.isoformat())
BODIES: dict[tuple[str, str], st.SearchStrategy[Any]] = {
    ("POST", "/predict"): objects(
        {"model_id": "abc"}, features=rows, model_version=scalars, entity_id=scalars
    ),
    ("POST", "/predict/batch"): objects({"model_id": "abc"}, instances=st.lists(instances, max_size=3)),
    ("POST", "/feedback"): objects(
        {"prediction_id": ANY_PREDICTION, "outcome": 1}, outcome=values, observed_at=times
    ),
    ("PUT", "/features/fuzz"): objects({}, features=st.dictionaries(names, scalars, max_size=4)),
    ("PUT", "/models/fuzzed/routing"): objects({"strategy": "single"}, arms=arms, salt=scalars),
}


@pytest.mark.parametrize(("method", "path"), BODIES)
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_no_json_makes_the_server_fail(lane: Lane, method: str, path: str, data: st.DataObject) -> None:
    """What nobody thought of is found by chance, and must be the caller's 4xx and not our 5xx."""
    body = data.draw(values | BODIES[method, path], label="body")

    response = lane.request(method, path, content=json.dumps(body).encode())

    _never_fails(response)


@pytest.mark.parametrize(("method", "path"), BODIES)
@settings(max_examples=25)
@given(body=st.binary(max_size=60))
@example(b"\xff")
@example(b'{"model_id":"abc","features":[1,2,3]}\xff')
def test_no_bytes_make_the_server_fail(lane: Lane, method: str, path: str, body: bytes) -> None:
    """Not even what is no text."""
    response = lane.request(method, path, content=body)

    _never_fails(response)


@settings(max_examples=80)
@given(
    path=st.sampled_from(
        [
            "/models/{}",
            "/models/{}/routing",
            "/models/abc/versions/{}",
            "/features/{}",
            "/predictions/{}",
            "/predictions?model_id={}",
            "/predictions?entity_id={}",
            "/predictions?since={}",
            "/predictions?cursor={}",
            "/predictions?limit={}",
            "/feedback/unmatched?limit={}",
            "/feedback/unmatched?cursor={}",
            "/{}",
        ]
    ),
    text=st.text(max_size=20) | st.binary(max_size=8),
)
def test_no_url_makes_the_server_fail(lane: Lane, path: str, text: str | bytes) -> None:
    """A path or a query is text from outside, too."""
    response = lane.request("GET", path.format(quote(text, safe="")))

    if not response.is_redirect and response.headers["content-type"].startswith("application/json"):
        _never_fails(response)
    assert response.status_code < 500


def _never_fails(response: httpx.Response) -> None:
    assert response.status_code < 500, response.text
    if response.status_code >= 400:
        error_of(response)


def test_none_of_this_was_a_defect_to_the_server_either(server: PhoenixServer) -> None:
    """A traceback in the log is a defect even when the caller got a decent answer."""
    assert "Traceback" not in server.log()
    assert [record for record in server.log_records() if record.get("code") == "internal_error"] == []
    assert not (server.data / "dead").exists()


ADVICE: dict[str, tuple[str, str, bytes, str]] = {
    "a field of another name": (
        "POST",
        "/predict",
        b'{"model":"abc"}',
        "unknown field `model`; is model_id meant?",
    ),
    "a field like no other": (
        "POST",
        "/predict",
        b'{"zz":1}',
        "; there are entity_id, features, routing_key, request_id, model_id, model_version",
    ),
    "no body": ("POST", "/predict", b"", "the body is empty: send JSON"),
    "an instance": (
        "POST",
        "/predict/batch",
        b'{"model_id":"abc","instances":[{},{"key":1}]}',
        "at $.instances[1]",
    ),
    "a stage": (
        "POST",
        "/models/abc/versions/1.0.0/stage",
        b'{"stage":"live"}',
        "it is one of dev, staging, prod",
    ),
    "a strategy": (
        "PUT",
        "/models/abc/routing",
        b'{"strategy":"random","arms":[]}',
        "it is one of single, ab_test, canary, shadow",
    ),
    "refused before the JSON ends": ("POST", "/feedback", b'{"outcme":1', "is outcome meant?"),
}


@pytest.mark.parametrize(("method", "path", "body", "said"), ADVICE.values(), ids=ADVICE.keys())
def test_what_would_have_been_right_is_said(
    lane: Lane, method: str, path: str, body: bytes, said: str
) -> None:
    """Most that is refused is misspelt, and whoever reads the error has no documents beside it."""
    response = lane.request(method, path, content=body)

    assert response.status_code in (400, 422)
    assert said in error_of(response)["message"]
