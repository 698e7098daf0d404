"""Predictions, feedback and the log, over a real server and over the ordinary routes."""

from __future__ import annotations

import asyncio
import signal
import struct
import time
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from lanes import (
    BATCH_LIMIT,
    Lane,
    ServerLane,
    eventually,
    log_rows,
    logged,
    ok,
    refused,
    store_features,
    unique,
)
from phoenix_server import PhoenixServer

from phoenix_ml.bootstrap import open_features
from phoenix_ml.domain.features import PackedFeatures, packed_signature
from phoenix_ml.domain.rows import Column, ElementType, Scalar

pytestmark = pytest.mark.system

HOUR_S = 3600


def predict(lane: Lane, **body: Any) -> dict[str, Any]:
    """The answer to POST /predict."""
    answered: dict[str, Any] = ok(lane.request("POST", "/predict", json=body))
    return answered


def write_aged(server: PhoenixServer, entity_id: str, age_s: float, **features: Scalar) -> None:
    """Stores features as if that had been done so long ago."""

    async def write() -> None:
        store = open_features(server.settings)
        try:
            await store.write({entity_id: features}, int((time.time() - age_s) * 1000))
        finally:
            await store.close()

    asyncio.run(write())


def test_features_put_over_http_are_stored_packed_and_answered_the_same(
    server: PhoenixServer, lane: Lane
) -> None:
    """Who stores features by requests gets the short way too, and the same answer on it."""
    entity = unique()
    ok(lane.request("PUT", f"/features/{entity}", json={"features": {"a": 1, "b": 2.5, "c": -3}}))
    signature = packed_signature([Column(name, ElementType.FLOAT32) for name in "abc"])
    assert signature is not None

    async def packed() -> object:
        store = open_features(server.settings)
        try:
            return await store.read_packed(entity, signature)
        finally:
            await store.close()

    answer = asyncio.run(packed())
    assert isinstance(answer, PackedFeatures)
    assert answer.row == struct.pack("<3f", 1, 2.5, -3)
    assert predict(lane, model_id="abc", entity_id=entity)["result"] == 1 + 5 - 9 + 1000


def test_stored_features_of_an_entity_are_answered_and_logged_as_from_the_store(lane: Lane) -> None:
    """The usual request names nothing but the entity; answer and log must tell the same story."""
    entity = unique()
    store_features(lane, entity, a=1, b=2.5, c=-3)

    answer = predict(lane, model_id="abc", entity_id=entity)

    assert answer["model_version"] == "1.1.0"
    assert answer["result"] == 1 + 5 - 9 + 1000
    assert answer["feature_sources"] == "store"
    assert answer["role"] == "champion"
    assert answer["confidence"] is None
    assert answer["latency_ms"] > 0
    row = logged(lane, answer["prediction_id"])
    assert row["features"] == {"a": 1.0, "b": 2.5, "c": -3.0}
    assert row["feature_sources"] == "store"
    assert row["entity_id"] == entity
    assert (row["result"], row["latency_ms"]) == (answer["result"], answer["latency_ms"])
    assert (row["batch_size"], row["batch_position"]) == (1, 0)
    assert row["outcome"] is None


def test_an_answer_has_a_time_ordered_id_of_its_own(lane: Lane) -> None:
    """Ids are keys of the log: equal ones would lose rows, and unordered ones would scatter its index."""
    ids = [predict(lane, model_id="abc", features=[1, 2, 3])["prediction_id"] for _ in range(20)]

    assert len(set(ids)) == 20
    assert ids == sorted(ids)
    assert {UUID(one).version for one in ids} == {7}


@pytest.mark.parametrize(
    "features", [[1, 2, 3], {"c": 3, "a": 1, "b": 2}, {"a": 1.0, "b": 2.0, "c": 3.0}], ids=str
)
def test_features_of_the_request_come_by_position_or_by_name(lane: Lane, features: Any) -> None:
    """A list is in signature order, an object in any; a number may lack its decimal point."""
    answer = predict(lane, model_id="abc", model_version="1.0.0", features=features)

    assert answer["result"] == 14
    assert answer["feature_sources"] == "request"
    assert logged(lane, answer["prediction_id"])["features"] == {"a": 1.0, "b": 2.0, "c": 3.0}


