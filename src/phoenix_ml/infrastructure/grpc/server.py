"""The Open Inference Protocol over gRPC, with the health-checking and reflection services of gRPC itself."""

import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

import grpc
import numpy as np
from google.protobuf.json_format import ParseDict
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import SERVICE_NAME as HEALTH_SERVICE
from grpc_health.v1.health import aio as health
from grpc_reflection.v1alpha import reflection
from starlette.concurrency import run_in_threadpool

from phoenix_ml import __version__
from phoenix_ml.application.infer import Infer, Inferred, InferRequest
from phoenix_ml.application.protocol import (
    answer_parameters,
    describe_config,
    describe_model,
    describe_server,
    describe_statistics,
    find_version,
    infer_request,
    list_index,
    load_model,
    unload_model,
)
from phoenix_ml.application.serving import LiveModels
from phoenix_ml.bootstrap import Phoenix
from phoenix_ml.domain import errors
from phoenix_ml.domain.ids import new_id
from phoenix_ml.domain.tensors import DTYPE_OF, Tensor, as_array, decode_raw, encode_raw
from phoenix_ml.infrastructure.grpc import inference_pb2 as pb
from phoenix_ml.infrastructure.telemetry.meter import OTHER, MetricsMeter
from phoenix_ml.infrastructure.telemetry.refusals import error_for, record_refusal
from phoenix_ml.infrastructure.telemetry.statistics import count_by_version

SERVICE: Final = "inference.GRPCInferenceService"
# The one table from error to gRPC status, beside HTTP's, which metrics and logs go by.
STATUS_OF: Final[dict[type[errors.PhoenixError], tuple[grpc.StatusCode, int]]] = {
    errors.InvalidRequest: (grpc.StatusCode.INVALID_ARGUMENT, 400),
    errors.Forbidden: (grpc.StatusCode.PERMISSION_DENIED, 403),
    errors.NotFound: (grpc.StatusCode.NOT_FOUND, 404),
    errors.VersionInactive: (grpc.StatusCode.UNAVAILABLE, 503),
    errors.Conflict: (grpc.StatusCode.FAILED_PRECONDITION, 409),
    errors.TooLarge: (grpc.StatusCode.RESOURCE_EXHAUSTED, 413),
    errors.Unsupported: (grpc.StatusCode.UNIMPLEMENTED, 501),
    errors.Unavailable: (grpc.StatusCode.UNAVAILABLE, 503),
    errors.ModelLoadFailed: (grpc.StatusCode.UNAVAILABLE, 503),
    errors.PhoenixError: (grpc.StatusCode.INTERNAL, 500),
}
_CONTENTS_OF: Final[Mapping[str, str]] = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
# Arrays of these are read from protobuf's lists without a Python object an element.
_NUMBERS: Final = {"INT32", "INT64", "UINT32", "UINT64", "FP32", "FP64"}

Context = Any  # grpc.aio.ServicerContext; grpcio has no types
Handler = Callable[[bytes, Context], Awaitable[Message]]


