"""The SQLite adapter under several processes, and with files that are no feature store."""

import asyncio
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from threading import Barrier

import pytest

from phoenix_ml.domain.errors import FeatureStoreUnavailable
from phoenix_ml.domain.features import FeatureType, PackedFeatures, PackedSignature
from phoenix_ml.infrastructure.features.sqlite import SqliteFeatures

pytestmark = pytest.mark.anyio

PROCESSES = 6
INTEGER = {"n": FeatureType.INTEGER}
OPEN_AND_WRITE = """
import asyncio, sys
from pathlib import Path
from phoenix_ml.infrastructure.features.sqlite import SqliteFeatures

path, number = Path(sys.argv[1]), int(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()

async def main():
    store = SqliteFeatures(path)
    for n in range(20):
        await store.write({"shared": {f"f{number}_{n}": n}}, 1_000)
        assert await store.read_all("shared") is not None
    await store.close()

asyncio.run(main())
"""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "features.db"


@pytest.fixture
async def store(path: Path) -> AsyncIterator[SqliteFeatures]:
    opened = SqliteFeatures(path)
    yield opened
    await opened.close()


async def test_processes_may_create_and_write_one_file_at_once(path: Path) -> None:
    """API workers start together, while a loader may already run."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", OPEN_AND_WRITE, str(path), str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(PROCESSES)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"

    # All are told to start before any is waited for.
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    errors = [process.communicate(timeout=60)[1] for process in processes]

    assert errors == [""] * PROCESSES
    store = SqliteFeatures(path)
    stored = await store.read_all("shared")
    await store.close()
    assert stored is not None
    assert stored.values == {f"f{number}_{n}": n for number in range(PROCESSES) for n in range(20)}


def test_a_file_may_be_created_by_many_at_the_same_moment(tmp_path: Path) -> None:
    """SQLite does not wait for locks while a file becomes a WAL database: without patience 1 start in 100 fails."""
    together = Barrier(PROCESSES)

    def create_files() -> None:
        for n in range(150):
            together.wait(30)
            store = SqliteFeatures(tmp_path / f"{n}.db")
            asyncio.run(store.close())

    with ThreadPoolExecutor(PROCESSES) as threads:
        for creation in [threads.submit(create_files) for _ in range(PROCESSES)]:
            creation.result()


async def test_reads_go_on_while_another_process_writes(store: SqliteFeatures, path: Path) -> None:
    """A bulk load must not cost a prediction its latency."""
    await store.write({"e": {"n": 1}}, 1_000)
    loader = sqlite3.connect(path, isolation_level=None)
    loader.execute("BEGIN EXCLUSIVE")
    loader.execute("DELETE FROM features")

    stored = await store.read("e", INTEGER)

    loader.execute("ROLLBACK")
    loader.close()
    assert stored is not None
    assert stored.values == {"n": 1}


async def test_a_failed_write_leaves_no_transaction_behind(store: SqliteFeatures, path: Path) -> None:
    """One row that cannot be read must not lock the store for everybody."""
    await store.write({"e": {"n": 1}}, 1_000)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("INSERT INTO features (entity_id, \"values\") VALUES ('bad', x'ff')")
    other.close()

    with pytest.raises(FeatureStoreUnavailable, match="sqlite"):
        await store.write({"e": {"n": 2}, "bad": {"n": 2}}, 2_000)
    await store.write({"e": {"n": 3}}, 3_000)

    stored = await store.read_all("e")
    assert stored is not None
    assert stored.values == {"n": 3}


async def test_a_row_that_cannot_be_decoded_is_an_error_of_ours(store: SqliteFeatures, path: Path) -> None:
    """Foreign exceptions stop at the adapter."""
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("INSERT INTO features (entity_id, \"values\") VALUES ('bad', x'c1')")
    other.close()

    with pytest.raises(FeatureStoreUnavailable, match="sqlite"):
        await store.read("bad", INTEGER)


@pytest.mark.parametrize("content", [b"no database at all, but long enough to have a header" * 40])
def test_a_file_that_is_no_database_is_named(path: Path, content: bytes) -> None:
    """The path in the message is what the operator has to look at."""
    path.parent.mkdir(parents=True)
    path.write_bytes(content)

    with pytest.raises(FeatureStoreUnavailable) as error:
        SqliteFeatures(path)

    assert str(path) in error.value.message
    assert error.value.details == {"store": "sqlite", "address": str(path)}


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    """A typing error in PHOENIX_DATA is the usual reason."""
    (tmp_path / "file").write_text("in the way")

    with pytest.raises(FeatureStoreUnavailable, match=r"file/features\.db"):
        SqliteFeatures(tmp_path / "file" / "features.db")


async def test_a_table_that_is_gone_is_an_error_of_ours(store: SqliteFeatures, path: Path) -> None:
    """Whatever someone does to the file, callers see one documented error."""
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("DROP TABLE features")
    other.close()

    for refused in (
        store.read("e", INTEGER),
        store.read_all("e"),
        store.write({"e": {"n": 1}}, 1),
        store.check(),
    ):
        with pytest.raises(FeatureStoreUnavailable, match="sqlite"):
            await refused


async def test_data_outlive_the_store_that_wrote_them(path: Path) -> None:
    """The embedded default keeps its features over a restart."""
    first = SqliteFeatures(path)
    await first.write({"e": {"n": 1}}, 1_000)
    await first.close()

    second = SqliteFeatures(path)
    stored = await second.read_all("e")
    await second.close()

    assert stored is not None
    assert (stored.values, stored.updated_at_ms) == ({"n": 1}, 1_000)


OF_ANOTHER_PROGRAM = {
    "update": "UPDATE features SET updated_at_ms = 2000 WHERE entity_id = 'e'",
    "rename": "UPDATE features SET entity_id = 'f' WHERE entity_id = 'e'",
    "replace": "INSERT OR REPLACE INTO features SELECT * FROM features WHERE entity_id = 'e'",
    "delete": "DELETE FROM features WHERE entity_id = 'e'",
}


@pytest.mark.parametrize("change", OF_ANOTHER_PROGRAM)
async def test_whoever_changes_an_entity_drops_its_packed_rows(
    store: SqliteFeatures, path: Path, change: str
) -> None:
    """An older version of this program knows nothing of them, and its writes must count."""
    signature = PackedSignature("digest", {"a": FeatureType.FLOAT})
    await store.write({"e": {"a": 1.0}}, 1_000, [signature])
    with closing(sqlite3.connect(path)) as other, other:
        before = other.execute("SELECT count(*) FROM packed").fetchone()
        other.execute(OF_ANOTHER_PROGRAM[change])
        after = other.execute("SELECT count(*) FROM packed").fetchone()

    assert (before, after) == ((1,), (0,))
    assert not isinstance(await store.read_packed("e", signature), PackedFeatures)


async def test_a_file_of_an_older_version_gets_packed_rows(path: Path) -> None:
    """Upgrading the program is enough."""
    path.parent.mkdir()
    with closing(sqlite3.connect(path)) as old, old:
        old.execute(
            'CREATE TABLE features (entity_id TEXT PRIMARY KEY, "values" BLOB NOT NULL, '
            "updated_at_ms INTEGER, at_ms BLOB) STRICT"
        )
    store = SqliteFeatures(path)
    signature = PackedSignature("digest", {"a": FeatureType.FLOAT})

    await store.write({"e": {"a": 1.0}}, 1_000, [signature])

    assert PackedFeatures(b"\0\0\x80?", 1_000) == await store.read_packed("e", signature)
    await store.close()


async def test_reads_of_one_tick_see_one_state_and_later_ones_the_newest(
    store: SqliteFeatures, path: Path
) -> None:
    """They share a transaction, which must not outlive the tick: a write that was confirmed is read."""
    await store.write({"e": {"n": 0}}, 1_000)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        found = []
        for n in range(1, 4):
            of_a_tick = [await store.read("e", INTEGER), await store.read("e", INTEGER)]
            other.execute("UPDATE features SET updated_at_ms = ?", (n,))
            of_a_tick.append(await store.read("e", INTEGER))
            found.append([stored.updated_at_ms for stored in of_a_tick if stored is not None])
            await asyncio.sleep(0)
        last = await store.read("e", INTEGER)

    assert found == [[1_000] * 3, [1] * 3, [2] * 3]
    assert last is not None
    assert last.updated_at_ms == 3
