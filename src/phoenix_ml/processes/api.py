"""One API process: answers HTTP on a socket that the supervisor opened, and owns one journal."""

import asyncio
import gc
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import uvicorn
import uvloop

from phoenix_ml.application.ports import FeatureStore
from phoenix_ml.application.serving import LiveModels
from phoenix_ml.bootstrap import (
    Phoenix,
    bootstrap,
    bootstrap_infer,
    bootstrap_predict,
    cache_features,
    open_features,
)
from phoenix_ml.domain.errors import DatabaseUnavailable, FeatureStoreUnavailable, Misconfigured, PhoenixError
from phoenix_ml.infrastructure.events.dropping import DroppingJournal
from phoenix_ml.infrastructure.events.journal import JournalWriter
from phoenix_ml.infrastructure.http.app import build_app
from phoenix_ml.infrastructure.http.calls import PredictionCalls
from phoenix_ml.infrastructure.http.hot_lane import HotLane, Lane
from phoenix_ml.infrastructure.http.infer import InferCalls
from phoenix_ml.infrastructure.http.origins import browser_check
from phoenix_ml.infrastructure.memory import give_back_memory
from phoenix_ml.infrastructure.telemetry import catalogue
from phoenix_ml.infrastructure.telemetry.logs import configure_logs
from phoenix_ml.infrastructure.telemetry.meter import MetricsMeter
from phoenix_ml.infrastructure.telemetry.metrics import MetricsWriter
from phoenix_ml.settings import load_settings

if TYPE_CHECKING:  # Kafka's library is an extra
    from phoenix_ml.infrastructure.events.kafka import Kafka

log = logging.getLogger(__name__)
_GREETING_S = 1.0
_STOP_PATIENCE_S = 1.0
_DRAINED_S = 1.0


async def serve(
    phoenix: Phoenix,
    slot: str,
    listener: socket.socket,
    on_ready: Callable[[], None],
    was_stopped: Callable[[], bool],
) -> None:
    """Serves until SIGTERM or SIGINT; returns when every accepted request has its answer on record.

    ``was_stopped`` tells of signals that came before the server could take them.
    """
    settings = phoenix.settings
    metrics = MetricsWriter(settings.metrics_folder / f"{slot}.mmap")
    meter = MetricsMeter(metrics)
    writer = JournalWriter(
        settings.journal_folder / slot,
        segment_bytes=settings.journal_segment_bytes,
        limit_bytes=settings.journal_limit_bytes,
    )
    dropped = metrics.counter(catalogue.JOURNAL_DROPPED)
    journal = DroppingJournal(writer, dropped.add) if settings.journal_full == "drop" else writer
    hits, misses = (metrics.counter(catalogue.FEATURE_CACHE_READS, outcome=o) for o in ("hit", "miss"))
    features = cache_features(open_features(settings), settings, hits.add, misses.add)
    live, predict = bootstrap_predict(phoenix, features, journal, meter)
    infer = bootstrap_infer(phoenix, live, predict, journal, meter)
    calls = PredictionCalls(
        predict,
        live,
        journal,
        meter,
        body_limit_bytes=settings.body_limit_bytes,
        batch_limit=settings.batch_limit,
    )

    infer_calls = InferCalls(
        infer,
        live,
        meter,
        body_limit_bytes=settings.tensor_body_limit_bytes,
        json_limit_bytes=settings.body_limit_bytes,
    )

    def journal_state() -> str:
        refusal = writer.refusal
        if refusal and settings.journal_full == "drop":
            return f"{refusal}; predictions are answered and not on record"
        return refusal or "ok"

    lane = Lane(calls, infer_calls, browser_check(settings), settings.body_limit_bytes)
    app = build_app(phoenix, features, live, calls, infer_calls, journal_state)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            http=partial(HotLane, lane=lane),  # type: ignore[arg-type] # uvicorn only calls it
            loop="uvloop",
            ws="none",
            lifespan="off",
            access_log=False,
            log_config=None,
            server_header=False,
            # Whoever may connect could claim any address in the audit log.
            proxy_headers=False,
            timeout_keep_alive=settings.keep_alive_s,
            timeout_graceful_shutdown=settings.stop_timeout_s,
        )
    )
    inference = None
    if settings.grpc_port >= 0:
        # Its own care for forks only complains, outside of our log, of the processes that uploads are run in.
        os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
        from phoenix_ml.infrastructure.grpc.server import InferenceServer  # an extra

        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        inference = InferenceServer(phoenix, live, infer, meter, f"{host}:{settings.grpc_port}")
        await inference.start()

    async def announce() -> None:
        await _rehearse(app)
        if inference is not None:
            await inference.become_healthy()
        on_ready()

    looked, told = asyncio.Event(), asyncio.Event()
    tasks = [
        asyncio.create_task(_follow_registry(live, settings.registry_poll_ms / 1000, looked, told)),
        asyncio.create_task(_keep_journal(writer, metrics, settings.journal_sync_ms / 1000)),
        asyncio.create_task(_announce(server, live, announce, was_stopped)),
    ]
    follower = None if phoenix.kafka is None else _Follower(phoenix.kafka, told)
    try:
        # Not before: a process that was started again would call every model unknown until it has read them.
        await looked.wait()
        await _greet(features)
        await server.serve(sockets=[listener])
        if inference is not None:
            await inference.stop(settings.stop_timeout_s)
        await infer.drain()
        await predict.drain()
    finally:
        # Threads that wait for a database that hangs would keep the process for as long.
        phoenix.database.hurry(_STOP_PATIENCE_S)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        writer.close()
        await features.close()
        metrics.close()
        if follower is not None:
            await asyncio.to_thread(follower.stop)
        await asyncio.to_thread(phoenix.close)


