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
from phoenix_ml.application.trial import (
    Description,
    Findings,
    Trial,
    Trials,
    describe_apart,
    describe_here,
    try_out,
)
from phoenix_ml.domain.errors import ModelRefused, Overloaded, PhoenixError
from phoenix_ml.domain.features import FeatureRule, FeatureType
from phoenix_ml.infrastructure.engines.onnx import OnnxEngines
from phoenix_ml.infrastructure.tables import read_columns, read_spread
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
    def run(self, trial: Trial | Description, log_path: Path, keep_going: Callable[[], bool]) -> Findings:
        if isinstance(trial, Description):
            return describe_here(OnnxEngines(), trial, read_columns)
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
        in_process(limit_s=6).run(trial(tmp_path, onnx_models.endless()), tmp_path / "log", keep_going)

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
        in_process().run(trial(tmp_path, onnx_models.endless()), tmp_path / "log", keep_going)


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


def description(folder: Path, model: bytes, **said: Any) -> Description:
    artifact = onnx_models.write(folder / "artifact.onnx", model)
    # No way of writing numbers down may change this default.
    contract = CONTRACT | {"income": FeatureRule(FeatureType.FLOAT, 10**30)}
    registration = Registration("risk", "1.0.0", features=contract, task="regression")
    return Description(artifact, registration, folder, **said)


def test_what_is_described_in_a_process_of_its_own_is_what_would_be_described_here(tmp_path: Path) -> None:
    """An upload is stored as it stands."""
    rows = table(tmp_path / "reference.parquet", 400, 1)

    here, apart = (
        describe_apart(
            trials,
            description(tmp_path / name, RIGHT, reference=rows, time="_created_at", outcome="_outcome"),
            lambda: True,
        )
        for name, trials in (("here", Inline()), ("apart", in_process()))
    )

    assert apart.metadata == here.metadata
    assert apart.metadata.baseline is not None
    assert apart.metadata.baseline.rows == 400
    assert apart.columns == tmp_path / "apart" / "reference.npz"
    assert here.columns is not None
    assert apart.columns.read_bytes() == here.columns.read_bytes()


WRONG: dict[str, tuple[bytes, dict[str, Any]]] = {
    "no model": (b"garbage", {}),
    "too few features": (onnx_models.linear_regressor(3), {}),
    "no such column": (RIGHT, {"time": "when"}),
    "no outcomes": (RIGHT, {"outcome": "gaps"}),
    "figures that are infinite": (RIGHT, {"outcome": "vast"}),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_with_an_upload_is_said_as_if_it_were_described_here(
    tmp_path: Path, wrong: str
) -> None:
    """Clients match on the code, and people read the words."""
    model, said = WRONG[wrong]
    rows = tmp_path / "reference.csv"
    rows.write_text("age,income,gaps,vast\n1,2,3,1e160\n2,3,,2\n" + "2,3,1,2\n3,1,1,1\n" * 100)

    def refusal(trials: Trials) -> tuple[type[PhoenixError], str, dict[str, Any]]:
        with pytest.raises(PhoenixError) as caught:
            describe_apart(trials, description(tmp_path, model, reference=rows, **said), lambda: True)
        return type(caught.value), caught.value.message, caught.value.details

    assert refusal(in_process()) == refusal(Inline())


def test_an_upload_that_kills_its_process_is_refused(tmp_path: Path) -> None:
    """It says what became of it; a crash of the server would be all that its sender saw otherwise."""
    program = "import ctypes; print('loading'); ctypes.string_at(0)"
    trials = ProcessTrials([sys.executable, "-c", program], limit_s=30)

    with pytest.raises(ModelRefused, match="comes to no good end: it was ended by signal SIGSEGV"):
        describe_apart(trials, description(tmp_path, RIGHT), lambda: True)


def test_an_upload_for_which_there_is_no_process_is_not_the_models_fault(tmp_path: Path) -> None:
    """Who hears that his model is refused changes it, and who is told to try again later has nothing to change."""
    trials = ProcessTrials(["/no/such/program"], limit_s=30)

    with pytest.raises(Overloaded, match="try again later: /no/such/program cannot be started: No such file"):
        describe_apart(trials, description(tmp_path, RIGHT), lambda: True)


def test_an_upload_that_takes_too_much_memory_is_refused(tmp_path: Path) -> None:
    """What the runtime says of it is the reason."""
    with pytest.raises(ModelRefused, match="memory"):
        describe_apart(in_process(), description(tmp_path, vast()), lambda: True)
