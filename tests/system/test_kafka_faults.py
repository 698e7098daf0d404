"""Kafka between the journals and the log, with real processes under load: whatever dies, an answer that left is
in the log, once, as it was answered, and no caller has waited for it.
"""

import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import httpx
import msgspec
import psycopg
import pytest
from confluent_kafka import (
    Message,
)
from log_group import PARTITIONS, Group
from numbered import MODEL, assert_exactly_once, make_body, register_champion_and_challenger
from phoenix_server import PhoenixServer
from proxy import FaultProxy
from sample_events import SCHEMA, prediction
from servers import HOST, KafkaServer, PostgresServer, new_prefix, wait_until
from traffic import Traffic, await_logged, logged

from phoenix_ml.infrastructure.events.cloudevents import encode_record

pytestmark = [pytest.mark.system, pytest.mark.timeout(180)]

CLIENTS = 4
PAUSE_S = 0.02
# No call waits for Kafka or PostgreSQL, for which ours have 5 s and more; so much is granted to a busy machine.
CALL_DEADLINE_S = 5.0
# Kafka takes a member that says nothing for dead after 10 s.
SESSION_S = 10.0
TAKEOVER_S = SESSION_S + 20.0
# A worker that went without a word is missed this long after its last heartbeat, of which it sends one in 2 s.
UNMISSED_S = SESSION_S - 2.5

MakeServer: TypeAlias = Callable[..., PhoenixServer]


@pytest.fixture
def kafka(kafka_server: KafkaServer) -> Iterator[KafkaServer]:
    """A broker of our own, because it is killed; whatever a test did to it, it runs afterwards."""
    kafka_server.start()
    yield kafka_server
    kafka_server.start()


@pytest.fixture
def events(kafka: KafkaServer) -> str:
    """Topics and a group that nobody else uses."""
    return f"{kafka.url}/{new_prefix()}"


@pytest.fixture
def make_server(tmp_path: Path, postgres_server: PostgresServer, events: str) -> Iterator[MakeServer]:
    """Servers of two API processes, with a champion and a challenger, not started; all end with the test."""
    postgres_server.start()
    database = postgres_server.create_database()
    made: list[PhoenixServer] = []

    def make(**settings: Any) -> PhoenixServer:
        given = {"events": events, "database": database, "registry_poll_ms": 100} | settings
        server = PhoenixServer(tmp_path, workers=2, **given)
        made.append(server)
        assert server.command("db", "upgrade").returncode == 0
        register_champion_and_challenger(server)
        return server

    yield make
    for server in made:
        server.kill()
    postgres_server.start()
    postgres_server.drop_database(database)


def traffic_to(server: PhoenixServer) -> Traffic:
    return Traffic(server.url, make_body, pause_s=PAUSE_S)


@contextmanager
def log_workers(server: PhoenixServer, count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes `phoenix-ml work log`; those that still run at the end are killed."""
    logs = [server.folder / f"work-{number}.log" for number in range(count)]
    workers = [server.popen("work", "log", log=log) for log in logs]
    try:
        yield workers
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    for log in logs:
        assert_quiet(log.read_text())


def assert_all_logged(server: PhoenixServer, traffic: Traffic, *, unanswered: int = 0) -> None:
    """The log holds what was answered, each once and as it was, and nobody has waited.

    ``unanswered`` calls may be in the log without an answer: their process was killed before it answered.
    """
    with server.opened() as phoenix:
        try:
            rows = await_logged(phoenix, MODEL, set(traffic.answers))
        except TimeoutError as exc:
            exc.add_note(server.log())
            raise
    assert_exactly_once(traffic, rows)
    assert len(traffic.answers) <= len(rows) <= len(traffic.answers) + unanswered
    assert len({row.request_id for row in rows}) == len(rows)
    assert traffic.longest_s < CALL_DEADLINE_S
    assert_quiet(server.log())


def assert_quiet(log: str) -> None:
    """Neither a defect nor librdkafka, which would tell of every attempt to connect, has written there."""
    assert "Traceback" not in log
    assert "rdkafka#" not in log
    assert "hangs and is left" not in log


def metric(server: PhoenixServer, name: str) -> float:
    """The metric's value, over all processes."""
    lines = httpx.get(f"{server.url}/metrics", timeout=30).text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))


