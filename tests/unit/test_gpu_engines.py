"""Where models run, and what becomes of answers when a GPU's memory is too small.

The sessions are real ones on the CPU that fail as a GPU's do (``small_gpu``); a real GPU is for
``tests/system/test_gpu.py``.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import msgspec
import numpy as np
import onnx_models
import pytest
from hypothesis import given
from hypothesis import strategies as st
from inprocess import Server
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument
from servers import wait_until
from small_gpu import AVAILABLE, SmallGpu

from phoenix_ml.application.ports import Engine, ModelHints, Placement, TensorEngine
from phoenix_ml.application.predict import Answer
from phoenix_ml.domain.errors import EngineUnavailable, InferenceFailed, Misconfigured, Overloaded
from phoenix_ml.domain.models import Framework, Metadata, Task
from phoenix_ml.domain.rows import ON_CPU, Column, ElementType, Execution, RowFormat, Rows
from phoenix_ml.domain.tensors import Tensor
from phoenix_ml.infrastructure.engines.gpu import (
    COOL_DOWN_S,
    CPU,
    CUDA,
    DeviceMemoryExhausted,
    Devices,
    Guard,
    GuardedGraph,
)
from phoenix_ml.infrastructure.engines.onnx import OnnxEngines
from phoenix_ml.infrastructure.telemetry.catalogue import INFERENCE_SECONDS, OUT_OF_MEMORY
from phoenix_ml.infrastructure.telemetry.metrics import render

WIDTH = 3
DEVICE = "cuda:0"
ON_GPU = Execution(DEVICE)
VALUES = [[float(i), 1.0, -float(i)] for i in range(13)]
# The linear model's answers, by hand: y = 0.5 x0 - x1 + 1.5 x2 + 0.25.
ANSWERS = [0.5 * x0 - x1 + 1.5 * x2 + 0.25 for x0, x1, x2 in VALUES]
_FORMAT = RowFormat([Column(f"f{i}", ElementType.FLOAT32) for i in range(WIDTH)])


def rows(count: int = len(VALUES)) -> Rows:
    return Rows(VALUES[:count], [_FORMAT.pack(row) for row in VALUES[:count]])


def tensor(count: int = len(VALUES)) -> Tensor:
    return Tensor("FP32", np.array(VALUES[:count], np.float32))


class Machine:
    """Engines over a GPU of so much memory, and a clock that stands still."""

    def __init__(self, folder: Path, gpu: SmallGpu, device: str = "cuda") -> None:
        self.folder = folder
        self.gpu = gpu
        self.now_s = 1000.0
        devices = Devices(device, AVAILABLE, engine_cache=folder / "engines")
        self.engines = OnnxEngines(devices=devices, new_session=gpu.new_session, clock=lambda: self.now_s)

    def load(self, model: bytes = b"", *, independent: bool = True) -> Engine:
        path, metadata = self.inspect(model)
        return self.engines.load(path, msgspec.structs.replace(metadata, row_independent=independent))

    def load_tensors(self) -> TensorEngine:
        return self.engines.load_tensors(*self.inspect(task=Task.TENSORS))

    def inspect(self, model: bytes = b"", task: Task | None = None) -> tuple[Path, Metadata]:
        model = model or onnx_models.linear_regressor(WIDTH)
        path = onnx_models.write(self.folder / "model.onnx", model)
        return path, self.engines.inspect(path, ModelHints(task))


def await_load() -> None:
    """Returns when the load that the last run has begun has ended, well or not."""
    name = f"load-{DEVICE}"
    wait_until(lambda: name not in {thread.name for thread in threading.enumerate()}, 30, f"{name} has ended")


@pytest.fixture
def gpu() -> SmallGpu:
    return SmallGpu()


@pytest.fixture
def machine(tmp_path: Path, gpu: SmallGpu) -> Machine:
    return Machine(tmp_path, gpu)


def test_a_model_runs_on_the_gpu_and_says_so(machine: Machine) -> None:
    """Each answer names the device that made it."""
    engine = machine.load()

    outputs = engine.run(rows())

    assert (outputs.results, outputs.execution) == (ANSWERS, ON_GPU)
    assert engine.placement == Placement(DEVICE)
    assert machine.gpu.runs == [13]


def test_a_batch_that_does_not_fit_is_halved_until_it_does(machine: Machine) -> None:
    """The caller sees the same answers in the same order, and the operator how often memory ran out."""
    engine = machine.load()
    machine.gpu.rows_limit = 4

    outputs = engine.run(rows())

    assert outputs.results == ANSWERS
    assert outputs.execution == Execution(DEVICE, out_of_memory=3)
    assert machine.gpu.runs == [13, 6, 3, 3, 7, 3, 4]
    assert engine.placement == Placement(DEVICE)


def test_where_one_row_is_too_much_the_cpu_answers_and_the_gpu_rests(machine: Machine) -> None:
    """Asking a full GPU again and again would make every answer slow; after a while it may have room again."""
    engine = machine.load()
    machine.gpu.rows_limit = 0

    first = engine.run(rows(2))
    machine.gpu.rows_limit = 100
    machine.now_s += COOL_DOWN_S - 1
    second = engine.run(rows(2))
    resting = engine.placement
    machine.now_s += 1
    third = engine.run(rows(2))

    assert first.results == second.results == third.results == ANSWERS[:2]
    assert [o.execution for o in (first, second, third)] == [Execution("cpu", 2), ON_CPU, ON_GPU]
    assert (resting.device, resting.out_of_memory, DEVICE in resting.reason) == ("cpu", True, True)
    assert engine.placement == Placement(DEVICE)
    assert machine.gpu.runs == [2, 1, 2]


def test_another_model_goes_on_on_the_gpu(machine: Machine) -> None:
    """Memory that one model lacks another may have long had."""
    first, second = machine.load(), machine.load()
    machine.gpu.rows_limit = 1

    assert first.infer({"x": tensor(2)}, ["y"])[1].device == "cpu"
    assert second.run(rows(1)).execution == ON_GPU


def test_rows_that_change_each_others_answers_are_not_parted(machine: Machine) -> None:
    """Half a batch would get other answers than the whole: it runs on the CPU as it came."""
    engine = machine.load(onnx_models.batch_mean_removed(WIDTH), independent=False)
    whole = engine.run(rows(4))
    machine.gpu.rows_limit = 3

    parted = engine.run(rows(4))

    assert parted.results == whole.results
    assert parted.execution == Execution("cpu", 1)


def test_columns_are_parted_as_rows_are(machine: Machine) -> None:
    """Scoring a file meets the same limits."""
    engine = machine.load()
    machine.gpu.rows_limit = 7
    columns = {f"f{i}": np.array([row[i] for row in VALUES], np.float32) for i in range(WIDTH)}

    outputs = engine.run_columns(columns, len(VALUES)).listed()

    assert (outputs.results, outputs.execution) == (ANSWERS, Execution(DEVICE, 1))


def test_tensors_of_rows_are_parted_and_joined(machine: Machine) -> None:
    """The protocol's answer is one tensor, however many runs it took."""
    engine = machine.load()
    machine.gpu.rows_limit = 7

    tensors, outputs = engine.infer_rows({"x": tensor()}, ["y"], len(VALUES))

    assert tensors[0].array.ravel().tolist() == outputs.results == ANSWERS
    assert outputs.execution == Execution(DEVICE, 1)


