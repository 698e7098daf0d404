"""The Open Inference Protocol over REST, on the hot lane of a real server and over the ordinary routes."""

from __future__ import annotations

import gzip
import json
import math
import struct
import zlib
from typing import Any

import httpx
import numpy as np
import pytest
import zoo
from lanes import BATCH_LIMIT, Lane, eventually, logged, ok, store_features, unique
from phoenix_server import PhoenixServer

from phoenix_ml.domain.tensors import DTYPE_OF, Tensor, decode_raw, encode_raw

pytestmark = pytest.mark.system

RAW_LENGTH = "inference-header-content-length"


def fp32(name: str, shape: list[int], data: Any) -> dict[str, Any]:
    return {"name": name, "shape": shape, "datatype": "FP32", "data": data}


def ask(lane: Lane, model: str, body: Any, **options: Any) -> httpx.Response:
    return lane.request("POST", f"/v2/models/{model}/infer", content=json.dumps(body).encode(), **options)


def infer(lane: Lane, model: str, *inputs: dict[str, Any], **body: Any) -> dict[str, Any]:
    answered: dict[str, Any] = ok(ask(lane, model, {"inputs": list(inputs), **body}))
    return answered


def refusal(response: httpx.Response, status: int) -> str:
    """The words of an error, which has the protocol's form and no other."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert list(body) == ["error"]
    words: str = body["error"]
    return words


def ask_raw(
    lane: Lane, model: str, inputs: dict[str, tuple[str, list[int], bytes]], **body: Any
) -> httpx.Response:
    """A request in the binary form: JSON, then the tensors' bytes."""
    described = [
        {"name": name, "shape": shape, "datatype": datatype, "parameters": {"binary_data_size": len(data)}}
        for name, (datatype, shape, data) in inputs.items()
    ]
    head = json.dumps({"inputs": described, **body}).encode()
    content = head + b"".join(data for _, _, data in inputs.values())
    return lane.request(
        "POST",
        f"/v2/models/{model}/infer",
        content=content,
        headers={RAW_LENGTH: str(len(head)), "content-type": "application/octet-stream"},
    )


