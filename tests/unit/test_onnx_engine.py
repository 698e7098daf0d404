"""ONNX Runtime behind the Engine port, against answers computed by hand with numpy."""

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx_models
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from phoenix_ml.application.ports import ModelHints
from phoenix_ml.domain.errors import FeatureInvalid, InferenceFailed, ModelRefused
from phoenix_ml.domain.models import Metadata, Task, TensorSpec
from phoenix_ml.domain.rows import Column, ElementType, Outputs, RowFormat, Rows, Scalar
from phoenix_ml.infrastructure.cpu import cpu_limit
from phoenix_ml.infrastructure.engines.onnx import OnnxEngines


def close_to(expected: Any) -> Any:
    """Equal but for the rounding of float32, with sums in another order than numpy's."""
    return pytest.approx(expected, rel=1e-5, abs=1e-6)


class Loaded:
    """A model that was inspected and loaded, and is fed with rows of Python values."""

    def __init__(self, path: Path, hints: ModelHints) -> None:
        engines = OnnxEngines()
        self.metadata: Metadata = engines.inspect(path, hints)
        self.engine = engines.load(path, self.metadata)
        self.format = RowFormat(self.metadata.columns)

    def run(self, *rows: Sequence[Scalar]) -> Outputs:
        return self.engine.run(Rows(rows, [self.format.pack(row) for row in rows]))


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Loaded]:
    """Loads the bytes of a model."""

    def load(model: bytes, task: str | None = None, names: tuple[str, ...] = ()) -> Loaded:
        return Loaded(onnx_models.write(tmp_path / "model.onnx", model), ModelHints(task, names))

    return load


@pytest.fixture
def refusal(tmp_path: Path) -> Callable[..., str]:
    """The words with which a model is refused."""

    def refuse(model: bytes, task: str | None = None, names: tuple[str, ...] = ()) -> str:
        path = onnx_models.write(tmp_path / "model.onnx", model)
        with pytest.raises(ModelRefused) as caught:
            OnnxEngines().inspect(path, ModelHints(task, names))
        return caught.value.message

    return refuse


def rows_of(count: int, width: int, seed: int = 7) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)


def sigmoid(x: NDArray[np.float32], bias: float = 0.25) -> NDArray[np.float64]:
    z = x.astype(np.float64) @ np.array(onnx_models.weights(x.shape[1])) + bias
    return np.asarray(1 / (1 + np.exp(-z)), np.float64)


def softmax(x: NDArray[np.float32]) -> NDArray[np.float64]:
    e = np.exp(x.astype(np.float64))
    return np.asarray(e / e.sum(axis=1, keepdims=True), np.float64)


# --- regression ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flat", [False, True], ids=["column", "flat"])
@pytest.mark.parametrize("count", [1, 2, 17])
def test_a_regression_answers_numbers_without_confidence(
    load: Callable[..., Loaded], count: int, flat: bool
) -> None:
    """A regression has no probability: its confidence is null, never an invented number."""
    x = rows_of(count, 4)
    model = load(onnx_models.linear_regressor(4, bias=-1.5, flat=flat))
    outputs = model.run(*x.tolist())
    assert outputs.results == close_to((x @ np.array(onnx_models.weights(4)) - 1.5).tolist())
    assert all(type(value) is float for value in outputs.results)
    assert outputs.confidences is None
    assert outputs.probabilities is None
    assert model.metadata.task is Task.REGRESSION


def test_a_regression_of_two_numbers_answers_a_list_a_row(load: Callable[..., Loaded]) -> None:
    """Multi-output models are regressions too."""
    x = rows_of(3, 5)
    outputs = load(onnx_models.multi_output_regressor(5)).run(*x.tolist())
    expected = np.stack([x.sum(axis=1), x.max(axis=1)], axis=1)
    assert np.array(outputs.results) == close_to(expected)
    assert outputs.confidences is None
    assert len(outputs.results) == 3


def test_doubles_stay_doubles(load: Callable[..., Loaded]) -> None:
    """A float64 input is not rounded to float32 on its way."""
    outputs = load(onnx_models.double_regressor(2)).run([1.0, 1e-12])
    assert outputs.results == [1.0 + 1e-12]


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=3, max_size=3), min_size=1, max_size=9)
)
def test_a_row_gets_the_same_answer_alone_and_in_a_batch(
    load: Callable[..., Loaded], rows: list[list[float]]
) -> None:
    """Batching is invisible: no row sees another one's values."""
    model = load(onnx_models.multi_output_regressor(3))
    together = model.run(*rows)
    assert together.results == [model.run(row).results[0] for row in rows]


