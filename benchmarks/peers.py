"""Other model servers with the same model, each beside ours: CPU a request over all processes, requests a second.

    python benchmarks/peers.py [NAME ...] [--seconds 2] [--rounds 3] [--connections 16]

Each is installed in a virtual environment of its own (benchmarks/.venvs), started as its documentation says with
one worker and ONNX Runtime with one thread, and asked by its own protocol with 30 features in the body. One at a
time, in rounds that also run our server and the echo. What does not install or start is skipped, and said to be.
"""

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import onnxruntime
from harness import (
    HERE,
    MODEL,
    Case,
    Measured,
    await_log,
    by_features,
    free_port,
    measure,
    posts,
    prepare,
    rows_of,
    running,
    serving_pids,
    tree_of,
    write_model,
)
from phoenix_server import PhoenixServer
from rich.console import Console
from rich.table import Table
from venvs import NotInstalled, python_of

FEATURES = 30
START_LIMIT_S = 150


class Peer(NamedTuple):
    title: str
    path: str
    body: Callable[[list[float]], Any]
    ready: str


def open_inference(row: list[float]) -> Any:
    """The body of the Open Inference Protocol."""
    return {"inputs": [{"name": "X", "shape": [1, len(row)], "datatype": "FP32", "data": row}]}


def plain(row: list[float]) -> Any:
    return {"features": row}


V2 = f"/v2/models/{MODEL}"
PEERS = {
    "mlserver": Peer("MLServer", f"{V2}/infer", open_inference, f"{V2}/ready"),
    "kserve": Peer("KServe", f"{V2}/infer", open_inference, f"{V2}/ready"),
    "bentoml": Peer("BentoML", "/predict", plain, "/readyz"),
    "litserve": Peer("LitServe", "/predict", plain, "/health"),
    "rayserve": Peer("Ray Serve", "/predict", plain, "/-/healthz"),
    "mlflow": Peer("MLflow", "/invocations", lambda row: {"inputs": [row]}, "/ping"),
    "pytriton": Peer("PyTriton", f"{V2}/infer", open_inference, f"{V2}/ready"),
}


class Skipped(Exception):
    """Why there are no figures."""


def numbers_in(answer: Any) -> Iterator[float]:
    if isinstance(answer, dict):
        answer = list(answer.values())
    if isinstance(answer, list):
        for part in answer:
            yield from numbers_in(part)
    elif isinstance(answer, (int, float)):
        yield float(answer)


def check_answer(url: str, body: Any, expected: float) -> None:
    """The answer must hold the model's probability, or the figures would be of something else."""
    answer = httpx.post(url, json=body, timeout=30)
    if not answer.is_success or not any(abs(n - expected) < 1e-4 for n in numbers_in(answer.json())):
        raise Skipped(f"it answers {answer.status_code} {answer.text[:300]}")


def compare(
    name: str, ours: Case, echo: Case, after_ours: Callable[[Measured], None], artifact: Path, options: Any
) -> list[list[Measured]]:
    """Rounds of echo, ours and the peer."""
    peer = PEERS[name]
    folder = HERE / "peers" / name
    rows = rows_of(1000, FEATURES)
    probabilities = onnxruntime.InferenceSession(str(artifact)).run(None, {"X": rows[:1]})[1]
    with ExitStack() as stack:
        try:
            python = python_of(name, folder / "requirements.txt", 300)
        except NotInstalled as exc:
            raise Skipped(str(exc)) from exc
        port = free_port()
        own = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f"phoenix-{name}-")))
        url = f"http://127.0.0.1:{port}"
        command: list[str | Path] = [python, folder / "serve.py", str(port), artifact]
        environment = dict(os.environ)
        environment.pop("PYTHONPATH", None)
        try:
            pid = stack.enter_context(
                running(command, url + peer.ready, limit_s=START_LIMIT_S, environment=environment, folder=own)
            )
        except RuntimeError as exc:
            raise Skipped(str(exc)) from exc
        check_answer(url + peer.path, peer.body(rows[0]), float(probabilities[0][1]))
        requests = posts(peer.path, [peer.body(row) for row in rows])
        # Some start their workers with the first requests.
        measure(Case(peer.title, port, requests, [pid]), options.connections, 2)
        case = Case(peer.title, port, requests, tree_of(pid))
        rounds = []
        for _ in range(options.rounds):
            results = [measure(one, options.connections, options.seconds) for one in (echo, ours)]
            after_ours(results[1])
            rounds.append([*results, measure(case, options.connections, options.seconds)])
        return rounds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", choices=[*PEERS, []], metavar="NAME", help=", ".join(PEERS))
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--connections", type=int, default=16)
    options = parser.parse_args()
    table = Table("server", "CPU µs/request", "÷ ours", "requests/s", "p99 ms", "ours: µs", "echo: µs")
    console = Console(width=130)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="phoenix-bench-")))
        artifact = write_model(folder / "model.onnx", FEATURES)
        rows = rows_of(1000, FEATURES)
        server = PhoenixServer(folder / "ours")
        prepare(server, artifact, rows)
        stack.enter_context(server)
        ours = Case("ours", server.port, by_features(rows), serving_pids(server))
        echo_port = free_port()
        echo_pid = stack.enter_context(
            running([sys.executable, HERE / "echo.py", str(echo_port)], f"http://127.0.0.1:{echo_port}/")
        )
        echo = Case("echo", echo_port, by_features(rows, "/"), [echo_pid])
        events = 0

        def after_ours(measured: Measured) -> None:
            nonlocal events
            events += measured.load.requests
            await_log(server, events)

        after_ours(measure(ours, options.connections, 1))
        print(f"load before: {os.getloadavg()[0]:.2f}")
        for name in options.names or PEERS:
            print(f"{PEERS[name].title} …", file=sys.stderr, flush=True)
            try:
                rounds = compare(name, ours, echo, after_ours, artifact, options)
            except (Skipped, SystemExit) as exc:
                console.print(f"SKIPPED {PEERS[name].title}: {exc}", markup=False, style="bold red")
                continue
            of_echo, of_ours, of_peer = zip(*rounds, strict=True)
            ratio = statistics.median(p.cpu_us / o.cpu_us for p, o in zip(of_peer, of_ours, strict=True))
            table.add_row(
                PEERS[name].title,
                f"{statistics.median(m.cpu_us for m in of_peer):,.0f}",
                f"{ratio:.1f}",
                f"{statistics.median(m.per_second for m in of_peer):,.0f}",
                f"{statistics.median(m.load.quantile_ms(0.99) for m in of_peer):.1f}",
                f"{statistics.median(m.cpu_us for m in of_ours):.1f}",
                f"{statistics.median(m.cpu_us for m in of_echo):.1f}",
            )
    console.print(table)


if __name__ == "__main__":
    main()