def raw_outputs(response: httpx.Response) -> dict[str, tuple[str, list[int], bytes]]:
    """What came as bytes after the JSON."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/octet-stream"
    end = int(response.headers[RAW_LENGTH])
    outputs = {}
    for output in json.loads(response.content[:end])["outputs"]:
        size = output["parameters"]["binary_data_size"]
        outputs[output["name"]] = (output["datatype"], output["shape"], response.content[end : end + size])
        end += size
    assert end == len(response.content)
    return outputs


def rows_by_id(lane: Lane, ids: list[str]) -> dict[str, dict[str, Any]]:
    return {one: logged(lane, one) for one in ids}


def test_one_row_is_answered_as_predict_would(lane: Lane) -> None:
    """Two protocols and one model: number, id and log row are the same kind."""
    answered = infer(lane, "abc/versions/1.0.0", fp32("x", [1, 3], [1, 2, 3]), id="mine-1")
    assert answered["model_name"] == "abc"
    assert answered["model_version"] == "1.0.0"
    assert answered["id"] == "mine-1"
    assert answered["outputs"] == [fp32("y", [1, 1], [14.0])]
    row = logged(lane, answered["parameters"]["prediction_id"])
    assert row["features"] == {"a": 1.0, "b": 2.0, "c": 3.0}
    assert (row["result"], row["request_id"], row["feature_sources"]) == (14.0, "mine-1", "request")
    assert row["route"]["role"] == answered["parameters"]["role"]


def test_each_row_of_several_is_a_prediction_of_its_own(lane: Lane) -> None:
    """Drift and outcomes are about rows, however they came."""
    data = [[float(n), 0.0, 0.0] for n in range(5)]
    answered = infer(lane, "abc/versions/1.0.0", fp32("x", [5, 3], data), parameters={"prediction_ids": True})
    ids = answered["parameters"]["prediction_ids"].split(",")
    assert answered["outputs"] == [fp32("y", [5, 1], [0.0, 1.0, 2.0, 3.0, 4.0])]
    assert ids[0] == answered["parameters"]["prediction_id"]
    assert len(set(ids)) == 5
    rows = rows_by_id(lane, ids)
    assert [rows[one]["result"] for one in ids] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert [rows[one]["features"]["a"] for one in ids] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert [(rows[one]["batch_size"], rows[one]["batch_position"]) for one in ids] == [
        (5, n) for n in range(5)
    ]


def test_outcomes_of_rows_that_came_together_find_them(lane: Lane) -> None:
    """The ids that the answer holds are those in the log."""
    answered = infer(
        lane, "abc/versions/1.0.0", fp32("x", [2, 3], [0] * 6), parameters={"prediction_ids": True}
    )
    second = answered["parameters"]["prediction_ids"].split(",")[1]
    ok(lane.request("POST", "/feedback", json={"prediction_id": second, "outcome": 7.5}), 202)
    eventually(
        lambda: lane.request("GET", f"/predictions/{second}"),
        lambda response: response.json().get("outcome") == 7.5,
        "the outcome is at its row",
    )


def test_a_classifier_answers_label_and_probabilities(lane: Lane) -> None:
    """One row goes by way of /predict, two do not; their tensors look alike."""
    one = infer(lane, "signs", fp32("x", [1, 1], [1.0]))["outputs"]
    two = infer(lane, "signs", fp32("x", [2, 1], [1.0, -1.0]))["outputs"]
    p = float(np.float32(1) / (np.float32(1) + np.float32(math.exp(-1.0))))
    assert one[0] == {"name": "label", "datatype": "INT64", "shape": [1], "data": [1]}
    assert one[1]["shape"] == [1, 2]
    assert one[1]["data"] == pytest.approx([1 - p, p], rel=1e-6)
    assert two[0] == {"name": "label", "datatype": "INT64", "shape": [2], "data": [1, 0]}
    assert two[1]["data"] == pytest.approx([1 - p, p, p, 1 - p], rel=1e-6)


def test_only_named_outputs_come_and_in_their_order(lane: Lane) -> None:
    """A client that wants a label need not be sent all probabilities."""
    row = fp32("x", [1, 1], [1.0])
    named = [{"name": "probabilities"}, {"name": "label"}]
    assert [o["name"] for o in infer(lane, "signs", row, outputs=named)["outputs"]] == [
        "probabilities",
        "label",
    ]
    assert [o["name"] for o in infer(lane, "signs", row, outputs=named[1:])["outputs"]] == ["label"]
    assert "no output 'sum'" in refusal(
        ask(lane, "signs", {"inputs": [row], "outputs": [{"name": "sum"}]}), 400
    )


def test_columns_of_several_types_make_rows(lane: Lane) -> None:
    """Integers, booleans and texts stand in the log as what they are."""

    def column(name: str, datatype: str, *data: Any) -> dict[str, Any]:
        return {"name": name, "shape": [len(data), 1], "datatype": datatype, "data": list(data)}

    answered = infer(
        lane,
        "typed",
        column("city", "BYTES", "Łódź", "Oslo"),
        column("ratio", "FP32", 0.5, 1.5),
        column("member", "BOOL", True, False),
        column("count", "INT64", 3, 2**53 + 1),
        parameters={"prediction_ids": True},
    )
    assert answered["outputs"] == [fp32("y", [2, 1], [0.5, 1.5])]
    first, second = answered["parameters"]["prediction_ids"].split(",")
    assert logged(lane, first)["features"] == {"ratio": 0.5, "count": 3, "member": True, "city": "Łódź"}
    assert logged(lane, second)["features"]["count"] == 2**53 + 1


def test_missing_inputs_come_from_the_feature_store(lane: Lane) -> None:
    """A client of the protocol can leave the features to us; what it sends comes first."""
    entity = unique()
    store_features(lane, entity, ratio=2.5, count=4, member=True, city="Rome")
    answered = infer(lane, "typed", parameters={"entity_id": entity})
    assert answered["outputs"] == [fp32("y", [1, 1], [2.5])]
    row = logged(lane, answered["parameters"]["prediction_id"])
    assert (row["entity_id"], row["feature_sources"]) == (entity, "store")

    answered = infer(lane, "typed", fp32("ratio", [1, 1], [9.0]), parameters={"entity_id": entity})
    assert answered["outputs"] == [fp32("y", [1, 1], [9.0])]
    row = logged(lane, answered["parameters"]["prediction_id"])
    assert row["feature_sources"]["ratio"] == "request"
    assert row["features"]["city"] == "Rome"


def test_one_tensor_of_features_is_read_whole_for_an_entity(lane: Lane) -> None:
    """Its features are stored packed, and need no value in the request."""
    entity = unique()
    store_features(lane, entity, a=1.0, b=1.0, c=1.0)
    answered = infer(lane, "abc/versions/1.0.0", parameters={"entity_id": entity})
    assert answered["outputs"] == [fp32("y", [1, 1], [6.0])]


def test_an_entity_that_is_not_stored_is_a_404(lane: Lane) -> None:
    """As on /predict: never a silent zero."""
    words = refusal(ask(lane, "abc", {"inputs": [], "parameters": {"entity_id": unique()}}), 404)
    assert "no features are stored" in words


def test_tensors_of_any_shape_are_run_as_they_are(lane: Lane) -> None:
    """A scalar, two free dimensions, two outputs; the request is one row of the log."""
    answered = infer(
        lane,
        "outer",
        fp32("x", [2], [1, 2]),
        fp32("y", [3], [10, 20, 30]),
        fp32("factor", [], [2]),
    )
    table, count = answered["outputs"]
    assert table == fp32("table", [2, 3], [22.0, 42.0, 62.0, 24.0, 44.0, 64.0])
    assert count == {"name": "count", "datatype": "INT64", "shape": [], "data": [6]}
    row = logged(lane, answered["parameters"]["prediction_id"])
    assert row["features"]["factor"] == {"datatype": "FP32", "shape": [], "data": [2.0]}
    assert row["result"]["count"] == {"datatype": "INT64", "shape": [], "data": [6]}


def test_empty_tensors_are_tensors(lane: Lane) -> None:
    """Nothing in, nothing out, and no error."""
    answered = infer(lane, "outer", fp32("x", [0], []), fp32("y", [3], [1, 2, 3]), fp32("factor", [], [1]))
    assert [output["data"] for output in answered["outputs"]] == [[], [0]]
    answered = infer(lane, "abc/versions/1.0.0", fp32("x", [0, 3], []))
    assert answered["outputs"] == [fp32("y", [0, 1], [])]


def test_a_large_tensor_is_on_record_by_its_digest(lane: Lane) -> None:
    """A log of images would be no log; shape and digest say which it was."""
    x = np.arange(5000, dtype=np.float32)
    answered = infer(
        lane, "outer", fp32("x", [5000], x.tolist()), fp32("y", [1], [0]), fp32("factor", [], [1])
    )
    row = logged(lane, answered["parameters"]["prediction_id"])
    kept = row["features"]["x"]
    assert kept["shape"] == [5000]
    assert "data" not in kept
    assert len(kept["sha256"]) == 64
    assert row["features"]["y"]["data"] == [0.0]


VALUES: dict[str, list[Any]] = {
    "BOOL": [True, False],
    "UINT8": [0, 255],
    "UINT16": [0, 65535],
    "UINT32": [0, 2**32 - 1],
    "UINT64": [0, 2**64 - 1],
    "INT8": [-128, 127],
    "INT16": [-(2**15), 2**15 - 1],
    "INT32": [-(2**31), 2**31 - 1],
    "INT64": [-(2**63), 2**63 - 1],
    "FP16": [0.5, -65504.0],
    "FP32": [0.5, -3.4028234663852886e38],
    "FP64": [0.1, -1.7976931348623157e308],
    "BYTES": ["", "é\n\u2028"],
}


def test_every_datatype_comes_back_as_it_went_in(lane: Lane) -> None:
    """In JSON and as raw bytes, to the last bit."""
    arrays = {name: np.array(values, DTYPE_OF[name]) for name, values in VALUES.items()}
    raw = {
        f"in_{name}": (name, list(array.shape), encode_raw(Tensor(name, array)))
        for name, array in arrays.items()
    }
    outputs = raw_outputs(ask_raw(lane, "types", raw, parameters={"binary_data_output": True}))
    assert {name.replace("out", "in"): output for name, output in outputs.items()} == raw

    described = [
        {"name": f"in_{name}", "shape": [2], "datatype": name, "data": values}
        for name, values in VALUES.items()
    ]
    answered = infer(lane, "types", *described)
    assert {o["name"]: o["data"] for o in answered["outputs"]} == {
        f"out_{name}": values for name, values in VALUES.items()
    }


def test_bfloat16_comes_back_as_raw_bytes(lane: Lane) -> None:
    """JSON has no form for it on the way in, and numpy no type."""
    bits = np.array([0x3F80, 0x7F80, 0xFF81], np.uint16)
    raw = {"in_BF16": ("BF16", [3], bits.tobytes()), "in_INT8": ("INT8", [1], b"\x80")}
    response = ask_raw(lane, "brain", raw, parameters={"binary_data_output": True})
    assert raw_outputs(response) == {
        "out_BF16": ("BF16", [3], bits.tobytes()),
        "out_INT8": ("INT8", [1], b"\x80"),
    }
    head = json.loads(response.content[: int(response.headers[RAW_LENGTH])])
    row = logged(lane, head["parameters"]["prediction_id"])
    assert row["features"]["in_BF16"] == {"datatype": "BF16", "shape": [3], "data": [1.0, None, None]}


@pytest.mark.parametrize("shape", [[], [1], [2, 0, 3], [1] * 8, [3, 2]])
def test_every_rank_comes_back(lane: Lane, shape: list[int]) -> None:
    """From scalars to eight dimensions, empty ones too, where the graph leaves the rank open."""
    array = np.arange(math.prod(shape), dtype=np.int32).reshape(shape)
    raw = {
        f"in_{name}": (name, [0], b"") if name != "INT32" else (name, shape, array.tobytes())
        for name in zoo.EVERY_TYPE
    }
    outputs = [{"name": "out_INT32", "parameters": {"binary_data": True}}]
    found = raw_outputs(ask_raw(lane, "types", raw, outputs=outputs))
    assert found == {"out_INT32": ("INT32", shape, array.tobytes())}


def test_a_raw_batch_and_a_json_batch_get_the_same_answer(lane: Lane) -> None:
    """The form of a request decides nothing."""
    x = np.random.default_rng(7).normal(size=(BATCH_LIMIT, 3)).astype("<f4")
    found = raw_outputs(
        ask_raw(
            lane,
            "abc/versions/1.0.0",
            {"x": ("FP32", list(x.shape), x.tobytes())},
            parameters={"binary_data_output": True},
        )
    )
    (output,) = infer(lane, "abc/versions/1.0.0", fp32("x", list(x.shape), x.tolist()))["outputs"]
    raw = decode_raw("y", *found["y"])
    assert raw.tolist() == np.array(output["data"], np.float32).reshape(-1, 1).tolist()
    assert raw == pytest.approx(x @ np.array([[1], [2], [3]], np.float32), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_bodies_may_be_compressed_and_answers_are_for_who_asks(lane: Lane, coding: str) -> None:
    """Triton's client does both; what accepts everything gets plain numbers, which compress badly."""
    body = json.dumps({"inputs": [fp32("x", [1, 3], [1, 2, 3])]}).encode()
    packed = gzip.compress(body) if coding == "gzip" else zlib.compress(body)
    answered = lane.request(
        "POST", "/v2/models/abc/infer", content=packed, headers={"content-encoding": coding}
    )
    assert ok(answered)["outputs"][0]["shape"] == [1, 1]

    many = {"inputs": [fp32("x", [BATCH_LIMIT, 3], [1.0] * 3 * BATCH_LIMIT)]}
    plain = ask(lane, "abc", many, headers={"accept-encoding": "gzip, deflate, br"})
    small = ask(lane, "abc", many, headers={"accept-encoding": coding})
    assert "content-encoding" not in plain.headers
    assert ok(plain)["outputs"][0]["shape"] == [BATCH_LIMIT, 1]
    if len(plain.content) >= 1024:
        assert small.headers["content-encoding"] == coding
    assert ok(small)["outputs"][0]["shape"] == [BATCH_LIMIT, 1]


