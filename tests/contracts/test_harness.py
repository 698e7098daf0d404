"""The harness itself: real servers that can be killed and frozen, and a proxy that injects faults."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
import redis
from proxy import FaultProxy
from servers import (
    HOST,
    PostgresServer,
    RedisServer,
    ServerError,
    ServerUnavailable,
    free_port,
    has_ended,
    wait_until,
)

SHORT_S = 0.2
LONG_S = 30.0
TESTS = Path(__file__).parents[1]


def ping(connection: socket.socket) -> bytes:
    """The answer of the Redis server at the other end, or nothing where it has closed the connection."""
    connection.sendall(b"PING\r\n")
    return connection.recv(64)


def connect(port: int) -> socket.socket:
    """A connection whose reads end after a long while."""
    return socket.create_connection((HOST, port), timeout=LONG_S)


@pytest.fixture
def proxy(redis_server: RedisServer) -> Iterator[FaultProxy]:
    """A proxy in front of a Redis server that runs."""
    redis_server.start()
    with FaultProxy.in_front_of(redis_server.url) as proxy:
        yield proxy


@pytest.mark.parametrize("end", [RedisServer.stop, RedisServer.kill, RedisServer.restart])
def test_redis_answers_again_on_the_same_port(
    redis_server: RedisServer, end: Callable[[RedisServer], None]
) -> None:
    """After stop, kill or restart the same URL leads to a server that answers."""
    redis_server.start()
    end(redis_server)
    redis_server.start()
    with redis.Redis.from_url(redis_server.url) as client:
        assert client.ping()


def test_a_killed_redis_refuses_connections(redis_server: RedisServer) -> None:
    """When kill returns, the server is gone."""
    redis_server.start()
    redis_server.kill()
    with pytest.raises(ConnectionRefusedError):
        connect(redis_server.port)


def test_a_frozen_redis_answers_once_it_is_thawed(redis_server: RedisServer) -> None:
    """While frozen the server says nothing, and the question is answered afterwards."""
    redis_server.start()
    with connect(redis_server.port) as connection:
        redis_server.freeze()
        connection.settimeout(SHORT_S)
        with pytest.raises(TimeoutError):
            ping(connection)
        redis_server.thaw()
        connection.settimeout(LONG_S)
        assert connection.recv(64) == b"+PONG\r\n"


@pytest.mark.parametrize("left", ["by the first", "by the second"])
def test_the_redis_url_names_an_empty_database(redis_url: str, left: str) -> None:
    """A test finds none of the keys of the one before."""
    with redis.Redis.from_url(redis_url) as client:
        assert client.dbsize() == 0
        client.set("left", left)


def test_postgres_keeps_committed_rows_when_it_is_killed(postgres_server: PostgresServer) -> None:
    """Killed amid a transaction and started again, the server has what was committed and nothing else."""
    postgres_server.start()
    url = postgres_server.create_database()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("CREATE TABLE facts (number integer)")
        connection.execute("INSERT INTO facts VALUES (1)")
    with psycopg.connect(url) as connection:
        connection.execute("INSERT INTO facts VALUES (2)")
        postgres_server.kill()
        with pytest.raises(psycopg.OperationalError):
            connection.commit()
    postgres_server.start()
    with psycopg.connect(url) as connection:
        assert connection.execute("SELECT number FROM facts").fetchall() == [(1,)]
    postgres_server.drop_database(url)


def test_postgres_starts_at_once_after_every_kill(postgres_server: PostgresServer) -> None:
    """The traces of a killed server, and of sessions that were busy, do not keep the next one from starting."""
    postgres_server.start()
    for _ in range(3):
        with psycopg.connect(postgres_server.url) as connection:
            connection.execute("SELECT 1")
            postgres_server.kill()
            postgres_server.start()
            connection.close()


def test_a_frozen_postgres_answers_once_it_is_thawed(postgres_server: PostgresServer) -> None:
    """A session that is open already stands still, too, and goes on afterwards."""
    postgres_server.start()
    with psycopg.connect(postgres_server.url) as connection:
        postgres_server.freeze()
        connection.pgconn.send_query(b"SELECT 1")
        connection.pgconn.flush()
        time.sleep(SHORT_S)
        connection.pgconn.consume_input()
        assert connection.pgconn.is_busy()
        postgres_server.thaw()
        answer = connection.pgconn.get_result()
        assert answer is not None
        assert answer.get_value(0, 0) == b"1"
        assert connection.pgconn.get_result() is None


@pytest.mark.parametrize("left", ["by_the_first", "by_the_second"])
def test_the_postgres_url_names_an_empty_database(postgres_url: str, left: str) -> None:
    """A test finds none of the tables of the one before."""
    with psycopg.connect(postgres_url) as connection:
        tables = "SELECT count(*) FROM information_schema.tables WHERE table_schema = 'public'"
        assert connection.execute(tables).fetchone() == (0,)
        connection.execute("CREATE TABLE left_behind AS SELECT %s AS left", [left])


def test_a_dropped_database_is_gone_though_somebody_uses_it(postgres_server: PostgresServer) -> None:
    """A test that leaks a connection does not keep its database from being dropped."""
    postgres_server.start()
    url = postgres_server.create_database()
    with psycopg.connect(url) as leaked:
        postgres_server.drop_database(url)
        with pytest.raises(psycopg.OperationalError, match="does not exist"):
            psycopg.connect(url)
        leaked.close()


def test_a_server_that_cannot_start_shows_its_log(redis_server: RedisServer) -> None:
    """The error holds the server's own words."""
    redis_server.start()
    rival = RedisServer()
    rival.port = redis_server.port
    with pytest.raises(ServerError, match="Address already in use"):
        rival.start()