def test_a_stored_value_goes_before_the_requests_which_goes_before_the_default(lane: Lane) -> None:
    """The order of the sources is part of the contract, and each value tells its own."""
    entity = unique()
    store_features(lane, entity, income=1, visits=2, score=3)

    answer = predict(lane, model_id="people", entity_id=entity, features={"income": 9, "age": 5})

    assert answer["result"] == 1 + 10 * 5 + 100 * 2 + 1000 * 3
    expected = {
        "income": "store",
        "age": "request",
        "debt": "missing",
        "visits": "store",
        "score": "store",
    }
    assert answer["feature_sources"] == expected
    row = logged(lane, answer["prediction_id"])
    assert row["feature_sources"] == expected
    assert row["features"] == {"income": 1.0, "age": 5.0, "debt": None, "visits": 2.0, "score": 3.0}


def test_an_absent_feature_takes_its_default_and_says_so(lane: Lane) -> None:
    """A default is a decision somebody made, so it must be visible afterwards."""
    answer = predict(lane, model_id="people", features={"income": 1, "visits": 2})

    assert answer["result"] == 1 + 10 * 40 + 100 * 2 + 1000 * 7
    sources = answer["feature_sources"]
    assert (sources["age"], sources["score"], sources["debt"]) == ("default", "default", "missing")


@pytest.mark.parametrize("features", [{"visits": 2}, {"income": None, "visits": 2}], ids=str)
def test_a_required_feature_that_is_missing_is_named_and_never_zero(lane: Lane, features: Any) -> None:
    """A silent 0.0 is the mistake this platform exists to prevent."""
    response = lane.request("POST", "/predict", json={"model_id": "people", "features": features})

    error = refused(response, 422, "feature_missing")
    assert error["details"] == {"feature": "income", "reason": "missing"}
    assert "'income'" in error["message"]


def test_a_feature_that_is_too_old_takes_its_default_marked_stale(lane: Lane, server: PhoenixServer) -> None:
    """Old values look like good ones; only the contract's age tells them apart."""
    entity = unique()
    write_aged(server, entity, 2 * HOUR_S, income=1, visits=2, score=3)

    error = refused(
        lane.request("POST", "/predict", json={"model_id": "people", "entity_id": entity}),
        422,
        "feature_missing",
    )
    answer = predict(lane, model_id="people", entity_id=entity, features={"visits": 4})

    assert error["details"] == {"feature": "visits", "reason": "stale"}
    assert answer["result"] == 1 + 10 * 40 + 100 * 4 + 1000 * 7
    sources = answer["feature_sources"]
    assert (sources["income"], sources["visits"], sources["score"]) == ("store", "request", "stale")


def test_a_value_is_fresh_up_to_its_maximum_age(lane: Lane, server: PhoenixServer) -> None:
    """The age counts from the write of that very feature, not from the entity's last one."""
    entity = unique()
    write_aged(server, entity, 2 * HOUR_S, income=1, visits=2, score=3)
    write_aged(server, entity, HOUR_S - 60, visits=5)

    answer = predict(lane, model_id="people", entity_id=entity)

    assert answer["feature_sources"]["visits"] == "store"
    assert answer["feature_sources"]["score"] == "stale"


def test_an_entity_without_features_is_unknown_unless_the_request_brings_them(lane: Lane) -> None:
    """A typing error in an entity id must not become a prediction from defaults alone."""
    entity = unique()

    response = lane.request("POST", "/predict", json={"model_id": "abc", "entity_id": entity})
    answer = predict(lane, model_id="abc", entity_id=entity, features=[1, 2, 3])

    error = refused(response, 404, "entity_unknown")
    assert error["details"]["entity_id"] == entity
    assert answer["feature_sources"] == "request"
    assert logged(lane, answer["prediction_id"])["entity_id"] == entity


def test_a_classifier_answers_its_class_with_the_probability_of_it(lane: Lane) -> None:
    """Confidence is of the answer given, not of class one."""
    yes = predict(lane, model_id="signs", features=[2])
    no = predict(lane, model_id="signs", features=[-2])

    assert (yes["result"], no["result"]) == (1, 0)
    assert yes["confidence"] == pytest.approx(0.8808, abs=1e-4)
    assert no["confidence"] == pytest.approx(0.8808, abs=1e-4)
    assert yes["probabilities"] == pytest.approx([0.1192, 0.8808], abs=1e-4)
    row = logged(lane, no["prediction_id"])
    assert (row["result"], row["confidence"], row["probabilities"]) == (
        0,
        no["confidence"],
        no["probabilities"],
    )