def at_once(*actions: Callable[[], object]) -> list[object]:
    """What they return."""
    with ThreadPoolExecutor(len(actions)) as pool:
        return [done.result() for done in [pool.submit(action) for action in actions]]


def test_kafka_stopped_for_twenty_seconds(make_server: MakeServer, kafka: KafkaServer) -> None:
    """Maintenance of the cluster is nobody's concern: the journals grow, then they empty."""
    with make_server() as server:
        traffic = traffic_to(server)
        with traffic.flowing(CLIENTS):
            traffic.await_answers(100)
            kafka.stop()
            traffic.keep_flowing(20)
            pending_bytes = metric(server, "phoenix_journal_pending_bytes")
            kafka.start()
            traffic.await_answers(100)

        assert (traffic.refusals, traffic.broken) == ([], 0)
        assert pending_bytes > 0
        assert_all_logged(server, traffic)
        wait_until(lambda: metric(server, "phoenix_journal_pending_bytes") == 0, 30, "the journals are empty")


def test_kafka_killed_and_started_on_the_same_disk(make_server: MakeServer, kafka: KafkaServer) -> None:
    """What it acknowledged it has; what was on its way is sent again, and stored once."""
    with make_server() as server:
        traffic = traffic_to(server)
        with traffic.flowing(CLIENTS):
            for _ in range(2):
                traffic.await_answers(100)
                kafka.kill()
                traffic.await_answers(100)
                kafka.start()
            traffic.await_answers(100)

        assert (traffic.refusals, traffic.broken) == ([], 0)
        assert_all_logged(server, traffic)


def test_kafka_absent_when_phoenix_starts(make_server: MakeServer, kafka: KafkaServer) -> None:
    """After a power cut nobody knows who comes back first; the topics are made when Kafka has come."""
    server = make_server()
    kafka.stop()
    with server:
        traffic = traffic_to(server)
        with traffic.flowing(CLIENTS):
            traffic.await_answers(200)
            kafka.start()
            traffic.await_answers(100)

        assert (traffic.refusals, traffic.broken) == ([], 0)
        assert_all_logged(server, traffic)


def test_api_process_killed_while_kafka_is_down(make_server: MakeServer, kafka: KafkaServer) -> None:
    """Two faults at once: the dead process's journal is all that knows of its answers."""
    with make_server() as server:
        traffic = traffic_to(server)
        with traffic.flowing(CLIENTS):
            traffic.await_answers(100)
            kafka.stop()
            traffic.await_answers(200)
            killed = server.kill_child("api-0")
            server.wait_for_child("api-0", after=killed)
            traffic.await_answers(200)
            kafka.start()
            traffic.await_answers(100)

        assert traffic.refusals == []
        assert_all_logged(server, traffic, unanswered=traffic.broken)


def test_database_stopped_while_the_log_is_written(
    make_server: MakeServer, events: str, postgres_server: PostgresServer
) -> None:
    """The log worker waits with its batch in hand and stays a member: a rebalance would stop the others."""
    # A worker that did not ask Kafka for longer than this would be put out of the group.
    with make_server(events=f"{events}?max.poll.interval.ms={SESSION_S * 1000:.0f}") as server:
        traffic = traffic_to(server)
        group = Group(server)
        with traffic.flowing(CLIENTS):
            before = group.await_members(PARTITIONS)
            traffic.await_answers(100)
            postgres_server.stop()
            traffic.keep_flowing(SESSION_S + 3)
            meanwhile = set(group.assignments())
            postgres_server.start()
            traffic.await_answers(100)

        assert (traffic.refusals, traffic.broken) == ([], 0)
        assert_all_logged(server, traffic)
        assert before == meanwhile == set(group.assignments())


def test_log_worker_killed_in_the_middle_of_a_batch(make_server: MakeServer) -> None:
    """The other one takes over what it had in hand, as soon as Kafka notices."""
    with make_server(roles="ship") as server, log_workers(server, 2) as workers:
        traffic = traffic_to(server)
        group = Group(server)
        group.await_members(3, 3)
        with traffic.flowing(CLIENTS):
            traffic.await_answers(100)
            with psycopg.connect(server.settings.database) as connection:
                connection.execute("LOCK TABLE prediction_logs IN SHARE ROW EXCLUSIVE MODE")
                wait_until(lambda: blocked_transactions(connection) == 2, 30, "both have a batch in hand")
                workers[0].kill()
            answered = set(traffic.answers)
            with server.opened() as phoenix:
                await_logged(phoenix, MODEL, answered, TAKEOVER_S)

        assert (traffic.refusals, traffic.broken) == ([], 0)
        assert_all_logged(server, traffic)
        group.await_members(PARTITIONS)


