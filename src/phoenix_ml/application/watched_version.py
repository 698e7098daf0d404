"""One version under watch: what its predictions and outcomes mean, batch by batch."""

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import Any, Final

import msgspec
import numpy as np
from msgspec import Struct, structs
from numpy.typing import NDArray

from phoenix_ml.application.casebook import Casebook
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
    Monitoring,
    MonitorReport,
    WatchedOutcome,
    WatchedPrediction,
)
from phoenix_ml.application.reports import iso_time
from phoenix_ml.application.statistics.alarm import FEWEST_ROWS, AlarmSettings, DriftAlarm, check_schema
from phoenix_ml.application.statistics.cells import CellCounter, CellCounts
from phoenix_ml.application.statistics.detector import LossDetector, objective
from phoenix_ml.application.statistics.estimation import estimate_performance, is_drop_confirmed
from phoenix_ml.application.statistics.quality import losses, measure_quality
from phoenix_ml.application.statistics.report import classic_alarms
from phoenix_ml.domain.baselines import RESULT, SCORE, Baseline, Estimate, Quality
from phoenix_ml.domain.drift import DriftCheck, DriftReport, Evidence, FeatureAlarm, SchemaViolation, Test
from phoenix_ml.domain.errors import InvalidField
from phoenix_ml.domain.healing import RetrainJob
from phoenix_ml.domain.ids import new_id
from phoenix_ml.domain.incidents import Incident, IncidentKind, Severity
from phoenix_ml.domain.models import ModelVersion, Task
from phoenix_ml.domain.monitoring import MonitorSettings
from phoenix_ml.domain.rows import RowFormat

MOST_BATCHES = 64
# Fewer tell nothing of quality.
FEWEST_OUTCOMES = 200
_QUALITY_ROWS = 1000
_REPORT_EVERY_MS = 60_000
# Rarer, as 200 reports are kept, and those of outcomes may come once a day.
_ESTIMATE_EVERY_MS = 3_600_000
# A report looks at no more rows; it is a person who reads it.
_REPORT_ROWS = 10_000
_MOST_BROKEN_PERIODS = 100
_TESTS: Final[dict[Test, str]] = {"ks": "a Kolmogorov-Smirnov", "chi2": "a chi-square"}
# Causes of incidents.
_BY_OUTCOMES = "quality:outcomes"
_BY_ESTIMATE = "quality:estimate"


class Measured(Struct, frozen=True):
    """What outcomes said of the answers, as a report has it, and when."""

    quality: dict[str, Any]
    at_ms: int | None = None


class Judged(Struct, frozen=True, array_like=True):
    """An answer and its outcome."""

    result: Any
    confidence: float | None
    probabilities: list[float] | None
    outcome: Any


class Period(Struct, frozen=True, array_like=True):
    """From when until when; it goes on where there is no end. ``is_of_all`` where the version had part in the routing:
    whoever sent it such data has sent it to the others too.
    """

    start_ms: int
    end_ms: int | None = None
    is_of_all: bool = True

    def holds(self, at_ms: int) -> bool:
        return self.start_ms <= at_ms and (self.end_ms is None or at_ms <= self.end_ms)


