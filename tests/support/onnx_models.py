"""Small ONNX models for tests, built by hand: what each answers can be computed with a line of numpy.

Every function returns the bytes of a model file; ``write`` puts them into one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

OPSET = 17
IR_VERSION = 8
ML = "ai.onnx.ml"
FLOAT, INT64, STRING, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.STRING, TensorProto.BOOL
Dimension = int | str | None


def write(path: Path, model: bytes) -> Path:
    """The path, after the model was written there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model)
    return path


def weights(width: int) -> list[float]:
    """The weights of the linear models: 0.5, -1.0, 1.5, -2.0, …"""
    return [(0.5 if i % 2 == 0 else -0.5) * (i + 1) for i in range(width)]


def linear_regressor(width: int = 3, *, bias: float = 0.25, flat: bool = False) -> bytes:
    """``y = x @ weights(width) + bias`` for ``x`` float [N, width]; ``y`` is [N, 1], or [N] when flat."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["xw"]), helper.make_node("Add", ["xw", "b"], ["y"])]
    column = np.array(weights(width), np.float32)
    initializers = {"w": column if flat else column[:, None], "b": np.array([bias], np.float32)}
    shape: tuple[Dimension, ...] = ("n",) if flat else ("n", 1)
    return _model(nodes, [_value("x", FLOAT, ("n", width))], [_value("y", FLOAT, shape)], initializers)


def double_regressor(width: int = 2) -> bytes:
    """``y = sum of x`` for ``x`` double [N, width]."""
    nodes = [helper.make_node("ReduceSum", ["x", "axes"], ["y"], keepdims=1)]
    inputs = [_value("x", TensorProto.DOUBLE, ("n", width))]
    return _model(nodes, inputs, [_value("y", TensorProto.DOUBLE, ("n", 1))], {"axes": np.array([1])})


def multi_output_regressor(width: int = 3) -> bytes:
    """``y = [sum, maximum]`` of each row: a regression with two numbers a row."""
    nodes = [
        helper.make_node("ReduceSum", ["x", "axes"], ["sum"], keepdims=1),
        helper.make_node("ReduceMax", ["x"], ["max"], axes=[1], keepdims=1),
        helper.make_node("Concat", ["sum", "max"], ["y"], axis=1),
    ]
    inputs = [_value("x", FLOAT, ("n", width))]
    return _model(nodes, inputs, [_value("y", FLOAT, ("n", 2))], {"axes": np.array([1])})


def binary_classifier(width: int = 3, *, bias: float = 0.25) -> bytes:
    """``p = sigmoid(x @ weights(width) + bias)``; ``label`` int64 [N], ``probabilities`` [[1 - p, p], …]."""
    nodes = [
        *_sigmoid_of_x(),
        helper.make_node("Sub", ["one", "p"], ["q"]),
        helper.make_node("Concat", ["q", "p"], ["probabilities"], axis=1),
        helper.make_node("ArgMax", ["probabilities"], ["label"], axis=1, keepdims=0),
    ]
    outputs = [_value("label", INT64, ("n",)), _value("probabilities", FLOAT, ("n", 2))]
    initializers = _linear_initializers(width, bias) | {"one": np.array([1.0], np.float32)}
    return _model(nodes, [_value("x", FLOAT, ("n", width))], outputs, initializers)


def unnamed_classifier(labels: tuple[str, str] = ("yes", "no"), *, cut: float = 0.5) -> bytes:
    """``p = sigmoid(x)`` for one feature; ``label`` is the second of the labels where p is above the cut.

    No operator of it says which probability is of which label.
    """
    nodes = [
        helper.make_node("Sigmoid", ["x"], ["p"]),
        helper.make_node("Sub", ["one", "p"], ["q"]),
        helper.make_node("Concat", ["q", "p"], ["probabilities"], axis=1),
        helper.make_node("Greater", ["p", "cut"], ["above"]),
        helper.make_node("Where", ["above", "second", "first"], ["label"]),
    ]
    outputs = [_value("label", STRING, ("n", 1)), _value("probabilities", FLOAT, ("n", 2))]
    initializers: dict[str, NDArray[Any]] = {
        "one": np.array([1.0], np.float32),
        "cut": np.array([cut], np.float32),
        "first": np.array([labels[0]], object),
        "second": np.array([labels[1]], object),
    }
    return _model(nodes, [_value("x", FLOAT, ("n", 1))], outputs, initializers)


def network_classifier(width: int = 30, *, hidden: int = 64) -> bytes:
    """A network with one hidden layer and random weights: sums long enough that their order shows in the bits."""
    random = np.random.default_rng(11)
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h0"]),
        helper.make_node("Relu", ["h0"], ["h"]),
        helper.make_node("MatMul", ["h", "w2"], ["z"]),
        helper.make_node("Softmax", ["z"], ["probabilities"], axis=1),
        helper.make_node("ArgMax", ["probabilities"], ["label"], axis=1, keepdims=0),
    ]
    initializers = {
        "w1": random.normal(size=(width, hidden)).astype(np.float32),
        "w2": (random.normal(size=(hidden, 3)) / hidden).astype(np.float32),
    }
    outputs = [_value("label", INT64, ("n",)), _value("probabilities", FLOAT, ("n", 3))]
    return _model(nodes, [_value("x", FLOAT, ("n", width))], outputs, initializers)


def label_only_classifier(width: int = 3) -> bytes:
    """``label`` int64 [N]: the position of the row's greatest value; no probabilities."""
    nodes = [helper.make_node("ArgMax", ["x"], ["label"], axis=1, keepdims=0)]
    return _model(nodes, [_value("x", FLOAT, ("n", width))], [_value("label", INT64, ("n",))])


