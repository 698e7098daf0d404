"""Two ways to the same calls: a real server, and the ordinary routes on FastAPI in this process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol
from uuid import uuid4

import httpx
from phoenix_server import PhoenixServer
from servers import wait_until

from phoenix_ml.bootstrap import bootstrap, bootstrap_infer, bootstrap_predict, open_features
from phoenix_ml.infrastructure.events.journal import JournalWriter
from phoenix_ml.infrastructure.http.app import explored_app
from phoenix_ml.infrastructure.http.calls import PredictionCalls
from phoenix_ml.infrastructure.http.infer import InferCalls
from phoenix_ml.infrastructure.telemetry.meter import MetricsMeter
from phoenix_ml.infrastructure.telemetry.metrics import MetricsWriter

ANSWER_DEADLINE_S = 30.0
LOG_DEADLINE_S = 60.0

# Of the server that all HTTP tests share: lower than the defaults, so that tests reach them.
BATCH_LIMIT = 50
UPLOAD_LIMIT_BYTES = 1 << 20


class Lane(Protocol):
    """Requests to one API process, in order."""

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        """The answer; options are httpx's, and `chunks` for a body of unknown length."""
        ...


class ServerLane:
    """One connection, kept open, to a real server: so one and the same of its API processes answers."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=ANSWER_DEADLINE_S)

    def request(
        self, method: str, path: str, chunks: Sequence[bytes] | None = None, **options: Any
    ) -> httpx.Response:
        """The server's answer."""
        if chunks is not None:
            options["content"] = iter(chunks)
        return self._client.request(method, path, **options)

    def close(self) -> None:
        """Ends the connection."""
        self._client.close()


class RoutesLane:
    """The FastAPI application alone, as another server than ours would run it, in an API process's place.

    It works on the data folder of a real server, whose background process logs what this one journals.
    """

    def __init__(self, server: PhoenixServer) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="routes-lane", daemon=True)
        self._thread.start()
        self._stack = ExitStack()
        settings = server.settings
        phoenix = bootstrap(settings)
        self._stack.callback(phoenix.database.close)
        meter = MetricsMeter(
            self._stack.enter_context(MetricsWriter(settings.metrics_folder / "routes.mmap"))
        )
        journal = JournalWriter(
            settings.journal_folder / "routes",
            segment_bytes=settings.journal_segment_bytes,
            limit_bytes=settings.journal_limit_bytes,
        )
        self._stack.callback(journal.close)
        features = open_features(settings)
        self._stack.callback(lambda: self._run(features.close()))
        self._live, predict = bootstrap_predict(phoenix, features, journal, meter)
        calls = PredictionCalls(
            predict,
            self._live,
            journal,
            meter,
            body_limit_bytes=settings.body_limit_bytes,
            batch_limit=settings.batch_limit,
        )
        infer = bootstrap_infer(phoenix, self._live, predict, journal, meter)
        infer_calls = InferCalls(infer, self._live, meter, body_limit_bytes=settings.tensor_body_limit_bytes)
        self._app = explored_app(phoenix, features, self._live, calls, infer_calls, lambda: "ok")
        transport = httpx.ASGITransport(self._app, raise_app_exceptions=False)
        self._client = httpx.AsyncClient(
            transport=transport, base_url="http://localhost", timeout=ANSWER_DEADLINE_S
        )
        self._stack.callback(lambda: self._run(self._client.aclose()))
        self._stack.callback(lambda: self._run(predict.drain()))
        self._stack.callback(lambda: self._run(infer.drain()))

    def request(
        self, method: str, path: str, chunks: Sequence[bytes] | None = None, **options: Any
    ) -> httpx.Response:
        """The application's answer, under the registry's present state."""
        self._live.refresh()

        async def one_by_one(parts: Sequence[bytes]) -> AsyncIterator[bytes]:
            for part in parts:
                yield part

        if chunks is not None:
            options["content"] = one_by_one(chunks)
        response: httpx.Response = self._run(self._client.request(method, path, **options))
        return response

    def leave(self, method: str, path: str) -> list[int]:
        """The statuses that a client is sent which goes away before its body."""
        sent: list[int] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.disconnect"}

        async def send(message: MutableMapping[str, Any]) -> None:
            sent.append(message.get("status", 0))

        scope = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": []}
        self._run(self._app(scope, receive, send))
        return [status for status in sent if status]

    def close(self) -> None:
        """Finishes as an API process would."""
        self._stack.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(ANSWER_DEADLINE_S)
        self._loop.close()

    def _run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(ANSWER_DEADLINE_S)


@contextmanager
def open_lane(kind: str, server: PhoenixServer) -> Iterator[Lane]:
    """The lane `server` or `routes` to a running server."""
    lane = ServerLane(server.url) if kind == "server" else RoutesLane(server)
    try:
        yield lane
    finally:
        lane.close()


def ask_anew(url: str, body: Any) -> httpx.Response:
    """The answer to POST /predict over a connection of its own, so of any API process of the server."""
    # Without TLS settings and proxies, whose reading costs 30 ms a call.
    with httpx.Client(verify=False, trust_env=False, timeout=ANSWER_DEADLINE_S) as client:
        return client.post(f"{url}/predict", json=body)


def unique(prefix: str = "cust") -> str:
    """A name that no other test uses."""
    return f"{prefix}_{uuid4().hex[:12]}"


def ok(response: httpx.Response, status: int = 200) -> Any:
    """The JSON of an answer with that status."""
    assert response.status_code == status, response.text
    return response.json()


def refused(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The error of an answer that refuses, in its documented shape."""
    error = error_of(response)
    assert (response.status_code, error["code"]) == (status, code), response.text
    return error


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error of an answer, whatever it is, after a check of the shape that all errors share."""
    assert response.headers["content-type"].startswith("application/json"), response.text
    body = response.json()
    assert set(body) == {"error"}, body
    error: dict[str, Any] = body["error"]
    assert set(error) == {"code", "message", "details"}, error
    assert isinstance(error["code"], str)
    assert error["message"]
    assert isinstance(error["details"], dict)
    return error


def store_features(lane: Lane, entity_id: str, **features: Any) -> None:
    """Puts features of an entity into the store."""
    ok(lane.request("PUT", f"/features/{entity_id}", json={"features": features}))


def logged(lane: Lane, prediction_id: str) -> dict[str, Any]:
    """The prediction's row in the log, as soon as it is there."""
    row: dict[str, Any] = eventually(
        lambda: lane.request("GET", f"/predictions/{prediction_id}"),
        lambda response: response.status_code == 200,
        f"{prediction_id} is in the log",
    ).json()
    return row


def eventually(
    ask: Callable[[], httpx.Response],
    holds: Callable[[httpx.Response], bool],
    expectation: str,
    deadline_s: float = LOG_DEADLINE_S,
) -> httpx.Response:
    """The first answer for which the condition holds."""
    answers: list[httpx.Response] = []

    def asked() -> bool:
        answers[:] = [ask()]
        return holds(answers[0])

    try:
        wait_until(asked, deadline_s, expectation)
    except TimeoutError as late:
        raise TimeoutError(f"{late}; the last answer: {answers[0].text[:500]}") from late
    return answers[0]


def log_rows(lane: Lane, **filters: Any) -> list[dict[str, Any]]:
    """The rows of the log that match, newest first."""
    items: list[dict[str, Any]] = ok(lane.request("GET", "/predictions", params=filters))["items"]
    return items