def test_a_compressed_body_is_bounded_by_what_it_holds(lane: Lane) -> None:
    """64 KiB of gzip can be 64 MiB of zeros, and more."""
    bomb = gzip.compress(bytes(80 * 1024 * 1024))
    answered = lane.request(
        "POST", "/v2/models/abc/infer", content=bomb, headers={"content-encoding": "gzip"}
    )
    assert "larger than" in refusal(answered, 413)


ROW = fp32("x", [1, 3], [1, 2, 3])
BAD: list[tuple[Any, str]] = [
    ([], "Expected `object`"),
    ({}, "missing required field `inputs`"),
    ({"inputs": [{"name": "x"}]}, "missing required field `shape`"),
    ({"inputs": []}, "input 'x' is missing"),
    ({"inputs": [ROW, ROW]}, "given twice"),
    ({"inputs": [ROW, fp32("z", [1], [1])]}, "no input 'z'"),
    ({"inputs": [ROW | {"datatype": "FP64"}]}, "the model takes FP32"),
    ({"inputs": [ROW | {"datatype": "float"}]}, "the protocol has BOOL"),
    ({"inputs": [ROW | {"datatype": "BF16"}]}, "raw bytes only"),
    ({"inputs": [ROW | {"shape": [1, 4], "data": [1, 2, 3, 4]}]}, "the model takes [-1, 3]"),
    ({"inputs": [ROW | {"shape": [3]}]}, "the model takes [-1, 3]"),
    ({"inputs": [ROW | {"shape": [2, 3]}]}, "has 3 elements; its shape [2, 3] takes 6"),
    ({"inputs": [ROW | {"shape": [-1, 3]}]}, "not the shape of a tensor"),
    ({"inputs": [ROW | {"shape": [10**15, 3]}]}, "not the shape of a tensor"),
    ({"inputs": [ROW | {"shape": [2**40, 2**40, 2**40]}]}, "not the shape of a tensor"),
    ({"inputs": [ROW | {"shape": [1] * 50_000}]}, "has 50000 dimensions"),
    ({"inputs": [ROW | {"shape": [1.5, 3]}]}, "shape"),
    ({"inputs": [ROW | {"data": [1, 2, "3"]}]}, "Expected `float`, got `str`"),
    ({"inputs": [ROW | {"data": [1, 2, 1e300]}]}, "does not fit a float32"),
    ({"inputs": [ROW | {"data": [[1, 2], [3]]}]}, "not nested as its shape"),
    ({"inputs": [ROW | {"data": [[[1, 2, 3]]]}]}, "not nested as its shape"),
    ({"inputs": [ROW | {"data": None}]}, "has 1 elements"),
    ({"inputs": [{k: v for k, v in ROW.items() if k != "data"}]}, "has no 'data'"),
    ({"inputs": [ROW | {"parameters": {"binary_data_size": 12}}]}, "both 'data' and binary data"),
    ({"inputs": [ROW], "id": "x" * 129}, "at most 128 characters"),
    ({"inputs": [ROW], "parameters": {"entity_id": 5}}, "is a text of 1 to 512"),
    ({"inputs": [ROW], "parameters": {"routing_key": ""}}, "is a text of 1 to 512"),
    ({"inputs": [fp32("x", [BATCH_LIMIT + 1, 3], [0.0] * 3 * (BATCH_LIMIT + 1))]}, "split them"),
]


