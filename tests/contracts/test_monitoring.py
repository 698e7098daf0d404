"""The monitors' contract over SQLite and a real PostgreSQL: what is read, and what one commit stores or does not."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

import msgspec
import pytest
from databases import empty
from sample_events import AT_MS, COLUMNS, outcome, prediction
from sqlalchemy import select

from phoenix_ml.application.ports import (
    CountedBatch,
    IncidentQuery,
    LogPosition,
    MonitorReport,
    MonitorStep,
    RecordedEvent,
)
from phoenix_ml.domain.errors import (
    IncidentResolved,
    IncidentUnknown,
    InvalidField,
    ModelUnknown,
)
from phoenix_ml.domain.events import OutcomeReported, PredictionMade
from phoenix_ml.domain.features import FeatureRule, FeatureType
from phoenix_ml.domain.healing import JobStatus, RetrainJob
from phoenix_ml.domain.ids import new_id
from phoenix_ml.domain.incidents import Alert, Incident, IncidentKind, IncidentStatus, Severity
from phoenix_ml.domain.models import Framework, Metadata, ModelVersion, Signature, Stage, Task, TensorSpec
from phoenix_ml.domain.monitoring import ALL_MODELS, MonitorSettings
from phoenix_ml.domain.routing import Role
from phoenix_ml.domain.rows import RowFormat
from phoenix_ml.infrastructure.sql.database import Database
from phoenix_ml.infrastructure.sql.monitoring import KEPT_BATCHES, KEPT_REPORTS, SqlMonitoring
from phoenix_ml.infrastructure.sql.predictions import SqlPredictionLog
from phoenix_ml.infrastructure.sql.registry import SqlRegistry
from phoenix_ml.infrastructure.sql.schema import deliveries, retrain_jobs

FIRST_OUTCOME = "00000000-0000-0000-0000-000000000000"


def register(database: Database, model_id: str, version: str = "1.0.0") -> None:
    metadata = Metadata(
        Signature((TensorSpec("income", "float32", (None, 1)),), (TensorSpec("y", "float32", (None, 1)),)),
        ("income",),
        {"income": FeatureRule(FeatureType.FLOAT)},
        Task.REGRESSION,
    )
    SqlRegistry(database).add(
        ModelVersion(model_id, version, Framework.ONNX, "uri", "ab" * 32, Stage.DEV, True, AT_MS, metadata),
        "ann",
    )


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    """A database with the model `risk`."""
    with closing(Database(url)) as database:
        empty(database)
        register(database, "risk")
        yield database


@pytest.fixture
def monitoring(database: Database) -> SqlMonitoring:
    """A monitor that tells two channels of alerts and one of retrainings."""
    return SqlMonitoring(database, ("pager", "chat"), ("kafka",))


def log(database: Database, *events: PredictionMade | OutcomeReported) -> None:
    """One commit of the log role."""
    recorded = [RecordedEvent(event, msgspec.msgpack.encode(event), RowFormat(COLUMNS)) for event in events]
    SqlPredictionLog(database).write(recorded)


def incident(cause: str = "drift:income", **facts: Any) -> Incident:
    opened = Incident(
        id=new_id(),
        model_id="risk",
        model_version="1.0.0",
        kind=IncidentKind.DRIFT,
        cause=cause,
        severity=Severity.WARNING,
        summary="income has moved",
        evidence={"d": 0.25},
        status=IncidentStatus.OPEN,
        opened_at_ms=AT_MS,
        updated_at_ms=AT_MS,
    )
    return msgspec.structs.replace(opened, **facts)


def alert(*incidents: Incident, at_ms: int = AT_MS) -> Alert:
    ids = tuple(one.id for one in incidents)
    return Alert(new_id(), "risk", "1.0.0", Severity.CRITICAL, "risk drifts", "income has moved", ids, at_ms)


def job(job_id: str = "ab" * 16, at_ms: int = AT_MS) -> RetrainJob:
    return RetrainJob(job_id, "risk", "1.0.0", "drift", {"d": 0.5}, JobStatus.REQUESTED, at_ms, at_ms)


def batch(number: int) -> CountedBatch:
    return CountedBatch(
        "1.0.0", number, 2, 2 * number + 1, 2 * number + 2, AT_MS, AT_MS + 1, b"counts %d" % number
    )


def report(number: int, kind: str = "drift") -> MonitorReport:
    return MonitorReport(new_id(), "risk", "1.0.0", kind, AT_MS + number, 2, {"number": number})


def step(was: LogPosition, seq: int, **facts: Any) -> MonitorStep:
    now = msgspec.structs.replace(was, seq=seq)
    return MonitorStep("risk", was, now, b"state at %d" % seq, AT_MS, **facts)


def start(monitoring: SqlMonitoring) -> LogPosition:
    return monitoring.standings()["risk"].position


def waiting_since(monitoring: SqlMonitoring) -> int | None:
    return monitoring.standings()["risk"].check_requested_at_ms


def delivered_to(database: Database) -> list[tuple[str, str]]:
    with database.read() as connection:
        rows = connection.execute(select(deliveries.c.kind, deliveries.c.channel))
        return sorted((row.kind, row.channel) for row in rows)


def jobs(database: Database) -> Sequence[str]:
    with database.read() as connection:
        return connection.execute(select(retrain_jobs.c.id)).scalars().all()


def test_a_model_without_predictions_starts_where_the_log_ends_now(
    database: Database, monitoring: SqlMonitoring
) -> None:
    """A new model must not cost its first monitor a walk over everything that was ever logged."""
    log(database, prediction(), prediction())
    register(database, "later")

    positions = {name: one.position for name, one in monitoring.standings().items()}
    log(database, prediction(model_id="later"))

    assert positions["later"].seq == 2
    assert [row.model_id for row in monitoring.predictions(positions["later"].seq, 10)] == ["later"]


def test_a_model_with_predictions_starts_before_its_first(
    database: Database, monitoring: SqlMonitoring
) -> None:
    """What was answered before a monitor ran is watched too, from the first row on."""
    register(database, "earlier")
    log(database, prediction(model_id="earlier"), prediction(model_id="earlier"))
    log(database, prediction(), prediction())

    positions = {name: one.position for name, one in monitoring.standings().items()}

    assert (positions["earlier"].seq, positions["risk"].seq) == (0, 2)


def test_predictions_come_in_the_order_of_commits_with_what_was_answered(
    database: Database, monitoring: SqlMonitoring
) -> None:
    """The monitor's counts are only as good as the rows that it is given."""
    made = [prediction((income, "Oslo", 1), result=n) for n, income in enumerate((1.0, 2.0, float("nan")))]
    log(database, *made[:2])
    log(database, made[2])

    rows = monitoring.predictions(0, 10)

    assert [row.seq for row in rows] == [1, 2, 3]
    assert [row.inputs for row in rows] == [event.inputs for event in made]
    assert [row.result for row in rows] == [0, 1, 2]
    first = rows[0]
    assert (first.model_id, first.model_version, first.created_at_ms) == ("risk", "1.0.0", AT_MS)
    assert first.feature_sources == {"income": "store", "city": "request", "visits": "default"}
    assert (first.confidence, first.probabilities) == (0.75, [0.25, 0.75])
    assert [row.seq for row in monitoring.predictions(1, 1)] == [2]


