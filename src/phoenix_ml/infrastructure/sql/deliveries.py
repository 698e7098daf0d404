"""What waits to be told, in SQL. See ``Deliveries`` in the ports for the contract."""

from collections.abc import Sequence

import msgspec
from sqlalchemy import Connection, func, insert, select, update

from phoenix_ml.application.ports import Delivery
from phoenix_ml.domain.healing import RetrainJob
from phoenix_ml.domain.incidents import Alert
from phoenix_ml.infrastructure.sql.database import Database
from phoenix_ml.infrastructure.sql.schema import deliveries

_ERROR_CHARACTERS = 500
# 9999-12-30, which every database can store: what is given up is not taken again.
NEVER_MS = 253_402_128_000_000


def add_deliveries(
    connection: Connection,
    subject_id: str,
    kind: str,
    subject: Alert | RetrainJob,
    at_ms: int,
    channels: Sequence[str],
) -> None:
    """What each channel is to be told, in the transaction that makes it true."""
    for channel in channels:
        row = {
            "id": subject_id,
            "channel": channel,
            "kind": kind,
            "payload": msgspec.to_builtins(subject),
            "created_at": at_ms,
            "attempts": 0,
            "not_before": at_ms,
        }
        connection.execute(insert(deliveries).values(row))


class SqlDeliveries:
    """The table ``deliveries``."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def take(self, channel: str, now_ms: int, leased_until_ms: int, limit: int) -> list[Delivery]:
        table = deliveries.c
        waiting = (
            select(table.id, table.channel, table.kind, table.payload, table.created_at, table.attempts)
            .where(table.channel == channel, table.delivered_at.is_(None), table.not_before <= now_ms)
            .order_by(table.created_at, table.id)
            .limit(limit)
        )
        taken = []
        with self._database.write() as connection:
            for row in connection.execute(waiting).all():
                # Whoever moves it first has it.
                lease = (
                    update(deliveries)
                    .where(
                        table.id == row.id,
                        table.channel == channel,
                        table.delivered_at.is_(None),
                        table.not_before <= now_ms,
                    )
                    .values(not_before=leased_until_ms, attempts=table.attempts + 1)
                )
                if connection.execute(lease).rowcount:
                    taken.append(Delivery(*row))
        return taken

    def delivered(self, delivery: Delivery, at_ms: int) -> None:
        self._set(delivery, delivered_at=at_ms, error=None)

    def failed(self, delivery: Delivery, error: str, again_at_ms: int | None) -> None:
        again_at_ms = NEVER_MS if again_at_ms is None else again_at_ms
        self._set(delivery, error=error[:_ERROR_CHARACTERS], not_before=again_at_ms)

    def waiting(self) -> dict[str, int]:
        table = deliveries.c
        counts = (
            select(table.channel, func.count())
            .where(table.delivered_at.is_(None), table.not_before < NEVER_MS)
            .group_by(table.channel)
        )
        with self._database.read() as connection:
            return {row[0]: row[1] for row in connection.execute(counts)}

    def _set(self, delivery: Delivery, **values: int | str | None) -> None:
        table = deliveries.c
        found = update(deliveries).where(table.id == delivery.id, table.channel == delivery.channel)
        with self._database.write() as connection:
            connection.execute(found.values(values))
