"""What a program of Triton's users does, with the client's defaults; run by its own environment.

Arguments: the addresses of HTTP and of gRPC, and the model that may be unloaded. Prints what was found, as JSON.
"""

import asyncio
import json
import sys

import numpy as np
import tritonclient.grpc
import tritonclient.grpc.aio
import tritonclient.http
import tritonclient.http.aio
from tritonclient.utils import InferenceServerException

ROWS = np.array([[1, 2, 3], [4, 5, 6]], np.float32)


def make_input(module, name, datatype, array, **options):
    made = module.InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array, **options)
    return made


def every_type(module):
    """An input of each datatype, and what has to come back."""
    arrays = {
        "BOOL": np.array([[True], [False]]),
        "UINT8": np.array([0, 255], np.uint8),
        "UINT16": np.array([1], np.uint16),
        "UINT32": np.array([2**32 - 1], np.uint32),
        "UINT64": np.array([2**64 - 1], np.uint64),
        "INT8": np.array([-128], np.int8),
        "INT16": np.array([-5], np.int16),
        "INT32": np.array([7], np.int32),
        "INT64": np.array([-(2**63)], np.int64),
        "FP16": np.array([0.5], np.float16),
        "FP32": np.zeros((2, 0, 3), np.float32),
        "FP64": np.array(0.1),
        "BYTES": np.array(["", "Łódź"], object),
    }
    return [make_input(module, f"in_{name}", name, array) for name, array in arrays.items()], arrays


def session(module, address, managed):
    found = {}
    client = module.InferenceServerClient(address)
    found["ready"] = [client.is_server_live(), client.is_server_ready(), client.is_model_ready("abc")]
    found["json"] = []
    plain = client.infer("abc", [make_input(module, "x", "FP32", ROWS)], model_version="1.0.0")
    found["y"] = plain.as_numpy("y").tolist()
    inputs, arrays = every_type(module)
    answer = client.infer("types", inputs)
    found["types"] = [
        name
        for name, array in arrays.items()
        if answer.as_numpy(f"out_{name}").shape == array.shape
        and [x.decode() if isinstance(x, bytes) else x for x in answer.as_numpy(f"out_{name}").reshape(-1)]
        == array.reshape(-1).tolist()
    ]
    named = client.infer(
        "signs",
        [make_input(module, "x", "FP32", np.ones((1, 1), np.float32))],
        outputs=[module.InferRequestedOutput("label")],
        request_id="mine",
    )
    found["label"] = named.as_numpy("label").tolist()
    found["others"] = named.as_numpy("probabilities") is None
    try:
        client.infer("nobody", [make_input(module, "x", "FP32", ROWS)])
    except InferenceServerException as exc:
        found["error"] = str(exc)
    future = client.async_infer("abc", [make_input(module, "x", "FP32", ROWS)], **ASYNC[module.__name__])
    found["async"] = RESULT[module.__name__](future)
    client.unload_model(managed)
    found["unloaded"] = client.is_model_ready(managed)
    client.load_model(managed)
    found["loaded"] = client.is_model_ready(managed)
    return client, found


def over_http(address, managed):
    module = tritonclient.http
    client, found = session(module, address, managed)
    listed = make_input(module, "x", "FP32", ROWS, binary_data=False)
    outputs = [module.InferRequestedOutput("y", binary_data=False)]
    found["json"] = (
        client.infer("abc", [listed], outputs=outputs, model_version="1.0.0").as_numpy("y").tolist()
    )
    many = make_input(module, "x", "FP32", np.ones((50, 3), np.float32))
    packed = client.infer(
        "abc",
        [many],
        model_version="1.0.0",
        request_compression_algorithm="gzip",
        response_compression_algorithm="deflate",
    )
    found["compressed"] = packed.as_numpy("y").sum().item()
    found["metadata"] = client.get_model_metadata("outer")
    found["config"] = client.get_model_config("abc")["max_batch_size"]
    found["index"] = sorted({one["name"] for one in client.get_model_repository_index()})
    found["counted"] = client.get_inference_statistics("abc")["model_stats"][0]["inference_count"] > 0
    return found


def over_grpc(address, managed):
    client, found = session(tritonclient.grpc, address, managed)
    found["metadata"] = client.get_model_metadata("outer", as_json=True)
    found["config"] = client.get_model_config("abc", as_json=True)["config"]["max_batch_size"]
    found["index"] = sorted({one.name for one in client.get_model_repository_index().models})
    found["counted"] = client.get_inference_statistics("abc").model_stats[0].inference_count > 0
    return found


async def asynchronously(module, address):
    async with module.InferenceServerClient(address) as client:
        inputs = [make_input(module, "x", "FP32", ROWS)]
        answers = await asyncio.gather(
            *[client.infer("abc", inputs, model_version="1.0.0") for _ in range(8)]
        )
        return [answer.as_numpy("y").tolist() for answer in answers]


called = []
ASYNC = {
    "tritonclient.http": {},
    "tritonclient.grpc": {"callback": lambda result, error: called.append(error or result)},
}


def result_of_grpc(_):
    while not called:
        pass
    return called.pop().as_numpy("y").shape[0]


RESULT = {
    "tritonclient.http": lambda future: future.get_result().as_numpy("y").shape[0],
    "tritonclient.grpc": result_of_grpc,
}

if __name__ == "__main__":
    http, grpc, managed = sys.argv[1:]
    print(
        json.dumps(
            {
                "http": over_http(http, managed),
                "grpc": over_grpc(grpc, managed),
                "http.aio": asyncio.run(asynchronously(tritonclient.http.aio, http)),
                "grpc.aio": asyncio.run(asynchronously(tritonclient.grpc.aio, grpc)),
            }
        )
    )