def test_each_prediction_has_one_outcome_the_first_that_met_it(
    database: Database, monitoring: SqlMonitoring
) -> None:
    """An outcome that is corrected or sent twice must not make one answer count as two."""
    made = [prediction(result=n) for n in range(3)]
    log(database, outcome(made[2].id, "early"))
    log(database, *made)
    log(database, outcome(made[0].id, "first"), outcome(made[1].id, "other"))
    log(database, outcome(made[0].id, "second"), outcome(new_id(), "of nobody"))

    found, cursor = monitoring.outcomes((0, FIRST_OUTCOME), 10)
    again, end = monitoring.outcomes(cursor, 10)

    assert {(row.result, row.outcome) for row in found} == {(0, "first"), (1, "other"), (2, "early")}
    assert (again, end) == ([], cursor)


def test_a_shadow_has_the_outcome_of_what_it_shadowed(database: Database, monitoring: SqlMonitoring) -> None:
    """Callers know nothing of shadows; without their outcomes nobody could tell a good challenger from a bad one."""
    register(database, "risk", "2.0.0")
    made = [prediction(result=n) for n in range(3)]
    shadows = [
        prediction(model_version="2.0.0", role=Role.SHADOW, result=10 + n, shadow_of=event.id)
        for n, event in enumerate(made)
    ]
    log(database, *made)
    log(database, *shadows)
    log(database, *[outcome(event.id, event.result) for event in made])

    cursor, found = (0, FIRST_OUTCOME), []
    while True:
        page, cursor = monitoring.outcomes(cursor, 2)
        if not page:
            break
        found += page

    assert sorted((row.model_version, row.result, row.outcome) for row in found) == [
        *(("1.0.0", n, n) for n in range(3)),
        *(("2.0.0", 10 + n, n) for n in range(3)),
    ]