# --- classification --------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 17])
def test_a_classifier_answers_label_confidence_and_probabilities(
    load: Callable[..., Loaded], count: int
) -> None:
    """The confidence is the probability of the very label that is answered."""
    x = rows_of(count, 3)
    outputs = load(onnx_models.binary_classifier(3)).run(*x.tolist())
    p = sigmoid(x)
    assert outputs.results == (p > 0.5).astype(int).tolist()
    assert all(type(label) is int for label in outputs.results)
    assert np.array(outputs.probabilities) == close_to(np.stack([1 - p, p], axis=1))
    assert outputs.confidences == close_to(np.maximum(p, 1 - p).tolist())


@pytest.mark.parametrize("zipmap", [True, False], ids=["maps", "tensor"])
@pytest.mark.parametrize("labels", [("no", "yes"), ("z", "m", "a"), (0, 1), (7, 3, 5)])
def test_probabilities_stand_in_the_order_of_the_class_labels(
    load: Callable[..., Loaded], labels: tuple[Any, ...], zipmap: bool
) -> None:
    """Maps come sorted by label, tensors in the graph's order: both must mean the same."""
    x = rows_of(6, len(labels))
    model = load(onnx_models.zipmap_classifier(labels, zipmap=zipmap))
    outputs = model.run(*x.tolist())
    p = softmax(x)
    assert model.metadata.class_labels == labels
    assert model.metadata.task is Task.CLASSIFICATION
    assert outputs.results == [labels[i] for i in x.argmax(axis=1)]
    assert np.array(outputs.probabilities) == close_to(p)
    assert outputs.confidences == close_to(p.max(axis=1).tolist())


@pytest.mark.parametrize("labels", [("bad", "good"), (0, 1), (7, 3), ("a", "b", "c")])
def test_labels_are_read_where_an_output_picks_from_them(
    load: Callable[..., Loaded], labels: tuple[Any, ...]
) -> None:
    """skl2onnx writes a logistic regression on doubles without any operator that names the classes."""
    from skl2onnx import convert_sklearn
    from skl2onnx.common.data_types import DoubleTensorType
    from sklearn.linear_model import LogisticRegression

    x = rows_of(60, len(labels)).astype(np.float64)
    estimator = LogisticRegression().fit(x, np.array(labels)[x.argmax(axis=1)])
    converted = convert_sklearn(
        estimator,
        initial_types=[("x", DoubleTensorType([None, len(labels)]))],
        options={id(estimator): {"zipmap": False}},
    )
    model = load(converted.SerializeToString())
    outputs = model.run(*x.tolist())
    assert not any("classlabels" in a.name for node in converted.graph.node for a in node.attribute)
    assert list(model.metadata.class_labels) == estimator.classes_.tolist()
    assert np.array(outputs.probabilities) == close_to(estimator.predict_proba(x))


def test_probabilities_alone_are_a_classifier_when_the_task_says_so(load: Callable[..., Loaded]) -> None:
    """Many neural networks have no label output; the graph looks like a regression of several numbers."""
    x = rows_of(5, 4)
    model = load(onnx_models.probabilities_only(4), "classification")
    outputs = model.run(*x.tolist())
    assert outputs.results == x.argmax(axis=1).tolist()
    assert np.array(outputs.probabilities) == close_to(softmax(x))
    assert outputs.confidences == close_to(softmax(x).max(axis=1).tolist())
    assert load(onnx_models.probabilities_only(4)).metadata.task is Task.REGRESSION


def test_one_probability_is_that_of_the_second_class(load: Callable[..., Loaded]) -> None:
    """A single sigmoid output: 0.3 means class 0 with confidence 0.7."""
    x = rows_of(8, 3)
    outputs = load(onnx_models.one_probability(3), "classification").run(*x.tolist())
    p = sigmoid(x)
    assert outputs.results == (p > 0.5).astype(int).tolist()
    assert np.array(outputs.probabilities) == close_to(np.stack([1 - p, p], axis=1))
    assert outputs.confidences == close_to(np.maximum(p, 1 - p).tolist())


