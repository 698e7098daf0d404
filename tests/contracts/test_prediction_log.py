"""The prediction log's contract, and the way from the journal into it, over SQLite and a real PostgreSQL."""

import base64
import json
import math
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from datetime import UTC, datetime
from itertools import permutations
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import msgspec
import pytest
from databases import empty
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sample_events import AT_MS, COLUMNS, DIGEST, SCHEMA, outcome, prediction
from servers import PostgresServer
from sqlalchemy import text

from phoenix_ml.application.feedback import report_outcomes
from phoenix_ml.application.ports import (
    EventRejected,
    LoggedPrediction,
    PredictionQuery,
    RecordedEvent,
    UnreadableEvent,
)
from phoenix_ml.application.recording import Recorded, record_events
from phoenix_ml.domain.errors import BatchTooLarge, DatabaseUnavailable, InvalidField, PredictionUnknown
from phoenix_ml.domain.events import OutcomeReported, PredictionMade
from phoenix_ml.domain.features import FeatureRule, FeatureType
from phoenix_ml.domain.ids import new_id
from phoenix_ml.domain.models import Framework, Metadata, ModelVersion, Signature, Stage, Task, TensorSpec
from phoenix_ml.domain.predictions import Feedback
from phoenix_ml.domain.rows import RowFormat
from phoenix_ml.infrastructure.events.deadletters import FileDeadLetters
from phoenix_ml.infrastructure.events.journal import JournalWriter
from phoenix_ml.infrastructure.events.local import LocalEvents
from phoenix_ml.infrastructure.sql.database import Database
from phoenix_ml.infrastructure.sql.predictions import SqlPredictionLog
from phoenix_ml.infrastructure.sql.registry import SqlRegistry

REAL_DATABASE = {"suppress_health_check": [HealthCheck.function_scoped_fixture]}


def recorded(*events: PredictionMade | OutcomeReported) -> list[RecordedEvent]:
    return [RecordedEvent(event, msgspec.msgpack.encode(event), RowFormat(COLUMNS)) for event in events]


def add_models(database: Database) -> None:
    """The model that the predictions are of, in two versions."""
    metadata = Metadata(
        Signature((TensorSpec("income", "float32", (None, 1)),), (TensorSpec("y", "float32", (None, 1)),)),
        ("income",),
        {"income": FeatureRule(FeatureType.FLOAT)},
        Task.REGRESSION,
    )
    for number in ("1.0.0", "2.0.0"):
        SqlRegistry(database).add(
            ModelVersion("risk", number, Framework.ONNX, "uri", "ab" * 32, Stage.DEV, True, AT_MS, metadata),
            "ann",
        )


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    with closing(Database(url)) as database:
        empty(database)
        add_models(database)
        yield database


@pytest.fixture
def log(database: Database) -> SqlPredictionLog:
    return SqlPredictionLog(database)


def all_rows(log: SqlPredictionLog, **query: Any) -> list[LoggedPrediction]:
    """Every row, page by page."""
    rows: list[LoggedPrediction] = []
    cursor = None
    while True:
        page, cursor = log.page(PredictionQuery(**query, cursor=cursor))
        rows += page
        if cursor is None:
            return rows


def test_a_prediction_comes_back_with_all_that_explains_it(log: SqlPredictionLog) -> None:
    """The row alone must suffice to compute the answer again."""
    event = prediction(shadow_of=new_id(), device="cuda:0")
    assert log.write(recorded(event)) == 1
    row = log.get(event.id)
    assert row == LoggedPrediction(
        id=event.id,
        seq=1,
        model_id="risk",
        model_version="1.0.0",
        features={"income": 1.5, "city": "Oslo", "visits": 7},
        result=1,
        confidence=0.75,
        probabilities=[0.25, 0.75],
        latency_ms=0.375,
        created_at_ms=AT_MS,
        entity_id="cust_99",
        request_id="request-1",
        route={
            "strategy": "canary",
            "role": "challenger",
            "probability": 0.25,
            "routing_key": "cust_99",
            "shadow_of": event.shadow_of,
            "device": "cuda:0",
        },
        feature_sources={"income": "store", "city": "request", "visits": "default"},
        sha256="ab" * 32,
        batch_size=4,
        batch_position=2,
        inputs=event.inputs,
    )
    assert log.page(PredictionQuery()) == ([row], None)


