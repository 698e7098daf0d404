"""Management over HTTP: the catalogue, the feature store and the audit log."""

from __future__ import annotations

import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
import zoo
from lanes import UPLOAD_LIMIT_BYTES, Lane, ServerLane, error_of, ok, refused, unique
from phoenix_server import PhoenixServer

pytestmark = pytest.mark.system


def upload(
    http: Lane, artifact: bytes, *, reference: tuple[str, bytes] | None = None, **model: Any
) -> httpx.Response:
    """The answer to a registration as curl -F would send it."""
    files: dict[str, Any] = {"artifact": ("model.onnx", artifact)}
    if reference is not None:
        files["reference"] = reference
    return http.request("POST", "/models", files=files, data={"model": json.dumps(model)})


@pytest.fixture
def artifact(tmp_path: Path) -> bytes:
    """A regressor of a, b and c: their sum, weighted 1, 2, 3."""
    return zoo.linear(tmp_path / "model.onnx", [1, 2, 3]).read_bytes()


CONTRACT = {name: {"type": "float"} for name in "abc"}


def test_a_model_is_uploaded_activated_and_asked(http: Lane, artifact: bytes) -> None:
    """The whole life of a version without a shell on the server."""
    model_id = unique("up")

    registered = ok(upload(http, artifact, id=model_id, version="1.0.0", features=CONTRACT), 201)
    refused(
        http.request("POST", "/predict", json={"model_id": model_id, "features": [1, 2, 3]}),
        409,
        "version_inactive",
    )
    activated = ok(http.request("POST", f"/models/{model_id}/versions/1.0.0/activate"))
    answer = ok(http.request("POST", "/predict", json={"model_id": model_id, "features": [1, 2, 3]}))

    assert (registered["id"], registered["version"], registered["stage"]) == (model_id, "1.0.0", "dev")
    assert not registered["is_active"]
    assert registered["framework"] == "onnx"
    assert registered["task"] == "regression"
    assert len(registered["sha256"]) == 64
    assert list(registered["features"]) == ["a", "b", "c"]
    assert not registered["has_baseline"]
    assert activated["is_active"]
    assert answer["result"] == 14


def test_registering_the_same_bytes_again_changes_nothing(http: Lane, artifact: bytes) -> None:
    """A deployment script that runs twice must not fail the second time."""
    model_id = unique("up")
    first = ok(upload(http, artifact, id=model_id, version="1.0.0"), 201)
    ok(http.request("POST", f"/models/{model_id}/versions/1.0.0/activate"))

    again = ok(upload(http, artifact, id=model_id, version="1.0.0"), 201)

    assert again == {**first, "is_active": True}


def test_a_version_never_changes_its_bytes(http: Lane, artifact: bytes, tmp_path: Path) -> None:
    """A log row names the version; were its bytes another, the row would lie."""
    model_id = unique("up")
    ok(upload(http, artifact, id=model_id, version="1.0.0"), 201)
    other = zoo.linear(tmp_path / "other.onnx", [1, 2, 4]).read_bytes()

    error = refused(upload(http, other, id=model_id, version="1.0.0"), 409, "version_conflict")

    assert error["details"]["registered_sha256"] != error["details"]["given_sha256"]


def test_of_many_who_register_the_same_version_all_get_the_same_one(
    server: PhoenixServer, artifact: bytes
) -> None:
    """Replicas of a deployment start at the same time."""
    model_id = unique("race")

    def register(_: int) -> httpx.Response:
        lane = ServerLane(server.url)
        try:
            return upload(lane, artifact, id=model_id, version="1.0.0")
        finally:
            lane.close()

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(register, range(8)))

    # Who lost the race against the others by a hair is told so, and finds the version there.
    assert {answer.status_code for answer in answers} <= {201, 409}
    shas = {answer.json()["sha256"] for answer in answers if answer.status_code == 201}
    assert len(shas) == 1
    shown = ok(httpx.get(f"{server.url}/models/{model_id}"))
    assert [version["sha256"] for version in shown["versions"]] == list(shas)


