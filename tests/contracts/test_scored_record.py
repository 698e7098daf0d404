"""Rows of a file that go on record do so as those of a request, and once, over SQLite and a real PostgreSQL."""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec
import numpy as np
import onnx_models
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from databases import empty
from inprocess import Server

from phoenix_ml.application.catalogue import Registration, register
from phoenix_ml.application.ports import LoggedPrediction, PredictionQuery, RecordedEvent
from phoenix_ml.application.scoring import ID_COLUMN, RecordedScorer, Recorder, Scorer, choose_for_file
from phoenix_ml.domain.errors import FeatureMissing, InvalidField
from phoenix_ml.domain.features import FeatureRule, FeatureType
from phoenix_ml.domain.models import Stage
from phoenix_ml.domain.predictions import BatchRequest, Instance
from phoenix_ml.domain.routing import Arm, Choice, Role, Routing, Strategy
from phoenix_ml.domain.rows import RowFormat
from phoenix_ml.infrastructure.tables import digest_file, extend_table

CONTRACT = {
    "income": FeatureRule(FeatureType.FLOAT, 7.0),
    "age": FeatureRule(FeatureType.FLOAT, 40.0),
    "debt": FeatureRule(FeatureType.FLOAT),
}


@pytest.fixture
def server(url: str, tmp_path: Path) -> Iterator[Server]:
    """A classifier of three numbers, which is the one version of its model."""
    with closing(Server(tmp_path / "server", database=url)) as server:
        empty(server.phoenix.database)
        add_version(server, "1.0.0")
        server.phoenix.registry.set_active("risk", "1.0.0", True, "test")
        server.live.refresh()
        yield server


def add_version(server: Server, version: str) -> None:
    model = onnx_models.write(server.folder / f"{version}.onnx", onnx_models.binary_classifier())
    phoenix = server.phoenix
    registration = Registration("risk", version, Stage.DEV, CONTRACT, None)
    register(phoenix.registry, phoenix.artifacts, phoenix.engines, model, registration, actor="test")


def table(rows: int, *, gaps: float = 0.2) -> pa.Table:
    random = np.random.default_rng(rows)
    columns = {name: random.normal(size=rows) for name in CONTRACT}
    given = {
        name: pa.array(values, mask=random.random(rows) < (0 if name == "debt" else gaps))
        for name, values in columns.items()
    }
    people = [None if i % 5 == 0 else f"person {i}" for i in range(rows)]
    return pa.table({"who": people, **given})


def score(
    server: Server, source: Path, target: Path, *, version: str = "1.0.0"
) -> tuple[Recorder, Iterator[tuple[int, float]]]:
    """The recorder, and the run that goes on as it is iterated."""
    phoenix = server.phoenix
    asked = phoenix.registry.get("risk", version)
    engine = phoenix.engines.load(phoenix.artifacts.fetch(asked.uri, asked.sha256), asked.metadata)
    choice = choose_for_file(phoenix.registry, asked, is_named=False)
    recorder = Recorder(phoenix.prediction_log, asked, choice, digest_file(source))

    def make(names: Sequence[str]) -> RecordedScorer:
        return RecordedScorer(Scorer(engine, asked.metadata, names, is_recorded=True), recorder, "who")

    return recorder, extend_table(source, target, make, rows_at_once=1000)


def on_record(server: Server) -> dict[str, LoggedPrediction]:
    rows: list[LoggedPrediction] = []
    cursor = None
    while True:
        page, cursor = server.phoenix.prediction_log.page(PredictionQuery("risk", limit=1000, cursor=cursor))
        rows += page
        if cursor is None:
            return {row.id: row for row in rows}


def facts(row: LoggedPrediction) -> dict[str, Any]:
    """All but id and times; ids of a row's own stand as what they are."""
    found = msgspec.structs.asdict(row)
    for name in ("id", "seq", "created_at_ms", "latency_ms"):
        del found[name]
    found["request_id"] = "its own id" if row.request_id == row.id else row.request_id
    key = row.route["routing_key"]
    found["route"] = row.route | {"routing_key": "its own id" if key == row.id else key}
    return found


