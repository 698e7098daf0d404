"""The spine: models, routing, the prediction log, outcomes, the audit log."""

import sqlalchemy as sa
from alembic import op

from phoenix_ml.infrastructure.sql.schema import JSON_DOCUMENT, UUID_TEXT, Instant

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "models",
        sa.Column("id", sa.String(128), primary_key=True),
        sa.Column("version", sa.String(64), primary_key=True),
        sa.Column("uri", sa.String(512), nullable=False),
        sa.Column("framework", sa.String(16), nullable=False),
        sa.Column("stage", sa.String(16), nullable=False),
        sa.Column("metadata", JSON_DOCUMENT, nullable=False),
        sa.Column("created_at", Instant, nullable=False),
        sa.Column("is_active", sa.Boolean, nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
    )
    op.create_table(
        "routing",
        sa.Column("model_id", sa.String(128), primary_key=True),
        sa.Column("routing", JSON_DOCUMENT, nullable=False),
        sa.Column("updated_at", Instant, nullable=False),
    )
    op.create_table(
        "prediction_logs",
        sa.Column("id", UUID_TEXT, primary_key=True),
        sa.Column("seq", sa.BigInteger, nullable=False),
        sa.Column("model_id", sa.String(128), nullable=False),
        sa.Column("model_version", sa.String(64), nullable=False),
        sa.Column("features", JSON_DOCUMENT, nullable=False),
        sa.Column("result", JSON_DOCUMENT, nullable=False),
        sa.Column("confidence", sa.Float(53)),
        sa.Column("probabilities", JSON_DOCUMENT),
        sa.Column("latency_ms", sa.Float(53), nullable=False),
        sa.Column("created_at", Instant, nullable=False),
        sa.Column("entity_id", sa.String),
        sa.Column("request_id", sa.String, nullable=False),
        sa.Column("route", JSON_DOCUMENT, nullable=False),
        sa.Column("feature_sources", JSON_DOCUMENT, nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("batch_size", sa.Integer, nullable=False),
        sa.Column("batch_position", sa.Integer, nullable=False),
        sa.Column("inputs", sa.LargeBinary, nullable=False),
        sa.ForeignKeyConstraint(
            ["model_id", "model_version"], ["models.id", "models.version"], "fk_prediction_logs_models"
        ),
    )
    op.create_index("ix_prediction_logs_seq", "prediction_logs", ["seq"], unique=True)
    op.create_index("ix_prediction_logs_created_at", "prediction_logs", ["created_at", "id"])
    op.create_index(
        "ix_prediction_logs_model", "prediction_logs", ["model_id", "model_version", "created_at"]
    )
    op.create_index("ix_prediction_logs_entity", "prediction_logs", ["entity_id", "created_at"])
    op.create_table(
        "outcomes",
        sa.Column("id", UUID_TEXT, primary_key=True),
        sa.Column("prediction_id", UUID_TEXT, nullable=False),
        sa.Column("outcome", JSON_DOCUMENT, nullable=False),
        sa.Column("observed_at", Instant, nullable=False),
        sa.Column("received_at", Instant, nullable=False),
        sa.Column("is_matched", sa.Boolean, nullable=False, server_default=sa.false()),
    )
    op.create_index("ix_outcomes_prediction_id", "outcomes", ["prediction_id"])
    op.create_index("ix_outcomes_unmatched", "outcomes", ["is_matched", "received_at"])
    op.create_table(
        "audit_log",
        sa.Column(
            "id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True
        ),
        sa.Column("at", Instant, nullable=False),
        sa.Column("actor", sa.String(256), nullable=False),
        sa.Column("action", sa.String(64), nullable=False),
        sa.Column("subject", sa.String(256), nullable=False),
        sa.Column("details", JSON_DOCUMENT, nullable=False),
    )
    counters = op.create_table(
        "counters",
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("value", sa.BigInteger, nullable=False),
    )
    op.bulk_insert(
        counters, [{"name": "registry_revision", "value": 0}, {"name": "prediction_seq", "value": 0}]
    )


def downgrade() -> None:
    for table in ("counters", "audit_log", "outcomes", "prediction_logs", "routing", "models"):
        op.drop_table(table)
