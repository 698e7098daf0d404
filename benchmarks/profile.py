"""Where the microseconds of a prediction go: each step by itself, in this process, without HTTP.

    python benchmarks/profile.py [--rounds 7] [--calls 4000] [--perf]

The model: 30 float features, gradient boosting with 100 trees. CPU µs a request by ``time.process_time()``, the
least of all rounds, in which the steps take turns; what the measuring loop itself takes is taken off. ``--perf``
instead records a server under load, with perf or py-spy, whichever is there.
"""

import argparse
import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import uvloop
from harness import ENTITIES, MODEL, by_features, prepare, rows_of, write_model
from load import local, run_load
from phoenix_server import PhoenixServer
from rich.console import Console
from rich.table import Table
from servers import RedisServer

from phoenix_ml.application.features import packed_signatures, store_features
from phoenix_ml.application.ports import FeatureStore
from phoenix_ml.application.predict import Answer, Predict
from phoenix_ml.bootstrap import bootstrap, bootstrap_predict
from phoenix_ml.domain.events import PredictionMade
from phoenix_ml.domain.rows import ON_CPU, Rows
from phoenix_ml.infrastructure.events.journal import JournalWriter
from phoenix_ml.infrastructure.features.cache import CachedFeatures
from phoenix_ml.infrastructure.features.redis import RedisFeatures
from phoenix_ml.infrastructure.features.sqlite import SqliteFeatures
from phoenix_ml.infrastructure.http.calls import PredictionCalls
from phoenix_ml.infrastructure.http.codec import decode_prediction, describe_answer, encode_json
from phoenix_ml.infrastructure.telemetry.meter import MetricsMeter
from phoenix_ml.infrastructure.telemetry.metrics import MetricsWriter

FEATURES = 30
CALLERS = (1, 64)
BATCH = 16
# A step for one request, or for as many as the second number says.
Step = tuple[Callable[[int], Any], int]
AsyncStep = Callable[[int], Awaitable[object]]
console = Console(width=110)


def cpu_of(step: Callable[[int], Any], calls: int) -> float:
    started = time.process_time()
    for number in range(calls):
        step(number)
    return (time.process_time() - started) / calls * 1e6


async def cpu_of_callers(callers: int, step: AsyncStep, calls: int) -> float:
    """With so many callers at once, as requests come under load."""

    async def call(first: int) -> None:
        for number in range(first, calls, callers):
            await step(number)
            await asyncio.sleep(0)  # each is of another request

    started = time.process_time()
    await asyncio.gather(*(call(first) for first in range(callers)))
    return (time.process_time() - started) / calls * 1e6


class Bench:
    """A model, stores with its entities, a journal and metrics, as an API process has them."""

    def __init__(self, folder: Path, redis_url: str) -> None:
        server = PhoenixServer(folder)  # it is not started: what it knows is used
        self.rows = rows_of(ENTITIES, FEATURES)
        self.version = server.register(write_model(folder / "model.onnx", FEATURES), MODEL, "1.0.0")
        self.metrics = MetricsWriter(folder / "profile.mmap")
        self.meter = MetricsMeter(self.metrics)
        self.journal = JournalWriter(folder / "journal", limit_bytes=8 << 30)
        self.phoenix = bootstrap(server.settings)
        self.sqlite = SqliteFeatures(folder / "features.db")
        self.redis = RedisFeatures(redis_url, 1000.0)
        self.cache = CachedFeatures(self.redis, 3_600_000, ENTITIES, lambda: None, lambda: None)

    async def fill(self) -> None:
        names = self.version.metadata.features
        entities = {f"e{n:04}": dict(zip(names, row, strict=True)) for n, row in enumerate(self.rows)}
        for store in (self.sqlite, self.redis):
            await store_features(store, entities, packed_signatures([self.version]))

    def calls_on(self, store: FeatureStore) -> tuple[Predict, PredictionCalls]:
        live, predict = bootstrap_predict(self.phoenix, store, self.journal, self.meter)
        live.refresh()
        self.live = live
        limits = {"body_limit_bytes": 1 << 20, "batch_limit": 1000}
        return predict, PredictionCalls(predict, live, self.journal, self.meter, **limits)