def test_a_row_on_record_is_what_a_batch_of_requests_records(server: Server, tmp_path: Path) -> None:
    """Monitors, exports, replay and people read both, and must not need to know which is which."""
    rows = table(700)
    pyarrow.parquet.write_table(rows, tmp_path / "rows.parquet")
    instances = [
        Instance(entity_id=row.pop("who"), features={k: v for k, v in row.items() if v is not None})
        for row in rows.to_pylist()
    ]
    asyncio.run(server.predict.batch(BatchRequest("risk", instances), 0.0))
    row_format = RowFormat(server.phoenix.registry.get("risk", "1.0.0").metadata.columns)
    asked = [RecordedEvent(event, b"", row_format) for event in server.recorded().values()]
    server.phoenix.prediction_log.write(asked)
    expected = {row.batch_position: facts(row) for row in on_record(server).values()}

    _, run = score(server, tmp_path / "rows.parquet", tmp_path / "out.parquet")
    list(run)

    requested = {event.event.id for event in asked}
    actual = {r.batch_position: facts(r) for r in on_record(server).values() if r.id not in requested}
    assert len(actual) == 700
    assert actual == expected


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_the_output_tells_the_id_of_each_row_on_record(server: Server, tmp_path: Path, suffix: str) -> None:
    """Outcomes are reported by it, weeks later."""
    source, target = tmp_path / f"rows{suffix}", tmp_path / f"out{suffix}"
    write, read = (
        (pyarrow.parquet.write_table, pyarrow.parquet.read_table)
        if suffix == ".parquet"
        else (pyarrow.csv.write_csv, pyarrow.csv.read_csv)
    )
    write(table(2500, gaps=0), source)

    recorder, run = score(server, source, target)
    list(run)

    logged = on_record(server)
    rows = read(target).to_pylist()
    assert len({row[ID_COLUMN] for row in rows}) == len(rows) == len(logged) == recorder.new_rows == 2500
    for row in rows:
        one = logged[str(UUID(row[ID_COLUMN]))]
        assert (one.result, one.confidence) == (row["_result"], row["_confidence"])
        assert one.features["debt"] == float(np.float32(row["debt"]))
        assert one.entity_id == (row["who"] or None)


def test_a_run_that_broke_is_finished_by_the_same_command(server: Server, tmp_path: Path) -> None:
    """Whatever was on record is there once, in the order of commits, and no half of an output was ever there."""
    source, target = tmp_path / "rows.parquet", tmp_path / "out.parquet"
    pyarrow.parquet.write_table(table(3500), source)
    broken, run = score(server, source, target)
    next(run)
    next(run)
    run.close()  # type: ignore[attr-defined]
    before = on_record(server)
    assert (broken.rows, len(before), target.exists()) == (2000, 2000, False)

    again, run = score(server, source, target)
    list(run)

    after = on_record(server)
    assert (again.rows, again.new_rows, len(after)) == (3500, 1500, 3500)
    assert {row_id: after[row_id] for row_id in before} == before
    assert sorted(r.seq for r in after.values())[:2000] == sorted(r.seq for r in before.values())
    assert set(pyarrow.parquet.read_table(target)[ID_COLUMN].to_pylist()) == set(after)
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".part")] == []


def test_other_rows_and_other_versions_have_other_ids(server: Server, tmp_path: Path) -> None:
    """A file that was changed, or is scored by a new version, holds predictions that nobody has made before."""
    add_version(server, "1.1.0")
    ids = []
    for name, rows in (("a", table(50)), ("b", table(50)), ("c", table(51))):
        pyarrow.parquet.write_table(rows, tmp_path / f"{name}.parquet")
        _, run = score(server, tmp_path / f"{name}.parquet", tmp_path / "out.parquet")
        list(run)
        ids.append(pyarrow.parquet.read_table(tmp_path / "out.parquet")[ID_COLUMN].to_pylist())
    server.phoenix.registry.set_active("risk", "1.1.0", True, "test")
    _, run = score(server, tmp_path / "a.parquet", tmp_path / "out.parquet", version="1.1.0")
    list(run)
    other = pyarrow.parquet.read_table(tmp_path / "out.parquet")[ID_COLUMN].to_pylist()

    assert ids[0] == ids[1]
    assert len({*ids[0], *ids[2], *other}) == 50 + 51 + 50


