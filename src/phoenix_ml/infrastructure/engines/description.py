"""What an ONNX model says of itself: its signature, its task, its classes, and why it would be refused."""

from collections.abc import Iterable, Iterator, Set
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import onnxruntime as ort

from phoenix_ml.application.ports import ModelHints
from phoenix_ml.domain.errors import ModelRefused
from phoenix_ml.domain.models import Metadata, Signature, Task, TensorSpec
from phoenix_ml.domain.tensors import DATATYPE_OF

_ELEMENTS: Final = {"float": "float32", "double": "float64"}
_LABEL_TYPES: Final = {"int64", "int32", "string", "bool"}
_FLOAT_TYPES: Final = {"float32", "float64"}
_ZIPMAPS: Final = {"seq(map(int64,tensor(float)))", "seq(map(string,tensor(float)))"}

_ADVICE: Final = "models of scikit-learn, XGBoost and LightGBM are converted by phoenix-ml models register, at the command line"

# Operators that keep a generator from one run to the next, even with a seed.
_STATEFUL: Final = {
    "Bernoulli",
    "Multinomial",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
}
# Operators that change no value of their first input, but at most its type or shape; and those that pick from it.
_KEEPING: Final = {"Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"}
_PICKING: Final = {"ArrayFeatureExtractor", "Gather"}


class Graph(NamedTuple):
    """The class labels that a graph names, if any, and the inputs and outputs whose number of dimensions it says."""

    labels: tuple[str | int, ...] = ()
    ranked: Set[str] = frozenset()


