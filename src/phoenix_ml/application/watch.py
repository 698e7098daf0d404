"""One model under watch: what its predictions and outcomes mean, batch by batch, until the next commit."""

from collections import deque
from collections.abc import Collection, Sequence
from typing import Any, TypeVar

import msgspec
import numpy as np
from msgspec import Struct, structs
from numpy.typing import NDArray

from phoenix_ml.application.casebook import Casebook, CaseState
from phoenix_ml.application.comparison import (
    alarm_settings,
    columns_of,
    compare_rows,
    load_reference,
    outputs_of,
)
from phoenix_ml.application.ports import (
    ArtifactStore,
    CountedBatch,
    EndedJob,
    LogPosition,
    Monitoring,
    MonitorReport,
    WatchedOutcome,
    WatchedPrediction,
)
from phoenix_ml.application.statistics.alarm import FEWEST_ROWS, AlarmSettings, DriftAlarm, check_schema
from phoenix_ml.application.statistics.cells import CellCounter, CellCounts
from phoenix_ml.application.statistics.detector import LossDetector, objective
from phoenix_ml.application.statistics.estimation import estimate_performance, is_drop_confirmed
from phoenix_ml.application.statistics.quality import losses, measure_quality
from phoenix_ml.application.statistics.report import classic_alarms
from phoenix_ml.domain.baselines import RESULT, SCORE, Baseline, Estimate, Quality
from phoenix_ml.domain.drift import (
    DriftCheck,
    DriftReport,
    Evidence,
    FeatureAlarm,
    SchemaViolation,
    wants_retraining,
)
from phoenix_ml.domain.errors import InvalidField
from phoenix_ml.domain.healing import JobStatus, RetrainJob, may_request, request_id
from phoenix_ml.domain.ids import new_id
from phoenix_ml.domain.incidents import Incident, IncidentKind, Severity
from phoenix_ml.domain.models import Metadata, ModelVersion, Task
from phoenix_ml.domain.monitoring import DriftPolicy, MonitorSettings
from phoenix_ml.domain.rows import RowFormat

Row = TypeVar("Row", WatchedPrediction, WatchedOutcome)

MOST_BATCHES = 64
# Fewer tell nothing of quality.
FEWEST_OUTCOMES = 200
_QUALITY_ROWS = 1000
_REPORT_EVERY_MS = 60_000
# A report looks at no more rows; it is a person who reads it.
_REPORT_ROWS = 10_000
_BUDGET_PERIOD_MS = 30 * 24 * 3600 * 1000
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
    no data of these features: outcomes of predictions made then say nothing about the model. ``rows_since_alarm`` is
    how many predictions were counted since outcomes raised the alarm; batches before ``ring_from`` are of an earlier time
    in which the version answered.
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
    rows_since_alarm: int | None = None
    ring_from: int = 0
    was_answering: bool = False
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


class _Counting:
    """The counts of one version that has a baseline to count over."""

    def __init__(self, baseline: Baseline) -> None:
        self.baseline = baseline
        self.counter = CellCounter(baseline)
        self.counts = self.counter.zero()
        self.ring: deque[CellCounts] = deque(maxlen=MOST_BATCHES)
        self.reference: dict[str, NDArray[np.float64]] | None = None
        self._alarm: tuple[AlarmSettings, DriftAlarm] | None = None

    def add_batch(self, counts: CellCounts, settings: MonitorSettings) -> tuple[SchemaViolation, ...]:
        """What in the batch are no values of their features.

        They stay out of the ring, and so does what the model made of them: they would pass for drift in every window
        that they are in, or hide it, for 64 batches.
        """
        violations = self.violations(counts, settings)
        broken = {one.feature for one in violations if one.explains_drift}
        self.ring.append(self.counter.without(counts, {*broken, SCORE, RESULT}) if broken else counts)
        return violations

    def violations(self, counts: CellCounts, settings: MonitorSettings) -> tuple[SchemaViolation, ...]:
        """What in the counts are no values of their features, those left out aside."""
        found = check_schema(self.baseline, counts, settings.effect, settings.effects)
        return tuple(one for one in found if one.feature not in settings.left_out)

    def check(self, settings: MonitorSettings) -> DriftCheck:
        """The thresholds are made anew only when the settings have changed: they take longer than a check."""
        wanted = alarm_settings(settings)
        if self._alarm is None or self._alarm[0] != wanted:
            self._alarm = wanted, DriftAlarm(self.baseline, wanted)
        return self._alarm[1].check(list(self.ring))


