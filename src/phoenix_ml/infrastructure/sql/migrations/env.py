"""Alembic's entry: runs migrations on the database that ``Database.upgrade`` hands over."""

from alembic import context

from phoenix_ml.infrastructure.sql.database import Database, lift_time_limit
from phoenix_ml.infrastructure.sql.schema import metadata

database: Database = context.config.attributes["database"]

with database.write() as connection:
    lift_time_limit(connection)
    context.configure(
        connection=connection,
        target_metadata=metadata,
        # Only for migrations that Alembic writes: their changes of tables stand in batches, which copy what SQLite
        # cannot alter in place. One written by hand says itself where it needs one.
        render_as_batch=True,
    )
    context.run_migrations()