def test_a_postgres_whose_port_is_taken_shows_its_log(redis_server: RedisServer) -> None:
    """PostgreSQL, too, does not mistake another server on its port for itself."""
    redis_server.start()
    rival = PostgresServer()
    rival.port = redis_server.port
    with pytest.raises(ServerError, match="Address already in use"):
        rival.start()


def test_a_server_that_is_not_installed_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the program there is no server, and the error names the remedy."""
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ServerUnavailable, match=r"install_servers\.sh"):
        RedisServer().start()


def test_a_run_without_servers_fails_and_says_so(tmp_path: Path) -> None:
    """A missing server is an error of the run and never a skipped test; a missing GPU is told."""
    (tmp_path / "test_needs.py").write_text(
        "import pytest\ndef test_needs_redis(redis_url): ...\n@pytest.mark.gpu\ndef test_needs_gpu(): ...\n"
    )
    environment = {
        "PATH": "/nowhere",
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS / "support")]),
    }
    command = ["-m", "pytest", "-p", "conftest", "-c", str(TESTS.parent / "pyproject.toml")]
    run = subprocess.run(
        [sys.executable, *command, "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == pytest.ExitCode.TESTS_FAILED, run.stdout + run.stderr
    assert "MISSING: Redis is not installed" in run.stdout
    assert "1 GPU test deselected: no GPU" in run.stdout
    assert "1 error" in run.stdout
    assert "skipped" not in run.stdout


@pytest.fixture
def open_temp_folder() -> Iterator[str]:
    """A folder for temporary files that PostgreSQL's user may enter."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)
        yield folder


