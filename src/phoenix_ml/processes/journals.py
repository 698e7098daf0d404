"""What the role that empties the journals, ``ship`` or else ``log``, tells about them."""

import logging
import time
from collections.abc import Callable
from pathlib import Path

from phoenix_ml.infrastructure.events.journal import JournalReader
from phoenix_ml.infrastructure.telemetry import catalogue
from phoenix_ml.infrastructure.telemetry.metrics import MetricsWriter

log = logging.getLogger(__name__)
_EVERY_S = 1.0


class JournalGauges:
    """How much waits in the journals, and what in them cannot be read."""

    def __init__(self, metrics: MetricsWriter, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._pending = metrics.gauge(catalogue.JOURNAL_PENDING_BYTES)
        self._damage = metrics.counter(catalogue.JOURNAL_DAMAGE)
        self._unreadable = metrics.gauge(catalogue.JOURNAL_UNREADABLE)
        self._damage_seen = 0
        self._unreadable_said: set[Path] = set()
        self._set_at = float("-inf")

    def set_now_and_then(self, reader: JournalReader) -> None:
        """Costs a scan of the folders, hence at most once a second."""
        now = self._clock()
        if now - self._set_at < _EVERY_S:
            return
        self._set_at = now
        self._pending.set(reader.pending_bytes)
        damage = reader.corrupt_regions + reader.torn_tails
        # A new reader, after a failure, counts from 0 again.
        self._damage.add(damage - self._damage_seen if damage >= self._damage_seen else damage)
        self._damage_seen = damage
        unreadable = dict(reader.unreadable)
        for path in unreadable.keys() - self._unreadable_said:
            log.error(
                "the journal's segment %s cannot be read, and is tried again: %s", path, unreadable[path]
            )
        self._unreadable_said = set(unreadable)
        self._unreadable.set(len(unreadable))