def multi_label_classifier(width: int = 3) -> bytes:
    """``labels`` bool [N, width]: as many labels a row as features, which is no single result."""
    nodes = [helper.make_node("Greater", ["x", "zero"], ["labels"])]
    initializers = {"zero": np.zeros(1, np.float32)}
    outputs = [_value("labels", BOOL, ("n", width))]
    return _model(nodes, [_value("x", FLOAT, ("n", width))], outputs, initializers)


def probabilities_only(width: int = 3) -> bytes:
    """``probabilities = softmax(x)``, one class a feature; no label output."""
    nodes = [helper.make_node("Softmax", ["x"], ["probabilities"], axis=1)]
    outputs = [_value("probabilities", FLOAT, ("n", width))]
    return _model(nodes, [_value("x", FLOAT, ("n", width))], outputs)


def one_probability(width: int = 3, *, bias: float = 0.25) -> bytes:
    """``p = sigmoid(x @ weights(width) + bias)`` as [N, 1]: the probability of the second class."""
    outputs = [_value("p", FLOAT, ("n", 1))]
    initializers = _linear_initializers(width, bias)
    return _model(_sigmoid_of_x(), [_value("x", FLOAT, ("n", width))], outputs, initializers)


def zipmap_classifier(labels: Sequence[str] | Sequence[int] = ("no", "yes"), *, zipmap: bool = True) -> bytes:
    """A LinearClassifier as scikit-learn's converter writes it: feature i is the score of class i.

    Outputs ``output_label`` and ``output_probability``, which is softmax(x) as a sequence of maps, or as a
    tensor without ``zipmap``.
    """
    count = len(labels)
    of_strings = isinstance(labels[0], str)
    named: dict[str, Any] = {"classlabels_strings" if of_strings else "classlabels_ints": list(labels)}
    classifier = helper.make_node(
        "LinearClassifier",
        ["x"],
        ["output_label", "scores" if zipmap else "output_probability"],
        domain=ML,
        coefficients=np.eye(count, dtype=np.float32).reshape(-1).tolist(),
        intercepts=[0.0] * count,
        multi_class=1,
        post_transform="SOFTMAX",
        **named,
    )
    outputs = [_value("output_label", STRING if of_strings else INT64, ("n",))]
    inputs = [_value("x", FLOAT, ("n", count))]
    if not zipmap:
        return _model([classifier], inputs, [*outputs, _value("output_probability", FLOAT, ("n", count))])
    mapped: dict[str, Any] = {"classlabels_strings" if of_strings else "classlabels_int64s": list(labels)}
    node = helper.make_node("ZipMap", ["scores"], ["output_probability"], domain=ML, **mapped)
    value = helper.make_tensor_type_proto(FLOAT, [])
    map_type = helper.make_map_type_proto(STRING if of_strings else INT64, value)
    maps = helper.make_value_info("output_probability", helper.make_sequence_type_proto(map_type))
    return _model([classifier, node], inputs, [*outputs, maps])


