"""Batches of models whose rows cannot, or must not, run together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx_models
import pytest
from lanes import Lane, eventually, logged, ok, unique
from phoenix_server import PhoenixServer

pytestmark = pytest.mark.system

ROWS = [[1.0, 2.0], [10.0, 20.0], [-3.0, 0.5]]


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda: onnx_models.batch_mean_removed(2), [0.0, 0.0, 0.0]),
        (lambda: onnx_models.fixed_batch(1), [3.0, 30.0, -2.5]),
        (lambda: onnx_models.one_row_inside(2), [3.0, 30.0, -2.5]),
    ],
    ids=["mean of the batch", "one row declared", "one row inside"],
)
def test_rows_of_a_batch_that_cannot_run_together_run_one_by_one(
    lane: Lane,
    server: PhoenixServer,
    tmp_path: Path,
    build: Callable[[], bytes],
    expected: list[float],
) -> None:
    """Each instance gets the answer that it would get alone, and the log says that it ran alone."""
    model_id = unique()
    server.register(onnx_models.write(tmp_path / "model.onnx", build()), model_id, "1.0.0")
    body = {"model_id": model_id, "instances": [{"features": row} for row in ROWS]}

    response = eventually(
        lambda: lane.request("POST", "/predict/batch", json=body),
        lambda found: found.status_code != 404,
        "the model is served",
    )

    answers = ok(response)["predictions"]
    assert [answer["result"] for answer in answers] == expected
    rows = [logged(lane, answer["prediction_id"]) for answer in answers]
    assert [(row["batch_position"], row["batch_size"]) for row in rows] == [(0, 1)] * 3