@given(count=st.integers(1, 13), limit=st.integers(0, 13))
def test_whatever_fits_the_answers_are_the_same(
    tmp_path_factory: pytest.TempPathFactory, count: int, limit: int
) -> None:
    """No row is lost, doubled or misplaced by the halving, and no part is larger than the memory."""
    machine = Machine(tmp_path_factory.mktemp("gpu"), SmallGpu())
    engine = machine.load()
    machine.gpu.rows_limit = limit

    outputs = engine.run(rows(count))

    assert outputs.results == ANSWERS[:count]
    assert outputs.execution.device == ("cpu" if limit == 0 else DEVICE)


def test_tensors_of_any_shape_go_to_the_cpu_whole(machine: Machine) -> None:
    """Nobody knows along which dimension they could be parted."""
    engine = machine.load_tensors()
    fits = engine.infer({"x": tensor(2)}, ["y"])
    machine.gpu.rows_limit = 7

    answered, execution = engine.infer({"x": tensor()}, ["y"])

    assert fits[1] == ON_GPU
    assert answered[0].array.ravel().tolist() == ANSWERS
    assert execution == Execution("cpu", 1)
    assert engine.infer({"x": tensor(2)}, ["y"])[1] == ON_CPU
    assert engine.placement.out_of_memory


def test_a_gpu_that_is_full_at_load_is_tried_again_later(machine: Machine) -> None:
    """The version serves from the first moment, and moves to the GPU by itself, on a thread of its own."""
    machine.gpu.is_full = True
    engine = machine.load()
    before = engine.run(rows(2)), engine.placement.out_of_memory
    machine.now_s += COOL_DOWN_S
    still_full = engine.run(rows(2))
    await_load()
    machine.gpu.is_full = False
    machine.now_s += COOL_DOWN_S
    engine.run(rows(2))
    await_load()

    assert (before[0].execution, before[1], still_full.execution) == (ON_CPU, True, ON_CPU)
    assert engine.run(rows(2)).execution == ON_GPU
    assert engine.placement == Placement(DEVICE)
    assert len(machine.gpu.sessions) == 3