def test_integers_booleans_and_strings_are_features_too(lane: Lane) -> None:
    """What a store or a caller holds as text must reach the model, and the log, as text."""
    entity = unique()
    store_features(lane, entity, ratio=0.5, count=2**53 + 1, member=False, city="Zürich 東京 😀")

    answer = predict(lane, model_id="typed", entity_id=entity)

    assert answer["result"] == 0.5
    row = logged(lane, answer["prediction_id"])
    assert row["features"] == {"ratio": 0.5, "count": 2**53 + 1, "member": False, "city": "Zürich 東京 😀"}


def test_a_request_id_is_echoed_and_logged(lane: Lane) -> None:
    """It ties a caller's own trace to the row of the log."""
    request_id = unique("req")

    response = lane.request(
        "POST", "/predict", json={"model_id": "abc", "features": [1, 2, 3], "request_id": request_id}
    )

    assert response.headers["x-request-id"] == request_id
    assert logged(lane, ok(response)["prediction_id"])["request_id"] == request_id


def test_a_request_without_an_id_gets_one_that_the_log_has_too(lane: Lane) -> None:
    """A caller who asks about an answer later needs a name for it."""
    response = lane.request("POST", "/predict", json={"model_id": "abc", "features": [1, 2, 3]})

    request_id = response.headers["x-request-id"]
    assert logged(lane, ok(response)["prediction_id"])["request_id"] == request_id


def test_the_headers_request_id_is_the_rows_where_the_body_has_none(lane: Lane) -> None:
    """Proxies and tracing libraries put their id there, not into the body."""
    request_id = unique("trace")

    response = lane.request(
        "POST",
        "/predict",
        json={"model_id": "abc", "features": [1, 2, 3]},
        headers={"x-request-id": request_id},
    )

    assert response.headers["x-request-id"] == request_id
    assert logged(lane, ok(response)["prediction_id"])["request_id"] == request_id


@pytest.mark.parametrize("path", ["/predict", "/predict/batch", "/feedback"])
def test_a_refused_call_answers_an_id_too(lane: Lane, path: str) -> None:
    """It is what a caller quotes, and what our log line bears."""
    given = lane.request("POST", path, content=b"{", headers={"x-request-id": "trace-7"})
    made = lane.request("POST", path, content=b"{")

    assert given.headers["x-request-id"] == "trace-7"
    assert len(made.headers["x-request-id"]) == 36


def test_a_request_that_fails_keeps_its_id(lane: Lane) -> None:
    """Failures are what people ask about."""
    request_id = unique("req")

    response = lane.request(
        "POST", "/predict", json={"model_id": "nowhere", "features": [1], "request_id": request_id}
    )

    refused(response, 404, "model_unknown")
    assert response.headers["x-request-id"] == request_id


def test_a_named_version_answers_whatever_the_routing_says(lane: Lane) -> None:
    """Pinned answers belong to no experiment, and the log must be able to leave them out."""
    answer = predict(lane, model_id="abc", model_version="1.0.0", features=[1, 0, 0])

    assert (answer["model_version"], answer["result"]) == ("1.0.0", 1)
    assert logged(lane, answer["prediction_id"])["route"]["strategy"] == "pinned"


@pytest.mark.parametrize("content_type", ["application/json", "text/plain", "application/octet-stream", None])
def test_the_body_counts_and_not_its_content_type(lane: Lane, content_type: str | None) -> None:
    """curl -d says urlencoded; to refuse that would only annoy."""
    headers = {"content-type": content_type} if content_type else {}

    response = lane.request(
        "POST", "/predict", content=b'{"model_id":"abc","features":[1,2,3]}', headers=headers
    )

    assert ok(response)["result"] == 1014


def test_a_body_in_chunks_is_answered_like_one_in_a_piece(lane: Lane) -> None:
    """Proxies re-chunk bodies as they like."""
    response = lane.request("POST", "/predict", chunks=[b'{"model_id":"a', b'bc","features"', b":[1,2,3]}"])

    assert ok(response)["result"] == 1014


