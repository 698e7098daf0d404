"""Watching models: predictions are counted, batches are checked, incidents follow, and retraining is asked for.

One ``Monitor`` watches all models. Each step reads what is new in the log and, model by model, commits the counts, the
conclusions and the position together. Any number of monitors may run: whoever commits first has counted.
"""

import logging
import random
import time
from collections import deque
from collections.abc import Callable, MutableSequence, Sequence
from typing import Any, TypeVar

import msgspec
import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from phoenix_ml.application.casebook import Casebook, CaseState
from phoenix_ml.application.ports import (
    ArtifactStore,
    CountedBatch,
    EndedJob,
    IncidentQuery,
    LogPosition,
    Monitoring,
    MonitorReport,
    MonitorStep,
    Registry,
    Standing,
    WatchedOutcome,
    WatchedPrediction,
)
from phoenix_ml.application.statistics.alarm import AlarmSettings, DriftAlarm, check_schema
from phoenix_ml.application.statistics.baseline import read_reference
from phoenix_ml.application.statistics.cells import CellCounter, CellCounts
from phoenix_ml.application.statistics.detector import LossDetector, objective
from phoenix_ml.application.statistics.estimation import estimate_performance, is_drop_confirmed
from phoenix_ml.application.statistics.quality import losses, measure_quality
from phoenix_ml.application.statistics.report import classic_alarms, drift_report
from phoenix_ml.domain.baselines import RESULT, SCORE, Baseline, Estimate, Quality
from phoenix_ml.domain.drift import (
    DriftCheck,
    DriftReport,
    Evidence,
    FeatureAlarm,
    SchemaViolation,
    wants_retraining,
)
from phoenix_ml.domain.errors import DatabaseUnavailable, ModelLoadFailed
from phoenix_ml.domain.healing import JobStatus, RetrainJob, may_request, request_id
from phoenix_ml.domain.ids import new_id
from phoenix_ml.domain.incidents import Incident, IncidentKind, Severity
from phoenix_ml.domain.models import Metadata, ModelVersion, Task
from phoenix_ml.domain.monitoring import DriftPolicy, MonitorSettings
from phoenix_ml.domain.routing import Role, default_routing
from phoenix_ml.domain.rows import Outputs, RowFormat

Row = TypeVar("Row", WatchedPrediction, WatchedOutcome)

log = logging.getLogger(__name__)
MOST_BATCHES = 64
_READ_ROWS = 5000
# A model without rows of its own is moved on when its restart would read this many of others.
_IDLE_ROWS = 10_000
# Fewer tell nothing of quality.
FEWEST_OUTCOMES = 200
_QUALITY_ROWS = 1000
_REPORT_EVERY_MS = 60_000
# A report looks at no more rows; it is a person who reads it.
_REPORT_ROWS = 10_000
_BUDGET_PERIOD_MS = 30 * 24 * 3600 * 1000
_RETRY_FAILED_MS = 60_000
_ABSENT = frozenset({"default", "stale", "missing"})
_MOST_BROKEN_PERIODS = 20


class Judged(Struct, frozen=True, array_like=True):
    """An answer and its outcome."""

    result: Any
    confidence: float | None
    probabilities: list[float] | None
    outcome: Any


class VersionState(Struct):
    """How far one version's open batch has come, and what must be remembered of those before.

    ``number`` is the open batch's; ``estimate`` the last one's. ``broken`` are the periods in which its data was
    no data of these features: outcomes of predictions made then say nothing about the model.
    """

    number: int = 0
    rows: int = 0
    first_seq: int = 0
    started_at_ms: int = 0
    counts: bytes = b""
    estimate: Estimate | None = None
    is_drop_confirmed: bool = False
    score_moved: bool = False
    detector: LossDetector | None = None
    judged: list[Judged] = []
    good_windows: int = 0
    fresh_outcomes: int = 0
    broken: list[tuple[int, int | None]] = []
    drift_reported_at_ms: int = 0
    drifted: tuple[str, ...] = ()


class ModelState(Struct):
    """All that a monitor remembers of a model; stored with its position."""

    versions: dict[str, VersionState] = {}
    cases: CaseState = msgspec.field(default_factory=CaseState)
    told_job_id: str | None = None


class Figures(Struct, frozen=True):
    """The latest of a version, for metrics."""

    model_id: str
    model_version: str
    distances: dict[str, float]
    quality: Quality | None = None
    estimate: Estimate | None = None