def blocked_transactions(connection: psycopg.Connection[Any]) -> int:
    """How many others wait for a lock in this database."""
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    (row,) = connection.execute(waiting).fetchall()
    return int(row[0])


def test_network_to_kafka_swallows_packets_for_thirty_seconds(
    make_server: MakeServer, kafka: KafkaServer
) -> None:
    """The worst way to fail: nobody says no, connections seem to stand."""
    with FaultProxy(HOST, kafka.proxied_port, port=kafka.proxy_port) as network:
        with make_server(events=f"{kafka.proxied_url}/{new_prefix()}") as server:
            traffic = traffic_to(server)
            with traffic.flowing(CLIENTS):
                traffic.await_answers(100)
                network.hang()
                traffic.keep_flowing(30)
                network.up()
                traffic.await_answers(100)

            assert (traffic.refusals, traffic.broken) == ([], 0)
            assert_all_logged(server, traffic)


def test_everything_delivered_twice_is_stored_once(make_server: MakeServer) -> None:
    """Kafka promises at least once; ids make of it exactly once."""
    with make_server(roles="ship") as server:
        traffic = traffic_to(server)
        group = Group(server)
        with log_workers(server, 1) as workers:
            traffic.ask(500, CLIENTS)
            assert_all_logged(server, traffic)
            workers[0].terminate()
            assert workers[0].wait(60) == 0
        group.rewind()

        with log_workers(server, 1):
            group.await_caught_up()

        assert (traffic.refusals, traffic.broken) == ([], 0)
        assert group.recorded() == 500
        assert_all_logged(server, traffic)


def test_poison_goes_to_the_dead_topic_and_stops_nothing(make_server: MakeServer) -> None:
    """One record that nobody can store must not keep the rest from the log, nor vanish without a word."""
    good = encode_record(msgspec.msgpack.encode(prediction()), SCHEMA)
    later = [(name, value[:-1] + b"99" if name == "ce_dataschema" else value) for name, value in good.headers]
    poison = [
        (b"no headers", b"\x00garbage\xff", []),
        (b"our headers", b"\x00garbage\xff", good.headers),
        (good.key, good.value, good.headers),
        (good.key, good.value, later),
    ]
    reasons = ["there is no header ce_dataschema", "not an event:", "foreign key", "schema version 99"]
    with make_server() as server:
        traffic = traffic_to(server)
        group = Group(server)
        with traffic.flowing(CLIENTS):
            traffic.await_answers(100)
            group.await_members(PARTITIONS)
            places = group.produce(poison)
            traffic.await_answers(100)

        letters = {header(letter, "phoenix_origin"): letter for letter in group.dead(len(poison))}
        assert letters.keys() == set(places)
        for place, (key, value, headers), reason in zip(places, poison, reasons, strict=True):
            letter = letters[place]
            assert (letter.key(), letter.value()) == (key, value)
            assert [h for h in letter.headers() or [] if not h[0].startswith("phoenix_")] == headers
            assert reason in header(letter, "phoenix_reason")
        wait_until(lambda: metric(server, "phoenix_log_dead_total") == len(poison), 30, "all are counted")
        assert (traffic.refusals, traffic.broken) == ([], 0)
        assert_all_logged(server, traffic)


