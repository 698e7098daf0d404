"""Features in an SQLite file of their own: the default that needs no server.

A read is one SELECT by primary key, done on the event loop: 10 µs for 30 features, where a hop to a
thread would cost 100. In WAL mode a reader never waits for a writer. Writes may wait, for a writer
in another process, so they always take the hop.

The reads of one tick of the event loop, from the second on, share a transaction, since to begin and end one is half of
a read (6 µs alone, 3 in a transaction). It ends before the loop hears of a write that ended after it began, so a caller who has seen
a write end reads what it wrote.
"""

import asyncio
import sqlite3
import struct
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, Final

import msgspec

from phoenix_ml.domain.errors import FeatureStoreUnavailable
from phoenix_ml.domain.features import FeatureType, PackedFeatures, PackedSignature, StoredFeatures
from phoenix_ml.domain.rows import Scalar
from phoenix_ml.infrastructure.features.values import NATIVE, Given, PackedReads, as_type, checked
from phoenix_ml.infrastructure.sqlite import enter_wal_mode

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS features (
    entity_id TEXT PRIMARY KEY,
    "values" BLOB NOT NULL,
    updated_at_ms INTEGER,
    at_ms BLOB
) STRICT
"""
# Whoever changes features, be it an older version of this program, drops what was packed of them; REPLACE
# fires the insertion's trigger alone.
_PACKED_SCHEMA: Final = (
    """
CREATE TABLE IF NOT EXISTS packed (
    entity_id TEXT NOT NULL,
    digest TEXT NOT NULL,
    "row" BLOB NOT NULL,
    updated_at_ms INTEGER,
    PRIMARY KEY (entity_id, digest)
) STRICT, WITHOUT ROWID
""",
    """
CREATE TRIGGER IF NOT EXISTS features_inserted AFTER INSERT ON features
BEGIN DELETE FROM packed WHERE entity_id = NEW.entity_id; END
""",
    """
CREATE TRIGGER IF NOT EXISTS features_updated AFTER UPDATE ON features
BEGIN DELETE FROM packed WHERE entity_id IN (OLD.entity_id, NEW.entity_id); END
""",
    """
