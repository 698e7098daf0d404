"""BentoML. Arguments: port, ONNX file."""

import os
import sys
from pathlib import Path

port, artifact = sys.argv[1:3]
os.environ |= {"ARTIFACT": artifact, "BENTOML_DO_NOT_TRACK": "true"}
command = ["bentoml", "serve", "service:Bench", "--port", port, "--host", "127.0.0.1"]
os.execv(
    str(Path(sys.executable).parent / "bentoml"), [*command, "--working-dir", str(Path(__file__).parent)]
)
