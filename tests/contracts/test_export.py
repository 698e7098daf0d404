"""The table to train on holds what is on record, over SQLite and a real PostgreSQL."""

import math
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pyarrow.csv
import pyarrow.parquet
import pytest
from databases import empty
from sample_events import AT_MS, COLUMNS, outcome, prediction

from phoenix_ml.application.export import PAGE_ROWS, export_columns, export_rows, is_held_out, to_train_on
from phoenix_ml.application.ports import LoggedPrediction, PredictionQuery, RecordedEvent
from phoenix_ml.domain.errors import InvalidField
from phoenix_ml.domain.events import Event
from phoenix_ml.domain.features import FeatureRule, FeatureType
from phoenix_ml.domain.ids import new_id
from phoenix_ml.domain.models import Framework, Metadata, ModelVersion, Signature, Stage, Task
from phoenix_ml.domain.routing import Role
from phoenix_ml.domain.rows import RowFormat
from phoenix_ml.infrastructure.sql.database import Database
from phoenix_ml.infrastructure.sql.predictions import SqlPredictionLog
from phoenix_ml.infrastructure.sql.registry import SqlRegistry
from phoenix_ml.infrastructure.tables import write_table

CONTRACT = {
    "income": FeatureRule(FeatureType.FLOAT, None),
    "city": FeatureRule(FeatureType.STRING),
    "visits": FeatureRule(FeatureType.INTEGER),
    "of_another_version": FeatureRule(FeatureType.FLOAT, None),
}
METADATA = Metadata(Signature((), ()), tuple(CONTRACT), CONTRACT, Task.CLASSIFICATION, class_labels=(0, 1))


@pytest.fixture
def log(url: str) -> Iterator[SqlPredictionLog]:
    with closing(Database(url)) as database:
        empty(database)
        for model_id in ("risk", "another"):
            registered = ModelVersion(
                model_id, "1.0.0", Framework.ONNX, "uri", "ab" * 32, Stage.DEV, True, AT_MS, METADATA
            )
            SqlRegistry(database).add(registered, "ann")
        yield SqlPredictionLog(database)


def write(log: SqlPredictionLog, *events: Event) -> None:
    log.write([RecordedEvent(event, msgspec.msgpack.encode(event), RowFormat(COLUMNS)) for event in events])


def export(log: SqlPredictionLog, path: Path, *, with_outcomes: bool, **query: Any) -> list[dict[str, Any]]:
    with write_table(path, export_columns(METADATA)) as add_rows:
        for rows in export_rows(log, PredictionQuery("risk", **query), METADATA, with_outcomes=with_outcomes):
            add_rows(rows)
    read = pyarrow.parquet.read_table if path.suffix == ".parquet" else pyarrow.csv.read_csv
    found: list[dict[str, Any]] = read(path).to_pylist()
    return found


