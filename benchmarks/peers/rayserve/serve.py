"""Ray Serve, on a cluster of this machine. Arguments: port, ONNX file."""

import signal
import sys
from typing import Any

import numpy as np
import onnxruntime
import ray
from ray import serve
from starlette.requests import Request


@serve.deployment(max_ongoing_requests=100, ray_actor_options={"num_cpus": 1})
class Bench:
    def __init__(self, artifact: str) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(artifact, options)

    async def __call__(self, request: Request) -> dict[str, Any]:
        row = np.asarray([(await request.json())["features"]], dtype=np.float32)
        label, probabilities = self._session.run(None, {"X": row})
        return {"result": int(label[0]), "probabilities": probabilities[0].tolist()}


if __name__ == "__main__":
    ray.init(num_cpus=2, include_dashboard=False)
    serve.start(
        http_options={"host": "127.0.0.1", "port": int(sys.argv[1])},
        logging_config={"enable_access_log": False},
    )
    serve.run(Bench.bind(sys.argv[2]), route_prefix="/predict")
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    serve.shutdown()
    ray.shutdown()
