"""Telling people: what waits for a channel is told, again and again if need be, and not too fast."""

import logging
import random
from collections import deque
from collections.abc import Callable

from phoenix_ml.application.ports import Channel, Deliveries, Delivery, DeliveryFailed

log = logging.getLogger(__name__)
# Longer than a channel takes to fail; what a killed process had in hand waits so long.
_LEASE_MS = 60_000
_FIRST_PAUSE_MS = 2000
_LONGEST_PAUSE_MS = 15 * 60_000
_MINUTE_MS = 60_000


class Deliverer:
    """Tells one channel. Belongs to one thread."""

    def __init__(
        self,
        deliveries: Deliveries,
        name: str,
        channel: Channel,
        now_ms: Callable[[], int],
        *,
        give_up_ms: int,
        most_a_minute: int,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._deliveries = deliveries
        self._name = name
        self._channel = channel
        self._now_ms = now_ms
        self._give_up_ms = give_up_ms
        self._most_a_minute = most_a_minute
        self._jitter = jitter
        self._told_at: deque[int] = deque()

    def step(self) -> tuple[int, int, int]:
        """How many were told, failed and were given up. Raises DatabaseUnavailable."""
        now_ms = self._now_ms()
        while self._told_at and self._told_at[0] <= now_ms - _MINUTE_MS:
            self._told_at.popleft()
        told = failed = given_up = 0
        while len(self._told_at) < self._most_a_minute and not failed:
            now_ms = self._now_ms()
            taken = self._deliveries.take(self._name, now_ms, now_ms + _LEASE_MS, 1)
            if not taken:
                break
            self._told_at.append(now_ms)
            (delivery,) = taken
            error = self._tell(delivery)
            if error is None:
                self._deliveries.delivered(delivery, self._now_ms())
                told += 1
            else:
                again_at_ms = self._next_attempt(delivery.attempts)
                is_late = again_at_ms > delivery.created_at_ms + self._give_up_ms
                self._deliveries.failed(delivery, error, None if is_late else again_at_ms)
                given_up += is_late
                failed += not is_late
        return told, failed, given_up

    def _tell(self, delivery: Delivery) -> str | None:
        """Why it was not told, None where it was."""
        try:
            self._channel.tell(delivery)
        except DeliveryFailed as exc:
            return str(exc)
        # Whatever a channel's library may raise: what else its process does, such as the log, must not end with it.
        except Exception as exc:
            log.exception("channel %s has a defect", self._name)
            # Its words may hold the URL, and what it keeps secret.
            return f"{type(exc).__name__}; the log has its traceback"
        return None

    def _next_attempt(self, attempts: int) -> int:
        pause_ms = min(_LONGEST_PAUSE_MS, _FIRST_PAUSE_MS << min(attempts, 20))
        return self._now_ms() + round(pause_ms * (0.5 + self._jitter() / 2))