def test_a_classifier_without_probabilities_has_no_confidence(load: Callable[..., Loaded]) -> None:
    """What the model does not say is not made up."""
    outputs = load(onnx_models.label_only_classifier(3)).run([0.0, 5.0, 1.0], [9.0, 5.0, 1.0])
    assert outputs == Outputs([1, 0], None, None)


def test_a_task_that_is_not_known_is_refused(refusal: Callable[..., str]) -> None:
    """The message lists the known ones."""
    message = refusal(onnx_models.linear_regressor(), "clustering")
    assert message == "task 'clustering' is not known; it is one of classification, regression, tensors"


def test_a_classifier_can_be_served_as_a_regression_of_its_scores(load: Callable[..., Loaded]) -> None:
    """The task that whoever registers names wins over what the outputs look like."""
    x = rows_of(2, 3)
    outputs = load(onnx_models.binary_classifier(3), "regression").run(*x.tolist())
    assert np.array(outputs.results)[:, 1] == close_to(sigmoid(x))
    assert outputs.confidences is None


# --- inputs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flat", [False, True], ids=["column", "flat"])
def test_columns_of_four_types_are_fed_one_by_one(load: Callable[..., Loaded], flat: bool) -> None:
    """One input a column: float, int64, string and bool, each with its own name."""
    model = load(onnx_models.column_model(flat=flat))
    assert model.metadata.columns == (
        Column("age", ElementType.FLOAT32),
        Column("visits", ElementType.INT64),
        Column("city", ElementType.STRING),
        Column("member", ElementType.BOOL),
    )
    rows = [(1.5, 2, "Oslo", True), (0.25, -3, "Lima", False), (0.0, 0, "", False), (7, 1, "Ørsta €", True)]
    assert model.run(*rows).results == [1121.5, 170.25, 0.0, 1017.0]
    assert [model.run(row).results[0] for row in rows] == [1121.5, 170.25, 0.0, 1017.0]


def test_a_wide_input_stands_beside_a_narrow_one(load: Callable[..., Loaded]) -> None:
    """A wide tensor is several features, named after it."""
    model = load(onnx_models.mixed_width_model())
    assert model.metadata.features == ("point_0", "point_1", "scale")
    assert model.run((1.0, 2.0, 10.0), (3.0, 4.0, 20.0)).results == [13.0, 27.0]


def test_a_tensor_of_strings_is_fed(load: Callable[..., Loaded]) -> None:
    """Strings have no packed form that the runtime could read in place."""
    model = load(onnx_models.string_tensor_model(2))
    assert model.run(("a", "b"), ("€ü", ""), ("", "x")).results == ["a", "€ü", ""]


def test_a_tensor_of_booleans_is_fed(load: Callable[..., Loaded]) -> None:
    """A packed boolean is one byte."""
    model = load(onnx_models.bool_tensor_model(3))
    assert model.run((True, False, True), (False, False, False)).results == [2.0, 0.0]


def test_a_column_of_integers_is_fed(load: Callable[..., Loaded]) -> None:
    """Whole numbers stay whole beyond the precision of a float."""
    model = load(onnx_models.gather_model(4))
    assert model.run((3,), (0,)).results == [4.5, 0.0]


def test_a_value_that_does_not_fit_its_column_is_named(load: Callable[..., Loaded]) -> None:
    """A number beyond 64 bits must not wrap around."""
    model = load(onnx_models.gather_model())
    with pytest.raises(FeatureInvalid, match="'position'"):
        model.run((2**63,))


def test_a_tensor_without_names_takes_the_given_ones(load: Callable[..., Loaded]) -> None:
    """A graph knows one tensor; what its columns mean comes from the contract, in its order."""
    assert load(onnx_models.linear_regressor(3)).metadata.features == ("x_0", "x_1", "x_2")
    named = load(onnx_models.linear_regressor(3), None, ("income", "age", "debt"))
    assert named.metadata.features == ("income", "age", "debt")
    assert [column.name for column in named.metadata.columns] == ["income", "age", "debt"]


def test_another_number_of_names_than_features_is_refused(refusal: Callable[..., str]) -> None:
    """Otherwise values would go to the wrong features."""
    message = refusal(onnx_models.linear_regressor(3), None, ("income", "age"))
    assert message == "the model takes 3 features, 2 are named"


