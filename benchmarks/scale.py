"""How the platform grows: with API processes, registered models, features and open connections; memory and start.

    python benchmarks/scale.py [--parts workers,models,features,connections,demo] [--seconds 2] [--rounds 3]

CPU is that of the API processes and their supervisor, memory the PSS of one API process. Cases that are compared
run in turn, round after round; figures are medians. ``models`` registers 1,000 files, which takes some minutes.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import httpx
import onnx
from harness import (
    ENTITIES,
    Case,
    Measured,
    await_log,
    by_entity,
    by_features,
    free_port,
    measure,
    posts,
    prepare,
    pss_mib,
    rows_of,
    serving_pids,
    write_model,
)
from load import local, run_load
from phoenix_server import PhoenixServer
from rich.console import Console
from rich.table import Table

from phoenix_ml.application.catalogue import Registration, register
from phoenix_ml.domain.models import Stage

CONNECTIONS = 2000
MODELS = (1, 10, 100, 1000)
console = Console(width=120)


def in_turn(
    cases: Sequence[tuple[PhoenixServer, Case]], connections: int, seconds: float, rounds: int
) -> list[list[Measured]]:
    """The runs of each case, after one to warm up; the log catches up after each run."""
    events = {server.port: 0 for server, _ in cases}
    found: list[list[Measured]] = [[] for _ in cases]
    for number in range(rounds + 1):
        for (server, case), runs in zip(cases, found, strict=True):
            runs.append(measure(case, connections, seconds if number else 1))
            events[server.port] += runs[-1].load.requests
            await_log(server, events[server.port])
    return [runs[1:] for runs in found]


def figures(runs: Sequence[Measured]) -> tuple[str, str, str]:
    """CPU µs a request, requests a second, p99."""
    return (
        f"{statistics.median(run.cpu_us for run in runs):.1f}",
        f"{statistics.median(run.per_second for run in runs):,.0f}",
        f"{statistics.median(run.load.quantile_ms(0.99) for run in runs):.1f}",
    )


def started(server: PhoenixServer, times: int = 3) -> str:
    """Seconds from the command to ready, the median of some starts; the server runs afterwards."""
    took = []
    for number in range(times):
        if number:
            server.stop()
        begun = time.perf_counter()
        server.start()
        took.append(time.perf_counter() - begun)
    return f"{statistics.median(took):.2f}"


def workers(folder: Path, seconds: float, rounds: int) -> Table:
    artifact, rows = write_model(folder / "model.onnx"), rows_of(ENTITIES, 30)
    table = Table("API processes", "CPU µs/request", "requests/s", "p99 ms", box=None)
    with ExitStack() as stack:
        cases = []
        for count in (1, 2):
            server = PhoenixServer(folder / f"workers-{count}", workers=count)
            prepare(server, artifact, rows)
            stack.enter_context(server)
            cases.append((server, Case(str(count), server.port, by_features(rows), serving_pids(server))))
        for (_, case), runs in zip(cases, in_turn(cases, 64, seconds, rounds), strict=True):
            table.add_row(case.name, *figures(runs))
    return table


def models(folder: Path, seconds: float, rounds: int) -> Table:
    graph = onnx.load(write_model(folder / "model.onnx", trees=185))
    rows = rows_of(max(MODELS), 30)
    headings = ("models", "kB each", "registering s", "start s", "PSS MiB", "CPU µs/request", "requests/s")
    table = Table(*headings, "p99 ms", box=None)
    for count in MODELS:
        server = PhoenixServer(folder / f"models-{count}")
        begun = time.perf_counter()
        with server.opened() as phoenix:
            for number in range(count):
                graph.doc_string = f"number {number}"  # or all would be one file in the artifact store
                artifact = folder / "one.onnx"
                artifact.write_bytes(graph.SerializeToString())
                registration = Registration(f"bench-{number}", "1.0.0", Stage.DEV)
                register(
                    phoenix.registry,
                    phoenix.artifacts,
                    phoenix.engines,
                    artifact,
                    registration,
                    actor="bench",
                )
                phoenix.registry.set_active(f"bench-{number}", "1.0.0", True, "bench")
        registering = time.perf_counter() - begun
        starting = started(server, 3 if count < 1000 else 1)
        try:
            bodies = [{"model_id": f"bench-{n % count}", "features": row} for n, row in enumerate(rows)]
            case = Case(str(count), server.port, posts("/predict", bodies), serving_pids(server))
            (runs,) = in_turn([(server, case)], 16, seconds, rounds)
            pss = pss_mib(server.pids()["api-0"])
        finally:
            server.stop()
        size = f"{artifact.stat().st_size / 1000:.0f}"
        table.add_row(f"{count:,}", size, f"{registering:.0f}", starting, f"{pss:.0f}", *figures(runs))
        console.print(f"  {count} models measured")
    return table


def features(folder: Path, seconds: float, rounds: int) -> Table:
    table = Table("features", "from", "CPU µs/request", "requests/s", "p99 ms", box=None)
    with ExitStack() as stack:
        cases = []
        for width in (4, 30, 300):
            server = PhoenixServer(folder / f"features-{width}")
            rows = rows_of(ENTITIES, width)
            prepare(server, write_model(folder / "model.onnx", width), rows)
            stack.enter_context(server)
            pids = serving_pids(server)
            cases.append((server, Case(f"{width} request", server.port, by_features(rows), pids)))
            cases.append((server, Case(f"{width} SQLite", server.port, by_entity(), pids)))
        for (_, case), runs in zip(cases, in_turn(cases, 16, seconds, rounds), strict=True):
            table.add_row(*case.name.split(), *figures(runs))
    return table


def connections(folder: Path, seconds: float, _: int) -> Table:
    rows = rows_of(ENTITIES, 30)
    server = PhoenixServer(folder / "connections")
    prepare(server, write_model(folder / "model.onnx"), rows)
    with server:
        api = server.pids()["api-0"]
        run_load(local(server.port), by_features(rows), 16, 2)
        before, peak, stopped = pss_mib(api), 0.0, threading.Event()

        def watch() -> None:
            nonlocal peak
            while not stopped.wait(0.2):
                peak = max(peak, pss_mib(api))

        watcher = threading.Thread(target=watch)
        watcher.start()
        # A connection ends with an answer, or as an error: without errors each was answered.
        load = run_load(local(server.port), by_features(rows), CONNECTIONS, max(seconds, 5))
        stopped.set()
        watcher.join()
    headings = (
        "connections",
        "answers",
        "errors",
        "requests/s",
        "p50 ms",
        "p99 ms",
        "PSS MiB before",
        "most",
    )
    table = Table(*headings, box=None)
    times = [f"{load.quantile_ms(q):.0f}" for q in (0.5, 0.99)]
    counts = [f"{CONNECTIONS:,}", f"{load.requests:,}", str(dict(load.errors) or 0)]
    table.add_row(*counts, f"{load.requests / load.seconds:,.0f}", *times, f"{before:.0f}", f"{peak:.0f}")
    return table


def demo(folder: Path, _: float, __: int) -> Table:
    """The two models of `phoenix-ml demo`, served by one API process."""
    data = folder / "demo" / "data"
    command = [sys.executable, "-m", "phoenix_ml.cli", "demo", "--exit", "--data", str(data)]
    subprocess.run([*command, "--port", str(free_port())], check=True, capture_output=True, cwd=folder)
    server = PhoenixServer(folder / "demo")
    starting = started(server)
    try:
        fresh = pss_mib(server.pids()["api-0"])
        body = {"model_id": "credit-risk", "entity_id": "cust_0001"}
        httpx.post(f"{server.url}/predict", json=body).raise_for_status()
        run_load(local(server.port), posts("/predict", [body]), 16, 5)
        table = Table(
            "start s", "PSS MiB of the API process", "after load", "background", "supervisor", box=None
        )
        pids = server.pids()
        after = [pids["api-0"], pids["background"], server.pid]
        table.add_row(starting, f"{fresh:.0f}", *(f"{pss_mib(pid):.0f}" for pid in after))
    finally:
        server.stop()
    return table


PARTS = {
    "workers": workers,
    "models": models,
    "features": features,
    "connections": connections,
    "demo": demo,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    names = options.parts.split(",")
    if unknown := set(names) - PARTS.keys():
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * CONNECTIONS + 1000
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard), hard))
    print(
        f"{os.cpu_count()} processors; Python {sys.version.split()[0]}; load before: {os.getloadavg()[0]:.2f}"
    )
    for name in names:
        with tempfile.TemporaryDirectory(prefix="phoenix-bench-") as folder:
            table = PARTS[name](Path(folder), options.seconds, options.rounds)
        console.rule(name, align="left")
        console.print(table)


if __name__ == "__main__":
    main()
