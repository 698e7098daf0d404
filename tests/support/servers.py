"""Real Redis, PostgreSQL and Kafka servers for tests: own processes, free ports, folders of their own (Linux)."""

from __future__ import annotations

import atexit
import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self
from urllib.parse import urlsplit
from uuid import uuid4

HOST = "127.0.0.1"
START_DEADLINE_S = 30.0
STOP_DEADLINE_S = 60.0
FREEZE_DEADLINE_S = 30.0
POLL_S = 0.01
LOG_TAIL_LINES = 20
INSTALL_SCRIPT = Path(__file__).with_name("install_servers.sh")
KAFKA_JARS = Path(__file__).parents[2] / ".venv" / "kafka"

# The kernel's parent-death signal follows the thread that forked, not the process: a server restarted inside
# `asyncio.to_thread` would die with that pool. This thread lives as long as the test run.
_spawner = ThreadPoolExecutor(max_workers=1, thread_name_prefix="server-spawner")
_given_ports: set[int] = set()


class ServerUnavailable(RuntimeError):
    """The server's programs are not installed; the message says how to get them."""


class ServerError(RuntimeError):
    """A server did not start or stop in time; the message ends with the tail of its log."""


def wait_until(condition: Callable[[], bool], deadline_s: float, expectation: str) -> None:
    """Return as soon as the condition holds; raise TimeoutError naming the expectation after the deadline."""
    give_up_at = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > give_up_at:
            raise TimeoutError(f"not within {deadline_s} s: {expectation}")
        time.sleep(POLL_S)


def has_ended(pid: int) -> bool:
    """True once the process runs no more and has closed its files, whether or not its parent has taken note of it."""
    return _states_of_threads(pid) <= {"Z", "X"}


def free_port() -> int:
    """A local port that nobody listens on, and that stays free while its server is down: none is given twice.

    It lies below the range from which Linux takes ports for outgoing connections (32768 and up): otherwise a
    client that retries against a dead server may be given that very port, and connect to itself.
    """
    while True:
        port = random.randint(15_000, 32_000)
        if port in _given_ports:
            continue
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((HOST, port))
            _given_ports.add(port)
            return port


class Server(ABC):
    """One server process and its folder; data and port stay the same over stop, kill and start.

    As a context manager it starts on entry; on exit the process ends and the folder goes.
    """

    name: ClassVar[str]
    stop_signal: ClassVar[signal.Signals]
    start_deadline_s: ClassVar[float] = START_DEADLINE_S

    def __init__(self) -> None:
        self.port = free_port()
        self._folder: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    @abstractmethod
    def url(self) -> str:
        """Where clients reach the server."""

    def start(self) -> None:
        """Return when the server answers: starts one that has ended, thaws a frozen one."""
        if self._folder is None:
            self._folder = self._make_folder()
        give_up_at = time.monotonic() + self.start_deadline_s
        if self._running() is not None:
            self.thaw()
        else:
            self._process = self._spawn(self._folder)
        while True:
            assert self._process is not None
            if self._running() is None:
                if not self._may_start_later(self._folder):
                    raise self._error(f"ended at once with status {self._process.returncode}")
                self._process = self._spawn(self._folder)
            elif self._answers(self._folder, self._process.pid):
                return
            if time.monotonic() > give_up_at:
                self.kill()
                raise self._error(f"did not answer within {self.start_deadline_s} s")
            time.sleep(POLL_S)

    def stop(self) -> None:
        """End the server as its operator would; no effect on one that has ended."""
        process = self._running()
        if process is None:
            return
        self.thaw()
        process.send_signal(self.stop_signal)
        try:
            process.wait(STOP_DEADLINE_S)
        except subprocess.TimeoutExpired as late:
            self.kill()
            raise self._error(f"did not stop within {STOP_DEADLINE_S} s") from late

    def kill(self) -> None:
        """End the server and its worker processes with SIGKILL, all at once."""
        process = self._running()
        if process is None:
            return
        self.freeze()
        for pid in [process.pid, *_children_of(process.pid)]:
            _send(pid, signal.SIGKILL)
        process.wait()

    def freeze(self) -> None:
        """Stop the server's time: connections stay open, nothing is answered."""
        process = self._running()
        if process is None:
            raise self._error("cannot be frozen: it does not run")
        # The parent first, and until it truly stands still: after that no new worker can appear.
        _freeze([process.pid])
        _freeze(_children_of(process.pid))

    def thaw(self) -> None:
        """Let a frozen server continue; no effect on one that runs."""
        process = self._running()
        if process is not None:
            for pid in [*_children_of(process.pid), process.pid]:
                _send(pid, signal.SIGCONT)

    def restart(self) -> None:
        """Stop gracefully and start again, on the same port and data."""
        self.stop()
        self.start()

    def log_tail(self) -> str:
        """The last lines that the server has logged."""
        if self._folder is None:
            return ""
        log = self._folder / "server.log"
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        return "\n".join(lines[-LOG_TAIL_LINES:])

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.stop()
        finally:
            self._discard()

    @abstractmethod
    def _command(self, folder: Path) -> list[str]:
        """The command line of the server."""

    @abstractmethod
    def _answers(self, folder: Path, pid: int) -> bool:
        """Whether this very process, and not another server on its port, takes requests."""

    def _may_start_later(self, folder: Path) -> bool:
        """Whether a start that ended at once is worth another try."""
        return False

    def _make_folder(self) -> Path:
        folder = Path(tempfile.mkdtemp(prefix=f"phoenix-{self.name.lower()}-", dir=_temp_folder_for_all()))
        self._folder = folder
        atexit.register(self._discard)
        return folder

    def _discard(self) -> None:
        atexit.unregister(self._discard)
        self.kill()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _running(self) -> subprocess.Popen[bytes] | None:
        process = self._process
        return process if process is not None and process.poll() is None else None

    def _spawn(self, folder: Path) -> subprocess.Popen[bytes]:
        def spawn() -> subprocess.Popen[bytes]:
            with (folder / "server.log").open("ab") as log:
                return subprocess.Popen(
                    self._command(folder),
                    cwd=folder,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    # Ctrl-C is for pytest, which then stops the servers in order.
                    start_new_session=True,
                )

        return _spawner.submit(spawn).result()

    def _error(self, what: str) -> ServerError:
        return ServerError(f"{self.name} on port {self.port} {what}; its log ends with:\n{self.log_tail()}")