def column_model(*, flat: bool = False) -> bytes:
    """``score = age + 10 visits + 100 (city is Oslo) + 200 (city is Lima) + 1000 member``.

    One input a column: ``age`` float, ``visits`` int64, ``city`` string, ``member`` bool; each [N, 1], or [N]
    when flat. A regression.
    """
    shape: tuple[Dimension, ...] = ("n",) if flat else ("n", 1)
    nodes = [
        helper.make_node("Cast", ["visits"], ["visits_"], to=FLOAT),
        helper.make_node("Mul", ["visits_", "ten"], ["visits10"]),
        helper.make_node(
            "LabelEncoder",
            ["city"],
            ["city_"],
            domain=ML,
            keys_strings=["Oslo", "Lima"],
            values_floats=[100.0, 200.0],
            default_float=0.0,
        ),
        helper.make_node("Cast", ["member"], ["member_"], to=FLOAT),
        helper.make_node("Mul", ["member_", "thousand"], ["member1000"]),
        helper.make_node("Sum", ["age", "visits10", "city_", "member1000"], ["score"]),
    ]
    inputs = [
        _value("age", FLOAT, shape),
        _value("visits", INT64, shape),
        _value("city", STRING, shape),
        _value("member", BOOL, shape),
    ]
    initializers = {"ten": np.array([10.0], np.float32), "thousand": np.array([1000.0], np.float32)}
    return _model(nodes, inputs, [_value("score", FLOAT, shape)], initializers)


def mixed_width_model() -> bytes:
    """``y = sum of point + scale`` with ``point`` float [N, 2] and ``scale`` float [N, 1]."""
    nodes = [
        helper.make_node("ReduceSum", ["point", "axes"], ["sum"], keepdims=1),
        helper.make_node("Add", ["sum", "scale"], ["y"]),
    ]
    inputs = [_value("point", FLOAT, ("n", 2)), _value("scale", FLOAT, ("n", 1))]
    return _model(nodes, inputs, [_value("y", FLOAT, ("n", 1))], {"axes": np.array([1])})


def string_tensor_model(width: int = 2) -> bytes:
    """``label`` is the first of the row's strings, ``x`` string [N, width]."""
    nodes = [helper.make_node("Gather", ["x", "first"], ["label"], axis=1)]
    inputs = [_value("x", STRING, ("n", width))]
    return _model(nodes, inputs, [_value("label", STRING, ("n",))], {"first": np.array(0)})


def bool_tensor_model(width: int = 3) -> bytes:
    """``y``: how many of the row's booleans are true; ``x`` bool [N, width]."""
    nodes = [
        helper.make_node("Cast", ["x"], ["numbers"], to=FLOAT),
        helper.make_node("ReduceSum", ["numbers", "axes"], ["y"], keepdims=1),
    ]
    inputs = [_value("x", BOOL, ("n", width))]
    return _model(nodes, inputs, [_value("y", FLOAT, ("n", 1))], {"axes": np.array([1])})