class _Version:
    """What is kept in memory of a version; all of it comes back from the log and the registry after a restart."""

    def __init__(self, version: ModelVersion) -> None:
        self.registered = version
        self.metadata: Metadata = version.metadata
        self.row_format = RowFormat(self.metadata.columns)
        self.counting: _Counting | None = None
        self.begin_anew()
        self.recent: deque[WatchedPrediction] = deque(maxlen=_REPORT_ROWS)

    def begin_anew(self) -> None:
        """Forgets all counts."""
        if self.metadata.baseline is not None:
            self.counting = _Counting(self.metadata.baseline)


class Registered(Struct, frozen=True):
    """What the registry says of a model: its versions, the champion, and which of them answer."""

    versions: dict[str, ModelVersion] = {}
    champion: str | None = None
    answering: frozenset[str] = frozenset()


class Watch:
    """One model in memory, as of a position of the log.

    ``batches``, ``reports``, ``retrain`` and the casebook's incidents are what the next commit has to store.
    """

    def __init__(
        self,
        monitoring: Monitoring,
        artifacts: ArtifactStore,
        policy: DriftPolicy,
        model_id: str,
        position: LogPosition,
        state: ModelState,
        cases: Casebook,
    ) -> None:
        self.model_id = model_id
        self.position = position
        self.state = state
        self.cases = cases
        self._monitoring = monitoring
        self._artifacts = artifacts
        self._policy = policy
        self._versions: dict[str, _Version] = {}
        self._settings = MonitorSettings()
        self._registered = Registered()
        self.begin()

    def begin(self) -> None:
        """Forgets what the last commit has stored."""
        self.batches: list[CountedBatch] = []
        self.reports: list[MonitorReport] = []
        self.figures: list[Figures] = []
        self.retrain: RetrainJob | None = None
        self.cases.stored()

    def take(
        self,
        registered: Registered,
        rows: Sequence[WatchedPrediction],
        outcomes: Sequence[WatchedOutcome],
        ended_job: EndedJob | None,
        now_ms: int,
        *,
        is_check_requested: bool,
    ) -> None:
        """Counts what is new, and draws the conclusions."""
        self._registered = registered
        self._settings = self._monitoring.settings(self.model_id)
        self._see_job(ended_job, now_ms)
        self._end_left(now_ms)
        by_version = _by_version(rows)
        for version, of_version in by_version.items():
            self._count(version, of_version, now_ms)
        told = _by_version(outcomes)
        for version, of_outcomes in told.items():
            self._judge(version, of_outcomes, now_ms)
        for version in by_version | told:
            self._consider(version, now_ms)
        if is_check_requested:
            self._report_now(now_ms)
        for version, held in self._versions.items():
            if held.counting is not None:
                self.state.versions[version].counts = held.counting.counts.to_json()

    def is_news(self, job: EndedJob | None) -> bool:
        """Whether the job has ended since people were told of one."""
        return job is not None and job.id != self.state.told_job_id

    def has_left(self, registered: Registered) -> bool:
        """Whether a version answers no more that did."""
        return bool(self._left(registered))

    def _version(self, version: str) -> tuple[_Version, VersionState]:
        state = self.state.versions.get(version)
        if state is None:
            state = VersionState(was_answering=version in self._registered.answering)
            self.state.versions[version] = state
        held = self._versions.get(version)
        if held is None:
            held = _Version(self._registered.versions[version])
            counting = held.counting
            if counting is not None:
                try:
                    for batch in self._monitoring.batches(self.model_id, version):
                        if batch.number >= state.ring_from:
                            counting.add_batch(counting.counter.read(batch.counts), self._settings)
                    if state.counts:
                        counting.counts = counting.counter.read(state.counts)
                except InvalidField:  # counted by a release that counted otherwise: begin anew
                    state.ring_from, state.rows = state.number, 0
                    held.begin_anew()
            if state.rows:
                wanted = min(state.rows, _REPORT_ROWS)
                held.recent.extend(
                    self._monitoring.latest(self.model_id, version, wanted, until_seq=self.position.seq)
                )
            self._versions[version] = held
        return held, state

    def _end_left(self, now_ms: int) -> None:
        """Ends the incidents of versions that answer no more, and what was counted for windows to come.

        A version may be asked for by its number all the same: what is seen of it after that stands by itself.
        """
        why = f"{self._registered.champion or 'no version'} answers now"
        for version in self._left(self._registered):
            for incident in self.cases.unresolved(version).values():
                self._close(incident, why, now_ms)
            if (state := self.state.versions.get(version)) is not None:
                state.ring_from, state.rows, state.counts = state.number, 0, b""
                self._versions.pop(version, None)
        for version, state in self.state.versions.items():
            state.was_answering = version in self._registered.answering

    def _left(self, registered: Registered) -> list[str]:
        found = []
        for version in (self.cases.versions | self.state.versions.keys()) - registered.answering:
            state = self.state.versions.get(version)
            is_gone = not registered.versions[version].is_active and version in self.cases.versions
            if state is None or state.was_answering or is_gone:
                found.append(version)
        return found

    # Counting and checking batches.

    def _count(self, version: str, rows: Sequence[WatchedPrediction], now_ms: int) -> None:
        held, state = self._version(version)
        counting = held.counting
        if counting is None:
            return
        at = 0
        while at < len(rows):
            part = rows[at : at + max(1, self._settings.batch_rows - state.rows)]
            at += len(part)
            if not state.rows:
                state.first_seq, state.started_at_ms = part[0].seq, part[0].created_at_ms
            columns, absent, outputs = columns_of(held.row_format, part)
            counting.counts += counting.counter.count(
                columns, absent=absent, outputs=outputs, task=held.metadata.task
            )
            held.recent.extend(part)
            state.rows += len(part)
            if state.rows_since_alarm is not None:
                state.rows_since_alarm += len(part)
            if state.rows >= self._settings.batch_rows:
                self._end_batch(version, counting, part[-1], now_ms)

    def _end_batch(self, version: str, counting: _Counting, last: WatchedPrediction, now_ms: int) -> None:
        held, state = self._version(version)
        self.batches.append(
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
        violations = counting.add_batch(counting.counts, self._settings)
        self._see_violations(version, violations, now_ms)
        self._check(version, counting, violations, now_ms)
        counting.counts = counting.counter.zero()
        held.recent.clear()
        state.number += 1
        state.rows = 0

    def _see_violations(self, version: str, violations: Sequence[SchemaViolation], now_ms: int) -> None:
        _, state = self._version(version)
        seen = set()
        for one in violations:
            cause = f"schema:{one.feature}:{one.kind}"
            seen.add(cause)
            severity = Severity.CRITICAL if one.explains_drift else Severity.WARNING
            evidence = _facts(one) | {"explains_drift": one.explains_drift}
            self.cases.saw(version, IncidentKind.SCHEMA, cause, severity, one.summary, evidence, now_ms)
        self.cases.missed(version, [IncidentKind.SCHEMA], seen, "the values are back", now_ms)
        is_broken = any(one.explains_drift for one in violations)
        if is_broken and (not state.broken or state.broken[-1][1] is not None):
            state.broken = [*state.broken, (state.started_at_ms, None)][-_MOST_BROKEN_PERIODS:]
        self._mend(version, now_ms)

    def _check(
        self, version: str, counting: _Counting, violations: Sequence[SchemaViolation], now_ms: int
    ) -> None:
        """What the batch that was just ended means, together with those before it."""
        held, state = self._version(version)
        settings = self._settings
        rows = list(held.recent)
        broken = {one.feature for one in violations if one.explains_drift}
        # What the model makes of broken values is no news either.
        silent = broken | {SCORE, RESULT} if broken else broken
        check = counting.check(settings)
        state.score_moved = check.score_moved
        report: DriftReport | None = None
        if self._is_classic(settings):
            report = self._compare(held, counting, rows)
            alarms: tuple[FeatureAlarm, ...] = classic_alarms(report)
        else:
            alarms = tuple(one for one in check.alarms if not one.is_advisory)
        unexplained = [one for one in alarms if one.feature not in silent]
        self._see_drift(version, unexplained, silent, check, now_ms)
        estimate = None
        if not broken:
            columns, _, outputs = columns_of(held.row_format, rows)
            estimate = estimate_performance(counting.baseline, held.metadata.task, outputs, columns)
        self._see_estimate(version, counting.baseline, estimate, now_ms)
        self.figures.append(Figures(self.model_id, version, check.distances, None, estimate))
        drifted = tuple(sorted({one.feature for one in unexplained}))
        if drifted != state.drifted or now_ms - state.drift_reported_at_ms >= _REPORT_EVERY_MS:
            report = report or self._compare(held, counting, rows)
            self._add_drift_report(version, report, check, now_ms)
        state.drifted = drifted

    def _is_classic(self, settings: MonitorSettings) -> bool:
        return (settings.policy or self._policy) is DriftPolicy.CLASSIC

    def _see_drift(
        self,
        version: str,
        alarms: Sequence[FeatureAlarm],
        silent: Collection[str],
        check: DriftCheck,
        now_ms: int,
    ) -> None:
        # Missing values are a feature of their own: they may change with the others, or without.
        by_cause: dict[str, list[FeatureAlarm]] = {}
        for one in alarms:
            rule = "missing" if one.rule == "missing" else "drift"
            by_cause.setdefault(f"{rule}:{one.feature}", []).append(one)
        for cause, found in by_cause.items():
            worst = max(found, key=lambda one: one.distance)
            evidence = {"alarms": [_facts(one) for one in found], "rows": check.rows}
            summary = worst.summary
            self.cases.saw(version, IncidentKind.DRIFT, cause, Severity.WARNING, summary, evidence, now_ms)
        # Of a feature whose values are none, nobody can say that it is back.
        unknown = {f"{rule}:{feature}" for rule in ("missing", "drift") for feature in silent}
        self.cases.missed(
            version, [IncidentKind.DRIFT], by_cause.keys() | unknown, "the stream is back", now_ms
        )

    def _see_estimate(self, version: str, baseline: Baseline, estimate: Estimate | None, now_ms: int) -> None:
        _, state = self._version(version)
        before, state.estimate = state.estimate, estimate
        state.is_drop_confirmed = False
        if estimate is None:
            return
        # The outcomes' own incident ends by outcomes.
        seen = {"quality:outcomes"}
        if before is not None and is_drop_confirmed(baseline, before, estimate):
            state.is_drop_confirmed = True
            seen.add("quality:estimate")
            reference = baseline.estimate
            summary = (
                f"{estimate.metric} is estimated at {estimate.value:.3f}"
                + (f", {reference.value:.3f} in the reference" if reference is not None else "")
                + "; no outcomes were needed for that, and no concept drift is assumed"
            )
            evidence = {"estimate": _facts(estimate), "before": _facts(before)}
            self.cases.saw(
                version, IncidentKind.QUALITY, "quality:estimate", Severity.WARNING, summary, evidence, now_ms
            )
        self.cases.missed(version, [IncidentKind.QUALITY], seen, "the estimate is back", now_ms)

    # Outcomes.

    def _judge(self, version: str, outcomes: Sequence[WatchedOutcome], now_ms: int) -> None:
        held, state = self._version(version)
        task = held.metadata.task
        usable = [
            Judged(one.result, one.confidence, one.probabilities, one.outcome)
            for one in outcomes
            if _is_usable(task, one) and not _is_within(state.broken, one.created_at_ms)
        ]
        state.fresh_outcomes += len(usable)
        if not usable:
            return
        p0 = self._objective(held, self._settings)
        tolerance = self._tolerance(held)
        if p0 is not None:
            if state.detector is None or state.detector.p0 != p0:
                state.detector, state.rows_since_alarm = LossDetector.start(p0), None
            wrong = losses(task, outputs_of(usable), [one.outcome for one in usable], tolerance)
            state.detector = state.detector.update(wrong)
        window = min(self._settings.batch_rows, _QUALITY_ROWS)
        while usable:
            room = window - len(state.judged)
            state.judged += usable[:room]
            usable = usable[room:]
            if len(state.judged) >= window:
                self._end_window(version, now_ms)
                state.judged = []
        if state.detector is not None and state.detector.is_alarm:
            detector = state.detector
            if state.rows_since_alarm is None:
                state.rows_since_alarm = 0
            summary = (
                f"answers are wrong more often than the objective of {detector.p0:.1%}, "
                f"by {detector.outcomes} outcomes"
            )
            evidence = {
                "objective": detector.p0,
                "evidence": min(detector.evidence, 1e12),
                "outcomes": detector.outcomes,
                "alarmed_at": detector.alarmed_at,
            }
            self.cases.saw(
                version,
                IncidentKind.QUALITY,
                "quality:outcomes",
                Severity.CRITICAL,
                summary,
                evidence,
                now_ms,
            )

    def _end_window(self, version: str, now_ms: int) -> None:
        held, state = self._version(version)
        quality = self._measure(held, state)
        self._add_performance_report(version, quality, now_ms)
        self.figures.append(Figures(self.model_id, version, {}, quality, None))
        p0 = self._objective(held, self._settings)
        is_good = quality.n >= FEWEST_OUTCOMES and p0 is not None and quality.error_rate <= p0
        state.good_windows = state.good_windows + 1 if is_good else 0
        known = self.cases.unresolved(version).get("quality:outcomes")
        if known is not None and state.good_windows >= 2:
            self._close(known, "two windows of outcomes are good again", now_ms)

    def _measure(self, held: _Version, state: VersionState) -> Quality:
        metadata = held.metadata
        return measure_quality(
            metadata.task,
            outputs_of(state.judged),
            [one.outcome for one in state.judged],
            class_labels=metadata.class_labels,
            tolerance=self._tolerance(held),
        )

    def _tolerance(self, held: _Version) -> float | None:
        """The error beyond which a regression's answer is wrong."""
        if self._settings.tolerance is not None:
            return self._settings.tolerance
        quality = _quality_of(held.metadata)
        return None if quality is None else quality.tolerance

    def _objective(self, held: _Version, settings: MonitorSettings) -> float | None:
        if held.metadata.task is Task.REGRESSION and self._tolerance(held) is None:
            return None
        if settings.error_rate is not None:
            return settings.error_rate
        quality = _quality_of(held.metadata)
        return None if quality is None else objective(quality)

    # Incidents that end, and what that means for what was counted.

    def _close(self, incident: Incident, why: str, now_ms: int) -> None:
        self.cases.resolve(incident, why, now_ms)
        if incident.kind is IncidentKind.SCHEMA:
            self._mend(incident.model_version, now_ms)
        elif incident.cause == "quality:outcomes":
            self._forget_outcomes(incident.model_version)

    def _mend(self, version: str, now_ms: int) -> None:
        """Where the data is whole again, what outcomes said of the broken answers is forgotten."""
        state = self.state.versions[version]
        if not state.broken or state.broken[-1][1] is not None or _broken_features(self.cases, version):
            return
        state.broken[-1] = (state.broken[-1][0], now_ms)
        self._forget_outcomes(version)
        known = self.cases.unresolved(version).get("quality:outcomes")
        if known is not None:
            self.cases.resolve(known, "the data was to blame, and it is whole again", now_ms)

    def _forget_outcomes(self, version: str) -> None:
        state = self.state.versions[version]
        state.detector = None
        state.rows_since_alarm = None

    # Retraining.

    def _consider(self, version: str, now_ms: int) -> None:
        """Asks for a retraining of the champion where there is evidence that it suffers."""
        if version != self._registered.champion or self.retrain is not None:
            return
        held, state = self._version(version)
        settings = self._settings
        drift = self.cases.unresolved(version, IncidentKind.DRIFT)
        # Where outcomes come at once they tell of broken data before there are enough rows to see that it is.
        is_too_early = held.counting is not None and (state.rows_since_alarm or 0) < FEWEST_ROWS
        evidence = Evidence(
            drifted=tuple(drift),
            missing=tuple(cause for cause in drift if cause.startswith("missing:")),
            schema=_broken_features(self.cases, version),
            is_drop_confirmed=state.is_drop_confirmed,
            is_outcome_alarm=state.detector is not None and state.detector.is_alarm and not is_too_early,
            score_moved=state.score_moved,
        )
        is_classic = self._is_classic(settings)
        reason = wants_retraining(evidence)
        if is_classic and drift and not evidence.schema:
            reason = "a Kolmogorov-Smirnov p below 0.05"
        if reason is None or settings.healing_paused:
            return
        if not is_classic and state.fresh_outcomes < settings.min_outcomes:
            return
        latest_ms, requests = self._monitoring.retrain_requests(self.model_id, now_ms - _BUDGET_PERIOD_MS)
        if may_request(now_ms, latest_ms, settings.cooldown_s * 1000, requests, settings.budget) is not None:
            return
        if self._newest_are_broken(version, held):
            return
        outcomes = state.detector.outcomes if state.detector is not None else 0
        baseline_id = msgspec.json.encode(held.metadata.baseline).decode()
        self.retrain = RetrainJob(
            id=request_id(self.model_id, version, baseline_id, (state.number, outcomes)),
            model_id=self.model_id,
            model_version=version,
            reason=reason,
            evidence=_facts(evidence)
            | {
                "incidents": [one.id for one in self.cases.unresolved(version).values()],
                "fresh_outcomes": state.fresh_outcomes,
                "estimate": None if state.estimate is None else _facts(state.estimate),
            },
            status=JobStatus.REQUESTED,
            requested_at_ms=now_ms,
            updated_at_ms=now_ms,
        )
        state.fresh_outcomes = 0
        self.cases.tell(version, Severity.CRITICAL, f"retraining was asked for: {reason}")

    def _newest_are_broken(self, version: str, held: _Version) -> bool:
        """Whether the newest rows have values that are none, which the open batch has not told yet."""
        if held.counting is None:
            return False
        rows = self._monitoring.latest(self.model_id, version, FEWEST_ROWS)
        columns, absent, _ = columns_of(held.row_format, rows)
        counts = held.counting.counter.count(columns, absent=absent)
        return any(one.explains_drift for one in held.counting.violations(counts, self._settings))

    def _see_job(self, job: EndedJob | None, now_ms: int) -> None:
        """A retraining that came to nothing is an incident, until one comes to something or the version is gone."""
        if job is None or not self.is_news(job):
            return
        self.state.told_job_id = job.id
        version = job.model_version
        if job.status is JobStatus.REGISTERED:
            text = f"{job.new_version} is trained and registered: compare it, and promote it or not"
            self.cases.tell(version, Severity.WARNING, text)
            if (known := self.cases.unresolved(version).get("retraining")) is not None:
                self.cases.resolve(known, f"{job.new_version} is registered", now_ms)
            return
        severity = Severity.CRITICAL if job.status is JobStatus.FAILED else Severity.WARNING
        if version not in self._registered.answering:
            text = (
                f"its retraining came to nothing, and {version} answers no more ({job.status}): {job.error}"
            )
            self.cases.tell(version, Severity.WARNING, text)
            return
        summary = f"the retraining came to nothing ({job.status}): {job.error}"
        evidence = {"job_id": job.id, "status": job.status}
        self.cases.saw(version, IncidentKind.RETRAINING, "retraining", severity, summary, evidence, now_ms)

    # Reports.

    def _compare(self, held: _Version, counting: _Counting, rows: Sequence[WatchedPrediction]) -> DriftReport:
        if counting.reference is None:
            counting.reference = load_reference(self._artifacts, held.registered)
        return compare_rows(held.registered, counting.reference, rows, self._settings)

    def _report_now(self, now_ms: int) -> None:
        """The reports that somebody has asked for, of the versions that answer."""
        settings = self._settings
        for version in sorted(self._registered.answering):
            held, state = self._version(version)
            if held.counting is not None:
                rows = list(held.recent)
                if len(rows) < settings.batch_rows:
                    wanted = min(settings.batch_rows, _REPORT_ROWS)
                    rows = self._monitoring.latest(self.model_id, version, wanted)
                report = self._compare(held, held.counting, rows)
                self._add_drift_report(version, report, held.counting.check(settings), now_ms)
            if state.judged:
                self._add_performance_report(version, self._measure(held, state), now_ms)

    def _add_drift_report(self, version: str, report: DriftReport, check: DriftCheck, now_ms: int) -> None:
        state = self.state.versions[version]
        state.drift_reported_at_ms = now_ms
        report = _with_verdicts(report, check)
        content = _facts(report) | {"check": _facts(check), "batches": state.number + 1}
        self.reports.append(
            MonitorReport(new_id(), self.model_id, version, "drift", now_ms, report.rows, content)
        )

    def _add_performance_report(self, version: str, quality: Quality, now_ms: int) -> None:
        held, state = self._version(version)
        reference = _quality_of(held.metadata)
        detector = state.detector
        figures = _facts(quality)
        if held.metadata.task is Task.REGRESSION and self._tolerance(held) is None:
            # Nobody has said which error is one.
            del figures["error_rate"], figures["tolerance"]
        content = {
            "state": "measured" if quality.n >= FEWEST_OUTCOMES else "insufficient data",
            "quality": figures,
            "reference": None if reference is None else _facts(reference),
            "objective": self._objective(held, self._settings),
            "evidence": None if detector is None else min(detector.evidence, 1e12),
            "is_alarm": detector is not None and detector.is_alarm,
            "estimate": None if state.estimate is None else _facts(state.estimate),
        }
        self.reports.append(
            MonitorReport(new_id(), self.model_id, version, "performance", now_ms, quality.n, content)
        )


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
    return tuple(cause for cause, one in cases.unresolved(version).items() if one.is_broken_data)


def _quality_of(metadata: Metadata) -> Quality | None:
    return None if metadata.baseline is None else metadata.baseline.quality


def _with_verdicts(report: DriftReport, check: DriftCheck) -> DriftReport:
    """The newest rows' figures, with the verdicts of the alarm, which has looked at more than these."""
    alarms = {one.feature: one for one in check.alarms}
    features = tuple(
        structs.replace(
            one, verdict=check.verdicts.get(one.feature, one.verdict), alarm=alarms.get(one.feature)
        )
        for one in report.features
    )
    return structs.replace(report, features=features)


def _facts(struct: Any) -> dict[str, Any]:
    facts: dict[str, Any] = msgspec.to_builtins(struct)
    return facts