class InferenceServer:
    """Serves in one API process; every process listens on the same port, among which the kernel shares out."""

    def __init__(
        self, phoenix: Phoenix, live: LiveModels, infer: Infer, meter: MetricsMeter, address: str
    ) -> None:
        limit = phoenix.settings.tensor_body_limit_bytes
        self._server = grpc.aio.server(
            options=[
                ("grpc.so_reuseport", 1),
                ("grpc.max_receive_message_length", limit),
                ("grpc.max_send_message_length", -1),
            ]
        )
        self._health = health.HealthServicer()
        service = _Service(phoenix, live, infer, meter)
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(
                handler, response_serializer=lambda message: message.SerializeToString()
            )
            for name, handler in service.methods().items()
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (SERVICE, HEALTH_SERVICE, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        self._server.add_insecure_port(address)

    async def start(self) -> None:
        """Accepts calls, and is not healthy yet."""
        await self._tell(health_pb2.HealthCheckResponse.NOT_SERVING)
        await self._server.start()

    async def become_healthy(self) -> None:
        """What is checked is answered SERVING from here on."""
        await self._tell(health_pb2.HealthCheckResponse.SERVING)

    async def stop(self, patience_s: float) -> None:
        """Accepts no more; returns when what is in flight has its answer, or is cut off after the patience."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(patience_s)

    async def _tell(self, status: Any) -> None:
        for service in ("", SERVICE):
            await self._health.set(service, status)


class _Service:
    """The calls of the protocol."""

    def __init__(self, phoenix: Phoenix, live: LiveModels, infer: Infer, meter: MetricsMeter) -> None:
        self._phoenix = phoenix
        self._live = live
        self._infer = infer
        self._meter = meter

    def methods(self) -> dict[str, Handler]:
        """By name, from the bytes of a request to its answer."""
        kinds: dict[str, tuple[type[Message], Callable[[Any, str], Awaitable[Message]]]] = {
            "ServerLive": (pb.ServerLiveRequest, self.server_live),
            "ServerReady": (pb.ServerReadyRequest, self.server_ready),
            "ModelReady": (pb.ModelReadyRequest, self.model_ready),
            "ServerMetadata": (pb.ServerMetadataRequest, self.server_metadata),
            "ModelMetadata": (pb.ModelMetadataRequest, self.model_metadata),
            "ModelConfig": (pb.ModelConfigRequest, self.model_config),
            "ModelStatistics": (pb.ModelStatisticsRequest, self.model_statistics),
            "RepositoryIndex": (pb.RepositoryIndexRequest, self.repository_index),
            "RepositoryModelLoad": (pb.RepositoryModelLoadRequest, self.repository_load),
            "RepositoryModelUnload": (pb.RepositoryModelUnloadRequest, self.repository_unload),
        }
        methods = {name: self._handler(kind, method) for name, (kind, method) in kinds.items()}
        return methods | {"ModelInfer": self.model_infer}

    def _handler(self, kind: type[Message], method: Callable[[Any, str], Awaitable[Message]]) -> Handler:
        async def handle(body: bytes, context: Context) -> Message:
            started = time.perf_counter()
            try:
                return await method(_parse(kind, body), f"grpc {context.peer()}")
            except Exception as exc:
                await self._refuse(context, exc, OTHER, "", started)
                raise AssertionError("abort raises") from exc

        return handle

    async def model_infer(self, body: bytes, context: Context) -> Message:
        started = time.perf_counter()
        model_id, request_id, traceparent = OTHER, "", None
        for key, value in context.invocation_metadata() or ():
            if key == "x-request-id" and isinstance(value, str):
                request_id = value[:128]
            elif key == "traceparent" and isinstance(value, str):
                traceparent = value
        try:
            asked = _parse(pb.ModelInferRequest, body)
            model_id = asked.model_name
            request, with_all_ids = _read_request(asked)
            request_id = request.request_id = request.request_id or request_id
            answer = await self._infer(request, started, traceparent)
            written = _write_answer(answer, with_all_ids)
        except Exception as exc:
            await self._refuse(context, exc, model_id, request_id, started)
            raise AssertionError("abort raises") from exc
        took_s = time.perf_counter() - started
        self._meter.requested(answer.model_id, answer.model_version, answer.role, 200, took_s)
        return written

    async def _refuse(
        self, context: Context, exc: Exception, model_id: str, request_id: str, started: float
    ) -> None:
        """Ends the call with the error's status. ``abort`` raises."""
        error = error_for(exc)
        code, status = grpc_status_of(error)
        record_refusal(
            self._meter,
            self._live,
            exc,
            model_id=model_id,
            request_id=request_id or new_id(),
            status=status,
            started=started,
        )
        await context.abort(code, error.message, (("phoenix-code", error.code),))

    async def server_live(self, _: Any, __: str) -> Message:
        return pb.ServerLiveResponse(live=True)

    async def server_ready(self, _: Any, __: str) -> Message:
        return pb.ServerReadyResponse(ready=self._live.is_ready)

    async def model_ready(self, asked: pb.ModelReadyRequest, _: str) -> Message:
        try:
            find_version(self._live, asked.name, asked.version or None)
        except (errors.VersionInactive, errors.ModelLoadFailed):
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=True)

    async def server_metadata(self, _: Any, __: str) -> Message:
        return ParseDict(describe_server(__version__), pb.ServerMetadataResponse())

    async def model_metadata(self, asked: pb.ModelMetadataRequest, _: str) -> Message:
        described = describe_model(self._live, asked.name, asked.version or None)
        return ParseDict(described, pb.ModelMetadataResponse())

    async def model_config(self, asked: pb.ModelConfigRequest, _: str) -> Message:
        limit = self._phoenix.settings.batch_limit
        described = describe_config(self._live, asked.name, asked.version or None, limit)
        return ParseDict({"config": described}, pb.ModelConfigResponse())

    async def model_statistics(self, asked: pb.ModelStatisticsRequest, _: str) -> Message:
        counts = await run_in_threadpool(count_by_version, self._phoenix.settings.metrics_folder)
        described = describe_statistics(self._live, asked.name or None, asked.version or None, counts)
        return ParseDict(described, pb.ModelStatisticsResponse())

    async def repository_index(self, asked: pb.RepositoryIndexRequest, _: str) -> Message:
        return ParseDict(
            {"models": list_index(self._live, ready_only=asked.ready)}, pb.RepositoryIndexResponse()
        )

    async def repository_load(self, asked: pb.RepositoryModelLoadRequest, actor: str) -> Message:
        parameters = {name: _value_of(value) for name, value in asked.parameters.items()}
        phoenix = self._phoenix

        def load() -> None:
            load_model(
                phoenix.registry,
                phoenix.artifacts,
                phoenix.engines,
                asked.model_name,
                parameters,
                actor=actor,
            )
            self._live.refresh(asked.model_name)

        await run_in_threadpool(load)
        return pb.RepositoryModelLoadResponse()

    async def repository_unload(self, asked: pb.RepositoryModelUnloadRequest, actor: str) -> Message:
        def unload() -> None:
            unload_model(self._phoenix.registry, asked.model_name, actor=actor)
            self._live.refresh(asked.model_name)

        await run_in_threadpool(unload)
        return pb.RepositoryModelUnloadResponse()


