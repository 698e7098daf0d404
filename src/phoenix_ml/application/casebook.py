"""One model's incidents as its monitor follows them, and what people are told of them, and when."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import msgspec
from msgspec import Struct

from phoenix_ml.domain.ids import new_id
from phoenix_ml.domain.incidents import Alert, Incident, IncidentKind, IncidentStatus, Severity

# So many checks in a row must see nothing before an incident is over: one quiet batch may be chance.
QUIET_CHECKS = 2
_MOST_LINES = 20
# What comes back within an hour is no news. Of what comes and goes people hear in alerts that are so much rarer.
_NEWS_AGAIN_AFTER_MS = 3_600_000
_RARER = 12


class Notice(Struct, frozen=True):
    """One thing to tell, at the next alert; ``is_again`` where it is of something that comes and goes."""

    model_version: str
    severity: Severity
    text: str
    incident_id: str | None = None
    cause: str | None = None
    is_over: bool = False
    is_again: bool = False


class CaseState(Struct):
    """What is remembered of incidents beside themselves: checks since each was last seen, by its id, what waits
    to be told, when people were told last, when each cause was over last, and the ids of those that are back since.
    """

    quiet: dict[str, int] = {}
    waiting: list[Notice] = []
    told_at_ms: int | None = None
    over_at_ms: dict[str, int] = {}
    again: list[str] = []


class Casebook:
    """Opens, updates and ends incidents. ``opened`` and ``changed`` are what the next commit has to store."""

    def __init__(self, model_id: str, unresolved: Iterable[Incident], state: CaseState) -> None:
        self.state = state
        self.opened: dict[str, Incident] = {}
        self.changed: dict[str, Incident] = {}
        self._model_id = model_id
        self._open = {(one.model_version, one.cause): one for one in unresolved}

    def unresolved(self, version: str, kind: IncidentKind | None = None) -> dict[str, Incident]:
        """The version's incidents by cause."""
        return {
            cause: one
            for (of, cause), one in self._open.items()
            if of == version and (kind is None or one.kind is kind)
        }

    @property
    def versions(self) -> set[str]:
        """Those that have incidents."""
        return {version for version, _ in self._open}

    def saw(
        self,
        version: str,
        kind: IncidentKind,
        cause: str,
        severity: Severity,
        summary: str,
        evidence: Mapping[str, Any],
        now_ms: int,
    ) -> None:
        """A check has seen the cause: it is opened, or brought up to date. People are told of what is new or worse."""
        known = self._open.get((version, cause))
        if known is None:
            incident = Incident(
                id=new_id(),
                model_id=self._model_id,
                model_version=version,
                kind=kind,
                cause=cause,
                severity=severity,
                summary=summary,
                evidence=dict(evidence),
                status=IncidentStatus.OPEN,
                opened_at_ms=now_ms,
                updated_at_ms=now_ms,
            )
            self.opened[incident.id] = incident
            over_at_ms = self.state.over_at_ms.pop(_key(incident), None)
            is_again = over_at_ms is not None and now_ms - over_at_ms < _NEWS_AGAIN_AFTER_MS
            if is_again:
                self.state.again = [*self.state.again, incident.id]
            self._tell(Notice(version, severity, summary, incident.id, cause, is_again=is_again))
        else:
            is_worse = severity is Severity.CRITICAL and known.severity is not severity
            incident = msgspec.structs.replace(
                known, severity=severity, summary=summary, evidence=dict(evidence), updated_at_ms=now_ms
            )
            self._change(incident)
            if is_worse:
                self._tell(Notice(version, severity, f"worse: {summary}", incident.id, cause))
        self._open[version, cause] = incident
        self.state.quiet[incident.id] = 0

    def missed(
        self, version: str, kinds: Collection[IncidentKind], seen: Collection[str], why: str, now_ms: int
    ) -> list[Incident]:
        """A check has looked for these kinds and seen only these causes; the incidents that are over by that."""
        ended = []
        for cause, incident in self.unresolved(version).items():
            if incident.kind not in kinds or cause in seen:
                continue
            quiet = self.state.quiet.get(incident.id, 0) + 1
            self.state.quiet[incident.id] = quiet
            if quiet >= QUIET_CHECKS:
                ended.append(self.resolve(incident, why, now_ms))
        return ended

    def resolve(self, incident: Incident, why: str, now_ms: int) -> Incident:
        over = msgspec.structs.replace(
            incident,
            status=IncidentStatus.RESOLVED,
            updated_at_ms=now_ms,
            resolved_at_ms=now_ms,
            resolution=why,
        )
        self._change(over)
        del self._open[incident.model_version, incident.cause]
        self.state.quiet.pop(incident.id, None)
        recent = {
            key: at_ms
            for key, at_ms in self.state.over_at_ms.items()
            if now_ms - at_ms < _NEWS_AGAIN_AFTER_MS
        }
        self.state.over_at_ms = recent | {_key(incident): now_ms}
        is_again = incident.id in self.state.again
        self.state.again = [one for one in self.state.again if one != incident.id]
        self._tell(
            Notice(
                incident.model_version,
                Severity.WARNING,
                f"over: {incident.cause}, {why}",
                incident.id,
                incident.cause,
                is_over=True,
                is_again=is_again,
            )
        )
        return over

    def tell(self, version: str, severity: Severity, text: str) -> None:
        """Something that is no incident, such as a retraining that was asked for."""
        self._tell(Notice(version, severity, text))

    def is_alert_due(self, now_ms: int, group_ms: int) -> bool:
        waiting, told_at_ms = self.state.waiting, self.state.told_at_ms
        if not waiting or told_at_ms is None:
            return bool(waiting)
        pause_ms = group_ms * _RARER if all(one.is_again for one in waiting) else group_ms
        return now_ms - told_at_ms >= pause_ms

    def alert(self, now_ms: int, group_ms: int) -> Alert | None:
        """All that waits, in one message, unless people were told less than ``group_ms`` ago."""
        if not self.is_alert_due(now_ms, group_ms):
            return None
        waiting = self.state.waiting
        # The title is of what is wrong, before what is over.
        worst = min(waiting, key=lambda one: (one.is_over, one.severity is not Severity.CRITICAL))
        more = len(waiting) - 1
        title = f"{self._model_id} {worst.model_version}: {worst.text}" + (f" (+{more})" if more else "")
        lines = [f"{self._model_id} {one.model_version}: {one.text}" for one in waiting[:_MOST_LINES]]
        if len(waiting) > _MOST_LINES:
            lines.append(f"and {len(waiting) - _MOST_LINES} more")
        self.state.waiting = []
        self.state.told_at_ms = now_ms
        ids = tuple(dict.fromkeys(one.incident_id for one in waiting if one.incident_id is not None))
        return Alert(
            new_id(),
            self._model_id,
            worst.model_version,
            worst.severity,
            title,
            "\n".join(lines),
            ids,
            now_ms,
        )

    def stored(self) -> None:
        """What had to be stored is."""
        self.opened.clear()
        self.changed.clear()

    def _change(self, incident: Incident) -> None:
        # One that was opened since the last commit is still to be inserted, as it is now.
        (self.opened if incident.id in self.opened else self.changed)[incident.id] = incident

    def _tell(self, notice: Notice) -> None:
        waiting = self.state.waiting
        if notice.is_again:  # one that comes and goes is told of as it is now
            about = notice.model_version, notice.cause
            waiting = [one for one in waiting if not one.is_again or (one.model_version, one.cause) != about]
        self.state.waiting = [*waiting, notice]


def _key(incident: Incident) -> str:
    return f"{incident.model_version} {incident.cause}"