class Seen(Struct, frozen=True):
    """What one step did: rows and outcomes counted, rows of the log that no monitor has counted yet, models that could
    not be watched because of a defect, and new figures.
    """

    rows: int
    outcomes: int
    lag_rows: int
    failed: tuple[str, ...] = ()
    figures: tuple[Figures, ...] = ()


class _Counting:
    """The counts of one version that has a baseline to count over."""

    def __init__(self, baseline: Baseline) -> None:
        self.baseline = baseline
        self.counter = CellCounter(baseline)
        self.counts = self.counter.zero()
        self.ring: deque[CellCounts] = deque(maxlen=MOST_BATCHES)
        # Beside each batch of the ring, the features whose values in it were none.
        self.broken: deque[frozenset[str]] = deque(maxlen=MOST_BATCHES)
        self.reference: dict[str, NDArray[np.float64]] | None = None
        self._alarm: tuple[AlarmSettings, DriftAlarm] | None = None

    def add_batch(self, counts: CellCounts, settings: MonitorSettings) -> tuple[SchemaViolation, ...]:
        """What in the batch are no values of their features."""
        found = check_schema(self.baseline, counts, settings.effect)
        violations = tuple(one for one in found if one.feature not in settings.left_out)
        self.ring.append(counts)
        self.broken.append(frozenset(one.feature for one in violations if one.explains_drift))
        return violations

    def check(self, settings: MonitorSettings) -> DriftCheck:
        """The thresholds are made anew only when the settings have changed: they take longer than a check."""
        wanted = _alarm_settings(settings)
        if self._alarm is None or self._alarm[0] != wanted:
            self._alarm = wanted, DriftAlarm(self.baseline, wanted)
        return self._alarm[1].check(list(self.ring))


class _Version:
    """What is kept in memory of a version; all of it comes back from the log and the registry after a restart."""

    def __init__(self, version: ModelVersion) -> None:
        self.registered = version
        self.metadata: Metadata = version.metadata
        self.row_format = RowFormat(self.metadata.columns)
        baseline = self.metadata.baseline
        self.counting = None if baseline is None else _Counting(baseline)
        self.recent: deque[WatchedPrediction] = deque(maxlen=_REPORT_ROWS)