def test_the_same_events_written_twice_are_stored_once(log: SqlPredictionLog) -> None:
    """Delivery is at least once; the log makes exactly once of it."""
    one, two = prediction(), prediction()
    truth = outcome(one.id)
    assert log.write(recorded(one, truth)) == 2
    assert log.write(recorded(one, two, truth)) == 1
    assert log.write(recorded(one, two, truth)) == 0
    assert log.write(recorded(three := prediction(), three)) == 1
    assert {row.id for row in all_rows(log)} == {one.id, two.id, three.id}
    assert log.unmatched_outcomes(10) == (0, [])


def test_a_repeated_id_leaves_the_first_row_as_it_is(log: SqlPredictionLog) -> None:
    """What was once on record is not rewritten."""
    first = prediction()
    log.write(recorded(first))
    log.write(recorded(msgspec.structs.replace(first, result=0, confidence=0.1)))
    assert log.get(first.id).result == 1


@pytest.mark.parametrize(
    "loss",
    [
        "UPDATE counters SET value = 1 WHERE name = 'prediction_seq'",
        "DELETE FROM counters WHERE name = 'prediction_seq'",
    ],
)
def test_a_counter_that_a_partial_restore_left_behind_goes_on_after_the_newest_row(
    log: SqlPredictionLog, database: Database, loss: str
) -> None:
    """A number given twice would send every later prediction to the dead letters."""
    before = [prediction() for _ in range(4)]
    log.write(recorded(*before))
    with database.write() as connection:
        connection.execute(text(loss))
    after = [prediction() for _ in range(3)]

    written = [log.write(recorded(*after[:2])), log.write(recorded(after[2]))]

    assert written == [2, 1]
    assert [log.get(event.id).seq for event in (*before, *after)] == [1, 2, 3, 4, 5, 6, 7]


def test_nothing_is_written_for_no_events(log: SqlPredictionLog) -> None:
    """An empty batch is no error."""
    assert log.write([]) == 0


def test_an_event_of_a_model_that_is_not_registered_is_rejected(log: SqlPredictionLog) -> None:
    """The foreign key keeps the log explainable; the whole batch is undone."""
    for stranger in (prediction(model_id="unknown"), prediction(model_version="9.9.9")):
        with pytest.raises(EventRejected, match=r"(?i)foreign key"):
            log.write(recorded(prediction(), stranger))
    assert all_rows(log) == []


def test_an_event_that_fits_no_row_is_rejected_or_stored_but_nothing_foreign_is_raised(
    log: SqlPredictionLog,
) -> None:
    """The log role buries what is rejected; by any other exception one event would stop it for ever."""
    for broken in (
        prediction(inputs=b"\x00"),
        prediction(inputs=prediction().inputs[:-2] + b"\xff\xfe"),
        prediction(sources="sr"),
        prediction(sources="xyz"),
        prediction(id="no uuid"),
        prediction(created_at_ms=10**17),
        outcome("no uuid"),
        outcome(new_id(), observed_at_ms=10**17),
        outcome(new_id(), observed_at_ms=-(10**17)),
        outcome(new_id(), observed_at_ms=2**64 - 1),
        prediction(result={None: 1}),
        outcome(new_id(), msgspec.msgpack.Ext(1, b"what JSON has no word for")),
        # Longer than PostgreSQL can index, even compressed.
        prediction(entity_id=random.Random(7).randbytes(4000).hex()),
    ):
        with suppress(EventRejected):
            log.write(recorded(broken))
        assert log.write(recorded(prediction())) == 1


def test_a_nul_character_is_rejected_where_the_database_cannot_hold_it(
    log: SqlPredictionLog, database: Database
) -> None:
    """PostgreSQL has no U+0000 in texts; SQLite has."""
    for nul in (prediction(entity_id="a\0b"), outcome(new_id(), {"label": "a\0b"})):
        if database.is_sqlite:
            assert log.write(recorded(nul)) == 1
        else:
            with pytest.raises(EventRejected):
                log.write(recorded(nul))


