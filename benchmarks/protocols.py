"""The Open Inference Protocol beside an empty echo, MLServer, and an empty gRPC server, in one interleaved run.

    python benchmarks/protocols.py [--seconds 2] [--rounds 5] [--connections 16,64] [--trees 100] [--no-mlserver]

REST: one row of 30 floats in JSON, and 64 rows as raw bytes; the echo is uvicorn's with the same bodies, CPU is that of
all API processes a request. gRPC: one row, by NVIDIA's perf_analyzer; the echo is grpc.aio that answers a constant.
Ours puts every row on record. What counts is the ratio of two figures of the same round; the tables show medians.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import numpy as np
from harness import (
    HERE,
    MODEL,
    Case,
    Measured,
    await_log,
    free_port,
    measure,
    rows_of,
    running,
    serving_pids,
    tree_of,
    write_model,
)
from load import cpu_seconds, post
from peers import START_LIMIT_S
from perf_analyzer import perf_analyzer
from phoenix_server import PhoenixServer
from rich.console import Console
from rich.table import Table
from venvs import NotInstalled, python_of

from phoenix_ml.infrastructure.grpc import inference_pb2 as pb

FEATURES = 30
BATCH = 64
REQUESTS = 200
INFER = f"/v2/models/{MODEL}/infer"
ECHO_JSON, ECHO_RAW = "echo, body of one row", "echo, body of 64 × 30 raw"
OURS_JSON, OURS_RAW = "ours, JSON, one row", "ours, raw, 64 × 30"
# It takes no raw tensors over REST.
PEER_JSON, PEER_RAW = "MLServer, JSON, one row", "MLServer, JSON, 64 × 30"
GRPC_SERVICE = "/inference.GRPCInferenceService/"


def json_request(path: str, *rows: list[float]) -> bytes:
    data = [number for row in rows for number in row]
    tensor = {"name": "X", "shape": [len(rows), FEATURES], "datatype": "FP32", "data": data}
    return post(path, json.dumps({"inputs": [tensor]}).encode())


def raw_request(path: str, rows: list[list[float]]) -> bytes:
    data = np.array(rows, "<f4").tobytes()
    size = {"binary_data_size": len(data)}
    tensor = {"name": "X", "shape": [len(rows), FEATURES], "datatype": "FP32", "parameters": size}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    made = post(path, head + data)
    return made.replace(b"\r\n", b"\r\nInference-Header-Content-Length: %d\r\n" % len(head), 1)


class Grpc(NamedTuple):
    """What perf_analyzer has seen of a server, and what the server's processes took."""

    per_second: float
    cpu_share: float


def measure_grpc(port: int, pids: list[int], concurrency: int, folder: Path) -> Grpc:
    analyzer = perf_analyzer()
    report = folder / "report.csv"
    command = [str(analyzer.program), "-m", MODEL, "-i", "grpc", "-u", f"127.0.0.1:{port}"]
    # Windows of time: with --request-count it counts by whole seconds, and 1,001 ms are two.
    command += ["--concurrency-range", str(concurrency), "-f", str(report), "--measurement-interval", "1500"]
    command += ["--stability-percentage", "999", "--max-trials", "3"]
    before, began_at = sum(map(cpu_seconds, pids)), time.monotonic()
    done = subprocess.run(
        command,
        env=analyzer.environment,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    if done.returncode or "error" in done.stdout.lower():
        raise SystemExit(f"perf_analyzer: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    share = (sum(map(cpu_seconds, pids)) - before) / (time.monotonic() - began_at)
    return Grpc(float(report.read_text().splitlines()[1].split(",")[1]), share)


def answers_of(port: int, row: list[float]) -> dict[str, str]:
    """Our own answers, for the echo to repeat."""
    asked = pb.ModelInferRequest(model_name=MODEL)
    asked.inputs.add(name="X", datatype="FP32", shape=[1, FEATURES])
    asked.raw_input_contents.append(np.array(row, "<f4").tobytes())
    requests: dict[str, Any] = {
        "ModelMetadata": pb.ModelMetadataRequest(name=MODEL),
        "ModelConfig": pb.ModelConfigRequest(name=MODEL),
        "ModelInfer": asked,
    }
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        answers = {
            name: channel.unary_unary(GRPC_SERVICE + name)(request.SerializeToString()).hex()
            for name, request in requests.items()
        }
    # Without statistics: perf_analyzer would miss its own requests in constant ones.
    return answers | {"ServerMetadata": pb.ServerMetadataResponse(name="echo").SerializeToString().hex()}


def start_mlserver(stack: ExitStack, artifact: Path) -> tuple[int, list[int]]:
    folder = HERE / "peers" / "mlserver"
    port = free_port()
    own = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="phoenix-mlserver-")))
    command: list[str | Path] = [python_of("mlserver", folder / "requirements.txt"), folder / "serve.py"]
    ready = f"http://127.0.0.1:{port}/v2/models/{MODEL}/ready"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    pid = stack.enter_context(
        running(
            [*command, str(port), artifact], ready, limit_s=START_LIMIT_S, environment=environment, folder=own
        )
    )
    return port, tree_of(pid)


