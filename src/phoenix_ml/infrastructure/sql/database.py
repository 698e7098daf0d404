"""One database, SQLite or PostgreSQL: connections, transactions, migrations."""

import fcntl
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil, inf
from pathlib import Path
from typing import Any

import msgspec
from sqlalchemy import Connection, Row, create_engine, event, inspect, text, update
from sqlalchemy.engine import make_url
from sqlalchemy.exc import (
    ArgumentError,
    DataError,
    DBAPIError,
    IntegrityError,
    NoSuchModuleError,
    OperationalError,
    StatementError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from phoenix_ml.domain.errors import DatabaseUnavailable, InvalidField, Misconfigured
from phoenix_ml.extras import install
from phoenix_ml.infrastructure.sql.schema import HEAD_REVISION, counters
from phoenix_ml.infrastructure.sqlite import enter_wal_mode

log = logging.getLogger(__name__)
_MIGRATIONS = Path(__file__).parent / "migrations"
_PATIENCE_S = 15.0
# Longer than the server's own time-out, whose reason is the better one.
_SILENCE_S = 20.0
# What the URL says itself comes first: a pooler such as PgBouncer may not take `options`.
_POSTGRES_OPTIONS: dict[str, Any] = {
    "connect_timeout": 5,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
    "options": f"-c statement_timeout={_PATIENCE_S * 1000:.0f}",
}
# Any number, the same for all who migrate one PostgreSQL database.
_MIGRATION_LOCK = 0x50484F454E4958


class Database:
    """Short transactions on one database. Every method raises DatabaseUnavailable when it is down."""

    def __init__(self, url: str) -> None:
        try:
            parsed = make_url(url)
        except (ArgumentError, ValueError) as exc:  # without the URL, which may hold a password
            raise _no_url() from exc
        # A row of the prediction log has five JSON columns: `json` takes 3.4 µs each, msgspec 0.5.
        options: dict[str, Any] = {"json_serializer": _to_json, "json_deserializer": msgspec.json.decode}
        self.is_sqlite = parsed.drivername == "sqlite"
        if self.is_sqlite:
            try:
                Path(parsed.database or "").parent.mkdir(parents=True, exist_ok=True)
            except OSError as exc:
                raise Misconfigured(
                    f"PHOENIX_DATABASE: the folder of {parsed.database} cannot be made: {exc.strerror}"
                ) from exc
            options["connect_args"] = {"timeout": _PATIENCE_S}
        elif parsed.drivername == "postgresql":
            parsed = parsed.set(drivername="postgresql+psycopg")
            given = {name: value for name, value in _POSTGRES_OPTIONS.items() if name not in parsed.query}
            options |= {"pool_pre_ping": True, "connect_args": given}
        else:
            raise Misconfigured(
                f"PHOENIX_DATABASE: scheme {parsed.drivername!r} is not known; known are sqlite, postgresql"
            )
        # Without the query, where a password may stand as well.
        self.name = parsed.set(query={}).render_as_string(hide_password=True)
        self._path = Path(parsed.database or "") if self.is_sqlite else None
        self._silence_s = _SILENCE_S
        try:
            self.engine = create_engine(parsed, pool_timeout=10, **options)
        except ArgumentError as exc:  # sqlite://FILE, with two slashes
            raise _no_url() from exc
        except (ModuleNotFoundError, NoSuchModuleError) as exc:
            raise Misconfigured(f"PostgreSQL needs its driver: {install('postgres')}") from exc
        if self.is_sqlite:
            event.listen(self.engine, "connect", _configure_sqlite)
            event.listen(self.engine, "begin", _begin_sqlite)
        else:
            event.listen(self.engine, "do_connect", self._connect_postgres)

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that only reads."""
        with refusing_values(), self._guard(), self.engine.connect() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction, committed at the end of the block and rolled back by an exception."""
        # SQLite: a transaction that reads first and writes later fails when another wrote between.
        immediate = {"sqlite_begin": "BEGIN IMMEDIATE"}
        with (
            self._guard(),
            self.engine.connect().execution_options(**immediate) as connection,
            connection.begin(),
        ):
            yield connection

    def check(self) -> None:
        """Returns when the database answers and has the tables of this version of Phoenix."""
        with self.read() as connection:
            revision = _revision(connection)
        if revision != HEAD_REVISION:
            raise DatabaseUnavailable(
                f"{self.name} is at schema {revision or 'none'}, this version of Phoenix needs "
                f"{HEAD_REVISION}: run 'phoenix-ml db upgrade'",
                database=self.name,
            )

    def upgrade(self) -> str:
        """The schema revision, after all missing migrations have run; one process at a time runs them."""
        from alembic import command
        from alembic.config import Config
        from alembic.util.exc import CommandError

        config = Config()
        config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
        config.attributes["database"] = self
        silence_s = self._silence_s
        try:
            # A migration of many rows, or another process's that is waited for, takes the time that it takes.
            self._silence_s = inf
            with self._guard(), self._migration_lock():
                command.upgrade(config, "head")
        except CommandError as exc:
            raise DatabaseUnavailable(
                f"{self.name} cannot be brought to schema {HEAD_REVISION}; a newer version of Phoenix may have "
                f"made it: {exc}",
                database=self.name,
            ) from exc
        finally:
            self._silence_s = silence_s
        return HEAD_REVISION

    def upgrade_if_embedded(self) -> None:
        """Brings an SQLite database up to date; any other is only checked, its owner migrates it."""
        if self.is_sqlite:
            with self.read() as connection:
                current = _revision(connection)
            if current == HEAD_REVISION:
                return
            self.upgrade()
        self.check()

    def upgrade_if_new(self) -> None:
        """Makes the tables of an SQLite database that has none at all; any other is only checked."""
        if self.is_sqlite:
            with self.read() as connection:
                is_new = not inspect(connection).get_table_names()
            if is_new:
                self.upgrade()
        self.check()

    def hurry(self, patience_s: float) -> None:
        """From now on calls, those in progress too, fail when the database is silent for longer than this.

        For a process that stops: it must not wait for a database that hangs.
        """
        self._silence_s = min(self._silence_s, patience_s)

    def close(self) -> None:
        self.engine.dispose()

    def _connect_postgres(self, _dialect: Any, _record: Any, given: Any, named: dict[str, Any]) -> Any:
        from phoenix_ml.infrastructure.sql.postgres import ImpatientConnection

        if self._silence_s < _SILENCE_S:
            named = named | {"connect_timeout": ceil(self._silence_s)}
        connection = ImpatientConnection.connect(*given, **named)
        connection.patience_s = lambda: self._silence_s
        return connection

    @contextmanager
    def _migration_lock(self) -> Iterator[None]:
        if self._path is not None:
            try:
                file = Path(f"{self._path}.migrating").open("w")  # noqa: SIM115 - the with below closes it
            except OSError as exc:
                raise DatabaseUnavailable(
                    f"the database {self.name} cannot be migrated: {exc}", database=self.name
                ) from exc
            with file:
                fcntl.flock(file, fcntl.LOCK_EX)
                yield
        else:
            with self.engine.connect() as connection:
                lift_time_limit(connection)
                connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": _MIGRATION_LOCK})
                try:
                    yield  # closing the connection's session would release it, a pooled one is told to
                finally:
                    connection.execute(text("SELECT pg_advisory_unlock(:key)"), {"key": _MIGRATION_LOCK})

    @contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except (IntegrityError, DataError):
            raise
        except (OperationalError, DBAPIError, PoolTimeoutError) as exc:
            if isinstance(exc, DBAPIError) and _is_beyond_limits(exc):
                raise
            words = str(exc.orig if isinstance(exc, DBAPIError) else exc).strip()
            reason = words.partition("\n")[0] or type(exc).__name__
            raise DatabaseUnavailable(
                f"the database {self.name} does not answer: {reason}", database=self.name
            ) from exc


def _no_url() -> Misconfigured:
    return Misconfigured(
        "PHOENIX_DATABASE: this is no database URL; use sqlite:///FILE or postgresql://USER@HOST:PORT/NAME",
        setting="PHOENIX_DATABASE",
    )


def _is_beyond_limits(error: DBAPIError) -> bool:
    """Whether PostgreSQL refuses the values as beyond its limits, such as an index's: it would for ever."""
    state = getattr(error.orig, "sqlstate", None) or ""
    return state.startswith("54")


@contextmanager
def refusing_values() -> Iterator[None]:
    """Raises InvalidField for a value that the database can't hold, such as U+0000 in a PostgreSQL text."""
    try:
        yield
    except IntegrityError:
        raise
    except (StatementError, OverflowError, UnicodeEncodeError) as exc:
        reason = str(exc.orig if isinstance(exc, StatementError) else exc).strip()
        raise InvalidField(f"the database cannot hold a value that was given: {reason}") from exc


def next_value(connection: Connection, counter: str) -> int:
    """The counter's value after raising it by one; others wait until this transaction ends."""
    raised = (
        update(counters)
        .where(counters.c.name == counter)
        .values(value=counters.c.value + 1)
        .returning(counters.c.value)
    )
    return int(connection.execute(raised).scalar_one())


def lift_time_limit(connection: Connection) -> None:
    """Statements of this transaction may take as long as they do."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("SET LOCAL statement_timeout = 0"))


def _revision(connection: Connection) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()


def _to_json(value: Any) -> str:
    """The value as JSON; numbers that are not finite, which JSON cannot hold, become null."""
    return msgspec.json.encode(value).decode()


def _configure_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # transactions begin where _begin_sqlite says
    enter_wal_mode(connection, _PATIENCE_S)
    # A journal segment is deleted after the commit, so a commit must survive a power loss.
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA foreign_keys=ON")


def _begin_sqlite(connection: Connection) -> None:
    connection.exec_driver_sql(connection.get_execution_options().get("sqlite_begin", "BEGIN"))


def fields_of(row: Row[*tuple[Any, ...]]) -> dict[str, Any]:
    """The row's values by the names of its columns."""
    # SQLAlchemy names columns by a subclass of str, which msgspec does not take.
    return {str(name): value for name, value in zip(row._fields, row, strict=True)}
