"""The tables, as SQLite and PostgreSQL both hold them."""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Dialect,
    Float,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Uuid,
    false,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.types import TypeDecorator, TypeEngine

# A test holds this against the newest migration; Alembic itself is imported only to migrate.
HEAD_REVISION = "0004"


class Instant(TypeDecorator[int]):
    """Milliseconds since the epoch in Python; ``timestamptz`` in PostgreSQL, an integer in SQLite."""

    impl = BigInteger
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        postgres = dialect.name == "postgresql"
        return dialect.type_descriptor(DateTime(timezone=True) if postgres else BigInteger())

    def process_bind_param(self, value: int | None, dialect: Dialect) -> Any:
        if value is None or dialect.name != "postgresql":
            return value
        return datetime.fromtimestamp(value / 1000, UTC)

    def process_result_value(self, value: Any, dialect: Dialect) -> int | None:
        if isinstance(value, datetime):
            return round(value.timestamp() * 1000)
        return None if value is None else int(value)


JSON_DOCUMENT = JSON().with_variant(JSONB(), "postgresql")
OPTIONAL_JSON_DOCUMENT = JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")
UUID_TEXT = Uuid(as_uuid=False)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)

models = Table(
    "models",
    metadata,
    Column("id", String(128), primary_key=True),
    Column("version", String(64), primary_key=True),
    Column("uri", String(512), nullable=False),
    Column("framework", String(16), nullable=False),
    Column("stage", String(16), nullable=False),
    Column("metadata", JSON_DOCUMENT, nullable=False),
    Column("created_at", Instant, nullable=False),
    Column("is_active", Boolean, nullable=False),
    Column("sha256", String(64), nullable=False),
)

routing = Table(
    "routing",
    metadata,
    Column("model_id", String(128), primary_key=True),
    Column("routing", JSON_DOCUMENT, nullable=False),
    Column("updated_at", Instant, nullable=False),
)

