"""One real server with two API processes for all HTTP tests, and the two lanes to it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import zoo
from lanes import BATCH_LIMIT, UPLOAD_LIMIT_BYTES, Lane, ServerLane, open_lane
from phoenix_server import PhoenixServer
from servers import free_port


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PhoenixServer]:
    """A server with every model of the zoo; the limits that tests reach are lower than the defaults."""
    phoenix = PhoenixServer(
        tmp_path_factory.mktemp("spine"),
        workers=2,
        batch_limit=BATCH_LIMIT,
        upload_limit_bytes=UPLOAD_LIMIT_BYTES,
        registry_poll_ms=250,
        grpc_port=free_port(),
    )
    zoo.stock(phoenix)
    with phoenix:
        yield phoenix


@pytest.fixture(scope="session", params=["server", "routes"])
def lane(request: pytest.FixtureRequest, server: PhoenixServer) -> Iterator[Lane]:
    """Each of the two ways to the same calls."""
    with open_lane(request.param, server) as opened:
        yield opened


@pytest.fixture(scope="session")
def http(server: PhoenixServer) -> Iterator[Lane]:
    """The real server alone, for what only FastAPI answers anyway."""
    opened = ServerLane(server.url)
    yield opened
    opened.close()
