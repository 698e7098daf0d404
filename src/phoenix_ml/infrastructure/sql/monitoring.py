"""What monitors read and conclude, in SQL. See ``Monitoring`` in the ports for the contract."""

import time
from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID

import msgspec
from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    Select,
    and_,
    delete,
    exists,
    func,
    insert,
    select,
    tuple_,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.sql.base import ReadOnlyColumnCollection

from phoenix_ml.application.ports import (
    CountedBatch,
    EndedJob,
    IncidentQuery,
    LogPosition,
    MonitorReport,
    MonitorStep,
    Standing,
    WatchedOutcome,
    WatchedPrediction,
)
from phoenix_ml.domain.baselines import RESULT, SCORE
from phoenix_ml.domain.errors import IncidentResolved, IncidentUnknown, InvalidField, ModelUnknown
from phoenix_ml.domain.healing import ENDED
from phoenix_ml.domain.incidents import Alert, Incident, IncidentStatus
from phoenix_ml.domain.monitoring import ALL_MODELS, MonitorSettings, read_settings
from phoenix_ml.infrastructure.sql.database import Database, fields_of, lift_time_limit, refusing_values
from phoenix_ml.infrastructure.sql.deliveries import add_deliveries
from phoenix_ml.infrastructure.sql.healing import store_job
from phoenix_ml.infrastructure.sql.predictions import parse_cursor
from phoenix_ml.infrastructure.sql.schema import (
    PREDICTION_SEQ,
    alerts,
    audit_log,
    counters,
    drift_batches,
    drift_reports,
    incidents,
    model_settings,
    models,
    monitors,
    outcomes,
    prediction_logs,
    retrain_jobs,
)

# The largest window of the drift alarm.
KEPT_BATCHES = 64
KEPT_REPORTS = 200
# Whoever watches again after a longer time need not be told of what failed before.
_NEWS_MS = 7 * 24 * 3_600_000
_LAST_UUID = "ffffffff-ffff-ffff-ffff-ffffffffffff"