CREATE TRIGGER IF NOT EXISTS features_deleted AFTER DELETE ON features
BEGIN DELETE FROM packed WHERE entity_id = OLD.entity_id; END
""",
)
_SELECT: Final = 'SELECT "values", updated_at_ms, at_ms FROM features WHERE entity_id = ?'
_UPSERT: Final = """
INSERT INTO features (entity_id, "values", updated_at_ms, at_ms) VALUES (?, ?, ?, ?)
ON CONFLICT (entity_id) DO UPDATE
SET "values" = excluded."values", updated_at_ms = excluded.updated_at_ms, at_ms = excluded.at_ms
"""
_SELECT_PACKED: Final = 'SELECT "row", updated_at_ms FROM packed WHERE entity_id = ? AND digest = ?'
_INSERT_PACKED: Final = 'INSERT INTO packed (entity_id, digest, "row", updated_at_ms) VALUES (?, ?, ?, ?)'
_DELETE: Final = "DELETE FROM features WHERE entity_id = ?"

_WRITE_PATIENCE_S: Final = 10.0
# A read waits on the event loop, and only while another process opens or recovers the file.
_READ_PATIENCE_S: Final = 0.1
# Between two transactions of a bulk write other writers get their turn.
_ENTITIES_A_TRANSACTION: Final = 500

_CONTRACTS_KEPT: Final = 256
_Natives = tuple[Mapping[str, FeatureType], tuple[tuple[str, type], ...], frozenset[type]]
_Packers = Sequence[tuple[str, tuple[str, ...], struct.Struct]]

_encode = msgspec.msgpack.Encoder().encode
_decode_values = msgspec.msgpack.Decoder(dict[str, Scalar]).decode
_decode_times = msgspec.msgpack.Decoder(dict[str, int]).decode


class SqliteFeatures:
    """A feature store in one file; any number of processes may use it at once.

    Raises FeatureStoreUnavailable when the file cannot be opened as a feature store.
    """

    name = "sqlite"

    def __init__(self, path: Path) -> None:
        self._path = path
        self._natives: dict[int, _Natives] = {}
        self._packed: dict[str, PackedReads] = {}
        self._reads_of_tick = 0
        # asyncio.to_thread cannot be stopped: after a cancelled write its thread still owns the connection.
        self._writing = threading.Lock()
        with self._named():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = self._connect(_WRITE_PATIENCE_S)
            try:
                self._create()
                self._reader = self._connect(_READ_PATIENCE_S)
            except BaseException:
                self._writer.close()
                raise

    async def read(self, entity_id: str, types: Mapping[str, FeatureType]) -> StoredFeatures | None:
        """The named features that are stored, in the types given; None for an unknown entity.

        Raises FeatureStoreUnavailable.
        """
        stored = self._select(entity_id)
        if stored is None:
            return None
        known = self._natives.get(id(types))
        if known is None or known[0] is not types:
            known = self._remember(types)
        values = stored.values
        if known[2].issuperset(map(type, values.values())):
            return stored
        for name, native in known[1]:
            value = values.get(name)
            if type(value) is not native and value is not None:
                values[name] = as_type(value, native)
        return stored

    async def read_packed(
        self, entity_id: str, signature: PackedSignature
    ) -> PackedFeatures | StoredFeatures | None:
        """The packed row where one is stored, else what ``read`` answers. Raises what that raises."""
        reads = self._packed.get(signature.digest)
        if reads is None:
            reads = self._packed[signature.digest] = PackedReads()
        if reads.misses and reads.are_hopeless():
            return await self.read(entity_id, signature.types)
        row = self._fetch(_SELECT_PACKED, (entity_id, signature.digest))
        if row is None:
            reads.misses += 1
            return await self.read(entity_id, signature.types)
        reads.misses = 0
        return PackedFeatures(*row)

    async def read_all(self, entity_id: str) -> StoredFeatures | None:
        """All that is stored for the entity, or None. Raises FeatureStoreUnavailable."""
        return self._select(entity_id)

    async def write(
        self, entities: Mapping[str, Given], at_ms: int, signatures: Sequence[PackedSignature] = ()
    ) -> None:
        """Merges features into entities; many entities are stored in several transactions.

        Raises InvalidField and FeatureInvalid for what cannot be stored, before anything is, and
        FeatureStoreUnavailable.
        """
        packers = [(s.digest, tuple(s.types), struct.Struct(f"<{len(s.types)}f")) for s in signatures]
        await asyncio.to_thread(self._write, entities, at_ms, packers)

    async def check(self, patience_s: float = 0.0) -> None:
        """Returns when the file can be read. Raises FeatureStoreUnavailable."""
        self._select("")

    async def close(self) -> None:
        """Lets a write that is under way end, then closes the file."""
        self._end_reads()
        await asyncio.to_thread(self._close)

    def _remember(self, types: Mapping[str, FeatureType]) -> "_Natives":
        """The Python types behind a contract's: looking up 30 enum members at each read costs 5 µs.

        A contract hands over the same mapping at each read, so it is known by its identity; that it is
        kept here keeps the identity from being given to another.
        """
        if len(self._natives) >= _CONTRACTS_KEPT:
            self._natives.clear()
        natives = tuple((name, NATIVE[wanted]) for name, wanted in types.items())
        # Where all are wanted in one type, and all are stored so, none has to be looked at by itself.
        uniform = frozenset(native for _, native in natives)
        self._natives[id(types)] = known = types, natives, uniform if len(uniform) == 1 else frozenset()
        return known

    def _select(self, entity_id: str) -> StoredFeatures | None:
        row = self._fetch(_SELECT, (entity_id,))
        if row is None:
            return None
        values, updated_at_ms, times = row
        try:
            at_ms = {} if times is None else _decode_times(times)
            return StoredFeatures(_decode_values(values), updated_at_ms, at_ms)
        except msgspec.MsgspecError as error:
            raise self._unavailable(error) from error

    def _fetch(self, query: str, key: tuple[str, ...]) -> Any:
        try:
            if self._reads_of_tick == 0:
                asyncio.get_running_loop().call_soon(self._end_reads)
            elif self._reads_of_tick == 1:
                self._reader.execute("BEGIN")
            self._reads_of_tick += 1
            return self._reader.execute(query, key).fetchone()
        except UnicodeEncodeError:
            # A lone surrogate, such as a shell can pass: no such entity can have been written.
            return None
        except sqlite3.Error as error:
            raise self._unavailable(error) from error

    def _end_reads(self) -> None:
        several, self._reads_of_tick = self._reads_of_tick > 1, 0
        if several:
            # Some errors have ended it already, and so has close() when a read came after it.
            with suppress(sqlite3.ProgrammingError):
                if self._reader.in_transaction:
                    self._reader.execute("ROLLBACK")

    def _write(self, entities: Mapping[str, Given], at_ms: int, packers: _Packers) -> None:
        remaining = iter(checked(entities).items())
        while chunk := dict(islice(remaining, _ENTITIES_A_TRANSACTION)):
            with self._named(), self._writing, self._transaction():
                for entity_id, features in chunk.items():
                    self._merge(entity_id, features, at_ms, packers)

    def _merge(
        self, entity_id: str, features: Mapping[str, Scalar | None], at_ms: int, packers: _Packers
    ) -> None:
        row = self._writer.execute(_SELECT, (entity_id,)).fetchone()
        values: dict[str, Scalar] = {} if row is None else _decode_values(row[0])
        covers_all = features.keys() >= values.keys()
        updated_at_ms = at_ms if covers_all else row[1]
        times = {} if covers_all or row[2] is None else _decode_times(row[2])
        for name, value in features.items():
            if value is None:
                values.pop(name, None)
                times.pop(name, None)
            else:
                values[name] = value
                if not covers_all:
                    times[name] = at_ms
        if values:
            self._writer.execute(
                _UPSERT, (entity_id, _encode(values), updated_at_ms, _encode(times) if times else None)
            )
            for digest, names, packer in packers:
                if (packed := _packed_row(values, names, packer)) is not None:
                    self._writer.execute(_INSERT_PACKED, (entity_id, digest, packed, updated_at_ms))
        elif row is not None:
            self._writer.execute(_DELETE, (entity_id,))

    def _connect(self, patience_s: float) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self._path, timeout=patience_s, isolation_level=None, check_same_thread=False
        )
        try:
            # Survives the death of the process; a power cut may cost the last writes, never the file.
            connection.execute("PRAGMA synchronous = NORMAL")
        except BaseException:
            connection.close()
            raise
        return connection

    def _create(self) -> None:
        """Makes the file a feature store, while other processes may be doing the same."""
        enter_wal_mode(self._writer, _WRITE_PATIENCE_S)
        self._writer.execute(_SCHEMA)
        for statement in _PACKED_SCHEMA:
            self._writer.execute(statement)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._writer.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._writer.execute("COMMIT")
        except BaseException:
            # SQLite itself has rolled back already after some errors, a full disk for one.
            if self._writer.in_transaction:
                self._writer.execute("ROLLBACK")
            raise

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError, msgspec.MsgspecError) as error:
            raise self._unavailable(error) from error

    def _unavailable(self, error: Exception) -> FeatureStoreUnavailable:
        return FeatureStoreUnavailable(
            f"the feature store sqlite at {self._path} is unavailable: {error}",
            store=self.name,
            address=str(self._path),
        )

    def _close(self) -> None:
        with self._writing, self._named():
            self._reader.close()
            self._writer.close()


def _packed_row(values: Mapping[str, Scalar], names: Sequence[str], packer: struct.Struct) -> bytes | None:
    """The features as float32; None where one is missing, is no number, or does not fit."""
    row = [values.get(name) for name in names]
    if not {float, int}.issuperset(map(type, row)):
        return None
    try:
        return packer.pack(*row)
    except OverflowError:
        return None
