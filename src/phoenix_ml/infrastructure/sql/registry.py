"""The registry in SQL. See ``Registry`` in the ports for the contract."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
from sqlalchemy import Connection, Row, delete, exists, insert, select, update
from sqlalchemy.exc import IntegrityError

from phoenix_ml.application.ports import AuditEntry
from phoenix_ml.domain.errors import (
    ModelUnknown,
    RoutingConflict,
    VersionConflict,
    VersionInactive,
    VersionUnknown,
)
from phoenix_ml.domain.events import ModelChanged
from phoenix_ml.domain.ids import new_id
from phoenix_ml.domain.models import (
    Framework,
    Metadata,
    ModelVersion,
    Stage,
    check_promotion,
    version_precedence,
)
from phoenix_ml.domain.routing import Routing
from phoenix_ml.infrastructure.sql.database import Database, next_value, refusing_values
from phoenix_ml.infrastructure.sql.schema import REGISTRY_REVISION, audit_log, counters, models, routing


class SqlRegistry:
    """``announce`` is told of every change once it is committed."""

    def __init__(self, database: Database, announce: Callable[[ModelChanged], None] = lambda _: None) -> None:
        self._database = database
        self._announce = announce

    def add(self, version: ModelVersion, actor: str) -> None:
        row = {
            "id": version.model_id,
            "version": version.version,
            "uri": version.uri,
            "framework": version.framework,
            "stage": version.stage,
            "metadata": msgspec.to_builtins(version.metadata),
            "created_at": version.created_at_ms,
            "is_active": version.is_active,
            "sha256": version.sha256,
        }
        try:
            with self._changing() as connection:
                connection.execute(insert(models).values(row))
                details = {"sha256": version.sha256, "stage": version.stage}
                _record(connection, actor, "register", version.model_id, version.version, details)
        except IntegrityError as exc:
            raise VersionConflict(
                f"{version.model_id} {version.version} was registered by somebody else just now"
            ) from exc

    def get(self, model_id: str, version: str) -> ModelVersion:
        with self._database.read() as connection:
            return _get(connection, model_id, version)

    def check_model(self, model_id: str) -> None:
        with self._database.read() as connection:
            is_known = connection.execute(select(exists().where(models.c.id == model_id))).scalar_one()
        if not is_known:
            raise _unknown(model_id)

    def list_versions(self, model_id: str | None = None) -> list[ModelVersion]:
        query = select(models)
        if model_id is not None:
            query = query.where(models.c.id == model_id)
        with self._database.read() as connection:
            found = [_version(row) for row in connection.execute(query)]
        if model_id is not None and not found:
            raise _unknown(model_id)
        return sorted(found, key=lambda v: (v.model_id, version_precedence(v.version), v.version))

    def set_stage(self, model_id: str, version: str, stage: Stage, actor: str) -> ModelVersion:
        with self._changing() as connection:
            current = _get(connection, model_id, version)
            if current.stage is stage:
                return current
            check_promotion(current.stage, stage)
            details = {"from": current.stage, "to": stage}
            return _change(connection, current, actor, "stage", details, {"stage": stage})

    def set_active(self, model_id: str, version: str, active: bool, actor: str) -> ModelVersion:
        with self._changing() as connection:
            current = _get(connection, model_id, version)
            if current.is_active is active:
                return current
            routed = _routing(connection, model_id)
            if not active and routed is not None and version in routed.versions:
                raise RoutingConflict(
                    f"the routing of {model_id} sends requests to {version}: change the routing first",
                    model_id=model_id,
                    version=version,
                )
            action = "activate" if active else "deactivate"
            return _change(connection, current, actor, action, {}, {"is_active": active})

    def routings(self) -> dict[str, Routing]:
        with self._database.read() as connection:
            rows = connection.execute(select(routing.c.model_id, routing.c.routing))
            return {row.model_id: msgspec.convert(row.routing, Routing) for row in rows}

    def set_routing(self, model_id: str, routing_: Routing, actor: str) -> None:
        document = msgspec.to_builtins(routing_)
        with self._changing() as connection:
            for version in routing_.versions:
                if not _get(connection, model_id, version).is_active:
                    raise VersionInactive(
                        f"{model_id} {version} is not active: activate it before requests are sent to it",
                        model_id=model_id,
                        version=version,
                    )
            if _routing(connection, model_id) == routing_:
                return
            connection.execute(delete(routing).where(routing.c.model_id == model_id))
            row = {"model_id": model_id, "routing": document, "updated_at": _now_ms()}
            connection.execute(insert(routing).values(row))
            _record(connection, actor, "routing", model_id, None, document)

    def clear_routing(self, model_id: str, actor: str) -> None:
        with self._changing() as connection:
            if _routing(connection, model_id) is None:
                return
            connection.execute(delete(routing).where(routing.c.model_id == model_id))
            _record(connection, actor, "routing", model_id, None, {"strategy": None})

    def revision(self) -> int:
        query = select(counters.c.value).where(counters.c.name == REGISTRY_REVISION)
        with self._database.read() as connection:
            return int(connection.execute(query).scalar_one())

    def audit(self, limit: int = 100, before: int | None = None) -> list[AuditEntry]:
        query = select(audit_log).order_by(audit_log.c.id.desc()).limit(limit)
        if before is not None:
            query = query.where(audit_log.c.id < before)
        with self._database.read() as connection:
            return [
                AuditEntry(row.id, row.at, row.actor, row.action, row.subject, row.details)
                for row in connection.execute(query)
            ]

    @contextmanager
    def _changing(self) -> Iterator[Connection]:
        """One change at a time: what a change has checked, no other alters before it is committed."""
        revision = select(counters.c.value).where(counters.c.name == REGISTRY_REVISION)
        with refusing_values(), self._database.write() as connection:
            connection.execute(revision.with_for_update())  # SQLite locks at the start of every write
            changes: list[ModelChanged] = []
            yield connection.execution_options(changes=changes)
        for change in changes:
            self._announce(change)


def _unknown(model_id: str) -> ModelUnknown:
    return ModelUnknown(f"no model {model_id!r} is registered", model_id=model_id)


def _get(connection: Connection, model_id: str, version: str) -> ModelVersion:
    row = connection.execute(
        select(models).where(models.c.id == model_id, models.c.version == version)
    ).one_or_none()
    if row is not None:
        return _version(row)
    others = connection.execute(select(models.c.version).where(models.c.id == model_id)).scalars().all()
    if not others:
        raise _unknown(model_id)
    raise VersionUnknown(
        f"{model_id} has no version {version}; it has {', '.join(sorted(others, key=version_precedence))}",
        model_id=model_id,
        version=version,
    )


def _routing(connection: Connection, model_id: str) -> Routing | None:
    document = connection.execute(
        select(routing.c.routing).where(routing.c.model_id == model_id)
    ).scalar_one_or_none()
    return None if document is None else msgspec.convert(document, Routing)


def _change(
    connection: Connection,
    current: ModelVersion,
    actor: str,
    action: str,
    details: dict[str, Any],
    values: dict[str, Any],
) -> ModelVersion:
    connection.execute(
        update(models)
        .where(models.c.id == current.model_id, models.c.version == current.version)
        .values(values)
    )
    _record(connection, actor, action, current.model_id, current.version, details)
    return msgspec.structs.replace(current, **values)


def _record(
    connection: Connection,
    actor: str,
    action: str,
    model_id: str,
    version: str | None,
    details: dict[str, Any],
) -> None:
    """Puts the change into the audit log, raises the revision, and has the change announced after the commit."""
    next_value(connection, REGISTRY_REVISION)
    now_ms = _now_ms()
    subject = model_id if version is None else f"{model_id} {version}"
    entry = {"at": now_ms, "actor": actor, "action": action, "subject": subject, "details": details}
    connection.execute(insert(audit_log).values(entry))
    changes: list[ModelChanged] = connection.get_execution_options()["changes"]
    changes.append(ModelChanged(new_id(), model_id, version, action, actor, now_ms))


def _version(row: Row[Any]) -> ModelVersion:
    return ModelVersion(
        model_id=row.id,
        version=row.version,
        framework=Framework(row.framework),
        uri=row.uri,
        sha256=row.sha256,
        stage=Stage(row.stage),
        is_active=row.is_active,
        created_at_ms=row.created_at,
        metadata=msgspec.convert(row.metadata, Metadata),
    )


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