def test_outcomes_of_one_commit_are_read_page_by_page(database: Database, monitoring: SqlMonitoring) -> None:
    """They share one number, so a page that ends among them goes on by the id."""
    made = [prediction(result=n) for n in range(7)]
    log(database, *made)
    log(database, *[outcome(event.id, event.result) for event in made])

    cursor, results, pages = (0, FIRST_OUTCOME), [], 0
    while True:
        found, cursor = monitoring.outcomes(cursor, 2)
        if not found:
            break
        pages += 1
        results += [row.result for row in found]

    assert (pages, sorted(results)) == (4, list(range(7)))


def test_latest_rows_of_a_version_end_where_they_are_asked_to(
    database: Database, monitoring: SqlMonitoring
) -> None:
    """A report is of the very rows that were counted."""
    register(database, "risk", "2.0.0")
    log(database, *[prediction(result=n, created_at_ms=AT_MS + n) for n in range(5)])
    log(database, prediction(model_version="2.0.0", result="other"))

    newest = monitoring.latest("risk", "1.0.0", 2)
    earlier = monitoring.latest("risk", "1.0.0", 2, until_seq=3)

    assert [row.result for row in newest] == [3, 4]
    assert [row.result for row in earlier] == [1, 2]


def test_a_commit_moves_the_position_and_keeps_the_state(
    database: Database, monitoring: SqlMonitoring
) -> None:
    """After a restart the monitor goes on from exactly here."""
    was = start(monitoring)

    stored = monitoring.commit(step(was, 5, batches=(batch(0), batch(1))))

    assert stored
    position, state = monitoring.state("risk")
    assert (position.seq, state) == (5, b"state at 5")
    assert monitoring.batches("risk", "1.0.0") == [batch(0), batch(1)]


def test_a_commit_from_a_position_that_was_left_stores_nothing(
    database: Database, monitoring: SqlMonitoring
) -> None:
    """Of two monitors that read the same rows one counts them; the other must leave no trace at all."""
    was = start(monitoring)
    assert monitoring.commit(step(was, 5))
    seen = incident()

    stored = monitoring.commit(
        step(
            was,
            6,
            batches=(batch(0),),
            reports=(report(0),),
            opened=(seen,),
            alert=alert(seen),
            retrain=job(),
        )
    )

    assert not stored
    assert monitoring.state("risk")[0].seq == 5
    assert monitoring.batches("risk", "1.0.0") == []
    assert monitoring.reports("risk", "drift") == ([], None)
    assert monitoring.incidents(IncidentQuery()) == ([], None)
    assert monitoring.alerts(None, 10, None) == ([], None)
    assert (delivered_to(database), jobs(database)) == ([], [])


