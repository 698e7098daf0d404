"""The Open Inference Protocol over gRPC, by a channel to a real server with two API processes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import zoo
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from lanes import BATCH_LIMIT, Lane, logged, ok, store_features, unique
from phoenix_server import PhoenixServer
from servers import HOST, ServerError, free_port, wait_until

from phoenix_ml.domain.tensors import DTYPE_OF, Tensor, encode_raw
from phoenix_ml.infrastructure.grpc import inference_pb2 as pb

pytestmark = pytest.mark.system

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 60.0
SERVICE = "/inference.GRPCInferenceService/"
ANSWERS: dict[str, type[Any]] = {
    name: getattr(pb, f"{name}Response")
    for name in (
        "ServerLive",
        "ServerReady",
        "ModelReady",
        "ServerMetadata",
        "ModelMetadata",
        "ModelInfer",
        "ModelConfig",
        "ModelStatistics",
        "RepositoryIndex",
        "RepositoryModelLoad",
        "RepositoryModelUnload",
    )
}


class Client:
    """Calls by name, over one channel."""

    def __init__(self, port: int | None) -> None:
        self.channel = grpc.insecure_channel(f"{HOST}:{port}")

    def call(self, name: str, request: Any, metadata: Any = ()) -> Any:
        """The answer; ``request`` may be bytes as they are."""
        method = self.channel.unary_unary(
            SERVICE + name,
            request_serializer=lambda given: given if isinstance(given, bytes) else given.SerializeToString(),
            response_deserializer=ANSWERS[name].FromString,
        )
        return method(request, timeout=DEADLINE_S, metadata=metadata)

    def refusal(self, name: str, request: Any, status: grpc.StatusCode, code: str) -> str:
        """The words of a call that fails so."""
        with pytest.raises(grpc.RpcError) as caught:
            self.call(name, request)
        assert caught.value.code() is status, caught.value.details()
        assert dict(caught.value.trailing_metadata())["phoenix-code"] == code
        words: str = caught.value.details()
        return words


@pytest.fixture(scope="module")
def client(server: PhoenixServer) -> Iterator[Client]:
    opened = Client(server.settings.grpc_port)
    yield opened
    opened.channel.close()


def request(model: str, version: str = "", /, **tensors: tuple[str, Any]) -> pb.ModelInferRequest:
    """A request with raw contents."""
    asked = pb.ModelInferRequest(model_name=model, model_version=version)
    for name, (datatype, values) in tensors.items():
        array = np.asarray(values, DTYPE_OF[datatype])
        asked.inputs.add(name=name, datatype=datatype, shape=array.shape)
        asked.raw_input_contents.append(encode_raw(Tensor(datatype, array)))
    return asked


def rows(*values: list[float]) -> tuple[str, Any]:
    return "FP32", list(values)


def test_rows_are_answered_and_on_record(client: Client, http: Lane) -> None:
    """The same model, log and ids as over HTTP."""
    asked = request("abc", "1.0.0", x=rows([1, 2, 3], [1, 1, 1]))
    asked.id = "mine-7"
    asked.parameters["prediction_ids"].bool_param = True
    answer = client.call("ModelInfer", asked)
    assert (answer.model_name, answer.model_version, answer.id) == ("abc", "1.0.0", "mine-7")
    (output,) = answer.outputs
    assert (output.name, output.datatype, list(output.shape)) == ("y", "FP32", [2, 1])
    assert np.frombuffer(answer.raw_output_contents[0], "<f4").tolist() == [14.0, 6.0]
    ids = answer.parameters["prediction_ids"].string_param.split(",")
    assert [logged(http, one)["result"] for one in ids] == [14.0, 6.0]


def test_one_row_answers_as_predict_does(client: Client, http: Lane) -> None:
    """With the request id and trace of the call's metadata, where the message has none."""
    metadata = (("x-request-id", "call-9"),)
    answer = client.call("ModelInfer", request("abc", "1.0.0", x=rows([1, 0, 0])), metadata)
    row = logged(http, answer.parameters["prediction_id"].string_param)
    assert (row["result"], row["request_id"]) == (1.0, "call-9")


@pytest.mark.parametrize("datatype", [name for name in zoo.EVERY_TYPE if name != "FP16"])
def test_typed_contents_are_read(client: Client, datatype: str) -> None:
    """Some clients fill in contents by type instead of raw bytes."""
    asked = pb.ModelInferRequest(model_name="types")
    values: dict[str, Any] = {"BOOL": [True, False], "BYTES": [b"", "é".encode()]}
    given = values.get(datatype, [1, 100])
    for name in zoo.EVERY_TYPE:
        if name == "FP16":
            # It has no typed contents, and all or none are raw: so the model gets none of it.
            continue
        tensor = asked.inputs.add(name=f"in_{name}", datatype=name, shape=[0])
        if name != datatype:
            continue
        tensor.shape[:] = [2]
        field = {
            "BOOL": "bool_contents",
            "BYTES": "bytes_contents",
            "INT64": "int64_contents",
            "UINT64": "uint64_contents",
            "FP32": "fp32_contents",
            "FP64": "fp64_contents",
        }.get(name, "uint_contents" if name.startswith("U") else "int_contents")
        getattr(tensor.contents, field).extend(given)
    # The one that is missing is the only one that is complained of, so the others were read.
    words = client.refusal("ModelInfer", asked, grpc.StatusCode.INVALID_ARGUMENT, "tensor_invalid")
    assert "'in_FP16' is missing" in words


