"""The log role: recorded events become rows, each exactly once."""

import logging
from collections.abc import Callable, Sequence

from msgspec import Struct

from phoenix_ml.application.ports import (
    EventRejected,
    EventSource,
    PredictionLog,
    RecordedEvent,
    UnreadableEvent,
)
from phoenix_ml.domain.events import PredictionMade

log = logging.getLogger(__name__)


class Recorded(Struct, frozen=True):
    """What one step moved: events read, rows that were new, events that went to the dead letters, and when
    the oldest prediction among them was made (None without any).
    """

    read: int = 0
    new_rows: int = 0
    dead: int = 0
    oldest_at_ms: int | None = None


def record_events(
    source: EventSource,
    prediction_log: PredictionLog,
    bury: Callable[[UnreadableEvent], None],
    *,
    max_events: int = 2000,
) -> Recorded:
    """Moves the next events from the source to the log and only then lets the source forget them.

    What happens twice is stored once, because ids are keys. An event that can't be read or that the
    database will never take goes to ``bury`` and never stops the others. Raises DatabaseUnavailable and
    EventsUnavailable: then nothing is forgotten, and the same events come with the next call.
    """
    batch = source.read(max_events)
    if not batch:
        source.commit()
        return Recorded()
    unreadable = [item for item in batch if isinstance(item, UnreadableEvent)]
    events = [item for item in batch if isinstance(item, RecordedEvent)]
    try:
        new_rows, rejected = _store(prediction_log, events)
        for item in (*unreadable, *rejected):
            log.error("an event cannot be stored: %s", item.reason)
            bury(item)
    except BaseException:
        source.rewind()
        raise
    source.commit()
    made_at_ms = [item.event.created_at_ms for item in events if isinstance(item.event, PredictionMade)]
    dead = len(unreadable) + len(rejected)
    return Recorded(len(batch), new_rows, dead, min(made_at_ms, default=None))


def _store(
    prediction_log: PredictionLog, events: Sequence[RecordedEvent]
) -> tuple[int, list[UnreadableEvent]]:
    """Stores a batch; when a row in it is refused, halves it until that row stands alone."""
    if not events:
        return 0, []
    try:
        return prediction_log.write(events), []
    except EventRejected as exc:
        if len(events) == 1:
            return 0, [UnreadableEvent(events[0].payload, str(exc), events[0].origin)]
    middle = len(events) // 2
    first, first_rejected = _store(prediction_log, events[:middle])
    second, second_rejected = _store(prediction_log, events[middle:])
    return first + second, first_rejected + second_rejected