def test_not_a_number_is_null_for_reading_and_exact_for_replay(log: SqlPredictionLog) -> None:
    """JSON has no NaN, and a replay needs the very bits."""
    rows = [(math.nan, "", 0), (math.inf, "x", 1), (-math.inf, "ÅØ€😀", -(2**63)), (0.1, "", 2**63 - 1)]
    events = [prediction(row) for row in rows]
    log.write(recorded(*events))
    found = [log.get(event.id) for event in events]
    assert [row.features["income"] for row in found[:3]] == [None, None, None]
    assert found[3].features["income"] == pytest.approx(0.1)
    assert [row.features["visits"] for row in found] == [0, 1, -(2**63), 2**63 - 1]
    assert found[2].features["city"] == "ÅØ€😀"
    assert [row.inputs for row in found] == [event.inputs for event in events]


def test_results_of_any_type_come_back(log: SqlPredictionLog) -> None:
    """A label stays a text, a class number an int, a regression a float or a list."""
    results: list[tuple[Any, Any]] = [
        (value, value) for value in ("yes", "", 3, True, 2.5, 1e-300, [1.5, 2.0])
    ]
    results += [(math.nan, None), (math.inf, None), ([1.5, math.nan], [1.5, None])]
    for result, readable in results:
        event = prediction(result=result, confidence=None, probabilities=None)
        log.write(recorded(event))
        row = log.get(event.id)
        assert (row.result, type(row.result)) == (readable, type(readable))
        assert (row.confidence, row.probabilities) == (None, None)


def test_a_probability_that_is_not_a_number_is_null(log: SqlPredictionLog) -> None:
    """A model may answer NaN; the answer is still put on record."""
    event = prediction(probabilities=[math.nan, 0.5], confidence=math.nan)
    log.write(recorded(event))
    row = log.get(event.id)
    assert row.probabilities == [None, 0.5]
    assert row.confidence is None or math.isnan(row.confidence)


@settings(max_examples=20, **REAL_DATABASE)  # type: ignore[arg-type]
@given(
    row=st.tuples(
        st.floats(width=32),
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20),
        st.integers(-(2**63), 2**63 - 1),
    ),
    created_at_ms=st.integers(0, 253_402_300_799_999),
)
def test_any_row_is_kept_to_the_bit_and_to_the_millisecond(
    log: SqlPredictionLog, row: tuple[float, str, int], created_at_ms: int
) -> None:
    """Times pass through timestamptz in PostgreSQL, values through JSON and bytes."""
    event = prediction(row, created_at_ms=created_at_ms)
    log.write(recorded(event))
    found = log.get(event.id)
    assert found.inputs == event.inputs
    assert found.created_at_ms == created_at_ms
    assert found.features["city"] == row[1]
    assert found.features["visits"] == row[2]


def test_a_prediction_that_is_not_in_the_log_is_unknown(log: SqlPredictionLog) -> None:
    """It may still be on its way; what is no id at all is another mistake."""
    with pytest.raises(PredictionUnknown):
        log.get(str(uuid4()))
    for odd in ("x", "", "a\0", "1" * 5000):
        with pytest.raises(InvalidField):
            log.get(odd)


def test_an_id_may_be_written_in_any_form_of_a_uuid(log: SqlPredictionLog) -> None:
    """Upper case and missing dashes are the same number."""
    event = prediction()
    log.write(recorded(event))
    assert log.get(event.id.upper()).id == event.id
    assert log.get(UUID(event.id).hex).id == event.id


