"""A real `phoenix-ml serve` for tests: its own processes, data folder and port (Linux)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from servers import (
    HOST,
    ServerError,
    _children_of,
    _freeze,
    _send,
    _spawner,
    _tied_to_this_run,
    free_port,
    has_ended,
    wait_until,
)

from phoenix_ml.application.catalogue import Reference, Registration, register
from phoenix_ml.bootstrap import Phoenix, bootstrap
from phoenix_ml.domain.features import FeatureRule
from phoenix_ml.domain.models import ModelVersion, Stage
from phoenix_ml.settings import Settings, load_settings

START_DEADLINE_S = 60.0
STOP_DEADLINE_S = 60.0
RESTART_DEADLINE_S = 30.0
COMMAND_DEADLINE_S = 60.0
LOG_TAIL_LINES = 150


class PhoenixServer:
    """`phoenix-ml serve` over the folder `folder/data`; data and port stay the same over stop, kill and start.

    Settings are named as in `settings.py`: `PhoenixServer(tmp_path, workers=2, registry_poll_ms=100)`. As a
    context manager it returns when every process is ready; on exit all of them end, whatever happened.

        with PhoenixServer(tmp_path, workers=2) as server:
            server.register(model_file, "credit-risk", "1.0.0")
            httpx.post(f"{server.url}/predict", json=...)
            killed = server.kill_child("api-0")            # kill -9
            server.wait_for_child("api-0", after=killed)   # a new process stands in its place
            assert server.stop() == 0
    """

    def __init__(self, folder: Path, *, workers: int = 1, **settings: object) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.port = free_port()
        self._settings = {"data": folder / "data", "port": self.port, "workers": workers} | settings
        self._log = folder / "server.log"
        self._log_starts_at = 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """The base URL."""
        return f"http://{HOST}:{self.port}"

    @property
    def data(self) -> Path:
        """The data folder."""
        return self.settings.data

    @property
    def settings(self) -> Settings:
        """The settings that the server runs under."""
        return load_settings(**self._settings)

    @property
    def environment(self) -> dict[str, str]:
        """The environment of the server, and of commands that are to see what it sees."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PHOENIX_")}
        given = {f"PHOENIX_{name.upper()}": str(value) for name, value in self._settings.items()}
        # No line of the log is folded, and a process that is aborted says what it was doing.
        return inherited | given | {"COLUMNS": "500", "PYTHONFAULTHANDLER": "1"}

    def start(self) -> None:
        """Returns when every process is ready. Raises ServerError, with the log's end, when that fails."""
        self.spawn()
        try:
            wait_until(lambda: self.is_ready or self.exit_code is not None, START_DEADLINE_S, "it is ready")
        except TimeoutError as late:
            self._dump_stacks()
            self.kill()
            raise self._error(f"was not ready within {START_DEADLINE_S} s") from late
        if not self.is_ready:
            raise self._error(f"ended at once with status {self.exit_code}")

    def spawn(self) -> None:
        """Starts the server without waiting for anything."""
        self._log_starts_at = self._log.stat().st_size if self._log.exists() else 0
        self._process = self.popen("serve", log=self._log)

    @property
    def is_ready(self) -> bool:
        """Whether the supervisor has announced that every process is ready, since the last start."""
        return f" serves {self.url}" in self.log(all_starts=False)

    @property
    def exit_code(self) -> int | None:
        """The supervisor's exit code; None while it runs, and before the first start."""
        return None if self._process is None else self._process.poll()

    @property
    def pid(self) -> int:
        """The supervisor's process id. Raises ServerError when it does not run."""
        if self._process is None or self._process.poll() is not None:
            raise self._error("does not run")
        return self._process.pid

    def pids(self) -> dict[str, int]:
        """The supervised processes by their slots: `background`, `api-0`, `api-1`, …"""
        found = {}
        for pid in _children_of(self.pid):
            arguments = _command_line(pid)
            # python -m phoenix_ml.processes.api SLOT …
            if len(arguments) > 3 and arguments[2].startswith("phoenix_ml.processes."):
                found[arguments[3]] = pid
        return found

    def kill_child(self, slot: str, number: signal.Signals = signal.SIGKILL) -> int:
        """Sends a signal to the process in the slot; returns which process that was, halted if so it was told."""
        pid = self.pids()[slot]
        if number is signal.SIGSTOP:
            _freeze([pid])
        else:
            os.kill(pid, number)
        return pid

    def wait_for_child(self, slot: str, *, after: int) -> int:
        """Returns the slot's process once another one than `after` stands there; it may still be starting."""
        wait_until(
            lambda: self.pids().get(slot, after) != after, RESTART_DEADLINE_S, f"{slot} is started again"
        )
        return self.pids()[slot]

    def stop(self) -> int:
        """Ends the server as its operator would, with SIGTERM; the supervisor's exit code."""
        process = self._process
        if process is None:
            raise self._error("was not started")
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            return process.wait(STOP_DEADLINE_S)
        except subprocess.TimeoutExpired as late:
            self.kill()
            raise self._error(f"did not stop within {STOP_DEADLINE_S} s") from late

    def kill(self) -> None:
        """Ends the supervisor and every process of it with SIGKILL, all at once; no effect on one that ended."""
        process = self._process
        if process is None or process.poll() is not None:
            return
        # The parent first, and until it truly stands still: after that it starts nothing.
        _freeze([process.pid])
        children = _children_of(process.pid)
        for pid in [process.pid, *children]:
            _send(pid, signal.SIGKILL)
        process.wait()
        wait_until(lambda: all(map(has_ended, children)), STOP_DEADLINE_S, "its processes have ended")

    def kill_supervisor(self) -> None:
        """Ends the supervisor alone with SIGKILL: its processes must notice by themselves."""
        process = self._process
        if process is None:
            raise self._error("was not started")
        process.kill()
        process.wait()

    def restart(self) -> None:
        """Starts again on the same data and port, after a graceful stop if it still runs."""
        self.stop()
        self.start()

    def log(self, *, all_starts: bool = True) -> str:
        """What the server has written, of all its starts or of the last one."""
        if not self._log.exists():
            return ""
        written = self._log.read_bytes()
        return written[0 if all_starts else self._log_starts_at :].decode(errors="replace")

    def log_records(self) -> list[dict[str, Any]]:
        """The log's JSON lines."""
        # The last line may be in the writing.
        whole, _, _ = self.log().rpartition("\n")
        return [json.loads(line) for line in whole.splitlines() if line.startswith("{")]

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.kill()
        elif self.exit_code is None:
            self.stop()

    # The command line and the use cases, on the same data.

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """The outcome of `phoenix-ml ARGUMENTS`, run to its end as a process of its own."""
        return subprocess.run(
            [sys.executable, "-m", "phoenix_ml.cli", *arguments],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_DEADLINE_S,
            check=False,
        )

    def popen(self, *arguments: str, log: Path) -> subprocess.Popen[bytes]:
        """`phoenix-ml ARGUMENTS`, started and tied to this test run: it dies when the run does."""

        def start() -> subprocess.Popen[bytes]:
            with log.open("ab") as output:
                return subprocess.Popen(
                    [*_tied_to_this_run(), sys.executable, "-m", "phoenix_ml.cli", *arguments],
                    cwd=self.folder,
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )

        return _spawner.submit(start).result()

    @contextmanager
    def opened(self) -> Iterator[Phoenix]:
        """The application's parts on the server's database; the server may run or not."""
        phoenix = bootstrap(self.settings)
        try:
            phoenix.database.upgrade_if_embedded()
            yield phoenix
        finally:
            phoenix.database.close()

    def register(
        self,
        artifact: Path,
        model_id: str,
        version: str,
        *,
        activate: bool = True,
        stage: str = "dev",
        contract: Mapping[str, FeatureRule] | None = None,
        task: str | None = None,
        reference: Mapping[str, Sequence[Any]] | None = None,
        time: str | None = None,
        outcome: str | None = None,
    ) -> ModelVersion:
        """The version, registered through the use case as the command line does; the server may run or not."""
        registration = Registration(model_id, version, Stage(stage), dict(contract or {}), task)
        with self.opened() as phoenix:
            registered = register(
                phoenix.registry,
                phoenix.artifacts,
                phoenix.engines,
                artifact,
                registration,
                actor="test",
                reference=None if reference is None else Reference(reference, time, outcome),
            )
            if activate:
                registered = phoenix.registry.set_active(model_id, version, True, "test")
        return registered

    def _dump_stacks(self) -> None:
        """Ends every process in a way that leaves the stacks of its threads in the log."""
        if self._process is None or self._process.poll() is not None:
            return
        children = _children_of(self._process.pid)
        for pid in [self._process.pid, *children]:
            _send(pid, signal.SIGABRT)
        with suppress(TimeoutError):
            wait_until(lambda: not any(map(_command_line, children)), 5, "they have ended")

    def _error(self, what: str) -> ServerError:
        tail = "\n".join(self.log(all_starts=False).splitlines()[-LOG_TAIL_LINES:])
        return ServerError(f"phoenix-ml serve on port {self.port} {what}; its log ends with:\n{tail}")


def _command_line(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return []