def test_each_row_of_a_batch_is_a_prediction_of_its_own_in_order(lane: Lane) -> None:
    """A batch saves round trips; it must not save records."""
    entity = unique()
    store_features(lane, entity, a=5, b=0, c=0)
    instances: list[dict[str, Any]] = [{"features": [n, 0, 0], "request_id": f"row-{n}"} for n in range(4)]
    instances.append({"entity_id": entity})

    body = {"model_id": "abc", "model_version": "1.0.0", "instances": instances}
    answers = ok(lane.request("POST", "/predict/batch", json=body))["predictions"]

    assert [answer["result"] for answer in answers] == [0, 1, 2, 3, 5]
    assert [answer["feature_sources"] for answer in answers] == ["request"] * 4 + ["store"]
    assert len({answer["prediction_id"] for answer in answers}) == 5
    rows = [logged(lane, answer["prediction_id"]) for answer in answers]
    assert [row["batch_position"] for row in rows] == [0, 1, 2, 3, 4]
    assert {row["batch_size"] for row in rows} == {5}
    assert [row["request_id"] for row in rows[:4]] == ["row-0", "row-1", "row-2", "row-3"]
    assert rows[4]["entity_id"] == entity


def test_a_batch_of_exactly_the_limit_is_answered(lane: Lane) -> None:
    """A limit is the largest that works."""
    body = {"model_id": "abc", "instances": [{"features": [1, 2, 3]}] * BATCH_LIMIT}

    answers = ok(lane.request("POST", "/predict/batch", json=body))["predictions"]

    assert len(answers) == BATCH_LIMIT


@pytest.mark.parametrize("outcome", [1, 0.25, True, "defaulted", {"amount": 12.5, "reason": None}], ids=str)
def test_an_outcome_is_attached_to_its_prediction(lane: Lane, outcome: Any) -> None:
    """Quality is measured on these pairs, and truths are labels, numbers or records."""
    answer = predict(lane, model_id="abc", features=[1, 2, 3])
    observed = datetime.now(UTC) - timedelta(hours=3)

    body = {
        "prediction_id": answer["prediction_id"],
        "outcome": outcome,
        "observed_at": observed.isoformat(),
    }
    accepted = ok(lane.request("POST", "/feedback", json=body), 202)

    assert accepted == {"accepted": 1}
    response = eventually(
        lambda: lane.request("GET", f"/predictions/{answer['prediction_id']}"),
        lambda found: found.status_code == 200 and found.json()["outcome"] is not None,
        "the outcome is attached",
    )
    assert response.json()["outcome"] == outcome
    assert datetime.fromisoformat(response.json()["outcome_at"]) == observed.replace(
        microsecond=observed.microsecond // 1000 * 1000
    )


def test_of_several_outcomes_the_one_observed_last_counts(lane: Lane) -> None:
    """Reports arrive in any order; time of arrival says nothing about the truth."""
    prediction_id = predict(lane, model_id="abc", features=[1, 2, 3])["prediction_id"]
    reports = [
        {"prediction_id": prediction_id, "outcome": outcome, "observed_at": f"2026-01-0{day}T00:00:00Z"}
        for outcome, day in (("first", 1), ("last", 3), ("middle", 2))
    ]

    assert ok(lane.request("POST", "/feedback", json=reports), 202) == {"accepted": 3}

    eventually(
        lambda: lane.request("GET", f"/predictions/{prediction_id}"),
        lambda found: found.status_code == 200 and found.json()["outcome"] == "last",
        "the last observation counts",
    )


def test_an_outcome_that_is_reported_before_the_row_is_written_finds_it(server: PhoenixServer) -> None:
    """Feedback can be quicker than the log; it must not matter which of them comes first."""
    one, other = ServerLane(server.url), ServerLane(server.url)
    background = server.kill_child("background", signal.SIGSTOP)
    try:
        prediction_id = predict(one, model_id="abc", features=[1, 2, 3])["prediction_id"]
        ok(other.request("POST", "/feedback", json={"prediction_id": prediction_id, "outcome": "early"}), 202)
        unwritten = one.request("GET", f"/predictions/{prediction_id}")
    finally:
        assert server.kill_child("background", signal.SIGCONT) == background

    refused(unwritten, 404, "prediction_unknown")
    eventually(
        lambda: one.request("GET", f"/predictions/{prediction_id}"),
        lambda found: found.status_code == 200 and found.json()["outcome"] == "early",
        "the outcome is attached",
    )
    one.close()
    other.close()


