"""``PHOENIX_EVENTS=local:`` — the log role reads the journal itself. See ``EventSource`` in the ports."""

import os
import time
from pathlib import Path

import msgspec

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
            UnreadableEvent(record.payload, record.damage)
            if record.damage
            else decode_event(record.payload, record.schema or b"")
            for record in self.reader.read(max_events)
        ]

    def commit(self) -> None:
        self.reader.commit()

    def rewind(self) -> None:
        self.reader.close()
        self.reader = JournalReader(self._folder)

    def close(self) -> None:
        self.reader.close()


class DeadLetters:
    """A file of what could not be stored, one JSON object a line: time, reason, payload (base64)."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def bury(self, event: UnreadableEvent) -> None:
        """Returns when the letter is on disk: the journal may forget its bytes after that."""
        letter = {"at_ms": time.time_ns() // 1_000_000, "reason": event.reason, "payload": event.payload}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab") as file:
            file.write(msgspec.json.encode(letter) + b"\n")
            file.flush()
            os.fsync(file.fileno())
