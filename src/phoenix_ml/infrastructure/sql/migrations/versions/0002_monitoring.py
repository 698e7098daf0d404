"""Monitoring and healing: cursors and counts, reports, incidents, alerts, retrain jobs."""

import sqlalchemy as sa
from alembic import op

from phoenix_ml.infrastructure.sql.schema import JSON_DOCUMENT, UUID_TEXT, Instant

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("outcomes") as outcomes:
        outcomes.add_column(sa.Column("seq", sa.BigInteger))
    # Those that met their predictions before anybody watched are not looked at again.
    op.create_index("ix_outcomes_seq", "outcomes", ["seq", "id"])
    op.create_table(
        "monitors",
        sa.Column("model_id", sa.String(128), primary_key=True),
        sa.Column("seq", sa.BigInteger, nullable=False),
        sa.Column("outcome_seq", sa.BigInteger, nullable=False),
        sa.Column("outcome_id", UUID_TEXT),
        sa.Column("state", sa.LargeBinary, nullable=False),
        sa.Column("updated_at", Instant, nullable=False),
        sa.Column("check_requested_at", Instant),
    )
    op.create_table(
        "model_settings",
        sa.Column("model_id", sa.String(128), primary_key=True),
        sa.Column("settings", JSON_DOCUMENT, nullable=False),
        sa.Column("updated_at", Instant, nullable=False),
    )
    op.create_table(
        "drift_batches",
        sa.Column("model_id", sa.String(128), primary_key=True),
        sa.Column("model_version", sa.String(64), primary_key=True),
        sa.Column("number", sa.BigInteger, primary_key=True),
        sa.Column("rows", sa.Integer, nullable=False),
        sa.Column("first_seq", sa.BigInteger, nullable=False),
        sa.Column("last_seq", sa.BigInteger, nullable=False),
        sa.Column("started_at", Instant, nullable=False),
        sa.Column("ended_at", Instant, nullable=False),
        sa.Column("counts", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "drift_reports",
        sa.Column("id", UUID_TEXT, primary_key=True),
        sa.Column("model_id", sa.String(128), nullable=False),
        sa.Column("model_version", sa.String(64), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("created_at", Instant, nullable=False),
        sa.Column("rows", sa.Integer, nullable=False),
        sa.Column("report", JSON_DOCUMENT, nullable=False),
    )
    op.create_index(
        "ix_drift_reports_model", "drift_reports", ["model_id", "model_version", "kind", "created_at"]
    )
    op.create_table(
        "incidents",
        sa.Column("id", UUID_TEXT, primary_key=True),
        sa.Column("model_id", sa.String(128), nullable=False),
        sa.Column("model_version", sa.String(64), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("cause", sa.String(256), nullable=False),
        sa.Column("severity", sa.String(16), nullable=False),
        sa.Column("summary", sa.String, nullable=False),
        sa.Column("evidence", JSON_DOCUMENT, nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("opened_at", Instant, nullable=False),
        sa.Column("updated_at", Instant, nullable=False),
        sa.Column("acknowledged_at", Instant),
        sa.Column("acknowledged_by", sa.String(256)),
        sa.Column("resolved_at", Instant),
        sa.Column("resolution", sa.String),
        sa.Column("open_cause", sa.String(256)),
    )
    op.create_index("ix_incidents_model", "incidents", ["model_id", "opened_at"])
    op.create_index(
        "ix_incidents_open", "incidents", ["model_id", "model_version", "open_cause"], unique=True
    )
    op.create_table(
        "alerts",
        sa.Column("id", UUID_TEXT, primary_key=True),
        sa.Column("model_id", sa.String(128), nullable=False),
        sa.Column("model_version", sa.String(64), nullable=False),
        sa.Column("severity", sa.String(16), nullable=False),
        sa.Column("title", sa.String, nullable=False),
        sa.Column("text", sa.String, nullable=False),
        sa.Column("incidents", JSON_DOCUMENT, nullable=False),
        sa.Column("created_at", Instant, nullable=False),
    )
    op.create_index("ix_alerts_created_at", "alerts", ["created_at", "id"])
    op.create_table(
        "deliveries",
        sa.Column("id", UUID_TEXT, primary_key=True),
        sa.Column("channel", sa.String(128), primary_key=True),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("payload", JSON_DOCUMENT, nullable=False),
        sa.Column("created_at", Instant, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("not_before", Instant, nullable=False),
        sa.Column("delivered_at", Instant),
        sa.Column("error", sa.String),
    )
    op.create_index("ix_deliveries_waiting", "deliveries", ["delivered_at", "not_before"])
    op.create_table(
        "retrain_jobs",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("model_id", sa.String(128), nullable=False),
        sa.Column("model_version", sa.String(64), nullable=False),
        sa.Column("reason", sa.String, nullable=False),
        sa.Column("evidence", JSON_DOCUMENT, nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("requested_at", Instant, nullable=False),
        sa.Column("updated_at", Instant, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("not_before", Instant, nullable=False),
        sa.Column("owner", sa.String(128)),
        sa.Column("owned_until", Instant, nullable=False),
        sa.Column("new_version", sa.String(64)),
        sa.Column("error", sa.String),
        sa.Column("result", JSON_DOCUMENT),
        sa.Column("log_tail", sa.String, nullable=False),
    )
    op.create_index("ix_retrain_jobs_model", "retrain_jobs", ["model_id", "requested_at"])
    op.create_index("ix_retrain_jobs_status", "retrain_jobs", ["status", "not_before"])


def downgrade() -> None:
    for table in (
        "retrain_jobs",
        "deliveries",
        "alerts",
        "incidents",
        "drift_reports",
        "drift_batches",
        "model_settings",
        "monitors",
    ):
        op.drop_table(table)
    op.drop_index("ix_outcomes_seq", "outcomes")
    with op.batch_alter_table("outcomes") as outcomes:
        outcomes.drop_column("seq")
