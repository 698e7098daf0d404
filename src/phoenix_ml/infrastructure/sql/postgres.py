"""Connections to PostgreSQL that do not wait for ever.

A server that hangs, or whose machine does, is not noticed by TCP: its kernel acknowledges what is sent to it.
The server's own statement time-out hangs with it. So the client looks at its clock.
"""

import time
from collections.abc import Callable
from typing import Any, TypeVar

import psycopg
from psycopg.abc import PQGen

RV = TypeVar("RV")

# psycopg waits for the server in steps of 0.1 s, and tells the generators below of each.


class ImpatientConnection(psycopg.Connection[Any]):
    """Closes itself and raises OperationalError when the server is silent for longer than ``patience_s`` says.

    It is asked all along, so that a wait that has begun can be cut short.
    """

    patience_s: Callable[[], float] = staticmethod(lambda: float("inf"))

    def wait(self, gen: PQGen[RV], *args: Any, **kwargs: Any) -> RV:
        try:
            return super().wait(_bounded(gen, self.patience_s), *args, **kwargs)
        except _SilenceError as exc:
            # Its answer, should it still come, would be taken for the next statement's.
            self.pgconn.finish()
            raise psycopg.OperationalError(f"no word from the server for {exc} s") from exc


class _SilenceError(Exception):
    """How many seconds it lasted."""


def _bounded(gen: PQGen[RV], patience_s: Callable[[], float]) -> PQGen[RV]:
    try:
        wanted = next(gen)
        heard_at = time.monotonic()
        while True:
            ready = yield wanted
            now = time.monotonic()
            if ready:
                heard_at = now
            elif now - heard_at > patience_s():
                raise _SilenceError(round(now - heard_at))
            wanted = gen.send(ready)
    except StopIteration as ended:
        result: RV = ended.value
        return result
