"""Retrain jobs in SQL. See ``RetrainJobs`` in the ports for the contract."""

from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID

import msgspec
from sqlalchemy import Connection, Row, func, or_, select, tuple_, update
from sqlalchemy.dialects import postgresql, sqlite

from phoenix_ml.application.ports import JobQuery
from phoenix_ml.domain.errors import JobUnknown
from phoenix_ml.domain.healing import ENDED, OUTSIDE, JobStatus, RetrainJob, check_step
from phoenix_ml.infrastructure.sql.database import Database, fields_of
from phoenix_ml.infrastructure.sql.deliveries import add_deliveries
from phoenix_ml.infrastructure.sql.predictions import parse_cursor
from phoenix_ml.infrastructure.sql.schema import retrain_jobs

_INSTANTS = ("requested_at", "updated_at", "not_before", "owned_until")


def store_job(connection: Connection, dialect: Any, job: RetrainJob, channels: Sequence[str]) -> bool:
    """False, and nothing is stored, for an id that is known; the channels are to be told of a new one."""
    asked = dialect.insert(retrain_jobs).values(job_row(job)).on_conflict_do_nothing()
    if connection.execute(asked.returning(retrain_jobs.c.id)).one_or_none() is None:
        return False
    if channels:
        add_deliveries(connection, str(UUID(job.id)), "retrain", job, job.requested_at_ms, channels)
    return True


class SqlRetrainJobs:
    """The table ``retrain_jobs``; ``channels`` are told of each request."""

    def __init__(self, database: Database, channels: Sequence[str] = ()) -> None:
        self._database = database
        self._channels = channels
        self._dialect = sqlite if database.is_sqlite else postgresql

    def add(self, job: RetrainJob) -> bool:
        with self._database.write() as connection:
            return store_job(connection, self._dialect, job, self._channels)

    def get(self, job_id: str) -> RetrainJob:
        with self._database.read() as connection:
            row = connection.execute(select(retrain_jobs).where(retrain_jobs.c.id == job_id)).one_or_none()
        if row is None:
            raise JobUnknown(f"there is no retrain job {job_id}", job_id=job_id)
        return _job(row)

    def page(self, query: JobQuery) -> tuple[list[RetrainJob], str | None]:
        table = retrain_jobs.c
        statement = select(retrain_jobs).order_by(table.requested_at.desc(), table.id.desc())
        if query.model_id is not None:
            statement = statement.where(table.model_id == query.model_id)
        if query.under_way:
            statement = statement.where(table.status.not_in(ENDED))
        if query.cursor is not None:
            at_ms, last_id = parse_cursor(query.cursor)
            # A job's id is a UUID's digits alone.
            position = tuple_(at_ms, UUID(last_id).hex, types=[table.requested_at.type, table.id.type])
            statement = statement.where(tuple_(table.requested_at, table.id) < position)
        with self._database.read() as connection:
            found = [_job(row) for row in connection.execute(statement.limit(query.limit + 1))]
        page = found[: query.limit]
        more = len(found) > query.limit
        return page, f"{page[-1].requested_at_ms}.{page[-1].id}" if more else None

    def lease(
        self, owner: str, now_ms: int, until_ms: int, *, takes_requests: bool = True
    ) -> RetrainJob | None:
        table = retrain_jobs.c
        # What waits, and what somebody who is gone had in hand.
        wanted = table.status == JobStatus.CHECKING
        if takes_requests:
            waits = (table.status == JobStatus.REQUESTED) & (table.not_before <= now_ms)
            wanted = or_(wanted, waits, table.status == JobStatus.TRAINING)
        is_free = wanted & (table.owned_until <= now_ms)
        oldest = select(table.id).where(is_free).order_by(table.requested_at, table.id).limit(1)
        with self._database.write() as connection:
            job_id = connection.execute(oldest).scalar_one_or_none()
            if job_id is None:
                return None
            taken = (
                update(retrain_jobs)
                .where(table.id == job_id, is_free)
                .values(owner=owner, owned_until=until_ms, updated_at=now_ms)
            )
            if not connection.execute(taken).rowcount:
                return None
            return _job(connection.execute(select(retrain_jobs).where(table.id == job_id)).one())

    def renew(self, job: RetrainJob, until_ms: int, **facts: Any) -> bool:
        return self._change(job, facts | {"owned_until": until_ms}) is not None

    def hand_over(self, job: RetrainJob, until_ms: int, result: Mapping[str, Any]) -> RetrainJob | None:
        return self._change(job, {"owner": OUTSIDE, "owned_until": until_ms, "result": dict(result)})

    def move(self, job: RetrainJob, status: JobStatus, at_ms: int, **facts: Any) -> RetrainJob | None:
        check_step(job.status, status)
        values = facts | {"status": status, "updated_at": at_ms}
        if status in ENDED or status is JobStatus.REQUESTED:
            values |= {"owner": None, "owned_until": 0}
        return self._change(job, values)

    def count_by_status(self) -> dict[str, int]:
        table = retrain_jobs.c
        counts = select(table.status, func.count()).group_by(table.status)
        with self._database.read() as connection:
            return {row[0]: row[1] for row in connection.execute(counts)}

    def _change(self, job: RetrainJob, values: Mapping[str, Any]) -> RetrainJob | None:
        """The job as it is then; None when somebody else has it, or has moved it."""
        table = retrain_jobs.c
        mine = (table.id == job.id, table.status == job.status, table.owner == job.owner)
        with self._database.write() as connection:
            if not connection.execute(update(retrain_jobs).where(*mine).values(**values)).rowcount:
                return None
            return _job(connection.execute(select(retrain_jobs).where(table.id == job.id)).one())


def _job(row: Row[Any]) -> RetrainJob:
    facts = fields_of(row)
    for name in _INSTANTS:
        facts[f"{name}_ms"] = facts.pop(name)
    return msgspec.convert(facts, RetrainJob)


def job_row(job: RetrainJob) -> dict[str, Any]:
    row = msgspec.structs.asdict(job)
    for name in _INSTANTS:
        row[name] = row.pop(f"{name}_ms")
    return row