class VersionState(Struct):
    """How far one version's open batch has come, and what must be remembered of those before.

    ``number`` is the open batch's; ``estimate`` the last one's. ``broken`` are the periods in which its data was
    no data of these features: outcomes of predictions made then say nothing about the model. ``rows_since_alarm`` is
    how many predictions were counted since outcomes raised the alarm; batches before ``ring_from`` are of an earlier time
    in which the version answered. ``measured`` is the last whole window of outcomes.
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
    broken: list[Period] = []
    rows_since_alarm: int | None = None
    ring_from: int = 0
    was_answering: bool = False
    drift_reported_at_ms: int = 0
    drifted: tuple[str, ...] = ()
    performance_reported_at_ms: int = 0
    measured: Measured | None = None

    def forget_counts(self) -> None:
        """Later windows begin with the open batch, and that one anew."""
        self.ring_from, self.rows, self.counts = self.number, 0, b""

    def forget_outcomes(self) -> None:
        """What they have said so far counts no more."""
        self.detector = None
        self.rows_since_alarm = None


class Figures(Struct, frozen=True):
    """The latest of a version, for metrics."""

    model_id: str
    model_version: str
    distances: dict[str, float]
    quality: Quality | None = None
    estimate: Estimate | None = None


class Look(Struct):
    """One look at a model, by which rules it is taken, and what it finds that has to be stored."""

    at_ms: int
    settings: MonitorSettings
    is_classic: bool
    batches: list[CountedBatch] = []
    reports: list[MonitorReport] = []
    figures: list[Figures] = []
    retrain: RetrainJob | None = None


class _Counting:
    """The counts of one version that has a baseline to count over."""

    def __init__(self, baseline: Baseline) -> None:
        self.baseline = baseline
        self.counter = CellCounter(baseline)
        self.begin_anew()
        self.reference: dict[str, NDArray[np.float64]] | None = None
        self._alarm: tuple[AlarmSettings, DriftAlarm] | None = None

    def begin_anew(self) -> None:
        """Forgets all counts."""
        self.counts = self.counter.zero()
        self.newest = self.counts
        self.ring: deque[CellCounts] = deque(maxlen=MOST_BATCHES)

    def add_batch(self, counts: CellCounts, settings: MonitorSettings) -> tuple[SchemaViolation, ...]:
        """What in the batch are no values of their features.

        They stay out of the ring, and so does what the model made of them: they would pass for drift in every window
        that they are in, or hide it, for 64 batches. So it is with a feature whose values stay away, but only in later
        windows: that they do is what the alarm tells of the newest batch.
        """
        violations = self.violations(counts, settings)
        broken = {one.feature for one in violations if one.explains_drift}
        self.newest = self.counter.without(counts, {*broken, SCORE, RESULT}) if broken else counts
        away = self.away(counts, settings)
        self.ring.append(self.counter.without(self.newest, {*away, SCORE, RESULT}) if away else self.newest)
        return violations

    def violations(self, counts: CellCounts, settings: MonitorSettings) -> tuple[SchemaViolation, ...]:
        """What in the counts are no values of their features, those left out aside."""
        return check_schema(self.baseline, counts, alarm_settings(settings))

    def away(self, counts: CellCounts, settings: MonitorSettings) -> set[str]:
        """The features of which more values are missing in these counts alone than in the reference."""
        alarms = self._alarm_by(settings).check_one(counts).alarms
        return {one.feature for one in alarms if one.explains_drift and not one.is_advisory}

    def check(self, settings: MonitorSettings) -> DriftCheck:
        """One look at the newest batch and what is kept of those before it."""
        return self._alarm_by(settings).check([*list(self.ring)[:-1], self.newest] if self.ring else [])

    def _alarm_by(self, settings: MonitorSettings) -> DriftAlarm:
        """The thresholds are made anew only when the settings have changed: they take longer than a check."""
        wanted = alarm_settings(settings)
        if self._alarm is None or self._alarm[0] != wanted:
            self._alarm = wanted, DriftAlarm(self.baseline, wanted)
        return self._alarm[1]


class WatchedVersion:
    """One version in memory; all of it comes back from its state, the log and the registry after a restart."""

    def __init__(
        self,
        monitoring: Monitoring,
        artifacts: ArtifactStore,
        registered: ModelVersion,
        state: VersionState,
        cases: Casebook,
    ) -> None:
        self._monitoring = monitoring
        self._artifacts = artifacts
        self._registered = registered
        self._model_id, self._name = registered.model_id, registered.version
        self._metadata = registered.metadata
        self._row_format = RowFormat(registered.metadata.columns)
        self._state = state
        self._cases = cases
        baseline = registered.metadata.baseline
        self._reference = None if baseline is None else baseline.quality
        self._counting = None if baseline is None else _Counting(baseline)
        self._recent: deque[WatchedPrediction] = deque(maxlen=_REPORT_ROWS)

    def restore(self, settings: MonitorSettings, until_seq: int) -> None:
        """Brings back what was counted up to there."""
        state, counting = self._state, self._counting
        if counting is not None:
            try:
                for batch in self._monitoring.batches(self._model_id, self._name):
                    if batch.number >= state.ring_from:
                        counting.add_batch(counting.counter.read(batch.counts), settings)
                if state.counts:
                    counting.counts = counting.counter.read(state.counts)
            except InvalidField:  # counted by a release that counted otherwise
                state.forget_counts()
                counting.begin_anew()
        if state.rows:
            wanted = min(state.rows, _REPORT_ROWS)
            self._recent.extend(
                self._monitoring.latest(self._model_id, self._name, wanted, until_seq=until_seq)
            )

    def save(self) -> None:
        """Puts what is counted of the open batch into the state."""
        if self._counting is not None:
            self._state.counts = self._counting.counts.to_json()

    # Counting and checking batches.

    def count(self, rows: Sequence[WatchedPrediction], look: Look) -> None:
        """Counts the rows; each batch that is full by them is checked."""
        counting, state = self._counting, self._state
        if counting is None:
            return
        batch_rows = look.settings.batch_rows
        at = 0
        while at < len(rows):
            part = rows[at : at + max(1, batch_rows - state.rows)]
            at += len(part)
            if not state.rows:
                state.first_seq, state.started_at_ms = part[0].seq, part[0].created_at_ms
            columns, absent, outputs = columns_of(self._row_format, part)
            counting.counts += counting.counter.count(
                columns, absent=absent, outputs=outputs, task=self._metadata.task
            )
            self._recent.extend(part)
            state.rows += len(part)
            if state.rows_since_alarm is not None:
                state.rows_since_alarm += len(part)
            if state.rows >= batch_rows:
                self._end_batch(counting, part[-1], look)

    def _end_batch(self, counting: _Counting, last: WatchedPrediction, look: Look) -> None:
        state = self._state
        look.batches.append(
            CountedBatch(
                self._name,
                state.number,
                state.rows,
                state.first_seq,
                last.seq,
                state.started_at_ms,
                last.created_at_ms,
                counting.counts.to_json(),
            )
        )
        violations = counting.add_batch(counting.counts, look.settings)
        self._see_violations(violations, look)
        self._check(counting, violations, look)
        self._tell_broken_from_whole(look)
        counting.counts = counting.counter.zero()
        self._recent.clear()
        state.number += 1
        state.rows = 0

    def _see_violations(self, violations: Sequence[SchemaViolation], look: Look) -> None:
        seen = set()
        for one in violations:
            cause = f"schema:{one.feature}:{one.kind}"
            seen.add(cause)
            severity = Severity.CRITICAL if one.explains_drift else Severity.WARNING
            evidence = to_facts(one) | {"explains_drift": one.explains_drift}
            self._saw(IncidentKind.SCHEMA, cause, severity, one.summary, evidence, look)
        self._missed(IncidentKind.SCHEMA, seen, "the values are back", look)

    def _tell_broken_from_whole(self, look: Look) -> None:
        """Opens a broken period with the batch that was just ended, or closes the one that is open."""
        state = self._state
        is_broken = bool(_broken_features(self._cases, self._name))
        if is_broken and (not state.broken or state.broken[-1].end_ms is not None):
            begun = Period(state.started_at_ms, is_of_all=state.was_answering)
            state.broken = join_periods([*state.broken, begun], _MOST_BROKEN_PERIODS)
        _mend(self._name, state, self._cases, look.at_ms)

    def _check(self, counting: _Counting, violations: Sequence[SchemaViolation], look: Look) -> None:
        """What the batch that was just ended means, together with those before it."""
        state = self._state
        rows = list(self._recent)
        broken = {one.feature for one in violations if one.explains_drift}
        # What the model makes of broken values is no news either.
        silent = broken | {SCORE, RESULT} if broken else broken
        check = counting.check(look.settings)
        state.score_moved = check.score_moved
        report: DriftReport | None = None
        if look.is_classic:
            report = self._compare(counting, rows, look)
            # That values stay away is no test of theirs, and data that is none is none under any policy.
            away = tuple(one for one in check.alarms if one.rule == "missing" and not one.is_advisory)
            alarms: tuple[FeatureAlarm, ...] = classic_alarms(report) + away
        else:
            alarms = tuple(one for one in check.alarms if not one.is_advisory)
        unexplained = [one for one in alarms if one.feature not in silent]
        self._see_drift(unexplained, silent, check, look)
        estimate = None
        if not broken:
            columns, _, outputs = columns_of(self._row_format, rows)
            estimate = estimate_performance(counting.baseline, self._metadata.task, outputs, columns)
        had_dropped = state.is_drop_confirmed
        self._see_estimate(counting.baseline, estimate, look)
        is_due = look.at_ms - state.performance_reported_at_ms >= _ESTIMATE_EVERY_MS
        if estimate is not None and (is_due or state.is_drop_confirmed != had_dropped):
            self._add_performance_report(look)
        look.figures.append(Figures(self._model_id, self._name, check.distances, None, estimate))
        drifted = tuple(sorted({one.feature for one in unexplained}))
        if drifted != state.drifted or look.at_ms - state.drift_reported_at_ms >= _REPORT_EVERY_MS:
            report = report or self._compare(counting, rows, look)
            self._add_drift_report(report, check, look)
        state.drifted = drifted

    def _see_drift(
        self, alarms: Sequence[FeatureAlarm], silent: Collection[str], check: DriftCheck, look: Look
    ) -> None:
        # Missing values are a feature of their own: they may change with the others, or without.
        by_cause: dict[str, list[FeatureAlarm]] = {}
        for one in alarms:
            rule = "missing" if one.rule == "missing" else "drift"
            by_cause.setdefault(f"{rule}:{one.feature}", []).append(one)
        for cause, found in by_cause.items():
            worst = max(found, key=lambda one: one.distance)
            evidence = {
                "alarms": [to_facts(one) for one in found],
                "rows": check.rows,
                "explains_drift": any(one.explains_drift for one in found),
            }
            self._saw(IncidentKind.DRIFT, cause, Severity.WARNING, worst.summary, evidence, look)
        # Of a feature whose values are none, nobody can say that it is back.
        unknown = {f"{rule}:{feature}" for rule in ("missing", "drift") for feature in silent}
        self._missed(IncidentKind.DRIFT, by_cause.keys() | unknown, "the stream is back", look)

    def _see_estimate(self, baseline: Baseline, estimate: Estimate | None, look: Look) -> None:
        state = self._state
        before, state.estimate = state.estimate, estimate
        state.is_drop_confirmed = False
        if estimate is None:
            return
        # The outcomes' own incident ends by outcomes.
        seen = {_BY_OUTCOMES}
        if before is not None and is_drop_confirmed(baseline, before, estimate):
            state.is_drop_confirmed = True
            seen.add(_BY_ESTIMATE)
            reference = baseline.estimate
            summary = (
                f"{estimate.metric} is estimated at {estimate.value:.3f}"
                + (f", {reference.value:.3f} in the reference" if reference is not None else "")
                + "; no outcomes were needed for that, and no concept drift is assumed"
            )
            evidence = {"estimate": to_facts(estimate), "before": to_facts(before)}
            self._saw(IncidentKind.QUALITY, _BY_ESTIMATE, Severity.WARNING, summary, evidence, look)
        self._missed(IncidentKind.QUALITY, seen, "the estimate is back", look)

    def _saw(
        self,
        kind: IncidentKind,
        cause: str,
        severity: Severity,
        summary: str,
        evidence: Mapping[str, Any],
        look: Look,
    ) -> None:
        self._cases.saw(self._name, kind, cause, severity, summary, evidence, look.at_ms)

    def _missed(self, kind: IncidentKind, seen: Collection[str], why: str, look: Look) -> None:
        self._cases.missed(self._name, [kind], seen, why, look.at_ms)

    # Outcomes.

    def judge(self, outcomes: Sequence[WatchedOutcome], look: Look) -> None:
        """Weighs the answers against their outcomes; each window that is full by them is measured."""
        state, settings, task = self._state, look.settings, self._metadata.task
        usable = [
            Judged(one.result, one.confidence, one.probabilities, one.outcome)
            for one in outcomes
            if _is_usable(task, one) and not any(period.holds(one.created_at_ms) for period in state.broken)
        ]
        state.fresh_outcomes += len(usable)
        if not usable:
            return
        p0 = self._objective(settings)
        if p0 is not None:
            if state.detector is None or state.detector.p0 != p0:
                state.detector, state.rows_since_alarm = LossDetector.start(p0), None
            tolerance = self._tolerance(settings)
            wrong = losses(task, outputs_of(usable), [one.outcome for one in usable], tolerance)
            state.detector = state.detector.update(wrong)
        window = min(settings.batch_rows, _QUALITY_ROWS)
        while usable:
            room = window - len(state.judged)
            state.judged += usable[:room]
            usable = usable[room:]
            if len(state.judged) >= window:
                self._end_window(look)
        detector = state.detector
        if detector is not None and detector.is_alarm:
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
            self._saw(IncidentKind.QUALITY, _BY_OUTCOMES, Severity.CRITICAL, summary, evidence, look)

    def _end_window(self, look: Look) -> None:
        state = self._state
        quality = self._measure(look.settings)
        state.measured, state.judged = Measured(self._to_figures(quality, look.settings), look.at_ms), []
        self._add_performance_report(look)
        look.figures.append(Figures(self._model_id, self._name, {}, quality, None))
        p0 = self._objective(look.settings)
        is_good = quality.n >= FEWEST_OUTCOMES and p0 is not None and quality.error_rate <= p0
        state.good_windows = state.good_windows + 1 if is_good else 0
        known = self._cases.unresolved(self._name).get(_BY_OUTCOMES)
        if known is not None and state.good_windows >= 2:
            close(known, "two windows of outcomes are good again", state, self._cases, look.at_ms)

    def _measure(self, settings: MonitorSettings) -> Quality:
        judged = self._state.judged
        return measure_quality(
            self._metadata.task,
            outputs_of(judged),
            [one.outcome for one in judged],
            class_labels=self._metadata.class_labels,
            tolerance=self._tolerance(settings),
        )

    def _tolerance(self, settings: MonitorSettings) -> float | None:
        """The error beyond which a regression's answer is wrong."""
        if settings.tolerance is not None:
            return settings.tolerance
        return None if self._reference is None else self._reference.tolerance

    def _objective(self, settings: MonitorSettings) -> float | None:
        if self._metadata.task is Task.REGRESSION and self._tolerance(settings) is None:
            return None
        if settings.error_rate is not None:
            return settings.error_rate
        return None if self._reference is None else objective(self._reference)

    # What its owner decides by.

    def evidence(self) -> Evidence:
        """What there is for and against a retraining."""
        state = self._state
        drift = self._cases.unresolved(self._name, IncidentKind.DRIFT)
        # Where outcomes come at once they tell of broken data before there are enough rows to see that it is.
        is_too_early = self._counting is not None and (state.rows_since_alarm or 0) < FEWEST_ROWS
        return Evidence(
            drifted=tuple(drift),
            missing=tuple(cause for cause in drift if cause.startswith("missing:")),
            broken=_broken_features(self._cases, self._name),
            is_drop_confirmed=state.is_drop_confirmed,
            is_outcome_alarm=state.detector is not None and state.detector.is_alarm and not is_too_early,
            score_moved=state.score_moved,
        )

    def classic_reason(self) -> str | None:
        """Which test has found a p below 0.05; None where none has."""
        drift = self._cases.unresolved(self._name, IncidentKind.DRIFT)
        tests = {alarm.get("test") for one in drift.values() for alarm in one.evidence.get("alarms", ())}
        found = [name for test, name in _TESTS.items() if test in tests]
        return f"{' and '.join(found)} p below 0.05" if found else None

    def newest_are_broken(self, settings: MonitorSettings) -> bool:
        """Whether values of the newest rows are none or stay away, which the open batch has not told yet."""
        if self._counting is None:
            return False
        rows = self._monitoring.latest(self._model_id, self._name, FEWEST_ROWS)
        columns, absent, _ = columns_of(self._row_format, rows)
        counts = self._counting.counter.count(columns, absent=absent)
        violations = self._counting.violations(counts, settings)
        return any(one.explains_drift for one in violations) or bool(self._counting.away(counts, settings))

    # Reports.

    def report(self, look: Look) -> None:
        """The reports that somebody has asked for."""
        state, settings, counting = self._state, look.settings, self._counting
        if counting is not None:
            rows: Sequence[WatchedPrediction] = list(self._recent)
            if len(rows) < settings.batch_rows:
                wanted = min(settings.batch_rows, _REPORT_ROWS)
                rows = self._monitoring.latest(self._model_id, self._name, wanted)
            report = self._compare(counting, rows, look)
            self._add_drift_report(report, counting.check(settings), look)
        if state.judged or state.measured is not None or state.estimate is not None:
            self._add_performance_report(look)

    def _compare(self, counting: _Counting, rows: Sequence[WatchedPrediction], look: Look) -> DriftReport:
        if counting.reference is None:
            counting.reference = load_reference(self._artifacts, self._registered)
        return compare_rows(self._registered, counting.reference, rows, look.settings)

    def _add_drift_report(self, report: DriftReport, check: DriftCheck, look: Look) -> None:
        self._state.drift_reported_at_ms = look.at_ms
        report = _with_verdicts(report, check)
        content = to_facts(report) | {"check": to_facts(check), "batches": self._state.number + 1}
        self._add_report("drift", report.rows, content, look)

    def _to_figures(self, quality: Quality, settings: MonitorSettings) -> dict[str, Any]:
        figures = to_facts(quality)
        if self._metadata.task is Task.REGRESSION and self._tolerance(settings) is None:
            # Nobody has said which error is one.
            del figures["error_rate"], figures["tolerance"]
        return figures

    def _latest_measured(self, look: Look) -> Measured:
        """By the outcomes since the last whole window, where they are enough to tell or there was none before."""
        state = self._state
        if state.judged and (state.measured is None or len(state.judged) >= FEWEST_OUTCOMES):
            return Measured(self._to_figures(self._measure(look.settings), look.settings), look.at_ms)
        return state.measured or Measured({"n": 0})

    def _add_performance_report(self, look: Look) -> None:
        state = self._state
        state.performance_reported_at_ms = look.at_ms
        measured, detector = self._latest_measured(look), state.detector
        n = measured.quality["n"]
        content = {
            "state": "measured" if n >= FEWEST_OUTCOMES else "insufficient data",
            "quality": measured.quality,
            "measured_at": iso_time(measured.at_ms),
            "reference": None if self._reference is None else to_facts(self._reference),
            "objective": self._objective(look.settings),
            "evidence": None if detector is None else min(detector.evidence, 1e12),
            "is_alarm": detector is not None and detector.is_alarm,
            "estimate": None if state.estimate is None else to_facts(state.estimate),
        }
        self._add_report("performance", n, content, look)

    def _add_report(self, kind: str, rows: int, content: dict[str, Any], look: Look) -> None:
        look.reports.append(
            MonitorReport(new_id(), self._model_id, self._name, kind, look.at_ms, rows, content)
        )