class RedisServer(Server):
    """A Redis server of its own that keeps nothing on disk: what it held is gone when it ends."""

    name = "Redis"
    stop_signal = signal.SIGTERM

    @property
    def url(self) -> str:
        """Where clients reach database 0."""
        return f"redis://{HOST}:{self.port}/0"

    def _command(self, folder: Path) -> list[str]:
        program = shutil.which("redis-server")
        if program is None:
            raise _unavailable("Redis", "redis-server")
        options = ["--port", str(self.port), "--bind", HOST, "--save", "", "--appendonly", "no"]
        return [*_tied_to_this_run(), program, *options]

    def _answers(self, folder: Path, pid: int) -> bool:
        try:
            with socket.create_connection((HOST, self.port), timeout=1) as connection:
                connection.sendall(b"INFO server\r\n")
                return f"process_id:{pid}\r\n".encode() in connection.recv(65_536)
        except OSError:
            return False


class RedisClusterNode(RedisServer):
    """A node of a cluster; it knows its slots and the others again when it was killed and started."""

    name = "Redis-cluster-node"

    def __init__(self) -> None:
        super().__init__()
        self.bus_port = free_port()

    def _command(self, folder: Path) -> list[str]:
        options = ["--cluster-enabled", "yes", "--cluster-port", str(self.bus_port)]
        # Longer than a busy machine stands still: nodes that miss each other refuse everything for a while.
        options += ["--cluster-require-full-coverage", "no", "--cluster-node-timeout", "3000"]
        return [*super()._command(folder), *options]