def test_servers_end_with_the_process_that_started_them(open_temp_folder: str) -> None:
    """Even where a test run is killed, its servers do not stay behind."""
    script = (
        "from servers import PostgresServer, RedisServer\n"
        "servers = [RedisServer(), PostgresServer()]\n"
        "for server in servers: server.start()\n"
        "print(*(server.port for server in servers), flush=True)\n"
        "input()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(TESTS / "support"), "TMPDIR": open_temp_folder},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as run:
        assert run.stdout is not None
        ports = [int(port) for port in run.stdout.readline().split()]
        assert len(ports) == 2
        assert all(map(listens, ports))
        run.send_signal(signal.SIGKILL)
    wait_until(lambda: not any(map(listens, ports)), LONG_S, f"nobody listens on ports {ports}")


def listens(port: int) -> bool:
    """Whether somebody takes connections on the port."""
    try:
        connect(port).close()
    except ConnectionRefusedError:
        return False
    return True


def test_a_process_whose_first_thread_alone_has_ended_goes_on() -> None:
    """As one that was killed does for a moment: until its last thread has ended it holds its connections."""
    script = (
        "import ctypes, threading\n"
        "threading.Thread(target=input).start()\n"
        "print(flush=True)\n"
        "ctypes.CDLL(None).pthread_exit(None)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        stat = Path(f"/proc/{process.pid}/stat")
        wait_until(lambda: b") Z " in stat.read_bytes(), LONG_S, "its first thread has ended")
        goes_on = not has_ended(process.pid)
        process.kill()
        wait_until(lambda: has_ended(process.pid), LONG_S, "it has ended")

    assert goes_on


def test_a_server_restarted_in_a_thread_outlives_it(redis_server: RedisServer) -> None:
    """An async test may restart a server through `asyncio.to_thread`."""

    async def restart() -> None:
        await asyncio.to_thread(redis_server.restart)

    asyncio.run(restart())
    with redis.Redis.from_url(redis_server.url) as client:
        assert client.ping()


def test_up_passes_requests_and_answers(proxy: FaultProxy, redis_url: str) -> None:
    """A client of the redirected URL talks to the real server, in large pieces, too."""
    with redis.Redis.from_url(proxy.redirect(redis_url)) as client:
        client.set("large", b"x" * 5_000_000)
        value = client.get("large")
        assert isinstance(value, bytes)
        assert len(value) == 5_000_000


def test_down_closes_and_refuses_until_up(proxy: FaultProxy) -> None:
    """Connections that exist end, new ones are refused, and later ones reach the server again."""
    with connect(proxy.port) as connection:
        assert ping(connection) == b"+PONG\r\n"
        proxy.down()
        assert connection.recv(64) == b""
    with pytest.raises(ConnectionRefusedError):
        connect(proxy.port)
    proxy.up()
    with connect(proxy.port) as connection:
        assert ping(connection) == b"+PONG\r\n"


@pytest.mark.parametrize("made", ["before", "while it hangs"])
def test_hang_answers_nothing_and_keeps_the_connection(proxy: FaultProxy, made: str) -> None:
    """Nothing arrives on old and new connections, and the same connection gets its answer once it is up."""
    if made == "while it hangs":
        proxy.hang()
    with connect(proxy.port) as connection:
        if made == "before":
            assert ping(connection) == b"+PONG\r\n"
            proxy.hang()
        connection.settimeout(SHORT_S)
        with pytest.raises(TimeoutError):
            ping(connection)
        proxy.up()
        connection.settimeout(LONG_S)
        assert connection.recv(64) == b"+PONG\r\n"


def test_a_hanging_connection_can_still_be_closed(proxy: FaultProxy) -> None:
    """From hang to down, a client that waits learns that its connection has ended."""
    with connect(proxy.port) as connection:
        assert ping(connection) == b"+PONG\r\n"
        proxy.hang()
        connection.sendall(b"PING\r\n")
        proxy.down()
        assert connection.recv(64) == b""


def test_reset_cuts_old_and_new_connections(proxy: FaultProxy) -> None:
    """A client reads a reset, not an orderly end."""
    with connect(proxy.port) as connection:
        assert ping(connection) == b"+PONG\r\n"
        proxy.reset()
        with pytest.raises(ConnectionResetError):
            connection.recv(64)
    with pytest.raises(ConnectionResetError):
        with connect(proxy.port) as connection:
            connection.recv(64)


def test_latency_delays_every_answer(proxy: FaultProxy) -> None:
    """No answer arrives sooner than the delay says."""
    with connect(proxy.port) as connection:
        assert ping(connection) == b"+PONG\r\n"
        proxy.latency(100)
        for _ in range(2):
            asked_at = time.perf_counter()
            assert ping(connection) == b"+PONG\r\n"
            assert time.perf_counter() - asked_at >= 0.1


def test_a_change_of_mode_ends_a_long_delay(proxy: FaultProxy) -> None:
    """What waits for its delay is passed on when the latency ends."""
    with connect(proxy.port) as connection:
        assert ping(connection) == b"+PONG\r\n"
        proxy.latency(3_600_000)
        connection.sendall(b"PING\r\n")
        proxy.up()
        assert connection.recv(64) == b"+PONG\r\n"


def test_a_proxy_without_upstream_resets() -> None:
    """Where the server itself is down, the client's connection is cut."""
    with FaultProxy(HOST, free_port()) as proxy:
        with pytest.raises(ConnectionResetError):
            with connect(proxy.port) as connection:
                connection.recv(64)


def test_an_async_client_may_switch_modes_from_its_loop(proxy: FaultProxy) -> None:
    """The proxy works while the test's own event loop waits for a change of mode."""

    async def ask() -> bytes:
        reader, writer = await asyncio.open_connection(HOST, proxy.port)
        proxy.hang()
        writer.write(b"PING\r\n")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(SHORT_S):
                await reader.read(64)
        proxy.up()
        answer = await reader.read(64)
        writer.close()
        await writer.wait_closed()
        return answer

    assert asyncio.run(ask()) == b"+PONG\r\n"