prediction_logs = Table(
    "prediction_logs",
    metadata,
    Column("id", UUID_TEXT, primary_key=True),
    # The order of commits: a reader that remembers the last one never misses a late row.
    Column("seq", BigInteger, nullable=False),
    Column("model_id", String(128), nullable=False),
    Column("model_version", String(64), nullable=False),
    Column("features", JSON_DOCUMENT, nullable=False),
    Column("result", JSON_DOCUMENT, nullable=False),
    Column("confidence", Float(53)),
    Column("probabilities", OPTIONAL_JSON_DOCUMENT),
    Column("latency_ms", Float(53), nullable=False),
    Column("created_at", Instant, nullable=False),
    Column("entity_id", String),
    Column("request_id", String, nullable=False),
    Column("route", JSON_DOCUMENT, nullable=False),
    Column("feature_sources", JSON_DOCUMENT, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("batch_size", Integer, nullable=False),
    Column("batch_position", Integer, nullable=False),
    Column("inputs", LargeBinary, nullable=False),
    # In ``route`` as well; here it can be looked for.
    Column("shadow_of", UUID_TEXT),
    ForeignKeyConstraint(["model_id", "model_version"], ["models.id", "models.version"]),
    Index("ix_prediction_logs_seq", "seq", unique=True),
    Index("ix_prediction_logs_created_at", "created_at", "id"),
    Index("ix_prediction_logs_model", "model_id", "model_version", "created_at"),
    Index("ix_prediction_logs_entity", "entity_id", "created_at"),
    # Few rows are shadows: the others cost nothing.
    Index(
        "ix_prediction_logs_shadow_of",
        "shadow_of",
        postgresql_where=text("shadow_of IS NOT NULL"),
        sqlite_where=text("shadow_of IS NOT NULL"),
    ),
)

outcomes = Table(
    "outcomes",
    metadata,
    Column("id", UUID_TEXT, primary_key=True),
    Column("prediction_id", UUID_TEXT, nullable=False, index=True),
    Column("outcome", JSON_DOCUMENT, nullable=False),
    Column("observed_at", Instant, nullable=False),
    Column("received_at", Instant, nullable=False),
    # Kept by the log role, so that the few outcomes of unknown predictions are found without a scan.
    Column("is_matched", Boolean, nullable=False, server_default=false()),
    # When it met its prediction, in the order of commits; outcomes of one commit share a number.
    Column("seq", BigInteger),
    Index("ix_outcomes_unmatched", "is_matched", "received_at"),
    Index("ix_outcomes_seq", "seq", "id"),
)

audit_log = Table(
    "audit_log",
    metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("at", Instant, nullable=False),
    Column("actor", String(256), nullable=False),
    Column("action", String(64), nullable=False),
    Column("subject", String(256), nullable=False),
    Column("details", JSON_DOCUMENT, nullable=False),
)

# How the monitor sees a model: one row a model, written in the transaction that moves its cursors, so that a
# restart neither counts twice nor forgets.
monitors = Table(
    "monitors",
    metadata,
    Column("model_id", String(128), primary_key=True),
    Column("seq", BigInteger, nullable=False),
    Column("outcome_seq", BigInteger, nullable=False),
    Column("outcome_id", UUID_TEXT),
    Column("state", LargeBinary, nullable=False),
    Column("updated_at", Instant, nullable=False),
    # When somebody asked for a report at once; null when nobody waits for one.
    Column("check_requested_at", Instant),
)

# What a person has set of a model's monitoring and healing; ``*`` is every model.
model_settings = Table(
    "model_settings",
    metadata,
    Column("model_id", String(128), primary_key=True),
    Column("settings", JSON_DOCUMENT, nullable=False),
    Column("updated_at", Instant, nullable=False),
)

# Counts of predictions over the cells of the baseline, a batch of predictions each.
drift_batches = Table(
    "drift_batches",
    metadata,
    Column("model_id", String(128), primary_key=True),
    Column("model_version", String(64), primary_key=True),
    Column("number", BigInteger, primary_key=True),
    Column("rows", Integer, nullable=False),
    Column("first_seq", BigInteger, nullable=False),
    Column("last_seq", BigInteger, nullable=False),
    Column("started_at", Instant, nullable=False),
    Column("ended_at", Instant, nullable=False),
    Column("counts", LargeBinary, nullable=False),
)

# Checks of drift, and windows of quality, as a person reads them.
drift_reports = Table(
    "drift_reports",
    metadata,
    Column("id", UUID_TEXT, primary_key=True),
    Column("model_id", String(128), nullable=False),
    Column("model_version", String(64), nullable=False),
    Column("kind", String(16), nullable=False),
    Column("created_at", Instant, nullable=False),
    Column("rows", Integer, nullable=False),
    Column("report", JSON_DOCUMENT, nullable=False),
    Index("ix_drift_reports_model", "model_id", "model_version", "kind", "created_at"),
)

incidents = Table(
    "incidents",
    metadata,
    Column("id", UUID_TEXT, primary_key=True),
    Column("model_id", String(128), nullable=False),
    Column("model_version", String(64), nullable=False),
    Column("kind", String(16), nullable=False),
    Column("cause", String(256), nullable=False),
    Column("severity", String(16), nullable=False),
    Column("summary", String, nullable=False),
    Column("evidence", JSON_DOCUMENT, nullable=False),
    Column("status", String(16), nullable=False),
    Column("opened_at", Instant, nullable=False),
    Column("updated_at", Instant, nullable=False),
    Column("acknowledged_at", Instant),
    Column("acknowledged_by", String(256)),
    Column("resolved_at", Instant),
    Column("resolution", String),
    # The cause while it is not resolved, null afterwards: nulls may repeat, open causes may not.
    Column("open_cause", String(256)),
    Index("ix_incidents_model", "model_id", "opened_at"),
    Index("ix_incidents_open", "model_id", "model_version", "open_cause", unique=True),
)

alerts = Table(
    "alerts",
    metadata,
    Column("id", UUID_TEXT, primary_key=True),
    Column("model_id", String(128), nullable=False),
    Column("model_version", String(64), nullable=False),
    Column("severity", String(16), nullable=False),
    Column("title", String, nullable=False),
    Column("text", String, nullable=False),
    Column("incidents", JSON_DOCUMENT, nullable=False),
    Column("created_at", Instant, nullable=False),
    Index("ix_alerts_created_at", "created_at", "id"),
)

# What still has to be told, and to whom: written with the alert or the job, removed from the queue when delivered.
deliveries = Table(
    "deliveries",
    metadata,
    Column("id", UUID_TEXT, primary_key=True),
    Column("channel", String(128), primary_key=True),
    Column("kind", String(16), nullable=False),
    Column("payload", JSON_DOCUMENT, nullable=False),
    Column("created_at", Instant, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("not_before", Instant, nullable=False),
    Column("delivered_at", Instant),
    Column("error", String),
    Index("ix_deliveries_waiting", "delivered_at", "not_before"),
)

retrain_jobs = Table(
    "retrain_jobs",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("model_id", String(128), nullable=False),
    Column("model_version", String(64), nullable=False),
    Column("reason", String, nullable=False),
    Column("evidence", JSON_DOCUMENT, nullable=False),
    Column("status", String(16), nullable=False),
    Column("requested_at", Instant, nullable=False),
    Column("updated_at", Instant, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("not_before", Instant, nullable=False),
    Column("owner", String(128)),
    Column("owned_until", Instant, nullable=False),
    Column("new_version", String(64)),
    Column("error", String),
    Column("result", OPTIONAL_JSON_DOCUMENT),
    Column("log_tail", String, nullable=False),
    Index("ix_retrain_jobs_model", "model_id", "requested_at"),
    Index("ix_retrain_jobs_status", "status", "not_before"),
)

# Raising a counter locks its row until the transaction ends, so numbers follow the order of commits.
counters = Table(
    "counters",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("value", BigInteger, nullable=False),
)
REGISTRY_REVISION = "registry_revision"
PREDICTION_SEQ = "prediction_seq"
