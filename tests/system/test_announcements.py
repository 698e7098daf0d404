"""Registry changes between API servers that share a database and Kafka: told at once, looked for all the same.

The servers run in this process, because no setting allows a poll that is as rare as these tests need it.
"""

import asyncio
import itertools
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from numbered import BIAS, MODEL, features_of
from onnx_models import linear_regressor, write
from phoenix_server import PhoenixServer
from servers import HOST, free_port, wait_until

from phoenix_ml.bootstrap import bootstrap
from phoenix_ml.infrastructure.events.kafka import Kafka
from phoenix_ml.processes.api import serve
from phoenix_ml.settings import Settings

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]

NEVER_MS = 600_000  # so rare that a test is over before
DEADLINE_S = 30.0
# Each is in force by itself, and says so by the answers' version.
FIRST: dict[str, Any] = {"strategy": "single", "arms": [{"version": "1.0.0"}]}
SECOND: dict[str, Any] = {"strategy": "single", "arms": [{"version": "1.1.0"}]}


@contextmanager
def api_server(settings: Settings) -> Iterator[httpx.Client]:
    """One API process's work in a thread of this one, and a client of it."""
    ready, ended = threading.Event(), threading.Event()
    loop = asyncio.new_event_loop()
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        listener.listen()
        port = listener.getsockname()[1]
        serving = serve(bootstrap(settings), "api-0", listener, ready.set, lambda: False)
        task = loop.create_task(serving)

        def run() -> None:
            try:
                loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
            finally:
                loop.close()
                ended.set()

        threading.Thread(target=run, daemon=True).start()
        try:
            wait_until(lambda: ready.is_set() or ended.is_set(), DEADLINE_S, "the server is ready")
            assert not ended.is_set()
            with httpx.Client(base_url=f"http://{HOST}:{port}", timeout=DEADLINE_S) as client:
                yield client
        finally:
            if not ended.is_set():
                loop.call_soon_threadsafe(task.cancel)
            assert ended.wait(DEADLINE_S)


MakePair = Callable[..., tuple[httpx.Client, httpx.Client]]


@pytest.fixture
def make_pair(tmp_path: Path) -> Iterator[MakePair]:
    """Two servers on one database, each with a data folder of its own; the model's first version answers."""
    registered = PhoenixServer(tmp_path / "catalogue")
    for version, bias in BIAS.items():
        artifact = write(tmp_path / f"{version}.onnx", linear_regressor(3, bias=bias))
        registered.register(artifact, MODEL, version, activate=version == "1.0.0")
    catalogue = registered.settings
    with ExitStack() as servers:

        def make(events: str, poll_ms: int) -> tuple[httpx.Client, httpx.Client]:
            shared = {
                "events": events,
                "database": catalogue.database_url,
                "artifacts": f"file:{catalogue.data / 'artifacts'}",
                "registry_poll_ms": poll_ms,
            }
            one, other = (
                servers.enter_context(
                    api_server(catalogue.model_copy(update={**shared, "data": tmp_path / name}))
                )
                for name in ("one", "other")
            )
            return one, other

        yield make


def version_of(client: httpx.Client) -> str:
    answer = client.post("/predict", json={"model_id": MODEL, "features": features_of(1)})
    return str(answer.raise_for_status().json()["model_version"])


def activate(client: httpx.Client, version: str) -> None:
    client.post(f"/models/{MODEL}/versions/{version}/activate").raise_for_status()


def route(client: httpx.Client, routing: dict[str, Any]) -> None:
    client.put(f"/models/{MODEL}/routing", json=routing).raise_for_status()


def await_version(client: httpx.Client, version: str) -> None:
    wait_until(lambda: version_of(client) == version, DEADLINE_S, f"{version} answers")


def await_followers(*servers: httpx.Client) -> None:
    """Returns when each listens to the others: what was announced before that is not told to it."""
    for one, other in itertools.permutations(servers, 2):
        wait_until(partial(hears, one, other), DEADLINE_S, "announcements are told")
        route(one, FIRST)
        await_version(other, "1.0.0")


def hears(one: httpx.Client, other: httpx.Client) -> bool:
    """Whether the other is told of two changes on the one; before that it answers by the first version."""
    route(one, FIRST)
    route(one, SECOND)
    try:
        wait_until(lambda: version_of(other) == "1.1.0", 0.5, "it is told")
    except TimeoutError:
        return False
    return True


def test_a_change_on_one_server_is_in_force_on_the_other_without_a_poll(
    make_pair: MakePair, kafka_url: str
) -> None:
    """A canary that is stopped must stop everywhere, not at each server's next look."""
    Kafka(kafka_url, 3).create_topics()
    one, other = make_pair(kafka_url, NEVER_MS)
    activate(one, "1.1.0")
    await_followers(one, other)

    route(one, SECOND)
    await_version(other, "1.1.0")
    route(other, FIRST)
    await_version(one, "1.0.0")


def test_a_version_that_is_taken_out_of_service_is_out_on_every_server(
    make_pair: MakePair, kafka_url: str
) -> None:
    """Callers that name it must not get its answers from some processes still, nor miss them when it is back."""
    Kafka(kafka_url, 3).create_topics()
    one, other = make_pair(kafka_url, NEVER_MS)
    activate(one, "1.1.0")
    await_followers(one, other)

    def status() -> int:
        body = {"model_id": MODEL, "model_version": "1.1.0", "features": features_of(1)}
        return other.post("/predict", json=body).status_code

    one.post(f"/models/{MODEL}/versions/1.1.0/deactivate").raise_for_status()
    wait_until(lambda: status() == 409, DEADLINE_S, "the version is refused")
    activate(one, "1.1.0")
    wait_until(lambda: status() == 200, DEADLINE_S, "the version answers again")


def test_servers_that_start_before_the_topic_is_there_are_told_once_it_is(
    make_pair: MakePair, kafka_url: str
) -> None:
    """The ship role makes the topics, and starts at the same moment as the API processes."""
    one, other = make_pair(kafka_url, NEVER_MS)
    activate(one, "1.1.0")

    Kafka(kafka_url, 3).create_topics()

    await_followers(one, other)


def test_a_change_succeeds_without_kafka_and_the_poll_brings_it(
    make_pair: MakePair, caplog: pytest.LogCaptureFixture
) -> None:
    """Kafka only makes it faster; the database is what counts."""
    with caplog.at_level(logging.WARNING):
        one, other = make_pair(f"kafka://{HOST}:{free_port()}", 200)
        activate(one, "1.1.0")

        route(one, SECOND)
        await_version(other, "1.1.0")

    assert [record for record in caplog.records if record.exc_info] == []
