"""Watching models: predictions are counted, batches are checked, incidents follow, and retraining is asked for.

One ``Monitor`` watches all models. Each step reads what is new in the log and, model by model, commits the counts, the
conclusions and the position together. Any number of monitors may run: whoever commits first has counted.
"""

import logging
import random
import time
from collections.abc import Callable, MutableSequence, Sequence
from typing import Any

import msgspec
from msgspec import Struct

from phoenix_ml.application.casebook import Casebook
from phoenix_ml.application.ports import (
    ArtifactStore,
    IncidentQuery,
    LogPosition,
    Monitoring,
    MonitorStep,
    Registry,
    Standing,
    WatchedOutcome,
    WatchedPrediction,
)
from phoenix_ml.application.watch import ModelState, Registered, Watch
from phoenix_ml.application.watched_version import Figures, Look
from phoenix_ml.domain.errors import DatabaseUnavailable
from phoenix_ml.domain.models import ModelVersion
from phoenix_ml.domain.monitoring import DriftPolicy
from phoenix_ml.domain.routing import Role, default_routing

log = logging.getLogger(__name__)
_READ_ROWS = 5000
# A model without rows of its own is moved on when its restart would read this many of others.
_IDLE_ROWS = 10_000
_RETRY_FAILED_MS = 60_000


class Seen(Struct, frozen=True):
    """What one step did: rows and outcomes counted, rows of the log that no monitor has counted yet, models that could
    not be watched because of a defect, and new figures.
    """

    rows: int
    outcomes: int
    lag_rows: int
    failed: tuple[str, ...] = ()
    figures: tuple[Figures, ...] = ()


