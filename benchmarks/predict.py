"""CPU a request of a whole prediction, beside an empty echo on stock uvicorn, in one interleaved run.

    python benchmarks/predict.py [--seconds 1.5] [--rounds 5] [--connections 1,16,64]

The model: 30 float features, gradient boosting with 100 trees. Journal, log role and metrics are on. This
machine is noisy, so what counts is the ratio of two figures measured within the same seconds: each round
runs the echo and then every case, and the table shows medians over the rounds.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx
import numpy as np
from load import Load, cpu_seconds, post, run_load
from rich.console import Console
from rich.table import Table

from phoenix_ml.application.catalogue import Registration, register
from phoenix_ml.application.features import store_features
from phoenix_ml.bootstrap import bootstrap, open_features
from phoenix_ml.domain.models import Stage
from phoenix_ml.settings import load_settings

FEATURES = 30
TREES = 100
ENTITIES = 1000
HERE = Path(__file__).parent


class Case(NamedTuple):
    name: str
    port: int
    requests: list[bytes]
    pid: int


class Measured(NamedTuple):
    load: Load
    cpu_us: float


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def write_model(path: Path) -> None:
    from skl2onnx import to_onnx
    from sklearn.ensemble import GradientBoostingClassifier

    random = np.random.default_rng(7)
    rows = random.normal(size=(2000, FEATURES)).astype(np.float32)
    labels = (rows[:, :5].sum(axis=1) + random.normal(size=2000) > 0).astype(int)
    model = GradientBoostingClassifier(n_estimators=TREES, random_state=7).fit(rows, labels)
    path.write_bytes(to_onnx(model, rows[:1], options={"zipmap": False}, target_opset=17).SerializeToString())


@contextmanager
def running(command: list[str], ready_url: str) -> Iterator[int]:
    """The pid of a server that answers, ended with the block."""
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 30
            while True:
                try:
                    httpx.get(ready_url)
                    break
                except httpx.TransportError:
                    if time.monotonic() > deadline or server.poll() is not None:
                        log.seek(0)
                        raise SystemExit(f"{command} did not start:\n{log.read().decode()}") from None
                    time.sleep(0.05)
            yield server.pid
        finally:
            server.terminate()
            server.wait()


def children_of(pid: int) -> dict[str, int]:
    """The processes under the supervisor by their slot."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rsplit(")", 1)[1].split()[1])
            arguments = (path.parent / "cmdline").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if parent == pid:
            found[arguments[3].decode()] = int(path.parent.name)
    return found


def prepare(data: Path) -> tuple[list[bytes], list[bytes]]:
    """A registered model and stored entities; the bodies that ask by entity, and those with features."""
    import asyncio

    random = np.random.default_rng(8)
    write_model(data / "model.onnx")
    phoenix = bootstrap(load_settings(data=data))
    phoenix.database.upgrade_if_embedded()
    registration = Registration("bench", "1.0.0", Stage.PROD)
    register(
        phoenix.registry, phoenix.artifacts, phoenix.engines, data / "model.onnx", registration, actor="bench"
    )
    phoenix.registry.set_active("bench", "1.0.0", True, "bench")
    names = phoenix.registry.get("bench", "1.0.0").metadata.features
    phoenix.database.close()
    rows = random.normal(size=(ENTITIES, FEATURES)).astype(np.float32).astype(float).round(4).tolist()

    async def store() -> None:
        features = open_features(phoenix.settings)
        await store_features(
            features, {f"e{n:04}": dict(zip(names, row, strict=True)) for n, row in enumerate(rows)}
        )
        await features.close()

    asyncio.run(store())
    by_entity = [json.dumps({"model_id": "bench", "entity_id": f"e{n:04}"}).encode() for n in range(ENTITIES)]
    by_features = [json.dumps({"model_id": "bench", "features": row}).encode() for row in rows]
    return by_entity, by_features


def measure(case: Case, connections: int, seconds: float) -> Measured:
    before = cpu_seconds(case.pid)
    load = run_load(case.port, case.requests, connections, seconds)
    if load.failures:
        raise SystemExit(f"{case.name}: {load.failures} of {load.requests} requests failed")
    return Measured(load, (cpu_seconds(case.pid) - before) / load.requests * 1e6)


def report(
    connections: int, rounds: list[dict[str, Measured]], cases: list[Case], references: dict[str, str]
) -> None:
    table = Table(title=f"{connections} connections", title_justify="left")
    for heading in ("case", "CPU µs/request", "× echo", "requests/s", "p50 ms", "p99 ms"):
        table.add_column(heading, justify="left" if heading == "case" else "right")
    for case in cases:
        measured = [results[case.name] for results in rounds]
        echo = [results[references[case.name]] for results in rounds]
        ratio = statistics.median(m.cpu_us / e.cpu_us for m, e in zip(measured, echo, strict=True))
        table.add_row(
            case.name,
            f"{statistics.median(m.cpu_us for m in measured):.1f}",
            f"{ratio:.2f}",
            f"{statistics.median(m.load.requests / m.load.seconds for m in measured):,.0f}",
            f"{statistics.median(m.load.quantile_ms(0.5) for m in measured):.2f}",
            f"{statistics.median(m.load.quantile_ms(0.99) for m in measured):.2f}",
        )
    Console(width=100).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--connections", default="1,16,64")
    options = parser.parse_args()
    with ExitStack() as stack:
        data = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="phoenix-bench-")))
        by_entity, by_features = prepare(data)
        echo_port, port = free_port(), free_port()
        echo_pid = stack.enter_context(
            running([sys.executable, str(HERE / "echo.py"), str(echo_port)], f"http://127.0.0.1:{echo_port}/")
        )
        serve = [sys.executable, "-m", "phoenix_ml.cli", "serve", "--port", str(port), "--data", str(data)]
        supervisor = stack.enter_context(running(serve, f"http://127.0.0.1:{port}/health/ready"))
        processes = children_of(supervisor)
        api_pid, background_pid = processes["api-0"], processes["background"]
        cases = [
            Case("echo, body of an entity", echo_port, [post("/", b) for b in by_entity], echo_pid),
            Case("echo, body of 30 features", echo_port, [post("/", b) for b in by_features], echo_pid),
            Case("/predict by entity, SQLite", port, [post("/predict", b) for b in by_entity], api_pid),
            Case(
                "/predict, features in the request", port, [post("/predict", b) for b in by_features], api_pid
            ),
        ]
        references = {
            case.name: cases[1].name if "features" in case.name else cases[0].name for case in cases
        }
        print(
            f"{FEATURES} floats × {TREES} trees; {os.cpu_count()} processors; Python {sys.version.split()[0]}"
        )
        for case in cases:
            measure(case, 16, 0.5)  # warm
        background_before = cpu_seconds(background_pid)
        predictions = 0
        for connections in (int(word) for word in options.connections.split(",")):
            rounds = []
            for _ in range(options.rounds):
                results = {case.name: measure(case, connections, options.seconds) for case in cases}
                predictions += sum(results[case.name].load.requests for case in cases[2:])
                rounds.append(results)
            report(connections, rounds, cases, references)
        time.sleep(2)  # the log role catches up
        spent = cpu_seconds(background_pid) - background_before
        print(f"background process: {spent / predictions * 1e6:.1f} CPU µs an event ({predictions:,} logged)")


if __name__ == "__main__":
    main()
