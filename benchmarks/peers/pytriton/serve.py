"""PyTriton: NVIDIA Triton with a Python function behind it. Arguments: port, ONNX file."""

import os
import sys
import sysconfig
from typing import Any

import numpy as np
import onnxruntime
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[2], options)
width = session.get_inputs()[0].shape[1]


@batch
def infer(X: Any) -> dict[str, Any]:  # noqa: N803 - named as the model's input
    label, probabilities = session.run(None, {"X": X})
    return {"label": label.reshape(-1, 1), "probabilities": probabilities}


if __name__ == "__main__":
    port = int(sys.argv[1])
    # Or Triton's stub finds another Python's library than the one whose modules it imports.
    os.environ["LD_LIBRARY_PATH"] = sysconfig.get_config_var("LIBDIR")
    config = TritonConfig(http_address="127.0.0.1", http_port=port, grpc_port=port + 1, metrics_port=port + 2)
    with Triton(config=config) as triton:
        triton.bind(
            model_name="bench",
            infer_func=infer,
            inputs=[Tensor(name="X", dtype=np.float32, shape=(width,))],
            outputs=[
                Tensor(name="label", dtype=np.int64, shape=(1,)),
                Tensor(name="probabilities", dtype=np.float32, shape=(-1,)),
            ],
            config=ModelConfig(max_batch_size=64, batcher=DynamicBatcher()),
        )
        triton.serve()