def test_seq_follows_the_order_of_commits_under_two_writers(url: str, database: Database) -> None:
    """A reader that remembers the last seq it saw must never find a smaller one later."""
    seen: list[int] = []
    late: list[int] = []
    with closing(Database(url)) as other, closing(Database(url)) as third:
        logs = [SqlPredictionLog(database), SqlPredictionLog(other)]
        barrier = threading.Barrier(3)
        done = threading.Event()

        def write(log: SqlPredictionLog) -> None:
            barrier.wait()
            for size in (1, 5, 2, 9, 3, 1, 7, 2, 4, 6) * 2:
                log.write(recorded(*(prediction() for _ in range(size))))

        def follow() -> None:
            barrier.wait()
            last = 0
            while not done.is_set():
                with third.read() as connection:
                    rows = connection.execute(text("SELECT seq FROM prediction_logs ORDER BY seq"))
                    found = [int(seq) for (seq,) in rows]
                late.extend(seq for seq in found if seq <= last and seq not in seen)
                seen.extend(seq for seq in found if seq > last)
                last = max(found, default=0)

        threads = [threading.Thread(target=write, args=(log,)) for log in logs]
        follower = threading.Thread(target=follow)
        for thread in (*threads, follower):
            thread.start()
        for thread in threads:
            thread.join()
        done.set()
        follower.join()
    assert late == []
    numbers = sorted(row.seq for row in all_rows(SqlPredictionLog(database), limit=100))
    assert len(numbers) == len(set(numbers)) == 160
    assert set(seen) <= set(numbers)


def test_seq_grows_within_a_batch_in_the_order_given(log: SqlPredictionLog) -> None:
    """The order in which a process answered is the order on record."""
    events = [prediction() for _ in range(20)]
    log.write(recorded(*events[:12]))
    log.write(recorded(*events[12:]))
    numbers = [log.get(event.id).seq for event in events]
    assert numbers == sorted(numbers)
    assert len(set(numbers)) == 20


def test_pages_cover_equal_times_exactly_once_newest_first(log: SqlPredictionLog) -> None:
    """At 1,000 answers a second many rows have the same millisecond; none may fall between two pages."""
    times = [AT_MS, AT_MS, AT_MS, AT_MS + 1, AT_MS - 1] * 12
    events = [prediction(id=str(uuid4()), created_at_ms=at_ms) for at_ms in times]
    log.write(recorded(*events))
    for limit in (1, 7, 59, 60, 61):
        rows = all_rows(log, limit=limit)
        expected = sorted(((e.created_at_ms, e.id) for e in events), reverse=True)
        assert [(row.created_at_ms, row.id) for row in rows] == expected


@settings(max_examples=12, **REAL_DATABASE)  # type: ignore[arg-type]
@given(
    offsets=st.lists(st.integers(-2, 2), max_size=25),
    limit=st.integers(1, 9),
    since=st.none() | st.integers(-2, 3),
    until=st.none() | st.integers(-2, 3),
)
def test_pages_of_any_span_are_what_a_sort_says(
    log: SqlPredictionLog, offsets: list[int], limit: int, since: int | None, until: int | None
) -> None:
    """The span's beginning belongs to it, its end does not."""
    entity = str(uuid4())
    events = [prediction(id=str(uuid4()), entity_id=entity, created_at_ms=AT_MS + n) for n in offsets]
    log.write(recorded(*events))
    rows = all_rows(
        log,
        limit=limit,
        entity_id=entity,
        since_ms=None if since is None else AT_MS + since,
        until_ms=None if until is None else AT_MS + until,
    )
    expected = [
        (event.created_at_ms, event.id)
        for event in events
        if (since is None or event.created_at_ms >= AT_MS + since)
        and (until is None or event.created_at_ms < AT_MS + until)
    ]
    assert [(row.created_at_ms, row.id) for row in rows] == sorted(expected, reverse=True)


def test_filters_narrow_the_list(log: SqlPredictionLog) -> None:
    """Each filter alone and all together."""
    one = prediction()
    two = prediction(model_version="2.0.0", entity_id="cust_1")
    three = prediction(model_version="2.0.0", entity_id=None)
    log.write(recorded(one, two, three))

    def ids(**query: Any) -> set[str]:
        return {row.id for row in all_rows(log, **query)}

    assert ids(model_id="risk") == {one.id, two.id, three.id}
    assert ids(model_id="churn") == set()
    assert ids(model_version="2.0.0") == {two.id, three.id}
    assert ids(entity_id="cust_1") == {two.id}
    assert ids(model_id="risk", model_version="1.0.0", entity_id="cust_99") == {one.id}
    assert ids(model_id="risk", model_version="1.0.0", entity_id="cust_1") == set()


