"""What a program of KServe's users does, with the clients' defaults; run by its own environment.

Arguments: the base URL of HTTP and the address of gRPC. Prints what was found, as JSON.
"""

import asyncio
import json
import sys

import numpy as np
from httpx import HTTPStatusError
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest
from kserve.inference_client import RESTConfig


def request(model, name, array, datatype, binary):
    tensor = InferInput(name, list(array.shape), datatype)
    tensor.set_data_from_numpy(array, binary_data=binary)
    return InferRequest(model, [tensor])


async def session(http, grpc):
    rows = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
    found = {}
    rest = InferenceRESTClient(RESTConfig(protocol="v2"))
    found["rest.ready"] = [
        await rest.is_server_live(http),
        await rest.is_server_ready(http),
        await rest.is_model_ready(http, "people"),
    ]
    for binary in (False, True):
        answer = await rest.infer(http, request("abc", "x", rows, "FP32", binary), model_name="abc")
        (output,) = answer.outputs
        found[f"rest.{binary}"] = [answer.model_name, output.name, output.as_numpy().tolist()]
    try:
        await rest.infer(http, request("nobody", "x", rows, "FP32", False), model_name="nobody")
    except HTTPStatusError as exc:
        found["rest.error"] = str(exc)
    client = InferenceGRPCClient(grpc)
    found["grpc.ready"] = [
        await client.is_server_live(),
        await client.is_server_ready(),
        await client.is_model_ready("people"),
    ]
    for binary in (False, True):
        answer = await client.infer(request("abc", "x", rows, "FP32", binary))
        (output,) = answer.outputs
        found[f"grpc.{binary}"] = [answer.model_name, output.name, output.as_numpy().tolist()]
    await client.close()
    await rest.close()
    return found


if __name__ == "__main__":
    print(json.dumps(asyncio.run(session(*sys.argv[1:]))))
