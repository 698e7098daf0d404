"""What the way from an answer to its row costs, with a real Kafka and a real PostgreSQL of its own.

    python benchmarks/events.py [--events 40000] [--rounds 5] [--seconds 20] [--rate 1500] [--faults]

Three measurements, each beside a reference of the same run:

- ship: CPU of the ship role an event, librdkafka's threads included, beside bare librdkafka with messages of the same
  size (no journal, no headers);
- log: rows a second of one log worker from Kafka into PostgreSQL, beside PostgreSQL's own COPY of the same rows into
  a table with the same indexes;
- end to end: from an answer to its row, at a fixed rate of requests.

With ``--faults`` instead: the latency of /predict before, during and after each part behind it is gone.
"""

import argparse
import asyncio
import gc
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import psycopg
import uvloop
from load import post
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from onnx_models import linear_regressor, write
from phoenix_server import PhoenixServer
from proxy import FaultProxy
from servers import HOST, KafkaServer, PostgresServer, new_prefix, wait_until

from phoenix_ml.bootstrap import Phoenix, bootstrap
from phoenix_ml.domain.events import PredictionMade
from phoenix_ml.domain.ids import new_id
from phoenix_ml.domain.routing import Role, Strategy
from phoenix_ml.domain.rows import Column, ElementType, RowFormat
from phoenix_ml.infrastructure.events.cloudevents import encode_record
from phoenix_ml.infrastructure.events.journal import JournalWriter
from phoenix_ml.infrastructure.events.kafka import INFERENCE_EVENTS, Kafka, KafkaOutbox
from phoenix_ml.infrastructure.sql.database import Database
from phoenix_ml.infrastructure.telemetry.metrics import MetricsWriter
from phoenix_ml.processes.log import log_from_kafka
from phoenix_ml.processes.ship import ShipRole
from phoenix_ml.settings import Settings, load_settings

FEATURES = 13
MODEL = "linear"
COLUMNS = tuple(Column(f"feature_{n}", ElementType.FLOAT32) for n in range(FEATURES))
SCHEMA = msgspec.msgpack.encode({"1.0.0": COLUMNS})
DIGEST = b"columns of linear"
console = Console(width=120)


def made_events(count: int, sha256: str) -> list[bytes]:
    """Predictions as an API process puts them on record."""
    row_format = RowFormat(COLUMNS)
    random = np.random.default_rng(7)
    events = []
    for number, row in enumerate(random.normal(size=(count, FEATURES)).tolist()):
        prediction_id = new_id()
        event = PredictionMade(
            prediction_id,
            MODEL,
            "1.0.0",
            sha256,
            Strategy.AB_TEST,
            Role.CHAMPION,
            0.5,
            f"cust_{number % 5000:04d}",
            prediction_id,
            f"cust_{number % 5000:04d}",
            row_format.pack(row),
            "s",
            number % 2,
            0.75,
            [0.25, 0.75],
            0.375,
            time.time_ns() // 1_000_000,
            1,
            0,
        )
        events.append(msgspec.msgpack.encode(event))
    return events


def settings_of(folder: Path, kafka_url: str, database_url: str) -> Settings:
    return load_settings(data=folder, events=kafka_url, database=database_url)


def prepared(phoenix: Phoenix, folder: Path) -> str:
    """The digest of the model that all predictions are of, registered and active."""
    from phoenix_ml.application.catalogue import Registration, register
    from phoenix_ml.domain.models import Stage

    artifact = write(folder / "model.onnx", linear_regressor(FEATURES))
    registration = Registration(MODEL, "1.0.0", Stage.DEV, {}, None)
    register(phoenix.registry, phoenix.artifacts, phoenix.engines, artifact, registration, actor="benchmark")
    return phoenix.registry.set_active(MODEL, "1.0.0", True, "benchmark").sha256


# ship


def measure_ship(server: KafkaServer, folder: Path, count: int) -> tuple[float, float]:
    """CPU µs an event of the ship role, and of bare librdkafka."""
    settings = settings_of(folder, f"{server.url}/{new_prefix()}", "")
    kafka = Kafka(settings.events, 6)
    kafka.create_topics()
    writer = JournalWriter(settings.journal_folder / "api-0")
    payloads = made_events(count, "ab" * 32)

    def fill() -> None:
        for payload in payloads:
            writer.append(payload, DIGEST, SCHEMA)

    stopping = threading.Event()
    with MetricsWriter(folder / "ship.mmap") as metrics:
        role = ShipRole(settings, kafka, metrics)
        writer.append(payloads[0], DIGEST, SCHEMA)
        role.step(stopping)  # the first message also fetches the producer's number
        fill()
        started = time.process_time()
        shipped = 0
        while shipped < count:
            shipped += role.step(stopping)
        ours = (time.process_time() - started) / count * 1e6
        role.close()
    writer.close()

    values = [encode_record(payload, SCHEMA).value for payload in payloads]
    keys = [encode_record(payload, SCHEMA).key for payload in payloads]
    producer = kafka.producer(**{"compression.type": "lz4", "linger.ms": 20, "batch.size": 512 * 1024})
    topic = kafka.full_name(INFERENCE_EVENTS)
    producer.produce(topic, values[0], keys[0])
    producer.flush()
    started = time.process_time()
    for start in range(0, count, 5000):
        for value, key in zip(values[start : start + 5000], keys[start : start + 5000], strict=True):
            producer.produce(topic, value, key)
        producer.flush()
    bare = (time.process_time() - started) / count * 1e6
    return ours, bare