def test_typed_contents_give_the_same_answer_as_raw_ones(client: Client) -> None:
    """The form of a request decides nothing."""
    asked = pb.ModelInferRequest(model_name="outer")
    for name, shape, values in (("x", [2], [1, 2]), ("y", [3], [10, 20, 30]), ("factor", [], [2])):
        asked.inputs.add(name=name, datatype="FP32", shape=shape).contents.fp32_contents.extend(values)
    answer = client.call("ModelInfer", asked)
    raw = client.call(
        "ModelInfer", request("outer", x=("FP32", [1, 2]), y=("FP32", [10, 20, 30]), factor=("FP32", 2))
    )
    assert list(answer.raw_output_contents) == list(raw.raw_output_contents)
    assert [list(output.shape) for output in answer.outputs] == [[2, 3], []]


def test_every_datatype_comes_back_to_the_bit(client: Client) -> None:
    """BF16 and FP16 too, which only raw contents can hold."""
    for model, names in (("types", zoo.EVERY_TYPE), ("brain", ("BF16", "INT8"))):
        tensors: dict[str, tuple[str, Any]] = {
            f"in_{name}": (name, ["", "é"] if name == "BYTES" else [0, 1, 77]) for name in names
        }
        asked = request(model, "", **tensors)
        answer = client.call("ModelInfer", asked)
        assert list(answer.raw_output_contents) == list(asked.raw_input_contents)
        assert [o.datatype for o in answer.outputs] == [i.datatype for i in asked.inputs]


def test_missing_inputs_come_from_the_feature_store(client: Client, http: Lane) -> None:
    """As over REST: an entity's features fill them in."""
    entity = unique()
    store_features(http, entity, a=1.0, b=1.0, c=1.0)
    asked = pb.ModelInferRequest(model_name="abc", model_version="1.0.0")
    asked.parameters["entity_id"].string_param = entity
    answer = client.call("ModelInfer", asked)
    assert np.frombuffer(answer.raw_output_contents[0], "<f4").tolist() == [6.0]


def test_only_named_outputs_come(client: Client) -> None:
    """In the order in which they were named."""
    asked = request("signs", x=rows([1.0]))
    asked.outputs.add(name="probabilities")
    assert [output.name for output in client.call("ModelInfer", asked).outputs] == ["probabilities"]


def test_what_is_wrong_with_a_call_is_said(client: Client) -> None:
    """A status that tells whose fault it is, the code of our own errors, and words of what to do."""
    invalid, infer = grpc.StatusCode.INVALID_ARGUMENT, "ModelInfer"
    short = request("abc", x=rows([1, 2, 3]))
    short.raw_input_contents[0] = b"\0"
    uneven = request("abc", x=rows([1, 2, 3]))
    uneven.raw_input_contents.append(b"")
    broken = pb.ModelInferRequest(model_name="types")
    text = broken.inputs.add(name="in_BYTES", datatype="BYTES", shape=[1])
    text.contents.bytes_contents.append(b"\xff")
    assert "takes 12" in client.refusal(infer, short, invalid, "tensor_invalid")
    assert "raw_input_contents" in client.refusal(infer, uneven, invalid, "tensor_invalid")
    assert "not UTF-8" in client.refusal(infer, broken, invalid, "tensor_invalid")
    assert "is no inference." in client.refusal(infer, b"\xff\xff\xff", invalid, "malformed_body")
    client.refusal(infer, request("abc", x=("FP64", [[1, 2, 3]])), invalid, "tensor_invalid")
    many = request("abc", x=("FP32", np.zeros((BATCH_LIMIT + 1, 3))))
    client.refusal(infer, many, grpc.StatusCode.RESOURCE_EXHAUSTED, "batch_too_large")
    not_found = grpc.StatusCode.NOT_FOUND
    client.refusal(infer, request("nobody"), not_found, "model_unknown")
    client.refusal(infer, request("abc", "9.9.9"), not_found, "version_unknown")
    client.refusal(infer, request("abc", "2.0.0"), grpc.StatusCode.UNAVAILABLE, "version_inactive")
    client.refusal("ModelMetadata", pb.ModelMetadataRequest(name="nobody"), not_found, "model_unknown")
    load = pb.RepositoryModelLoadRequest(model_name="abc")
    load.parameters["config"].string_param = "{}"
    client.refusal("RepositoryModelLoad", load, grpc.StatusCode.UNIMPLEMENTED, "unsupported")


