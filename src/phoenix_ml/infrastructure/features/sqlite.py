"""Features in an SQLite file of their own: the default that needs no server.

A read is one SELECT by primary key, done on the event loop: 10 µs for 30 features, where a hop to a
thread would cost 100. In WAL mode a reader never waits for a writer. Writes may wait, for a writer
in another process, so they always take the hop.
"""

import asyncio
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Final

import msgspec

from phoenix_ml.domain.errors import FeatureStoreUnavailable
from phoenix_ml.domain.features import FeatureType, StoredFeatures
from phoenix_ml.domain.rows import Scalar
from phoenix_ml.infrastructure.features.values import NATIVE, Given, as_type, checked
from phoenix_ml.infrastructure.sqlite import enter_wal_mode

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS features (
    entity_id TEXT PRIMARY KEY,
    "values" BLOB NOT NULL,
    updated_at_ms INTEGER,
    at_ms BLOB
) STRICT
"""
_SELECT: Final = 'SELECT "values", updated_at_ms, at_ms FROM features WHERE entity_id = ?'
_UPSERT: Final = """
INSERT INTO features (entity_id, "values", updated_at_ms, at_ms) VALUES (?, ?, ?, ?)
ON CONFLICT (entity_id) DO UPDATE
SET "values" = excluded."values", updated_at_ms = excluded.updated_at_ms, at_ms = excluded.at_ms
"""
_DELETE: Final = "DELETE FROM features WHERE entity_id = ?"

_WRITE_PATIENCE_S: Final = 10.0
# A read waits on the event loop, and only while another process opens or recovers the file.
_READ_PATIENCE_S: Final = 0.1
# Between two transactions of a bulk write other writers get their turn.
_ENTITIES_A_TRANSACTION: Final = 500

_CONTRACTS_KEPT: Final = 256
_Natives = tuple[Mapping[str, FeatureType], tuple[tuple[str, type], ...]]

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
        for name, native in known[1]:
            value = values.get(name)
            if type(value) is not native and value is not None:
                values[name] = as_type(value, native)
        return stored

    async def read_all(self, entity_id: str) -> StoredFeatures | None:
        """All that is stored for the entity, or None. Raises FeatureStoreUnavailable."""
        return self._select(entity_id)

    async def write(self, entities: Mapping[str, Given], at_ms: int) -> None:
        """Merges features into entities; many entities are stored in several transactions.

        Raises InvalidField and FeatureInvalid for what cannot be stored, before anything is, and
        FeatureStoreUnavailable.
        """
        await asyncio.to_thread(self._write, entities, at_ms)

    async def check(self, patience_s: float = 0.0) -> None:
        """Returns when the file can be read. Raises FeatureStoreUnavailable."""
        self._select("")

    async def close(self) -> None:
        """Lets a write that is under way end, then closes the file."""
        await asyncio.to_thread(self._close)

    def _remember(self, types: Mapping[str, FeatureType]) -> "_Natives":
        """The Python types behind a contract's: looking up 30 enum members at each read costs 5 µs.

        A contract hands over the same mapping at each read, so it is known by its identity; that it is
        kept here keeps the identity from being given to another.
        """
        if len(self._natives) >= _CONTRACTS_KEPT:
            self._natives.clear()
        self._natives[id(types)] = known = types, tuple((n, NATIVE[t]) for n, t in types.items())
        return known

    def _select(self, entity_id: str) -> StoredFeatures | None:
        try:
            row = self._reader.execute(_SELECT, (entity_id,)).fetchone()
            if row is None:
                return None
            values, updated_at_ms, times = row
            at_ms = {} if times is None else _decode_times(times)
            return StoredFeatures(_decode_values(values), updated_at_ms, at_ms)
        except UnicodeEncodeError:
            # A lone surrogate, such as a shell can pass: no such entity can have been written.
            return None
        except (sqlite3.Error, msgspec.MsgspecError) as error:
            raise self._unavailable(error) from error

    def _write(self, entities: Mapping[str, Given], at_ms: int) -> None:
        remaining = iter(checked(entities).items())
        while chunk := dict(islice(remaining, _ENTITIES_A_TRANSACTION)):
            with self._named(), self._writing, self._transaction():
                for entity_id, features in chunk.items():
                    self._merge(entity_id, features, at_ms)

    def _merge(self, entity_id: str, features: Mapping[str, Scalar | None], at_ms: int) -> None:
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