# log


def measure_log(
    server: KafkaServer, phoenix: Phoenix, url: str, folder: Path, count: int
) -> tuple[float, float]:
    """Rows a second of one log worker, and of PostgreSQL's own COPY of the same rows."""
    kafka = Kafka(f"{server.url}/{new_prefix()}", 6)
    kafka.create_topics()
    outbox = KafkaOutbox(kafka)
    sha256 = phoenix.registry.get(MODEL, "1.0.0").sha256
    first, *rest = [encode_record(payload, SCHEMA) for payload in made_events(count + 1, sha256)]
    outbox.send(INFERENCE_EVENTS, [first])
    with MetricsWriter(folder / "log.mmap") as metrics, psycopg.connect(url, autocommit=True) as connection:
        role = log_from_kafka(phoenix, kafka, metrics)
        wait_until(lambda: role.step() > 0, 60, "the worker has joined its group")
        outbox.send(INFERENCE_EVENTS, rest)
        started = time.perf_counter()
        logged = 0
        while logged < count:
            logged += role.step()
        ours = count / (time.perf_counter() - started)
        role.close()
        connection.execute("DROP TABLE IF EXISTS reference")
        connection.execute("CREATE TABLE reference (LIKE prediction_logs INCLUDING ALL)")
        with connection.cursor().copy(
            "COPY (SELECT * FROM prediction_logs LIMIT %s) TO STDOUT", (count,)
        ) as out:
            lines = [bytes(line) for line in out]
        started = time.perf_counter()
        for start in range(0, len(lines), 2000):
            with connection.cursor().copy("COPY reference FROM STDIN") as copy:
                for line in lines[start : start + 2000]:
                    copy.write(line)
        bare = len(lines) / (time.perf_counter() - started)
    outbox.close()
    return ours, bare


# requests at a fixed rate


class Paced(NamedTuple):
    """What a paced load saw: when each request was due, and how long its answer took from then."""

    due_at: list[float]
    latency_ms: list[float]
    failures: int

    def p99_ms(self, since: float, until: float) -> float:
        chosen = [ms for at, ms in zip(self.due_at, self.latency_ms, strict=True) if since <= at < until]
        return float(np.quantile(chosen, 0.99)) if chosen else float("nan")

    def longest_ms(self) -> float:
        return max(self.latency_ms)


async def _paced(port: int, rate: float, stopping: Callable[[], bool], connections: int = 32) -> Paced:
    """Requests that are due at even distances, whether earlier ones are answered or not."""
    due_at: list[float] = []
    latency_ms: list[float] = []
    failures = 0
    random = np.random.default_rng(7)
    bodies = [
        post("/predict", msgspec.json.encode({"model_id": MODEL, "features": row}))
        for row in random.normal(size=(64, FEATURES)).tolist()
    ]
    begun = time.perf_counter() + 0.1

    async def client(number: int) -> None:
        nonlocal failures
        reader, writer = await asyncio.open_connection(HOST, port)
        turn = number
        while not stopping():
            due = begun + turn / rate
            turn += connections
            await asyncio.sleep(due - time.perf_counter())
            writer.write(bodies[turn % len(bodies)])
            head = await reader.readuntil(b"\r\n\r\n")
            at = head.lower().index(b"content-length:") + 15
            await reader.readexactly(int(head[at:].split(b"\r", 1)[0]))
            due_at.append(due)
            latency_ms.append((time.perf_counter() - due) * 1000)
            failures += head[9:10] != b"2"
        writer.close()

    await asyncio.gather(*[client(number) for number in range(connections)])
    return Paced(due_at, latency_ms, failures)


@contextmanager
def pacing(port: int, rate: float) -> Iterator[list[Paced]]:
    """A paced load for as long as the block runs; its result is in the list afterwards."""
    stopping = threading.Event()
    found: list[Paced] = []
    thread = threading.Thread(target=lambda: found.append(uvloop.run(_paced(port, rate, stopping.is_set))))
    thread.start()
    try:
        yield found
    finally:
        stopping.set()
        thread.join()