@pytest.mark.parametrize(("body", "words"), BAD, ids=lambda value: str(value)[:40])
def test_what_is_wrong_with_a_request_is_said(lane: Lane, body: Any, words: str) -> None:
    """A 400 in the protocol's form with words of what to change, never a 500."""
    status = 413 if "split" in words else 400
    assert words in refusal(ask(lane, "abc", body), status)


@pytest.mark.parametrize("depth", [200, 50_000])
def test_deep_nesting_is_a_quick_400(lane: Lane, depth: int) -> None:
    """A body of brackets has killed a well-known server."""
    body = b'{"inputs":[{"name":"x","shape":[1,3],"datatype":"FP32","data":%b%b}]}' % (
        b"[" * depth,
        b"]" * depth,
    )
    refusal(lane.request("POST", "/v2/models/abc/infer", content=body), 400)


@pytest.mark.parametrize("length", ["", "x", "-1", "99999", "1" * 30])
def test_a_wrong_length_of_the_json_is_a_400(lane: Lane, length: str) -> None:
    """It says where the tensors begin, so nothing may be guessed."""
    body = json.dumps({"inputs": [ROW]}).encode()
    refusal(lane.request("POST", "/v2/models/abc/infer", content=body, headers={RAW_LENGTH: length}), 400)