def test_a_row_that_is_refused_leaves_those_before_it_on_record(server: Server, tmp_path: Path) -> None:
    """The file's owner is told which row, and the corrected file is another file."""
    rows = table(1500)
    broken = rows.set_column(3, "debt", pa.array([1.0] * 1400 + [None] + [1.0] * 99))
    pyarrow.parquet.write_table(broken, tmp_path / "rows.parquet")
    recorder, run = score(server, tmp_path / "rows.parquet", tmp_path / "out.parquet")

    with pytest.raises(FeatureMissing, match="row 1,401: feature 'debt'"):
        list(run)

    assert recorder.rows == len(on_record(server)) == 1000
    assert not (tmp_path / "out.parquet").exists()


@pytest.mark.parametrize(
    ("entities", "shown"),
    [(["ann", ""], "row 2: ''"), ([1.5, 2.5], "row 1: '1.5'"), (["ann", "b\0b"], "row 2: 'b")],
)
def test_an_entity_that_has_no_usable_id_is_refused(
    server: Server, tmp_path: Path, entities: list[Any], shown: str
) -> None:
    """As in a request, where 1 to 512 characters are an id."""
    rows = table(2).set_column(0, "who", pa.array(entities))
    pyarrow.parquet.write_table(rows, tmp_path / "rows.parquet")
    _, run = score(server, tmp_path / "rows.parquet", tmp_path / "out.parquet")

    with pytest.raises(InvalidField, match=shown):
        list(run)

    assert on_record(server) == {}


def test_whole_numbers_name_entities_as_texts_do(server: Server, tmp_path: Path) -> None:
    """Many tables number their customers."""
    rows = table(2).set_column(0, "who", pa.array([7, None]))
    pyarrow.parquet.write_table(rows, tmp_path / "rows.parquet")

    _, run = score(server, tmp_path / "rows.parquet", tmp_path / "out.parquet")
    list(run)

    assert sorted(str(row.entity_id) for row in on_record(server).values()) == ["7", "None"]


@pytest.mark.parametrize(
    ("arms", "is_named", "expected"),
    [
        (None, False, Choice("1.0.0", Strategy.SINGLE, Role.CHAMPION, 1.0)),
        (None, True, Choice("1.0.0", Strategy.PINNED, Role.CHAMPION, 1.0)),
        (("1.0.0", "1.1.0"), False, Choice("1.0.0", Strategy.PINNED, Role.CHAMPION, 1.0)),
        (("1.1.0", "1.0.0"), True, Choice("1.0.0", Strategy.PINNED, Role.CHALLENGER, 1.0)),
    ],
)
def test_rows_that_no_routing_has_shared_out_are_pinned(
    server: Server, arms: tuple[str, str] | None, is_named: bool, expected: Choice
) -> None:
    """Among the answers of an experiment they would tip the comparison of its arms."""
    registry = server.phoenix.registry
    if arms is not None:
        add_version(server, "1.1.0")
        registry.set_active("risk", "1.1.0", True, "test")
        champion, challenger = arms
        both = (Arm(champion), Arm(challenger, Role.CHALLENGER))
        registry.set_routing("risk", Routing(Strategy.AB_TEST, both), "test")

    actual = choose_for_file(registry, registry.get("risk", "1.0.0"), is_named=is_named)

    assert actual == expected


def test_a_version_that_answers_nobody_is_recorded_as_pinned(server: Server) -> None:
    """It may be scored before it is activated."""
    registry = server.phoenix.registry
    registry.set_active("risk", "1.0.0", False, "test")

    actual = choose_for_file(registry, registry.get("risk", "1.0.0"), is_named=False)

    assert actual == Choice("1.0.0", Strategy.PINNED, Role.CHALLENGER, 1.0)