async def steps_of(bench: Bench) -> tuple[dict[str, Step], dict[str, AsyncStep]]:
    """What is measured one call at a time, and what with many callers at once."""
    await bench.fill()
    predict, calls = bench.calls_on(bench.sqlite)
    bodies = [msgspec.json.encode({"model_id": MODEL, "features": row}) for row in bench.rows]
    asked = [msgspec.json.encode({"model_id": MODEL, "entity_id": f"e{n:04}"}) for n in range(ENTITIES)]
    requests = [decode_prediction(body) for body in bodies]
    model = bench.live.model(MODEL)
    served, _ = model.pick(None, "e0000")
    contract, row_format, engine = served.contract, served.format, served.engine
    types, signature = model.types["1.0.0"], model.packed["1.0.0"]
    if signature is None:
        raise SystemExit("the model has no packed rows")
    values = [contract.resolve(None, row, 0)[0] for row in bench.rows]
    packed = [row_format.pack(row) for row in values]
    answers: list[Answer] = [await predict.one(request, time.perf_counter()) for request in requests[:100]]
    events = [answer.event for answer in answers]
    encode = msgspec.msgpack.Encoder().encode
    payloads = [encode(event) for event in events]
    fields = [msgspec.structs.astuple(event) for event in events]
    batches = [Rows(values[n : n + BATCH], packed[n : n + BATCH]) for n in range(0, 960, BATCH)]
    meter, journal = bench.meter, bench.journal

    def count(number: int) -> None:
        event = events[number % 100]
        meter.ran(served.version, 1e-5, ON_CPU)
        meter.answered(event, FEATURES, 1e-5)
        meter.requested(event.model_id, event.model_version, event.role, 200, 1e-4)

    def of(values: list[Any], step: Callable[[Any], Any]) -> Step:
        size = len(values)
        return (lambda number: step(values[number % size])), 1

    single: dict[str, Step] = {
        "decode the body, 30 features": of(bodies, decode_prediction),
        "decode the body, an entity": of(asked, decode_prediction),
        "pick the version": ((lambda number: bench.live.model(MODEL).pick(None, "e0001")), 1),
        "resolve 30 features of the request": of(bench.rows, lambda row: contract.resolve(None, row, 0)),
        "pack the row": of(values, row_format.pack),
        "engine, 1 row": (
            lambda number: engine.run(Rows((values[number % ENTITIES],), (packed[number % ENTITIES],))),
            1,
        ),
        f"engine, a row of a batch of {BATCH}": (
            lambda number: engine.run(batches[number % len(batches)]),
            BATCH,
        ),
        "make the event": of(fields, lambda parts: PredictionMade(*parts)),
        "encode the event": of(events, encode),
        "journal, append": of(payloads, lambda one: journal.append(one, model.schema_digest, model.schema)),
        f"journal, one of {BATCH} in append_many": (
            lambda _: journal.append_many(payloads[:BATCH], model.schema_digest, model.schema),
            BATCH,
        ),
        "metrics": (count, 1),
        "encode the answer": of(answers, lambda answer: encode_json(describe_answer(answer))),
    }
    _, by_redis = bench.calls_on(bench.redis)
    _, by_cache = bench.calls_on(bench.cache)
    ids = [f"e{n:04}" for n in range(ENTITIES)]
    for entity_id in ids:
        await bench.cache.read_packed(entity_id, signature)

    async def nothing(_: int) -> None:
        return None

    def reading(store: FeatureStore) -> AsyncStep:
        return lambda number: store.read_packed(ids[number % ENTITIES], signature)

    def asking(on: PredictionCalls) -> AsyncStep:
        return lambda number: on.predict(asked[number % ENTITIES], time.perf_counter(), "")

    many: dict[str, AsyncStep] = {
        "": nothing,
        "read, SQLite, packed": reading(bench.sqlite),
        "read, SQLite, single values": lambda number: bench.sqlite.read(ids[number % ENTITIES], types),
        "read, Redis, packed": reading(bench.redis),
        "read, Redis, single fields": lambda number: bench.redis.read(ids[number % ENTITIES], types),
        "read, cache": reading(bench.cache),
        "all: body to answer, features in the request": (
            lambda number: calls.predict(bodies[number % ENTITIES], time.perf_counter(), "")
        ),
        "all: by entity, SQLite": asking(calls),
        "all: by entity, Redis": asking(by_redis),
        "all: by entity, cache": asking(by_cache),
    }
    return single, many