async def _greet(features: FeatureStore) -> None:
    """Opens the store's connection with more patience than a request has: its first read would come late."""
    try:
        await features.check(_GREETING_S)
    except FeatureStoreUnavailable as exc:
        log.warning("predictions need features in the request for now: %s", exc.message)


async def _follow_registry(
    live: LiveModels, poll_s: float, looked: asyncio.Event, told: asyncio.Event
) -> None:
    """Keeps the routing table up to date; while the database is down the table stays as it is.

    Looks every ``poll_s``, and at once when it is ``told``. Sets ``looked`` after the first look, whatever it
    found.
    """
    was_down = False
    loading: asyncio.Task[None] | None = None
    dropped = live.dropped
    while True:
        told.clear()
        try:
            # A version that loads delays no other change; at the start there is nothing to serve without it.
            await asyncio.to_thread(live.look if looked.is_set() else live.refresh)
            was_down = False
        except DatabaseUnavailable as exc:
            if not was_down:
                log.warning("the registry is not followed: %s", exc.message)
            was_down = True
        except Exception:
            log.exception("a look at the registry failed; the next one follows")
        looked.set()
        if live.dropped != dropped:
            dropped = live.dropped
            # Requests in flight may have a version for a moment yet.
            asyncio.get_running_loop().call_later(_DRAINED_S, _give_back_memory)
        if not live.is_complete and (loading is None or loading.done()):
            loading = asyncio.create_task(_load(live))
        with suppress(TimeoutError):
            await asyncio.wait_for(told.wait(), poll_s)


def _give_back_memory() -> None:
    asyncio.get_running_loop().run_in_executor(None, give_back_memory)


async def _load(live: LiveModels) -> None:
    try:
        await asyncio.to_thread(live.load)
    except Exception:
        log.exception("a model could not be loaded; it is tried again")


class _Follower:
    """Sets ``told`` at each registry change that anybody announces, from a thread of its own."""

    def __init__(self, kafka: "Kafka", told: asyncio.Event) -> None:
        from phoenix_ml.infrastructure.events.kafka import follow_changes

        loop = asyncio.get_running_loop()
        self._stopping = threading.Event()
        self._thread = threading.Thread(
            target=follow_changes,
            args=(kafka, lambda: loop.call_soon_threadsafe(told.set), self._stopping),
            daemon=True,
        )
        self._thread.start()

    def stop(self) -> None:
        """Returns when nothing will be told any more."""
        self._stopping.set()
        self._thread.join()


async def _keep_journal(journal: JournalWriter, metrics: MetricsWriter, every_s: float) -> None:
    """Forces the journal to disk, closes segments that lie idle, and tells its size."""
    stored_bytes = metrics.gauge(catalogue.JOURNAL_BYTES)
    while True:
        await asyncio.sleep(every_s)
        try:
            await asyncio.to_thread(journal.sync)
            journal.rotate_if_old()
            stored_bytes.set(journal.stored_bytes)
        except OSError as exc:
            log.error("the journal cannot be forced to disk: %s", exc)  # noqa: TRY400 - the reason says it all


async def _rehearse(app: Callable[..., Awaitable[None]]) -> None:
    """Makes a first request of the kind that takes a thread: what it imports and reads would hold up everybody else for
    80 ms when somebody makes it under load. It asks nothing that could be down.
    """
    host = (b"host", b"localhost")
    scope: Any = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": "/metrics",
        "raw_path": b"/metrics",
        "root_path": "",
        "query_string": b"",
        "headers": [host],
        "client": None,
        "server": ("localhost", None),
    }

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        pass

    await app(scope, receive, send)


async def _announce(
    server: uvicorn.Server,
    live: LiveModels,
    on_ready: Callable[[], Awaitable[None]],
    was_stopped: Callable[[], bool],
) -> None:
    while not (server.started and live.is_ready):
        server.should_exit = server.should_exit or was_stopped()
        await asyncio.sleep(0.01)
    # What is loaded stays: a full collection that walks it takes 30 ms or more, in which nobody is answered.
    gc.collect()
    gc.freeze()
    await on_ready()


def main() -> None:
    """Entry of the process: arguments are slot, listening socket, the supervisor's lifeline, ready pipe."""
    slot = sys.argv[1]
    socket_fd, lifeline_fd, ready_fd = (int(argument) for argument in sys.argv[2:5])
    settings = load_settings()
    configure_logs(settings.log_level, settings.log_format, slot)
    listener = socket.socket(fileno=socket_fd)

    def ready() -> None:
        os.write(ready_fd, b"+")
        os.close(ready_fd)

    signals: list[int] = []

    async def run() -> None:
        loop = asyncio.get_running_loop()

        def stop() -> None:
            loop.remove_reader(lifeline_fd)
            os.kill(os.getpid(), signal.SIGTERM)

        # The supervisor holds the other end: it closes when the supervisor dies, however it dies.
        loop.add_reader(lifeline_fd, stop)
        await serve(bootstrap(settings), slot, listener, ready, lambda: bool(signals))

    # uvicorn has handlers of its own while it serves, and raises the signal again when it has stopped:
    # with the default action the process would end there, before its journal is closed.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: signals.append(received))
    try:
        uvloop.run(run())
    except PhoenixError as exc:
        log.critical("%s", exc.message)
        # The store itself is asked later: only a file that cannot be one is said to be unavailable here.
        sys.exit(os.EX_CONFIG if isinstance(exc, Misconfigured | FeatureStoreUnavailable) else 1)


if __name__ == "__main__":
    main()
