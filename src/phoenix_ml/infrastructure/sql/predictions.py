"""The prediction log in SQL. See ``PredictionLog`` in the ports for the contract."""

import struct
from collections.abc import Sequence
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Row, Table, bindparam, case, exists, func, select, tuple_, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import StatementError

from phoenix_ml.application.ports import (
    EventRejected,
    LoggedPrediction,
    PredictionQuery,
    RecordedEvent,
    UnmatchedOutcome,
)
from phoenix_ml.domain.errors import InvalidField, PredictionUnknown
from phoenix_ml.domain.events import OutcomeReported, PredictionMade
from phoenix_ml.domain.features import describe_sources
from phoenix_ml.domain.rows import RowFormat
from phoenix_ml.infrastructure.sql.database import Database
from phoenix_ml.infrastructure.sql.schema import PREDICTION_SEQ, counters, outcomes, prediction_logs

# Where Python's dates end, and PostgreSQL's drivers with them.
_YEAR_10000_MS = 253_402_300_800_000
_NO_COLUMNS = RowFormat(())


class SqlPredictionLog:
    def __init__(self, database: Database) -> None:
        self._database = database
        dialect = sqlite if database.is_sqlite else postgresql
        self._add = _insert_new if database.is_sqlite else _copy_new
        # A restore of some of the tables leaves the counter behind the rows, or without its row.
        newest = select(func.coalesce(func.max(prediction_logs.c.seq), 0)).scalar_subquery()
        step = bindparam("step", type_=counters.c.value.type)
        reached = case((counters.c.value > newest, counters.c.value), else_=newest)
        self._raise_seq = (
            dialect.insert(counters)
            .values(name=PREDICTION_SEQ, value=newest + step)
            .on_conflict_do_update(index_elements=["name"], set_={"value": reached + step})
            .returning(counters.c.value)
        )

    def write(self, events: Sequence[RecordedEvent]) -> int:
        try:
            made = [self._prediction_row(e.event, e) for e in events if isinstance(e.event, PredictionMade)]
        except (struct.error, LookupError, ValueError) as exc:
            raise EventRejected(f"the event does not fit its own columns: {exc}") from exc
        reported = [_outcome_row(e.event) for e in events if isinstance(e.event, OutcomeReported)]
        try:
            with self._database.write() as connection:
                return self._store(connection, made, reported)
        except StatementError as exc:
            raise EventRejected(str(exc.orig).strip()) from exc
        except (OverflowError, ValueError, TypeError, RecursionError) as exc:
            # The last two: JSON has no such value, or not so deep.
            raise EventRejected(str(exc)) from exc

    def get(self, prediction_id: str) -> LoggedPrediction:
        try:
            wanted = str(UUID(prediction_id))
        except ValueError:
            raise InvalidField(f"{prediction_id[:60]!r} is not a prediction id", field="id") from None
        with self._database.read() as connection:
            row = connection.execute(
                select(prediction_logs).where(prediction_logs.c.id == wanted)
            ).one_or_none()
            if row is None:
                raise PredictionUnknown(
                    f"prediction {wanted} is not in the log (an answer takes a moment to get there)",
                    prediction_id=wanted,
                )
            return _logged([row], connection)[0]

    def page(self, query: PredictionQuery) -> tuple[list[LoggedPrediction], str | None]:
        table = prediction_logs.c
        statement = select(prediction_logs).order_by(table.created_at.desc(), table.id.desc())
        if query.model_id is not None:
            statement = statement.where(table.model_id == query.model_id)
        if query.model_version is not None:
            statement = statement.where(table.model_version == query.model_version)
        if query.entity_id is not None:
            statement = statement.where(table.entity_id == query.entity_id)
        if query.since_ms is not None:
            statement = statement.where(table.created_at >= query.since_ms)
        if query.until_ms is not None:
            statement = statement.where(table.created_at < query.until_ms)
        if query.cursor is not None:
            at_ms, last_id = parse_cursor(query.cursor)
            position = tuple_(table.created_at, table.id)
            statement = statement.where(
                position < tuple_(at_ms, last_id, types=[table.created_at.type, table.id.type])
            )
        with self._database.read() as connection:
            rows = connection.execute(statement.limit(query.limit + 1)).all()
            items = _logged(rows[: query.limit], connection)
        more = len(rows) > query.limit
        return items, f"{items[-1].created_at_ms}.{items[-1].id}" if more else None

    def unmatched_outcomes(self, limit: int, cursor: str | None = None) -> tuple[int, list[UnmatchedOutcome]]:
        table = outcomes.c
        waiting = table.is_matched.is_(False)
        newest = select(outcomes).where(waiting).order_by(table.received_at.desc(), table.id.desc())
        if cursor is not None:
            position = tuple_(*parse_cursor(cursor), types=[table.received_at.type, table.id.type])
            newest = newest.where(tuple_(table.received_at, table.id) < position)
        with self._database.read() as connection:
            count = connection.execute(select(func.count()).select_from(outcomes).where(waiting)).scalar_one()
            items = [
                UnmatchedOutcome(r.id, r.prediction_id, r.outcome, r.observed_at, r.received_at)
                for r in connection.execute(newest.limit(limit))
            ]
        return count, items

    def _store(
        self, connection: Connection, made: list[dict[str, Any]], reported: list[dict[str, Any]]
    ) -> int:
        new_rows = 0
        # Raising the counter locks it: batches of several log workers commit in the order of seq, and an
        # outcome and its prediction never pass each other unseen.
        # Outcomes that meet their predictions in this commit share its last number.
        step = len(made) + bool(reported)
        last = connection.execute(self._raise_seq, {"step": step}).scalar_one()
        if made:
            for seq, row in enumerate(made, last - step + 1):
                row["seq"] = seq
            new_rows += self._add(connection, prediction_logs, made)
        if reported:
            new_rows += self._add(connection, outcomes, reported)
        self._match(connection, made, reported, last)
        return new_rows

    def _match(
        self, connection: Connection, made: list[dict[str, Any]], reported: list[dict[str, Any]], seq: int
    ) -> None:
        """Marks the outcomes whose predictions are in the log, whichever came first."""
        unmatched = outcomes.c.is_matched.is_(False)
        ids = [row["prediction_id"] for row in reported]
        if made and connection.execute(select(exists().where(unmatched))).scalar():
            ids += [row["id"] for row in made]
        for start in range(0, len(ids), 500):  # SQLite bounds the number of parameters
            connection.execute(
                update(outcomes)
                .where(unmatched, outcomes.c.prediction_id.in_(ids[start : start + 500]))
                .where(exists().where(prediction_logs.c.id == outcomes.c.prediction_id))
                .values(is_matched=True, seq=seq)
            )

    def _prediction_row(self, event: PredictionMade, recorded: RecordedEvent) -> dict[str, Any]:
        row_format = recorded.row_format or _NO_COLUMNS
        values = row_format.unpack(event.inputs)
        return {
            "id": event.id,
            "model_id": event.model_id,
            "model_version": event.model_version,
            "features": dict(zip(row_format.names, values, strict=True)),
            "result": event.result,
            "confidence": event.confidence,
            "probabilities": event.probabilities,
            "latency_ms": event.latency_ms,
            "created_at": event.created_at_ms,
            "entity_id": event.entity_id,
            "request_id": event.request_id,
            "route": {
                "strategy": event.strategy,
                "role": event.role,
                "probability": event.probability,
                "routing_key": event.routing_key,
                "shadow_of": event.shadow_of,
                "device": event.device,
            },
            "feature_sources": describe_sources(event.sources, row_format.names),
            "sha256": event.sha256,
            "batch_size": event.batch_size,
            "batch_position": event.batch_position,
            "inputs": event.inputs,
            "shadow_of": event.shadow_of,
        }