def measure_end_to_end(
    server: PhoenixServer, url: str, rate: float, seconds: float
) -> tuple[Paced, list[float]]:
    """The requests, and from each answer to its row: seconds, as a reader of the table sees it."""
    lags: list[float] = []
    stopping = threading.Event()

    def watch() -> None:
        with psycopg.connect(url, autocommit=True) as connection:
            (last,) = connection.execute("SELECT coalesce(max(seq), 0) FROM prediction_logs").fetchone() or (
                0,
            )
            while not stopping.is_set():
                query = "SELECT seq, extract(epoch FROM created_at) FROM prediction_logs WHERE seq > %s ORDER BY seq"
                rows = connection.execute(query, (last,)).fetchall()
                now = time.time()
                lags.extend(now - float(made_at) for _, made_at in rows)
                last = rows[-1][0] if rows else last
                stopping.wait(0.02)

    watcher = threading.Thread(target=watch)
    with pacing(server.port, rate):
        time.sleep(3)  # connections and caches are warm
    with pacing(server.port, rate) as found:
        watcher.start()
        time.sleep(seconds)
    wait_until(lambda: len(lags) >= len(found[0].latency_ms), 60, "all answers are in the log")
    stopping.set()
    watcher.join()
    return found[0], lags


# faults


def measure_faults(
    kafka: KafkaServer, network: FaultProxy, postgres: PostgresServer, server: PhoenixServer, rate: float
) -> Table:
    """The latency of /predict before, during and after each fault."""
    table = Table(
        "fault", "seconds", "p99 ms before", "during", "after", "longest ms", "not answered", box=None
    )

    def run(name: str, seconds: float, begin: Callable[[], Any], end: Callable[[], Any]) -> None:
        with pacing(server.port, rate) as found:
            time.sleep(5)
            begun = time.perf_counter()
            begin()
            time.sleep(seconds)
            ended = time.perf_counter()
            end()
            back = time.perf_counter()
            time.sleep(10)
        paced = found[0]
        console.print(f"  {name}: {len(paced.latency_ms):,} requests")
        table.add_row(
            name,
            f"{ended - begun:.0f}",
            f"{paced.p99_ms(begun - 4, begun):.1f}",
            f"{paced.p99_ms(begun, back):.1f}",
            f"{paced.p99_ms(back, back + 10):.1f}",
            f"{paced.longest_ms():.0f}",
            str(paced.failures),
        )

    run("Kafka stopped", 20, kafka.stop, kafka.start)
    run("Kafka killed", 5, kafka.kill, kafka.start)
    run("network to Kafka swallows packets", 30, network.hang, network.up)
    run("PostgreSQL stopped", 20, postgres.stop, postgres.start)
    run("PostgreSQL frozen", 20, postgres.freeze, postgres.thaw)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--events", type=int, default=40_000, help="events a round of ship and log")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=20, help="of the end-to-end load")
    parser.add_argument("--rate", type=float, default=1500, help="requests a second")
    parser.add_argument("--faults", action="store_true")
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as name,
        KafkaServer() as kafka,
        PostgresServer() as postgres,
    ):
        folder = Path(name)
        url = postgres.create_database()
        Database(url).upgrade()
        phoenix = bootstrap(settings_of(folder / "data", kafka.url, url))
        prepared(phoenix, folder)
        if options.faults:
            console.print(f"/predict at {options.rate:g} requests/s while what is behind it fails")
            with (
                FaultProxy(HOST, kafka.proxied_port, port=kafka.proxy_port) as network,
                PhoenixServer(folder, workers=1, events=kafka.proxied_url, database=url) as server,
            ):
                console.print(measure_faults(kafka, network, postgres, server, options.rate))
            return
        table = Table("what", "ours", "reference", "ours / reference", box=None)
        gc.collect()
        gc.freeze()  # as the background process does
        ships = [measure_ship(kafka, folder / f"ship-{n}", options.events) for n in range(options.rounds)]
        ours, bare = (statistics.median(column) for column in zip(*ships, strict=True))
        table.add_row(
            "ship: CPU µs an event, beside bare librdkafka",
            f"{ours:.1f}",
            f"{bare:.1f}",
            f"{ours / bare:.2f}",
        )
        logs = [measure_log(kafka, phoenix, url, folder, options.events) for _ in range(options.rounds)]
        ours, bare = (statistics.median(column) for column in zip(*logs, strict=True))
        table.add_row(
            "log: rows/s, beside COPY by itself", f"{ours:,.0f}", f"{bare:,.0f}", f"{ours / bare:.2f}"
        )
        with PhoenixServer(folder, workers=1, events=f"{kafka.url}/{new_prefix()}", database=url) as server:
            paced, lags = measure_end_to_end(server, url, options.rate, options.seconds)
        console.print(table)
        console.print(
            f"end to end: {len(paced.latency_ms) / options.seconds:,.0f} requests/s, "
            f"/predict p99 {np.quantile(paced.latency_ms, 0.99):.1f} ms; from the answer to its row p50 "
            f"{np.quantile(lags, 0.5) * 1000:.0f} ms, p99 {np.quantile(lags, 0.99) * 1000:.0f} ms"
        )


if __name__ == "__main__":
    main()
