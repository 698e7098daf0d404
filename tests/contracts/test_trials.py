"""Models are tried out in a process of their own, or in the caller's: the same is found, and only the first is safe."""

import itertools
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_models
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from onnx import TensorProto, helper, numpy_helper

from phoenix_ml.application.catalogue import Registration
from phoenix_ml.application.ports import TrainingFailed, TrainingStopped
from phoenix_ml.application.trial import Findings, Trial, Trials, try_out
from phoenix_ml.domain.features import FeatureRule, FeatureType
from phoenix_ml.infrastructure.engines.onnx import OnnxEngines
from phoenix_ml.infrastructure.tables import read_spread
from phoenix_ml.infrastructure.training.trial import LEAST_MEMORY_BYTES, USUAL_MEMORY_BYTES, ProcessTrials
from phoenix_ml.settings import fixed_settings

CONTRACT = {name: FeatureRule(FeatureType.FLOAT) for name in ("age", "income")}
RIGHT = onnx_models.linear_regressor(2, bias=3.0)


def table(path: Path, rows: int, seed: int) -> Path:
    values = np.random.default_rng(seed).normal(size=(rows, 2)).astype(np.float32)
    columns = {
        "age": values[:, 0].astype(np.float64),
        "income": values[:, 1].astype(np.float64),
        "_created_at": [f"2026-01-01T00:{i // 60:02}:{i % 60:02}Z" for i in range(rows)],
        "_outcome": values.astype(np.float64) @ onnx_models.weights(2) + 3,
    }
    pq.write_table(pa.table(columns), path)
    return path


def trial(folder: Path, model: bytes) -> Trial:
    return Trial(
        onnx_models.write(folder / "model.onnx", model),
        Registration("risk", "1.1.0", features=CONTRACT, task="regression"),
        ("age", "income"),
        table(folder / "export.parquet", 800, 1),
        table(folder / "unseen.parquet", 200, 2),
        100,
        folder,
    )


def in_process(limit_s: float = 60.0, memory_bytes: int = USUAL_MEMORY_BYTES) -> ProcessTrials:
    environment = os.environ | fixed_settings().environment()
    words = [sys.executable, "-m", "phoenix_ml.processes.trial"]
    return ProcessTrials(words, environment, limit_s=limit_s, memory_bytes=memory_bytes)


class Inline:
    def run(self, trial: Trial, log_path: Path, keep_going: Callable[[], bool]) -> Findings:
        return try_out(OnnxEngines(), trial, read_spread)


@pytest.mark.parametrize("trials", [Inline(), in_process()], ids=["inline", "process"])
def test_what_is_found_of_a_model_is_what_registering_it_would_find(tmp_path: Path, trials: Trials) -> None:
    """The healer takes it as it stands."""
    found = trials.run(trial(tmp_path, RIGHT), tmp_path / "log", lambda: True)

    assert (found.refused, len(found.answers)) == (None, 100)
    unseen = pq.read_table(tmp_path / "unseen.parquet")
    assert found.answers == pytest.approx(unseen["_outcome"].to_pylist()[:100], abs=1e-5)
    assert found.described is not None
    baseline = found.described.metadata.baseline
    assert baseline is not None
    assert baseline.quality is not None
    assert (baseline.rows, baseline.quality.n, baseline.is_time_ordered) == (1000, 200, True)
    assert found.described.columns is not None
    assert found.described.columns.is_file()


@pytest.mark.parametrize("trials", [Inline(), in_process()], ids=["inline", "process"])
def test_why_a_model_is_no_candidate_is_said_in_words(tmp_path: Path, trials: Trials) -> None:
    """They stand in the job, for a person to read."""
    found = trials.run(trial(tmp_path, b"garbage"), tmp_path / "log", lambda: True)

    assert str(found.refused).startswith("the model is not fit to be registered: ")


def endless() -> bytes:
    """A loop of 2^62 rounds for every answer."""
    scalar = helper.make_tensor_value_info
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["goes_on"], ["still"]),
            helper.make_node("Add", ["v", "one"], ["next"]),
        ],
        "body",
        [
            scalar("round", TensorProto.INT64, []),
            scalar("goes_on", TensorProto.BOOL, []),
            scalar("v", TensorProto.FLOAT, [None, 1]),
        ],
        [scalar("still", TensorProto.BOOL, []), scalar("next", TensorProto.FLOAT, [None, 1])],
        [numpy_helper.from_array(np.asarray(np.float32(1)), "one")],
    )
    return made(
        [
            helper.make_node("MatMul", ["x", "w"], ["xw"]),
            helper.make_node("Loop", ["rounds", "yes", "xw"], ["y"], body=body),
        ],
        {"w": np.ones((2, 1), np.float32), "yes": np.array(True), "rounds": np.int64(2**62)},
    )


def vast() -> bytes:
    """It makes 16 GiB of ones to answer anything."""
    ones = numpy_helper.from_array(np.ones(1, np.float32))
    return made(
        [
            helper.make_node("ConstantOfShape", ["size"], ["ones"], value=ones),
            helper.make_node("ReduceMean", ["ones"], ["one"], keepdims=0),
            helper.make_node("MatMul", ["x", "w"], ["xw"]),
            helper.make_node("Add", ["xw", "one"], ["y"]),
        ],
        {"w": np.ones((2, 1), np.float32), "size": np.array([4 * 1024**3], np.int64)},
    )


def made(nodes: list[Any], constants: dict[str, Any]) -> bytes:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 1])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


def test_a_model_that_never_answers_is_given_up(tmp_path: Path) -> None:
    """It would hang the process that writes the log; meanwhile the heartbeat goes on, and the lease is renewed."""
    looked: list[float] = []

    def keep_going() -> bool:
        looked.append(time.monotonic())
        return True

    with pytest.raises(TrainingFailed, match="longer than the 6 s"):
        in_process(limit_s=6).run(trial(tmp_path, endless()), tmp_path / "log", keep_going)

    assert max(later - earlier for earlier, later in itertools.pairwise(looked)) < 3


def test_a_model_that_never_answers_ends_with_its_healer(tmp_path: Path) -> None:
    """A stop waits for nobody's model."""
    stopping = threading.Event()
    begun = tmp_path / "trial.json"

    def keep_going() -> bool:
        if begun.exists():
            stopping.set()
        return not stopping.is_set()

    with pytest.raises(TrainingStopped):
        in_process().run(trial(tmp_path, endless()), tmp_path / "log", keep_going)


@pytest.mark.parametrize("memory_bytes", [LEAST_MEMORY_BYTES, USUAL_MEMORY_BYTES])
def test_a_model_that_takes_too_much_memory_takes_none_of_ours(tmp_path: Path, memory_bytes: int) -> None:
    """What the runtime says of it is the reason."""
    found = in_process(memory_bytes=memory_bytes).run(trial(tmp_path, vast()), tmp_path / "log", lambda: True)

    assert found.refused is not None
    assert "memory" in found.refused


def test_a_process_that_comes_to_no_good_end_says_its_last_words(tmp_path: Path) -> None:
    """An exit code tells nobody what is wrong."""
    program = "print('hello'); raise SystemExit('no such library')"
    trials = ProcessTrials([sys.executable, "-c", program], limit_s=30)

    with pytest.raises(TrainingFailed, match="it ended with exit code 1: no such library"):
        trials.run(trial(tmp_path, RIGHT), tmp_path / "log", lambda: True)