def _insert_new(connection: Connection, table: Table, rows: list[dict[str, Any]]) -> int:
    """How many of the rows were new; those whose id is there already are left as they are."""
    statement = sqlite.insert(table).on_conflict_do_nothing(index_elements=["id"])
    return connection.execute(statement, rows).rowcount


def _copy_new(connection: Connection, table: Table, rows: list[dict[str, Any]]) -> int:
    from phoenix_ml.infrastructure.sql.copying import copy_new  # needs PostgreSQL's driver, an extra

    return copy_new(connection, table, rows)


def _outcome_row(event: OutcomeReported) -> dict[str, Any]:
    return {
        "id": event.id,
        "prediction_id": event.prediction_id,
        "outcome": event.outcome,
        "observed_at": event.observed_at_ms,
        "received_at": event.received_at_ms,
        "is_matched": False,
    }


def _logged(rows: Sequence[Row[Any]], connection: Connection) -> list[LoggedPrediction]:
    latest: dict[str, Row[Any]] = {}
    if rows:
        known = (
            select(outcomes)
            .where(outcomes.c.prediction_id.in_([row.id for row in rows]))
            .order_by(outcomes.c.observed_at, outcomes.c.id)
        )
        latest = {outcome.prediction_id: outcome for outcome in connection.execute(known)}
    logged = []
    for row in rows:
        fields = dict(row._mapping)
        fields["created_at_ms"] = fields.pop("created_at")
        del fields["shadow_of"]
        outcome = latest.get(row.id)
        if outcome is not None:
            fields |= {"outcome": outcome.outcome, "outcome_at_ms": outcome.observed_at}
        logged.append(LoggedPrediction(**fields))
    return logged


def parse_cursor(cursor: str) -> tuple[int, str]:
    """Time and id of the row that a page ended with. Raises InvalidField."""
    at_ms, _, last_id = cursor.partition(".")
    try:
        position = int(at_ms), str(UUID(last_id))
        if not 0 <= position[0] < _YEAR_10000_MS:
            raise ValueError(at_ms)
    except ValueError:
        raise InvalidField(
            "the cursor is not one that a page has answered: start without one", field="cursor"
        ) from None
    return position
