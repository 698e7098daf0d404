"""Engines that TensorRT has built already (``.plan``), as the ONNX model that ONNX Runtime runs them by."""

from pathlib import Path
from typing import Any, Final

from phoenix_ml.domain.errors import EngineUnavailable, ModelRefused
from phoenix_ml.domain.models import Framework

# The first field of each ONNX file: its version of the format.
_ONNX_BEGINS: Final = b"\x08"
_OPSET: Final = 17
_IR_VERSION: Final = 9


def is_plan(artifact: Path, framework: Framework) -> bool:
    """Whether the file is TensorRT's own, of which only TensorRT knows what it holds."""
    if framework is not Framework.TENSORRT:
        return False
    with artifact.open("rb") as file:
        return file.read(1) != _ONNX_BEGINS


def wrap_plan(artifact: Path) -> bytes:
    """An ONNX model of one node, which holds the engine and has its inputs and outputs.

    Raises EngineUnavailable where TensorRT is not installed, and ModelRefused for what it cannot read.
    """
    try:
        import tensorrt
    except ImportError as exc:
        raise EngineUnavailable(
            f"{artifact.name} is no ONNX model, so TensorRT would have to run it, which is not installed here "
            f"({exc}): register the ONNX model that the engine was built from, or install TensorRT and onnxruntime-gpu",
            framework=Framework.TENSORRT.value,
        ) from exc
    from onnx import helper

    plan = artifact.read_bytes()
    logger = tensorrt.Logger(tensorrt.Logger.ERROR)
    engine = tensorrt.Runtime(logger).deserialize_cuda_engine(plan)
    if engine is None:
        raise ModelRefused(
            f"{artifact.name} is neither an ONNX model nor an engine that TensorRT {tensorrt.__version__} on this GPU can read",
            framework=Framework.TENSORRT.value,
        )
    inputs: list[Any] = []
    outputs: list[Any] = []
    for number in range(engine.num_io_tensors):
        name = engine.get_tensor_name(number)
        shape = [
            size if size >= 0 else f"{name}_{axis}" for axis, size in enumerate(engine.get_tensor_shape(name))
        ]
        element = _onnx_type(engine.get_tensor_dtype(name), name)
        info = helper.make_tensor_value_info(name, element, shape)
        is_input = engine.get_tensor_mode(name) == tensorrt.TensorIOMode.INPUT
        (inputs if is_input else outputs).append(info)
    node = helper.make_node(
        "EPContext",
        [info.name for info in inputs],
        [info.name for info in outputs],
        domain="com.microsoft",
        embed_mode=1,
        main_context=1,
        ep_cache_context=plan,
        source="TensorrtExecutionProvider",
    )
    model = helper.make_model(
        helper.make_graph([node], "plan", inputs, outputs),
        opset_imports=[helper.make_opsetid("", _OPSET), helper.make_opsetid("com.microsoft", 1)],
        ir_version=_IR_VERSION,
    )
    wrapped: bytes = model.SerializeToString()
    return wrapped


def _onnx_type(dtype: Any, name: str) -> int:
    """ONNX's number for TensorRT's type, which are named alike but for floats."""
    from onnx import TensorProto

    names = {"HALF": "FLOAT16", "BF16": "BFLOAT16"}
    number = getattr(TensorProto, names.get(dtype.name, dtype.name), None)
    if number is None:
        raise ModelRefused(
            f"tensor {name!r} is of TensorRT's type {dtype.name}, which ONNX Runtime cannot carry",
            framework=Framework.TENSORRT.value,
        )
    return int(number)
