"""What several contract suites run over: SQLite and a real PostgreSQL, the journal and a real Kafka."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import servers
from roads import KafkaRoad, LocalRoad, Road
from servers import PostgresServer

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


@pytest.fixture(params=["local", "kafka"])
def road(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Road]:
    """Each of the two roads, empty."""
    if request.param == "local":
        with closing(LocalRoad(tmp_path)) as local:
            yield local
    else:
        with closing(KafkaRoad(request.getfixturevalue("kafka_url"))) as kafka:
            yield kafka