def test_a_span_beyond_all_dates_raises_only_errors_of_ours(log: SqlPredictionLog) -> None:
    """Dates come from callers; PostgreSQL's end in the year 294276, Python's in 9999."""
    log.write(recorded(prediction()))
    for at_ms in (10**14, -(10**14), 2**70):
        for query in (PredictionQuery(since_ms=at_ms), PredictionQuery(until_ms=at_ms)):
            with suppress(InvalidField):
                rows, _ = log.page(query)
                assert len(rows) == ((at_ms > 0) == (query.until_ms is not None))


cursors = st.one_of(
    st.text(max_size=30),
    st.builds("{}.{}".format, st.integers(), st.uuids()),
    st.builds("{}.{}".format, st.integers(-(10**30), 10**30), st.uuids()),
    st.builds("{}.{}".format, st.integers(0, 10**12), st.text(max_size=40)),
    st.sampled_from(["", ".", "1.", "1.2", f"²5.{uuid4()}", f"1.5.{uuid4()}", f"nan.{uuid4()}", "9" * 5000]),
)


@settings(max_examples=40, **REAL_DATABASE)  # type: ignore[arg-type]
@given(cursor=cursors)
def test_a_cursor_that_no_page_has_answered_is_an_invalid_field(log: SqlPredictionLog, cursor: str) -> None:
    """A cursor comes from a URL: it starts a page or is refused, and nothing else."""
    refusals: list[dict[str, Any]] = []
    try:
        assert log.page(PredictionQuery(cursor=cursor)) == ([], None)
    except InvalidField as exc:
        refusals.append(exc.details)
    assert refusals in ([], [{"field": "cursor"}])


def test_filters_with_odd_texts_find_nothing_or_are_refused(log: SqlPredictionLog) -> None:
    """What the database cannot hold is the asker's mistake, not a failure of the server."""
    for odd in ("a\0b", "\ud800", "x" * 5000, "%", "' OR 1=1 --"):
        for query in (
            PredictionQuery(model_id=odd),
            PredictionQuery(model_version=odd),
            PredictionQuery(entity_id=odd),
        ):
            with suppress(InvalidField):
                assert log.page(query) == ([], None)


def test_an_outcome_joins_its_prediction_whichever_comes_first(log: SqlPredictionLog) -> None:
    """Feedback may overtake the prediction's row; both ways it counts."""
    early, late = prediction(), prediction()
    log.write(recorded(outcome(early.id, "repaid")))
    assert log.unmatched_outcomes(10)[0] == 1
    log.write(recorded(early, late))
    log.write(recorded(outcome(late.id, {"amount": 12.5, "paid": True}, AT_MS + 5)))
    assert log.unmatched_outcomes(10) == (0, [])
    assert (log.get(early.id).outcome, log.get(early.id).outcome_at_ms) == ("repaid", AT_MS)
    assert log.get(late.id).outcome == {"amount": 12.5, "paid": True}
    assert log.get(late.id).outcome_at_ms == AT_MS + 5
    assert {row.id: row.outcome for row in all_rows(log)}[early.id] == "repaid"


def test_an_outcome_and_its_prediction_in_one_batch_match(log: SqlPredictionLog) -> None:
    """The log role reads many events at once."""
    event = prediction()
    assert log.write(recorded(outcome(event.id), event)) == 2
    assert log.unmatched_outcomes(1) == (0, [])


def test_the_outcome_observed_last_wins_in_whatever_order_they_arrive(log: SqlPredictionLog) -> None:
    """A correction may overtake what it corrects."""
    for order in permutations(range(3)):
        event = prediction()
        log.write(recorded(event))
        for position in order:
            log.write(recorded(outcome(event.id, f"truth {position}", AT_MS + position)))
        assert (log.get(event.id).outcome, log.get(event.id).outcome_at_ms) == ("truth 2", AT_MS + 2)


