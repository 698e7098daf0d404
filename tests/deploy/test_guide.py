"""The guide to Compose: its requests, typed as they stand there, against nginx and a real server."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import onnx_models
import pytest
from deploy_servers import ROOT, NginxServer
from phoenix_server import PhoenixServer
from traffic import await_logged

GUIDE = (ROOT / "docs" / "how-to" / "deploy-with-compose.md").read_text()
# Blocks marked `sh` are run; those without a mark need a container engine.
FIRST, LATER = re.findall(r"^```sh\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)


@pytest.mark.system
def test_the_requests_of_the_guide_work(tmp_path: Path) -> None:
    """From an empty catalogue to a prediction over HTTPS that is on record."""
    onnx_models.write(tmp_path / "iris.onnx", onnx_models.binary_classifier(4))
    with PhoenixServer(tmp_path / "api-1") as phoenix, NginxServer([phoenix.port] * 2) as nginx:

        def type_in(script: str) -> str:
            script = script.replace("https://localhost/", f"{nginx.url}/")
            script = script.replace("deploy/nginx/site/certificate.pem", str(nginx.certificate))
            # Aliases are for people who type.
            command = ["bash", "-O", "expand_aliases", "-euo", "pipefail", "-c", f"eval {_quote(script)}"]
            done = subprocess.run(
                command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
            )
            assert done.returncode == 0, done.stdout + done.stderr
            return done.stdout

        answered = type_in(FIRST)
        prediction_id = re.findall(r'"prediction_id":"([\w-]+)"', answered)
        assert len(prediction_id) == 1
        with phoenix.opened() as opened:
            await_logged(opened, "iris", set(prediction_id))
        shown = json.loads(type_in(FIRST.splitlines()[0] + "\n" + LATER))

    assert [item["prediction_id"] for item in shown["items"]] == prediction_id


def _quote(script: str) -> str:
    # An alias holds from the line after its own, and `eval` reads line by line.
    return "'" + script.replace("'", "'\\''") + "'"
