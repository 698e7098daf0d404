"""Micro-batches: the rows that are there at the same time run together, and none waits for others to come."""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Final, Generic, Protocol, TypeVar

from phoenix_ml.application.ports import Engine
from phoenix_ml.application.serving import ServedVersion
from phoenix_ml.domain.errors import InferenceFailed, Overloaded
from phoenix_ml.domain.rows import Outputs, Rows, Scalar

# Rows in a turn of the event loop from which on they are gathered. Where requests come one at a time a
# turn more would cost each about 10 µs for nothing.
_CROWD: Final = 1.5
# What a lonely turn leaves of the memory of a crowded one: requests come in bursts.
_REMEMBERED: Final = 0.8


class Waiting(Protocol):
    """A row that waits for its run; ``started`` is ``time.perf_counter()`` at its request's arrival."""

    values: Sequence[Scalar]
    packed: bytes
    started: float


R = TypeVar("R", bound=Waiting)
Ran = list[tuple[list[R], Outputs | Exception, float]]


class Batcher(Generic[R]):
    """Runs rows on the versions that they are for. Belongs to one event loop.

    Short runs happen on the loop, at the end of the turn in which their rows came; long ones on the version's
    thread, while rows gather for the next one. ``finish`` is called with the rows that ran together, in order,
    their outputs or the error that is theirs, and how many seconds the run took.
    """

    def __init__(
        self,
        finish: Callable[[list[R], Outputs | Exception, float], None],
        *,
        queue_limit: int,
        patience_s: float,
    ) -> None:
        self._finish = finish
        self._queue_limit = queue_limit
        self._patience_s = patience_s

    def is_alone(self, served: ServedVersion) -> bool:
        """Whether a row that has just come is best run by itself and at once. To be asked once a row."""
        if not served.is_inline:
            return False
        if not served.batches:
            return True
        queue = served.queue
        queue.arrived += 1
        if queue.arrived > 1:
            return False
        asyncio.get_running_loop().call_soon(self._end_turn, served)
        return queue.recent < _CROWD

    def add(self, served: ServedVersion, row: R) -> None:
        """Takes a row that is not alone. Raises Overloaded when too many wait for the version already."""
        queue = served.queue
        if len(queue.rows) >= self._queue_limit:
            raise Overloaded(
                f"{len(queue.rows)} requests wait for {served.version.model_id} {served.version.version} already",
                retry_after_s=1,
            )
        queue.rows.append(row)
        if served.is_inline:
            if len(queue.rows) >= served.batch_rows_limit:
                self._run_gathered(served)
        elif not queue.is_busy:
            queue.is_busy = True
            asyncio.get_running_loop().call_soon(self._run_next, served)

    def _end_turn(self, served: ServedVersion) -> None:
        queue = served.queue
        queue.recent = max(queue.arrived, _REMEMBERED * queue.recent)
        queue.arrived = 0
        if queue.rows:
            self._run_gathered(served)

    def _run_gathered(self, served: ServedVersion) -> None:
        rows, served.queue.rows = served.queue.rows, []
        self._settle(_run(served.engine, rows))

    def _run_next(self, served: ServedVersion) -> None:
        """Begins the next run on the version's thread, if rows wait for one."""
        queue = served.queue
        self._refuse_late(served)
        limit = served.batch_rows_limit
        rows, queue.rows = queue.rows[:limit], queue.rows[limit:]
        queue.is_busy = bool(rows)
        if not rows:
            return
        try:
            run = asyncio.get_running_loop().run_in_executor(served.executor, _run, served.engine, rows)
        except RuntimeError as exc:  # no thread can be started; the next request may try
            queue.is_busy = False
            rows, queue.rows = rows + queue.rows, []
            self._finish(rows, exc, 0.0)
            return

        def settle(run: "asyncio.Future[Ran[R]]") -> None:
            self._run_next(served)  # first: the thread need not wait until answers are written
            self._settle(run.result())

        run.add_done_callback(settle)

    def _refuse_late(self, served: ServedVersion) -> None:
        """Whoever has waited for long will hardly want the answer, and those behind still may."""
        queue = served.queue
        too_early = time.perf_counter() - self._patience_s
        late = [row for row in queue.rows if row.started < too_early]
        if late:
            queue.rows = [row for row in queue.rows if row.started >= too_early]
            version = served.version
            for row in late:
                error = Overloaded(
                    f"{version.model_id} {version.version} did not get to the request within {self._patience_s:g} s",
                    retry_after_s=1,
                )
                self._finish([row], error, 0.0)

    def _settle(self, ran: "Ran[R]") -> None:
        for rows, outputs, took_s in ran:
            self._finish(rows, outputs, took_s)


def _run(engine: Engine, rows: list[R]) -> "Ran[R]":
    """What became of the rows; where they fail together, of each by itself."""
    started = time.perf_counter()
    try:
        outputs: Outputs | Exception = engine.run(Rows([r.values for r in rows], [r.packed for r in rows]))
    except InferenceFailed as exc:
        if len(rows) > 1:
            return [part for row in rows for part in _run(engine, [row])]
        outputs = exc
    except Exception as exc:  # noqa: BLE001 - a defect, and even so every caller gets an answer
        outputs = exc
    return [(rows, outputs, time.perf_counter() - started)]