class RedisCluster:
    """Three masters that share the slots between them."""

    def __init__(self) -> None:
        self.nodes = [RedisClusterNode() for _ in range(3)]
        self._running = contextlib.ExitStack()

    @property
    def url(self) -> str:
        """Where clients reach the first two; they find the third."""
        return f"redis+cluster://{','.join(f'{HOST}:{node.port}' for node in self.nodes[:2])}"

    def start(self) -> None:
        """Return when every node answers, and knows that all slots are served."""
        for node in self.nodes:
            node.start()
        wait_until(lambda: all(map(_serves_all_slots, self.nodes)), START_DEADLINE_S, "all slots are served")

    def empty(self) -> None:
        """Remove every key."""
        for node in self.nodes:
            empty_redis(node.url)

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            shares = [(0, 5_500), (5_501, 11_000), (11_001, 16_383)]
            for epoch, (node, (first, last)) in enumerate(zip(self.nodes, shares, strict=True), 1):
                stack.enter_context(node)
                ask_redis(node.url, "CLUSTER", "ADDSLOTSRANGE", first, last)
                ask_redis(node.url, "CLUSTER", "SET-CONFIG-EPOCH", epoch)
            met = self.nodes[0]
            for node in self.nodes[1:]:
                ask_redis(node.url, "CLUSTER", "MEET", HOST, met.port, met.bus_port)
            self.start()
            self._running = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._running.close()


class SecuredRedisServer(RedisServer):
    """One that also listens with TLS, and on a socket file; certificate and socket lie in the folder given."""

    name = "Redis-secured"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.tls_port = free_port()
        self.certificate = folder / "certificate.pem"
        self.socket = folder / "redis.sock"

    def _command(self, folder: Path) -> list[str]:
        self.certificate.write_text(_self_signed())
        pem = str(self.certificate)
        tls = ["--tls-port", str(self.tls_port), "--tls-cert-file", pem, "--tls-key-file", pem]
        tls += ["--tls-ca-cert-file", pem, "--tls-auth-clients", "no"]
        return [*super()._command(folder), *tls, "--unixsocket", str(self.socket)]


class RedisReplica(RedisServer):
    """A server that copies another one until sentinels make it the master."""

    name = "Redis-replica"

    def __init__(self, master: RedisServer) -> None:
        super().__init__()
        self._master = master

    def _command(self, folder: Path) -> list[str]:
        return [*super()._command(folder), "--replicaof", HOST, str(self._master.port)]