class _Watch:
    """One model in memory, as of a position."""

    def __init__(self, model_id: str, position: LogPosition, state: ModelState, cases: Casebook) -> None:
        self.model_id = model_id
        self.position = position
        self.state = state
        self.cases = cases
        self.versions: dict[str, _Version] = {}
        self.settings = MonitorSettings()
        self.champion: str | None = None
        self.begin()

    def begin(self) -> None:
        """Forgets what the last commit has stored."""
        self.batches: list[CountedBatch] = []
        self.reports: list[MonitorReport] = []
        self.figures: list[Figures] = []
        self.retrain: RetrainJob | None = None
        self.cases.stored()


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
        self._watches: dict[str, _Watch] = {}
        # How far the log was seen to hold nothing of a model, beyond its stored position.
        self._passed: dict[str, tuple[LogPosition, LogPosition]] = {}
        self._failed_at: dict[str, int] = {}
        self._revision = -1
        self._versions: dict[str, dict[str, ModelVersion]] = {}
        self._champions: dict[str, str | None] = {}
        self._answering: dict[str, set[str]] = {}

    def step(self) -> Seen:
        """Reads what is new and commits what follows from it. Raises DatabaseUnavailable.

        A model whose monitoring fails by a defect is left out for a minute; the others go on.
        """
        self._refresh()
        standings = self._monitoring.standings()
        positions = {model_id: self._reached(model_id, one.position) for model_id, one in standings.items()}
        if not positions:
            return Seen(0, 0, 0)
        rows = self._monitoring.predictions(min(one.seq for one in positions.values()), self._read_rows)
        read_to = rows[-1].seq if rows else 0
        outcomes, outcomes_to = self._monitoring.outcomes(
            min(one.outcome for one in positions.values()), self._read_rows
        )
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
        now_ms = self._now_ms()
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
            if now_ms - self._failed_at.get(model_id, -_RETRY_FAILED_MS) < _RETRY_FAILED_MS:
                continue
            try:
                watch = self._advance(
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
            if watch is None:
                continue
            counted += len(rows_of[model_id])
            judged += len(outcomes_of[model_id])
            figures += watch.figures
            watch.begin()
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
        if _is_news(watch.state, standing.ended_job):
            return True
        is_left = any(self._has_left(watch, version) for version in watch.cases.versions)
        return is_left or watch.cases.is_alert_due(now_ms, self._group_ms)

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
        self._champions.clear()
        self._answering.clear()
        for model_id, of_model in versions.items():
            active = [version for version in of_model.values() if version.is_active]
            routing = routings.get(model_id) or default_routing(active)
            arms = routing.arms if routing is not None else ()
            champions = [arm.version for arm in arms if arm.role is Role.CHAMPION]
            self._champions[model_id] = champions[0] if champions else None
            self._answering[model_id] = {arm.version for arm in arms}
        self._versions = versions
        self._revision = revision

    def _has_left(self, watch: _Watch, version: str) -> bool:
        return version not in self._answering.get(watch.model_id, ())

    def _load(self, model_id: str, position: LogPosition) -> _Watch | None:
        """The model as it was left; None when another monitor has just moved it."""
        found, stored = self._monitoring.state(model_id)
        if found != position:
            return None
        state = msgspec.msgpack.decode(stored, type=ModelState) if stored else ModelState()
        unresolved, _ = self._monitoring.incidents(IncidentQuery(model_id, unresolved=True, limit=1000))
        return _Watch(model_id, position, state, Casebook(model_id, unresolved, state.cases))

    def _version(self, watch: _Watch, version: str) -> tuple[_Version, VersionState]:
        state = watch.state.versions.setdefault(version, VersionState())
        held = watch.versions.get(version)
        if held is None:
            held = _Version(self._versions[watch.model_id][version])
            counting = held.counting
            if counting is not None:
                for batch in self._monitoring.batches(watch.model_id, version):
                    counting.add_batch(counting.counter.read(batch.counts), watch.settings)
                if state.counts:
                    counting.counts = counting.counter.read(state.counts)
            if state.rows:
                wanted = min(state.rows, _REPORT_ROWS)
                held.recent.extend(
                    self._monitoring.latest(watch.model_id, version, wanted, until_seq=watch.position.seq)
                )
            watch.versions[version] = held
        return held, state

    def _advance(
        self,
        model_id: str,
        standing: Standing,
        now: LogPosition,
        rows: Sequence[WatchedPrediction],
        outcomes: Sequence[WatchedOutcome],
        now_ms: int,
    ) -> _Watch | None:
        """The model after a commit; None when another monitor was faster."""
        watch = self._watches.get(model_id)
        if watch is None or watch.position != standing.position:
            watch = self._load(model_id, standing.position)
            if watch is None:
                return None
        # Until the commit what is in memory is ahead of what is stored.
        self._watches.pop(model_id, None)
        watch.settings = self._monitoring.settings(model_id)
        watch.champion = self._champions.get(model_id)
        self._see_job(watch, standing.ended_job, now_ms)
        self._end_left(watch, now_ms)
        by_version = _by_version(rows)
        for version, of_version in by_version.items():
            self._count(watch, version, of_version, now_ms)
        told = _by_version(outcomes)
        for version, of_outcomes in told.items():
            self._judge(watch, version, of_outcomes, now_ms)
        for version in by_version | told:
            self._consider(watch, version, now_ms)
        if standing.check_requested_at_ms is not None:
            self._report_now(watch, now_ms)
        for version, held in watch.versions.items():
            if held.counting is not None:
                watch.state.versions[version].counts = held.counting.counts.to_json()
        alert = watch.cases.alert(now_ms, self._group_ms)
        step = MonitorStep(
            model_id=model_id,
            was=standing.position,
            now=now,
            state=msgspec.msgpack.encode(watch.state),
            at_ms=now_ms,
            batches=tuple(watch.batches),
            reports=tuple(watch.reports),
            opened=tuple(watch.cases.opened.values()),
            changed=tuple(watch.cases.changed.values()),
            alert=alert,
            retrain=watch.retrain,
            answers_check=standing.check_requested_at_ms,
        )
        if not self._monitoring.commit(step):
            return None
        watch.position = now
        self._watches[model_id] = watch
        self._passed.pop(model_id, None)
        return watch

    def _end_left(self, watch: _Watch, now_ms: int) -> None:
        """Ends the incidents of versions that answer no more."""
        for version in watch.cases.versions:
            if self._has_left(watch, version):
                why = f"{watch.champion or 'no version'} answers now"
                for incident in watch.cases.unresolved(version).values():
                    self._close(watch, incident, why, now_ms)

    # Counting and checking batches.

    def _count(self, watch: _Watch, version: str, rows: Sequence[WatchedPrediction], now_ms: int) -> None:
        held, state = self._version(watch, version)
        counting = held.counting
        if counting is None:
            return
        at = 0
        while at < len(rows):
            part = rows[at : at + max(1, watch.settings.batch_rows - state.rows)]
            at += len(part)
            if not state.rows:
                state.first_seq, state.started_at_ms = part[0].seq, part[0].created_at_ms
            columns, absent, outputs = _columns(held, part)
            counting.counts += counting.counter.count(
                columns, absent=absent, outputs=outputs, task=held.metadata.task
            )
            held.recent.extend(part)
            state.rows += len(part)
            if state.rows >= watch.settings.batch_rows:
                self._end_batch(watch, version, counting, part[-1], now_ms)

    def _end_batch(
        self, watch: _Watch, version: str, counting: _Counting, last: WatchedPrediction, now_ms: int
    ) -> None:
        held, state = self._version(watch, version)
        watch.batches.append(
            CountedBatch(
                version,
                state.number,
                state.rows,
                state.first_seq,
                last.seq,
                state.started_at_ms,
                last.created_at_ms,
                counting.counts.to_json(),
            )
        )
        violations = counting.add_batch(counting.counts, watch.settings)
        self._see_violations(watch, version, violations, now_ms)
        self._check(watch, version, counting, now_ms)
        counting.counts = counting.counter.zero()
        held.recent.clear()
        state.number += 1
        state.rows = 0

    def _see_violations(
        self, watch: _Watch, version: str, violations: Sequence[SchemaViolation], now_ms: int
    ) -> None:
        _, state = self._version(watch, version)
        seen = set()
        for one in violations:
            cause = f"schema:{one.feature}:{one.kind}"
            seen.add(cause)
            severity = Severity.CRITICAL if one.explains_drift else Severity.WARNING
            watch.cases.saw(
                version, IncidentKind.SCHEMA, cause, severity, _say_violation(one), _facts(one), now_ms
            )
        for over in watch.cases.missed(version, [IncidentKind.SCHEMA], seen, "the values are back", now_ms):
            self._mend(watch, over, now_ms)
        is_broken = any(one.explains_drift for one in violations)
        if is_broken and (not state.broken or state.broken[-1][1] is not None):
            state.broken = [*state.broken, (state.started_at_ms, None)][-_MOST_BROKEN_PERIODS:]

    def _check(self, watch: _Watch, version: str, counting: _Counting, now_ms: int) -> None:
        """What the batch that was just ended means, together with those before it."""
        held, state = self._version(watch, version)
        settings = watch.settings
        rows = list(held.recent)
        broken = frozenset[str]().union(*counting.broken)
        check = counting.check(settings)
        state.score_moved = check.score_moved and not broken
        report: DriftReport | None = None
        if self._is_classic(settings):
            report = self._describe(held, counting, rows, settings)
            alarms: tuple[FeatureAlarm, ...] = classic_alarms(report)
        else:
            alarms = tuple(one for one in check.alarms if not one.is_advisory)
        # What the model makes of broken values is no news either.
        silent = broken | {SCORE, RESULT} if broken else broken
        unexplained = [one for one in alarms if one.feature not in silent]
        self._see_drift(watch, version, unexplained, check, now_ms)
        estimate = None
        if not broken:
            columns, _, outputs = _columns(held, rows)
            estimate = estimate_performance(counting.baseline, held.metadata.task, outputs, columns)
        self._see_estimate(watch, version, counting.baseline, estimate, now_ms)
        watch.figures.append(Figures(watch.model_id, version, check.distances, None, estimate))
        drifted = tuple(sorted({one.feature for one in unexplained}))
        if drifted != state.drifted or now_ms - state.drift_reported_at_ms >= _REPORT_EVERY_MS:
            report = report or self._describe(held, counting, rows, settings)
            self._add_drift_report(watch, version, report, check, now_ms)
        state.drifted = drifted

    def _is_classic(self, settings: MonitorSettings) -> bool:
        return (settings.policy or self._policy) is DriftPolicy.CLASSIC

    def _see_drift(
        self, watch: _Watch, version: str, alarms: Sequence[FeatureAlarm], check: DriftCheck, now_ms: int
    ) -> None:
        by_feature: dict[str, list[FeatureAlarm]] = {}
        for one in alarms:
            by_feature.setdefault(one.feature, []).append(one)
        seen = set()
        for feature, of_feature in by_feature.items():
            is_missing = all(one.rule == "missing" for one in of_feature)
            cause = f"{'missing' if is_missing else 'drift'}:{feature}"
            seen.add(cause)
            worst = max(of_feature, key=lambda one: one.distance)
            evidence = {"alarms": [_facts(one) for one in of_feature], "rows": check.rows}
            summary = _say_alarm(worst)
            watch.cases.saw(version, IncidentKind.DRIFT, cause, Severity.WARNING, summary, evidence, now_ms)
        watch.cases.missed(version, [IncidentKind.DRIFT], seen, "the stream is back", now_ms)

    def _see_estimate(
        self, watch: _Watch, version: str, baseline: Baseline, estimate: Estimate | None, now_ms: int
    ) -> None:
        _, state = self._version(watch, version)
        before, state.estimate = state.estimate, estimate
        # The outcomes' own incident ends by outcomes.
        seen = {"quality:outcomes"}
        state.is_drop_confirmed = False
        if before is not None and estimate is not None and is_drop_confirmed(baseline, before, estimate):
            state.is_drop_confirmed = True
            seen.add("quality:estimate")
            reference = baseline.estimate
            summary = (
                f"{estimate.metric} is estimated at {estimate.value:.3f}"
                + (f", {reference.value:.3f} in the reference" if reference is not None else "")
                + "; no outcomes were needed for that, and no concept drift is assumed"
            )
            evidence = {"estimate": _facts(estimate), "before": _facts(before)}
            watch.cases.saw(
                version, IncidentKind.QUALITY, "quality:estimate", Severity.WARNING, summary, evidence, now_ms
            )
        watch.cases.missed(version, [IncidentKind.QUALITY], seen, "the estimate is back", now_ms)

    # Outcomes.

    def _judge(self, watch: _Watch, version: str, outcomes: Sequence[WatchedOutcome], now_ms: int) -> None:
        held, state = self._version(watch, version)
        task = held.metadata.task
        state.fresh_outcomes += len(outcomes)
        usable = [
            Judged(one.result, one.confidence, one.probabilities, one.outcome)
            for one in outcomes
            if _is_usable(task, one) and not _is_within(state.broken, one.created_at_ms)
        ]
        if not usable:
            return
        p0 = self._objective(held, watch.settings)
        reference = _quality_of(held.metadata)
        tolerance = None if reference is None else reference.tolerance
        if p0 is not None and (task is not Task.REGRESSION or tolerance is not None):
            if state.detector is None or state.detector.p0 != p0:
                state.detector = LossDetector.start(p0)
            wrong = losses(task, _outputs(usable), [one.outcome for one in usable], tolerance)
            state.detector = state.detector.update(wrong)
        window = min(watch.settings.batch_rows, _QUALITY_ROWS)
        while usable:
            room = window - len(state.judged)
            state.judged += usable[:room]
            usable = usable[room:]
            if len(state.judged) >= window:
                self._end_window(watch, version, now_ms)
                state.judged = []
        if state.detector is not None and state.detector.is_alarm:
            detector = state.detector
            summary = (
                f"answers are wrong more often than the {detector.p0:.1%} that are held to, "
                f"by {detector.outcomes} outcomes"
            )
            evidence = {
                "objective": detector.p0,
                "evidence": min(detector.evidence, 1e12),
                "outcomes": detector.outcomes,
                "alarmed_at": detector.alarmed_at,
            }
            watch.cases.saw(
                version,
                IncidentKind.QUALITY,
                "quality:outcomes",
                Severity.CRITICAL,
                summary,
                evidence,
                now_ms,
            )

    def _end_window(self, watch: _Watch, version: str, now_ms: int) -> None:
        held, state = self._version(watch, version)
        quality = self._measure(held, state)
        self._add_performance_report(watch, version, quality, now_ms)
        watch.figures.append(Figures(watch.model_id, version, {}, quality, None))
        p0 = self._objective(held, watch.settings)
        is_good = quality.n >= FEWEST_OUTCOMES and p0 is not None and quality.error_rate <= p0
        state.good_windows = state.good_windows + 1 if is_good else 0
        known = watch.cases.unresolved(version).get("quality:outcomes")
        if known is not None and state.good_windows >= 2:
            self._close(watch, known, "two windows of outcomes are good again", now_ms)

    def _measure(self, held: _Version, state: VersionState) -> Quality:
        metadata = held.metadata
        reference = _quality_of(metadata)
        return measure_quality(
            metadata.task,
            _outputs(state.judged),
            [one.outcome for one in state.judged],
            class_labels=metadata.class_labels,
            tolerance=None if reference is None else reference.tolerance,
        )

    def _objective(self, held: _Version, settings: MonitorSettings) -> float | None:
        if settings.error_rate is not None:
            return settings.error_rate
        quality = _quality_of(held.metadata)
        return None if quality is None else objective(quality)

    # Incidents that end, and what that means for what was counted.

    def _close(self, watch: _Watch, incident: Incident, why: str, now_ms: int) -> None:
        over = watch.cases.resolve(incident, why, now_ms)
        if incident.kind is IncidentKind.SCHEMA:
            self._mend(watch, over, now_ms)
        elif incident.cause == "quality:outcomes":
            watch.state.versions[incident.model_version].detector = None

    def _mend(self, watch: _Watch, over: Incident, now_ms: int) -> None:
        """The data is whole again: what outcomes said of the broken answers is forgotten."""
        version = over.model_version
        if _broken_features(watch.cases, version) or over.evidence.get("kind") == "range":
            return
        state = watch.state.versions[version]
        if state.broken and state.broken[-1][1] is None:
            state.broken[-1] = (state.broken[-1][0], now_ms)
        state.detector = None
        known = watch.cases.unresolved(version).get("quality:outcomes")
        if known is not None:
            watch.cases.resolve(known, "the data was to blame, and it is whole again", now_ms)

    # Retraining.

    def _consider(self, watch: _Watch, version: str, now_ms: int) -> None:
        """Asks for a retraining of the champion where there is evidence that it suffers."""
        if version != watch.champion or watch.retrain is not None:
            return
        held, state = self._version(watch, version)
        settings = watch.settings
        drift = watch.cases.unresolved(version, IncidentKind.DRIFT)
        evidence = Evidence(
            drifted=tuple(drift),
            missing=tuple(cause for cause in drift if cause.startswith("missing:")),
            schema=_broken_features(watch.cases, version),
            is_drop_confirmed=state.is_drop_confirmed,
            is_outcome_alarm=state.detector is not None and state.detector.is_alarm,
            score_moved=state.score_moved,
        )
        is_classic = self._is_classic(settings)
        reason = "a Kolmogorov-Smirnov p below 0.05" if is_classic and drift else wants_retraining(evidence)
        if reason is None or settings.healing_paused:
            return
        if not is_classic and state.fresh_outcomes < settings.min_outcomes:
            return
        latest_ms, requests = self._monitoring.retrain_requests(watch.model_id, now_ms - _BUDGET_PERIOD_MS)
        if may_request(now_ms, latest_ms, settings.cooldown_s * 1000, requests, settings.budget) is not None:
            return
        outcomes = state.detector.outcomes if state.detector is not None else 0
        baseline_id = msgspec.json.encode(held.metadata.baseline).decode()
        watch.retrain = RetrainJob(
            id=request_id(watch.model_id, version, baseline_id, (state.number, outcomes)),
            model_id=watch.model_id,
            model_version=version,
            reason=reason,
            evidence=_facts(evidence)
            | {
                "incidents": [one.id for one in watch.cases.unresolved(version).values()],
                "fresh_outcomes": state.fresh_outcomes,
                "estimate": None if state.estimate is None else _facts(state.estimate),
            },
            status=JobStatus.REQUESTED,
            requested_at_ms=now_ms,
            updated_at_ms=now_ms,
        )
        state.fresh_outcomes = 0
        watch.cases.tell(version, Severity.CRITICAL, f"retraining was asked for: {reason}")

    def _see_job(self, watch: _Watch, job: EndedJob | None, now_ms: int) -> None:
        """A retraining that came to nothing is an incident, until one comes to something or the version is gone."""
        if job is None or not _is_news(watch.state, job):
            return
        watch.state.told_job_id = job.id
        version = job.model_version
        if job.status is JobStatus.REGISTERED:
            text = f"{job.new_version} is trained and registered: compare it, and promote it or not"
            watch.cases.tell(version, Severity.WARNING, text)
            if (known := watch.cases.unresolved(version).get("retraining")) is not None:
                watch.cases.resolve(known, f"{job.new_version} is registered", now_ms)
            return
        severity = Severity.CRITICAL if job.status is JobStatus.FAILED else Severity.WARNING
        summary = f"the retraining came to nothing ({job.status}): {job.error}"
        evidence = {"job_id": job.id, "status": job.status}
        watch.cases.saw(version, IncidentKind.RETRAINING, "retraining", severity, summary, evidence, now_ms)

    # Reports.

    def _describe(
        self,
        held: _Version,
        counting: _Counting,
        rows: Sequence[WatchedPrediction],
        settings: MonitorSettings,
    ) -> DriftReport:
        if counting.reference is None:
            counting.reference = load_reference(self._artifacts, held.registered)
        return _describe(held, counting.baseline, counting.reference, rows, settings)

    def _report_now(self, watch: _Watch, now_ms: int) -> None:
        """The reports that somebody has asked for, of the versions that answer."""
        settings = watch.settings
        for version in sorted(self._answering.get(watch.model_id, ())):
            held, state = self._version(watch, version)
            if held.counting is not None:
                rows = list(held.recent)
                if len(rows) < settings.batch_rows:
                    wanted = min(settings.batch_rows, _REPORT_ROWS)
                    rows = self._monitoring.latest(watch.model_id, version, wanted)
                report = self._describe(held, held.counting, rows, settings)
                self._add_drift_report(watch, version, report, held.counting.check(settings), now_ms)
            if state.judged:
                self._add_performance_report(watch, version, self._measure(held, state), now_ms)

    def _add_drift_report(
        self, watch: _Watch, version: str, report: DriftReport, check: DriftCheck, now_ms: int
    ) -> None:
        state = watch.state.versions[version]
        state.drift_reported_at_ms = now_ms
        content = _facts(report) | {"check": _facts(check), "batches": state.number + 1}
        watch.reports.append(
            MonitorReport(new_id(), watch.model_id, version, "drift", now_ms, report.rows, content)
        )

    def _add_performance_report(self, watch: _Watch, version: str, quality: Quality, now_ms: int) -> None:
        held, state = self._version(watch, version)
        reference = _quality_of(held.metadata)
        detector = state.detector
        content = {
            "state": "measured" if quality.n >= FEWEST_OUTCOMES else "insufficient data",
            "quality": _facts(quality),
            "reference": None if reference is None else _facts(reference),
            "objective": self._objective(held, watch.settings),
            "evidence": None if detector is None else min(detector.evidence, 1e12),
            "is_alarm": detector is not None and detector.is_alarm,
            "estimate": None if state.estimate is None else _facts(state.estimate),
        }
        watch.reports.append(
            MonitorReport(new_id(), watch.model_id, version, "performance", now_ms, quality.n, content)
        )


def describe_drift(
    artifacts: ArtifactStore,
    version: ModelVersion,
    rows: Sequence[WatchedPrediction],
    settings: MonitorSettings,
) -> DriftReport | None:
    """The rows beside the version's reference, for people; None for a version without one."""
    held = _Version(version)
    if held.counting is None:
        return None
    return _describe(held, held.counting.baseline, load_reference(artifacts, version), rows, settings)


def _describe(
    held: _Version,
    baseline: Baseline,
    reference: dict[str, NDArray[np.float64]] | None,
    rows: Sequence[WatchedPrediction],
    settings: MonitorSettings,
) -> DriftReport:
    columns, absent, outputs = _columns(held, rows)
    return drift_report(
        baseline,
        reference,
        columns,
        absent=absent,
        outputs=outputs,
        task=held.metadata.task,
        settings=_alarm_settings(settings),
    )


def load_reference(artifacts: ArtifactStore, version: ModelVersion) -> dict[str, NDArray[np.float64]] | None:
    """The sorted columns that the version was registered with; None where there are none, or they are lost."""
    baseline = version.metadata.baseline
    if baseline is None or baseline.reference_uri is None or baseline.reference_sha256 is None:
        return None
    try:
        return read_reference(artifacts.fetch(baseline.reference_uri, baseline.reference_sha256))
    except ModelLoadFailed as exc:
        log.warning("reports on %s %s compare cells only: %s", version.model_id, version.version, exc.message)
        return None


def _columns(
    held: _Version, rows: Sequence[WatchedPrediction]
) -> tuple[dict[str, Any], dict[str, NDArray[np.bool_]], Outputs]:
    """The rows as columns, which of their values a default has filled in, and the model's answers."""
    columns: dict[str, Any] = dict(held.row_format.unpack_columns([row.inputs for row in rows]))
    absent: dict[str, NDArray[np.bool_]] = {}
    for i, row in enumerate(rows):
        sources = row.feature_sources
        if isinstance(sources, str):
            sources = dict.fromkeys(columns, sources) if sources in _ABSENT else {}
        for name, source in sources.items():
            if source not in _ABSENT:
                continue
            if name not in absent:
                absent[name] = np.zeros(len(rows), dtype=np.bool_)
            absent[name][i] = True
    return columns, absent, _outputs(rows)


def _outputs(rows: "Sequence[WatchedPrediction] | Sequence[Judged]") -> Outputs:
    confidences = [row.confidence for row in rows]
    probabilities = [row.probabilities for row in rows]
    return Outputs(
        [row.result for row in rows],
        None if None in confidences else [one for one in confidences if one is not None],
        None if None in probabilities else [one for one in probabilities if one is not None],
    )


def _is_news(state: ModelState, job: EndedJob | None) -> bool:
    return job is not None and job.id != state.told_job_id


def _by_version(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.model_version, []).append(row)
    return found


def _is_usable(task: Task, told: WatchedOutcome) -> bool:
    """Whether answer and outcome can be compared: numbers for a regression, one label each otherwise."""
    pair = (told.result, told.outcome)
    if task is Task.REGRESSION:
        return all(isinstance(one, int | float) and not isinstance(one, bool) for one in pair)
    return all(isinstance(one, str | int | float | bool) for one in pair)


def _is_within(periods: Sequence[tuple[int, int | None]], at_ms: int) -> bool:
    return any(start <= at_ms and (end is None or at_ms <= end) for start, end in periods)


def _broken_features(cases: Casebook, version: str) -> tuple[str, ...]:
    """The causes of open schema incidents that explain whatever else is seen."""
    found = cases.unresolved(version, IncidentKind.SCHEMA)
    return tuple(cause for cause in found if not cause.endswith(":range"))


def _quality_of(metadata: Metadata) -> Quality | None:
    return None if metadata.baseline is None else metadata.baseline.quality


def _alarm_settings(settings: MonitorSettings) -> AlarmSettings:
    return AlarmSettings(
        settings.arl, settings.batch_rows, settings.effect, settings.effects, settings.left_out
    )


def _facts(struct: Any) -> dict[str, Any]:
    facts: dict[str, Any] = msgspec.to_builtins(struct)
    return facts


def _name(feature: str) -> str:
    return {SCORE: "the model's scores", RESULT: "the model's answers"}.get(feature, feature)


def _say_alarm(alarm: FeatureAlarm) -> str:
    what = f"{_name(alarm.feature)}"
    if alarm.rule == "missing":
        return f"{what}: missing values changed by {alarm.distance:.1%} of {alarm.rows} rows"
    if alarm.level is not None:
        return f"{what}: the share of {alarm.level!r} changed by {alarm.distance:.1%}, {alarm.rows} rows"
    where = f", {alarm.direction}" if alarm.direction else ""
    return f"{what} drifted{where}: distance {alarm.distance:.3f} over {alarm.rows} rows"


def _say_violation(one: SchemaViolation) -> str:
    share = f"{one.violating} of {one.rows} values"
    span = f" {one.low:g} to {one.high:g}" if one.low is not None and one.high is not None else ""
    return {
        "infinite": f"{one.feature}: {share} are infinite",
        "type": f"{one.feature}: {share} are of another type",
        "unit": f"{one.feature}: {share} lie outside of the reference's{span}; is it another unit?",
        "range": f"{one.feature}: {share} lie outside of the reference's{span}",
    }[one.kind]