def test_raw_tensors_that_do_not_fit_are_refused(lane: Lane) -> None:
    """Too few bytes, too many, or a text that is none."""
    assert "takes 12" in refusal(ask_raw(lane, "abc", {"x": ("FP32", [1, 3], bytes(8))}), 400)
    assert "takes 12" in refusal(ask_raw(lane, "abc", {"x": ("FP32", [1, 3], bytes(16))}), 400)
    cities = {
        "ratio": ("FP32", [1, 1], bytes(4)),
        "count": ("INT64", [1, 1], bytes(8)),
        "member": ("BOOL", [1, 1], b"\1"),
    }
    for data, words in (
        (b"\5\0\0\0abc", "ends beyond"),
        (b"\1\0\0\0\xff", "is not UTF-8"),
        (b"", "has 0 elements"),
        (b"\0\0\0\0\0\0\0\0", "has 2 elements"),
    ):
        assert words in refusal(ask_raw(lane, "typed", cities | {"city": ("BYTES", [1, 1], data)}), 400)


def test_who_cannot_answer_says_so(lane: Lane) -> None:
    """404 for what is not registered, 503 for what is not ready, and never Phoenix's own form of an error."""
    row = {"inputs": [ROW]}
    assert "no model 'nobody'" in refusal(ask(lane, "nobody", row), 404)
    refusal(ask(lane, "abc/versions/9.9.9", row), 404)
    refusal(ask(lane, "abc/versions/2.0.0", row), 503)
    refusal(ask(lane, "idle", {"inputs": [fp32("x", [1, 1], [1])]}), 503)
    refusal(lane.request("GET", "/v2/models/nobody"), 404)
    refusal(lane.request("GET", "/v2/nothing"), 404)
    refusal(lane.request("DELETE", "/v2/models/abc/infer"), 405)