def report(title: str, rounds: list[dict[str, Measured]]) -> None:
    table = Table(title=title, title_justify="left")
    for heading in ("case", "CPU µs/request", "× echo", "MLServer ÷ it", "requests/s", "p50 ms", "p99 ms"):
        table.add_column(heading, justify="left" if heading == "case" else "right", no_wrap=True)
    for name in rounds[0]:
        is_raw = "64" in name
        echo, peer = (ECHO_RAW, PEER_RAW) if is_raw else (ECHO_JSON, PEER_JSON)
        measured = [results[name] for results in rounds]

        def median(of: Callable[[dict[str, Measured]], float]) -> str:
            return f"{statistics.median(of(results) for results in rounds):.2f}"

        table.add_row(
            name,
            f"{statistics.median(m.cpu_us for m in measured):.1f}",
            median(lambda r, name=name, echo=echo: r[name].cpu_us / r[echo].cpu_us),  # type: ignore[misc]
            median(lambda r, name=name, peer=peer: r[peer].cpu_us / r[name].cpu_us)  # type: ignore[misc]
            if peer in rounds[0]
            else "",
            f"{statistics.median(m.per_second for m in measured):,.0f}",
            f"{statistics.median(m.load.quantile_ms(0.5) for m in measured):.2f}",
            f"{statistics.median(m.load.quantile_ms(0.99) for m in measured):.2f}",
        )
    Console(width=130).print(table)


def report_grpc(concurrency: int, rounds: list[tuple[Grpc, Grpc]]) -> None:
    table = Table(
        "case",
        "requests/s",
        "× echo",
        "server's share of a processor",
        title=f"gRPC, {concurrency} at a time",
    )
    for place, name in ((0, "grpc.aio echo"), (1, "ours, one row")):
        table.add_row(
            name,
            f"{statistics.median(both[place].per_second for both in rounds):,.0f}",
            f"{statistics.median(both[place].per_second / both[0].per_second for both in rounds):.2f}",
            f"{statistics.median(both[place].cpu_share for both in rounds):.2f}",
        )
    Console(width=130).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--connections", default="16,64")
    parser.add_argument("--trees", type=int, default=100)
    parser.add_argument("--no-mlserver", action="store_true")
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="phoenix-bench-")))
        artifact = write_model(folder / "model.onnx", FEATURES, options.trees)
        server = PhoenixServer(folder / "ours", grpc_port=free_port(), batch_limit=1000)
        server.register(artifact, MODEL, "1.0.0")
        stack.enter_context(server)
        echo_port, grpc_echo_port = free_port(), free_port()
        echo = [sys.executable, str(HERE / "echo.py"), str(echo_port)]
        echo_pid = stack.enter_context(running(echo, f"http://127.0.0.1:{echo_port}/"))
        rows = rows_of(1000, FEATURES)
        batches = [rows[i : i + BATCH] for i in range(0, 1000 - BATCH, BATCH)]

        def both(path: str) -> tuple[list[bytes], list[bytes]]:
            return [json_request(path, row) for row in rows[:REQUESTS]], [
                raw_request(path, batch) for batch in batches
            ]

        of_echo, of_ours = both("/"), both(INFER)
        pids = serving_pids(server)
        cases = [
            Case(ECHO_JSON, echo_port, of_echo[0], [echo_pid]),
            Case(ECHO_RAW, echo_port, of_echo[1], [echo_pid]),
            Case(OURS_JSON, server.port, of_ours[0], pids),
            Case(OURS_RAW, server.port, of_ours[1], pids),
        ]
        if not options.no_mlserver:
            try:
                peer_port, peer_pids = start_mlserver(stack, artifact)
            except (NotInstalled, RuntimeError) as exc:
                print(f"no MLServer: {exc}")
            else:
                cases += [
                    Case(PEER_JSON, peer_port, of_ours[0], peer_pids),
                    Case(PEER_RAW, peer_port, [json_request(INFER, *b) for b in batches], peer_pids),
                ]
        print(
            f"{FEATURES} floats × {options.trees} trees; {os.cpu_count()} processors; "
            f"Python {sys.version.split()[0]}; load before: {os.getloadavg()[0]:.2f}"
        )
        made = 0

        for connections in map(int, options.connections.split(",")):
            rounds: list[dict[str, Measured]] = []
            for number in range(options.rounds + 1):
                results = {}
                for case in cases:
                    results[case.name] = measured = measure(case, connections, options.seconds)
                    if case.port == server.port:
                        made += measured.load.requests * (BATCH if case.name == OURS_RAW else 1)
                        await_log(server, made)
                if number:  # the first warms up
                    rounds.append(results)
            report(f"REST, {connections} connections", rounds)
        echo = [sys.executable, str(HERE / "grpc_echo.py"), str(grpc_echo_port)]
        echo.append(json.dumps(answers_of(server.settings.grpc_port, rows[0])))
        grpc_echo = subprocess.Popen(echo)
        stack.callback(grpc_echo.wait)
        stack.callback(grpc_echo.terminate)
        with grpc.insecure_channel(f"127.0.0.1:{grpc_echo_port}") as channel:
            grpc.channel_ready_future(channel).result(30)
        for concurrency in (1, 16):
            pairs = []
            for number in range(options.rounds + 1):
                pair = (
                    measure_grpc(grpc_echo_port, [grpc_echo.pid], concurrency, folder),
                    measure_grpc(server.settings.grpc_port, pids, concurrency, folder),
                )
                if number:
                    pairs.append(pair)
            report_grpc(concurrency, pairs)


if __name__ == "__main__":
    main()