def test_every_prediction_with_an_outcome_is_there_once_over_many_pages(
    log: SqlPredictionLog, tmp_path: Path
) -> None:
    """A row that is lost or doubled at the edge of a page would bias what is trained on it."""
    made = [
        prediction((float(i), "Oslo", i), created_at_ms=AT_MS + i // 7) for i in range(2 * PAGE_ROWS + 500)
    ]
    known = made[::3]
    write(log, *made, *(outcome(one.id, 0) for one in known))

    rows = export(log, tmp_path / "x.parquet", with_outcomes=True)

    assert sorted(row["_prediction_id"] for row in rows) == sorted(one.id for one in known)
    assert {(row["income"], row["visits"]) for row in rows} == {(float(i), i) for i in range(0, len(made), 3)}


def test_a_page_is_written_before_the_next_is_read(url: str, log: SqlPredictionLog, tmp_path: Path) -> None:
    """An export of any size takes the memory of a page."""
    happened: list[tuple[str, int]] = []

    class Watched(SqlPredictionLog):
        def page(self, query: PredictionQuery) -> tuple[list[LoggedPrediction], str | None]:
            rows, cursor = super().page(query)
            happened.append(("read", len(rows)))
            return rows, cursor

    write(log, *(prediction(created_at_ms=AT_MS + i) for i in range(2 * PAGE_ROWS + 500)))
    with (
        closing(Database(url)) as database,
        write_table(tmp_path / "x.parquet", export_columns(METADATA)) as add_rows,
    ):
        for rows in export_rows(Watched(database), PredictionQuery("risk"), METADATA, with_outcomes=False):
            add_rows(rows)
            happened.append(("written", len(rows)))

    pages = (PAGE_ROWS, PAGE_ROWS, 500)
    assert happened == [(what, rows) for rows in pages for what in ("read", "written")]


def test_a_row_has_the_values_as_the_model_got_them(log: SqlPredictionLog, tmp_path: Path) -> None:
    """Training sees what serving saw; what is missing is missing, not 0."""
    made = prediction((math.nan, "Ærø", 7), result=1)
    write(log, made, outcome(made.id, 0))

    (row,) = export(log, tmp_path / "x.parquet", with_outcomes=False)

    assert row == {
        "income": None,
        "city": "Ærø",
        "visits": 7,
        "of_another_version": None,
        "_prediction_id": made.id,
        "_entity_id": "cust_99",
        "_model_version": "1.0.0",
        "_created_at": "2025-10-09T08:53:20.123Z",
        "_confidence": 0.75,
        "_result": 1,
        "_outcome": 0,
    }


def test_an_outcome_that_is_true_or_false_is_the_label_1_or_0(log: SqlPredictionLog, tmp_path: Path) -> None:
    """The monitor counts it so; without it there would be nothing to train on."""
    defaulted, paid = prediction(created_at_ms=AT_MS + 1), prediction()
    write(log, defaulted, paid, outcome(defaulted.id, True), outcome(paid.id, False))

    rows = export(log, tmp_path / "x.parquet", with_outcomes=True)

    assert [row["_outcome"] for row in rows] == [1, 0]


def test_answers_of_shadows_and_of_other_times_and_models_are_left_out(
    log: SqlPredictionLog, tmp_path: Path
) -> None:
    """A shadow's row is its champion's once more."""
    wanted = prediction(created_at_ms=AT_MS + 10)
    write(
        log,
        wanted,
        prediction(role=Role.SHADOW, shadow_of=new_id(), created_at_ms=AT_MS + 10),
        prediction(created_at_ms=AT_MS + 9),
        prediction(created_at_ms=AT_MS + 20),
        prediction(model_id="another", created_at_ms=AT_MS + 10),
    )

    rows = export(log, tmp_path / "x.csv", with_outcomes=False, since_ms=AT_MS + 10, until_ms=AT_MS + 20)

    assert [row["_prediction_id"] for row in rows] == [wanted.id]


def test_an_export_that_fails_leaves_no_file_behind(tmp_path: Path) -> None:
    """Half a table that looks whole would be trained on."""

    def fail_midway() -> None:
        with write_table(tmp_path / "x.parquet", {"x": FeatureType.FLOAT}) as add_rows:
            add_rows([{"x": 1.0}])
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_midway()
    nowhere = tmp_path / "nowhere" / "x.csv"
    with pytest.raises(InvalidField, match="cannot be written"), write_table(nowhere, {}):
        pass

    assert list(tmp_path.iterdir()) == []


def test_rows_to_train_on_leave_out_what_versions_are_compared_over(
    log: SqlPredictionLog, tmp_path: Path
) -> None:
    """A model that has learned the answers by heart would win the comparison."""
    made = [prediction() for _ in range(50)]
    write(log, *made, *(outcome(one.id, 1) for one in made[:40]))

    page = next(export_rows(log, PredictionQuery("risk"), METADATA, with_outcomes=True))

    with_outcome = {one.id for one in made[:40]}
    assert {row["_prediction_id"] for row in to_train_on(page)} == {
        one for one in with_outcome if not is_held_out(one)
    }