def test_the_signature_is_read_from_the_graph(load: Callable[..., Loaded]) -> None:
    """Names, types and shapes in the graph's order."""
    model = load(onnx_models.binary_classifier(3))
    assert model.metadata.signature.inputs == (TensorSpec("x", "float32", (None, 3)),)
    assert model.metadata.signature.outputs == (
        TensorSpec("label", "int64", (None,)),
        TensorSpec("probabilities", "float32", (None, 2)),
    )
    assert (model.metadata.label_output, model.metadata.scores_output) == ("label", "probabilities")
    assert model.metadata.runtime == f"onnxruntime {ort.__version__}"


# --- failures --------------------------------------------------------------------------------------------


def test_a_value_that_the_graph_refuses_fails_in_the_runtimes_words(load: Callable[..., Loaded]) -> None:
    """Only the runtime knows what it did not like; afterwards it answers as before."""
    model = load(onnx_models.gather_model(4))
    with pytest.raises(InferenceFailed, match="indices element out of data bounds, idx=9"):
        model.run((9,))
    with pytest.raises(InferenceFailed, match="idx=9"):
        model.run((1,), (9,))
    assert model.run((1,)).results == [1.5]


def test_an_unknown_category_fails_in_the_runtimes_words(load: Callable[..., Loaded]) -> None:
    """Encoders of categories may refuse what they were not trained on."""
    model = load(onnx_models.strict_one_hot_model())
    assert model.run(("Oslo",), ("Lima",)).results == [1.0, 1.0]
    with pytest.raises(InferenceFailed, match="Unknown Category"):
        model.run(("Paris",))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (onnx_models.three_dimensional_input(), "shape [None, 4, 2]; a tabular input is [rows]"),
        (onnx_models.free_width_input(), "shape [None, None]; a tabular input is [rows]"),
        (onnx_models.fixed_batch(8), "takes exactly 8 rows; export it with a free first dimension"),
        (onnx_models.half_precision_input(), "elements of type float16; features are bool, float32"),
        (onnx_models.no_inputs(), "takes no inputs"),
        (onnx_models.three_dimensional_output(), "no output is a label, probabilities or a number"),
        (onnx_models.unknown_operator(), "No Op registered for NoSuchOperator"),
        (b"", "not an ONNX model: it has no graph"),
        (b"\n", "not an ONNX model"),
        (b"not a model at all", "not an ONNX model"),
        (b"PK\x03\x04" + bytes(200), "not an ONNX model"),
        (bytes(1000), "not an ONNX model"),
    ],
)
def test_what_cannot_be_served_is_refused_with_its_reason(
    refusal: Callable[..., str], model: bytes, words: str
) -> None:
    """Whoever exported the model must learn what to change."""
    assert words in refusal(model, "regression")


def test_a_truncated_model_is_refused_wherever_it_ends(refusal: Callable[..., str], tmp_path: Path) -> None:
    """An upload that broke off must never be served; nor may it raise anything else."""
    model = onnx_models.slow_model()
    for end in range(0, len(model), 13):
        refusal(model[:end])


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_model_with_flipped_bytes_is_refused_or_loads(tmp_path: Path, data: st.DataObject) -> None:
    """Damage that the format does not notice loads; any other is our error, never a foreign one."""
    model = bytearray(onnx_models.zipmap_classifier())
    for _ in range(data.draw(st.integers(1, 4))):
        model[data.draw(st.integers(0, len(model) - 1))] = data.draw(st.integers(0, 255))
    path = onnx_models.write(tmp_path / "damaged.onnx", bytes(model))
    with suppress(ModelRefused):
        Loaded(path, ModelHints())


def test_names_that_are_no_text_are_refused_in_silence(
    refusal: Callable[..., str], capfd: pytest.CaptureFixture[str]
) -> None:
    """Such a graph made the runtime print to standard output, where ``--json`` writes its data."""
    model = onnx_models.zipmap_classifier(("no", "yes"))
    assert "no" in refusal(model.replace(b"yes", b"y\xe8s"))
    assert "text" in refusal(onnx_models.linear_regressor().replace(b"\x01n", b"\x01\xe8", 1))
    assert capfd.readouterr().out == ""


EXTERNAL = [
    onnx_models.external_data,
    onnx_models.external_data_in_subgraph,
    onnx_models.external_data_in_attribute,
    onnx_models.external_data_in_sparse_tensor,
    onnx_models.external_data_in_function,
    onnx_models.external_data_in_function_default,
]