def test_what_is_said_of_models_is_what_rest_says(client: Client, http: Lane) -> None:
    """One description, two forms."""
    metadata = client.call("ModelMetadata", pb.ModelMetadataRequest(name="outer"))
    over_rest = ok(http.request("GET", "/v2/models/outer"))
    assert [(i.name, i.datatype, list(i.shape)) for i in metadata.inputs] == [
        (i["name"], i["datatype"], i["shape"]) for i in over_rest["inputs"]
    ]
    assert metadata.platform == over_rest["platform"] != ""
    config = client.call("ModelConfig", pb.ModelConfigRequest(name="abc")).config
    assert (config.max_batch_size, config.input[0].data_type, list(config.input[0].dims)) == (
        BATCH_LIMIT,
        pb.TYPE_FP32,
        [3],
    )
    assert client.call("ServerMetadata", pb.ServerMetadataRequest()).name == "phoenix-ml"
    assert client.call("ServerLive", pb.ServerLiveRequest()).live
    assert client.call("ServerReady", pb.ServerReadyRequest()).ready
    assert client.call("ModelReady", pb.ModelReadyRequest(name="abc")).ready
    assert not client.call("ModelReady", pb.ModelReadyRequest(name="idle")).ready
    index = client.call("RepositoryIndex", pb.RepositoryIndexRequest())
    assert ("idle", "UNAVAILABLE") in {(one.name, one.state) for one in index.models}


def test_statistics_grow_with_calls(client: Client) -> None:
    """perf_analyzer subtracts two of them."""

    def counted() -> tuple[int, int]:
        asked = pb.ModelStatisticsRequest(name="signs", version="1.0.0")
        (stats,) = client.call("ModelStatistics", asked).model_stats
        return stats.inference_count, stats.inference_stats.success.count

    rows_before, calls_before = counted()
    client.call("ModelInfer", request("signs", x=rows([1.0], [2.0])))
    assert counted() == (rows_before + 2, calls_before + 1)


def test_the_health_service_of_grpc_answers(client: Client) -> None:
    """Kubernetes and load balancers ask it."""
    stub = health_pb2_grpc.HealthStub(client.channel)
    for service in ("", "inference.GRPCInferenceService"):
        answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=DEADLINE_S)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_reflection_lists_the_service(client: Client) -> None:
    """grpcurl and the like need no file of ours."""
    stub = reflection_pb2_grpc.ServerReflectionStub(client.channel)
    asked = reflection_pb2.ServerReflectionRequest(list_services="")
    (answer,) = stub.ServerReflectionInfo(iter([asked]), timeout=DEADLINE_S)
    names = {service.name for service in answer.list_services_response.service}
    assert {"inference.GRPCInferenceService", "grpc.health.v1.Health"} <= names


def test_streams_are_not_there(client: Client) -> None:
    """What is not implemented says so, instead of hanging."""
    stream = client.channel.stream_stream(SERVICE + "ModelStreamInfer")
    with pytest.raises(grpc.RpcError) as caught:
        list(stream(iter([b""]), timeout=DEADLINE_S))
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_port_that_is_taken_is_said_before_anything_starts(server: PhoenixServer, tmp_path: Path) -> None:
    """With SO_REUSEPORT alone two servers would share each other's calls in silence."""
    other = PhoenixServer(tmp_path, grpc_port=server.settings.grpc_port)
    with pytest.raises(ServerError, match=r"gRPC cannot listen on .* choose another --grpc-port"):
        other.start()


def test_a_stop_answers_the_calls_that_are_in_flight(tmp_path: Path) -> None:
    """A deployment must not lose a call."""
    with PhoenixServer(tmp_path, grpc_port=free_port(), registry_poll_ms=100) as own:
        own.register(zoo.slow(tmp_path / "slow.onnx", 900), "slow", "1.0.0")
        client = Client(own.settings.grpc_port)
        method = client.channel.unary_unary(
            SERVICE + "ModelInfer",
            request_serializer=lambda given: given.SerializeToString(),
            response_deserializer=pb.ModelInferResponse.FromString,
        )
        ready = pb.ModelReadyRequest(name="slow")
        wait_until(lambda: _is_ready(client, ready), DEADLINE_S, "the model is ready")
        calls = [method.future(request("slow", x=rows([1.0])), timeout=DEADLINE_S) for _ in range(4)]
        calls[0].result()  # the others are there too, and wait for the engine
        assert own.stop() == 0
        answers = [call.result() for call in calls]
        client.channel.close()
    assert [np.frombuffer(answer.raw_output_contents[0], "<f4").tolist() for answer in answers] == [[1.0]] * 4


def _is_ready(client: Client, asked: pb.ModelReadyRequest) -> bool:
    try:
        ready: bool = client.call("ModelReady", asked).ready
    except grpc.RpcError:  # it is not known yet
        return False
    return ready


def test_the_messages_are_made_from_the_file(tmp_path: Path) -> None:
    """What is checked in is what `make proto` writes."""
    source = "phoenix_ml/infrastructure/grpc/inference.proto"
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", str(ROOT / "src")]
    command += [f"--python_out={tmp_path}", f"--pyi_out={tmp_path}", str(ROOT / "src" / source)]
    subprocess.run(command, check=True, timeout=60)
    for kind in ("py", "pyi"):
        made = Path(source).with_name(f"inference_pb2.{kind}")
        assert (ROOT / "src" / made).read_text() == (tmp_path / made).read_text()
