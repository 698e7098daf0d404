"""What several contract suites run over: SQLite and a real PostgreSQL, the journal and a real Kafka."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import servers
from roads import KafkaRoad, LocalRoad, Road
from servers import PostgresServer, RedisCluster, RedisSentinel, RedisServer

from phoenix_ml.infrastructure.sql.database import Database


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def url(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, _given_postgres_url: str | None
) -> Iterator[str]:
    """Each kind of database, with its tables, shared by the module's tests: ``database`` empties them."""
    if request.param == "sqlite":
        new_url = f"sqlite:///{tmp_path_factory.mktemp('database') / 'phoenix.db'}"
    else:
        server_url = _given_postgres_url or ""
        if not server_url:
            server: PostgresServer = request.getfixturevalue("postgres_server")
            server.start()
            server_url = server.url
        new_url = servers.create_database(server_url)
    with closing(Database(new_url)) as database:
        database.upgrade()
    yield new_url
    if request.param == "postgresql":
        servers.drop_database(server_url, new_url)


@pytest.fixture(scope="session")
def redis_cluster(redis_server: RedisServer) -> Iterator[RedisCluster]:
    """A cluster of this run, to kill and freeze at will."""
    with RedisCluster() as cluster:
        yield cluster


@pytest.fixture
def redis_cluster_url(redis_cluster: RedisCluster) -> str:
    """An empty cluster that runs."""
    redis_cluster.start()
    redis_cluster.empty()
    return redis_cluster.url


@pytest.fixture(scope="session")
def redis_sentinel(redis_server: RedisServer) -> Iterator[RedisSentinel]:
    """A sentinel of this run with its master and replica, to kill and freeze at will."""
    with RedisSentinel() as sentinel:
        yield sentinel


@pytest.fixture
def redis_sentinel_url(redis_sentinel: RedisSentinel) -> str:
    """An empty master behind a sentinel that could fail over."""
    redis_sentinel.start()
    servers.empty_redis(redis_sentinel.master().url)
    return redis_sentinel.url


@pytest.fixture(params=["local", "kafka"])
def road(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Road]:
    """Each of the two roads, empty."""
    if request.param == "local":
        with closing(LocalRoad(tmp_path)) as local:
            yield local
    else:
        with closing(KafkaRoad(request.getfixturevalue("kafka_url"))) as kafka:
            yield kafka
