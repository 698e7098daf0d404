"""The views that dashboards read, over SQLite and a real PostgreSQL: their numbers are those of a hand calculation."""

from collections.abc import Iterator
from contextlib import closing
from itertools import product
from typing import Any

import msgspec
import numpy as np
import pytest
from databases import empty
from sample_events import COLUMNS, outcome, prediction
from sqlalchemy import insert, select, table, text
from sqlalchemy.sql import column

from phoenix_ml.application.ports import RecordedEvent
from phoenix_ml.application.statistics.quality import losses
from phoenix_ml.domain.drift import DriftReport, FeatureDrift, Verdict
from phoenix_ml.domain.events import OutcomeReported, PredictionMade
from phoenix_ml.domain.features import FeatureRule, FeatureType
from phoenix_ml.domain.ids import new_id
from phoenix_ml.domain.models import Framework, Metadata, ModelVersion, Signature, Stage, Task, TensorSpec
from phoenix_ml.domain.routing import Role
from phoenix_ml.domain.rows import Outputs, RowFormat
from phoenix_ml.infrastructure.sql.database import Database
from phoenix_ml.infrastructure.sql.predictions import SqlPredictionLog
from phoenix_ml.infrastructure.sql.registry import SqlRegistry
from phoenix_ml.infrastructure.sql.schema import Instant, drift_reports, incidents, retrain_jobs

HOUR_MS = 3_600_000
NOON_MS = 489_000 * HOUR_MS


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    """A log of two models: `risk` says yes or no, `price` says how much."""
    with closing(Database(url)) as database:
        empty(database)
        for model_id, task in (("risk", Task.CLASSIFICATION), ("price", Task.REGRESSION)):
            metadata = Metadata(
                Signature((TensorSpec("income", "float32", (None, 1)),), ()),
                ("income",),
                {"income": FeatureRule(FeatureType.FLOAT)},
                task,
            )
            for version in ("1.0.0", "2.0.0"):
                registered = ModelVersion(
                    model_id, version, Framework.ONNX, "uri", "ab" * 32, Stage.DEV, True, NOON_MS, metadata
                )
                SqlRegistry(database).add(registered, "ann")
        yield database


def write(database: Database, *events: PredictionMade | OutcomeReported) -> None:
    SqlPredictionLog(database).write(
        [RecordedEvent(event, msgspec.msgpack.encode(event), RowFormat(COLUMNS)) for event in events]
    )


def made(version: str, role: Role, *, minutes: float, **facts: Any) -> PredictionMade:
    return prediction(
        model_version=version, role=role, created_at_ms=NOON_MS + round(minutes * 60_000), **facts
    )


def rows(database: Database, query: str) -> list[dict[str, Any]]:
    with database.read() as connection:
        return [dict(row._mapping) for row in connection.execute(text(query))]