@pytest.mark.parametrize("build", EXTERNAL, ids=lambda build: build.__name__)
@pytest.mark.parametrize("location", ["weights.bin", "../weights.bin", "/etc/hostname"])
def test_tensors_outside_of_the_file_are_refused(
    refusal: Callable[..., str], tmp_path: Path, build: Callable[[str], bytes], location: str
) -> None:
    """Their paths would let an uploaded model read any file of the server; even where the file is there."""
    (tmp_path / "weights.bin").write_bytes(np.ones(2, np.float32).tobytes())
    assert "tensor 'w' is stored outside of the model file" in refusal(build(location))


def test_a_file_that_is_gone_between_the_checks_is_refused(tmp_path: Path) -> None:
    """The store is a folder that others may write to."""
    path = onnx_models.write(tmp_path / "model.onnx", onnx_models.linear_regressor())
    metadata = OnnxEngines().inspect(path, ModelHints())
    path.unlink()
    with pytest.raises(ModelRefused, match="ONNX Runtime cannot load the model") as caught:
        OnnxEngines().load(path, metadata)
    assert str(tmp_path) not in caught.value.message


def test_any_thread_may_call_an_engine(load: Callable[..., Loaded]) -> None:
    """The event loop and the executor share one session, and no memory: batches of all sizes at once."""
    model = load(onnx_models.binary_classifier(3))
    batches = [rows_of(count, 3, seed=count).tolist() for count in (1, 2, 1, 16, 64, 3, 65)] * 20
    expected = [load(onnx_models.binary_classifier(3)).run(*batch) for batch in batches]
    answers: list[list[Outputs]] = [[] for _ in range(4)]
    begin = threading.Barrier(4)

    def run(position: int) -> None:
        begin.wait()
        answers[position] = [model.run(*batch) for batch in batches]

    threads = [threading.Thread(target=run, args=(position,)) for position in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [expected] * 4


# --- bound memory ----------------------------------------------------------------------------------------

NUMERIC: list[tuple[Callable[[], bytes], int, str | None]] = [
    (lambda: onnx_models.linear_regressor(3), 3, None),
    (lambda: onnx_models.linear_regressor(3, flat=True), 3, None),
    (lambda: onnx_models.double_regressor(2), 2, None),
    (lambda: onnx_models.multi_output_regressor(3), 3, None),
    (lambda: onnx_models.binary_classifier(3), 3, None),
    (lambda: onnx_models.label_only_classifier(3), 3, None),
    (lambda: onnx_models.probabilities_only(3), 3, "classification"),
    (lambda: onnx_models.one_probability(3), 3, "classification"),
    (lambda: onnx_models.zipmap_classifier(("no", "yes")), 2, None),
    (lambda: onnx_models.zipmap_classifier(("no", "yes"), zipmap=False), 2, None),
    (lambda: onnx_models.zipmap_classifier((7, 3, 5), zipmap=False), 3, None),
    (lambda: onnx_models.bool_tensor_model(3), 3, None),
    (lambda: onnx_models.gather_model(4), 1, None),
    (lambda: onnx_models.positive_columns(3), 3, None),
    (lambda: onnx_models.unchanged(3), 3, None),
]


@pytest.mark.parametrize(("build", "width", "task"), NUMERIC)
def test_an_answer_does_not_depend_on_what_ran_before(
    load: Callable[..., Loaded], build: Callable[[], bytes], width: int, task: str | None
) -> None:
    """Runs share memory: each must give, to the last bit, what an engine gives that never ran."""
    model = load(build(), task)
    is_whole = model.metadata.columns[0].element in (ElementType.INT64, ElementType.BOOL)
    random = np.random.default_rng(5)
    given, answers = [], []
    for count in (1, 1, 2, 1, 7, 64, 65, 2, 64, 3, 1, 1):
        x = random.integers(0, 2, (count, width)) if is_whole else random.normal(size=(count, width))
        given.append(x.tolist())
        answers.append(model.run(*x.tolist()))
    assert answers == [load(build(), task).run(*rows) for rows in given]


def test_an_output_of_another_width_each_time_is_answered(load: Callable[..., Loaded]) -> None:
    """Memory that fits one run's outputs must neither cut those of the next nor leave old values in them."""
    model = load(onnx_models.positive_columns(3))
    assert model.run([1.0, 2.0, 3.0]).results == [[1.0, 2.0, 3.0]]
    assert model.run([4.0, -5.0, 6.0]).results == [[4.0, 6.0]]
    assert model.run([7.0, 8.0, 9.0]).results == [[7.0, 8.0, 9.0]]


def test_an_output_that_is_a_constant_is_answered(load: Callable[..., Loaded]) -> None:
    """The runtime computes nothing for it, yet it must stand in the memory of each run."""
    model = load(onnx_models.constant_answer())
    assert [model.run([1.0, 2.0]).results for _ in range(3)] == [[7.0]] * 3


def test_values_that_were_refused_leave_nothing_behind(load: Callable[..., Loaded]) -> None:
    """The next answer comes from the next row, whatever state the failed run left its memory in."""
    model = load(onnx_models.gather_model(4))
    assert model.run((1,)).results == [1.5]
    for _ in range(3):
        with pytest.raises(InferenceFailed, match="idx=9"):
            model.run((9,))
        assert model.run((2,)).results == [3.0]
        assert model.run((3,), (0,)).results == [4.5, 0.0]


@pytest.mark.parametrize("count", [1, 5, 100])
def test_a_row_that_is_packed_needs_no_values(load: Callable[..., Loaded], count: int) -> None:
    """Rows that come from a store as the engine's own bytes are never taken apart."""
    model = load(onnx_models.linear_regressor(3))
    x = rows_of(count, 3)
    rows = Rows((), [row.tobytes() for row in x])
    expected = (x @ np.array(onnx_models.weights(3)) + 0.25).tolist()
    assert len(rows) == count
    assert model.engine.run(rows).results == close_to(expected)
    assert model.engine.run(rows).results == close_to(expected)


def test_a_row_too_wide_to_keep_memory_for_is_answered(load: Callable[..., Loaded]) -> None:
    """Memory that is kept is bounded, rows are not."""
    width = 20_000
    x = np.zeros((2, width), np.float32)
    x[0, 0], x[1, 1] = 3.0, 4.0
    model = load(onnx_models.linear_regressor(width))
    rows = Rows((), [row.tobytes() for row in x])
    assert [model.engine.run(rows).results for _ in range(3)] == [[1.75, -3.75]] * 3


@pytest.mark.parametrize("length", [0, 8, 16])
def test_a_packed_row_of_another_length_is_refused(load: Callable[..., Loaded], length: int) -> None:
    """Bytes of another model's row must never be answered with what the memory held before."""
    model = load(onnx_models.linear_regressor(3))
    for _ in range(2):
        assert model.run([1.0, 1.0, 1.0]).results == [1.25]
        with pytest.raises(InferenceFailed):
            model.engine.run(Rows((), [bytes(length)]))


# --- threads ---------------------------------------------------------------------------------------------


def control_group(folder: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


OURS = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, OURS),
        ({"cpu.max": "max 100000\n"}, OURS),
        ({"cpu.max": "100000 100000\n"}, 1),
        ({"cpu.max": "20000 100000\n"}, 1),
        ({"cpu.max": "150000 100000\n"}, min(OURS, 2)),
        ({"cpu.max": "6400000 100000\n"}, OURS),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, OURS),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "6400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, OURS),
        ({"cpu/cpu.cfs_quota_us": "50000\n"}, OURS),
    ],
)
def test_the_containers_limit_bounds_the_threads(
    tmp_path: Path, files: dict[str, str], expected: int
) -> None:
    """A pool as wide as the machine is throttled in a container with a smaller quota."""
    assert cpu_limit(control_group(tmp_path, files)) == expected


def test_the_affinity_mask_bounds_the_threads(tmp_path: Path) -> None:
    """``taskset`` and cpusets take processors away without a quota."""
    mask = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(mask)})
        assert cpu_limit(control_group(tmp_path, {"cpu.max": "max 100000\n"})) == 1
    finally:
        os.sched_setaffinity(0, mask)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_answer_is_the_same_with_any_number_of_threads(tmp_path: Path, threads: int) -> None:
    """How many threads a run takes is the operator's choice."""
    path = onnx_models.write(tmp_path / "model.onnx", onnx_models.slow_model(2, loops=2))
    engines = OnnxEngines(threads)
    metadata = engines.inspect(path, ModelHints())
    row_format = RowFormat(metadata.columns)
    rows = [[1.5, 2.0], [0.25, 0.5]]
    outputs = engines.load(path, metadata).run(Rows(rows, [row_format.pack(row) for row in rows]))
    assert outputs.results == [3.5, 0.75]