def gather_model(size: int = 4) -> bytes:
    """``y = 1.5 * position``, looked up in a table of ``size``: any other position fails at run time."""
    nodes = [helper.make_node("Gather", ["table", "position"], ["y"])]
    initializers = {"table": np.arange(size, dtype=np.float32) * 1.5}
    inputs = [_value("position", INT64, ("n", 1))]
    return _model(nodes, inputs, [_value("y", FLOAT, ("n", 1))], initializers)


def strict_one_hot_model() -> bytes:
    """Refuses every ``city`` but Oslo and Lima at run time, the empty string too; ``y`` is 1.0."""
    nodes = [
        helper.make_node(
            "OneHotEncoder", ["city"], ["hot"], domain=ML, cats_strings=["Oslo", "Lima"], zeros=0
        ),
        helper.make_node("ReduceSum", ["hot", "axes"], ["y"], keepdims=0),
    ]
    inputs = [_value("city", STRING, ("n", 1))]
    return _model(nodes, inputs, [_value("y", FLOAT, ("n", 1))], {"axes": np.array([2])})


def slow_model(width: int = 2, *, loops: int = 12, size: int = 256) -> bytes:
    """``y`` = sum of the row, after ``loops`` products of two ``size`` x ``size`` matrices: milliseconds a run."""
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["a_in", "matrix"], ["a_out"]),
            helper.make_node("Identity", ["go"], ["on"]),
        ],
        "body",
        [_value("i", INT64, ()), _value("go", BOOL, ()), _value("a_in", FLOAT, (size, size))],
        [_value("on", BOOL, ()), _value("a_out", FLOAT, (size, size))],
    )
    cell = helper.make_tensor("cell", FLOAT, [1], [1.0 / size])
    nodes = [
        helper.make_node("ConstantOfShape", ["shape"], ["matrix"], value=cell),
        helper.make_node("ReduceMean", ["x"], ["mean"], keepdims=0),
        helper.make_node("Add", ["matrix", "mean"], ["start"]),
        helper.make_node("Loop", ["loops", "yes", "start"], ["end"], body=body),
        helper.make_node("ReduceMean", ["end"], ["mean_of_end"], keepdims=0),
        helper.make_node("Mul", ["mean_of_end", "zero"], ["nothing"]),
        helper.make_node("ReduceSum", ["x", "axes"], ["sum"], keepdims=1),
        helper.make_node("Add", ["sum", "nothing"], ["y"]),
    ]
    initializers = {
        "shape": np.array([size, size]),
        "loops": np.array(loops),
        "yes": np.array(True),
        "zero": np.array(0.0, np.float32),
        "axes": np.array([1]),
    }
    return _model(nodes, [_value("x", FLOAT, ("n", width))], [_value("y", FLOAT, ("n", 1))], initializers)