def grpc_status_of(error: errors.PhoenixError) -> tuple[grpc.StatusCode, int]:
    """The status of the error's nearest class in the table, and HTTP's."""
    return next(STATUS_OF[kind] for kind in type(error).__mro__ if kind in STATUS_OF)


def _parse(kind: type[Any], body: bytes) -> Any:
    try:
        return kind.FromString(body)
    except DecodeError as exc:
        raise errors.MalformedBody(f"the message is no {kind.DESCRIPTOR.full_name}: {exc}") from exc


def _value_of(parameter: Any) -> Any:
    chosen = parameter.WhichOneof("parameter_choice")
    return None if chosen is None else getattr(parameter, chosen)


def _read_request(asked: pb.ModelInferRequest) -> tuple[InferRequest, bool]:
    """The request, and whether the answer is to have all rows' ids."""
    raw = asked.raw_input_contents
    if raw and len(raw) != len(asked.inputs):
        raise errors.TensorInvalid(
            f"there are {len(raw)} raw_input_contents for {len(asked.inputs)} inputs: send all of them so, or none"
        )
    inputs: dict[str, Tensor] = {}
    for number, given in enumerate(asked.inputs):
        name, datatype = given.name, given.datatype
        if name in inputs:
            raise errors.TensorInvalid(f"input {name[:80]!r} is given twice", tensor=name)
        if raw:
            inputs[name] = Tensor(datatype, decode_raw(name, datatype, given.shape, raw[number]))
        else:
            inputs[name] = _read_contents(given)
    parameters = {name: _value_of(value) for name, value in asked.parameters.items()}
    request = infer_request(
        asked.model_name,
        asked.model_version or None,
        asked.id,
        inputs,
        [output.name for output in asked.outputs],
        parameters,
    )
    return request, parameters.get("prediction_ids") is True


def _read_contents(given: pb.ModelInferRequest.InferInputTensor) -> Tensor:
    name, datatype = given.name, given.datatype
    field = _CONTENTS_OF.get(datatype)
    if field is None:
        raise errors.TensorInvalid(
            f"input {name!r}: {datatype[:40]!r} has no typed contents; the datatypes that have are "
            f"{', '.join(_CONTENTS_OF)}, FP16 and BF16 are sent as raw_input_contents",
            tensor=name,
        )
    elements: Any = getattr(given.contents, field)
    if datatype == "BYTES":
        try:
            elements = [text.decode() for text in elements]
        except UnicodeDecodeError as exc:
            raise errors.TensorInvalid(
                f"input {name!r} has an element that is not UTF-8, as texts of ONNX are: {exc}", tensor=name
            ) from exc
    elif datatype in _NUMBERS:
        elements = np.fromiter(elements, DTYPE_OF[datatype], len(elements))
    return Tensor(datatype, as_array(name, datatype, given.shape, elements))


def _write_answer(answer: Inferred, with_all_ids: bool) -> pb.ModelInferResponse:
    """The answer with raw outputs, the only form that all clients read."""
    written = pb.ModelInferResponse(
        model_name=answer.model_id, model_version=answer.model_version, id=answer.request_id
    )
    for name, value in answer_parameters(answer, with_all_ids).items():
        written.parameters[name].string_param = value
    for name, tensor in answer.outputs:
        written.outputs.add(name=name, datatype=tensor.datatype, shape=tensor.shape)
        written.raw_output_contents.append(encode_raw(tensor))
    return written
