"""MLflow's scoring server. Arguments: port, ONNX file; the working folder is its to write in."""

import os
import sys
from pathlib import Path

import mlflow.onnx
import onnx

port, artifact = sys.argv[1:3]
mlflow.onnx.save_model(
    onnx.load(artifact),
    "model",
    onnx_execution_providers=["CPUExecutionProvider"],
    onnx_session_options={"intra_op_num_threads": 1},
)
command = [
    "mlflow",
    "models",
    "serve",
    "-m",
    "model",
    "--env-manager",
    "local",
    "-p",
    port,
    "-h",
    "127.0.0.1",
]
os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
os.execv(str(Path(sys.executable).parent / "mlflow"), command)
