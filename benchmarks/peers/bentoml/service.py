"""The service as BentoML's documentation writes it."""

import os
from typing import Any

import bentoml
import numpy as np
import onnxruntime


@bentoml.service(workers=1)
class Bench:
    def __init__(self) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(os.environ["ARTIFACT"], options)

    @bentoml.api
    def predict(self, features: list[float]) -> dict[str, Any]:
        row = np.asarray([features], dtype=np.float32)
        label, probabilities = self._session.run(None, {"X": row})
        return {"result": int(label[0]), "probabilities": probabilities[0].tolist()}