def test_outcomes_of_predictions_nobody_made_are_counted_and_listed(lane: Lane) -> None:
    """They tell of a caller who mixes up ids, which nobody would notice otherwise."""
    stranger = str(uuid4())
    before = ok(lane.request("GET", "/feedback/unmatched"))["count"]

    ok(lane.request("POST", "/feedback", json={"prediction_id": stranger, "outcome": "lost"}), 202)

    found = eventually(
        lambda: lane.request("GET", "/feedback/unmatched"),
        lambda response: stranger in response.text,
        "the stranger is listed",
    ).json()
    assert found["count"] >= before + 1
    listed = next(item for item in found["items"] if item["prediction_id"] == stranger)
    assert listed["outcome"] == "lost"
    assert listed["observed_at"] == listed["received_at"]


def test_outcomes_of_predictions_nobody_made_are_paged_newest_first(lane: Lane) -> None:
    """Whoever looks for a pattern in the wrong ids needs them all."""
    strangers = [str(uuid4()) for _ in range(3)]
    outcomes = [{"prediction_id": stranger, "outcome": 1} for stranger in strangers]
    ok(lane.request("POST", "/feedback", json=outcomes), 202)
    eventually(
        lambda: lane.request("GET", "/feedback/unmatched"),
        lambda response: all(stranger in response.text for stranger in strangers),
        "the strangers are listed",
    )

    first = ok(lane.request("GET", "/feedback/unmatched?limit=2"))
    second = ok(lane.request("GET", f"/feedback/unmatched?limit=1&cursor={first['next_cursor']}"))

    items = [*first["items"], *second["items"]]
    assert {item["prediction_id"] for item in items} == set(strangers)
    assert first["count"] == second["count"] >= 3


def test_the_log_is_paged_newest_first_without_gaps_or_repeats(lane: Lane) -> None:
    """Whoever exports the log by pages gets every row once."""
    entity = unique()
    made = [
        predict(lane, model_id="abc", entity_id=entity, features=[n, 0, 0])["prediction_id"] for n in range(7)
    ]
    logged(lane, made[-1])

    pages, cursor = [], None
    while True:
        filters = {"entity_id": entity, "limit": 3} | ({"cursor": cursor} if cursor else {})
        page = ok(lane.request("GET", "/predictions", params=filters))
        pages.append([item["prediction_id"] for item in page["items"]])
        cursor = page["next_cursor"]
        if cursor is None:
            break

    assert [len(page) for page in pages] == [3, 3, 1]
    assert [one for page in pages for one in page] == made[::-1]


def test_the_log_is_filtered_by_model_version_entity_and_time(lane: Lane) -> None:
    """The questions that people ask of a log."""
    entity, other = unique(), unique()
    first = predict(lane, model_id="abc", model_version="1.0.0", entity_id=entity, features=[1, 0, 0])
    second = predict(lane, model_id="abc", entity_id=entity, features=[2, 0, 0])
    predict(lane, model_id="signs", entity_id=entity, features=[1])
    third = predict(lane, model_id="abc", entity_id=other, features=[3, 0, 0])
    first_at = logged(lane, first["prediction_id"])["created_at"]
    third_at = logged(lane, third["prediction_id"])["created_at"]

    def ids(**filters: Any) -> list[str]:
        return [row["prediction_id"] for row in log_rows(lane, **filters)]

    assert ids(entity_id=other) == [third["prediction_id"]]
    assert ids(entity_id=entity, model_id="abc") == [second["prediction_id"], first["prediction_id"]]
    assert ids(entity_id=entity, model_version="1.0.0", model_id="abc") == [first["prediction_id"]]
    assert len(ids(entity_id=entity)) == 3
    assert ids(entity_id=other, since=third_at) == [third["prediction_id"]]
    assert ids(entity_id=other, until=third_at) == []
    assert first["prediction_id"] not in ids(entity_id=entity, until=first_at)
    refused(lane.request("GET", "/predictions", params={"model_id": "nowhere"}), 404, "model_unknown")


def test_a_prediction_that_is_not_on_record_is_said_to_be_unknown(lane: Lane) -> None:
    """An id from elsewhere is a 404, a text that is no id at all a 422."""
    refused(lane.request("GET", f"/predictions/{uuid4()}"), 404, "prediction_unknown")
    refused(lane.request("GET", "/predictions/credit-risk"), 422, "invalid_field")
