"""The journal: what an API process has answered, on disk before the answer leaves.

One folder per API worker, ``DATA/journal/api-0/``. In it, segments that sort by the time they were opened::

    01760000000123456789-9f2c41d7.segment     nanoseconds since the epoch - seed, random, hexadecimal
    01760000000123456789-9f2c41d7.opening     the same, not yet locked: no reader looks into it

A segment is nothing but records, little-endian. Every append is one record and one write(2), so a record
is all or nothing, and so is a group::

    0       4       8        12     13           21
    | magic | crc32 | length | kind | schema key | body: length bytes |
                    '------------- crc32 over this -------------------'

    kind 1, an event     body = payload
    kind 2, a group      body = u32 length, schema (length 0: in an earlier group), then u32 length, payload; ...
    kind 3, a batch      body = one payload that stands for many events, which a reader makes of it

The schema key is the first 8 bytes of the schema's digest, zeros for none. The first record of a segment
that needs a schema is a group that carries it, so a segment explains itself.

The crc starts from the segment's seed. Payloads hold what callers sent; without the seed, which they cannot
know, bytes inside a payload could pass for a record when a reader looks for the next one after damage.
Hence a renamed segment is unreadable.

Who may do what is decided by flock(2): a writer holds its open segment's lock as long as it may write there. A
reader that gets the lock knows that no byte will follow.
"""

import contextlib
import errno
import fcntl
import os
import re
import secrets
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from struct import Struct
from typing import NamedTuple
from zlib import crc32

from phoenix_ml.domain.errors import JournalFull
from phoenix_ml.infrastructure.events.codec import expand_batch

MAX_BODY_BYTES = 64 * 1024 * 1024

_MAGIC = b"\xf5PJ1"
_EVENT = 1
_GROUP = 2
_BATCH = 3
_KINDS = (_EVENT, _GROUP, _BATCH)
_NO_SCHEMA = bytes(8)

_HEADER = Struct("<4sIIB8s")
_MARK = Struct("<4sI")
_CHECKED_HEADER = Struct("<IB8s")
_LENGTH = Struct("<I")

_SEGMENT_NAME = re.compile(r"(\d{20})-([0-9a-f]{8})\.segment", re.ASCII)
_OPENING_SUFFIX = ".opening"

_FULL_FOR_S = 0.01
_CHUNK_BYTES = 256 * 1024
_DAMAGE_PIECE_BYTES = 512 * 1024


