"""Clients that keep asking a server while something happens to it, and remember every answer."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
from servers import wait_until

from phoenix_ml.application.ports import LoggedPrediction, PredictionQuery
from phoenix_ml.bootstrap import Phoenix

LOG_DEADLINE_S = 60.0


class Traffic:
    """Answers by prediction id, refusals and their Retry-After, calls whose connection broke, the longest call.

    Clients run in threads; ``pause_s`` is how long each waits before it asks again.
    """

    def __init__(
        self, url: str, make_body: Callable[[int], Mapping[str, Any]], *, pause_s: float = 0.0
    ) -> None:
        self.answers: dict[str, dict[str, Any]] = {}
        self.refusals: list[str] = []
        self.retry_after: list[str] = []
        self.broken = 0
        self.longest_s = 0.0
        self._url = url
        self._make_body = make_body
        self._pause_s = pause_s
        self._numbers: Iterator[int] = iter(range(10**9))
        self._lock = threading.Lock()
        self._stopping = threading.Event()

    def ask(self, count: int, clients: int) -> None:
        """So many requests by so many clients; returns when all are answered."""
        with ThreadPoolExecutor(clients) as pool:
            shares = [count // clients + (number < count % clients) for number in range(clients)]
            for done in [pool.submit(self._run, share) for share in shares]:
                done.result()

    @contextmanager
    def flowing(self, clients: int) -> Iterator[None]:
        """Within the block the clients keep asking; afterwards each has had its last answer."""
        with ThreadPoolExecutor(clients) as pool:
            running = [pool.submit(self._run, 10**9) for _ in range(clients)]
            try:
                yield
            finally:
                self._stopping.set()
            for done in running:
                done.result()

    def await_answers(self, more: int) -> None:
        """Returns when so many more requests have been answered."""
        wanted = len(self.answers) + more
        wait_until(lambda: len(self.answers) >= wanted, 60, f"{more} more answers")

    def keep_flowing(self, duration_s: float) -> None:
        """Returns after that time, in which answers have gone on. Raises TimeoutError when they end."""
        until = time.monotonic() + duration_s
        while time.monotonic() < until:
            self.await_answers(1)

    def _run(self, count: int) -> None:
        client = httpx.Client(base_url=self._url, timeout=30)
        try:
            for _ in range(count):
                if self._stopping.wait(self._pause_s):
                    return
                with self._lock:
                    body = self._make_body(next(self._numbers))
                asked_at = time.monotonic()
                try:
                    response = client.post("/predict", json=body)
                except httpx.TransportError:
                    # Its server died: nobody was told anything, so nothing is owed.
                    with self._lock:
                        self.broken += 1
                        self.longest_s = max(self.longest_s, time.monotonic() - asked_at)
                    client.close()
                    client = httpx.Client(base_url=self._url, timeout=30)
                    continue
                with self._lock:
                    self.longest_s = max(self.longest_s, time.monotonic() - asked_at)
                    if response.status_code == 200:
                        answered = response.json()
                        self.answers[answered["prediction_id"]] = answered
                    else:
                        self.refusals.append(response.text)
                        self.retry_after.append(response.headers.get("retry-after", ""))
        finally:
            client.close()


def logged(phoenix: Phoenix, model_id: str) -> list[LoggedPrediction]:
    """Every row of the model in the prediction log."""
    rows: list[LoggedPrediction] = []
    cursor: str | None = None
    while True:
        page, cursor = phoenix.prediction_log.page(PredictionQuery(model_id, limit=1000, cursor=cursor))
        rows += page
        if cursor is None:
            return rows


def await_logged(
    phoenix: Phoenix, model_id: str, ids: set[str], deadline_s: float = LOG_DEADLINE_S
) -> list[LoggedPrediction]:
    """The model's rows once all these predictions are among them. Raises TimeoutError with what lacks."""
    rows: list[LoggedPrediction] = []

    def all_there() -> bool:
        nonlocal rows
        rows = logged(phoenix, model_id)
        return ids <= {row.id for row in rows}

    try:
        wait_until(all_there, deadline_s, "every answered prediction is in the log")
    except TimeoutError as exc:
        lacking = ids - {row.id for row in rows}
        raise TimeoutError(f"{exc}; {len(lacking)} of {len(ids)} lack, such as {min(lacking)}") from None
    return rows
