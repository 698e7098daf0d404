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
        # SQLite cannot alter a table in place; batch mode copies it.
        render_as_batch=True,
    )
    context.run_migrations()