class SqlMonitoring:
    """``alert_channels`` and ``retrain_channels`` are told of each alert, and of each request to retrain."""

    def __init__(
        self, database: Database, alert_channels: Sequence[str] = (), retrain_channels: Sequence[str] = ()
    ) -> None:
        self._database = database
        self._alert_channels = alert_channels
        self._retrain_channels = retrain_channels
        self._dialect = sqlite if database.is_sqlite else postgresql

    def standings(self) -> dict[str, Standing]:
        with self._database.read() as connection:
            known = set(connection.execute(select(models.c.id).distinct()).scalars())
            found = _standings(connection)
        if new := known - found.keys():
            for model_id in sorted(new):
                self._start(model_id)
            with self._database.read() as connection:
                found = _standings(connection)
        return found

    def _start(self, model_id: str) -> None:
        """Puts the model's position before its first prediction."""
        with self._database.write() as connection:
            lift_time_limit(connection)
            # Read first: what is committed up to here is seen by the next statement, and numbers follow commits.
            reached = connection.execute(
                select(counters.c.value).where(counters.c.name == PREDICTION_SEQ)
            ).scalar_one_or_none()
            start = reached or 0
            if connection.execute(
                select(exists().where(prediction_logs.c.model_id == model_id))
            ).scalar_one():
                first = select(func.min(prediction_logs.c.seq)).where(prediction_logs.c.model_id == model_id)
                start = connection.execute(first).scalar_one() - 1
            row = {
                "model_id": model_id,
                "seq": start,
                "outcome_seq": start,
                # An outcome that has the number of the last commit was there before as well.
                "outcome_id": _LAST_UUID,
                "state": b"",
                "updated_at": _now_ms(),
            }
            connection.execute(self._dialect.insert(monitors).values(row).on_conflict_do_nothing())

    def state(self, model_id: str) -> tuple[LogPosition, bytes]:
        table = monitors.c
        statement = select(table.seq, table.outcome_seq, table.outcome_id, table.state)
        with self._database.read() as connection:
            row = connection.execute(statement.where(table.model_id == model_id)).one_or_none()
        if row is None:
            raise ModelUnknown(f"no monitor has seen the model {model_id!r} yet", model_id=model_id)
        *position, state = row
        return LogPosition(*position), state

    def predictions(self, after: int, limit: int) -> list[WatchedPrediction]:
        statement = _watched_columns().where(prediction_logs.c.seq > after)
        with self._database.read() as connection:
            found = connection.execute(statement.order_by(prediction_logs.c.seq).limit(limit))
            return [WatchedPrediction(*row) for row in found]

    def outcomes(self, after: tuple[int, str], limit: int) -> tuple[list[WatchedOutcome], tuple[int, str]]:
        earlier = outcomes.alias("earlier")
        told, made = outcomes.c, prediction_logs.c
        is_repeated = exists().where(
            earlier.c.prediction_id == told.prediction_id,
            tuple_(func.coalesce(earlier.c.seq, 0), earlier.c.id) < tuple_(told.seq, told.id),
        )
        statement = (
            select(told.seq, told.id, told.outcome, told.prediction_id, *_answered(made), is_repeated)
            .join(prediction_logs, made.id == told.prediction_id)
            .where(tuple_(told.seq, told.id) > tuple_(*after, types=[told.seq.type, told.id.type]))
            .order_by(told.seq, told.id)
            .limit(limit)
        )
        with self._database.read() as connection:
            rows = connection.execute(statement).all()
            by_prediction = {row.prediction_id: row for row in rows if not row[-1]}
            found = [_watched_outcome(row, row[4:-1]) for row in by_prediction.values()]
            ids = list(by_prediction)
            for start in range(0, len(ids), 500):  # SQLite bounds the number of parameters
                part = made.shadow_of.in_(ids[start : start + 500])
                shadows = connection.execute(select(made.shadow_of, *_answered(made)).where(part))
                found += [_watched_outcome(by_prediction[of], answered) for of, *answered in shadows]
        return found, (rows[-1].seq, rows[-1].id) if rows else after

    def log_end(self) -> int:
        reached = select(counters.c.value).where(counters.c.name == PREDICTION_SEQ)
        with self._database.read() as connection:
            return connection.execute(reached).scalar_one_or_none() or 0

    def latest(
        self, model_id: str, model_version: str, rows: int, *, until_seq: int | None = None
    ) -> list[WatchedPrediction]:
        table = prediction_logs.c
        statement = _watched_columns().where(table.model_id == model_id, table.model_version == model_version)
        if until_seq is not None:
            statement = statement.where(table.seq <= until_seq)
        newest = statement.order_by(table.created_at.desc(), table.seq.desc()).limit(rows)
        with self._database.read() as connection:
            found = [WatchedPrediction(*row) for row in connection.execute(newest)]
        return found[::-1]

    def batches(self, model_id: str, model_version: str) -> list[CountedBatch]:
        table = drift_batches.c
        statement = (
            select(
                table.model_version,
                table.number,
                table.rows,
                table.first_seq,
                table.last_seq,
                table.started_at,
                table.ended_at,
                table.counts,
            )
            .where(table.model_id == model_id, table.model_version == model_version)
            .order_by(table.number)
        )
        with self._database.read() as connection:
            return [CountedBatch(*row) for row in connection.execute(statement)]

    def commit(self, step: MonitorStep) -> bool:
        table = monitors.c
        values: dict[str, Any] = {
            "seq": step.now.seq,
            "outcome_seq": step.now.outcome_seq,
            "outcome_id": step.now.outcome_id,
            "state": step.state,
            "updated_at": step.at_ms,
        }
        with self._database.write() as connection:
            moved = update(monitors).where(_stands_at(step.model_id, step.was)).values(values)
            if not connection.execute(moved).rowcount:
                return False
            if step.answers_check is not None:
                # One that was asked for since then is still waited for.
                answered = table.check_requested_at <= step.answers_check
                connection.execute(
                    update(monitors)
                    .where(table.model_id == step.model_id, answered)
                    .values(check_requested_at=None)
                )
            self._store_batches(connection, step)
            self._store_reports(connection, step)
            self._store_incidents(connection, step)
            if step.alert is not None:
                self._store_alert(connection, step.alert)
            if step.retrain is not None:
                store_job(connection, self._dialect, step.retrain, self._retrain_channels)
        return True

    def skip(self, positions: Mapping[str, tuple[LogPosition, LogPosition]]) -> None:
        with self._database.write() as connection:
            for model_id, (was, now) in positions.items():
                connection.execute(
                    update(monitors)
                    .where(_stands_at(model_id, was))
                    .values(
                        seq=now.seq,
                        outcome_seq=now.outcome_seq,
                        outcome_id=now.outcome_id,
                        updated_at=_now_ms(),
                    )
                )

    def _store_batches(self, connection: Connection, step: MonitorStep) -> None:
        newest: dict[str, int] = {}
        for batch in step.batches:
            newest[batch.model_version] = batch.number
            row = msgspec.structs.asdict(batch) | {"model_id": step.model_id}
            row["started_at"], row["ended_at"] = row.pop("started_at_ms"), row.pop("ended_at_ms")
            connection.execute(insert(drift_batches).values(row))
        for version, number in newest.items():
            connection.execute(
                delete(drift_batches).where(
                    drift_batches.c.model_id == step.model_id,
                    drift_batches.c.model_version == version,
                    drift_batches.c.number <= number - KEPT_BATCHES,
                )
            )

    def _store_reports(self, connection: Connection, step: MonitorStep) -> None:
        table = drift_reports.c
        for report in step.reports:
            row = msgspec.structs.asdict(report)
            row["created_at"] = row.pop("created_at_ms")
            connection.execute(insert(drift_reports).values(row))
        for version, kind in {(report.model_version, report.kind) for report in step.reports}:
            same = and_(table.model_id == step.model_id, table.model_version == version, table.kind == kind)
            oldest_kept = (
                select(table.created_at)
                .where(same)
                .order_by(table.created_at.desc())
                .offset(KEPT_REPORTS - 1)
                .limit(1)
            ).scalar_subquery()
            connection.execute(delete(drift_reports).where(same, table.created_at < oldest_kept))

    def _store_incidents(self, connection: Connection, step: MonitorStep) -> None:
        table = incidents.c
        for incident in step.opened:
            row = _incident_row(incident)
            connection.execute(self._dialect.insert(incidents).values(row).on_conflict_do_nothing())
        for incident in step.changed:
            row = _incident_row(incident)
            seen = {name: row[name] for name in ("severity", "summary", "evidence", "updated_at")}
            if incident.status is IncidentStatus.RESOLVED:
                ended = ("status", "resolved_at", "resolution", "open_cause")
                seen |= {name: row[name] for name in ended}
            connection.execute(
                update(incidents)
                .where(table.id == incident.id, table.status != IncidentStatus.RESOLVED)
                .values(seen)
            )

    def _store_alert(self, connection: Connection, alert: Alert) -> None:
        row = msgspec.to_builtins(alert)
        connection.execute(insert(alerts).values(row | {"created_at": row.pop("at_ms")}))
        add_deliveries(connection, alert.id, "alert", alert, alert.at_ms, self._alert_channels)

    def retrain_requests(self, model_id: str, since_ms: int) -> tuple[int | None, int]:
        table = retrain_jobs.c
        asked = select(func.max(table.requested_at, type_=table.requested_at.type)).where(
            table.model_id == model_id
        )
        recent = (
            select(func.count())
            .select_from(retrain_jobs)
            .where(table.model_id == model_id, table.requested_at >= since_ms)
        )
        with self._database.read() as connection:
            return connection.execute(asked).scalar_one(), connection.execute(recent).scalar_one()

    def reports(
        self,
        model_id: str,
        kind: str,
        model_version: str | None = None,
        limit: int = 1,
        cursor: str | None = None,
    ) -> tuple[list[MonitorReport], str | None]:
        table = drift_reports.c
        statement = select(
            table.id,
            table.model_id,
            table.model_version,
            table.kind,
            table.created_at,
            table.rows,
            table.report,
        ).where(table.model_id == model_id, table.kind == kind)
        if model_version is not None:
            statement = statement.where(table.model_version == model_version)
        if cursor is not None:
            position = tuple_(*parse_cursor(cursor), types=[table.created_at.type, table.id.type])
            statement = statement.where(tuple_(table.created_at, table.id) < position)
        newest = statement.order_by(table.created_at.desc(), table.id.desc()).limit(limit + 1)
        with self._database.read() as connection:
            found = [MonitorReport(*row) for row in connection.execute(newest)]
        page = found[:limit]
        return page, f"{page[-1].created_at_ms}.{page[-1].id}" if len(found) > limit else None

    def request_check(self, model_id: str, at_ms: int) -> bool:
        with self._database.write() as connection:
            asked = update(monitors).where(monitors.c.model_id == model_id).values(check_requested_at=at_ms)
            return bool(connection.execute(asked).rowcount)

    def incidents(self, query: IncidentQuery) -> tuple[list[Incident], str | None]:
        table = incidents.c
        statement = select(incidents).order_by(table.opened_at.desc(), table.id.desc())
        if query.model_id is not None:
            statement = statement.where(table.model_id == query.model_id)
        if query.model_version is not None:
            statement = statement.where(table.model_version == query.model_version)
        if query.unresolved:
            statement = statement.where(table.open_cause.is_not(None))
        if query.cursor is not None:
            position = tuple_(*parse_cursor(query.cursor), types=[table.opened_at.type, table.id.type])
            statement = statement.where(tuple_(table.opened_at, table.id) < position)
        with self._database.read() as connection:
            found = [_incident(row) for row in connection.execute(statement.limit(query.limit + 1))]
        page = found[: query.limit]
        more = len(found) > query.limit
        return page, f"{page[-1].opened_at_ms}.{page[-1].id}" if more else None

    def acknowledge(self, incident_id: str, actor: str, at_ms: int) -> Incident:
        table = incidents.c
        try:
            wanted = str(UUID(incident_id))
        except ValueError:
            raise InvalidField(f"{incident_id[:60]!r} is not an incident's id", field="id") from None
        with refusing_values(), self._database.write() as connection:
            row = connection.execute(
                select(incidents).where(table.id == wanted).with_for_update()
            ).one_or_none()
            if row is None:
                raise IncidentUnknown(f"there is no incident {wanted}", incident_id=wanted)
            incident = _incident(row)
            if incident.status is IncidentStatus.RESOLVED:
                raise IncidentResolved(
                    f"the incident has ended already: {incident.resolution}", incident_id=wanted
                )
            if incident.status is IncidentStatus.ACKNOWLEDGED:
                return incident
            values = {
                "status": IncidentStatus.ACKNOWLEDGED,
                "acknowledged_at": at_ms,
                "acknowledged_by": actor[:256],
            }
            connection.execute(update(incidents).where(table.id == wanted).values(values))
            subject = f"{incident.model_id} {incident.model_version}"
            _record(connection, actor, "acknowledge", subject, {"incident": wanted, "cause": incident.cause})
            row = connection.execute(select(incidents).where(table.id == wanted)).one()
            return _incident(row)

    def alerts(self, model_id: str | None, limit: int, cursor: str | None) -> tuple[list[Alert], str | None]:
        table = alerts.c
        statement = select(alerts).order_by(table.created_at.desc(), table.id.desc())
        if model_id is not None:
            statement = statement.where(table.model_id == model_id)
        if cursor is not None:
            position = tuple_(*parse_cursor(cursor), types=[table.created_at.type, table.id.type])
            statement = statement.where(tuple_(table.created_at, table.id) < position)
        with self._database.read() as connection:
            rows = [fields_of(row) for row in connection.execute(statement.limit(limit + 1))]
        found = [msgspec.convert(row | {"at_ms": row["created_at"]}, Alert) for row in rows]
        page = found[:limit]
        return page, f"{page[-1].at_ms}.{page[-1].id}" if len(found) > limit else None

    def settings(self, model_id: str) -> MonitorSettings:
        with self._database.read() as connection:
            return read_settings(_documents(connection, ALL_MODELS) | _documents(connection, model_id))

    def change_settings(
        self, model_id: str, changes: Mapping[str, Any], actor: str, *, replace: bool = False
    ) -> MonitorSettings:
        given = {name: value for name, value in changes.items() if value is not None}
        read_settings(
            given | dict.fromkeys(changes.keys() - _KNOWN)
        )  # an unknown name is one without a value too
        with refusing_values(), self._database.write() as connection:
            if model_id != ALL_MODELS:
                _check_names(connection, model_id, given)
            before = _documents(connection, model_id)
            kept = {} if replace else {k: v for k, v in before.items() if k not in changes}
            after = kept | given
            general = {} if model_id == ALL_MODELS else _documents(connection, ALL_MODELS)
            settings = read_settings(general | after)
            if after != before:
                row = {"model_id": model_id, "settings": after, "updated_at": _now_ms()}
                connection.execute(delete(model_settings).where(model_settings.c.model_id == model_id))
                connection.execute(insert(model_settings).values(row))
                _record(connection, actor, "monitoring", model_id, after)
        return settings


