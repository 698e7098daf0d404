"""Databases between tests."""

from phoenix_ml.infrastructure.sql import schema
from phoenix_ml.infrastructure.sql.database import Database


def empty(database: Database) -> None:
    """Removes all rows, so that a test finds the database as a migration leaves it."""
    with database.write() as connection:
        for table in reversed(schema.metadata.sorted_tables):
            if table is not schema.counters:
                connection.execute(table.delete())
        connection.execute(schema.counters.update().values(value=0))
