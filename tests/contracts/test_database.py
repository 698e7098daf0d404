"""Limits on what a database may cost a process that waits for it, over a real PostgreSQL."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
from servers import PostgresServer, wait_until
from sqlalchemy import text

from phoenix_ml.domain.errors import DatabaseUnavailable
from phoenix_ml.infrastructure.sql.database import _MIGRATION_LOCK, Database
from phoenix_ml.infrastructure.sql.schema import HEAD_REVISION


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    """A server for this module alone: it is frozen."""
    with PostgresServer() as server:
        yield server


@pytest.fixture
def url(server: PostgresServer) -> str:
    """A database of its own, with tables."""
    server.start()
    url = server.create_database()
    with closing(Database(url)) as database:
        database.upgrade()
    return url


def statement_timeout(url: str) -> str:
    with closing(Database(url)) as database, database.read() as connection:
        return str(connection.execute(text("SHOW statement_timeout")).scalar_one())


def test_a_statement_is_bounded_unless_the_url_says_otherwise(url: str) -> None:
    """A lock that nobody releases must not keep a process; a pooler may need other options."""
    own = f"{url}?options=-c%20statement_timeout%3D7s"

    assert (statement_timeout(url), statement_timeout(own)) == ("15s", "7s")


def test_a_statement_that_takes_too_long_is_an_unavailable_database(url: str) -> None:
    """The server's own words reach whoever reads the log."""
    with closing(Database(f"{url}?options=-c%20statement_timeout%3D100ms")) as database:
        with pytest.raises(DatabaseUnavailable, match="statement timeout"), database.read() as connection:
            connection.execute(text("SELECT pg_sleep(10)"))


def test_a_migration_is_not_bounded(url: str) -> None:
    """A table of many rows takes its time, and so does another process's migration that is waited for."""
    waits = text(
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE wait_event = 'advisory' AND now() - query_start > interval '600 ms'"
    )
    with (
        closing(Database(url)) as other,
        closing(Database(f"{url}?options=-c%20statement_timeout%3D300ms")) as database,
        ThreadPoolExecutor(1) as pool,
    ):
        database.hurry(0.3)
        with other.engine.connect() as holder:
            holder.execute(text("SELECT pg_advisory_lock(:key)"), {"key": _MIGRATION_LOCK})
            upgraded = pool.submit(database.upgrade)
            try:
                wait_until(
                    lambda: waits_in(other, waits) == 1, 60, "the migration waits longer than the limits"
                )
            finally:
                holder.execute(text("SELECT pg_advisory_unlock(:key)"), {"key": _MIGRATION_LOCK})

        assert upgraded.result(60) == HEAD_REVISION


def waits_in(database: Database, query: object) -> int:
    with database.read() as connection:
        return int(connection.execute(query).scalar_one())  # type: ignore[call-overload]


def test_a_server_that_hangs_is_given_up_also_by_calls_in_progress(server: PostgresServer, url: str) -> None:
    """Its kernel still acknowledges what is sent to it: without a clock of ours a stop waits for ever."""
    with closing(Database(url)) as database, ThreadPoolExecutor(1) as pool:
        database.check()
        server.freeze()
        try:
            hanging = pool.submit(database.check)
            database.hurry(1.0)
            error = hanging.exception(30)
        finally:
            server.thaw()
        database.check()

    assert isinstance(error, DatabaseUnavailable)
    assert "does not answer" in error.message


def test_an_answer_that_comes_too_late_is_not_taken_for_the_next_ones(
    server: PostgresServer, url: str
) -> None:
    """The connection is given up with the statement."""
    with closing(Database(url)) as database:
        database.hurry(1.0)

        def ask_while_it_hangs() -> None:
            with database.read() as connection:
                server.freeze()
                try:
                    connection.execute(text("SELECT 'late'"))
                finally:
                    server.thaw()

        with pytest.raises(DatabaseUnavailable, match="no word from the server"):
            ask_while_it_hangs()
        with database.read() as connection:
            answer = connection.execute(text("SELECT 'next'")).scalar_one()

    assert answer == "next"
