"""One model under watch: its versions, what they tell of it together, and whether it is to be trained again."""

from collections.abc import Sequence
from typing import TypeVar

import msgspec
from msgspec import Struct

from phoenix_ml.application.casebook import Casebook, CaseState
from phoenix_ml.application.ports import (
    ArtifactStore,
    EndedJob,
    LogPosition,
    Monitoring,
    WatchedOutcome,
    WatchedPrediction,
)
from phoenix_ml.application.watched_version import Look, VersionState, WatchedVersion, close, to_facts
from phoenix_ml.domain.drift import wants_retraining
from phoenix_ml.domain.healing import JobStatus, RetrainJob, may_request, request_id
from phoenix_ml.domain.incidents import IncidentKind, Severity
from phoenix_ml.domain.models import ModelVersion
from phoenix_ml.domain.monitoring import DriftPolicy

Row = TypeVar("Row", WatchedPrediction, WatchedOutcome)

_BUDGET_PERIOD_MS = 30 * 24 * 3600 * 1000


class ModelState(Struct):
    """All that a monitor remembers of a model; stored with its position."""

    versions: dict[str, VersionState] = {}
    cases: CaseState = msgspec.field(default_factory=CaseState)
    told_job_id: str | None = None


class Registered(Struct, frozen=True):
    """What the registry says of a model: its versions, the champion, and which of them answer."""

    versions: dict[str, ModelVersion] = {}
    champion: str | None = None
    answering: frozenset[str] = frozenset()


class Watch:
    """One model in memory, as of a position of the log."""

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
        self._versions: dict[str, WatchedVersion] = {}
        self._registered = Registered()

    def take(
        self,
        registered: Registered,
        rows: Sequence[WatchedPrediction],
        outcomes: Sequence[WatchedOutcome],
        ended_job: EndedJob | None,
        now_ms: int,
        *,
        is_check_requested: bool,
    ) -> Look:
        """Counts what is new and draws the conclusions: the look, and in ``state`` and ``cases`` what they are now."""
        self._registered = registered
        settings = self._monitoring.settings(self.model_id)
        look = Look(now_ms, settings, (settings.policy or self._policy) is DriftPolicy.CLASSIC)
        self._see_job(ended_job, now_ms)
        self._end_left(now_ms)
        by_version = _by_version(rows)
        for version, of_version in by_version.items():
            self._version(version, look).count(of_version, look)
        told = _by_version(outcomes)
        for version, of_outcomes in told.items():
            self._version(version, look).judge(of_outcomes, look)
        if registered.champion is not None and registered.champion in by_version | told:
            self._consider(registered.champion, look)
        if is_check_requested:
            for version in sorted(registered.answering):
                self._version(version, look).report(look)
        for held in self._versions.values():
            held.save()
        return look

    def is_news(self, job: EndedJob | None) -> bool:
        """Whether the job has ended since people were told of one."""
        return job is not None and job.id != self.state.told_job_id

    def has_left(self, registered: Registered) -> bool:
        """Whether a version answers no more that did."""
        return bool(self._left(registered))

    def _version(self, version: str, look: Look) -> WatchedVersion:
        state = self.state.versions.get(version)
        if state is None:
            state = VersionState(was_answering=version in self._registered.answering)
            self.state.versions[version] = state
        held = self._versions.get(version)
        if held is None:
            held = WatchedVersion(
                self._monitoring, self._artifacts, self._registered.versions[version], state, self.cases
            )
            held.restore(look.settings, self.position.seq)
            self._versions[version] = held
        return held

    def _end_left(self, now_ms: int) -> None:
        """Ends the incidents of versions that answer no more, and what was counted for windows to come.

        A version may be asked for by its number all the same: what is seen of it after that stands by itself.
        """
        why = f"{self._registered.champion or 'no version'} answers now"
        for version in self._left(self._registered):
            state = self.state.versions.setdefault(version, VersionState())
            # One at a time: with broken data ends what outcomes said of it.
            while unresolved := self.cases.unresolved(version):
                close(next(iter(unresolved.values())), why, state, self.cases, now_ms)
            state.forget_counts()
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

    # Retraining.

    def _consider(self, champion: str, look: Look) -> None:
        """Asks for a retraining of the champion where there is evidence that it suffers."""
        held, state, settings = self._version(champion, look), self.state.versions[champion], look.settings
        evidence = held.evidence()
        reason = wants_retraining(evidence)
        if look.is_classic and not evidence.broken:
            reason = held.classic_reason() or reason
        if reason is None or settings.healing_paused:
            return
        if not look.is_classic and state.fresh_outcomes < settings.min_outcomes:
            return
        latest_ms, requests = self._monitoring.retrain_requests(self.model_id, look.at_ms - _BUDGET_PERIOD_MS)
        if (
            may_request(look.at_ms, latest_ms, settings.cooldown_s * 1000, requests, settings.budget)
            is not None
        ):
            return
        if held.newest_are_broken(settings):
            return
        outcomes = state.detector.outcomes if state.detector is not None else 0
        baseline_id = msgspec.json.encode(self._registered.versions[champion].metadata.baseline).decode()
        look.retrain = RetrainJob(
            id=request_id(self.model_id, champion, baseline_id, (state.number, outcomes)),
            model_id=self.model_id,
            model_version=champion,
            reason=reason,
            evidence=to_facts(evidence)
            | {
                "incidents": [one.id for one in self.cases.unresolved(champion).values()],
                "fresh_outcomes": state.fresh_outcomes,
                "estimate": None if state.estimate is None else to_facts(state.estimate),
            },
            status=JobStatus.REQUESTED,
            requested_at_ms=look.at_ms,
            updated_at_ms=look.at_ms,
        )
        state.fresh_outcomes = 0
        self.cases.tell(champion, Severity.CRITICAL, f"retraining was asked for: {reason}")

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


def _by_version(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.model_version, []).append(row)
    return found
