"""The test-suite of the ONNX standard: a model for every operator, with inputs and the answers expected."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from environments import folder_of
from onnx import TensorProto, TypeProto, ValueInfoProto, numpy_helper

# Those of a case that has no data.json; as the standard's own runner has them.
RTOL, ATOL = 1e-3, 1e-7

# What the V2 protocol has a name for. Not carried: the complex types, and everything below 8 bits or float8.
CARRIED: dict[int, str] = {
    TensorProto.BOOL: "BOOL",
    TensorProto.UINT8: "UINT8",
    TensorProto.UINT16: "UINT16",
    TensorProto.UINT32: "UINT32",
    TensorProto.UINT64: "UINT64",
    TensorProto.INT8: "INT8",
    TensorProto.INT16: "INT16",
    TensorProto.INT32: "INT32",
    TensorProto.INT64: "INT64",
    TensorProto.FLOAT16: "FP16",
    TensorProto.FLOAT: "FP32",
    TensorProto.DOUBLE: "FP64",
    TensorProto.STRING: "BYTES",
    TensorProto.BFLOAT16: "BF16",
}

# A tensor is an array (of `object` for strings, of ml_dtypes for bfloat16 and smaller), a sequence a list,
# an empty optional None.
Value = Any


@dataclass(frozen=True)
class DataSet:
    """Inputs by the name that the model gives them, and the outputs that they must give."""

    inputs: dict[str, Value]
    outputs: dict[str, Value]


@dataclass(frozen=True)
class Case:
    """A model of the suite; nothing is read before it is asked for."""

    kind: str
    name: str
    path: Path
    rtol: float = RTOL
    atol: float = ATOL

    def __str__(self) -> str:
        return f"{self.kind}/{self.name}"

    @cached_property
    def model(self) -> onnx.ModelProto:
        """The model, as it is in the file."""
        return onnx.load(self.path, load_external_data=False)

    @cached_property
    def inputs(self) -> list[ValueInfoProto]:
        """What a request must give: an input that the model has a value for is none of them."""
        given = {tensor.name for tensor in self.model.graph.initializer}
        return [value for value in self.model.graph.input if value.name not in given]

    @property
    def outputs(self) -> list[ValueInfoProto]:
        """What a request may ask for."""
        return list(self.model.graph.output)

    @property
    def types(self) -> dict[str, str | None]:
        """The protocol's name for the type of each input and output; None where it has none."""
        return {value.name: protocol_type(value.type) for value in [*self.inputs, *self.outputs]}

    @property
    def is_carried(self) -> bool:
        """Whether the protocol has a type for every input and output."""
        return None not in self.types.values()

    def data_sets(self) -> list[DataSet]:
        """In order of their number."""
        if self.kind == "light":
            return [self._made_up()]
        # Not by name: 10 would come before 2.
        folders = sorted(self.path.parent.glob("test_data_set_*"), key=lambda f: int(f.name.split("_")[-1]))
        return [
            DataSet(_read(self.inputs, folder, "input"), _read(self.outputs, folder, "output"))
            for folder in folders
        ]

    def agrees(self, expected: Value, answered: Value) -> bool:
        """Whether shape and type are the same, and the numbers as near as the suite wants them."""
        if isinstance(expected, list):
            return (
                isinstance(answered, list)
                and len(expected) == len(answered)
                and all(map(self.agrees, expected, answered))
            )
        if expected is None or answered is None:
            return expected is answered
        wanted, got = np.asarray(expected), np.asarray(answered)
        if wanted.shape != got.shape or wanted.dtype != got.dtype:
            return False
        if wanted.dtype == object:
            return [_text(x) for x in wanted.flat] == [_text(x) for x in got.flat]
        if wanted.dtype.kind in "biu":
            return np.array_equal(wanted, got)
        if wanted.dtype.kind != "c":
            # NumPy has no allclose for ml_dtypes, and in float16 the tolerance itself would be nothing.
            wanted, got = wanted.astype(np.float64), got.astype(np.float64)
        return bool(np.allclose(got, wanted, rtol=self.rtol, atol=self.atol, equal_nan=True))

    def _made_up(self) -> DataSet:
        """The whole networks come without inputs; this is what the standard's runner makes up for them."""
        inputs = {}
        for value in self.inputs:
            shape = [dim.dim_value or 1 for dim in value.type.tensor_type.shape.dim]
            size = int(np.prod(shape))
            inputs[value.name] = (np.arange(size).reshape(shape) / size).astype(np.float32)
        expected = TensorProto.FromString(self.path.with_name(f"{self.path.stem}_output_0.pb").read_bytes())
        return DataSet(inputs, {self.outputs[0].name: numpy_helper.to_array(expected)})


