"""LitServe. Arguments: port, ONNX file."""

import sys
from typing import Any

import litserve
import numpy as np
import onnxruntime


class Onnx(litserve.LitAPI):
    def setup(self, device: str) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(sys.argv[2], options)

    def decode_request(self, request: dict[str, Any]) -> Any:
        return np.asarray([request["features"]], dtype=np.float32)

    def predict(self, row: Any) -> Any:
        return self._session.run(None, {"X": row})

    def encode_response(self, found: Any) -> dict[str, Any]:
        label, probabilities = found
        return {"result": int(label[0]), "probabilities": probabilities[0].tolist()}


if __name__ == "__main__":
    server = litserve.LitServer(Onnx(), accelerator="cpu", workers_per_device=1)
    server.run(
        port=int(sys.argv[1]),
        num_api_servers=1,
        log_level="warning",
        generate_client_file=False,
        access_log=False,
    )