def endless(width: int = 2) -> bytes:
    """A loop of 2^62 rounds for every answer."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["goes_on"], ["still"]),
            helper.make_node("Add", ["v", "one"], ["next"]),
        ],
        "body",
        [_value("round", INT64, []), _value("goes_on", BOOL, []), _value("v", FLOAT, [None, 1])],
        [_value("still", BOOL, []), _value("next", FLOAT, [None, 1])],
        [numpy_helper.from_array(np.asarray(np.float32(1)), "one")],
    )
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["xw"]),
        helper.make_node("Loop", ["rounds", "yes", "xw"], ["y"], body=body),
    ]
    initializers = {
        "w": np.ones((width, 1), np.float32),
        "yes": np.array(True),
        "rounds": np.array(2**62, np.int64),
    }
    return _model(nodes, [_value("x", FLOAT, [None, width])], [_value("y", FLOAT, [None, 1])], initializers)


def total_of_all_rows(width: int = 2) -> bytes:
    """``y`` is one number whatever the number of rows: the first dimension of the output is not the rows."""
    nodes = [
        helper.make_node("ReduceSum", ["x"], ["y0"], keepdims=0),
        helper.make_node("Reshape", ["y0", "one"], ["y"]),
    ]
    inputs = [_value("x", FLOAT, ("n", width))]
    return _model(nodes, inputs, [_value("y", FLOAT, (None,))], {"one": np.array([1])})


def batch_mean_removed(width: int = 2) -> bytes:
    """``y = sum of (x - the mean of all rows)``: what a row gets depends on the rows beside it."""
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["mean"], axes=[0], keepdims=1),
        helper.make_node("Sub", ["x", "mean"], ["centred"]),
        helper.make_node("ReduceSum", ["centred", "axes"], ["y"], keepdims=1),
    ]
    inputs = [_value("x", FLOAT, ("n", width))]
    return _model(nodes, inputs, [_value("y", FLOAT, ("n", 1))], {"axes": np.array([1])})


def one_row_inside(width: int = 2) -> bytes:
    """``y = sum of x``, for one row only: the graph does not say so, but a reshape in it has room for one."""
    nodes = [
        helper.make_node("Reshape", ["x", "one_row"], ["row"]),
        helper.make_node("ReduceSum", ["row", "axes"], ["y"], keepdims=1),
    ]
    initializers = {"one_row": np.array([1, width]), "axes": np.array([1])}
    return _model(nodes, [_value("x", FLOAT, ("n", width))], [_value("y", FLOAT, ("n", 1))], initializers)


def rows_above(bound: float = -1000.0) -> bytes:
    """Answers the rows above the bound alone: so many as there are, whatever was asked."""
    nodes = [
        onnx.helper.make_node("Constant", [], ["bound"], value_float=float(bound)),
        onnx.helper.make_node("Greater", ["x", "bound"], ["is_above"]),
        onnx.helper.make_node("Constant", [], ["flat"], value_ints=[-1]),
        onnx.helper.make_node("Reshape", ["is_above", "flat"], ["chosen"]),
        onnx.helper.make_node("Compress", ["x", "chosen"], ["y"], axis=0),
    ]
    return _model(nodes, [_value("x", FLOAT, [None, 1])], [_value("y", FLOAT, [None, 1])])


def positive_columns(width: int = 3) -> bytes:
    """``y`` has those columns of ``x`` in which any row is above zero: its width differs from run to run."""
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["greatest"], axes=[0], keepdims=0),
        helper.make_node("Greater", ["greatest", "zero"], ["wanted"]),
        helper.make_node("Compress", ["x", "wanted"], ["y"], axis=1),
    ]
    inputs = [_value("x", FLOAT, ("n", width))]
    return _model(nodes, inputs, [_value("y", FLOAT, ("n", None))], {"zero": np.zeros(1, np.float32)})


def unchanged(width: int = 3) -> bytes:
    """``y = x``: the output is the input's own memory, unless the runtime copies it."""
    nodes = [helper.make_node("Identity", ["x"], ["y"])]
    return _model(nodes, [_value("x", FLOAT, ("n", width))], [_value("y", FLOAT, ("n", width))])


def probabilities_of_all_rows(width: int = 2) -> bytes:
    """A label a row, and one row of probabilities whatever the number of rows."""
    nodes = [
        helper.make_node("ArgMax", ["x"], ["label"], axis=1, keepdims=0),
        helper.make_node("ReduceMean", ["x"], ["mean"], axes=[0], keepdims=1),
        helper.make_node("Softmax", ["mean"], ["probabilities"], axis=1),
    ]
    outputs = [_value("label", INT64, ("n",)), _value("probabilities", FLOAT, (None, width))]
    return _model(nodes, [_value("x", FLOAT, ("n", width))], outputs)


def constant_answer() -> bytes:
    """Answers 7.0 to one row, whatever it is: the output is a constant of the graph."""
    nodes = [helper.make_node("Identity", ["seven"], ["y"]), helper.make_node("Identity", ["x"], ["unused"])]
    inputs = [_value("x", FLOAT, ("n", 2))]
    return _model(nodes, inputs, [_value("y", FLOAT, (1,))], {"seven": np.array([7], np.float32)})


