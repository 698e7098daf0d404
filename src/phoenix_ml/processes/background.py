"""The background process: the roles that must never cost a request its latency."""

import fcntl
import gc
import logging
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

from phoenix_ml.bootstrap import Phoenix, bootstrap
from phoenix_ml.domain.errors import Misconfigured, PhoenixError
from phoenix_ml.infrastructure.telemetry.logs import configure_logs
from phoenix_ml.infrastructure.telemetry.metrics import MetricsWriter
from phoenix_ml.processes.log import log_from_journals, log_from_kafka
from phoenix_ml.settings import Settings, load_settings

log = logging.getLogger(__name__)
_LOOK_EVERY_S = 0.1
# Shorter than the supervisor's patience: what hangs, such as a database, is left to end with the process.
_STOP_PATIENCE_S = 20.0
# Longer than a batch takes: at a stop the log role still writes what it can.
_DATABASE_PATIENCE_S = 5.0


class BackgroundRole(Protocol):
    def run(self, stopping: threading.Event) -> None:
        """Returns soon after ``stopping`` is set."""
        ...

    def close(self) -> None: ...


@contextmanager
def sole_reader(settings: Settings, stopping: threading.Event) -> Iterator[None]:
    """Within the block nobody else reads these journals.

    Whoever does now is waited for: the process of a supervisor that was killed ends by itself. Raises
    Misconfigured when it does not, or when ``stopping`` is set first.
    """
    settings.run_folder.mkdir(parents=True, exist_ok=True)
    # As long as such a process may take, which reads to the end of the journals first.
    patience_s = max(settings.stop_timeout_s, _STOP_PATIENCE_S) + 5
    deadline = time.monotonic() + patience_s
    is_said = False
    with (settings.run_folder / "journals.lock").open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as exc:
                if time.monotonic() > deadline or stopping.is_set():
                    raise Misconfigured(
                        f"another process reads the journals in {settings.data} already ('serve' does it too): "
                        f"end what 'fuser {settings.run_folder}/journals.lock' names, or leave it to that one "
                        "('serve --roles none')"
                    ) from exc
            if not is_said:
                log.warning(
                    "waiting up to %d s until another process has ended that reads the journals in %s",
                    patience_s,
                    settings.data,
                )
                is_said = True
            stopping.wait(_LOOK_EVERY_S)
        yield


def work(
    phoenix: Phoenix,
    roles: Sequence[str],
    metrics_file: Path,
    stopping: threading.Event,
    on_ready: Callable[[], None] = lambda: None,
) -> None:
    """Runs the roles, a thread each; returns when ``stopping`` is set and they have ended.

    Raises what a role raises, after a stop of the others, and Misconfigured for roles that these settings do
    not have.
    """
    settings = phoenix.settings
    with ExitStack() as stack:
        if _reads_journals(phoenix, roles):
            stack.enter_context(sole_reader(settings, stopping))
        metrics = stack.enter_context(MetricsWriter(metrics_file))
        running = {role: _start(_open_role(role, phoenix, metrics), role, stopping) for role in roles}
        # What is loaded stays: walking it again and again cost the ship role 2 µs an event.
        gc.collect()
        gc.freeze()
        on_ready()
        while not stopping.is_set() and not any(future.done() for future in running.values()):
            wait(running.values(), _LOOK_EVERY_S, FIRST_EXCEPTION)
        stopping.set()
        phoenix.database.hurry(_DATABASE_PATIENCE_S)
        wait(running.values(), _STOP_PATIENCE_S)
        for role, future in running.items():
            if future.done():
                future.result()
            else:
                log.error("the %s role hangs and is left; what it had in hand comes again", role)


@contextmanager
def metrics_of_worker(phoenix: Phoenix, roles: Sequence[str]) -> Iterator[Path]:
    """The metrics file of a worker by itself. A worker that reads journals belongs to the server whose journals
    they are, and counts with it; other workers have nothing in common, so each has a folder of its own.
    """
    name = f"work-{'-'.join(roles)}"
    settings = phoenix.settings
    if _reads_journals(phoenix, roles):
        yield settings.metrics_folder / f"{name}.mmap"
        return
    for number in range(1000):
        folder = settings.run_folder / f"{name}-{number}"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            yield folder / f"{name}.mmap"
            return
    raise Misconfigured(f"a thousand workers run on {settings.data} already")


def _reads_journals(phoenix: Phoenix, roles: Sequence[str]) -> bool:
    return "ship" in roles or ("log" in roles and phoenix.kafka is None)


def _open_role(role: str, phoenix: Phoenix, metrics: MetricsWriter) -> BackgroundRole:
    kafka = phoenix.kafka
    if role == "monitor":
        from phoenix_ml.processes.monitor import MonitorRole

        return MonitorRole(phoenix, metrics)
    if role == "alert":
        from phoenix_ml.processes.alert import AlertRole

        return AlertRole(phoenix, metrics)
    if role == "heal":
        from phoenix_ml.processes.heal import HealRole

        return HealRole(phoenix, metrics)
    if role == "log":
        return (
            log_from_journals(phoenix, metrics) if kafka is None else log_from_kafka(phoenix, kafka, metrics)
        )
    if kafka is None:
        raise nowhere_to_ship()
    from phoenix_ml.processes.ship import ShipRole

    return ShipRole(phoenix.settings, kafka, metrics)


def nowhere_to_ship() -> Misconfigured:
    return Misconfigured(
        "there is nowhere to ship to: PHOENIX_EVENTS is local:, and the log role reads the journals itself; "
        "name a kafka://… there, or leave the ship role out",
        setting="PHOENIX_ROLES",
    )


def _start(role: BackgroundRole, name: str, stopping: threading.Event) -> "Future[None]":
    """The role's end, in a thread that does not keep the process alive."""
    ended: Future[None] = Future()

    def run() -> None:
        try:
            try:
                role.run(stopping)
            finally:
                role.close()
        except BaseException as exc:  # noqa: BLE001 - raised again where the roles are waited for
            ended.set_exception(exc)
        else:
            ended.set_result(None)

    threading.Thread(target=run, name=name, daemon=True).start()
    return ended


def stop_on_signals() -> threading.Event:
    """An event that SIGTERM and SIGINT set."""
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    return stopping


def main() -> None:
    """Entry of the process under the supervisor: arguments are slot, lifeline, ready pipe."""
    slot = sys.argv[1]
    lifeline_fd, ready_fd = (int(argument) for argument in sys.argv[2:4])
    settings = load_settings()
    configure_logs(settings.log_level, settings.log_format, slot)
    stopping = stop_on_signals()

    def watch_supervisor() -> None:
        # Becomes readable only when the supervisor's end closes, because nobody ever writes to it.
        select.select([lifeline_fd], [], [])
        stopping.set()

    threading.Thread(target=watch_supervisor, daemon=True).start()

    code_now = os.EX_CONFIG

    def ready() -> None:
        nonlocal code_now
        code_now = 1
        os.write(ready_fd, b"+")
        os.close(ready_fd)

    try:
        metrics_file = settings.metrics_folder / f"{slot}.mmap"
        work(bootstrap(settings), settings.background_roles, metrics_file, stopping, ready)
    except PhoenixError as exc:
        log.critical("%s", exc.message)
        sys.exit(code_now if isinstance(exc, Misconfigured) else 1)


if __name__ == "__main__":
    main()
