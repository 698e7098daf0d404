"""The small models that the HTTP and command-line tests serve, and what they answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from phoenix_server import PhoenixServer

from phoenix_ml.domain.features import FeatureRule, FeatureType

FLOAT = FeatureType.FLOAT
ABC = {name: FeatureRule(FLOAT) for name in ("a", "b", "c")}
PEOPLE = {
    "income": FeatureRule(FLOAT),
    "age": FeatureRule(FLOAT, default=40.0),
    "debt": FeatureRule(FLOAT, default=None),
    "visits": FeatureRule(FLOAT, max_age_s=3600),
    "score": FeatureRule(FLOAT, default=7.0, max_age_s=3600),
}
TYPED = {
    "ratio": FeatureRule(FLOAT),
    "count": FeatureRule(FeatureType.INTEGER),
    "member": FeatureRule(FeatureType.BOOLEAN),
    "city": FeatureRule(FeatureType.STRING),
}
LOOKUP_ROWS = 10
# Element type and width of an input or output; without a width it has one dimension.
Spec = tuple[str, int | None] | tuple[str, int]


def stock(server: PhoenixServer) -> None:
    """Registers every model of this module."""
    folder = server.folder / "models"
    folder.mkdir(exist_ok=True)
    for version, bias, active in (("1.0.0", 0.0, True), ("1.1.0", 1000.0, True), ("2.0.0", 2000.0, False)):
        # One model a test module, so that modules that change routings do not meet; `abc` stays as it is.
        for model_id in ("abc", "routed", "managed", "fuzzed"):
            artifact = linear(folder / f"abc-{version}.onnx", [1, 2, 3], bias)
            server.register(artifact, model_id, version, activate=active, contract=ABC)
    artifact = linear(folder / "people.onnx", [1, 10, 0, 100, 1000])
    server.register(artifact, "people", "1.0.0", contract=PEOPLE)
    server.register(classifier(folder / "signs.onnx"), "signs", "1.0.0", contract={"x": FeatureRule(FLOAT)})
    server.register(typed(folder / "typed.onnx"), "typed", "1.0.0", contract=TYPED)
    server.register(lookup(folder / "lookup.onnx"), "lookup", "1.0.0")
    server.register(linear(folder / "idle.onnx", [1]), "idle", "1.0.0", activate=False)
    server.register(every_type(folder / "types.onnx"), "types", "1.0.0")
    server.register(every_type(folder / "brain.onnx", ["BF16", "INT8"]), "brain", "1.0.0")
    server.register(outer_sum(folder / "outer.onnx"), "outer", "1.0.0")


def linear(path: Path, weights: Sequence[float], bias: float = 0.0) -> Path:
    """A regressor: the weighted sum of one float32 input, plus the bias. Weight 0 takes a NaN without a trace."""
    used = [i for i, weight in enumerate(weights) if weight]
    nodes = [
        helper.make_node("Gather", ["x", "used"], ["u"], axis=1),
        helper.make_node("MatMul", ["u", "w"], ["s"]),
        helper.make_node("Add", ["s", "b"], ["y"]),
    ]
    constants: dict[str, NDArray[Any]] = {
        "used": np.array(used, np.int64),
        "w": np.array([[weights[i]] for i in used], np.float32),
        "b": np.array([bias], np.float32),
    }
    return _save(path, nodes, {"x": ("float", len(weights))}, {"y": ("float", 1)}, constants)


def classifier(path: Path) -> Path:
    """Class 1 where x > 0, else 0; the probability of 1 is the logistic function of x."""
    nodes = [
        helper.make_node("Sigmoid", ["x"], ["p1"]),
        helper.make_node("Sub", ["one", "p1"], ["p0"]),
        helper.make_node("Concat", ["p0", "p1"], ["probabilities"], axis=1),
        helper.make_node("ArgMax", ["probabilities"], ["label"], axis=1, keepdims=0),
    ]
    outputs = {"label": ("int64", None), "probabilities": ("float", 2)}
    return _save(path, nodes, {"x": ("float", 1)}, outputs, {"one": np.array([1], np.float32)})


def typed(path: Path) -> Path:
    """Answers `ratio`; takes an integer, a boolean and a string beside it, each a column of its own."""
    inputs = {"ratio": ("float", 1), "count": ("int64", 1), "member": ("bool", 1), "city": ("string", 1)}
    return _save(path, [helper.make_node("Identity", ["ratio"], ["y"])], inputs, {"y": ("float", 1)}, {})


def lookup(path: Path) -> Path:
    """Answers ten times the integer `row`, which ONNX Runtime refuses beyond -10 … 9."""
    nodes = [helper.make_node("Gather", ["table", "row"], ["y"])]
    table = np.arange(LOOKUP_ROWS, dtype=np.float32) * 10
    return _save(path, nodes, {"row": ("int64", None)}, {"y": ("float", None)}, {"table": table})


def slow(path: Path, size: int = 320) -> Path:
    """Answers x after two multiplications of square matrices: some milliseconds, whatever the batch."""
    nodes = [
        helper.make_node("ReduceSum", ["x"], ["s"], keepdims=0),
        helper.make_node("Mul", ["m", "s"], ["m1"]),
        helper.make_node("MatMul", ["m1", "m1"], ["m2"]),
        helper.make_node("MatMul", ["m2", "m1"], ["m3"]),
        helper.make_node("ReduceMax", ["m3"], ["top"], keepdims=0),
        helper.make_node("Mul", ["top", "zero"], ["nothing"]),
        helper.make_node("Add", ["x", "nothing"], ["y"]),
    ]
    constants = {"m": np.full((size, size), 1e-3, np.float32), "zero": np.array(0, np.float32)}
    return _save(path, nodes, {"x": ("float", 1)}, {"y": ("float", 1)}, constants)


def every_type(path: Path, datatypes: Sequence[str] = ()) -> Path:
    """Answers each of its inputs, of any shape, one for each datatype of the Open Inference Protocol.

    BF16 needs a model of its own: ONNX Runtime cannot pass it beside texts.
    """
    chosen = datatypes or EVERY_TYPE
    types = {datatype: getattr(TensorProto, PROTO_NAMES[datatype]) for datatype in chosen}
    graph = helper.make_graph(
        [helper.make_node("Identity", [f"in_{datatype}"], [f"out_{datatype}"]) for datatype in types],
        "types",
        [helper.make_tensor_value_info(f"in_{datatype}", kind, None) for datatype, kind in types.items()],
        [helper.make_tensor_value_info(f"out_{datatype}", kind, None) for datatype, kind in types.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), str(path))
    return path


def outer_sum(path: Path) -> Path:
    """Every sum of an element of `x` and one of `y`, times the scalar `factor`, and how many there are."""
    nodes = [
        helper.make_node("Unsqueeze", ["x", "last"], ["column"]),
        helper.make_node("Add", ["column", "y"], ["sums"]),
        helper.make_node("Mul", ["sums", "factor"], ["table"]),
        helper.make_node("Size", ["table"], ["count"]),
    ]
    make_info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "outer",
        [
            make_info("x", TensorProto.FLOAT, ["n"]),
            make_info("y", TensorProto.FLOAT, ["m"]),
            make_info("factor", TensorProto.FLOAT, []),
        ],
        [make_info("table", TensorProto.FLOAT, ["n", "m"]), make_info("count", TensorProto.INT64, [])],
        [numpy_helper.from_array(np.array([1], np.int64), "last")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), str(path))
    return path


PROTO_NAMES = {
    "BOOL": "BOOL",
    "UINT8": "UINT8",
    "UINT16": "UINT16",
    "UINT32": "UINT32",
    "UINT64": "UINT64",
    "INT8": "INT8",
    "INT16": "INT16",
    "INT32": "INT32",
    "INT64": "INT64",
    "FP16": "FLOAT16",
    "BF16": "BFLOAT16",
    "FP32": "FLOAT",
    "FP64": "DOUBLE",
    "BYTES": "STRING",
}
EVERY_TYPE = tuple(name for name in PROTO_NAMES if name != "BF16")
_ELEMENTS: dict[str, Any] = {
    "float": TensorProto.FLOAT,
    "int64": TensorProto.INT64,
    "bool": TensorProto.BOOL,
    "string": TensorProto.STRING,
}


def _save(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Spec],
    outputs: Mapping[str, Spec],
    constants: Mapping[str, NDArray[Any]],
) -> Path:
    make_info: Callable[..., onnx.ValueInfoProto] = helper.make_tensor_value_info

    def infos(specs: Mapping[str, Spec]) -> list[onnx.ValueInfoProto]:
        return [
            make_info(name, _ELEMENTS[element], [None] if width is None else [None, width])
            for name, (element, width) in specs.items()
        ]

    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(list(nodes), "zoo", infos(inputs), infos(outputs), tensors)
    opset = helper.make_opsetid("", 17)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=9), str(path))
    return path
