"""Clients that keep asking a server while something happens to it, and remember every answer."""

import threading
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
    """Answers by prediction id, refusals, and calls whose connection broke; clients run in threads."""

    def __init__(self, url: str, make_body: Callable[[int], Mapping[str, Any]]) -> None:
        self.answers: dict[str, dict[str, Any]] = {}
        self.refusals: list[str] = []
        self.broken = 0
        self._url = url
        self._make_body = make_body
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
        """Within the block the clients ask without a pause; afterwards each has had its last answer."""
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

    def _run(self, count: int) -> None:
        client = httpx.Client(base_url=self._url, timeout=30)
        try:
            for _ in range(count):
                if self._stopping.is_set():
                    return
                with self._lock:
                    body = self._make_body(next(self._numbers))
                try:
                    response = client.post("/predict", json=body)
                except httpx.TransportError:
                    # Its server died: nobody was told anything, so nothing is owed.
                    with self._lock:
                        self.broken += 1
                    client.close()
                    client = httpx.Client(base_url=self._url, timeout=30)
                    continue
                with self._lock:
                    if response.status_code == 200:
                        answered = response.json()
                        self.answers[answered["prediction_id"]] = answered
                    else:
                        self.refusals.append(response.text)
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


def await_logged(phoenix: Phoenix, model_id: str, ids: set[str]) -> list[LoggedPrediction]:
    """The model's rows once all these predictions are among them. Raises TimeoutError with what lacks."""
    rows: list[LoggedPrediction] = []

    def all_there() -> bool:
        nonlocal rows
        rows = logged(phoenix, model_id)
        return ids <= {row.id for row in rows}

    wait_until(all_there, LOG_DEADLINE_S, "every answered prediction is in the log")
    return rows
