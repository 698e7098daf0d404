"""Engines on a GPU, which answer on the CPU when the GPU's memory runs out."""

import logging
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

import numpy as np
from msgspec import Struct, structs
from numpy.typing import NDArray

from phoenix_ml.application.ports import Engine, Placement, TensorEngine
from phoenix_ml.domain.errors import InferenceFailed, Misconfigured, Overloaded, PhoenixError
from phoenix_ml.domain.models import Framework, TensorSpec
from phoenix_ml.domain.rows import ON_CPU, ColumnOutputs, Execution, Outputs, Rows
from phoenix_ml.domain.tensors import Tensor

TENSORRT: Final = "TensorrtExecutionProvider"
CUDA: Final = "CUDAExecutionProvider"
CPU: Final = "CPUExecutionProvider"
COOL_DOWN_S: Final = 30.0
# The rows of a batch that TensorRT prepares for; it builds another engine, which takes seconds, for more.
_PROFILE_ROWS: Final = (1, 16, 1024)
# Files by which the driver shows itself: NVIDIA's own, and that of Windows' subsystem.
_DRIVER_FILES: Final = ("/dev/nvidiactl", "/dev/dxg")

# What the arena, CUDA, cuBLAS, cuDNN and TensorRT say when there is no more memory.
_OUT_OF_MEMORY: Final = re.compile(
    r"out of memory|outofmemory|failed to allocate memory|ALLOC_FAILED|available memory of \d+ is smaller|"
    r"cudaErrorMemoryAllocation",
    re.IGNORECASE,
)

_SETTING: Final = re.compile(r"auto|cpu|cuda(:[0-9]{1,3})?")

T = TypeVar("T")
E = TypeVar("E", bound=TensorEngine)
R = TypeVar("R", bound=Engine)

log = logging.getLogger(__name__)


class DeviceMemoryExhausted(InferenceFailed):
    """The GPU has no memory for it. Only its guard sees it, which then asks the CPU."""


class Elsewhere(Exception):
    """A session does not run where it was meant to; the message says why."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether ONNX Runtime says that the device's memory is too small; it has no type of its own for that."""
    return _OUT_OF_MEMORY.search(str(error)) is not None


class Target(Struct, frozen=True):
    """A device to try: the name that answers give it, and ONNX Runtime's providers, the best one first."""

    device: str
    providers: Sequence[tuple[str, dict[str, Any]]]


class Devices:
    """The devices that a setting allows: ``cpu``, ``cuda``, ``cuda:1``, or ``auto`` for a GPU where there is one.

    ``available`` are the providers that ONNX Runtime was built with. Raises Misconfigured for another setting.
    """

    def __init__(
        self, setting: str, available: Sequence[str], *, engine_cache: Path, memory_limit_bytes: int = 0
    ) -> None:
        if _SETTING.fullmatch(setting) is None:
            raise Misconfigured(
                f"PHOENIX_DEVICE: {setting!r} is no device; it is auto, cpu, cuda or cuda:1",
                setting="PHOENIX_DEVICE",
            )
        self._kind, _, number = setting.partition(":")
        self._number = int(number or 0)
        self._available = available
        self._engine_cache = engine_cache
        self._memory_limit_bytes = memory_limit_bytes

    def choose(
        self, framework: Framework, artifact: Path, rows: Sequence[TensorSpec]
    ) -> tuple[list[Target], str]:
        """What to try, the best first, before the CPU; and why a better device is not among them.

        ``rows`` are the inputs whose first dimension is the rows of a batch.
        """
        wants_tensorrt = framework is Framework.TENSORRT
        if self._kind == "cpu":
            return [], "PHOENIX_DEVICE is cpu" if wants_tensorrt else ""
        if self._kind == "auto" and not any(Path(file).exists() for file in _DRIVER_FILES):
            return [], "there is no NVIDIA GPU" if wants_tensorrt else ""
        targets, reason = [], ""
        cuda: dict[str, Any] = {"device_id": self._number}
        if self._memory_limit_bytes:
            cuda["gpu_mem_limit"] = self._memory_limit_bytes
        if wants_tensorrt and TENSORRT in self._available:
            options = self._tensorrt_options(artifact, rows)
            targets.append(Target(f"tensorrt:{self._number}", [(TENSORRT, options), (CUDA, cuda)]))
        elif wants_tensorrt:
            reason = "this onnxruntime has no TensorRT: install onnxruntime-gpu"
        if CUDA in self._available:
            targets.append(Target(f"cuda:{self._number}", [(CUDA, cuda)]))
        elif wants_tensorrt or self._kind == "cuda":
            reason = "this onnxruntime has no CUDA: install onnxruntime-gpu"
        return targets, reason

    def _tensorrt_options(self, artifact: Path, rows: Sequence[TensorSpec]) -> dict[str, Any]:
        # A folder a version: what TensorRT names its engines after leaves out the weights.
        folder = self._engine_cache / artifact.name
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        options: dict[str, Any] = {
            "device_id": self._number,
            "trt_engine_cache_enable": True,
            "trt_engine_cache_path": str(folder),
            "trt_timing_cache_enable": True,
            "trt_timing_cache_path": str(self._engine_cache),
        }
        if self._memory_limit_bytes:
            options["trt_max_workspace_size"] = self._memory_limit_bytes
        if rows and all(None not in spec.shape[1:] for spec in rows):
            for name, count in zip(("min", "opt", "max"), _PROFILE_ROWS, strict=True):
                shapes = ["x".join(map(str, (count, *spec.shape[1:]))) for spec in rows]
                options[f"trt_profile_{name}_shapes"] = ",".join(
                    f"{spec.name}:{shape}" for spec, shape in zip(rows, shapes, strict=True)
                )
        return options


