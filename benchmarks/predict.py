"""A whole prediction, beside an empty echo on stock uvicorn and beside the usual service, in one interleaved run.

    python benchmarks/predict.py [--seconds 1.5] [--rounds 5] [--connections 1,16,64] [--rates 500,1500] [--kafka]

The model: 30 float features, gradient boosting with 100 trees. Journal, log role and metrics are on. The usual
service is benchmarks/usual.py. This machine is noisy, so what counts is the ratio of two figures measured within
the same seconds: each round runs every case, and the tables show medians over the rounds. With ``--kafka`` the
events of both sides go to a real Kafka; without, ours go into the log's database and the usual service's nowhere.
"""

import argparse
import os
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import redis
from harness import (
    ENTITIES,
    HERE,
    Case,
    Measured,
    await_log,
    by_entity,
    by_features,
    free_port,
    measure,
    prepare,
    rows_of,
    running,
    serving_pids,
    write_model,
)
from load import cpu_seconds
from phoenix_server import PhoenixServer
from rich.console import Console
from rich.table import Table
from servers import KafkaServer, RedisServer, new_prefix
from venvs import python_of

from phoenix_ml.infrastructure.events.kafka import INFERENCE_EVENTS, Kafka
from phoenix_ml.settings import Settings

FEATURES = 30
TREES = 100
ECHO_ENTITY, ECHO_FEATURES = "echo, body of an entity", "echo, body of 30 features"
USUAL_ENTITY, USUAL_FEATURES = "usual service, by entity, Redis", "usual service, features in the request"


def references(case: str) -> tuple[str, str]:
    """The echo and the usual service that a case is compared with."""
    is_features = "features" in case
    return (ECHO_FEATURES, USUAL_FEATURES) if is_features else (ECHO_ENTITY, USUAL_ENTITY)


