"""Raw tensors over the two protocols, as bytes that can be compared."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import httpx
from phoenix_server import PhoenixServer
from servers import HOST

from phoenix_ml.infrastructure.grpc import inference_pb2 as pb

# Datatype, shape and bytes by name.
Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]


def over_rest(client: httpx.Client, model_id: str, inputs: Tensors) -> Tensors:
    described = [
        {"name": name, "shape": shape, "datatype": datatype, "parameters": {"binary_data_size": len(data)}}
        for name, (datatype, shape, data) in inputs.items()
    ]
    head = json.dumps({"inputs": described, "parameters": {"binary_data_output": True}}).encode()
    answer = client.post(
        f"/v2/models/{model_id}/infer",
        content=head + b"".join(data for _, _, data in inputs.values()),
        headers={"inference-header-content-length": str(len(head))},
    )
    assert answer.status_code == 200, answer.text
    end = int(answer.headers.get("inference-header-content-length", len(answer.content)))
    outputs = {}
    for output in json.loads(answer.content[:end])["outputs"]:
        size = output["parameters"]["binary_data_size"]
        data = answer.content[end : end + size]
        outputs[output["name"]] = (output["datatype"], tuple(output["shape"]), data)
        end += size
    return outputs


def over_grpc(call: Any, model_id: str, inputs: Tensors) -> Tensors:
    asked = pb.ModelInferRequest(model_name=model_id)
    for name, (datatype, shape, data) in inputs.items():
        asked.inputs.add(name=name, datatype=datatype, shape=shape)
        asked.raw_input_contents.append(data)
    answer = call(asked, timeout=30)
    return {
        output.name: (output.datatype, tuple(output.shape), data)
        for output, data in zip(answer.outputs, answer.raw_output_contents, strict=True)
    }


@contextmanager
def infer_call(server: PhoenixServer) -> Iterator[Any]:
    """``ModelInfer`` over a channel of its own."""
    # Whole networks answer more than the 4 MiB that gRPC takes by default.
    options = [("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(f"{HOST}:{server.settings.grpc_port}", options) as channel:
        yield channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=pb.ModelInferRequest.SerializeToString,
            response_deserializer=pb.ModelInferResponse.FromString,
        )