def header(message: Message, name: str) -> str:
    headers: Sequence[tuple[str, Any]] = message.headers() or []  # type: ignore[assignment]
    return next(bytes(value).decode() for given, value in headers if given == name)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    folder = tmp_path / "small-disk"
    folder.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "none", folder], capture_output=True, text=True, check=False
    )
    assert mount.returncode == 0, f"this test must be allowed to mount a file system: {mount.stderr}"
    yield folder
    # Lazily: a process that is ending may still hold a file.
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(folder: Path) -> Path:
    """A file that takes all the space that its file system has left."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            return filler
    raise AssertionError("a write of nothing")


def test_full_disk_refuses_what_it_cannot_put_on_record(small_disk: Path, make_server: MakeServer) -> None:
    """An answer that is not on record is no answer: the caller is told to come back, and nothing is half done."""
    with make_server(data=small_disk / "data", journal_full="refuse") as server:
        traffic = traffic_to(server)
        with traffic.flowing(CLIENTS):
            traffic.await_answers(200)
            filler = fill(small_disk)
            wait_until(lambda: len(traffic.refusals) > 50, 30, "calls are refused")
            filler.unlink()
            traffic.await_answers(200)

        assert {msgspec.json.decode(text)["error"]["code"] for text in traffic.refusals} == {"journal_full"}
        assert all(int(seconds) > 0 for seconds in traffic.retry_after)
        assert traffic.broken == 0
        assert "ended by itself" not in server.log()
        assert_all_logged(server, traffic)


def test_full_disk_answers_on_and_counts_what_is_not_on_record(
    small_disk: Path, make_server: MakeServer
) -> None:
    """For those who would rather have an answer than a record; they must know how much the log lacks."""
    with make_server(data=small_disk / "data", journal_full="drop") as server:
        traffic = traffic_to(server)
        with traffic.flowing(CLIENTS):
            traffic.await_answers(200)
            filler = fill(small_disk)
            wait_until(lambda: metric(server, "phoenix_journal_dropped_total") > 100, 30, "some are dropped")
            filler.unlink()
            traffic.await_answers(200)

        dropped = int(metric(server, "phoenix_journal_dropped_total"))
        group = Group(server)
        wait_until(lambda: group.recorded() == len(traffic.answers) - dropped, 30, "the others are shipped")
        group.await_caught_up()
        with server.opened() as phoenix:
            recorded = [row.id for row in logged(phoenix, MODEL)]
        assert len(recorded) == len(traffic.answers) - dropped
        assert set(recorded) <= set(traffic.answers)
        assert (traffic.refusals, traffic.broken) == ([], 0)
        assert traffic.longest_s < CALL_DEADLINE_S
        assert "ended by itself" not in server.log()
        assert_quiet(server.log())


def test_everything_stopped_at_once_with_full_journals(
    make_server: MakeServer, kafka: KafkaServer, postgres_server: PostgresServer
) -> None:
    """A whole machine is shut down while Kafka lags behind: all that was answered arrives after the next start."""
    server = make_server(journal_limit_bytes=256 * 1024, journal_segment_bytes=64 * 1024)
    with server:
        traffic = Traffic(server.url, make_body)
        with traffic.flowing(CLIENTS):
            traffic.await_answers(100)
            kafka.freeze()
            wait_until(lambda: len(traffic.refusals) > 100, 60, "the journals are full")
            exit_code, *_ = at_once(server.stop, kafka.stop, postgres_server.stop)

        at_once(postgres_server.start, kafka.start, server.start)

        assert exit_code == 0
        assert {msgspec.json.decode(text)["error"]["code"] for text in traffic.refusals} == {"journal_full"}
        assert "does not stop and is killed" not in server.log()
        assert_all_logged(server, traffic)


def test_stopped_log_worker_hands_over_at_once(make_server: MakeServer) -> None:
    """A rolling deployment must not leave the log standing until Kafka has noticed that a member is gone."""
    with make_server(roles="ship") as server, log_workers(server, 2) as workers:
        traffic = traffic_to(server)
        group = Group(server)
        group.await_members(3, 3)
        with traffic.flowing(CLIENTS):
            traffic.await_answers(100)
            workers[0].terminate()
            exit_code = workers[0].wait(60)
            group.await_members(PARTITIONS, deadline_s=UNMISSED_S)
            with server.opened() as phoenix:
                await_logged(phoenix, MODEL, set(traffic.answers))

        assert exit_code == 0
        assert (traffic.refusals, traffic.broken) == ([], 0)
        assert_all_logged(server, traffic)


def test_stopped_server_has_shipped_all_that_it_answered(make_server: MakeServer, kafka: KafkaServer) -> None:
    """A node that goes away takes its disk along; what is in Kafka stays."""
    with make_server(roles="ship") as server:
        traffic = traffic_to(server)
        group = Group(server)
        with traffic.flowing(CLIENTS):
            traffic.await_answers(100)
            kafka.freeze()
            traffic.await_answers(200)
            kafka.thaw()
            exit_code = server.stop()

        assert exit_code == 0
        assert list(server.settings.journal_folder.glob("*/*.segment")) == []
        assert group.recorded() == len(traffic.answers)
        with log_workers(server, 1):
            assert_all_logged(server, traffic)
