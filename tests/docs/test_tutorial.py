"""The tutorial, executed as a reader would: its blocks in order, in an empty folder, against a real server."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from servers import free_port

_TUTORIAL = Path(__file__).parents[2] / "docs" / "tutorial" / "first-model.md"
_URL = "http://127.0.0.1:8000"
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_START_DEADLINE_S = 60.0
_LOG_DEADLINE_S = 30.0

pytestmark = [
    pytest.mark.system,
]


class Reader:
    """Follows the tutorial in one folder. Blocks marked ``sh`` (the installation) are left out."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._port = free_port()
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PHOENIX_")}
        here = str(Path(sys.executable).parent)
        self._environment = kept | {"PATH": f"{here}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "200"}
        self._server: subprocess.Popen[bytes] | None = None
        self.last_output = ""

    def follow(self, language: str, block: str) -> None:
        if language == "python":
            name = re.match(r"# (\S+\.py)\n", block)
            assert name, "a Python block begins with the name of its file"
            (self._folder / name[1]).write_text(block)
        elif language == "console":
            for command, shown in _commands(block):
                self._compare(command, shown)
        elif block.startswith("phoenix-ml serve"):
            self._serve(block)
        elif language == "bash":
            self.last_output = self._run(block)

    def stop_server(self) -> int:
        """The server's exit code after Ctrl-C."""
        assert self._server is not None, "the tutorial starts a server"
        self._server.send_signal(signal.SIGINT)
        return self._server.wait(60)

    def close(self) -> None:
        if self._server is not None and self._server.poll() is None:
            self._server.terminate()
            self._server.wait(60)

    def _run(self, script: str) -> str:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script.replace(_URL, f"http://127.0.0.1:{self._port}")],
            cwd=self._folder,
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, f"{script}\n{done.stdout}{done.stderr}"
        return done.stdout

    def _compare(self, command: str, shown: str) -> None:
        # What was answered takes a moment to get into the log.
        deadline = time.monotonic() + (_LOG_DEADLINE_S if command.startswith("phoenix-ml predictions") else 0)
        pattern = _pattern(shown)
        while True:
            printed = _squeezed(self._run(command))
            if re.fullmatch(pattern, printed):
                return
            if time.monotonic() >= deadline:
                pytest.fail(f"$ {command}\nthe tutorial shows\n{_squeezed(shown)}\nit prints\n{printed}")
            time.sleep(0.2)

    def _serve(self, command: str) -> None:
        words = [*command.split(), "--port", str(self._port)]
        log = self._folder / "serve.log"
        with log.open("wb") as output:
            self._server = subprocess.Popen(
                words, cwd=self._folder, env=self._environment, stdout=output, stderr=output
            )
        deadline = time.monotonic() + _START_DEADLINE_S
        while True:
            try:
                if httpx.get(f"http://127.0.0.1:{self._port}/health/ready").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            alive = self._server.poll() is None and time.monotonic() < deadline
            assert alive, f"the server did not start:\n{log.read_text()}"
            time.sleep(0.05)


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    one = Reader(tmp_path)
    yield one
    one.close()


def test_the_tutorial_does_what_it_says(reader: Reader) -> None:
    """Every block runs, every console block prints what it shows, and Ctrl-C ends the server with 0."""
    blocks = _BLOCK.findall(_TUTORIAL.read_text())
    assert [language for language, _ in blocks].count("console") >= 5
    for language, block in blocks:
        if language != "sh":
            reader.follow(language, block)
        if "/feedback" in block:
            assert reader.last_output == '{"accepted":1}'
    assert reader.stop_server() == 0


def _commands(block: str) -> list[tuple[str, str]]:
    """Each command of a console block with the output that is shown for it."""
    parts = re.split(r"^\$ (.*)\n", block, flags=re.MULTILINE)
    assert not parts[0], "a console block begins with a command"
    return list(zip(parts[1::2], parts[2::2], strict=True))


def _squeezed(text: str) -> str:
    """Without the spaces that only align columns."""
    return "\n".join(" ".join(line.split()) for line in text.strip().splitlines())


def _pattern(shown: str) -> str:
    """The expression for an output where ``…`` stands for anything on its line."""
    return re.escape(_squeezed(shown)).replace("…", r"[^\n]*")