async def profile(folder: Path, redis_url: str, rounds: int, calls: int) -> None:
    bench = Bench(folder, redis_url)
    single, many = await steps_of(bench)
    least: dict[tuple[str, int], float] = {}
    empty = float("inf")

    def keep(name: str, callers: int, took: float) -> None:
        least[name, callers] = min(took, least.get((name, callers), took))

    for _ in range(rounds):
        empty = min(empty, cpu_of(lambda number: None, calls))
        for name, (step, size) in single.items():
            keep(name, 0, cpu_of(step, calls // size) / size)
        for callers in CALLERS:
            for name, ask in many.items():
                keep(name, callers, await cpu_of_callers(callers, ask, calls))
    table = Table("step", "CPU µs", box=None)
    for name, (_, size) in single.items():
        table.add_row(name, f"{least[name, 0] - empty / size:.2f}")
    console.rule("plain calls", align="left")
    console.print(table)
    table = Table("step", *(f"{callers} at once" for callers in CALLERS), box=None)
    for name in [name for name in many if name]:
        table.add_row(name, *(f"{least[name, callers] - least['', callers]:.2f}" for callers in CALLERS))
    console.rule("on the event loop, CPU µs", align="left")
    console.print(table)
    await bench.redis.close()
    await bench.sqlite.close()
    bench.journal.close()
    bench.metrics.close()
    bench.phoenix.close()


def record(folder: Path) -> None:
    """What perf or py-spy sees of an API process under load."""
    tools = {name: shutil.which(name) for name in ("perf", "py-spy")}
    if not any(tools.values()):
        raise SystemExit("SKIPPED: neither perf nor py-spy is installed (pip install py-spy)")
    rows = rows_of(ENTITIES, FEATURES)
    server = PhoenixServer(folder)
    prepare(server, write_model(folder / "model.onnx", FEATURES), rows)
    with server:
        loading = threading.Thread(target=lambda: run_load(local(server.port), by_features(rows), 64, 9))
        loading.start()
        time.sleep(2)
        pid = str(server.pids()["api-0"])
        found = folder / "recorded"
        if tools["perf"]:
            command = ["perf", "record", "-q", "-g", "-p", pid, "-o", str(found), "--", "sleep", "5"]
        else:
            command = ["py-spy", "record", "-d", "5", "-f", "raw", "-o", str(found), "-p", pid]
        recorded = subprocess.run(command, capture_output=True, text=True, check=False)
        loading.join()
    if recorded.returncode:
        raise SystemExit(f"SKIPPED: {command[0]}: " + " | ".join(recorded.stderr.strip().splitlines()[-4:]))
    if tools["perf"]:
        report = ["perf", "report", "--stdio", "--no-children", "-g", "none", "-i", str(found)]
        shown = subprocess.run(report, capture_output=True, text=True, check=False).stdout
        lines = [line for line in shown.splitlines() if line and not line.startswith("#")]
    else:
        lines = sorted(found.read_text().splitlines(), key=lambda line: -int(line.rpartition(" ")[2]))
    print("\n".join(lines[:40]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--calls", type=int, default=4000)
    parser.add_argument("--perf", action="store_true")
    options = parser.parse_args()
    print(
        f"{os.cpu_count()} processors; Python {sys.version.split()[0]}; load before: {os.getloadavg()[0]:.2f}"
    )
    with tempfile.TemporaryDirectory(prefix="phoenix-bench-") as name:
        if options.perf:
            record(Path(name))
            return
        with RedisServer() as redis:
            uvloop.run(profile(Path(name), redis.url, options.rounds, options.calls))


if __name__ == "__main__":
    main()