def test_a_gpu_that_is_gone_when_it_is_tried_again_is_left_alone_for_a_while(machine: Machine) -> None:
    """Each request that tried anew would start a thread of its own."""
    machine.gpu.is_full = True
    engine = machine.load()
    machine.gpu.is_full = machine.gpu.has_started = False
    machine.now_s += COOL_DOWN_S
    engine.run(rows(2))
    await_load()

    outputs = [engine.run(rows(2)) for _ in range(20)]

    assert {answer.execution for answer in outputs} == {ON_CPU}
    assert len(machine.gpu.sessions) == 2


def test_what_only_the_gpu_can_run_is_to_be_asked_again_when_its_memory_is_full() -> None:
    """Nobody else can answer, and the request was not at fault."""

    class Full:
        placement = Placement("tensorrt:0")

        def infer(self, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> NoReturn:
            raise DeviceMemoryExhausted("CUDA failure 2: out of memory")

    full = Full()
    guard: Guard[TensorEngine] = Guard("tensorrt:0", None, full, lambda: full)

    with pytest.raises(Overloaded, match="the memory of tensorrt:0 ran out"):
        GuardedGraph(guard).infer({}, [])

    assert guard.placement == Placement("tensorrt:0")


def test_another_failure_on_the_gpu_is_no_lack_of_memory(machine: Machine) -> None:
    """What the runtime refuses is told to the caller: on the CPU it would be refused as well."""
    engine = machine.load()
    machine.gpu.fault = InvalidArgument("[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : Got invalid dimensions")

    with pytest.raises(InferenceFailed, match="invalid dimensions"):
        engine.run(rows(2))

    assert engine.placement == Placement(DEVICE)


def test_a_gpu_that_does_not_start_leaves_the_model_on_the_cpu(machine: Machine) -> None:
    """ONNX Runtime goes on without a word when CUDA's libraries are missing; the answers must not say otherwise."""
    machine.gpu.has_started = False

    engine = machine.load()

    assert engine.run(rows(2)).execution == ON_CPU
    assert (engine.placement.device, engine.placement.reason[:31]) == (
        "cpu",
        "CUDAExecutionProvider does not ",
    )


def test_a_model_without_operators_for_the_gpu_runs_on_the_cpu(machine: Machine) -> None:
    """Trees have no kernels there: their session would call itself CUDA's and never use it. That is where they
    belong, so nobody is alarmed but who asked for TensorRT.
    """
    machine.gpu.kernels = CPU

    engine = machine.load()
    asked_for = machine.engines.load(*machine.inspect(), Framework.TENSORRT)

    assert engine.run(rows(2)).execution == ON_CPU
    assert engine.placement == Placement("cpu")
    assert asked_for.placement == Placement("cpu", "none of the model's operators runs on tensorrt:0")


def test_a_version_for_tensorrt_that_runs_by_cuda_says_why(tmp_path: Path, gpu: SmallGpu) -> None:
    """It works, but not as fast as somebody counts on."""
    devices = Devices("cuda", [CUDA, CPU], engine_cache=tmp_path / "engines")
    machine = Machine(tmp_path, gpu)
    engines = OnnxEngines(devices=devices, new_session=gpu.new_session)

    placement = engines.load(*machine.inspect(), Framework.TENSORRT).placement

    assert placement == Placement(DEVICE, "this onnxruntime has no TensorRT: install onnxruntime-gpu")


def choose(
    folder: Path, setting: str, framework: Framework, available: list[str] = AVAILABLE
) -> tuple[list[str], str]:
    devices = Devices(setting, available, engine_cache=folder)
    targets, reason = devices.choose(framework, folder / "abc", ())
    return [target.device for target in targets], reason


def test_what_is_tried_follows_the_setting_and_what_is_installed(tmp_path: Path) -> None:
    """The best first; a reason is given where somebody wanted what is not to be had."""
    onnx, tensorrt = Framework.ONNX, Framework.TENSORRT

    assert choose(tmp_path, "cpu", onnx) == ([], "")
    assert choose(tmp_path, "cpu", tensorrt) == ([], "PHOENIX_DEVICE is cpu")
    assert choose(tmp_path, "cuda:1", onnx) == (["cuda:1"], "")
    assert choose(tmp_path, "cuda", tensorrt) == (["tensorrt:0", "cuda:0"], "")
    assert choose(tmp_path, "cuda", tensorrt, [CUDA, CPU]) == (
        ["cuda:0"],
        "this onnxruntime has no TensorRT: install onnxruntime-gpu",
    )
    assert choose(tmp_path, "cuda", onnx, [CPU]) == (
        [],
        "this onnxruntime has no CUDA: install onnxruntime-gpu",
    )


@pytest.mark.parametrize("setting", ["gpu", "cuda:", "cuda:x", "cuda:-1", "cpu:1", "auto:0", ""])
def test_a_device_that_is_none_is_refused_at_the_start(tmp_path: Path, setting: str) -> None:
    """A typing error must not quietly mean the CPU."""
    with pytest.raises(Misconfigured, match="PHOENIX_DEVICE"):
        Devices(setting, AVAILABLE, engine_cache=tmp_path)


def test_tensorrt_keeps_its_engines_by_the_models_bytes_and_knows_the_batches(machine: Machine) -> None:
    """What it calls them leaves out the weights, so two versions must not share a folder; and a batch of another size
    must not make it build for seconds.
    """
    path, metadata = machine.inspect()

    machine.engines.load(path, metadata, Framework.TENSORRT)

    name, options = machine.gpu.sessions[0][0]
    assert name == "TensorrtExecutionProvider"
    assert options["trt_engine_cache_path"] == str(machine.folder / "engines" / "model.onnx")
    assert options["trt_profile_min_shapes"] == "x:1x3"
    assert options["trt_profile_opt_shapes"] == "x:16x3"
    assert options["trt_profile_max_shapes"] == "x:1024x3"


def test_a_memory_limit_goes_to_the_session(tmp_path: Path) -> None:
    """Models share a GPU; one must not be able to take all of it."""
    devices = Devices("cuda:1", AVAILABLE, engine_cache=tmp_path, memory_limit_bytes=2**30)

    targets, _ = devices.choose(Framework.ONNX, tmp_path / "abc", ())

    assert targets[0].providers == [(CUDA, {"device_id": 1, "gpu_mem_limit": 2**30})]


def test_a_plan_is_refused_where_tensorrt_is_not_installed(machine: Machine) -> None:
    """Only TensorRT can read it; who has the ONNX model can register that."""
    path = machine.folder / "model.plan"
    path.write_bytes(b"ftrt" + bytes(64))

    with pytest.raises(EngineUnavailable, match="TensorRT would have to run it"):
        machine.engines.inspect(path, ModelHints(framework=Framework.TENSORRT))


@pytest.fixture
def served(tmp_path: Path, machine: Machine) -> Iterator[Server]:
    """A server that answers with the linear model, on the GPU."""
    server = Server(tmp_path / "server", machine.engines)
    server.serve(onnx_models.linear_regressor(WIDTH), batches=True)
    yield server
    server.close()


def test_an_answer_a_record_and_the_metrics_say_where_it_was_computed(
    served: Server, machine: Machine
) -> None:
    """When memory runs out the caller sees it, the log tells it for ever, and an alert can be made of it."""
    on_gpu = served.ask(VALUES[:1])
    machine.gpu.rows_limit = 0
    on_cpu = served.ask(VALUES[:1])

    answers = [answer for answer in (*on_gpu, *on_cpu) if isinstance(answer, Answer)]
    assert [answer.event.device for answer in answers] == [DEVICE, "cpu"]
    recorded = served.recorded()
    assert [recorded[answer.event.id].device for answer in answers] == [DEVICE, "cpu"]
    shown = render(served.folder, (INFERENCE_SECONDS, OUT_OF_MEMORY)).decode()
    assert 'phoenix_inference_seconds_count{model="risk",version="1.0.0",device="cuda:0"} 1.0\n' in shown
    assert 'phoenix_inference_seconds_count{model="risk",version="1.0.0",device="cpu"} 1.0\n' in shown
    assert 'phoenix_device_out_of_memory_total{model="risk",version="1.0.0",phase="run"} 1.0\n' in shown
    assert list(served.live.displaced()) == ["risk 1.0.0"]


def test_on_a_gpu_no_run_holds_up_the_event_loop(served: Server) -> None:
    """However short it was at first, it may end on the CPU."""
    version, _ = served.live.model("risk").pick(None, "")

    assert (version.is_inline, version.runs_inline(1)) == (False, False)
