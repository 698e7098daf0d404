"""Retrain jobs over HTTP, as a pipeline outside uses them: a server without a healer keeps what is handed in."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from typing import Any

import onnx_models
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lanes import UPLOAD_LIMIT_BYTES, ServerLane, ok, refused
from phoenix_server import PhoenixServer

pytestmark = pytest.mark.system
MODEL = onnx_models.linear_regressor(2, bias=3.0)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PhoenixServer]:
    server = PhoenixServer(
        tmp_path_factory.mktemp("retrained"), roles="log", upload_limit_bytes=UPLOAD_LIMIT_BYTES
    )
    with server:
        yield server


@pytest.fixture(scope="module")
def lane(server: PhoenixServer) -> Iterator[ServerLane]:
    opened = ServerLane(server.url)
    yield opened
    opened.close()


@pytest.fixture
def job(server: PhoenixServer, lane: ServerLane, request: pytest.FixtureRequest) -> dict[str, Any]:
    """One that was just asked for, of a model of the test's own."""
    name = hashlib.sha256(request.node.name.encode()).hexdigest()[:16]
    model = onnx_models.write(server.folder / "m.onnx", onnx_models.linear_regressor(2))
    server.register(model, name, "1.0.0")
    asked: dict[str, Any] = ok(lane.request("POST", "/retrain-jobs", json={"model_id": name}), 202)
    return asked


def hand_in(
    lane: ServerLane, job_id: str, model: bytes = MODEL, *, sample: bytes | None = None, **parts: Any
) -> Any:
    files = {"artifact": ("model.onnx", model)}
    if sample is not None:
        files["sample"] = ("s", sample)
    return lane.request("POST", f"/retrain-jobs/{job_id}/model", files=files, data=parts)


def test_a_retraining_that_is_asked_for_is_listed_with_who_asked(
    lane: ServerLane, job: dict[str, Any]
) -> None:
    """Whoever comes next sees that it is under way."""
    listed = ok(lane.request("GET", f"/retrain-jobs?model_id={job['model_id']}"))["items"]

    assert job["status"] == "requested"
    assert job["reason"].startswith("asked for by ")
    assert listed == [job]
    assert ok(lane.request("GET", f"/retrain-jobs/{job['job_id']}")) == job


def test_jobs_are_listed_page_by_page(lane: ServerLane, job: dict[str, Any]) -> None:
    """Whoever follows the cursors sees what one long page would show."""
    failed = ok(lane.request("POST", f"/retrain-jobs/{job['job_id']}/failure", json={"error": "no GPU"}), 202)
    whole = ok(lane.request("GET", "/retrain-jobs?limit=1000"))

    paged: list[Any] = []
    cursor: str | None = ""
    while cursor is not None:
        page = ok(lane.request("GET", f"/retrain-jobs?limit=1{cursor}"))
        paged += page["items"]
        cursor = page["next_cursor"] and f"&cursor={page['next_cursor']}"

    assert failed in whole["items"]
    assert (paged, whole["next_cursor"]) == (whole["items"], None)
    refused(lane.request("GET", "/retrain-jobs?cursor=nowhere"), 422, "invalid_field")


def test_a_retraining_that_is_under_way_is_not_asked_for_twice(lane: ServerLane, job: dict[str, Any]) -> None:
    """A script that got no answer sends again, and hears of the same job."""
    again = ok(lane.request("POST", "/retrain-jobs", json={"model_id": job["model_id"]}), 200)

    assert again == job


def test_a_model_that_is_handed_in_waits_to_be_checked(lane: ServerLane, job: dict[str, Any]) -> None:
    """A pipeline that got no answer sends again, and hears the same."""
    features = json.dumps({"x0": {"type": "float"}, "x1": {"type": "float"}})

    first = ok(hand_in(lane, job["job_id"], features=features), 202)
    again = ok(hand_in(lane, job["job_id"]), 202)

    assert (first["status"], first["new_version"]) == ("checking", "1.1.0")
    assert again == first


def parquet(**columns: list[float]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file)
    return file.getvalue()


def test_a_sample_of_the_trainers_own_answers_is_kept_for_the_check(
    server: PhoenixServer, lane: ServerLane, job: dict[str, Any]
) -> None:
    """What a conversion has lost is seen only beside the library that the model was trained with."""
    sample = parquet(x0=[1.0], x1=[2.0], _result=[3.0])

    told = ok(hand_in(lane, job["job_id"], sample=sample), 202)

    kept = told["result"]["sample"]
    assert kept["sha256"] == hashlib.sha256(sample).hexdigest()
    with server.opened() as phoenix:
        assert phoenix.artifacts.fetch(kept["uri"], kept["sha256"]).read_bytes() == sample