def _check_names(connection: Connection, model_id: str, changes: Mapping[str, Any]) -> None:
    """Raises ModelUnknown, and InvalidField for a feature that no version of the model has."""
    found = connection.execute(select(models.c.metadata).where(models.c.id == model_id)).scalars().all()
    if not found:
        raise ModelUnknown(f"no model {model_id!r} is registered", model_id=model_id)
    known = {SCORE, RESULT}.union(*(metadata["features"] for metadata in found))
    for field in ("left_out", "effects"):
        if unknown := sorted(set(changes.get(field) or ()) - known):
            raise InvalidField(
                f"{field}: {model_id} has no feature {', '.join(unknown)}; it has {', '.join(sorted(known))}",
                field=field,
            )


_KNOWN = frozenset(MonitorSettings.__struct_fields__)


def _standings(connection: Connection) -> dict[str, Standing]:
    table = monitors.c
    rows = connection.execute(
        select(table.model_id, table.check_requested_at, table.seq, table.outcome_seq, table.outcome_id)
    )
    job = retrain_jobs.c
    ended = (
        select(
            job.id, job.model_id, job.model_version, job.status, job.new_version, job.error, job.updated_at
        )
        .where(job.status.in_(ENDED), job.updated_at >= _now_ms() - _NEWS_MS)
        .order_by(job.updated_at, job.id)
    )
    news = {
        row.model_id: msgspec.convert(fields_of(row), EndedJob) for row in connection.execute(ended).all()
    }
    return {
        model_id: Standing(LogPosition(*position), asked, news.get(model_id))
        for model_id, asked, *position in rows
    }


