"""Dead letters on disk: what a journal held that could not be logged or shipped, and why."""

import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
from msgspec import Struct

from phoenix_ml.application.ports import DeadLetter, RecordedEvent, UnreadableEvent
from phoenix_ml.domain.errors import EventsUnavailable
from phoenix_ml.infrastructure.events.codec import decode_event
from phoenix_ml.infrastructure.events.journal import JournalRecord, JournalWriter


class _Line(Struct):
    """One line of the file."""

    at_ms: int
    reason: str
    payload: bytes
    place: str = ""
    # Without it an event's inputs are bytes that nobody can name.
    schema: bytes = b""


class FileDeadLetters:
    """A file of what could not be stored, one JSON object a line; the payload in base64.

    Any number of processes may bury and requeue at once.
    """

    def __init__(self, path: Path, journal_folder: Path) -> None:
        self._path = path
        self._journal_folder = journal_folder

    def bury(self, event: UnreadableEvent) -> None:
        """Returns when the letter is on disk: the journal may forget its bytes after that."""
        record: JournalRecord = event.origin
        place = f"{record.segment.parent.name}/{record.segment.name}@{record.position}"
        line = _Line(time.time_ns() // 1_000_000, event.reason, event.payload, place, record.schema or b"")
        with self._locked():
            _append(self._path, [line])

    def letters(self, limit: int) -> list[DeadLetter]:
        """The oldest."""
        with self._reached():
            return [_letter(line) for line in self._lines()[:limit]]

    def requeue(self, limit: int) -> int:
        """How many events went back into the journal, the oldest first; damaged bytes stay where they are.

        Raises JournalFull: then nothing has changed.
        """
        with self._locked():
            lines = self._lines()
            events = [n for n, line in enumerate(lines) if _letter(line).event is not None][:limit]
            if not events:
                return 0
            writer = JournalWriter(self._journal_folder / f"requeued-{os.getpid()}")
            try:
                for number in events:
                    line = lines[number]
                    digest = hashlib.blake2b(line.schema, digest_size=16).digest() if line.schema else b""
                    writer.append(line.payload, digest, line.schema)
            finally:
                writer.close()
            rest = self._path.with_suffix(".rest")
            rest.unlink(missing_ok=True)
            # A crash before the rename leaves both: the events are logged once all the same, by their ids.
            _append(rest, [line for number, line in enumerate(lines) if number not in set(events)])
            rest.rename(self._path)
        return len(events)

    def _lines(self) -> list[_Line]:
        try:
            written = self._path.read_bytes()
        except FileNotFoundError:
            return []
        whole = written[: _whole_bytes(written)]
        return [msgspec.json.decode(line, type=_Line) for line in whole.splitlines()]

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self._reached():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.with_suffix(".lock").open("w") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                yield

    @contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            raise EventsUnavailable(
                f"the dead letters in {self._path.parent} cannot be reached: {exc.strerror}",
                events=str(self._path),
            ) from exc


def _whole_bytes(written: bytes) -> int:
    """Where the last letter ends. A process that died, or a disk that was full, may leave a part of another,
    which its origin still has.
    """
    return written.rfind(b"\n") + 1


def _append(path: Path, lines: list[_Line]) -> None:
    with path.open("a+b") as file:
        if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
            file.truncate(_whole_bytes(path.read_bytes()))
        for line in lines:
            file.write(msgspec.json.encode(line) + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _letter(line: _Line) -> DeadLetter:
    found = decode_event(line.payload, line.schema)
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(line.at_ms / 1000))
    event = found.event if isinstance(found, RecordedEvent) else None
    return DeadLetter(line.place, at, line.reason, line.payload, event)
