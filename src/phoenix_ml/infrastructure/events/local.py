"""``PHOENIX_EVENTS=local:`` — the log role reads the journal itself. See ``EventSource`` in the ports."""

from pathlib import Path

from phoenix_ml.application.ports import RecordedEvent, UnreadableEvent
from phoenix_ml.infrastructure.events.codec import decode_event
from phoenix_ml.infrastructure.events.journal import JournalReader


class LocalEvents:
    """The events of all journals below ``folder``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.reader = JournalReader(folder)

    def read(self, max_events: int) -> list[RecordedEvent | UnreadableEvent]:
        return [
            UnreadableEvent(record.payload, record.damage, record)
            if record.damage
            else decode_event(record.payload, record.schema or b"", record)
            for record in self.reader.read(max_events)
        ]

    def commit(self) -> None:
        self.reader.commit()

    def rewind(self) -> None:
        self.reader.close()
        self.reader = JournalReader(self._folder)

    def close(self) -> None:
        self.reader.close()