def test_predict_refers_those_who_want_tensors_to_v2(lane: Lane) -> None:
    """The model is there, only not for rows."""
    answered = lane.request("POST", "/predict", json={"model_id": "outer", "features": {"x": 1}})
    assert answered.status_code == 422
    assert answered.json()["error"]["code"] == "takes_tensors"
    assert "POST /v2/models/outer/infer" in answered.json()["error"]["message"]


def test_metadata_says_what_to_send(lane: Lane) -> None:
    """Clients build their requests from it."""
    answered = ok(lane.request("GET", "/v2/models/outer"))
    assert answered == {
        "name": "outer",
        "versions": ["1.0.0"],
        "platform": "onnxruntime_onnx",
        "inputs": [
            {"name": "x", "datatype": "FP32", "shape": [-1]},
            {"name": "y", "datatype": "FP32", "shape": [-1]},
            {"name": "factor", "datatype": "FP32", "shape": []},
        ],
        "outputs": [
            {"name": "table", "datatype": "FP32", "shape": [-1, -1]},
            {"name": "count", "datatype": "INT64", "shape": []},
        ],
    }
    assert ok(lane.request("GET", "/v2/models/abc/versions/1.1.0"))["versions"] == ["1.1.0"]
    assert set(ok(lane.request("GET", "/v2/models/abc"))["versions"]) == {"1.0.0", "1.1.0"}


