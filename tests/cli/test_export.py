"""`phoenix-ml predictions export`: the table that a training begins with."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import zoo
from click.testing import Result
from pyarrow import parquet
from sample_events import outcome, prediction

from phoenix_ml.application.ports import RecordedEvent
from phoenix_ml.domain.events import Event, PredictionMade
from phoenix_ml.domain.rows import Column, ElementType, RowFormat
from phoenix_ml.infrastructure.sql.database import Database
from phoenix_ml.infrastructure.sql.predictions import SqlPredictionLog

Run = Callable[..., Result]
COLUMNS = RowFormat([Column(f"x_{i}", ElementType.FLOAT32) for i in range(3)])
# 2025-10-09 in UTC begins.
DAY_MS = 1_759_968_000_000


@pytest.fixture
def registered(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One model, a regressor of x_0, x_1 and x_2; the working folder is the test's."""
    monkeypatch.chdir(tmp_path)
    model = zoo.linear(tmp_path / "model.onnx", [1, 2, 3])
    run("models", "register", model, "--id", "price", "--version", "1.0.0")


def answered(row: tuple[float, float, float], result: float, at_ms: int, **facts: Any) -> PredictionMade:
    asked: dict[str, Any] = {
        "model_id": "price",
        "inputs": COLUMNS.pack(row),
        "created_at_ms": at_ms,
        "result": result,
    }
    return prediction(**asked, confidence=None, probabilities=None, **facts)


def write(folder: Path, *events: Event) -> None:
    with closing(Database(f"sqlite:///{folder / 'data' / 'phoenix.db'}")) as database:
        SqlPredictionLog(database).write([RecordedEvent(event, b"", COLUMNS) for event in events])


@pytest.mark.usefixtures("registered")
def test_predictions_with_outcomes_since_a_day_are_exported_as_it_is_typed(run: Run, tmp_path: Path) -> None:
    """Whoever trains on the file trains on what the model was asked, and on what came of it."""
    first = answered((1, 2, 3), 14, DAY_MS)
    last = answered((0.5, -1, 0), -1.5, DAY_MS + 61_001, entity_id=None)
    unknown = answered((4, 4, 4), 24, DAY_MS + 5)
    before = answered((9, 9, 9), 54, DAY_MS - 1)
    write(
        tmp_path,
        *(before, first, unknown, last),
        *(outcome(before.id, 50.0), outcome(first.id, 13.25), outcome(last.id, -2)),
    )

    typed = "predictions export --with-outcomes --since 2025-10-09 --out x.parquet"
    done = run(*typed.split())

    assert done.stdout == "wrote 2 rows to x.parquet\n"
    own = {"_model_version": "1.0.0", "_confidence": None}
    assert parquet.read_table(tmp_path / "x.parquet").to_pylist() == [
        {"x_0": 0.5, "x_1": -1.0, "x_2": 0.0, "_result": -1.5, "_outcome": -2.0}
        | {"_prediction_id": last.id, "_entity_id": None, "_created_at": "2025-10-09T00:01:01.001Z"}
        | own,
        {"x_0": 1.0, "x_1": 2.0, "x_2": 3.0, "_result": 14.0, "_outcome": 13.25}
        | {"_prediction_id": first.id, "_entity_id": "cust_99", "_created_at": "2025-10-09T00:00:00.000Z"}
        | own,
    ]


@pytest.mark.usefixtures("registered")
def test_of_several_models_one_must_be_named(run: Run, tmp_path: Path) -> None:
    """A table of the wrong model would train without a word."""
    run("models", "register", tmp_path / "model.onnx", "--id", "churn", "--version", "1.0.0")

    refused = run("predictions", "export", "--out", "x.csv", code=2)
    run("predictions", "export", "--model", "price", "--out", "x.csv")

    assert "say which model by --model: churn, price" in refused.stderr


def test_where_there_is_no_model_nothing_is_exported(run: Run, tmp_path: Path) -> None:
    """The folder may be the wrong one: the error says where it looked."""
    refused = run("predictions", "export", "--out", tmp_path / "x.csv", code=1)

    assert "no model is registered; looked in " in " ".join(refused.stderr.split())
    assert not (tmp_path / "x.csv").exists()