def report(title: str, rounds: list[dict[str, Measured]]) -> None:
    table = Table(title=title, title_justify="left")
    headings = "CPU µs/request", "× echo", "usual ÷ it", "requests/s", "p50 ms", "p99 ms", "p99.9 ms"
    for heading in ("case", *headings):
        table.add_column(heading, justify="left" if heading == "case" else "right", no_wrap=True)

    def median_of(case: str, other: str) -> float:
        return statistics.median(results[case].cpu_us / results[other].cpu_us for results in rounds)

    for name in rounds[0]:
        measured = [results[name] for results in rounds]
        echo, usual = references(name)
        table.add_row(
            name,
            f"{statistics.median(m.cpu_us for m in measured):.1f}",
            f"{median_of(name, echo):.2f}",
            f"{median_of(usual, name):.1f}",
            f"{statistics.median(m.per_second for m in measured):,.0f}",
            f"{statistics.median(m.load.quantile_ms(0.5) for m in measured):.2f}",
            f"{statistics.median(m.load.quantile_ms(0.99) for m in measured):.2f}",
            f"{statistics.median(m.load.quantile_ms(0.999) for m in measured):.2f}",
        )
    Console(width=130).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=1.5, help="of one run of one case")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--connections", default="1,16,64")
    parser.add_argument("--rates", default="500,1500", help="requests a second, over 64 connections")
    parser.add_argument("--kafka", action="store_true")
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="phoenix-bench-")))
        store = stack.enter_context(RedisServer())
        kafka = stack.enter_context(KafkaServer()) if options.kafka else None
        artifact = write_model(folder / "model.onnx", FEATURES, TREES)
        rows = rows_of(ENTITIES, FEATURES)
        servers: dict[str, PhoenixServer] = {}

        def ours(name: str, **settings: object) -> PhoenixServer:
            if unknown := settings.keys() - Settings.model_fields.keys():
                raise SystemExit(f"this version has no setting {', '.join(unknown)}")
            if kafka is not None:
                settings["events"] = f"{kafka.url}/{new_prefix()}"
            # The default of 5 ms is for a Redis that need not share two processors with its clients' load.
            settings["features_deadline_ms"] = 1000
            servers[name] = server = PhoenixServer(folder / name, **settings)  # type: ignore[arg-type]
            prepare(server, artifact, rows)
            return server

        def redis_url(database: int) -> str:
            return store.url.removesuffix("/0") + f"/{database}"

        embedded = ours("sqlite")
        fields = ours("fields", features=redis_url(1))
        packed = ours("packed", features=redis_url(2))
        cached = ours("cached", features=redis_url(2), features_cache_ms=60_000)
        with redis.Redis.from_url(redis_url(1)) as client:
            for key in client.scan_iter("features:*", 1000):
                unneeded = [field for field in client.hkeys(key) if field.startswith(b"_packed:")]
                client.hdel(key, *unneeded)
        for server in servers.values():
            stack.enter_context(server)

        echo_port, usual_port = free_port(), free_port()
        echo = [sys.executable, HERE / "echo.py", echo_port]
        echo_pid = stack.enter_context(running(list(map(str, echo)), f"http://127.0.0.1:{echo_port}/"))
        usual = [python_of("usual", HERE / "requirements-usual.txt"), HERE / "usual.py", usual_port, artifact]
        usual.append(redis_url(1))
        if kafka is not None:
            topics = Kafka(f"{kafka.url}/usual", 6)
            topics.create_topics()
            usual += [kafka.url.removeprefix("kafka://"), topics.full_name(INFERENCE_EVENTS)]
        usual_pid = stack.enter_context(
            running(list(map(str, usual)), f"http://127.0.0.1:{usual_port}/health")
        )

        entity, features = by_entity(), by_features(rows)

        def case_of(name: str, server: PhoenixServer, requests: list[bytes]) -> Case:
            return Case(name, server.port, requests, serving_pids(server))

        echo_entity, echo_features = by_entity(path="/"), by_features(rows, "/")
        cases = [
            Case(ECHO_ENTITY, echo_port, echo_entity, [echo_pid]),
            Case(ECHO_FEATURES, echo_port, echo_features, [echo_pid]),
            case_of("ours, features in the request", embedded, features),
            case_of("ours, by entity, SQLite", embedded, entity),
            case_of("ours, by entity, Redis, single fields", fields, entity),
            case_of("ours, by entity, Redis, packed", packed, entity),
            case_of("ours, by entity, Redis, from the cache", cached, entity),
            Case(USUAL_ENTITY, usual_port, entity, [usual_pid]),
            Case(USUAL_FEATURES, usual_port, features, [usual_pid]),
        ]
        print(
            f"{FEATURES} floats × {TREES} trees; {os.cpu_count()} processors; Python {sys.version.split()[0]}; "
            f"load before: {os.getloadavg()[0]:.2f}"
        )
        if kafka is None:
            print("no Kafka: the usual service records nothing, ours every answer in its database")
        ours_by_port = {server.port: server for server in servers.values()}
        events = dict.fromkeys(ours_by_port, 0)
        backgrounds = {port: server.pids()["background"] for port, server in ours_by_port.items()}
        before = {port: cpu_seconds(pid) for port, pid in backgrounds.items()}

        def run_round(connections: int, seconds: float, rate: float | None) -> dict[str, Measured]:
            results = {}
            for case in cases:
                results[case.name] = measured = measure(case, connections, seconds, rate)
                if case.port in events:
                    events[case.port] += measured.load.requests
                    # Or the next case would share the processors with this one's log.
                    await_log(ours_by_port[case.port], events[case.port])
            return results

        run_round(16, 0.5, None)  # warm
        for connections in (int(word) for word in options.connections.split(",")):
            rounds = [run_round(connections, options.seconds, None) for _ in range(options.rounds)]
            report(f"{connections} connections", rounds)
        for rate in (float(word) for word in options.rates.split(",") if word):
            rounds = [run_round(64, options.seconds, rate) for _ in range(options.rounds)]
            report(f"{rate:g} requests/s, whatever is answered", rounds)
        spent = sum(cpu_seconds(pid) - before[port] for port, pid in backgrounds.items())
        total = sum(events.values())
        what = "logged" if kafka is None else "shipped and logged"
        print(f"background processes: {spent / total * 1e6:.1f} CPU µs an event ({total:,} {what})")


if __name__ == "__main__":
    main()