def three_dimensional_input() -> bytes:
    """A model of sequences: ``x`` float [N, 4, 2]."""
    nodes = [helper.make_node("ReduceSum", ["x", "axes"], ["y"], keepdims=0)]
    inputs = [_value("x", FLOAT, ("n", 4, 2))]
    return _model(nodes, inputs, [_value("y", FLOAT, ("n",))], {"axes": np.array([1, 2])})


def free_width_input() -> bytes:
    """``x`` float [N, anything]: the graph does not say how many features there are."""
    nodes = [helper.make_node("ReduceSum", ["x", "axes"], ["y"], keepdims=1)]
    inputs = [_value("x", FLOAT, ("n", "width"))]
    return _model(nodes, inputs, [_value("y", FLOAT, ("n", 1))], {"axes": np.array([1])})


def fixed_batch(rows: int = 8) -> bytes:
    """Takes exactly ``rows`` rows of two floats."""
    nodes = [helper.make_node("ReduceSum", ["x", "axes"], ["y"], keepdims=1)]
    inputs = [_value("x", FLOAT, (rows, 2))]
    return _model(nodes, inputs, [_value("y", FLOAT, (rows, 1))], {"axes": np.array([1])})


def half_precision_input() -> bytes:
    """``x`` float16 [N, 2]: an element type that no feature has."""
    nodes = [helper.make_node("Cast", ["x"], ["y"], to=FLOAT)]
    inputs = [_value("x", TensorProto.FLOAT16, ("n", 2))]
    return _model(nodes, inputs, [_value("y", FLOAT, ("n", 2))])


def no_inputs() -> bytes:
    """A graph that answers 1.0 and asks nothing."""
    nodes = [helper.make_node("Identity", ["one"], ["y"])]
    return _model(nodes, [], [_value("y", FLOAT, (1,))], {"one": np.ones(1, np.float32)})


def three_dimensional_output() -> bytes:
    """Its only output is float [N, 2, 1]: neither a number nor probabilities a row."""
    nodes = [helper.make_node("Unsqueeze", ["x", "axes"], ["y"])]
    inputs = [_value("x", FLOAT, ("n", 2))]
    return _model(nodes, inputs, [_value("y", FLOAT, ("n", 2, 1))], {"axes": np.array([2])})


def unknown_operator() -> bytes:
    """A graph with an operator that no runtime has; the bytes are sound."""
    node = helper.make_node("NoSuchOperator", ["x"], ["y"])
    return _model([node], [_value("x", FLOAT, ("n", 2))], [_value("y", FLOAT, ("n", 2))])


def external_data(location: str = "weights.bin") -> bytes:
    """The weights of ``y = x + w`` lie in the file ``location``."""
    model = _parsed(_x_plus_w())
    model.graph.initializer.append(_external_tensor("w", location))
    return bytes(model.SerializeToString())


def external_data_in_subgraph(location: str = "weights.bin") -> bytes:
    """The weights lie in a file, and only a branch of an If, two graphs deep, names it."""
    deepest = _branch("deepest", [helper.make_node("Identity", ["w"], ["deepest_out"])])
    deepest.initializer.append(_external_tensor("w", location))
    inner = _if(
        "yes", deepest, _branch("other", [helper.make_node("Identity", ["small"], ["other_out"])]), "then_out"
    )
    then = _branch("then", [inner])
    otherwise = _branch("else", [helper.make_node("Identity", ["small"], ["else_out"])])
    nodes = [_if("yes", then, otherwise, "w"), helper.make_node("Add", ["x", "w"], ["y"])]
    return _x_to_y(nodes, {"yes": np.array(True), "small": np.ones(2, np.float32)})


def external_data_in_attribute(location: str = "weights.bin") -> bytes:
    """The weights lie in a file that a Constant node's attribute names."""
    node = helper.make_node("Constant", [], ["w"], value=_external_tensor("w", location))
    return _x_to_y([node, helper.make_node("Add", ["x", "w"], ["y"])])