REFUSED: dict[str, tuple[dict[str, Any], int, str]] = {
    "an id with a slash": ({"id": "../x", "version": "1.0.0"}, 422, "invalid_field"),
    "an empty id": ({"id": "", "version": "1.0.0"}, 422, "invalid_field"),
    "a version that is not semantic": ({"id": "x", "version": "v1"}, 422, "invalid_field"),
    "a version with a leading zero": ({"id": "x", "version": "1.0.01"}, 422, "invalid_field"),
    "a stage that is none": ({"id": "x", "version": "1.0.0", "stage": "live"}, 422, "invalid_field"),
    "no version": ({"id": "x"}, 422, "invalid_field"),
    "an unknown field": ({"id": "x", "version": "1.0.0", "owner": "me"}, 422, "invalid_field"),
    "a task that is none": ({"id": "x", "version": "1.0.0", "task": "ranking"}, 422, "model_refused"),
    "too few feature names": (
        {"id": "x", "version": "1.0.0", "features": {"a": {"type": "float"}}},
        422,
        "model_refused",
    ),
    "a feature type the column cannot hold": (
        {"id": "x", "version": "1.0.0", "features": {**CONTRACT, "b": {"type": "string"}}},
        422,
        "model_refused",
    ),
    "a default of the wrong type": (
        {"id": "x", "version": "1.0.0", "features": {**CONTRACT, "b": {"type": "float", "default": "1"}}},
        422,
        "model_refused",
    ),
    "a default that float32 cannot hold": (
        {"id": "x", "version": "1.0.0", "features": {**CONTRACT, "b": {"type": "float", "default": 1e39}}},
        422,
        "model_refused",
    ),
    "a maximum age of nothing": (
        {"id": "x", "version": "1.0.0", "features": {**CONTRACT, "b": {"type": "float", "max_age_s": 0}}},
        422,
        "model_refused",
    ),
}


@pytest.mark.parametrize(("model", "status", "code"), REFUSED.values(), ids=REFUSED.keys())
def test_a_registration_that_makes_no_sense_is_refused_and_leaves_nothing(
    http: Lane, server: PhoenixServer, tmp_path: Path, model: dict[str, Any], status: int, code: str
) -> None:
    """What is registered serves later, when nobody looks any more."""
    fresh = zoo.linear(tmp_path / "fresh.onnx", [1, 2, 3], bias=hash(str(model)) % 1000).read_bytes()
    before = sorted((server.data / "artifacts").rglob("*"))

    refused(upload(http, fresh, **model), status, code)

    refused(http.request("GET", "/models/x"), 404, "model_unknown")
    assert [path for path in before if path.is_file()] == [
        path for path in sorted((server.data / "artifacts").rglob("*")) if path.is_file()
    ]