def _stands_at(model_id: str, position: LogPosition) -> ColumnElement[bool]:
    table = monitors.c
    return and_(
        table.model_id == model_id,
        table.seq == position.seq,
        table.outcome_seq == position.outcome_seq,
        table.outcome_id == position.outcome_id,
    )


def _answered(table: ReadOnlyColumnCollection[str, Any]) -> list[Any]:
    return [
        table.model_id,
        table.model_version,
        table.result,
        table.confidence,
        table.probabilities,
        table.created_at,
    ]


def _watched_outcome(told: Any, answered: Sequence[Any]) -> WatchedOutcome:
    model_id, model_version, *answer = answered
    return WatchedOutcome(told.seq, told.id, model_id, model_version, told.outcome, *answer)


def _watched_columns() -> Select[Any]:
    table = prediction_logs.c
    return select(
        table.seq,
        table.model_id,
        table.model_version,
        table.inputs,
        table.feature_sources,
        table.result,
        table.confidence,
        table.probabilities,
        table.created_at,
    )


def _incident_row(incident: Incident) -> dict[str, Any]:
    row = msgspec.structs.asdict(incident)
    for name in ("opened_at", "updated_at", "acknowledged_at", "resolved_at"):
        row[name] = row.pop(f"{name}_ms")
    row["open_cause"] = None if incident.status is IncidentStatus.RESOLVED else incident.cause
    return row


def _incident(row: Row[Any]) -> Incident:
    fields = fields_of(row)
    del fields["open_cause"]
    for name in ("opened_at", "updated_at", "acknowledged_at", "resolved_at"):
        fields[f"{name}_ms"] = fields.pop(name)
    return msgspec.convert(fields, Incident)


def _documents(connection: Connection, model_id: str) -> dict[str, Any]:
    found = connection.execute(
        select(model_settings.c.settings).where(model_settings.c.model_id == model_id)
    ).scalar_one_or_none()
    return found or {}


def _record(
    connection: Connection, actor: str, action: str, subject: str, details: Mapping[str, Any]
) -> None:
    # Without raising the registry's revision: no API process needs to look again for this.
    entry = {"at": _now_ms(), "actor": actor, "action": action, "subject": subject, "details": dict(details)}
    connection.execute(insert(audit_log).values(entry))


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
