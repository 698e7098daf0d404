"""Real nginx and Prometheus for tests, on the very files that are deployed (Linux)."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import ssl
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
from servers import HOST, INSTALL_SCRIPT, Server, ServerUnavailable, _tied_to_this_run, free_port

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"


class NginxServer(Server):
    """nginx with `deploy/nginx/nginx.conf`, before API servers on other ports than in the containers."""

    name = "nginx"
    stop_signal = signal.SIGQUIT  # answers what it has begun

    def __init__(self, api_ports: Sequence[int]) -> None:
        super().__init__()
        self.http_port = free_port()
        self._api_ports = api_ports

    @property
    def url(self) -> str:
        """The base URL, HTTPS."""
        return f"https://localhost:{self.port}"

    @property
    def certificate(self) -> Path:
        """The certificate that clients have to trust."""
        assert self._folder is not None
        return self._folder / "conf" / "site" / "certificate.pem"

    def client(self) -> httpx.Client:
        """A client that trusts the server and nobody else."""
        trusted = ssl.create_default_context(cafile=str(self.certificate))
        return httpx.Client(base_url=self.url, verify=trusted, timeout=30)

    def buffered_bodies(self) -> int:
        """How many request bodies it has put into files so far."""
        assert self._folder is not None
        return (
            (self._folder / "server.log")
            .read_text()
            .count("a client request body is buffered to a temporary file")
        )

    def _command(self, folder: Path) -> list[str]:
        files = ["-p", str(folder / "run"), "-c", str(folder / "conf" / "nginx.conf")]
        return [*_tied_to_this_run(), program("nginx", "nginx-light"), *files, "-g", "daemon off;"]

    def _answers(self, folder: Path, pid: int) -> bool:
        written = folder / "run" / "nginx.pid"
        if not written.exists() or written.read_text().strip() != str(pid):
            return False
        try:
            with socket.create_connection((HOST, self.port), timeout=1):
                return True
        except OSError:
            return False

    def _make_folder(self) -> Path:
        folder = super()._make_folder()
        folder.chmod(0o755)  # its workers run as another user than root
        site = folder / "conf" / "site"
        site.mkdir(parents=True)
        (folder / "run").mkdir()
        (folder / "conf" / "nginx.conf").symlink_to(DEPLOY / "nginx" / "nginx.conf")
        for name, changes in self._changes().items():
            text = (DEPLOY / "nginx" / "site" / name).read_text()
            for pattern, replacement in changes:
                text, count = re.subn(pattern, replacement, text, flags=re.MULTILINE)
                assert count == 1, f"{name} has {count} lines like {pattern!r}"
            (site / name).write_text(text)
        make = DEPLOY / "nginx" / "make_certificate.sh"
        subprocess.run([make], env={"PHOENIX_SITE": str(site), "PATH": "/usr/bin:/bin"}, check=True)
        return folder

    def _changes(self) -> Mapping[str, list[tuple[str, str]]]:
        """What the files of the containers' site have to say instead; the options of each line stay."""
        places = [
            (rf"^server api-{number}:8000 resolve ", f"server {HOST}:{port} ")
            for number, port in enumerate(self._api_ports, 1)
        ]
        return {
            "https.conf": [(r"^listen 443 ", f"listen {HOST}:{self.port} ")],
            "http.conf": [
                (r"^listen 80;", f"listen {HOST}:{self.http_port};"),
                (r'https_port "";', f"https_port :{self.port};"),
            ],
            # Debian's nginx cannot follow names yet, and ports here have none.
            "servers.conf": [(r"^resolver .*\n", ""), *places],
        }


class PrometheusServer(Server):
    """Prometheus with `deploy/prometheus/prometheus.yml`, on targets of the caller's.

    They are given by job and scraped more often than in production: `{"phoenix-api": ["127.0.0.1:8000"]}`.
    """

    name = "Prometheus"
    stop_signal = signal.SIGTERM

    def __init__(self, targets: Mapping[str, Sequence[str]]) -> None:
        super().__init__()
        self._targets = targets

    @property
    def url(self) -> str:
        """The base URL."""
        return f"http://{HOST}:{self.port}"

    def get(self, path: str, **parameters: str) -> Any:
        """The data of an answer of its HTTP API. Raises AssertionError with the server's words for a refusal."""
        answered = httpx.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=10).json()
        assert answered["status"] == "success", f"{parameters}: {answered['error']}"
        return answered["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series that an expression has now."""
        found: list[dict[str, Any]] = self.get("query", query=expression)["result"]
        return found

    def _command(self, folder: Path) -> list[str]:
        options = [
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address={HOST}:{self.port}",
        ]
        return [*_tied_to_this_run(), program("prometheus", "prometheus"), *options]

    def _answers(self, folder: Path, pid: int) -> bool:
        try:
            return httpx.get(f"{self.url}/-/ready", timeout=1).status_code == 200
        except httpx.TransportError:
            return False

    def _make_folder(self) -> Path:
        folder = super()._make_folder()
        for name in ("prometheus.yml", "rules.yml"):
            (folder / name).symlink_to(DEPLOY / "prometheus" / name)
        (folder / "targets").mkdir()
        for job, addresses in self._targets.items():
            group = {
                "targets": list(addresses),
                # As long a time-out as the interval allows: a busy machine is not down.
                "labels": {"__scrape_interval__": "2s", "__scrape_timeout__": "2s"},
            }
            (folder / "targets" / f"{job}.yml").write_text(json.dumps([group]))
        return folder


def program(name: str, package: str) -> str:
    """The path of an installed program. Raises ServerUnavailable, saying how to get it."""
    # Debian keeps nginx where only root looks.
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")
    if found is None:
        raise ServerUnavailable(
            f"{name} is not installed, and these tests run a real one. Run {INSTALL_SCRIPT}, or install the Debian "
            f"package {package}."
        )
    return found