def hours(database: Database) -> list[int]:
    """The hours of `v_variant_performance`, counted from noon, in its order of variants."""
    view = table(
        "v_variant_performance", column("model_id"), column("model_version"), column("hour", Instant)
    )
    with database.read() as connection:
        found = connection.execute(
            select(view.c.hour).order_by(view.c.model_id, view.c.model_version, view.c.hour)
        )
        return [(at_ms - NOON_MS) // HOUR_MS for at_ms in found.scalars()]


def test_the_performance_of_variants_is_what_a_hand_calculation_says(database: Database) -> None:
    """A team promotes a challenger because of these figures."""
    champion, challenger = Role.CHAMPION, Role.CHALLENGER
    right = made("1.0.0", champion, minutes=0, entity_id="ann", result=1, confidence=0.9)
    wrong = made("1.0.0", champion, minutes=59.999, entity_id="ann", result=0, confidence=0.6)
    unknown = made("1.0.0", champion, minutes=30, entity_id="bob", result=1, confidence=0.75)
    later = made("1.0.0", champion, minutes=60, entity_id="bob", result=1, confidence=None)
    other = made("2.0.0", challenger, minutes=1, entity_id=None, result="yes", confidence=0.5)
    price = {"model_id": "price", "confidence": None, "probabilities": None}
    low = made("1.0.0", champion, minutes=0, result=10.5, **price)
    high = made("1.0.0", champion, minutes=5, result=20, **price)
    write(database, right, wrong, unknown, later, other, low, high)
    write(
        database, outcome(right.id, 1), outcome(wrong.id, 1), outcome(later.id, 0), outcome(other.id, "yes")
    )
    write(database, outcome(low.id, 12), outcome(high.id, 19.5))

    found = rows(
        database,
        "SELECT model_id, model_version, role, predictions, entities, with_outcome, accuracy, mae,"
        " mean_confidence FROM v_variant_performance ORDER BY model_id, model_version, hour",
    )

    assert [
        ("price", "1.0.0", "champion", 2, 1, 2, None, 1.0, None),
        ("risk", "1.0.0", "champion", 3, 2, 2, 0.5, None, pytest.approx(0.75)),
        ("risk", "1.0.0", "champion", 1, 1, 1, 0.0, None, None),
        ("risk", "2.0.0", "challenger", 1, 0, 1, 1.0, None, 0.5),
    ] == [tuple(row.values()) for row in found]
    assert hours(database) == [0, 0, 1, 0]


def test_the_latencies_of_variants_are_those_of_numpy(database: Database) -> None:
    """On PostgreSQL; SQLite has no percentiles, so its view has no such columns."""
    latencies = [0.5, 3.0, 1.25, 40.0, 0.75]
    write(database, *(made("1.0.0", Role.CHAMPION, minutes=1, latency_ms=latency) for latency in latencies))

    (found,) = rows(database, "SELECT * FROM v_variant_performance")

    shown = [value for name, value in found.items() if name.endswith("_latency_ms")]
    assert shown == ([] if database.is_sqlite else pytest.approx(np.percentile(latencies, [50, 99])))


def test_the_first_outcome_counts(database: Database) -> None:
    """As for the monitor: a correction that comes later must not make a dashboard tell another story."""
    event = made("1.0.0", Role.CHAMPION, minutes=0, result=1)
    write(database, event, outcome(event.id, 1, observed_at_ms=NOON_MS + 2))
    write(database, outcome(event.id, 0, observed_at_ms=NOON_MS + 1))

    found = rows(database, "SELECT is_correct FROM v_prediction_outcomes")

    assert found == [{"is_correct": True}]


def test_a_shadow_has_the_outcome_of_what_it_shadowed(database: Database) -> None:
    """Nobody reports an outcome for an answer that nobody got; without it no shadow could ever be compared."""
    answered = made("1.0.0", Role.CHAMPION, minutes=0, result=1)
    shadow = made("2.0.0", Role.SHADOW, minutes=0, result=0, shadow_of=answered.id)
    write(database, answered, shadow, outcome(answered.id, 0))

    found = rows(
        database,
        "SELECT s.model_version, s.is_correct, c.model_version AS shadowed FROM v_prediction_outcomes s"
        " JOIN v_prediction_outcomes c ON c.prediction_id = s.shadow_of",
    )

    assert found == [{"model_version": "2.0.0", "is_correct": True, "shadowed": "1.0.0"}]


@pytest.mark.parametrize(
    ("result", "reported"),
    [([1.0, 2.0], 1.5), (1.5, {"low": 1.0}), (1.5, "much"), (1.5, None)],
    ids=["several results", "several outcomes", "words", "nothing"],
)
def test_what_cannot_be_compared_counts_as_nothing(database: Database, result: Any, reported: Any) -> None:
    """Models may answer several values: they have no one error, and must not break the others' view."""
    event = made("1.0.0", Role.CHAMPION, minutes=0, model_id="price", result=result)
    write(database, event, outcome(event.id, reported))

    found = rows(database, "SELECT predictions, mae, accuracy FROM v_variant_performance")

    assert found == [{"predictions": 1, "mae": None, "accuracy": None}]


LABELS = [1, True, 1.0, "1", 0, False, 2.5, "2.5", "good", "1.0", -3]


def test_labels_are_the_same_as_for_the_monitor(database: Database) -> None:
    """Outcomes come from other systems, which write 1 as true or as "1"; both must tell the same accuracy."""
    pairs = list(product(LABELS, LABELS))
    events = [made("1.0.0", Role.CHAMPION, minutes=0, result=result) for result, _ in pairs]
    write(database, *events)
    write(database, *(outcome(e.id, truth) for e, (_, truth) in zip(events, pairs, strict=True)))
    with database.read() as connection:
        answers = connection.execute(
            text("SELECT is_correct FROM v_prediction_outcomes ORDER BY prediction_id")
        ).scalars()
        found = [bool(answer) for answer in answers]

    wrong = losses(
        Task.CLASSIFICATION, Outputs([result for result, _ in pairs]), [truth for _, truth in pairs]
    )
    assert found == [loss == 0 for loss in wrong]


def test_the_newest_report_of_each_version_is_shown_by_feature(database: Database) -> None:
    """A table of features is what people look at when they are told of drift."""

    def report(version: str, minutes: int, kind: str, *features: FeatureDrift) -> dict[str, Any]:
        return {
            "id": new_id(),
            "model_id": "risk",
            "model_version": version,
            "kind": kind,
            "created_at": NOON_MS + minutes * 60_000,
            "rows": 1000,
            "report": msgspec.to_builtins(DriftReport(1000, 500, features)),
        }

    def drift(feature: str, verdict: Verdict, **facts: Any) -> FeatureDrift:
        return FeatureDrift(feature, "numeric", verdict, 990, 0.01, 0.0, (), (), (), **facts)

    older = report("1.0.0", 0, "drift", drift("income", Verdict.STEADY, distance=0.01))
    newer = report(
        "1.0.0",
        1,
        "drift",
        drift("income", Verdict.DRIFT, distance=0.5, p=1e-9),
        drift("age", Verdict.LEFT_OUT),
    )
    other = report("2.0.0", 0, "drift", drift("income", Verdict.STEADY, distance=0.02))
    quality = report("1.0.0", 2, "performance")
    with database.write() as connection:
        connection.execute(insert(drift_reports), [older, newer, other, quality])

    found = rows(
        database,
        "SELECT model_version, feature, verdict, rows, missing, distance, p FROM v_drift_latest"
        " ORDER BY model_version, feature",
    )

    assert [tuple(row.values()) for row in found] == [
        ("1.0.0", "age", "left out", 990, 0.01, None, None),
        ("1.0.0", "income", "drift", 990, 0.01, 0.5, 1e-9),
        ("2.0.0", "income", "steady", 990, 0.01, 0.02, None),
    ]


def test_the_timeline_tells_what_happened_in_order(database: Database) -> None:
    """One list of incidents and of what was done about them, for graphs and for people."""
    version = {"model_id": "risk", "model_version": "1.0.0", "evidence": {}}
    incident = version | {
        "id": new_id(),
        "kind": "drift",
        "cause": "drift:income",
        "severity": "warning",
        "summary": "income has moved",
        "status": "resolved",
        "opened_at": NOON_MS,
        "updated_at": NOON_MS + 4,
        "acknowledged_at": NOON_MS + 1,
        "acknowledged_by": "ann",
        "resolved_at": NOON_MS + 4,
        "resolution": "it is back",
    }
    job = version | {
        "id": "j",
        "reason": "drift that hurts",
        "status": "registered",
        "requested_at": NOON_MS + 2,
        "updated_at": NOON_MS + 3,
        "attempts": 1,
        "not_before": NOON_MS,
        "owned_until": NOON_MS,
        "new_version": "1.1.0",
        "log_tail": "",
    }
    with database.write() as connection:
        connection.execute(insert(incidents), [incident])
        connection.execute(insert(retrain_jobs), [job])

    found = rows(database, "SELECT event, cause, text FROM v_incident_timeline ORDER BY at")

    assert [tuple(row.values()) for row in found] == [
        ("incident opened", "drift:income", "income has moved"),
        ("incident acknowledged", "drift:income", "ann"),
        ("retraining requested", "retraining", "drift that hurts"),
        ("retraining registered", "retraining", "1.1.0"),
        ("incident resolved", "drift:income", "it is back"),
    ]