class Guard(Generic[E]):
    """Which of two engines runs: that on the GPU, or that on the CPU while the GPU has no memory for the other.

    The CPU's is loaded from the start, though it takes memory of its own: when it is needed, requests wait. Without
    ``cpu`` only the GPU can run the model. Without ``gpu`` memory ran out when it was loaded, and ``load_gpu`` is tried
    after the cool-down, on a thread. ``reason`` says why the device is not a better one.
    """

    def __init__(
        self,
        device: str,
        cpu: E | None,
        gpu: E | None,
        load_gpu: Callable[[], E],
        *,
        reason: str = "",
        cool_down_s: float = COOL_DOWN_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cpu = cpu
        self._device = device
        self._gpu = gpu
        self._load_gpu = load_gpu
        self._reason = reason
        self._cool_down_s = cool_down_s
        self._clock = clock
        self._lock = threading.Lock()
        self._is_loading = False
        self._retry_at = 0.0 if gpu is not None else clock() + cool_down_s

    @property
    def placement(self) -> Placement:
        if not self._retry_at:
            return Placement(self._device, self._reason)
        return Placement(ON_CPU.device, f"the memory of {self._device} ran out; it is tried again", True)

    def gpu(self) -> E | None:
        """The GPU's engine, or None while the CPU answers."""
        if self._retry_at and self._clock() >= self._retry_at:
            with self._lock:
                if self._gpu is not None:
                    self._retry_at = 0.0
                elif not self._is_loading:
                    self._is_loading = True
                    threading.Thread(target=self._load, name=f"load-{self._device}", daemon=True).start()
        return None if self._retry_at else self._gpu

    @property
    def cpu(self) -> E:
        """The CPU's engine. Raises Overloaded where only the GPU can run the model."""
        if self._cpu is None:
            raise Overloaded(
                f"the memory of {self._device} ran out, and only it can run the model", retry_after_s=1
            )
        return self._cpu

    def cool_down(self) -> None:
        """The memory ran out: the CPU answers for a while."""
        if self._cpu is None:
            return
        self._retry_at = self._clock() + self._cool_down_s
        log.warning("the memory of %s ran out: the CPU answers for %g s", self._device, self._cool_down_s)

    def _load(self) -> None:
        retry_at = self._clock() + self._cool_down_s
        try:
            self._gpu = self._load_gpu()
            retry_at = 0.0
        except (PhoenixError, Elsewhere) as exc:
            log.warning("%s cannot be used yet: %s", self._device, exc)
        finally:
            self._retry_at = retry_at
            self._is_loading = False


class GuardedGraph(Generic[E]):
    """See ``TensorEngine``. What the GPU has no memory for runs on the CPU, and the GPU rests."""

    def __init__(self, guard: Guard[E]) -> None:
        self._guard = guard

    @property
    def placement(self) -> Placement:
        return self._guard.placement

    def infer(self, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> tuple[list[Tensor], Execution]:
        gpu = self._guard.gpu()
        if gpu is not None:
            try:
                return gpu.infer(inputs, outputs)
            except DeviceMemoryExhausted:
                self._guard.cool_down()
                return self._guard.cpu.infer(inputs, outputs)[0], Execution(out_of_memory=1)
        return self._guard.cpu.infer(inputs, outputs)


class GuardedEngine(GuardedGraph[R]):
    """See ``Engine``. A batch that the GPU has no memory for is halved; where a row alone is too much, the whole batch
    runs on the CPU, and the GPU rests.

    Where rows are not independent (``can_halve``), there is no halving.
    """

    def __init__(self, guard: Guard[R], *, can_halve: bool) -> None:
        super().__init__(guard)
        self._can_halve = can_halve

    def run(self, rows: Rows) -> Outputs:
        def run(engine: Engine, part: slice) -> Outputs:
            return engine.run(Rows(rows.values[part], rows.packed[part]))

        return _join_outputs(*self._run_parts(run, len(rows)))

    def run_columns(self, columns: Mapping[str, NDArray[Any]], count: int) -> ColumnOutputs:
        def run(engine: Engine, part: slice) -> ColumnOutputs:
            cut = {name: column[part] for name, column in columns.items()}
            return engine.run_columns(cut, len(range(count)[part]))

        return _join_columns(*self._run_parts(run, count))

    def infer_rows(
        self, inputs: Mapping[str, Tensor], outputs: Sequence[str], count: int
    ) -> tuple[list[Tensor], Outputs]:
        def run(engine: Engine, part: slice) -> tuple[list[Tensor], Outputs]:
            cut = {name: Tensor(t.datatype, t.array[part]) for name, t in inputs.items()}
            rows = len(range(count)[part])
            tensors, answered = engine.infer_rows(cut, outputs, rows)
            if rows < count and any(tensor.shape[:1] != (rows,) for tensor in tensors):
                raise DeviceMemoryExhausted("an output is not one row a row: the halves do not fit together")
            return tensors, answered

        parts, out_of_memory = self._run_parts(run, count)
        joined = [
            Tensor(same[0].datatype, np.concatenate([tensor.array for tensor in same]))
            for same in zip(*(tensors for tensors, _ in parts), strict=True)
        ]
        tensors = parts[0][0] if len(parts) == 1 else joined
        return tensors, _join_outputs([answered for _, answered in parts], out_of_memory)

    def _run_parts(self, run: Callable[[Engine, slice], T], count: int) -> tuple[list[T], int]:
        """What the parts of the rows came to, in order, as few as the GPU's memory allows, or one on the CPU; and how
        often memory ran out.
        """
        gpu = self._guard.gpu()
        if gpu is None:
            return [run(self._guard.cpu, slice(0, count))], 0
        out_of_memory = 0
        parts = []
        waiting = [(0, count)]
        while waiting:
            start, stop = waiting.pop()
            try:
                parts.append(run(gpu, slice(start, stop)))
            except DeviceMemoryExhausted:
                out_of_memory += 1
                if stop - start > 1 and self._can_halve:
                    middle = (start + stop) // 2
                    waiting += [(middle, stop), (start, middle)]
                    continue
                self._guard.cool_down()
                # All of it: then it is on record where each row ran, and in which batch.
                return [run(self._guard.cpu, slice(0, count))], out_of_memory
        return parts, out_of_memory


def _join_outputs(parts: Sequence[Outputs], out_of_memory: int) -> Outputs:
    first = parts[0]
    if not out_of_memory:
        return first
    execution = structs.replace(first.execution, out_of_memory=out_of_memory)
    return Outputs(
        [result for part in parts for result in part.results],
        None if first.confidences is None else [c for part in parts for c in part.confidences or ()],
        None if first.probabilities is None else [p for part in parts for p in part.probabilities or ()],
        execution,
    )


def _join_columns(parts: Sequence[ColumnOutputs], out_of_memory: int) -> ColumnOutputs:
    first = parts[0]
    if not out_of_memory:
        return first
    execution = structs.replace(first.execution, out_of_memory=out_of_memory)
    known = [part.confidences for part in parts if part.confidences is not None]
    named = [part.probabilities for part in parts if part.probabilities is not None]
    return ColumnOutputs(
        np.concatenate([part.results for part in parts]),
        np.concatenate(known) if known else None,
        np.concatenate(named) if named else None,
        execution,
    )
