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
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.types import TypeDecorator, TypeEngine

# A test holds this against the newest migration; Alembic itself is imported only to migrate.
HEAD_REVISION = "0001"


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
    ForeignKeyConstraint(["model_id", "model_version"], ["models.id", "models.version"]),
    Index("ix_prediction_logs_seq", "seq", unique=True),
    Index("ix_prediction_logs_created_at", "created_at", "id"),
    Index("ix_prediction_logs_model", "model_id", "model_version", "created_at"),
    Index("ix_prediction_logs_entity", "entity_id", "created_at"),
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
    Index("ix_outcomes_unmatched", "is_matched", "received_at"),
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

# Raising a counter locks its row until the transaction ends, so numbers follow the order of commits.
counters = Table(
    "counters",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("value", BigInteger, nullable=False),
)
REGISTRY_REVISION = "registry_revision"
PREDICTION_SEQ = "prediction_seq"