def read_graph(artifact: Path) -> Graph:
    """What the file says that a session does not tell.

    Raises ModelRefused for a file that is no ONNX model, and for tensors stored outside of it: their
    paths would let an uploaded model read any file of the server.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(str(artifact), "protobuf", load_external_data=False)
    except DecodeError as exc:
        raise ModelRefused(f"the file is not an ONNX model: {exc}; {_ADVICE}", framework="onnx") from exc
    if not model.graph.node:
        raise ModelRefused(f"the file is not an ONNX model: it has no graph; {_ADVICE}", framework="onnx")
    for tensor in _tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
            raise ModelRefused(
                f"tensor {tensor.name!r} is stored outside of the model file; save it with its data inside "
                "(onnx.save without save_as_external_data)",
                tensor=tensor.name,
            )
    for node in _nodes(model):
        if node.domain in ("", "ai.onnx") and node.op_type in _STATEFUL:
            raise ModelRefused(
                f"{node.op_type} (node {node.name!r}) draws from a generator that every run moves on: the same request "
                "would not get the same answer, and none could be computed again; make the random numbers an input",
                framework="onnx",
            )
    ranked = {
        value.name
        for value in (*model.graph.input, *model.graph.output)
        if value.type.tensor_type.HasField("shape")
    }
    return Graph(_labels(model), ranked)


def describe(session: ort.InferenceSession, graph: Graph, hints: ModelHints, runtime: str) -> Metadata:
    """The model as one of rows of features where it is one, else as one of tensors.

    Raises ModelRefused for what can be neither, and for what is not as the hints say.
    """
    signature = Signature(
        tuple(_spec(node, graph.ranked) for node in session.get_inputs()),
        tuple(_spec(node, graph.ranked) for node in session.get_outputs()),
    )
    tensors = Metadata(signature=signature, features=(), contract={}, task=Task.TENSORS, runtime=runtime)
    if hints.task == Task.TENSORS:
        _check_carried(signature)
        return tensors
    try:
        return _describe_rows(signature, graph.labels, hints, runtime)
    except ModelRefused as exc:
        # Who names features or a task means rows, and wants to know why they are none.
        if hints.task is not None or hints.feature_names:
            raise
        _check_carried(signature)
        return msgspec.structs.replace(tensors, not_tabular=exc.message)


def _describe_rows(
    signature: Signature, labels_in_graph: tuple[str | int, ...], hints: ModelHints, runtime: str
) -> Metadata:
    width = sum(signature.widths)
    if not width:
        raise ModelRefused("the model takes no inputs: its answer would never depend on a feature")
    names = hints.feature_names
    if names and len(signature.inputs) == 1 and len(names) != width:
        raise ModelRefused(f"the model takes {width} features, {len(names)} are named", features=list(names))
    # Inputs that are columns have names of their own; the given ones are checked by the contract.
    features = [c.name for c in signature.columns(names if len(signature.inputs) == 1 else ())]
    if len(set(features)) != len(features):
        raise ModelRefused(f"two features have the same name: {features}", features=features)
    label, scores, task = _roles(signature.outputs, hints.task)
    return Metadata(
        signature=signature,
        features=tuple(features),
        contract={},
        task=task,
        class_labels=labels_in_graph if task is Task.CLASSIFICATION else (),
        label_output=label,
        scores_output=scores,
        runtime=runtime,
    )


def _check_carried(signature: Signature) -> None:
    """Raises ModelRefused, saying why, for inputs and outputs that no protocol of ours can carry."""
    for kind, specs in (("input", signature.inputs), ("output", signature.outputs)):
        for spec in specs:
            if spec.type in DATATYPE_OF:
                continue
            if spec.type.startswith("seq("):
                why = "a sequence; export the model with tensors alone (a ZipMap: skl2onnx's zipmap=False)"
            elif spec.type.startswith("optional("):
                why = "optional; export the model so that it is always there"
            else:
                why = f"of type {spec.type}, which is none of {', '.join(DATATYPE_OF.values())}"
            raise ModelRefused(f"{kind} {spec.name!r} is {why}", framework="onnx")
    types = {spec.type for spec in (*signature.inputs, *signature.outputs)}
    if {"bfloat16", "string"} <= types:
        raise ModelRefused(
            "the model has tensors of bfloat16 and of strings, which ONNX Runtime's Python interface cannot pass together",
            framework="onnx",
        )


def _spec(node: ort.NodeArg, ranked: Set[str]) -> TensorSpec:
    element = node.type
    if element.startswith("tensor("):
        element = element[len("tensor(") : -1]
        element = _ELEMENTS.get(element, element)
    shape = tuple(d if isinstance(d, int) and d > 0 else None for d in node.shape or ())
    return TensorSpec(node.name, element, shape, bool(shape) or node.name in ranked)


def _roles(outputs: tuple[TensorSpec, ...], task: str | None) -> tuple[str | None, str | None, Task]:
    """Which output is the label and which the scores (or the regression's value), and the task."""
    if task is not None and task not in list(Task):
        raise ModelRefused(f"task {task!r} is not known; it is one of {', '.join(Task)}", task=task)
    labels = [o for o in outputs if o.type in _LABEL_TYPES and len(o.shape) <= 2]
    maps = [o for o in outputs if o.type in _ZIPMAPS]
    floats = [o for o in outputs if o.type in _FLOAT_TYPES and 1 <= len(o.shape) <= 2]
    # What would be a label is a number where somebody says so, such as a count.
    counts = [o for o in labels if o.type in ("int64", "int32")] if task == Task.REGRESSION else []
    scores = next(iter(maps + floats + counts), None)
    if task != Task.REGRESSION and labels:
        return labels[0].name, scores.name if scores else None, Task.CLASSIFICATION
    if scores is None:
        described = [f"{o.name}: {o.type} {list(o.shape)}" for o in outputs]
        raise ModelRefused(
            f"no output is a label, probabilities or a number for each row; the outputs are {described}"
        )
    if task == Task.CLASSIFICATION or maps:
        return None, scores.name, Task.CLASSIFICATION
    return None, scores.name, Task.REGRESSION


def _labels(model: Any) -> tuple[str | int, ...]:
    # The labels of a ZipMap are the very keys of its maps; those that an output picks are its answers. Others may be
    # what a model inside of the model answers.
    maps = [node for node in model.graph.node if node.op_type == "ZipMap"]
    return _named_labels(maps) or _picked_labels(model.graph) or _named_labels(model.graph.node)


def _named_labels(nodes: Iterable[Any]) -> tuple[str | int, ...]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.name == "classlabels_strings" and attribute.strings:
                return tuple(label.decode() for label in attribute.strings)
            if attribute.name in ("classlabels_int64s", "classlabels_ints") and attribute.ints:
                return tuple(attribute.ints)
    return ()


def _picked_labels(graph: Any) -> tuple[str | int, ...]:
    """The constant from which an output picks by the place of the greatest score.

    So skl2onnx writes logistic regressions, neural networks and more, whose nodes name no labels.
    """
    makers = {name: node for node in graph.node for name in node.output}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            constants |= {name: a.t for name in node.output for a in node.attribute if a.name == "value"}

    def origin(name: str) -> str:
        for _ in graph.node:  # not longer, as nothing has checked yet that there is no circle
            node = makers.get(name)
            if node is None or node.op_type not in _KEEPING or not node.input:
                break
            name = node.input[0]
        return name

    for output in graph.output:
        picking = makers.get(origin(output.name))
        if picking is None or picking.op_type not in _PICKING or len(picking.input) != 2:
            continue
        labels, place = (origin(name) for name in picking.input)
        if labels in constants and place in makers and makers[place].op_type == "ArgMax":
            return _read_labels(constants[labels])
    return ()


def _read_labels(tensor: Any) -> tuple[str | int, ...]:
    from onnx import numpy_helper

    if tensor.string_data:
        return tuple(label.decode() for label in tensor.string_data)
    try:
        values = numpy_helper.to_array(tensor).ravel()
    except ValueError:  # a damaged one, of which ONNX Runtime says more
        return ()
    return tuple(values.tolist()) if values.dtype.kind in "iu" else ()


def _nodes(model: Any) -> Iterator[Any]:
    """Every node of the model, those in subgraphs and functions included."""
    waiting = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    while waiting:
        node = waiting.pop()
        yield node
        for attribute in node.attribute:
            waiting.extend(attribute.g.node)
            for graph in attribute.graphs:
                waiting.extend(graph.node)


def _tensors(model: Any) -> Iterator[Any]:
    """Every tensor of the model, those in subgraphs, functions and attributes included."""
    # A function's attributes may have defaults, which are tensors too.
    attribute_lists = [function.attribute_proto for function in model.functions]
    attribute_lists += [node.attribute for function in model.functions for node in function.node]
    graphs = [model.graph, *(info.initialization for info in model.training_info)]
    graphs += [info.algorithm for info in model.training_info]
    while graphs or attribute_lists:
        if graphs:
            graph = graphs.pop()
            yield from graph.initializer
            for sparse in graph.sparse_initializer:
                yield from (sparse.values, sparse.indices)
            attribute_lists.extend(node.attribute for node in graph.node)
            continue
        for attribute in attribute_lists.pop():
            yield from (attribute.t, *attribute.tensors)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
            graphs += [attribute.g] if attribute.HasField("g") else []
            graphs += attribute.graphs