def test_unmatched_outcomes_are_counted_and_the_newest_listed(log: SqlPredictionLog) -> None:
    """They tell an operator that ids are wrong somewhere, or that predictions are late."""
    events = [outcome(new_id(), n, received_at_ms=AT_MS + n) for n in range(5)]
    log.write(recorded(*events, prediction()))
    count, newest = log.unmatched_outcomes(2)
    assert count == 5
    assert [item.id for item in newest] == [events[4].id, events[3].id]
    assert (newest[0].prediction_id, newest[0].outcome) == (events[4].prediction_id, 4)
    assert (newest[0].observed_at_ms, newest[0].received_at_ms) == (AT_MS, AT_MS + 4)
    assert log.unmatched_outcomes(0) == (5, [])
    log.write(recorded(prediction(id=events[4].prediction_id)))
    count, newest = log.unmatched_outcomes(1)
    assert (count, newest[0].id) == (4, events[3].id)


def test_unmatched_outcomes_are_read_in_pages(log: SqlPredictionLog) -> None:
    """Also those that came in the same millisecond, each once."""
    events = [outcome(new_id(), n, received_at_ms=AT_MS + n // 3) for n in range(7)]
    log.write(recorded(*events))
    _, found = log.unmatched_outcomes(3)
    pages = [found]
    while found:
        _, found = log.unmatched_outcomes(3, found[-1].cursor)
        pages.append(found)
    expected = sorted(events, key=lambda event: (event.received_at_ms, event.id), reverse=True)
    assert [len(page) for page in pages] == [3, 3, 1, 0]
    assert [item.id for page in pages for item in page] == [event.id for event in expected]
    with pytest.raises(InvalidField):
        log.unmatched_outcomes(3, "yesterday")


def test_more_outcomes_than_a_statement_has_parameters_are_matched(log: SqlPredictionLog) -> None:
    """SQLite bounds the parameters of one statement; a full batch must not meet that bound."""
    events = [prediction() for _ in range(1200)]
    log.write(recorded(*(outcome(event.id) for event in events)))
    assert log.unmatched_outcomes(0)[0] == 1200
    log.write(recorded(*events))
    assert log.unmatched_outcomes(0)[0] == 0


def test_an_outcome_and_its_prediction_never_pass_each_other_unseen(url: str, database: Database) -> None:
    """Two log workers commit them at the same moment: each must see the other's row, or wait for it."""
    with closing(Database(url)) as other:
        one, two = SqlPredictionLog(database), SqlPredictionLog(other)
        pairs = [(event, outcome(event.id)) for event in (prediction() for _ in range(30))]
        barrier = threading.Barrier(2)

        def write(log: SqlPredictionLog, events: Sequence[PredictionMade | OutcomeReported]) -> None:
            for event in events:
                barrier.wait()
                log.write(recorded(event))

        threads = [
            threading.Thread(target=write, args=(one, [event for event, _ in pairs])),
            threading.Thread(target=write, args=(two, [truth for _, truth in pairs])),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert one.unmatched_outcomes(0)[0] == 0


# --- from the journal into the log ---------------------------------------------------------------------


class Road:
    """A journal, its reader and the dead letters, in one folder."""

    def __init__(self, folder: Path) -> None:
        self.writer = JournalWriter(folder / "journal" / "api-0")
        self.events = LocalEvents(folder / "journal")
        self.letters = folder / "dead.jsonl"
        self.bury = FileDeadLetters(self.letters, folder / "journal").bury

    def append(self, *events: PredictionMade | OutcomeReported) -> None:
        for event in events:
            self.writer.append(msgspec.msgpack.encode(event), DIGEST, SCHEMA)

    def dead(self) -> list[dict[str, Any]]:
        lines = self.letters.read_bytes().splitlines() if self.letters.exists() else []
        return [json.loads(line) for line in lines]

    def close(self) -> None:
        self.events.close()
        self.writer.close()


@pytest.fixture
def road(tmp_path: Path) -> Iterator[Road]:
    with closing(Road(tmp_path / "data")) as road:
        yield road


def move_all(road: Road, log: SqlPredictionLog, max_events: int = 7) -> Recorded:
    """What all steps together moved."""
    read = new_rows = dead = 0
    while (step := record_events(road.events, log, road.bury, max_events=max_events)).read:
        read, new_rows, dead = read + step.read, new_rows + step.new_rows, dead + step.dead
    return Recorded(read, new_rows, dead)


def test_events_travel_from_the_journal_into_the_log(road: Road, log: SqlPredictionLog) -> None:
    """The whole road, with the journal's own schema telling the names of the values."""
    events = [prediction(), prediction(model_version="2.0.0")]
    truth = outcome(events[0].id, "yes")
    road.append(*events, truth)
    assert move_all(road, log) == Recorded(read=3, new_rows=3)
    row = log.get(events[0].id)
    assert row.features == {"income": 1.5, "city": "Oslo", "visits": 7}
    assert row.outcome == "yes"
    assert move_all(road, log) == Recorded()
    assert road.events.reader.pending_bytes == 0


def test_feedback_travels_the_same_road(road: Road, log: SqlPredictionLog) -> None:
    """No request ever waits for a database: an outcome is an event like another."""
    event = prediction()
    naive = datetime(2025, 10, 9, 8, 53, 20)  # noqa: DTZ001 - a time without a zone is taken as UTC
    feedback = [
        Feedback(event.id.upper(), "no", datetime(2025, 10, 9, 8, 0, tzinfo=UTC)),
        Feedback(event.id, "yes", naive),
    ]
    road.append(event)
    assert report_outcomes(road.writer, feedback, limit=2) == 2
    move_all(road, log)
    assert log.get(event.id).outcome == "yes"
    assert log.get(event.id).outcome_at_ms == int(naive.replace(tzinfo=UTC).timestamp() * 1000)


def test_feedback_is_recorded_all_or_none(road: Road, log: SqlPredictionLog) -> None:
    """One bad id in a list must not leave a half of it on record."""
    good = Feedback(new_id(), 1)
    with pytest.raises(InvalidField, match="outcome 1"):
        report_outcomes(road.writer, [good, Feedback("nonsense", 1)], limit=10)
    with pytest.raises(InvalidField):
        report_outcomes(road.writer, [], limit=10)
    with pytest.raises(BatchTooLarge):
        report_outcomes(road.writer, [good] * 3, limit=2)
    assert move_all(road, log) == Recorded()


def test_feedback_with_any_date_never_stops_the_road(road: Road, log: SqlPredictionLog) -> None:
    """A date in another zone may lie beyond what the database can hold: one caller must not stop the log."""
    accepted = 0
    for year in (1, 2, 1969, 9998, 9999):
        for zone in ("+14:00", "+00:00", "-14:00"):
            for day in ("01-01T00:00:00", "12-31T23:59:59.999"):
                at = datetime.fromisoformat(f"{year:04}-{day}{zone}")
                with suppress(InvalidField):
                    accepted += report_outcomes(road.writer, [Feedback(new_id(), 1, at)], limit=1)
    assert accepted == 3 * 6
    road.append(prediction())
    assert move_all(road, log) == Recorded(read=accepted + 1, new_rows=accepted + 1)
    _, waiting = log.unmatched_outcomes(100)
    years = {datetime.fromtimestamp(item.observed_at_ms / 1000, UTC).year for item in waiting}
    assert years == {1, 2, 3, 1968, 1969, 1970, 9997, 9998, 9999}


def test_a_poison_row_is_buried_alone_and_all_others_are_stored(road: Road, log: SqlPredictionLog) -> None:
    """One event that the database will never take must not hold up a thousand that it takes."""
    good = [prediction() for _ in range(41)]
    poison = [prediction(model_id="unknown"), prediction(model_version="2.0.0", inputs=b"\x01")]
    events = [*good[:17], poison[0], *good[17:30], poison[1], *good[30:]]
    road.append(*events)
    assert move_all(road, log, max_events=100) == Recorded(read=43, new_rows=41, dead=2)
    assert {row.id for row in all_rows(log)} == {event.id for event in good}
    letters = road.dead()
    payloads = [base64.b64decode(letter["payload"]) for letter in letters]
    assert payloads == [msgspec.msgpack.encode(event) for event in poison]
    assert "foreign key" in letters[0]["reason"].lower()
    assert road.events.reader.pending_bytes == 0


def test_an_unreadable_payload_is_buried_and_all_others_are_stored(road: Road, log: SqlPredictionLog) -> None:
    """Bytes that are no event, and events without the names of their values, go to the dead letters."""
    good = prediction()
    road.writer.append(b"\xc1 nonsense")
    road.append(good)
    road.writer.append(msgspec.msgpack.encode(["no such tag", 1]))
    road.writer.append(msgspec.msgpack.encode(prediction()))
    road.append(prediction(model_version="3.0.0"))
    assert move_all(road, log, max_events=100) == Recorded(read=5, new_rows=1, dead=4)
    reasons = [letter["reason"] for letter in road.dead()]
    assert [reason.startswith("not an event") for reason in reasons] == [True, True, True, False]
    assert "schema does not describe" in reasons[3]
    assert all(letter["at_ms"] > AT_MS for letter in road.dead())


def test_damage_in_the_journal_is_buried_and_the_rest_is_stored(road: Road, log: SqlPredictionLog) -> None:
    """A disk's error in one record costs that record."""
    events = [prediction(request_id=f"request {n} " + "x" * 50) for n in range(3)]
    road.append(*events)
    (segment,) = (road.events.reader._root / "api-0").glob("*.segment")
    content = segment.read_bytes()
    segment.write_bytes(content.replace(b"request 1", b"REQUEST 1"))
    moved = move_all(road, log, max_events=100)
    assert (moved.new_rows, moved.dead) == (2, 1)
    assert {row.id for row in all_rows(log)} == {events[0].id, events[2].id}
    assert b"REQUEST 1" in base64.b64decode(road.dead()[0]["payload"])


@pytest.fixture(scope="module")
def own_postgres() -> Iterator[PostgresServer]:
    """A server for this module alone: it is killed."""
    with PostgresServer() as server:
        yield server


def test_while_the_database_is_down_nothing_is_forgotten(road: Road, own_postgres: PostgresServer) -> None:
    """The journal grows, the events wait, and they come again, once, when the database is back."""
    with closing(Database(own_postgres.create_database())) as database:
        database.upgrade()
        add_models(database)
        log = SqlPredictionLog(database)
        before, during = prediction(), [prediction() for _ in range(5)]
        road.append(before)
        assert move_all(road, log).new_rows == 1
        own_postgres.kill()
        road.append(*during)
        road.writer.append(b"\xc1 nonsense")
        pending = road.events.reader.pending_bytes
        for _ in range(2):
            with pytest.raises(DatabaseUnavailable):
                record_events(road.events, log, road.bury)
        for call in (lambda: log.get(before.id), lambda: log.page(PredictionQuery())):
            with pytest.raises(DatabaseUnavailable):
                call()
        with pytest.raises(DatabaseUnavailable):
            log.unmatched_outcomes(1)
        assert road.events.reader.pending_bytes >= pending > 0
        assert road.dead() == []
        own_postgres.start()
        moved = move_all(road, log, max_events=100)
        assert moved.dead == 1
        assert {row.id for row in all_rows(log)} == {event.id for event in (before, *during)}
        assert len(road.dead()) == 1


def test_an_sqlite_file_without_tables_is_unavailable(tmp_path: Path) -> None:
    """Every method answers with our error."""
    with closing(Database(f"sqlite:///{tmp_path / 'phoenix.db'}")) as database:
        log = SqlPredictionLog(database)
        calls: list[Callable[[], object]] = [
            lambda: log.write(recorded(prediction())),
            lambda: log.get(new_id()),
            lambda: log.page(PredictionQuery()),
            lambda: log.unmatched_outcomes(1),
        ]
        for call in calls:
            with pytest.raises(DatabaseUnavailable):
                call()


def test_what_could_not_be_buried_comes_again(road: Road, log: SqlPredictionLog) -> None:
    """A full disk under the dead letters must not make the next commit forget them."""
    good = prediction()
    road.append(good)
    road.writer.append(b"\xc1 nonsense")

    def fail(_: UnreadableEvent) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        record_events(road.events, log, fail)
    assert move_all(road, log, max_events=100) == Recorded(read=2, new_rows=0, dead=1)
    assert log.get(good.id).result == 1