class Intruder:
    """A pickle that makes a folder when it is opened."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


def test_an_uploaded_pickle_is_refused_and_not_opened(http: Lane, tmp_path: Path) -> None:
    """Opening a pickle runs its code: by HTTP anybody with a key could run any program on the server."""
    target = tmp_path / "made-by-the-pickle"
    content = pickle.dumps(Intruder(target))

    for name in ("model.pkl", "model.joblib", "model.onnx"):
        model = json.dumps({"id": unique("up"), "version": "1.0.0"})
        answer = http.request("POST", "/models", files={"artifact": (name, content)}, data={"model": model})

        error = refused(answer, 422, "model_refused")
        assert "not an ONNX model" in error["message"]
        assert "converted by phoenix-ml models register, at the command line" in error["message"]
    assert not target.exists()
    pickle.loads(content)
    assert target.exists(), "so that it is a pickle that would have done it"


@pytest.mark.parametrize("artifact_bytes", [b"", b"not a model", b"\0" * 1000], ids=len)
def test_an_artifact_that_is_no_model_is_refused_in_the_loaders_own_words(
    http: Lane, artifact_bytes: bytes
) -> None:
    """Whoever exported it has to see why."""
    error = refused(upload(http, artifact_bytes, id="x", version="1.0.0"), 422, "model_refused")

    assert "ONNX" in error["message"]


def test_an_upload_over_its_limit_is_refused(http: Lane) -> None:
    """Uploads have a limit of their own, and it is looked at while they arrive."""
    error = refused(
        upload(http, b"\0" * (UPLOAD_LIMIT_BYTES + 1), id="x", version="1.0.0"), 413, "body_too_large"
    )

    assert error["details"] == {"limit_bytes": UPLOAD_LIMIT_BYTES}


MULTIPART = {"content-type": "multipart/form-data; boundary=b"}
PART = b'--b\r\ncontent-disposition: form-data; name="%b"%b\r\n\r\n%b\r\n'
MODEL_PART = PART % (b"model", b"", b'{"id":"x","version":"1.0.0"}')
FILE_PART = PART % (b"artifact", b'; filename="m.onnx"', b"x")
REFERENCE_PART = PART % (b"reference", b'; filename="a.c\x00sv"', b"a,b,c\n1,2,3\n")
LONG_REFERENCE_PART = PART % (b"reference", b'; filename="a.' + b"c" * 500 + b'"', b"a,b,c\n1,2,3\n")
UPLOADS: dict[str, tuple[dict[str, str], bytes, int]] = {
    "nothing": ({}, b"", 422),
    "JSON": ({"content-type": "application/json"}, b"{}", 422),
    "no boundary": ({"content-type": "multipart/form-data"}, b"x", 400),
    "no part": (MULTIPART, b"--b--\r\n", 422),
    "never closed": (MULTIPART, MODEL_PART, 422),
    "no artifact": (MULTIPART, MODEL_PART + b"--b--\r\n", 422),
    "no model": (MULTIPART, FILE_PART + b"--b--\r\n", 422),
    "artifact as text": (MULTIPART, PART % (b"artifact", b"", b"x") + MODEL_PART + b"--b--\r\n", 422),
    "model that is no JSON": (MULTIPART, FILE_PART + PART % (b"model", b"", b"{") + b"--b--\r\n", 400),
    "model of invalid UTF-8": (MULTIPART, FILE_PART + PART % (b"model", b"", b"\xff") + b"--b--\r\n", 400),
    "too many fields": (MULTIPART, MODEL_PART * 6 + b"--b--\r\n", 400),
    "too many files": (MULTIPART, FILE_PART * 3 + b"--b--\r\n", 400),
    "reference as text": (
        MULTIPART,
        FILE_PART + MODEL_PART + PART % (b"reference", b"", b"x") + b"--b--\r\n",
        422,
    ),
    "a misspelt part": (
        MULTIPART,
        FILE_PART + MODEL_PART + PART % (b"refrence", b'; filename="a.csv"', b"a\n1\n") + b"--b--\r\n",
        422,
    ),
    "U+0000 in a file name": (MULTIPART, FILE_PART + MODEL_PART + REFERENCE_PART + b"--b--\r\n", 422),
    "an endless file name": (MULTIPART, FILE_PART + MODEL_PART + LONG_REFERENCE_PART + b"--b--\r\n", 422),
}


@pytest.mark.parametrize(("headers", "body", "status"), UPLOADS.values(), ids=UPLOADS.keys())
def test_an_upload_that_is_not_put_together_well_is_refused(
    http: Lane, headers: dict[str, str], body: bytes, status: int
) -> None:
    """Multipart is written by hand more often than one thinks."""
    response = http.request("POST", "/models", content=body, headers=headers)

    assert response.status_code == status, response.text
    assert error_of(response)["code"] in ("malformed_body", "invalid_field")


def test_a_reference_set_becomes_the_baseline(http: Lane, artifact: bytes) -> None:
    """Without it nothing could be told of drift later."""
    model_id = unique("ref")
    rows = b"a,b,c\n" + b"".join(b"%d,%d,%d\n" % (n, n * 2, n % 3) for n in range(200))

    registered = ok(
        upload(
            http, artifact, reference=("train.csv", rows), id=model_id, version="1.0.0", features=CONTRACT
        ),
        201,
    )
    shown = ok(http.request("GET", f"/models/{model_id}/versions/1.0.0", params={"baseline": True}))

    assert registered["has_baseline"]
    assert "baseline" not in registered
    assert shown["baseline"]


def test_an_upload_may_say_which_columns_hold_the_outcome_and_the_time(http: Lane, artifact: bytes) -> None:
    """What the command line can register, another machine can: without outcomes there is no quality to compare with."""
    model_id = unique("ref")
    rows = b"a,b,c,y,at\n" + b"".join(b"%d,0,0,%d,%d\n" % (n, n + 2, n) for n in range(200))
    said: dict[str, Any] = {
        "id": model_id,
        "version": "1.0.0",
        "features": CONTRACT,
        "outcome": "y",
        "time": "at",
    }

    refused(upload(http, artifact, **said), 422, "invalid_field")
    refused(
        upload(http, artifact, reference=("t.csv", rows), **said | {"time": "when"}), 422, "invalid_field"
    )
    registered = ok(upload(http, artifact, reference=("train.csv", rows), **said), 201)
    shown = ok(http.request("GET", f"/models/{model_id}/versions/1.0.0", params={"baseline": True}))

    assert ["in order of time" in note for note in registered["notes"]] == [True]
    assert shown["baseline"]["quality"]["mae"] == pytest.approx(2.0)
    assert shown["baseline"]["is_time_ordered"]


def test_a_reference_set_that_is_no_table_is_refused(http: Lane, artifact: bytes) -> None:
    """The model would be registered without what it is to be watched with."""
    for name, content in (("train.txt", b"a,b,c\n"), ("train.parquet", b"no parquet"), ("train.csv", b"")):
        response = upload(http, artifact, reference=(name, content), id="x", version="1.0.0")

        assert response.status_code == 422, response.text
        error_of(response)
    refused(http.request("GET", "/models/x"), 404, "model_unknown")


def test_versions_are_listed_and_shown(http: Lane) -> None:
    """What people look at before they change something."""
    listed = ok(http.request("GET", "/models"))
    shown = ok(http.request("GET", "/models/managed"))
    one = ok(http.request("GET", "/models/managed/versions/1.1.0"))

    assert listed["next_cursor"] is None
    assert {"abc", "people", "signs", "typed"} <= {item["id"] for item in listed["items"]}
    assert [version["version"] for version in shown["versions"]] == ["1.0.0", "1.1.0", "2.0.0"]
    assert shown["id"] == "managed"
    assert one == shown["versions"][1]
    assert one["features"]["a"]["type"] == "float"


def test_a_contract_is_shown_as_it_was_given(http: Lane) -> None:
    """A null default, a default and none are three things."""
    features = ok(http.request("GET", "/models/people/versions/1.0.0"))["features"]

    assert "default" not in features["income"]
    assert features["age"]["default"] == 40
    assert features["debt"]["default"] is None
    assert features["score"]["max_age_s"] == 3600


UNKNOWN = [
    ("GET", "/models/nowhere", None, "model_unknown"),
    ("GET", "/models/nowhere/routing", None, "model_unknown"),
    ("DELETE", "/models/nowhere/routing", None, "model_unknown"),
    ("GET", "/models/nowhere/versions/1.0.0", None, "model_unknown"),
    ("GET", "/models/managed/versions/9.0.0", None, "version_unknown"),
    ("POST", "/models/managed/versions/9.0.0/activate", None, "version_unknown"),
    ("POST", "/models/nowhere/versions/1.0.0/deactivate", None, "model_unknown"),
    ("POST", "/models/managed/versions/9.0.0/stage", {"stage": "prod"}, "version_unknown"),
]


@pytest.mark.parametrize(("method", "path", "body", "code"), UNKNOWN)
def test_what_is_not_registered_is_unknown_to_every_call(
    http: Lane, method: str, path: str, body: Any, code: str
) -> None:
    """One kind of mistake, one code."""
    refused(http.request(method, path, json=body), 404, code)


def test_a_version_goes_up_and_down_the_stages_one_at_a_time(http: Lane, artifact: bytes) -> None:
    """A version that skips staging was tried by nobody."""
    model_id = unique("stage")
    path = f"/models/{model_id}/versions/1.0.0/stage"
    ok(upload(http, artifact, id=model_id, version="1.0.0"), 201)

    error = refused(http.request("POST", path, json={"stage": "prod"}), 409, "stage_conflict")
    stages = [
        ok(http.request("POST", path, json={"stage": stage}))["stage"]
        for stage in ("dev", "staging", "prod", "prod", "staging", "dev")
    ]

    assert error["details"] == {"current": "dev", "wanted": "prod"}
    assert stages == ["dev", "staging", "prod", "prod", "staging", "dev"]
    refused(http.request("POST", path, json={"stage": "live"}), 422, "invalid_field")


def test_a_version_that_the_routing_names_cannot_be_taken_out(http: Lane, artifact: bytes) -> None:
    """Its share of the requests would fail."""
    model_id = unique("routed")
    ok(upload(http, artifact, id=model_id, version="1.0.0"), 201)
    ok(http.request("POST", f"/models/{model_id}/versions/1.0.0/activate"))
    single = {"strategy": "single", "arms": [{"version": "1.0.0"}]}
    ok(http.request("PUT", f"/models/{model_id}/routing", json=single))

    deactivate = f"/models/{model_id}/versions/1.0.0/deactivate"
    refused(http.request("POST", deactivate), 409, "routing_conflict")
    ok(http.request("DELETE", f"/models/{model_id}/routing"))
    deactivated = ok(http.request("POST", deactivate))

    assert not deactivated["is_active"]
    refused(
        http.request("POST", "/predict", json={"model_id": model_id, "features": [1, 2, 3]}),
        409,
        "version_inactive",
    )


def test_every_change_is_in_the_audit_log_with_who_and_what(http: Lane, artifact: bytes) -> None:
    """When something went wrong, the first question is who changed what."""
    model_id = unique("audit")
    ok(upload(http, artifact, id=model_id, version="1.0.0"), 201)
    ok(http.request("POST", f"/models/{model_id}/versions/1.0.0/stage", json={"stage": "staging"}))
    ok(http.request("POST", f"/models/{model_id}/versions/1.0.0/activate"))
    ok(
        http.request(
            "PUT",
            f"/models/{model_id}/routing",
            json={"strategy": "single", "arms": [{"version": "1.0.0"}]},
        )
    )
    ok(http.request("DELETE", f"/models/{model_id}/routing"))
    ok(http.request("POST", f"/models/{model_id}/versions/1.0.0/deactivate"))

    entries = [
        entry
        for entry in ok(http.request("GET", "/audit", params={"limit": 100}))["items"]
        if entry["subject"].startswith(model_id)
    ]

    actions = ["deactivate", "routing", "routing", "activate", "stage", "register"]
    assert [entry["action"] for entry in entries] == actions
    assert {entry["actor"] for entry in entries} == {"http 127.0.0.1"}
    assert entries[-2]["details"] == {"from": "dev", "to": "staging"}
    assert [entry["at"] for entry in entries] == sorted((entry["at"] for entry in entries), reverse=True)


def test_a_change_that_changes_nothing_is_not_audited(http: Lane) -> None:
    """An audit log full of repetitions hides what happened."""
    before = ok(http.request("GET", "/audit", params={"limit": 1}))["items"]

    ok(http.request("POST", "/models/managed/versions/1.0.0/activate"))
    ok(http.request("POST", "/models/managed/versions/1.0.0/stage", json={"stage": "dev"}))

    assert ok(http.request("GET", "/audit", params={"limit": 1}))["items"] == before


def test_features_are_merged_shown_and_removed(http: Lane) -> None:
    """Several jobs fill one entity, each with its own features."""
    entity = unique()

    ok(http.request("PUT", f"/features/{entity}", json={"features": {"a": 1, "b": "x", "c": True}}))
    ok(http.request("PUT", f"/features/{entity}", json={"features": {"a": 2.5, "c": None}}))
    shown = ok(http.request("GET", f"/features/{entity}"))
    ok(http.request("PUT", f"/features/{entity}", json={"features": {"a": None, "b": None}}))

    assert shown["entity_id"] == entity
    assert shown["features"] == {"a": 2.5, "b": "x"}
    assert shown["updated_at_ms"]["a"] >= shown["updated_at_ms"]["b"] > 0
    refused(http.request("GET", f"/features/{entity}"), 404, "entity_unknown")


@pytest.mark.parametrize("entity", ["a/b", "ä ö", "東京", "%", "?x=1#y", "a..b", "😀", "x" * 512])
def test_an_entity_may_have_any_name_a_url_can_carry(http: Lane, entity: str) -> None:
    """Ids come from other systems, where nobody thought of URLs."""
    path = f"/features/{quote(entity, safe='/')}"

    ok(http.request("PUT", path, json={"features": {"a": 1}}))

    shown = ok(http.request("GET", path))
    assert (shown["entity_id"], shown["features"]) == (entity, {"a": 1})


def test_many_entities_are_stored_at_once_or_not_at_all(http: Lane) -> None:
    """One bad row must not leave the caller guessing which of the others were stored."""
    one, two = unique(), unique()

    refused(
        http.request("POST", "/features", json={"entities": {one: {"a": 1}, two: {"a": 2**63}}}),
        422,
        "feature_invalid",
    )
    refused(http.request("GET", f"/features/{one}"), 404, "entity_unknown")
    written = ok(http.request("POST", "/features", json={"entities": {one: {"a": 1}, two: {"b": 2}}}))

    assert written == {"written": 2}
    assert ok(http.request("GET", f"/features/{two}"))["features"] == {"b": 2}


@pytest.mark.parametrize("path", ["/models", "/audit"])
def test_pages_of_a_list_hold_every_item_once(http: Lane, artifact: bytes, path: str) -> None:
    """Whoever follows the cursors sees what one long page would show."""
    for version in ("1.0.0", "1.1.0", "1.1.0+build.2"):
        ok(upload(http, artifact, id=unique("page"), version=version), 201)
    whole = ok(http.request("GET", path, params={"limit": 1000}))

    paged: list[Any] = []
    page = ok(http.request("GET", path, params={"limit": 2}))
    while True:
        paged += page["items"]
        if page["next_cursor"] is None:
            break
        page = ok(http.request("GET", path, params={"limit": 2, "cursor": page["next_cursor"]}))

    assert whole["next_cursor"] is None
    assert paged == whole["items"]


@pytest.mark.parametrize("path", ["/models", "/audit"])
def test_a_cursor_that_no_page_has_answered_is_refused(http: Lane, path: str) -> None:
    """It must not silently start over: the caller would read the same items for ever."""
    refused(http.request("GET", path, params={"cursor": "nowhere"}), 422, "invalid_field")
