"""What the benchmarks start: a model, our servers with features in them, and the services beside."""

import asyncio
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx
import msgspec
import numpy as np
from load import Load, cpu_seconds, local, post, run_load

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from phoenix_server import PhoenixServer
from servers import wait_until

from phoenix_ml.application.features import packed_signatures, store_features
from phoenix_ml.bootstrap import open_features

HERE = Path(__file__).parent
MODEL = "bench"
ENTITIES = 1000


class Case(NamedTuple):
    """Requests to one server, and the processes that serve them."""

    name: str
    port: int
    requests: list[bytes]
    pids: Sequence[int]


class Measured(NamedTuple):
    load: Load
    cpu_us: float

    @property
    def per_second(self) -> float:
        return self.load.requests / self.load.seconds


def measure(case: Case, connections: int, seconds: float, rate: float | None = None) -> Measured:
    """One run. Ends the program when a request fails: figures of failures compare with nothing."""
    before = sum(map(cpu_seconds, case.pids))
    load = run_load(local(case.port), case.requests, connections, seconds, rate)
    if load.failures:
        raise SystemExit(f"{case.name}: of {load.requests} requests failed: {dict(load.errors)}")
    return Measured(load, (sum(map(cpu_seconds, case.pids)) - before) / load.requests * 1e6)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def tree_of(pid: int) -> list[int]:
    """The process and all below it."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rsplit(")", 1)[1].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


@contextmanager
def running(
    command: Sequence[str | Path],
    ready_url: str,
    *,
    limit_s: float = 60,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Iterator[int]:
    """The pid of a server that answers 200, ended with the block. Raises RuntimeError with its log's end."""
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(
            [*map(str, command)], stdout=log, stderr=log, env=environment, cwd=folder, start_new_session=True
        )
        try:
            deadline = time.monotonic() + limit_s
            while not _answers(ready_url):
                if time.monotonic() > deadline or server.poll() is not None:
                    log.seek(0)
                    lines = log.read().decode(errors="replace").strip().splitlines()
                    raise RuntimeError("did not start: " + " | ".join(lines[-6:]))
                time.sleep(0.05)
            yield server.pid
        finally:
            everyone = tree_of(server.pid)
            server.terminate()
            try:
                server.wait(15)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
            for pid in everyone[1:]:
                subprocess.run(["kill", "-9", str(pid)], stderr=subprocess.DEVNULL, check=False)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).is_success
    except httpx.TransportError:
        return False


def write_model(path: Path, features: int = 30, trees: int = 100) -> Path:
    """A gradient boosting classifier of that many float features, as an ONNX file."""
    from skl2onnx import to_onnx
    from sklearn.ensemble import GradientBoostingClassifier

    random = np.random.default_rng(7)
    rows = random.normal(size=(2000, features)).astype(np.float32)
    labels = (rows[:, :5].sum(axis=1) + random.normal(size=2000) > 0).astype(int)
    model = GradientBoostingClassifier(n_estimators=trees, random_state=7).fit(rows, labels)
    path.write_bytes(to_onnx(model, rows[:1], options={"zipmap": False}, target_opset=17).SerializeToString())
    return path


def write_network(path: Path, features: int, hidden: int) -> Path:
    """A classifier with one hidden layer of that many units, as an ONNX file."""
    import onnx_models

    return onnx_models.write(path, onnx_models.network_classifier(features, hidden=hidden))


def rows_of(count: int, features: int) -> list[list[float]]:
    random = np.random.default_rng(8)
    rows: list[list[float]] = random.normal(size=(count, features)).round(4).tolist()
    return rows


def posts(path: str, bodies: Sequence[object]) -> list[bytes]:
    return [post(path, msgspec.json.encode(body)) for body in bodies]


def by_features(rows: Sequence[Sequence[float]], path: str = "/predict") -> list[bytes]:
    return posts(path, [{"model_id": MODEL, "features": row} for row in rows])


def by_entity(count: int = ENTITIES, path: str = "/predict") -> list[bytes]:
    return posts(path, [{"model_id": MODEL, "entity_id": f"e{n:04}"} for n in range(count)])


def prepare(server: PhoenixServer, artifact: Path, rows: Sequence[Sequence[float]]) -> None:
    """The model, registered and active, and the rows as features of entities, packed as we pack them."""
    version = server.register(artifact, MODEL, "1.0.0")
    names = version.metadata.features

    async def store() -> None:
        features = open_features(server.settings, 5000)
        entities = {f"e{n:04}": dict(zip(names, row, strict=True)) for n, row in enumerate(rows)}
        await store_features(features, entities, packed_signatures([version]))
        await features.close()

    asyncio.run(store())


def pss_mib(pid: int) -> float:
    """Memory of a process, with its share of what it has in common with others."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    raise SystemExit(f"/proc/{pid}/smaps_rollup has no Pss")


def serving_pids(server: PhoenixServer) -> list[int]:
    """The API processes and their supervisor."""
    return [server.pid, *(pid for slot, pid in server.pids().items() if slot.startswith("api-"))]


def await_log(server: PhoenixServer, events: int) -> None:
    """Returns when so many events of this start are in the log."""

    def is_done() -> bool:
        text = httpx.get(f"{server.url}/metrics").text
        rows = [line for line in text.splitlines() if line.startswith("phoenix_log_rows_total ")]
        return bool(rows) and float(rows[0].split()[1]) >= events

    wait_until(is_done, 120, f"{events} events are in the log")
