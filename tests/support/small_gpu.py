"""A GPU for machines that have none: real ONNX Runtime sessions on the CPU, which say that they are on a GPU and fail
as one does when its memory is too small, with the runtime's own exception and words.
"""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import onnxruntime as ort
from onnxruntime.capi.onnxruntime_pybind11_state import RuntimeException

from phoenix_ml.infrastructure.engines.gpu import CPU, CUDA, TENSORRT

AVAILABLE = [TENSORRT, CUDA, CPU]
_NO_ROOM_TO_RUN = (
    "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code returned while running MatMul node. "
    "Status Message: bfc_arena.cc:376 AllocateRawInternal Available memory of 0 is smaller than requested bytes of 256"
)
_NO_ROOM_TO_LOAD = "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : CUDA failure 2: out of memory ; GPU=0 ; expr=cudaMalloc(&p, size);"


@dataclass
class SmallGpu:
    """``rows_limit`` is what a run has memory for; ``is_full`` means that no session fits; ``has_started`` that there
    is a driver; ``kernels`` whose operators these are. ``runs`` are the rows of each run that was tried on it.
    """

    rows_limit: int = 1_000_000
    is_full: bool = False
    has_started: bool = True
    kernels: str = CUDA
    fault: Exception | None = None
    runs: list[int] = field(default_factory=list)
    sessions: list[list[Any]] = field(default_factory=list)

    def new_session(self, model: Any, *, providers: list[Any], **options: Any) -> Any:
        """In place of ``onnxruntime.InferenceSession``."""
        session = ort.InferenceSession(model, providers=[CPU], **options)
        if providers == [CPU]:
            return session
        self.sessions.append(providers)
        if self.is_full:
            raise RuntimeException(_NO_ROOM_TO_LOAD)
        return _Session(self, session, [name for name, _ in providers[:-1]]) if self.has_started else session


class _Session:
    def __init__(self, gpu: SmallGpu, session: Any, providers: list[str]) -> None:
        self._gpu = gpu
        self._session = session
        self._providers = [*providers, CPU]
        self._sess = SimpleNamespace(run=self._run, run_with_iobinding=None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def get_providers(self) -> list[str]:
        return self._providers

    def get_provider_graph_assignment_info(self) -> list[Any]:
        return [SimpleNamespace(ep_name=CPU), SimpleNamespace(ep_name=self._gpu.kernels)]

    def _run(self, names: Any, feeds: dict[str, Any], options: Any) -> Any:
        gpu = self._gpu
        rows = len(next(iter(feeds.values())))
        gpu.runs.append(rows)
        if gpu.fault is not None:
            raise gpu.fault
        if rows > gpu.rows_limit:
            raise RuntimeException(_NO_ROOM_TO_RUN)
        return self._session._sess.run(names, feeds, options)