def cases(*kinds: str) -> Iterator[Case]:
    """All of them, or those of the kinds named: node, simple, pytorch-converted, pytorch-operator, light."""
    data = folder_of("onnx_suite") / "onnx" / "backend" / "test" / "data"
    for folder in sorted(data.glob("*/test_*")):
        kind, settings = folder.parent.name, {}
        path = folder / "model.onnx"
        if (folder / "data.json").exists():
            settings = json.loads((folder / "data.json").read_text())
        if kind == "real":
            # The weights of the real ones would be downloaded; the light ones are the same without them.
            kind, path = "light", data / "light" / Path(settings["url"]).name
        if not kinds or kind in kinds:
            yield Case(kind, folder.name, path, settings.get("rtol", RTOL), settings.get("atol", ATOL))


def protocol_type(kind: TypeProto) -> str | None:
    """The protocol's name for a tensor of that type; None for one that it cannot carry, and for what is no tensor."""
    if kind.WhichOneof("value") != "tensor_type":
        return None
    return CARRIED.get(kind.tensor_type.elem_type)


def onnxruntime_answer(session: Any, inputs: Mapping[str, Value]) -> dict[str, Value]:
    """What onnxruntime answers by itself, in types that compare with those of the suite."""
    names = [output.name for output in session.get_outputs()]
    if not any(x.type == "tensor(bfloat16)" for x in [*session.get_inputs(), *session.get_outputs()]):
        return dict(zip(names, session.run(names, dict(inputs)), strict=True))
    feed = {name: _ort_value(value) for name, value in inputs.items()}
    answered = session.run_with_ort_values(names, feed)
    return {name: _array(value) for name, value in zip(names, answered, strict=True)}


def _ort_value(array: Value) -> Any:
    import onnxruntime as ort

    if array.dtype != ml_dtypes.bfloat16:
        return ort.OrtValue.ortvalue_from_numpy(array)
    # `run` refuses the bfloat16 of ml_dtypes. The value does not own its memory: the array must outlive it.
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), TensorProto.BFLOAT16)


def _array(value: Any) -> Value:
    if value.data_type() != "tensor(bfloat16)":
        return value.numpy()
    # Nor has it a way to give one, but for the address.
    content = ctypes.string_at(value.data_ptr(), value.tensor_size_in_bytes())
    return np.frombuffer(content, ml_dtypes.bfloat16).reshape(value.shape())


def _read(declared: list[ValueInfoProto], folder: Path, what: str) -> dict[str, Value]:
    return {
        value.name: _value(value.type, (folder / f"{what}_{number}.pb").read_bytes())
        for number, value in enumerate(declared)
    }


def _value(kind: TypeProto, content: bytes) -> Value:
    match kind.WhichOneof("value"):
        case "tensor_type":
            return numpy_helper.to_array(TensorProto.FromString(content))
        case "sequence_type":
            return numpy_helper.to_list(onnx.SequenceProto.FromString(content))
        case "optional_type":
            return numpy_helper.to_optional(onnx.OptionalProto.FromString(content))
        case other:
            raise NotImplementedError(f"the suite had no {other} when this was written")


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