class JournalWriter:
    """Appends to one folder; a new object opens a new segment and never touches an older one.

    ``append``, ``append_many``, ``append_batch``, ``rotate_if_old`` and ``close`` belong to one thread;
    ``sync`` and the properties may be called from any. ``sync`` must be called now and then: it alone makes
    segments survive a power loss.

    ``limit_bytes`` bounds this folder alone. The folder is made if need be; OSError if that is impossible.
    """

    def __init__(
        self,
        folder: Path,
        *,
        segment_bytes: int = 8 * 1024 * 1024,
        limit_bytes: int = 1024 * 1024 * 1024,
        max_age_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not 0 < segment_bytes <= MAX_BODY_BYTES:
            message = f"segment_bytes is {segment_bytes}, but must lie between 1 and {MAX_BODY_BYTES}"
            raise ValueError(message)
        if not folder.is_dir():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            # A synced segment is lost all the same with a folder whose own name is not on disk.
            for parent in (folder.parent, folder.parent.parent):
                _sync_path(parent)
        self._folder = folder
        self._segment_bytes = segment_bytes
        self._limit_bytes = limit_bytes
        self._max_age_s = max_age_s
        self._clock = clock
        self._closed = False
        # A wall clock that was set back must not sort a new segment before an older one.
        self._opened_ns = max((_opened_ns(path.name) for path, _ in _segments_in(folder)), default=0)
        self._full_until = float("-inf")
        # What the last append needed when it was refused; 0 when it was not.
        self._refused_bytes = 0

        self._fd = -1
        self._path = folder
        self._seed = 0
        self._opened_at = 0.0
        self._end = 0
        # An append that would end beyond this goes the slow way; no open segment: every append does.
        self._stop = -1
        self._keys = {b"": _NO_SCHEMA}

        # Guards the exchange of the open segment against sync; append never takes it.
        self._exchange = threading.Lock()
        # Held by sync throughout, so that close does not return before a sync elsewhere is done.
        self._syncing = threading.Lock()
        # Bounded, so that a process that never syncs does not grow.
        self._unsynced: deque[Path] = deque(maxlen=1024)
        self._names_made = 0
        self._names_synced = 0

    @property
    def stored_bytes(self) -> int:
        """What the folder's segments occupy now; costs one directory scan."""
        return sum(size for _, size in _segments_in(self._folder))

    @property
    def refusal(self) -> str:
        """Why the last append was refused; empty when it was not, or when by now it would not be.

        Tries the disk in the latter case, so it may take as long as an append.
        """
        need_bytes = self._refused_bytes
        if not need_bytes:
            return ""
        stored_bytes = self.stored_bytes
        if stored_bytes + need_bytes > self._limit_bytes:
            return f"full: {stored_bytes} bytes wait to be logged"
        try:
            # A disk tells what it takes in no other way: quotas and failing blocks are not in its statistics.
            with tempfile.TemporaryFile(dir=self._folder, buffering=0) as file:
                is_taken = file.write(bytes(need_bytes)) == need_bytes
        except OSError as exc:
            return f"the disk takes no more: {exc.strerror}"
        return "" if is_taken else f"the disk takes no more: {os.strerror(errno.ENOSPC)}"

    def append(self, payload: bytes, schema_digest: bytes = b"", schema: bytes = b"") -> None:
        """Put one event on record: it survives this process from here on, and the machine after ``sync``.

        The schema is written if this segment does not hold it yet. Raises JournalFull at the limit, or when
        the disk takes no more: then nothing is on record, and the next append may succeed. Raises ValueError
        for a payload beyond 64 MiB, an impossible digest, or after ``close``.
        """
        # 2.0 µs with 300 bytes on ext4: 1.1 write(2), 0.2 crc32. As a group of one it would be 3.3, with a
        # join instead of the two concatenations 0.03 more.
        key = self._keys.get(schema_digest)
        if key is not None:
            checked = _CHECKED_HEADER.pack(len(payload), _EVENT, key) + payload
            record = _MARK.pack(_MAGIC, crc32(checked, self._seed)) + checked
            end = self._end + len(record)
            if end <= self._stop:
                try:
                    written = os.write(self._fd, record)
                except OSError as exc:
                    raise self._refused(exc.strerror, len(record)) from exc
                if written != len(record):
                    raise self._undone(written, len(record))
                self._end = end
                return
        self.append_many((payload,), schema_digest, schema)

    def append_batch(
        self, payload: bytes, _count: int, schema_digest: bytes = b"", schema: bytes = b""
    ) -> None:
        """Put many events on record as the one payload that stands for them; errors as for ``append``."""
        if self._closed:
            raise ValueError("the journal is closed")
        key = self._schema_key(schema_digest, schema)
        # As much as the record takes, and its schema if that is still to come.
        need_bytes = 2 * _HEADER.size + _LENGTH.size + len(schema) + len(payload)
        if len(payload) > MAX_BODY_BYTES:
            message = f"a record of {len(payload)} bytes is beyond the journal's {MAX_BODY_BYTES}"
            raise ValueError(message)
        if self._end + need_bytes > self._stop:
            self._make_room(need_bytes)
        if schema_digest not in self._keys:
            self._append_group((), schema_digest, schema)
        checked = _CHECKED_HEADER.pack(len(payload), _BATCH, key) + payload
        self._write(_MARK.pack(_MAGIC, crc32(checked, self._seed)) + checked, need_bytes)

    def append_many(self, payloads: Sequence[bytes], schema_digest: bytes = b"", schema: bytes = b"") -> None:
        """Put all these events on record or none, with one write; errors as for ``append``."""
        if payloads:
            self._append_group(payloads, schema_digest, schema)

    def _append_group(self, payloads: Sequence[bytes], schema_digest: bytes, schema: bytes) -> None:
        if self._closed:
            raise ValueError("the journal is closed")
        key = self._schema_key(schema_digest, schema)
        most_bytes = (
            _HEADER.size
            + _LENGTH.size * (1 + len(payloads))
            + len(schema)
            + sum(len(payload) for payload in payloads)
        )
        if most_bytes - _HEADER.size > MAX_BODY_BYTES:
            message = f"a record of {most_bytes} bytes is beyond the journal's {MAX_BODY_BYTES}"
            raise ValueError(message)
        if self._end + most_bytes > self._stop:
            self._make_room(most_bytes)

        # Only now: making room may have opened a segment, which knows no schema and has a seed of its own.
        parts = [schema if schema_digest not in self._keys else b"", *payloads]
        body = b"".join([piece for part in parts for piece in (_LENGTH.pack(len(part)), part)])
        checked = _CHECKED_HEADER.pack(len(body), _GROUP, key) + body
        self._write(_MARK.pack(_MAGIC, crc32(checked, self._seed)) + checked, most_bytes)
        self._keys[schema_digest] = key

    def _write(self, record: bytes, need_bytes: int) -> None:
        try:
            written = os.write(self._fd, record)
        except OSError as exc:
            raise self._refused(exc.strerror, need_bytes) from exc
        if written != len(record):
            raise self._undone(written, need_bytes)
        self._end += written
        self._refused_bytes = 0

    def sync(self) -> None:
        """Make all that was on record when this was called survive a power loss.

        Raises OSError when the disk fails; what could not be synced may be lost with the machine.
        """
        with self._syncing:
            with self._exchange:
                # A copy: a rotation may close the segment, and the number would mean another file.
                fd = os.dup(self._fd) if self._fd >= 0 else -1
                names_made = self._names_made
            try:
                while self._unsynced:
                    # Gone: a reader has dropped it, so its events are safe elsewhere.
                    with contextlib.suppress(FileNotFoundError):
                        _sync_path(self._unsynced.popleft())
                if fd >= 0:
                    os.fdatasync(fd)
            finally:
                if fd >= 0:
                    os.close(fd)
            if names_made != self._names_synced:
                _sync_path(self._folder)
                self._names_synced = names_made

    def rotate_if_old(self) -> None:
        """Close the segment if it has events and is older than ``max_age_s``, so that a reader may drop it."""
        if self._end > 0 and self._clock() - self._opened_at >= self._max_age_s:
            self._seal()

    def close(self) -> None:
        """Sync and close; appending ends here. Raises OSError when the disk fails, and is closed even so."""
        self._closed = True
        try:
            self.sync()
        finally:
            self._seal()

    def _schema_key(self, digest: bytes, schema: bytes) -> bytes:
        key = self._keys.get(digest)
        if key is not None:
            return key
        key = digest[:8]
        if not 8 <= len(digest) <= 32 or key == _NO_SCHEMA or not schema:
            message = f"no schema can be kept under the digest {digest.hex()!r}, or the schema is empty"
            raise ValueError(message)
        if key in self._keys.values():
            message = f"another schema's digest begins like {digest.hex()!r}"
            raise ValueError(message)
        return key

    def _make_room(self, need_bytes: int) -> None:
        """Leave an open segment that takes this many bytes, or raise JournalFull."""
        now = self._clock()
        # Scanning 128 segments takes 0.3 ms; while full, refused appends should not pay that each.
        if now < self._full_until:
            raise self._full(need_bytes)
        stored_bytes = self.stored_bytes
        if stored_bytes + need_bytes > self._limit_bytes:
            # A reader can drop closed segments only; else a full journal would stay full.
            self._seal()
            self._full_until = now + _FULL_FOR_S
            raise self._full(need_bytes)
        if self._end > 0 and self._end + need_bytes > self._segment_bytes:
            self._seal()
        if self._fd < 0:
            try:
                self._open()
            except OSError as exc:
                raise self._refused(exc.strerror, need_bytes) from exc
        older_bytes = stored_bytes - self._end
        self._stop = min(self._segment_bytes, self._limit_bytes - older_bytes)

    def _open(self) -> None:
        """Open a new, locked, empty segment."""
        while True:
            self._opened_ns = max(time.time_ns(), self._opened_ns + 1)
            self._seed = secrets.randbits(32)
            name = f"{self._opened_ns:020d}-{self._seed:08x}"
            opening = self._folder / (name + _OPENING_SUFFIX)
            fd = os.open(opening, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
            path = self._folder / f"{name}.segment"
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                opening.rename(path)
            except (BlockingIOError, FileNotFoundError):
                # Between creation and lock a reader took it for the leftover of a dead writer.
                os.close(fd)
                continue
            except OSError:
                os.close(fd)
                raise
            break
        with self._exchange:
            self._fd = fd
            self._path = path
            self._names_made += 1
        self._opened_at = self._clock()

    def _seal(self) -> None:
        """Close the open segment, if there is one, for good."""
        if self._fd < 0:
            return
        with self._exchange:
            fd, self._fd = self._fd, -1
            if self._end > 0:
                self._unsynced.append(self._path)
            else:
                self._path.unlink(missing_ok=True)
            # Closing does not unlock while another copy is open: in sync, or in a forked child.
            fcntl.flock(fd, fcntl.LOCK_UN)
            os.close(fd)
        self._end = 0
        self._stop = -1
        self._keys = {b"": _NO_SCHEMA}

    def _undone(self, written: int, need_bytes: int) -> JournalFull:
        """Take back the beginning of a record that did not fit.

        No reader can have passed it, for it is a record only when whole.
        """
        try:
            # Not from self._end: a signal handler that raised after a write would have left that behind.
            os.ftruncate(self._fd, os.fstat(self._fd).st_size - written)
        except OSError:
            # The half record stays as the torn tail of a closed segment.
            self._end += written
            self._seal()
        return self._refused(os.strerror(errno.ENOSPC), need_bytes)

    def _refused(self, reason: str | None, need_bytes: int) -> JournalFull:
        self._refused_bytes = need_bytes
        # The next append goes the slow way, which alone takes this back.
        self._stop = -1
        message = f"the disk takes no more of the journal: {reason}"
        return JournalFull(message, limit_bytes=self._limit_bytes)

    def _full(self, need_bytes: int) -> JournalFull:
        self._refused_bytes = need_bytes
        message = f"the journal is at its limit of {self._limit_bytes} bytes, because nothing ships it"
        return JournalFull(message, limit_bytes=self._limit_bytes)


class JournalRecord(NamedTuple):
    """An event, or what cannot be read as one."""

    payload: bytes
    """The event; with damage, the bytes as they are."""
    schema: bytes | None
    """None where the event has none, or with damage."""
    segment: Path
    position: int
    """Where in the segment its record (of a group: the whole group), or its damaged bytes, begin."""
    damage: str = ""
    """Why the payload cannot be read; empty for an event."""


class JournalReader:
    """Reads every folder below ``root``, waits for nothing, and drops what its caller has stored.

    The place it has reached is kept in memory only: a new reader begins with the oldest segment still there, so
    its caller must not mind a repeat. ``read``, ``commit`` and ``close`` belong to one thread; the rest may
    be called from any.

    ``unreadable`` holds the segments that the disk refuses at present, with its words. They are tried again
    at each ``read``.
    """

    def __init__(self, root: Path) -> None:
        self.corrupt_regions = 0
        self.torn_tails = 0
        self.unreadable: dict[Path, str] = {}
        self._root = root
        self._segments: dict[Path, _Segment] = {}
        # Of all segments: where damage has hit one's schema, another's still explains its events.
        self._schemas: dict[bytes, bytes] = {}

    @property
    def pending_bytes(self) -> int:
        """What is in the journal and not yet committed; costs a scan of the folders, like the next two."""
        return sum(pending for _, pending in self._pending())

    @property
    def oldest_pending_s(self) -> float:
        """How long ago the oldest segment not wholly committed was opened; 0.0 without one."""
        oldest_ns = min((_opened_ns(path.name) for path, _ in self._pending()), default=None)
        return 0.0 if oldest_ns is None else max(0.0, (time.time_ns() - oldest_ns) / 1e9)

    def read(self, max_events: int) -> list[JournalRecord]:
        """The next records, oldest segment first, in order within a folder; empty if there are none now.

        A group is not divided, and neither is damage, so there may be more than asked for. What is damaged
        comes with its reason, in pieces of 512 KiB at most; the torn tail of a dead writer does not come: it was
        never answered for.
        """
        records: list[JournalRecord] = []
        self._read_known(max_events, records)
        # Listing only when all known is read keeps a backlog of thousands of segments cheap. It comes
        # before the locks are looked at: a writer closes a segment before it opens the next, so what is
        # missing of the older one is read before the newer one.
        if len(records) < max_events and self._find_segments():
            self._read_known(max_events, records)
        return records

    def commit(self) -> None:
        """All that ``read`` has returned is safely stored: segments that are finished and read are deleted.

        To be called after an empty ``read`` too: it is what finds that a segment is finished. Raises OSError
        if a segment can't be deleted; the next call tries again.
        """
        for segment in list(self._segments.values()):
            segment.committed = segment.offset
            if segment.is_done:
                segment.path.unlink(missing_ok=True)
                del self._segments[segment.path]

    def close(self) -> None:
        """Let go of all files; nothing is deleted."""
        for segment in self._segments.values():
            segment.close()
        self._segments.clear()

    def _pending(self) -> Iterator[tuple[Path, int]]:
        for folder in _folders_in(self._root):
            for path, size in _segments_in(folder):
                known = self._segments.get(path)
                pending = size - (known.committed if known else 0)
                if pending > 0:
                    yield path, pending

    def _find_segments(self) -> bool:
        """Whether there are new ones."""
        new = []
        for folder in _folders_in(self._root):
            _remove_leftovers(folder)
            new += [path for path, _ in _segments_in(folder) if path not in self._segments]
        for path in new:
            self._segments[path] = _Segment(path)
        if new:
            by_age = sorted(self._segments, key=lambda path: (path.name, path.parent.name))
            self._segments = {path: self._segments[path] for path in by_age}
        return bool(new)

    def _read_known(self, max_events: int, records: list[JournalRecord]) -> None:
        for segment in list(self._segments.values()):
            if len(records) >= max_events:
                return
            if segment.is_done:
                continue
            try:
                segment.open()
                self._read_segment(segment, max_events, records)
            except FileNotFoundError:
                del self._segments[segment.path]
                self.unreadable.pop(segment.path, None)
            except OSError as exc:
                # One bad disk block must not keep the other segments from being read.
                self.unreadable[segment.path] = str(exc)
            else:
                self.unreadable.pop(segment.path, None)

    def _read_segment(self, segment: "_Segment", max_events: int, records: list[JournalRecord]) -> None:
        segment.look_for_writer()
        ask_bytes = _CHUNK_BYTES
        while len(records) < max_events:
            # Always from the last whole record on: a writer may take back half a record and write another.
            chunk = os.pread(segment.fd, ask_bytes, segment.offset)
            parsed_bytes = self._parse(segment, chunk, max_events, records)
            if parsed_bytes:
                segment.offset += parsed_bytes
                ask_bytes = _CHUNK_BYTES
                continue
            if not chunk:
                if segment.is_final:
                    segment.is_done = True
                    segment.close()
                return
            record_bytes = _record_bytes(chunk)
            if len(chunk) == ask_bytes < record_bytes:
                ask_bytes = record_bytes
                continue
            next_offset = segment.next_record(segment.offset + 1)
            if segment.is_record_at(segment.offset):
                # The chunk was older than that.
                continue
            if next_offset is None:
                if not segment.is_final:
                    return
                end = os.fstat(segment.fd).st_size
                if segment.is_torn_from(segment.offset, end):
                    self.torn_tails += 1
                    segment.offset = end
                else:
                    self._skip(segment, end, records)
            else:
                self._skip(segment, next_offset, records)

    def _parse(self, segment: "_Segment", chunk: bytes, max_events: int, records: list[JournalRecord]) -> int:
        """Add the whole records with which the chunk begins; the number of bytes that they take."""
        # 1.1 µs an event of 300 bytes, hence one flat loop, slices instead of memoryviews and local names.
        seed, path, offset = segment.seed, segment.path, segment.offset
        schemas, add = self._schemas, records.append
        unpack_header = _HEADER.unpack_from
        position = 0
        last_header = len(chunk) - _HEADER.size
        while position <= last_header and len(records) < max_events:
            magic, crc, length, kind, key = unpack_header(chunk, position)
            end = position + _HEADER.size + length
            if magic != _MAGIC or end > len(chunk):
                break
            checked = chunk[position + _MARK.size : end]
            if crc32(checked, seed) != crc:
                break
            body = checked[_CHECKED_HEADER.size :]
            payloads: Iterable[bytes]
            if kind == _EVENT:
                payloads = (body,)
            elif kind == _GROUP:
                payloads = _parts(body)
                schema = next(iter(payloads), b"")
                if schema:
                    schemas[key] = schema
            elif kind == _BATCH:
                try:
                    payloads = expand_batch(body)
                except ValueError as exc:
                    add(JournalRecord(body, None, path, offset + position, str(exc)))
                    position = end
                    continue
            else:
                break
            explains = schemas.get(key)
            damage = ""
            if explains is None and key != _NO_SCHEMA:
                damage = f"the event's schema {key.hex()} was lost to damage"
            for payload in payloads:
                add(JournalRecord(payload, explains, path, offset + position, damage))
            position = end
        return position

    def _skip(self, segment: "_Segment", end: int, records: list[JournalRecord]) -> None:
        damage = (
            f"{end - segment.offset} bytes from {segment.offset} on are no record: checksum or marker wrong"
        )
        # All pieces before any is handed out, because the disk may refuse one, and then all come again.
        pieces = [
            (position, os.pread(segment.fd, min(_DAMAGE_PIECE_BYTES, end - position), position))
            for position in range(segment.offset, end, _DAMAGE_PIECE_BYTES)
        ]
        records += [JournalRecord(piece, None, segment.path, position, damage) for position, piece in pieces]
        self.corrupt_regions += 1
        segment.offset = end


class _Segment:
    """One segment as a reader sees it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seed = int(path.stem.partition("-")[2], 16)
        self.fd = -1
        self.offset = 0
        self.committed = 0
        self.is_final = False
        self.is_done = False

    def open(self) -> None:
        if self.fd < 0:
            self.fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def look_for_writer(self) -> None:
        """To be called before reading to the end, or a writer's last bytes could be missed."""
        self.is_final = self.is_final or _is_unlocked(self.fd)

    def next_record(self, offset: int) -> int | None:
        """Where the next whole record begins, if there is one."""
        while True:
            chunk = os.pread(self.fd, _CHUNK_BYTES, offset)
            found = chunk.find(_MAGIC)
            while found >= 0:
                if self.is_record_at(offset + found):
                    return offset + found
                found = chunk.find(_MAGIC, found + 1)
            if len(chunk) < len(_MAGIC):
                return None
            offset += len(chunk) - len(_MAGIC) + 1

    def is_record_at(self, offset: int) -> bool:
        header = os.pread(self.fd, _HEADER.size, offset)
        record_bytes = _record_bytes(header)
        if not _HEADER.size <= record_bytes <= os.fstat(self.fd).st_size - offset:
            return False
        (_, crc, _, kind, _) = _HEADER.unpack(header)
        checked = os.pread(self.fd, record_bytes - _MARK.size, offset + _MARK.size)
        return kind in _KINDS and crc32(checked, self.seed) == crc

    def is_torn_from(self, offset: int, end: int) -> bool:
        """Whether a writer was stopped here: a record's beginning, or zeros that a power loss leaves."""
        header = os.pread(self.fd, _HEADER.size, offset)
        if len(header) < _HEADER.size:
            is_beginning = header.startswith(_MAGIC) or _MAGIC.startswith(header)
        else:
            is_beginning = _record_bytes(header) > end - offset
        return is_beginning or not os.pread(self.fd, end - offset, offset).strip(b"\0")


def _record_bytes(beginning: bytes) -> int:
    """How long the record is that begins like this; 0 if none does."""
    if len(beginning) < _HEADER.size:
        return 0
    magic, _, length, _, _ = _HEADER.unpack_from(beginning)
    return _HEADER.size + length if magic == _MAGIC and length <= MAX_BODY_BYTES else 0


def _parts(body: bytes) -> Iterator[bytes]:
    position = 0
    while position < len(body):
        (length,) = _LENGTH.unpack_from(body, position)
        position += _LENGTH.size
        yield body[position : position + length]
        position += length


def _folders_in(root: Path) -> list[Path]:
    try:
        with os.scandir(root) as entries:
            return [Path(entry.path) for entry in entries if entry.is_dir()]
    except FileNotFoundError:
        return []


def _segments_in(folder: Path) -> list[tuple[Path, int]]:
    """Each segment and its size."""
    segments = []
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            # Gone since it was listed: dropped by a reader.
            if _SEGMENT_NAME.fullmatch(entry.name):
                with contextlib.suppress(FileNotFoundError):
                    segments.append((Path(entry.path), entry.stat().st_size))
    return segments


def _opened_ns(segment_name: str) -> int:
    return int(segment_name.partition("-")[0])


def _remove_leftovers(folder: Path) -> None:
    """Remove the segments that a writer, now dead, had created but not locked."""
    for opening in folder.glob("*" + _OPENING_SUFFIX):
        with contextlib.suppress(FileNotFoundError):
            fd = os.open(opening, os.O_RDONLY | os.O_CLOEXEC)
            try:
                if _is_unlocked(fd):
                    opening.unlink()
            finally:
                os.close(fd)


def _is_unlocked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _sync_path(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
