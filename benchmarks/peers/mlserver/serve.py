"""MLServer with a runtime of its own for ONNX. Arguments: port, ONNX file; the working folder is its to write in."""

import json
import os
import sys
from pathlib import Path

port, artifact = int(sys.argv[1]), sys.argv[2]
Path("settings.json").write_text(
    json.dumps({"http_port": port, "grpc_port": port + 1, "metrics_port": port + 2, "debug": False})
)
Path("model-settings.json").write_text(
    json.dumps({"name": "bench", "implementation": "runtime.Onnx", "parameters": {"uri": artifact}})
)
os.environ["PYTHONPATH"] = str(Path(__file__).parent)
os.execv(str(Path(sys.executable).parent / "mlserver"), ["mlserver", "start", "."])