def close(incident: Incident, why: str, state: VersionState, cases: Casebook, now_ms: int) -> None:
    """Ends an incident of a version, and what was counted only because of it."""
    cases.resolve(incident, why, now_ms)
    if incident.is_broken_data:
        _mend(incident.model_version, state, cases, now_ms)
    elif incident.cause == _BY_OUTCOMES:
        state.forget_outcomes()


def _mend(version: str, state: VersionState, cases: Casebook, now_ms: int) -> None:
    """Where the data is whole again, what outcomes said of the broken answers is forgotten."""
    if not state.broken or state.broken[-1].end_ms is not None or _broken_features(cases, version):
        return
    state.broken[-1] = structs.replace(state.broken[-1], end_ms=now_ms)
    state.forget_outcomes()
    known = cases.unresolved(version).get(_BY_OUTCOMES)
    if known is not None:
        cases.resolve(known, "the data was to blame, and it is whole again", now_ms)


def to_facts(struct: Any) -> dict[str, Any]:
    """The struct as what JSON can hold."""
    facts: dict[str, Any] = msgspec.to_builtins(struct)
    return facts


def _is_usable(task: Task, told: WatchedOutcome) -> bool:
    """Whether answer and outcome can be compared: numbers for a regression, one label each otherwise."""
    pair = (told.result, told.outcome)
    if task is Task.REGRESSION:
        return all(isinstance(one, int | float) and not isinstance(one, bool) for one in pair)
    return all(isinstance(one, str | int | float | bool) for one in pair)


def join_periods(periods: list[Period], most: int) -> list[Period]:
    """So many periods at most that cover the given ones, which are in order: those that are nearest become one, for what
    was broken is never forgotten.

    >>> [(one.start_ms, one.end_ms) for one in join_periods([Period(0, 10), Period(50, 60), Period(61)], 2)]
    [(0, 10), (50, None)]
    """
    joined = list(periods)
    while len(joined) > most:
        gaps = [later.start_ms - (earlier.end_ms or 0) for earlier, later in pairwise(joined)]
        at = gaps.index(min(gaps))
        first, second = joined[at : at + 2]
        joined[at : at + 2] = [Period(first.start_ms, second.end_ms, first.is_of_all or second.is_of_all)]
    return joined


def _broken_features(cases: Casebook, version: str) -> tuple[str, ...]:
    """The causes of open incidents that explain whatever else is seen."""
    return tuple(cause for cause, one in cases.unresolved(version).items() if one.is_broken_data)


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