def test_the_configuration_lets_clients_batch_rows(lane: Lane) -> None:
    """perf_analyzer leaves the rows out of the shapes where max_batch_size is above 0."""
    config = ok(lane.request("GET", "/v2/models/abc/config"))
    assert config["max_batch_size"] == BATCH_LIMIT
    assert config["input"] == [{"name": "x", "data_type": "TYPE_FP32", "dims": [3]}]
    config = ok(lane.request("GET", "/v2/models/outer/config"))
    assert config["max_batch_size"] == 0
    assert config["input"][0]["dims"] == [-1]


def test_health_is_told_in_bodies(lane: Lane) -> None:
    """Some clients look at the status, others at the body."""
    assert ok(lane.request("GET", "/v2/health/live")) == {"live": True}
    assert ok(lane.request("GET", "/v2/health/ready")) == {"ready": True}
    assert ok(lane.request("GET", "/v2/models/abc/ready")) == {"name": "abc", "ready": True}
    answered = lane.request("GET", "/v2/models/abc/versions/2.0.0/ready")
    assert (answered.status_code, answered.json()["ready"]) == (503, False)
    server = ok(lane.request("GET", "/v2"))
    assert server["name"] == "phoenix-ml"
    assert "binary_tensor_data" in server["extensions"]


def test_statistics_count_requests_rows_and_runs(http: Lane) -> None:
    """Over all processes of the server: perf_analyzer subtracts two of them."""

    def counted() -> tuple[int, int, int]:
        (stats,) = ok(http.request("GET", "/v2/models/signs/versions/1.0.0/stats"))["model_stats"]
        success = stats["inference_stats"]["success"]
        assert success["ns"] >= stats["inference_stats"]["compute_infer"]["ns"] > 0
        return stats["inference_count"], stats["execution_count"], success["count"]

    infer(http, "signs", fp32("x", [1, 1], [1.0]))
    rows, runs, requests = counted()
    infer(http, "signs", fp32("x", [4, 1], [1.0] * 4))
    assert counted() == (rows + 4, runs + 1, requests + 1)
    names = {one["name"] for one in ok(http.request("GET", "/v2/models/stats"))["model_stats"]}
    assert {"abc", "outer", "signs"} <= names


def test_the_repository_lists_loads_and_unloads(http: Lane, server: PhoenixServer) -> None:
    """Tools of Triton and KServe manage models by these three calls."""
    name = unique("repo")
    for version, bias in (("1.0.0", 0.0), ("1.1.0", 5.0)):
        artifact = zoo.linear(server.folder / f"{name}-{version}.onnx", [1], bias)
        server.register(artifact, name, version, activate=False)

    def expect(*states: str) -> None:
        eventually(
            lambda: http.request("POST", "/v2/repository/index"),
            lambda answer: [one["state"] for one in answer.json() if one["name"] == name] == list(states),
            f"1.0.0 and 1.1.0 are {states}",
        )

    row = {"inputs": [fp32("x", [1, 1], [1])]}
    expect("UNAVAILABLE", "UNAVAILABLE")
    ok(http.request("POST", f"/v2/repository/models/{name}/load"))
    expect("UNAVAILABLE", "READY")
    assert ok(ask(http, name, row))["outputs"][0]["data"] == [6.0]
    ok(http.request("POST", f"/v2/repository/models/{name}/load", json={"parameters": {"version": "1.0.0"}}))
    expect("READY", "READY")
    ok(http.request("POST", f"/v2/repository/models/{name}/unload", json={}))
    expect("UNAVAILABLE", "UNAVAILABLE")
    refusal(ask(http, name, row), 503)
    ready = ok(http.request("POST", "/v2/repository/index", json={"ready": True}))
    assert name not in {one["name"] for one in ready}


