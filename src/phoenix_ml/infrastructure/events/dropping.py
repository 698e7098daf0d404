"""``PHOENIX_JOURNAL_FULL=drop`` — answers go on when the journal is full, and what is lost is counted."""

from collections.abc import Callable, Sequence

from phoenix_ml.application.ports import Journal
from phoenix_ml.domain.errors import JournalFull


class DroppingJournal:
    def __init__(self, journal: Journal, count_dropped: Callable[[int], None]) -> None:
        self._journal = journal
        self._count_dropped = count_dropped

    def append(self, payload: bytes, schema_digest: bytes = b"", schema: bytes = b"") -> None:
        self.append_many((payload,), schema_digest, schema)

    def append_many(self, payloads: Sequence[bytes], schema_digest: bytes = b"", schema: bytes = b"") -> None:
        try:
            self._journal.append_many(payloads, schema_digest, schema)
        except JournalFull:
            self._count_dropped(len(payloads))

    def append_batch(
        self, payload: bytes, count: int, schema_digest: bytes = b"", schema: bytes = b""
    ) -> None:
        try:
            self._journal.append_batch(payload, count, schema_digest, schema)
        except JournalFull:
            self._count_dropped(count)