def test_of_many_monitors_at_once_one_commits(url: str, database: Database) -> None:
    """The race is decided by the database, whatever the timing."""
    was = start(SqlMonitoring(database))
    barrier = threading.Barrier(8)
    outcomes: list[bool] = []

    def race(number: int) -> None:
        with closing(Database(url)) as own:
            monitoring = SqlMonitoring(own)
            barrier.wait()
            outcomes.append(monitoring.commit(step(was, 10 + number, batches=(batch(0),))))

    threads = [threading.Thread(target=race, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(outcomes) == [False] * 7 + [True]


def test_the_newest_batches_and_reports_are_kept(database: Database, monitoring: SqlMonitoring) -> None:
    """The ring is as long as the largest window, and a year of reports must not fill the disk."""
    batches = tuple(batch(number) for number in range(KEPT_BATCHES + 6))
    reports = tuple(report(number) for number in range(KEPT_REPORTS + 6))
    other = report(0, "performance")

    monitoring.commit(step(start(monitoring), 5, batches=batches, reports=(*reports, other)))

    assert monitoring.batches("risk", "1.0.0") == list(batches[6:])
    assert monitoring.reports("risk", "drift", limit=1000) == (list(reports[:5:-1]), None)
    assert monitoring.reports("risk", "performance", "1.0.0") == ([other], None)


def test_one_cause_is_open_once(database: Database, monitoring: SqlMonitoring) -> None:
    """However often and by whomever it is seen, people are told of one thing."""
    first, second = incident(), incident()

    monitoring.commit(step(start(monitoring), 1, opened=(first,)))
    monitoring.commit(step(start(monitoring), 2, opened=(second, incident("drift:age"))))
    found, _ = monitoring.incidents(IncidentQuery("risk"))

    assert {(one.cause, one.id == second.id) for one in found} == {
        ("drift:income", False),
        ("drift:age", False),
    }


def test_an_update_keeps_the_acknowledgement_and_a_resolved_cause_may_open_again(
    database: Database, monitoring: SqlMonitoring
) -> None:
    """The monitor and a person write to the same incident, each their own part."""
    seen = incident()
    monitoring.commit(step(start(monitoring), 1, opened=(seen,)))
    known = monitoring.acknowledge(seen.id, "ann", AT_MS + 5)
    worse = msgspec.structs.replace(
        seen, severity=Severity.CRITICAL, evidence={"d": 0.5}, updated_at_ms=AT_MS + 9
    )

    monitoring.commit(step(start(monitoring), 2, changed=(worse,)))
    (updated,), _ = monitoring.incidents(IncidentQuery(unresolved=True))
    over = msgspec.structs.replace(
        worse, status=IncidentStatus.RESOLVED, resolved_at_ms=AT_MS + 10, resolution="the stream is back"
    )
    monitoring.commit(step(start(monitoring), 3, changed=(over,)))
    again = incident()
    monitoring.commit(step(start(monitoring), 4, opened=(again,)))
    both, _ = monitoring.incidents(IncidentQuery(model_version="1.0.0"))
    (unresolved,), _ = monitoring.incidents(IncidentQuery(unresolved=True))

    assert (known.status, known.acknowledged_by) == (IncidentStatus.ACKNOWLEDGED, "ann")
    assert (updated.status, updated.severity, updated.evidence) == (
        IncidentStatus.ACKNOWLEDGED,
        Severity.CRITICAL,
        {"d": 0.5},
    )
    assert {(one.id, one.status, one.resolution) for one in both} == {
        (seen.id, IncidentStatus.RESOLVED, "the stream is back"),
        (again.id, IncidentStatus.OPEN, None),
    }
    assert unresolved == again


def test_acknowledging_is_on_record_and_refused_for_what_has_ended(
    database: Database, monitoring: SqlMonitoring
) -> None:
    """Who took it up must be known later; nobody takes up what is over."""
    seen, over = incident(), incident("drift:age", status=IncidentStatus.RESOLVED, resolution="it is back")
    monitoring.commit(step(start(monitoring), 1, opened=(seen, over)))

    monitoring.acknowledge(seen.id, "ann", AT_MS)
    twice = monitoring.acknowledge(seen.id, "bob", AT_MS + 1)

    entry = SqlRegistry(database).audit(1)[0]
    assert twice.acknowledged_by == "ann"
    assert (entry.actor, entry.action, entry.subject, entry.details["cause"]) == (
        "ann",
        "acknowledge",
        "risk 1.0.0",
        "drift:income",
    )
    with pytest.raises(IncidentResolved, match="it is back"):
        monitoring.acknowledge(over.id, "ann", AT_MS)
    with pytest.raises(IncidentUnknown):
        monitoring.acknowledge(new_id(), "ann", AT_MS)
    with pytest.raises(InvalidField):
        monitoring.acknowledge("x", "ann", AT_MS)


def test_an_alert_waits_for_delivery_to_each_channel(database: Database, monitoring: SqlMonitoring) -> None:
    """It is stored with what caused it, so that no crash between the two leaves people untold."""
    seen = incident()
    told = alert(seen)

    monitoring.commit(step(start(monitoring), 1, opened=(seen,), alert=told))

    assert monitoring.alerts("risk", 10, None) == ([told], None)
    assert delivered_to(database) == [("alert", "chat"), ("alert", "pager")]
    with database.read() as connection:
        payloads = connection.execute(select(deliveries.c.payload)).scalars().all()
    assert [msgspec.convert(payload, Alert) for payload in payloads] == [told, told]


def test_a_retraining_that_is_asked_for_twice_is_one(database: Database, monitoring: SqlMonitoring) -> None:
    """The id is made of what was seen; a second healer run would cost money and confuse everybody."""
    monitoring.commit(step(start(monitoring), 1, retrain=job()))
    monitoring.commit(step(start(monitoring), 2, retrain=job(at_ms=AT_MS + 1)))

    assert jobs(database) == ["ab" * 16]
    assert delivered_to(database) == [("retrain", "kafka")]
    assert monitoring.retrain_requests("risk", AT_MS) == (AT_MS, 1)
    assert monitoring.retrain_requests("risk", AT_MS + 1) == (AT_MS, 0)
    assert monitoring.retrain_requests("other", 0) == (None, 0)


def test_a_check_that_is_asked_for_is_answered_once(database: Database, monitoring: SqlMonitoring) -> None:
    """One that came after the answer was begun is still waited for."""
    assert not monitoring.request_check("unknown", AT_MS)
    was = start(monitoring)

    assert monitoring.request_check("risk", AT_MS)
    waiting = waiting_since(monitoring)
    monitoring.request_check("risk", AT_MS + 7)
    monitoring.commit(step(was, 1, reports=(report(0),), answers_check=AT_MS))
    still = waiting_since(monitoring)
    monitoring.commit(step(start(monitoring), 2, reports=(report(1),), answers_check=AT_MS + 7))

    assert (waiting, still, waiting_since(monitoring)) == (AT_MS, AT_MS + 7, None)


def test_idle_models_are_moved_on_together_unless_they_moved_themselves(
    database: Database, monitoring: SqlMonitoring
) -> None:
    """Else a model that nobody asks would make each restart read the log from its last prediction on."""
    register(database, "busy")
    positions = {name: one.position for name, one in monitoring.standings().items()}
    monitoring.commit(step(positions["risk"], 3))
    end = LogPosition(9, 9, FIRST_OUTCOME)

    monitoring.skip({"busy": (positions["busy"], end), "risk": (positions["risk"], end)})

    assert monitoring.standings()["busy"].position == end
    assert monitoring.standings()["risk"].position.seq == 3


def test_reports_come_in_pages(database: Database, monitoring: SqlMonitoring) -> None:
    """All that are kept, each once, the newest first, ties of time included."""
    reports = tuple(msgspec.structs.replace(report(n), created_at_ms=AT_MS + n // 3) for n in range(7))
    monitoring.commit(step(start(monitoring), 1, reports=(*reports, report(0, "performance"))))

    pages: list[list[MonitorReport]] = []
    cursor = None
    while not pages or cursor is not None:
        page, cursor = monitoring.reports("risk", "drift", "1.0.0", 2, cursor)
        pages.append(page)

    expected = sorted(reports, key=lambda one: (one.created_at_ms, one.id), reverse=True)
    assert pages == [expected[:2], expected[2:4], expected[4:6], expected[6:]]
    with pytest.raises(InvalidField, match="cursor"):
        monitoring.reports("risk", "drift", cursor="nowhere")


def test_incidents_and_alerts_come_in_pages(database: Database, monitoring: SqlMonitoring) -> None:
    """All of them, each once, the newest first, ties of time included."""
    opened = [incident(f"drift:{n}", opened_at_ms=AT_MS + n // 2) for n in range(5)]
    for n, one in enumerate(opened):
        monitoring.commit(step(start(monitoring), n + 1, opened=(one,), alert=alert(one, at_ms=AT_MS)))

    causes: list[str] = []
    told: list[str] = []
    cursor = None
    while True:
        page, cursor = monitoring.incidents(IncidentQuery(limit=2, cursor=cursor))
        causes += [one.cause for one in page]
        if cursor is None:
            break
    while True:
        alerts, cursor = monitoring.alerts(None, 2, cursor)
        told += [one.incidents[0] for one in alerts]
        if cursor is None:
            break

    assert causes == [f"drift:{n}" for n in (4, 3, 2, 1, 0)]
    assert told == [one.id for one in reversed(opened)]


def test_settings_of_a_model_stand_over_those_of_all(database: Database, monitoring: SqlMonitoring) -> None:
    """One place for the rule of the house, one for the exception; both are on record."""
    monitoring.change_settings(ALL_MODELS, {"batch_rows": 500, "budget": 1}, "ann")
    monitoring.change_settings("risk", {"batch_rows": 200, "effects": {"income": 0.1}}, "bob")
    set_both = monitoring.settings("risk")
    monitoring.change_settings("risk", {"batch_rows": None}, "bob")
    taken_back = monitoring.settings("risk")
    replaced = monitoring.change_settings("risk", {"budget": 5}, "bob", replace=True)

    assert set_both == MonitorSettings(batch_rows=200, budget=1, effects={"income": 0.1})
    assert taken_back.batch_rows == 500
    assert replaced == MonitorSettings(batch_rows=500, budget=5)
    assert monitoring.settings("other") == MonitorSettings(batch_rows=500, budget=1)
    entry = SqlRegistry(database).audit(1)[0]
    assert (entry.actor, entry.action, entry.subject, entry.details) == (
        "bob",
        "monitoring",
        "risk",
        {"budget": 5},
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_rows": 10},
        {"colour": 1},
        {"colour": None},
        {"effects": {"x": 2}},
        {"challenger_policy": "ab:2"},
    ],
)
def test_settings_that_make_no_sense_are_refused(monitoring: SqlMonitoring, changes: dict[str, Any]) -> None:
    """A monitor that misreads its settings watches nothing and says nothing."""
    with pytest.raises(InvalidField, match="known settings are batch_rows"):
        monitoring.change_settings("risk", changes, "ann")

    assert monitoring.settings("risk") == MonitorSettings()


@pytest.mark.parametrize("changes", [{"left_out": ["incom"]}, {"effects": {"incom": 0.1}}])
def test_settings_of_a_feature_that_no_version_has_are_refused(
    monitoring: SqlMonitoring, changes: dict[str, Any]
) -> None:
    """Misspelt, they would leave the feature watched as before, and nobody would know."""
    with pytest.raises(InvalidField, match="risk has no feature incom; it has _result, _score, income"):
        monitoring.change_settings("risk", changes, "ann")

    assert monitoring.settings("risk") == MonitorSettings()


def test_settings_of_a_model_that_is_not_registered_are_refused(monitoring: SqlMonitoring) -> None:
    """A misspelt name must not look as if it had worked."""
    with pytest.raises(ModelUnknown):
        monitoring.change_settings("rsik", {"budget": 1}, "ann")


def test_a_model_that_no_monitor_has_seen_is_unknown_here(monitoring: SqlMonitoring) -> None:
    """There is nothing to go on from."""
    with pytest.raises(ModelUnknown):
        monitoring.state("risk")