class Monitor:
    """Watches all models of a registry. Belongs to one thread."""

    def __init__(
        self,
        monitoring: Monitoring,
        registry: Registry,
        artifacts: ArtifactStore,
        *,
        policy: DriftPolicy = DriftPolicy.DESIGNED,
        group_ms: int = 300_000,
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        shuffle: Callable[[MutableSequence[Any]], None] = random.shuffle,
        read_rows: int = _READ_ROWS,
    ) -> None:
        self._monitoring = monitoring
        self._registry = registry
        self._artifacts = artifacts
        self._policy = policy
        self._group_ms = group_ms
        self._now_ms = now_ms
        self._shuffle = shuffle
        self._read_rows = read_rows
        self._watches: dict[str, Watch] = {}
        # How far the log was seen to hold nothing of a model, beyond its stored position.
        self._passed: dict[str, tuple[LogPosition, LogPosition]] = {}
        self._failed_at: dict[str, int] = {}
        self._revision = -1
        self._registered: dict[str, Registered] = {}

    def step(self) -> Seen:
        """Reads what is new and commits what follows from it. Raises DatabaseUnavailable.

        A model whose monitoring fails by a defect is left out for a minute; the others go on.
        """
        standings = self._monitoring.standings()
        now_ms = self._now_ms()
        # A model that fails is not read for: its rows would come again and again, and no newer ones of the others.
        due = {
            model_id: standing
            for model_id, standing in standings.items()
            if now_ms - self._failed_at.get(model_id, -_RETRY_FAILED_MS) >= _RETRY_FAILED_MS
        }
        positions = {model_id: self._reached(model_id, one.position) for model_id, one in due.items()}
        if not positions:
            return Seen(0, 0, 0, tuple(self._failed_at))
        rows = self._monitoring.predictions(min(one.seq for one in positions.values()), self._read_rows)
        read_to = rows[-1].seq if rows else 0
        outcomes, outcomes_to = self._monitoring.outcomes(
            min(one.outcome for one in positions.values()), self._read_rows
        )
        # After the rows: each of them is of a version that the registry has by now.
        self._refresh()
        rows_of: dict[str, list[WatchedPrediction]] = {model_id: [] for model_id in positions}
        for row in rows:
            if row.model_id in positions and row.seq > positions[row.model_id].seq:
                rows_of[row.model_id].append(row)
        outcomes_of: dict[str, list[WatchedOutcome]] = {model_id: [] for model_id in positions}
        for told in outcomes:
            if told.model_id in positions and (told.seq, told.id) > positions[told.model_id].outcome:
                outcomes_of[told.model_id].append(told)
        counted = judged = 0
        figures: list[Figures] = []
        models = list(positions)
        # Several monitors begin with different models, so that they seldom count the same ones.
        self._shuffle(models)
        for model_id in models:
            was = standings[model_id].position
            now = LogPosition(
                max(positions[model_id].seq, read_to),
                *max(positions[model_id].outcome, outcomes_to),
            )
            if not self._has_work(
                model_id, standings[model_id], rows_of[model_id], outcomes_of[model_id], now_ms
            ):
                self._passed[model_id] = was, now
                continue
            try:
                look = self._advance(
                    model_id, standings[model_id], now, rows_of[model_id], outcomes_of[model_id], now_ms
                )
            except DatabaseUnavailable:
                raise
            except Exception:
                # The log is written by the same process: a defect here must not take it down, nor the other models.
                log.exception("the model %s cannot be watched; it is tried again in a minute", model_id)
                self._watches.pop(model_id, None)
                self._failed_at[model_id] = now_ms
                continue
            self._failed_at.pop(model_id, None)
            if look is None:
                continue
            counted += len(rows_of[model_id])
            judged += len(outcomes_of[model_id])
            figures += look.figures
        self._skip_idle(standings)
        reached = [self._passed.get(name, (one, one))[1].seq for name, one in positions.items()]
        held = [self._watches[name].position.seq if name in self._watches else 0 for name in positions]
        lag = self._monitoring.log_end() - min(map(max, reached, held))
        return Seen(counted, judged, max(0, lag), tuple(self._failed_at), tuple(figures))

    def _reached(self, model_id: str, stored: LogPosition) -> LogPosition:
        passed = self._passed.get(model_id)
        if passed is None or passed[0] != stored:
            self._passed.pop(model_id, None)
            return stored
        return passed[1]

    def _has_work(
        self,
        model_id: str,
        standing: Standing,
        rows: Sequence[WatchedPrediction],
        outcomes: Sequence[WatchedOutcome],
        now_ms: int,
    ) -> bool:
        if rows or outcomes or standing.check_requested_at_ms is not None:
            return True
        watch = self._watches.get(model_id)
        if watch is None:
            # Its state may hold an alert that waits, or incidents of a version that answers no more.
            return standing.position.seq > 0 or standing.ended_job is not None
        return (
            watch.is_news(standing.ended_job)
            or watch.has_left(self._registered[model_id])
            or watch.cases.is_alert_due(now_ms, self._group_ms)
        )

    def _skip_idle(self, standings: dict[str, Standing]) -> None:
        idle = {
            model_id: (was, now)
            for model_id, (was, now) in self._passed.items()
            if now.seq - was.seq > _IDLE_ROWS and standings[model_id].position == was
        }
        if idle:
            self._monitoring.skip(idle)
            for model_id, (_, now) in idle.items():
                if model_id in self._watches:
                    self._watches[model_id].position = now

    def _refresh(self) -> None:
        """Looks at the registry when it has changed."""
        revision = self._registry.revision()
        if revision == self._revision:
            return
        versions: dict[str, dict[str, ModelVersion]] = {}
        for version in self._registry.list_versions():
            versions.setdefault(version.model_id, {})[version.version] = version
        routings = self._registry.routings()
        self._registered.clear()
        for model_id, of_model in versions.items():
            active = [version for version in of_model.values() if version.is_active]
            routing = routings.get(model_id) or default_routing(active)
            arms = routing.arms if routing is not None else ()
            champion = next((arm.version for arm in arms if arm.role is Role.CHAMPION), None)
            answering = frozenset(arm.version for arm in arms)
            self._registered[model_id] = Registered(of_model, champion, answering)
        self._revision = revision

    def _load(self, model_id: str, position: LogPosition) -> Watch | None:
        """The model as it was left; None when another monitor has just moved it."""
        found, stored = self._monitoring.state(model_id)
        if found != position:
            return None
        state = msgspec.msgpack.decode(stored, type=ModelState) if stored else ModelState()
        unresolved, _ = self._monitoring.incidents(IncidentQuery(model_id, unresolved=True, limit=1000))
        cases = Casebook(model_id, unresolved, state.cases)
        return Watch(self._monitoring, self._artifacts, self._policy, model_id, position, state, cases)

    def _advance(
        self,
        model_id: str,
        standing: Standing,
        now: LogPosition,
        rows: Sequence[WatchedPrediction],
        outcomes: Sequence[WatchedOutcome],
        now_ms: int,
    ) -> Look | None:
        """What a look at the model has found, which is stored; None when another monitor was faster."""
        watch = self._watches.get(model_id)
        if watch is None or watch.position != standing.position:
            watch = self._load(model_id, standing.position)
            if watch is None:
                return None
        # Until the commit what is in memory is ahead of what is stored.
        self._watches.pop(model_id, None)
        look = watch.take(
            self._registered[model_id],
            rows,
            outcomes,
            standing.ended_job,
            now_ms,
            is_check_requested=standing.check_requested_at_ms is not None,
        )
        alert = watch.cases.alert(now_ms, self._group_ms)
        step = MonitorStep(
            model_id=model_id,
            was=standing.position,
            now=now,
            state=msgspec.msgpack.encode(watch.state),
            at_ms=now_ms,
            batches=tuple(look.batches),
            reports=tuple(look.reports),
            opened=tuple(watch.cases.opened.values()),
            changed=tuple(watch.cases.changed.values()),
            alert=alert,
            retrain=look.retrain,
            answers_check=standing.check_requested_at_ms,
        )
        if not self._monitoring.commit(step):
            return None
        watch.cases.stored()
        watch.position = now
        self._watches[model_id] = watch
        self._passed.pop(model_id, None)
        return look
