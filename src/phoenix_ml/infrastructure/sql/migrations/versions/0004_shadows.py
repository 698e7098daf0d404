"""A shadow's row is found by the prediction that it shadowed, whose outcome is its own."""

import sqlalchemy as sa
from alembic import op

from phoenix_ml.infrastructure.sql.schema import UUID_TEXT

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Without a batch, which would make SQLite's table anew under its views; rows of before stay without.
    op.add_column("prediction_logs", sa.Column("shadow_of", UUID_TEXT))
    is_shadow = sa.text("shadow_of IS NOT NULL")
    op.create_index(
        "ix_prediction_logs_shadow_of",
        "prediction_logs",
        ["shadow_of"],
        postgresql_where=is_shadow,
        sqlite_where=is_shadow,
    )


def downgrade() -> None:
    op.drop_index("ix_prediction_logs_shadow_of", "prediction_logs")
    op.drop_column("prediction_logs", "shadow_of")