class RedisSentinel(RedisServer):
    """A sentinel that decides alone, over two servers: one is the master, the other follows it."""

    name = "Redis-sentinel"
    SERVICE = "features"

    def __init__(self) -> None:
        super().__init__()
        first = RedisServer()
        self.servers = [first, RedisReplica(first)]
        self._dead_sentinel = free_port()

    @property
    def url(self) -> str:
        """Where clients ask for the master; of the two sentinels that they are told of one is down."""
        return f"redis+sentinel://{HOST}:{self._dead_sentinel},{HOST}:{self.port}/{self.SERVICE}"

    def master(self) -> RedisServer:
        """Who is the master now."""
        found = ask_redis(f"redis://{HOST}:{self.port}", "SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.SERVICE)
        return next(server for server in self.servers if server.port == int(found[1]))

    def start(self) -> None:
        """Return when both servers and the sentinel answer, and a failover could be made."""
        for server in self.servers:
            server.start()
        super().start()
        master = self.master()
        for server in self.servers:
            # Sentinels do so, too, after 10 s.
            if server is not master:
                ask_redis(server.url, "REPLICAOF", HOST, master.port)
        # After a failover a sentinel takes up to 20 s to believe it.
        wait_until(self._has_replica, 2 * START_DEADLINE_S, "one server follows the other")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        for server in self.servers:
            server.__exit__(kind, error, trace)

    def _command(self, folder: Path) -> list[str]:
        config = folder / "sentinel.conf"
        if not config.exists():
            master = f"{self.SERVICE} {HOST} {self.servers[0].port} 1"
            # Longer than a busy machine stands still, or there is a failover that no test asked for.
            config.write_text(
                f"sentinel monitor {master}\n"
                f"sentinel down-after-milliseconds {self.SERVICE} 2000\n"
                f"sentinel failover-timeout {self.SERVICE} 2000\n"
            )
        tied, program = _tied_to_this_run(), super()._command(folder)[len(_tied_to_this_run())]
        return [*tied, program, str(config), "--sentinel", "--port", str(self.port), "--bind", HOST]

    def _has_replica(self) -> bool:
        import redis

        with redis.Redis(HOST, self.port) as client:
            replicas = client.sentinel_slaves(self.SERVICE)
        is_known = any(not r["is_sdown"] and not r["is_disconnected"] for r in replicas)
        return is_known and b"state=online" in ask_redis(self.master().url, "INFO", "replication")


class PostgresServer(Server):
    """A PostgreSQL server of its own; committed data survives kill() and start()."""

    name = "PostgreSQL"
    stop_signal = signal.SIGINT  # "fast": clients are sent away, SIGTERM would wait for them

    @property
    def url(self) -> str:
        """Where clients reach the maintenance database."""
        return f"postgresql://postgres@{HOST}:{self.port}/postgres"

    def create_database(self) -> str:
        """The URL of a new, empty database."""
        return create_database(self.url)

    def drop_database(self, url: str) -> None:
        """Remove a database, and disconnect those who still use it."""
        drop_database(self.url, url)

    def _command(self, folder: Path) -> list[str]:
        options = {
            "port": self.port,
            "listen_addresses": HOST,
            "unix_socket_directories": "",  # TCP only: nothing outside the folder, no limit on its path's length
            "fsync": "off",  # survives the death of a process; only a power cut needs it
        }
        settings = [part for key, value in options.items() for part in ("-c", f"{key}={value}")]
        program = _postgres_programs() / "postgres"
        return [*_tied_to_this_run(_postgres_user()), str(program), "-D", str(folder / "data"), *settings]

    def _answers(self, folder: Path, pid: int) -> bool:
        try:
            facts = (folder / "data" / "postmaster.pid").read_text().split()
        except FileNotFoundError:
            return False
        return facts[:1] == [str(pid)] and facts[-1] == "ready"

    def _may_start_later(self, folder: Path) -> bool:
        # Left by a killed server: while its last worker is ending, PostgreSQL refuses to start beside it.
        return (folder / "data" / "postmaster.pid").exists()

    def _make_folder(self) -> Path:
        initdb = _postgres_programs() / "initdb"
        folder = super()._make_folder()
        user = _postgres_user()
        if user is not None:
            shutil.chown(folder, user, user)
        options = ["-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"]
        made = subprocess.run(
            [*_tied_to_this_run(user), str(initdb), *options, "-D", str(folder / "data")],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if made.returncode != 0:
            self._discard()
            raise ServerError(f"initdb ended with status {made.returncode}:\n{made.stdout}{made.stderr}")
        return folder


class KafkaServer(Server):
    """A Kafka broker of its own, its own controller too; what it acknowledged survives kill() and start().

    It creates no topic by itself, and tells clients that come through `proxied_port` to stay on the proxy that
    the caller puts on `proxy_port`: `FaultProxy(HOST, kafka.proxied_port, port=kafka.proxy_port)`. On
    `secured_port` it speaks SASL_SSL, to the user `phoenix` with `password`, under `certificate`.
    """

    name = "Kafka"
    stop_signal = signal.SIGTERM
    start_deadline_s = 90.0
    password = "50% of +1 & a/b?"  # all that has a meaning in a URL

    def __init__(self) -> None:
        super().__init__()
        self.proxied_port = free_port()
        self.secured_port = free_port()
        self.proxy_port = free_port()
        self._controller_port = free_port()

    @property
    def bootstrap_servers(self) -> str:
        """Where clients find the broker, in Kafka's own words."""
        return f"{HOST}:{self.port}"

    @property
    def url(self) -> str:
        """Where clients reach the broker, as a setting of Phoenix."""
        return f"kafka://{self.bootstrap_servers}"

    @property
    def proxied_url(self) -> str:
        """The same through the proxy."""
        return f"kafka://{HOST}:{self.proxy_port}"

    @property
    def certificate(self) -> Path:
        """What the broker shows on `secured_port`: signed by itself, so that it is its own authority."""
        assert self._folder is not None
        return self._folder / "certificate.pem"

    def _command(self, folder: Path) -> list[str]:
        return [*_tied_to_this_run(), *_java(), "kafka.Kafka", str(folder / "server.properties")]

    def _answers(self, folder: Path, pid: int) -> bool:
        from confluent_kafka import KafkaException
        from confluent_kafka.admin import AdminClient

        with contextlib.suppress(OSError), socket.create_connection((HOST, self.port), timeout=1):
            # Without the empty logger librdkafka would tell on stderr of every attempt.
            client = AdminClient({"bootstrap.servers": self.bootstrap_servers, "log_level": 0})
            with contextlib.suppress(KafkaException):
                found = client.list_topics(timeout=2)
                # Until the controller has admitted it, a broker answers but can create no topic.
                return found.controller_id in found.brokers
        return False

    def _make_folder(self) -> Path:
        java = _java()
        folder = super()._make_folder()
        properties = {
            "process.roles": "broker,controller",
            "node.id": "1",
            "controller.quorum.voters": f"1@{HOST}:{self._controller_port}",
            "listeners": f"DIRECT://{HOST}:{self.port},PROXIED://{HOST}:{self.proxied_port},"
            f"SECURED://{HOST}:{self.secured_port},CONTROLLER://{HOST}:{self._controller_port}",
            "advertised.listeners": f"DIRECT://{HOST}:{self.port},PROXIED://{HOST}:{self.proxy_port},"
            f"SECURED://{HOST}:{self.secured_port}",
            "listener.security.protocol.map": "DIRECT:PLAINTEXT,PROXIED:PLAINTEXT,SECURED:SASL_SSL,"
            "CONTROLLER:PLAINTEXT",
            "listener.name.secured.ssl.keystore.type": "PEM",
            "listener.name.secured.ssl.keystore.location": str(folder / "key-and-certificate.pem"),
            "listener.name.secured.sasl.enabled.mechanisms": "PLAIN",
            "listener.name.secured.plain.sasl.jaas.config": "org.apache.kafka.common.security.plain."
            f'PlainLoginModule required user_phoenix="{self.password}";',
            "controller.listener.names": "CONTROLLER",
            "inter.broker.listener.name": "DIRECT",
            "log.dirs": str(folder / "data"),
            "auto.create.topics.enable": "false",
            "offsets.topic.num.partitions": "1",
            "offsets.topic.replication.factor": "1",
            "transaction.state.log.num.partitions": "1",
            "transaction.state.log.replication.factor": "1",
            "transaction.state.log.min.isr": "1",
            "group.initial.rebalance.delay.ms": "0",
            # A broker that was killed comes back only when the controller has given up its former self.
            "broker.heartbeat.interval.ms": "300",
            "broker.session.timeout.ms": "3000",
        }
        (folder / "server.properties").write_text("".join(f"{k}={v}\n" for k, v in properties.items()))
        key_and_certificate = _self_signed()
        (folder / "key-and-certificate.pem").write_text(key_and_certificate)
        (folder / "certificate.pem").write_text(key_and_certificate.partition("-----END PRIVATE KEY-----")[2])
        arguments = ["format", "--cluster-id", "4L6g3nShT-eMCtK--X86sw", "--config", "server.properties"]
        made = subprocess.run(
            [*_tied_to_this_run(), *java, "kafka.tools.StorageTool", *arguments],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if made.returncode != 0:
            self._discard()
            raise ServerError(f"formatting ended with status {made.returncode}:\n{made.stdout}{made.stderr}")
        return folder


def empty_redis(url: str) -> None:
    """Remove every key of the database that the URL names."""
    import redis

    with redis.Redis.from_url(url) as client:
        client.flushdb()


def ask_redis(url: str, *command: str | int) -> Any:
    """What the server that the URL names answers, as bytes and lists."""
    import redis

    with redis.Redis.from_url(url) as client:
        client.response_callbacks.clear()
        return client.execute_command(*command)


def count_redis_keys(url: str) -> int:
    """How many keys the database that the URL names holds."""
    import redis

    with redis.Redis.from_url(url) as client:
        return int(client.dbsize())


def redis_version(url: str) -> str:
    """The version of the server behind the URL."""
    import redis

    with redis.Redis.from_url(url) as client:
        return str(client.info("server")["redis_version"])


def create_database(server_url: str) -> str:
    """The URL of a new, empty PostgreSQL database on that server."""
    import psycopg
    from psycopg import sql

    name = f"phoenix_{uuid4().hex[:16]}"
    with psycopg.connect(server_url, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {} TEMPLATE template0").format(sql.Identifier(name)))
    return urlsplit(server_url)._replace(path=f"/{name}").geturl()


def drop_database(server_url: str, url: str) -> None:
    """Remove the database that `create_database` made, and disconnect those who still use it."""
    import psycopg
    from psycopg import sql

    name = urlsplit(url).path.removeprefix("/")
    with psycopg.connect(server_url, autocommit=True) as connection:
        connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


def postgres_version(url: str) -> str:
    """The version of the server behind the URL."""
    import psycopg

    with psycopg.connect(url) as connection:
        return connection.info.parameter_status("server_version") or "of unknown version"


def kafka_version() -> str:
    """The version of Kafka that KafkaServer runs."""
    return next(
        (jar.stem.rpartition("-")[2] for jar in KAFKA_JARS.glob("kafka-server-[0-9]*.jar")), "unknown"
    )


def new_prefix() -> str:
    """A prefix of topics and groups that nobody else uses on the same broker."""
    return f"test-{uuid4().hex[:12]}"


def _unavailable(name: str, package: str) -> ServerUnavailable:
    return ServerUnavailable(
        f"{name} is not installed, and these tests talk to a real one. Run {INSTALL_SCRIPT}, install the Debian "
        f"package {package}, or name a running server in PHOENIX_TEST_REDIS, PHOENIX_TEST_POSTGRES or PHOENIX_TEST_KAFKA."
    )


def _postgres_programs() -> Path:
    found = Path("/usr/lib/postgresql").glob("*/bin/postgres")
    newest = max(found, key=lambda program: float(program.parts[-3]), default=None)
    program = str(newest) if newest is not None else shutil.which("postgres")
    if program is None:
        raise _unavailable("PostgreSQL", "postgresql")
    return Path(program).resolve().parent


def _postgres_user() -> str | None:
    """The user to become, as PostgreSQL refuses to run as root."""
    return "postgres" if os.geteuid() == 0 else None


def _serves_all_slots(node: RedisClusterNode) -> bool:
    facts = ask_redis(node.url, "CLUSTER", "INFO")
    return b"cluster_state:ok" in facts and b"cluster_slots_ok:16384" in facts


def _java() -> list[str]:
    """The start of a command line that runs a class of Kafka's."""
    java = shutil.which("java")
    if java is None or not any(KAFKA_JARS.glob("kafka_*.jar")):
        raise _unavailable("Kafka", "openjdk-17-jre-headless, and the jars of tests/support/kafka")
    # A broker that lives for minutes starts faster without the second compiler, and needs no heap to speak of.
    options = ["-Xms256m", "-Xmx512m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xshare:auto"]
    return [java, *options, "-cp", f"{KAFKA_JARS}/*"]


def _self_signed() -> str:
    """A private key and a certificate of this machine, in PEM."""
    request = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=kafka"]
    options = ["-addext", f"subjectAltName=IP:{HOST}", "-keyout", "-", "-out", "-"]
    return subprocess.run([*request, *options], capture_output=True, text=True, check=True).stdout


def _tied_to_this_run(user: str | None = None) -> list[str]:
    """The start of a command line that ends the command when this process dies, however it dies."""
    become = [f"--reuid={user}", f"--regid={user}", "--clear-groups"] if user is not None else []
    return ["setpriv", *become, "--pdeathsig=KILL", "--"]


def _temp_folder_for_all() -> Path:
    """A folder for temporary files that another user may enter, too."""
    chosen = Path(tempfile.gettempdir()).resolve()
    may_enter = all(folder.stat().st_mode & 0o001 for folder in (chosen, *chosen.parents))
    return chosen if may_enter else Path("/tmp")


def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _freeze(pids: list[int]) -> None:
    for pid in pids:
        _send(pid, signal.SIGSTOP)
    wait_until(lambda: all(map(_stands_still, pids)), FREEZE_DEADLINE_S, f"processes {pids} stand still")


def _state_and_parent(process_or_thread: Path) -> tuple[str, int] | None:
    try:
        line = (process_or_thread / "stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The program's name, in parentheses, may itself hold spaces and parentheses.
    state, parent = line.rpartition(")")[2].split()[:2]
    return state, int(parent)


def _children_of(pid: int) -> list[int]:
    everyone = [entry for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [int(child.name) for child in everyone if (_state_and_parent(child) or ("", 0))[1] == pid]


def _states_of_threads(pid: int) -> set[str]:
    """None where the process is gone. Its first thread, whose state is the process's, ends and halts before others."""
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
    except (FileNotFoundError, ProcessLookupError):
        return set()
    return {facts[0] for thread in threads if (facts := _state_and_parent(thread)) is not None}


def _stands_still(pid: int) -> bool:
    return _states_of_threads(pid) <= {"T", "t", "Z", "X"}