def external_data_in_sparse_tensor(location: str = "weights.bin") -> bytes:
    """The values of a sparse initializer lie in a file."""
    model = _parsed(_x_plus_w())
    indices = numpy_helper.from_array(np.array([0, 1]), "indices")
    model.graph.sparse_initializer.append(
        helper.make_sparse_tensor(_external_tensor("w", location), indices, [2])
    )
    return bytes(model.SerializeToString())


def external_data_in_function(location: str = "weights.bin") -> bytes:
    """The weights lie in a file that a node inside a function of the model names."""
    constant = helper.make_node("Constant", [], ["w"], value=_external_tensor("w", location))
    return _with_function([constant, helper.make_node("Add", ["a", "w"], ["b"])])


def external_data_in_function_default(location: str = "weights.bin") -> bytes:
    """The weights lie in a file that the default value of a function's attribute names."""
    constant = helper.make_node("Constant", [], ["w"])
    reference = onnx.AttributeProto(name="value", ref_attr_name="weights", type=onnx.AttributeProto.TENSOR)
    constant.attribute.append(reference)
    default = helper.make_attribute("weights", _external_tensor("w", location))
    return _with_function([constant, helper.make_node("Add", ["a", "w"], ["b"])], [default])


def _with_function(nodes: list[onnx.NodeProto], defaults: list[onnx.AttributeProto] | None = None) -> bytes:
    opsets = [helper.make_opsetid("", OPSET)]
    function = helper.make_function(
        "tests", "Shift", ["a"], ["b"], nodes, opsets, attribute_protos=defaults or []
    )
    model = _parsed(_x_to_y([helper.make_node("Shift", ["x"], ["y"], domain="tests")]))
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("tests", 1))
    return bytes(model.SerializeToString())


def _x_plus_w() -> bytes:
    return _x_to_y([helper.make_node("Add", ["x", "w"], ["y"])])


def _x_to_y(nodes: list[onnx.NodeProto], initializers: dict[str, NDArray[Any]] | None = None) -> bytes:
    return _model(nodes, [_value("x", FLOAT, ("n", 2))], [_value("y", FLOAT, ("n", 2))], initializers or {})


def _external_tensor(name: str, location: str) -> onnx.TensorProto:
    tensor = onnx.TensorProto(name=name, data_type=FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, "offset": "0", "length": "8"}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def _branch(name: str, nodes: list[onnx.NodeProto]) -> onnx.GraphProto:
    return helper.make_graph(nodes, name, [], [_value(f"{name}_out", FLOAT, (2,))])


def _if(condition: str, then: onnx.GraphProto, otherwise: onnx.GraphProto, output: str) -> onnx.NodeProto:
    return helper.make_node("If", [condition], [output], then_branch=then, else_branch=otherwise)


def _sigmoid_of_x() -> list[onnx.NodeProto]:
    return [
        helper.make_node("MatMul", ["x", "w"], ["xw"]),
        helper.make_node("Add", ["xw", "b"], ["z"]),
        helper.make_node("Sigmoid", ["z"], ["p"]),
    ]


def _linear_initializers(width: int, bias: float) -> dict[str, NDArray[Any]]:
    return {"w": np.array(weights(width), np.float32)[:, None], "b": np.array([bias], np.float32)}


def _value(name: str, element: int, shape: Sequence[Dimension]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, element, list(shape))


def _parsed(model: bytes) -> onnx.ModelProto:
    return onnx.load_from_string(model)


def _model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    initializers: dict[str, NDArray[Any]] | None = None,
) -> bytes:
    constants = [numpy_helper.from_array(array, name) for name, array in (initializers or {}).items()]
    graph = helper.make_graph(list(nodes), "test", list(inputs), list(outputs), constants)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(ML, 3)]
    model = helper.make_model(
        graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="phoenix tests"
    )
    return bytes(model.SerializeToString())
