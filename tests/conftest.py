"""What every test may ask for, and what the run says about the servers and the GPU it used."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import pytest
import servers
from hypothesis import settings
from servers import KafkaServer, PostgresServer, RedisServer, Server, ServerUnavailable

settings.register_profile("default", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") == "true" else "default")

_said = pytest.StashKey[list[str]]()
AnyServer = TypeVar("AnyServer", bound=Server)


def pytest_configure(config: pytest.Config) -> None:
    """Prepare the list of what the run has to say at its end."""
    config.stash[_said] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say which servers were used or missing, and which tests were left out."""
    for line in config.stash[_said]:
        terminalreporter.write_line(line, red=line.startswith("MISSING"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect tests that need a GPU where there is none, and have the run say how many."""
    for_gpu = [item for item in items if item.get_closest_marker("gpu")]
    lack = _lack_of_gpu() if for_gpu else None
    if lack is not None:
        config.hook.pytest_deselected(items=for_gpu)
        items[:] = [item for item in items if item not in for_gpu]
        tests = "test" if len(for_gpu) == 1 else "tests"
        config.stash[_said].append(f"{len(for_gpu)} GPU {tests} deselected: no GPU ({lack})")


def _lack_of_gpu() -> str | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return "no nvidia-smi"
    if subprocess.run([program, "-L"], capture_output=True, timeout=30, check=False).returncode != 0:
        return "nvidia-smi finds none"
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return "this onnxruntime has no CUDA provider"
    return None


@contextmanager
def _own(config: pytest.Config, server: AnyServer) -> Iterator[AnyServer]:
    try:
        with server:
            yield server
    except ServerUnavailable as lack:
        config.stash[_said].append(f"MISSING: {lack}")
        raise


@pytest.fixture(scope="session")
def redis_server(pytestconfig: pytest.Config) -> Iterator[RedisServer]:
    """A Redis server of this run, to kill and freeze at will: `redis_url` starts it again."""
    with _own(pytestconfig, RedisServer()) as server:
        pytestconfig.stash[_said].append(f"Redis {servers.redis_version(server.url)}: own server")
        yield server


@pytest.fixture(scope="session")
def postgres_server(pytestconfig: pytest.Config) -> Iterator[PostgresServer]:
    """A PostgreSQL server of this run, to kill and freeze at will: `postgres_url` starts it again."""
    with _own(pytestconfig, PostgresServer()) as server:
        pytestconfig.stash[_said].append(f"PostgreSQL {servers.postgres_version(server.url)}: own server")
        yield server


@pytest.fixture(scope="session")
def kafka_server(pytestconfig: pytest.Config) -> Iterator[KafkaServer]:
    """A Kafka broker of this run, to kill and freeze at will: `kafka_url` starts it again."""
    with _own(pytestconfig, KafkaServer()) as server:
        pytestconfig.stash[_said].append(f"Kafka {servers.kafka_version()}: own server")
        yield server


@pytest.fixture(scope="session")
def _given_redis_url(pytestconfig: pytest.Config) -> Iterator[str | None]:
    url = os.environ.get("PHOENIX_TEST_REDIS")
    if not url:
        yield None
        return
    version = servers.redis_version(url)
    pytestconfig.stash[_said].append(f"Redis {version}: given by PHOENIX_TEST_REDIS")
    if keys := servers.count_redis_keys(url):
        pytest.fail(f"PHOENIX_TEST_REDIS holds {keys} keys, and tests empty it: name an empty database")
    yield url
    servers.empty_redis(url)


@pytest.fixture(scope="session")
def _given_postgres_url(pytestconfig: pytest.Config) -> str | None:
    url = os.environ.get("PHOENIX_TEST_POSTGRES")
    if not url:
        return None
    version = servers.postgres_version(url)
    pytestconfig.stash[_said].append(f"PostgreSQL {version}: given by PHOENIX_TEST_POSTGRES")
    return url


@pytest.fixture
def redis_url(request: pytest.FixtureRequest, _given_redis_url: str | None) -> str:
    """The URL of an emptied Redis database, on the server that PHOENIX_TEST_REDIS names or on our own."""
    url = _given_redis_url
    if url is None:
        server: RedisServer = request.getfixturevalue("redis_server")
        server.start()
        url = server.url
    servers.empty_redis(url)
    return url


@pytest.fixture
def postgres_url(request: pytest.FixtureRequest, _given_postgres_url: str | None) -> Iterator[str]:
    """The URL of a new PostgreSQL database, on the server that PHOENIX_TEST_POSTGRES names or on our own."""
    if _given_postgres_url is not None:
        url = servers.create_database(_given_postgres_url)
        yield url
        servers.drop_database(_given_postgres_url, url)
        return
    server: PostgresServer = request.getfixturevalue("postgres_server")
    server.start()
    url = server.create_database()
    yield url
    server.start()
    server.drop_database(url)


@pytest.fixture(scope="session")
def _given_kafka_url(pytestconfig: pytest.Config) -> str | None:
    given = os.environ.get("PHOENIX_TEST_KAFKA")
    if given:
        pytestconfig.stash[_said].append("Kafka: given by PHOENIX_TEST_KAFKA")
    return f"kafka://{given.removeprefix('kafka://')}" if given else None


@pytest.fixture
def kafka_url(request: pytest.FixtureRequest, _given_kafka_url: str | None) -> str:
    """The URL of the broker that PHOENIX_TEST_KAFKA names or of our own, with topics and a group of this test's."""
    url = _given_kafka_url
    if url is None:
        server: KafkaServer = request.getfixturevalue("kafka_server")
        server.start()
        url = server.url
    return f"{url}/{servers.new_prefix()}"