def test_a_model_cannot_be_sent_along_with_its_load(http: Lane) -> None:
    """It would be neither checked nor versioned: it is uploaded to POST /models first."""
    body = {"parameters": {"config": "{}", "file:1/model.onnx": "AAAA"}}
    words = refusal(http.request("POST", "/v2/repository/models/abc/load", json=body), 501)
    assert "POST /models" in words
    refusal(http.request("POST", "/v2/repository/models/nobody/load"), 404)


def test_texts_with_nul_are_on_record_by_digest(lane: Lane) -> None:
    """No database stores U+0000 in a text; the answer is given all the same."""
    text = b"a\0b"
    raw = {
        f"in_{name}": (name, [0], b"") if name != "BYTES" else (name, [1], struct.pack("<I", 3) + text)
        for name in zoo.EVERY_TYPE
    }
    outputs = [{"name": "out_BYTES", "parameters": {"binary_data": True}}]
    response = ask_raw(lane, "types", raw, outputs=outputs)
    assert raw_outputs(response)["out_BYTES"] == ("BYTES", [1], struct.pack("<I", 3) + text)
    head = json.loads(response.content[: int(response.headers[RAW_LENGTH])])
    row = logged(lane, head["parameters"]["prediction_id"])
    assert set(row["features"]["in_BYTES"]) == {"datatype", "shape", "sha256"}
    assert set(row["result"]["out_BYTES"]) == {"datatype", "shape", "sha256"}


def test_tensors_on_record_can_be_computed_again(lane: Lane) -> None:
    """As rows can; where only a digest is on record, that is said."""
    small = infer(
        lane, "outer", fp32("x", [2], [1, 2]), fp32("y", [5000], [0.1] * 5000), fp32("factor", [], [3])
    )
    prediction_id = small["parameters"]["prediction_id"]
    kept = logged(lane, prediction_id)
    assert "sha256" in kept["features"]["y"]
    answered = lane.request("GET", f"/predictions/{prediction_id}/replay")
    assert answered.status_code == 422
    assert "only its SHA-256 is on record" in answered.json()["error"]["message"]

    small = infer(
        lane, "outer", fp32("x", [100], [0.1] * 100), fp32("y", [100], [0.2] * 100), fp32("factor", [], [3])
    )
    prediction_id = small["parameters"]["prediction_id"]
    assert "sha256" in logged(lane, prediction_id)["result"]["table"]
    replayed = ok(lane.request("GET", f"/predictions/{prediction_id}/replay"))
    assert replayed["identical"]
    assert replayed["result"]["computed"]["count"]["data"] == [10_000]


def test_json_is_bounded_more_tightly_than_raw_tensors(lane: Lane) -> None:
    """Decoding it would hold up everybody else; raw bytes are taken as they are."""
    x = np.zeros(3_000_000, "<f4")
    many = ask(lane, "outer", {"inputs": [fp32("x", [3_000_000], x.tolist())]})
    assert "send the tensors as raw bytes" in refusal(many, 413)
    raw = {
        "x": ("FP32", [3_000_000], x.tobytes()),
        "y": ("FP32", [1], bytes(4)),
        "factor": ("FP32", [], bytes(4)),
    }
    outputs = [{"name": "count", "parameters": {"binary_data": True}}]
    found = raw_outputs(ask_raw(lane, "outer", raw, outputs=outputs))
    assert found == {"count": ("INT64", [], struct.pack("<q", 3_000_000))}
