"""Migrations of SQLite and of a real PostgreSQL: the tables that the code expects, whoever migrates when."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import inspect

from phoenix_ml.domain.errors import DatabaseUnavailable
from phoenix_ml.infrastructure.sql import database as database_module
from phoenix_ml.infrastructure.sql.database import Database
from phoenix_ml.infrastructure.sql.registry import SqlRegistry
from phoenix_ml.infrastructure.sql.schema import HEAD_REVISION, metadata

UPGRADE = """
import sys
from phoenix_ml.infrastructure.sql.database import Database
database = Database(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
getattr(database, sys.argv[2])()
database.check()
database.close()
"""


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Each kind of database, new and empty."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'phoenix.db'}"
    return str(request.getfixturevalue("postgres_url"))


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    with closing(Database(url)) as database:
        yield database


def migrations(database: Database | None = None) -> Config:
    """Alembic's view of our migrations."""
    config = Config()
    config.set_main_option("script_location", str(Path(database_module.__file__).parent / "migrations"))
    config.attributes["database"] = database
    return config


def table_names(database: Database) -> set[str]:
    with database.read() as connection:
        return set(inspect(connection).get_table_names())


def test_the_migrated_schema_is_the_one_in_the_code(database: Database) -> None:
    """The schema is written twice, as tables and as migrations; a difference is found here, not in service."""
    assert database.upgrade() == HEAD_REVISION
    options = {"compare_type": True, "compare_server_default": True}
    with database.read() as connection:
        assert compare_metadata(MigrationContext.configure(connection, opts=options), metadata) == []
    assert table_names(database) == {*metadata.tables, "alembic_version"}


def test_the_database_has_the_keys_that_the_code_relies_on(database: Database) -> None:
    """Autogenerate compares neither primary keys nor, in SQLite, the names of foreign keys."""
    database.upgrade()
    with database.read() as connection:
        inspector = inspect(connection)
        primary = {name: inspector.get_pk_constraint(name)["constrained_columns"] for name in metadata.tables}
        (foreign,) = inspector.get_foreign_keys("prediction_logs")
    assert primary == {
        name: [column.name for column in table.primary_key.columns] for name, table in metadata.tables.items()
    }
    assert foreign["referred_table"] == "models"
    assert foreign["constrained_columns"] == ["model_id", "model_version"]
    assert foreign["referred_columns"] == ["id", "version"]


def test_times_are_times_in_postgresql(postgres_url: str) -> None:
    """Other tools read the tables too: there a time is a timestamptz and a document jsonb."""
    with closing(Database(postgres_url)) as database:
        database.upgrade()
        with database.read() as connection:
            columns = connection.exec_driver_sql(
                "SELECT column_name, data_type FROM information_schema.columns"
                " WHERE table_name = 'prediction_logs'"
            )
            types = {name: data_type for name, data_type in columns}  # noqa: C416 - rows are not pairs
    assert types["created_at"] == "timestamp with time zone"
    assert types["features"] == types["result"] == "jsonb"
    assert types["id"] == "uuid"
    assert types["inputs"] == "bytea"


def test_the_revision_in_the_code_is_the_newest_migration() -> None:
    """The code names it so that no process imports Alembic only to check it."""
    scripts = ScriptDirectory.from_config(migrations())
    assert scripts.get_heads() == [HEAD_REVISION]


def test_upgrading_again_changes_nothing(database: Database) -> None:
    """Every start of the embedded default upgrades."""
    database.upgrade()
    registry = SqlRegistry(database)
    registry.clear_routing("risk", "ann")
    before = table_names(database), registry.revision(), registry.audit()
    assert database.upgrade() == HEAD_REVISION
    database.upgrade_if_embedded()
    database.check()
    assert (table_names(database), registry.revision(), registry.audit()) == before


def test_a_downgrade_to_base_removes_every_table(database: Database) -> None:
    """A migration that cannot be undone blocks a roll-back; afterwards an upgrade starts anew."""
    database.upgrade()
    command.downgrade(migrations(database), "base")
    assert table_names(database) == {"alembic_version"}
    database.upgrade()
    database.check()


def run_at_once(url: str, *methods: str) -> list[tuple[int, str]]:
    """Status and standard error of processes that each call a method, all at the same moment."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", UPGRADE, url, method],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for method in methods
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    return [(process.returncode, errors) for process in processes for _, errors in [process.communicate()]]


def test_four_processes_upgrade_one_sqlite_file_at_once(tmp_path: Path) -> None:
    """Several commands started on a fresh folder all find a database that is ready."""
    url = f"sqlite:///{tmp_path / 'new' / 'phoenix.db'}"
    ended = run_at_once(url, "upgrade", "upgrade_if_embedded", "upgrade_if_new", "upgrade_if_new")
    assert ended == [(0, "")] * 4
    with closing(Database(url)) as database:
        database.check()


def test_two_processes_upgrade_one_postgresql_database_at_once(postgres_url: str) -> None:
    """Several replicas may run the same job."""
    assert run_at_once(postgres_url, "upgrade", "upgrade") == [(0, "")] * 2


def test_an_unmigrated_postgresql_tells_which_command_to_run(postgres_url: str) -> None:
    """Its owner migrates it; a server that starts before that says what is missing."""
    with closing(Database(postgres_url)) as database:
        checks: list[Callable[[], None]] = [database.check, database.upgrade_if_embedded]
        for check in checks:
            with pytest.raises(DatabaseUnavailable, match=r"schema none.*run 'phoenix-ml db upgrade'"):
                check()
        assert table_names(database) == set()


def test_a_database_of_another_version_is_not_used(database: Database) -> None:
    """Neither an older nor a newer schema fits this code."""
    database.upgrade()
    with database.write() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(DatabaseUnavailable, match=f"schema 9999, .* needs {HEAD_REVISION}"):
        database.check()


def test_a_newer_sqlite_database_is_refused_by_an_error_of_ours(tmp_path: Path) -> None:
    """An older Phoenix started on a newer folder must not touch it, nor end in Alembic's exception."""
    with closing(Database(f"sqlite:///{tmp_path / 'phoenix.db'}")) as database:
        database.upgrade()
        with database.write() as connection:
            connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
        for upgrade in (database.upgrade_if_embedded, database.upgrade):
            with pytest.raises(DatabaseUnavailable, match="9999"):
                upgrade()
        assert table_names(database) >= set(metadata.tables)


def test_a_failed_upgrade_leaves_no_lock_and_no_half_schema(url: str, database: Database) -> None:
    """The next process to try must neither wait for ever nor find some of the tables."""
    with database.write() as connection:
        connection.exec_driver_sql("CREATE TABLE prediction_logs (x INTEGER)")
    with pytest.raises(DatabaseUnavailable, match="prediction_logs"):
        database.upgrade()
    assert table_names(database) == {"prediction_logs"}
    with database.write() as connection:
        connection.exec_driver_sql("DROP TABLE prediction_logs")
    with closing(Database(url)) as other:
        other.upgrade()
        other.check()


def test_a_lock_file_that_cannot_be_opened_is_unavailable(tmp_path: Path) -> None:
    """Such as in a folder that may only be read."""
    (tmp_path / "phoenix.db.migrating").mkdir()
    with closing(Database(f"sqlite:///{tmp_path / 'phoenix.db'}")) as database:
        with pytest.raises(DatabaseUnavailable, match="migrating"):
            database.upgrade()


def test_a_folder_with_a_percent_sign_is_upgraded(tmp_path: Path) -> None:
    """Alembic's settings take a percent sign for the start of a reference."""
    path = tmp_path / "100% mine" / "phoenix.db"
    with closing(Database(f"sqlite:///{path}")) as database:
        database.upgrade()
        database.check()
    assert path.exists()