def test_the_same_model_with_another_sample_is_no_repetition(lane: ServerLane, job: dict[str, Any]) -> None:
    """Whoever remembers the sample afterwards would believe that it was compared."""
    ok(hand_in(lane, job["job_id"]), 202)

    again = ok(hand_in(lane, job["job_id"]), 202)
    refused(
        hand_in(lane, job["job_id"], sample=parquet(x0=[1.0], x1=[2.0], _result=[3.0])), 409, "job_conflict"
    )

    assert again["status"] == "checking"


@pytest.mark.parametrize(
    ("sample", "words"),
    [
        (b"x0,x1,_result\n1,2,3\n", "'sample' is no Parquet file"),
        (parquet(x0=[1.0], x1=[2.0]), "'sample' has no column _result"),
    ],
)
def test_a_sample_that_cannot_be_compared_is_refused_with_the_reason(
    lane: ServerLane, job: dict[str, Any], sample: bytes, words: str
) -> None:
    """A healer would find it out after hours, when the pipeline has gone; and the job goes on waiting."""
    problem = refused(hand_in(lane, job["job_id"], sample=sample), 422, "invalid_field")

    assert (words in problem["message"], problem["details"]["field"]) == (True, "sample")
    assert ok(lane.request("GET", f"/retrain-jobs/{job['job_id']}"))["status"] == "requested"


def test_a_model_and_its_sample_have_one_limit(lane: ServerLane, job: dict[str, Any]) -> None:
    """It is looked at while they arrive, so that no pipeline fills the disk."""
    refused(hand_in(lane, job["job_id"], sample=b"\0" * UPLOAD_LIMIT_BYTES), 413, "body_too_large")


def test_a_failure_is_told_and_nothing_after_it(lane: ServerLane, job: dict[str, Any]) -> None:
    """What comes too late must not overtake the next attempt."""
    told = ok(lane.request("POST", f"/retrain-jobs/{job['job_id']}/failure", json={"error": "no GPU"}), 202)

    assert (told["status"], told["result"]) == ("checking", {"error": "no GPU"})
    refused(hand_in(lane, job["job_id"]), 409, "job_conflict")
    refused(
        lane.request("POST", f"/retrain-jobs/{job['job_id']}/failure", json={"error": "x"}),
        409,
        "job_conflict",
    )


@pytest.mark.parametrize(
    ("method", "path", "options"),
    [
        ("GET", "", {}),
        ("POST", "/model", {"files": {"artifact": ("m", MODEL)}}),
        ("POST", "/failure", {"json": {"error": "x"}}),
    ],
)
def test_a_job_that_nobody_knows_is_not_found(
    lane: ServerLane, method: str, path: str, options: dict[str, Any]
) -> None:
    """A pipeline with a wrong id must not believe that its model is taken."""
    refused(lane.request(method, f"/retrain-jobs/nope{path}", **options), 404, "job_unknown")


def test_a_retraining_of_a_model_that_nobody_knows_is_not_found(lane: ServerLane) -> None:
    """A typing error must not wait for ever, nor look like a model that needs none."""
    refused(lane.request("GET", "/retrain-jobs?model_id=nope"), 404, "model_unknown")
    refused(lane.request("POST", "/retrain-jobs", json={"model_id": "nope"}), 404, "model_unknown")


@pytest.mark.parametrize(
    ("path", "options", "status", "code"),
    [
        ("/model", {"content": b"x"}, 422, "invalid_field"),
        ("/model", {"data": {"artifact": "text"}}, 422, "invalid_field"),
        ("/model", {"files": {"features": ("f", b"{}")}}, 422, "invalid_field"),
        ("/model", {"files": {"artifact": ("m", MODEL)}, "data": {"features": "{"}}, 400, "malformed_body"),
        (
            "/model",
            {"files": {"artifact": ("m", MODEL)}, "data": {"features": '{"x0": {"type": "colour"}}'}},
            422,
            "invalid_field",
        ),
        (
            "/model",
            {"files": {"artifact": ("m", MODEL)}, "data": {"sample": "text"}},
            422,
            "invalid_field",
        ),
        ("/failure", {"json": {}}, 422, "invalid_field"),
        ("/failure", {"json": {"error": ""}}, 422, "invalid_field"),
        ("/failure", {"content": b"{"}, 400, "malformed_body"),
    ],
)
def test_what_cannot_be_is_refused_and_the_job_goes_on_waiting(
    lane: ServerLane, job: dict[str, Any], path: str, options: dict[str, Any], status: int, code: str
) -> None:
    """A pipeline that sends nonsense may send again."""
    refused(lane.request("POST", f"/retrain-jobs/{job['job_id']}{path}", **options), status, code)

    assert ok(lane.request("GET", f"/retrain-jobs/{job['job_id']}"))["status"] == "requested"
