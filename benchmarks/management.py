"""Management while requests come: latencies before and during each kind of change, failures, and memory afterwards.

    python benchmarks/management.py [--connections 64] [--rate N] [--seconds 6] [--every 1] [--weights-mib 16]

A server with one API process answers for a model; each change is made every second meanwhile, by a process
of its own. ``before`` is measured anew before each kind of change, because the machine is noisy. Memory is the PSS of
the API process. The model that comes and goes is a network with so many MiB of weights.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import httpx
from harness import (
    MODEL,
    by_features,
    prepare,
    pss_mib,
    rows_of,
    write_model,
    write_network,
)
from load import Load, local, run_load
from phoenix_server import PhoenixServer
from rich.console import Console
from rich.table import Table

HEAVY = "heavy"
FEATURES = 30
console = Console(width=120)


def load_and_unload(http: httpx.Client) -> None:
    ok(http.post(f"/v2/repository/models/{HEAVY}/load"))
    ok(http.post(f"/v2/repository/models/{HEAVY}/unload"))


def change_version(http: httpx.Client) -> None:
    """The model that is asked moves to another version, and back."""
    for version in ("1.1.0", "1.0.0"):
        ok(http.post(f"/models/{MODEL}/versions/{version}/activate"))
        single = {"strategy": "single", "arms": [{"version": version}]}
        ok(http.put(f"/models/{MODEL}/routing", json=single))
        other = "1.0.0" if version == "1.1.0" else "1.1.0"
        ok(http.post(f"/models/{MODEL}/versions/{other}/deactivate"))


def split_traffic(http: httpx.Client) -> None:
    """A canary is given a share, and gone again."""
    ok(http.post(f"/models/{MODEL}/versions/1.1.0/activate"))
    arms = [
        {"version": "1.0.0", "role": "champion", "weight": 90},
        {"version": "1.1.0", "role": "challenger", "weight": 10},
    ]
    ok(http.put(f"/models/{MODEL}/routing", json={"strategy": "canary", "arms": arms}))
    ok(http.put(f"/models/{MODEL}/routing", json={"strategy": "single", "arms": arms[:1]}))
    ok(http.post(f"/models/{MODEL}/versions/1.1.0/deactivate"))


def promote(http: httpx.Client) -> None:
    """A new version is uploaded and promoted as far as it goes."""
    artifact = ARTIFACT.read_bytes()
    version = f"2.{time.time_ns() // 10**9 % 10**6}.{time.time_ns() % 10**9 // 1000}"
    model = f'{{"id": "{MODEL}", "version": "{version}"}}'
    ok(http.post("/models", files={"artifact": artifact}, data={"model": model}))
    for stage in ("staging", "prod"):
        ok(http.post(f"/models/{MODEL}/versions/{version}/stage", json={"stage": stage}))


ARTIFACT = Path(tempfile.gettempdir()) / "phoenix-management.onnx"
CHANGES: dict[str, Callable[[httpx.Client], None]] = {
    "load and unload, V2": load_and_unload,
    "activate, route, deactivate": change_version,
    "canary and back": split_traffic,
    "upload and promote": promote,
}


def ok(answer: httpx.Response) -> None:
    if not answer.is_success:
        raise SystemExit(f"{answer.request.url}: {answer.status_code} {answer.text}")


def keep_changing(name: str, url: str, seconds: float, every_s: float) -> int:
    """How often the change was made."""
    began_at = time.monotonic()
    times = 0
    with httpx.Client(base_url=url, timeout=60) as http:
        while (now := time.monotonic()) < began_at + seconds:
            if (due := began_at + times * every_s) > now:
                time.sleep(due - now)
            CHANGES[name](http)
            times += 1
    return times


def settled_mib(pid: int) -> float:
    """Once it is the same for two seconds."""
    found = pss_mib(pid)
    while True:
        time.sleep(2)
        if abs(found - (found := pss_mib(pid))) < 1:
            return found


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--connections", type=int, default=64)
    options.add_argument("--rate", type=float, help="requests a second; without, as many as are answered")
    options.add_argument("--seconds", type=float, default=6.0, help="of each run")
    options.add_argument(
        "--every", type=float, default=1.0, help="seconds from change to change; 0 is on end"
    )
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--weights-mib", type=int, default=16)
    asked = options.parse_args()
    rows = rows_of(200, FEATURES)
    with tempfile.TemporaryDirectory() as name, ProcessPoolExecutor(1) as manager:
        folder = Path(name)
        server = PhoenixServer(folder)
        write_model(ARTIFACT, FEATURES)
        prepare(server, ARTIFACT, rows)
        server.register(write_model(folder / "b.onnx", FEATURES, trees=120), MODEL, "1.1.0", activate=False)
        hidden = asked.weights_mib * 1024 * 1024 // 4 // FEATURES
        heavy = write_network(folder / "heavy.onnx", FEATURES, hidden)
        server.register(heavy, HEAVY, "1.0.0", activate=False)
        with server:
            put = partial(
                run_load, local(server.port), by_features(rows), asked.connections, asked.seconds, asked.rate
            )
            put()
            pid = server.pids()["api-0"]
            empty_mib = settled_mib(pid)
            table = Table(
                "change", "times", "p50 ms", "p99 ms", "before", "×", "p99.9 ms", "before", "failed", box=None
            )
            for change in CHANGES:
                runs: list[tuple[Load, Load]] = []
                times = 0
                for _ in range(asked.rounds):
                    before = put()
                    changing = manager.submit(keep_changing, change, server.url, asked.seconds, asked.every)
                    runs.append((before, put()))
                    times += changing.result()
                table.add_row(change, f"{times:,}", *figures(runs))
            console.print(table)
            grown_mib = settled_mib(pid)
            with httpx.Client(base_url=server.url, timeout=60) as http:
                ok(http.post(f"/v2/repository/models/{HEAVY}/load"))
                loaded_mib = settled_mib(pid)
                ok(http.post(f"/v2/repository/models/{HEAVY}/unload"))
                unloaded_mib = settled_mib(pid)
        console.print(
            f"memory of the API process: {empty_mib:.0f} MiB at first, {grown_mib:.0f} after all changes, "
            f"{loaded_mib:.0f} with the network of {asked.weights_mib} MiB, {unloaded_mib:.0f} without it again"
        )
    ARTIFACT.unlink()


def figures(runs: list[tuple[Load, Load]]) -> list[str]:
    def median(quantile: float, which: int) -> float:
        return statistics.median(pair[which].quantile_ms(quantile) for pair in runs)

    failed = sum(pair[0].failures + pair[1].failures for pair in runs)
    ratio = statistics.median(during.quantile_ms(0.99) / before.quantile_ms(0.99) for before, during in runs)
    return [
        f"{median(0.5, 1):.2f}",
        f"{median(0.99, 1):.2f}",
        f"{median(0.99, 0):.2f}",
        f"{ratio:.2f}",
        f"{median(0.999, 1):.2f}",
        f"{median(0.999, 0):.2f}",
        str(failed),
    ]


if __name__ == "__main__":
    main()
