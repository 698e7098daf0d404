"""Answers for a whole table are those that would be given one by one."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx_models
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import UNSET
from onnx import TensorProto, helper

from phoenix_ml.application.ports import Engine, ModelHints
from phoenix_ml.application.scoring import Cells, Scorer
from phoenix_ml.domain.errors import FeatureInvalid, FeatureMissing, PhoenixError, TakesTensors
from phoenix_ml.domain.features import FeatureContract, FeatureRule, FeatureType, describe_sources
from phoenix_ml.domain.models import Metadata, Task
from phoenix_ml.domain.rows import RowFormat, Rows
from phoenix_ml.infrastructure.engines.onnx import OnnxEngines
from phoenix_ml.infrastructure.tables import as_cells

RULES = {
    "amount": FeatureRule(FeatureType.FLOAT),
    "income": FeatureRule(FeatureType.FLOAT, None),
    "visits": FeatureRule(FeatureType.INTEGER, 3),
    "city": FeatureRule(FeatureType.STRING, None),
}


def mixed_model() -> bytes:
    """amount + income + visits, and 100 more for people of Oslo: a column an input."""
    nodes = [
        helper.make_node("Cast", ["visits"], ["visits_f"], to=TensorProto.FLOAT),
        helper.make_node("StringNormalizer", ["city"], ["place"], case_change_action="NONE"),
        helper.make_node(
            "LabelEncoder",
            ["place"],
            ["bonus"],
            domain="ai.onnx.ml",
            keys_strings=["Oslo"],
            values_floats=[100.0],
            default_float=0.0,
        ),
        helper.make_node("Add", ["amount", "income"], ["money"]),
        helper.make_node("Add", ["money", "visits_f"], ["sum"]),
        helper.make_node("Add", ["sum", "bonus"], ["y"]),
    ]
    inputs = [
        helper.make_tensor_value_info(name, kind, ("n",))
        for name, kind in (
            ("amount", TensorProto.FLOAT),
            ("income", TensorProto.FLOAT),
            ("visits", TensorProto.INT64),
            ("city", TensorProto.STRING),
        )
    ]
    graph = helper.make_graph(
        nodes, "g", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, ("n",))]
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString())


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, Metadata]:
    path = onnx_models.write(tmp_path_factory.mktemp("mixed") / "m.onnx", mixed_model())
    engines = OnnxEngines(1)
    metadata = engines.inspect(path, ModelHints("regression", tuple(RULES)))
    contract = FeatureContract.check(metadata.columns, RULES)
    metadata = msgspec.structs.replace(
        metadata, contract=contract, row_independent=True, sample=(1.0, 2.0, 3, "Oslo")
    )
    return engines.load(path, metadata), metadata


Row = tuple[float, bytes, str | dict[str, str]]


def one_by_one(engine: Engine, metadata: Metadata, columns: dict[str, list[Any]]) -> list[Row] | str:
    """What ``/predict`` would answer to each row and put on record of its features; the words of the first refusal."""
    contract, row_format = (
        FeatureContract(metadata.columns, metadata.contract),
        RowFormat(metadata.columns),
    )
    answered: list[Row] = []
    for i, row in enumerate(zip(*columns.values(), strict=True)):
        try:
            values, letters = contract.resolve(None, dict(zip(columns, row, strict=True)), 0)
            packed = row_format.pack(values)
            (result,) = engine.run(Rows([values], [packed])).results
            answered.append((result, packed, describe_sources(letters, contract.names)))
        except PhoenixError as exc:
            return f"row {i + 1}: {exc.message}"
    return answered


def cells(columns: Mapping[str, list[Any]]) -> dict[str, Cells]:
    """The columns as a table has them; no table mixes texts, numbers and truths, so such columns are just lists."""
    found = {}
    for name, values in columns.items():
        kinds = {type(value) for value in values} - {type(None)}
        alike = len(kinds) < 2 or (kinds == {int, float} and RULES.get(name) != RULES["visits"])
        try:
            if not alike:
                raise pa.ArrowInvalid("Arrow would make the ones of the others")
            found[name] = as_cells(pa.array(values, from_pandas=False))
        except (pa.ArrowException, OverflowError):
            found[name] = Cells(None, values.copy)
    return found


def compute(scorer: Scorer, columns: Mapping[str, list[Any]], first_row: int = 1) -> dict[str, Any]:
    count = len(next(iter(columns.values())))
    found = scorer.compute(cells(columns), count, first_row)
    return {name: None if values is None else values.tolist() for name, values in found.items()}


def scored(engine: Engine, metadata: Metadata, columns: dict[str, list[Any]]) -> list[Row] | str:
    count = len(next(iter(columns.values())))
    try:
        found = Scorer(engine, metadata, list(columns), is_recorded=True).score(cells(columns), count, 1)
    except PhoenixError as exc:
        return exc.message
    sources = [describe_sources(letters, list(RULES)) for letters in found.sources]
    return list(zip(found.outputs.results.tolist(), found.packed, sources, strict=True))


FLOATS = st.none() | st.floats(-1e6, 1e6, width=32) | st.integers(-1000, 1000)
ODD = st.sampled_from(["text", True, 1e39, 2**70, "a\0b", float("inf")])


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.floats(-1e6, 1e6, width=32) | st.integers(-1000, 1000),
            FLOATS,
            st.none() | st.integers(-1000, 1000),
            st.none() | st.sampled_from(["Oslo", "Rome", ""]),
        ),
        min_size=1,
        max_size=8,
    ),
    st.none() | st.tuples(st.integers(0, 7), st.integers(0, 3), ODD),
)
def test_a_table_is_answered_as_its_rows_would_be(
    loaded: tuple[Engine, Metadata], rows: list[tuple[Any, ...]], odd: tuple[int, int, Any] | None
) -> None:
    """Whoever scores a file compares it with what is served; the first wrong value is named with its row."""
    if odd is not None:
        row, column, value = odd
        changed = list(rows[row % len(rows)])
        changed[column] = value
        rows[row % len(rows)] = tuple(changed)
    columns = {name: [row[i] for row in rows] for i, name in enumerate(RULES)}

    expected, actual = one_by_one(*loaded, columns), scored(*loaded, columns)

    if isinstance(expected, str) or isinstance(actual, str):
        assert actual == expected
    else:
        assert [row[1:] for row in actual] == [row[1:] for row in expected]
        np.testing.assert_array_equal([row[0] for row in actual], [row[0] for row in expected])


def test_columns_that_a_table_lacks_have_their_defaults(loaded: tuple[Engine, Metadata]) -> None:
    """As a request may leave them out."""
    columns: dict[str, list[Any]] = {"amount": [1.0, 2.0], "income": [10.0, 20.0], "unknown": [None, None]}

    scorer = Scorer(*loaded, list(columns))

    assert list(scorer.wanted) == ["amount", "income"]
    assert compute(scorer, columns) == {"_result": [14.0, 25.0]}


def test_a_table_without_a_required_column_is_refused_at_once(loaded: tuple[Engine, Metadata]) -> None:
    """Not after an hour, and not by its first row."""
    with pytest.raises(FeatureMissing, match="the table has no column amount; it has income"):
        Scorer(*loaded, ["income"])


def test_rows_that_bear_on_each_other_run_alone(loaded: tuple[Engine, Metadata]) -> None:
    """An answer must not depend on who else is in the file."""
    engine, metadata = loaded
    alone = msgspec.structs.replace(metadata, row_independent=False)
    columns: dict[str, list[Any]] = {"amount": [1.0, 2.0, "x"], "income": [10.0, 20.0, 30.0]}

    first_two = {name: values[:2] for name, values in columns.items()}
    assert compute(Scorer(engine, alone, list(columns)), first_two) == {"_result": [14.0, 25.0]}
    with pytest.raises(FeatureInvalid, match="row 13: feature 'amount'"):
        compute(Scorer(engine, alone, list(columns)), columns, 11)


def test_the_rules_are_complete() -> None:
    """Each kind of default is tried: none, missing, a value."""
    assert {rule.default for rule in RULES.values()} == {UNSET, None, 3}


@pytest.mark.parametrize(
    "kind",
    [
        pa.int8(),
        pa.int64(),
        pa.uint8(),
        pa.uint64(),
        pa.float16(),
        pa.float32(),
        pa.float64(),
        pa.dictionary(pa.int8(), pa.float64()),
    ],
    ids=str,
)
def test_numbers_of_any_width_are_numbers(loaded: tuple[Engine, Metadata], kind: pa.DataType) -> None:
    """Files have the types that their writers found fit, with gaps or without."""
    values = [3, None, 7]
    made = pa.array([None if one is None else float(one) for one in values], pa.float64())
    income = made.cast(kind) if not pa.types.is_dictionary(kind) else made.dictionary_encode().cast(kind)
    columns = {"amount": as_cells(pa.array([1.0, 2.0, 4.0])), "income": as_cells(income)}

    results = Scorer(*loaded, list(columns)).compute(columns, 3, 1)["_result"]

    np.testing.assert_array_equal(results, [1 + 3 + 3, np.nan, 4 + 7 + 3])


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str
)
def test_texts_are_read_however_a_file_holds_them(loaded: tuple[Engine, Metadata], kind: pa.DataType) -> None:
    """A part of a column may begin anywhere, and have texts that the whole has and it has not."""
    cities = pa.array(["no\0text", "Oslo", None, "Rome", "Oslo"], pa.string())
    held = cities.dictionary_encode() if pa.types.is_dictionary(kind) else cities.cast(kind)
    numbers = {name: as_cells(pa.array([one] * 4)) for name, one in (("amount", 1.0), ("income", 0.0))}
    columns = numbers | {"city": as_cells(held.slice(1))}

    results = Scorer(*loaded, list(columns)).compute(columns, 4, 1)["_result"]

    np.testing.assert_array_equal(results, [104, 4, 4, 104])


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_nan_is_missing_as_data_frames_write_it(
    loaded: tuple[Engine, Metadata], missing: float | None
) -> None:
    """A required feature is refused by its row, another has its default, whatever the file calls nothing."""
    required: dict[str, list[Any]] = {"amount": [1.0, missing], "income": [0.0, 0.0]}
    optional: dict[str, list[Any]] = {
        "amount": [1.0, 1.0],
        "city": ["Oslo", "Rome"],
        "income": [0.0, missing],
    }
    with_default = msgspec.structs.replace(
        loaded[1], contract=RULES | {"income": FeatureRule(FeatureType.FLOAT, 50.0)}
    )

    with pytest.raises(FeatureMissing, match="row 2: feature 'amount' is required"):
        compute(Scorer(*loaded, list(required)), required)
    found = compute(Scorer(loaded[0], with_default, list(optional)), optional)
    assert found == {"_result": [1 + 0 + 3 + 100, 1 + 50 + 3]}


def test_a_column_without_any_value_has_its_default(loaded: tuple[Engine, Metadata]) -> None:
    """Arrow gives such a column a type of its own."""
    columns: dict[str, list[Any]] = {
        "amount": [1.0, 2.0],
        "income": [0.0, 0.0],
        "visits": [None, None],
        "city": [None, None],
    }

    assert compute(Scorer(*loaded, list(columns)), columns) == {"_result": [4.0, 5.0]}


def inspected(folder: Path, model: bytes, task: str | None = None) -> tuple[Engine, Metadata]:
    path = onnx_models.write(folder / "m.onnx", model)
    engines = OnnxEngines(1)
    metadata = engines.inspect(path, ModelHints(task))
    contract = FeatureContract.check(metadata.columns, {})
    metadata = msgspec.structs.replace(
        metadata, contract=contract, row_independent=True, sample=(0.0,) * len(metadata.columns)
    )
    return engines.load(path, metadata), metadata


@pytest.mark.parametrize("independent", [True, False])
def test_several_answers_a_row_are_columns(tmp_path: Path, independent: bool) -> None:
    """A table's cell holds one number; which is which is told by the position, as in the answer's list."""
    engine, metadata = inspected(tmp_path, onnx_models.multi_output_regressor(3))
    metadata = msgspec.structs.replace(metadata, row_independent=independent)
    table = np.random.default_rng(5).normal(size=(50, 3)).astype(np.float32)
    columns = {name: table[:, i].tolist() for i, name in enumerate(metadata.features)}
    scorer = Scorer(engine, metadata, list(columns))

    found = compute(scorer, columns)

    assert list(scorer.added.items()) == [("_result_0", FeatureType.FLOAT), ("_result_1", FeatureType.FLOAT)]
    np.testing.assert_allclose(found["_result_0"], table.sum(axis=1), rtol=1e-6)
    np.testing.assert_array_equal(found["_result_1"], table.max(axis=1))


MODELS: Mapping[str, Callable[[], bytes]] = {
    "label and probabilities": onnx_models.binary_classifier,
    "label alone": onnx_models.label_only_classifier,
    "probabilities alone": onnx_models.probabilities_only,
    "one probability": onnx_models.one_probability,
    "maps of texts": onnx_models.zipmap_classifier,
    "number": onnx_models.linear_regressor,
    "numbers": onnx_models.multi_output_regressor,
}


@pytest.mark.parametrize("name", MODELS)
def test_columns_are_answered_as_rows_are(tmp_path: Path, name: str) -> None:
    """Arrays are the quick way to the same answers, in whatever form a classifier gives its own."""
    task = "classification" if "probabilit" in name else None
    engine, metadata = inspected(tmp_path, MODELS[name](), task)
    table = np.random.default_rng(3).normal(size=(40, len(metadata.columns))).astype(np.float32)
    row_format = RowFormat(metadata.columns)

    expected = engine.run(Rows(table.tolist(), [row_format.pack(row) for row in table.tolist()]))
    actual = engine.run_columns(
        {column.name: table[:, i].copy() for i, column in enumerate(metadata.columns)}, len(table)
    )

    assert actual.listed() == expected


def test_a_version_that_takes_tensors_is_refused(loaded: tuple[Engine, Metadata]) -> None:
    """Its inputs are no columns of a table."""
    engine, metadata = loaded
    tensors = msgspec.structs.replace(metadata, task=Task.TENSORS, not_tabular="three dimensions")

    with pytest.raises(TakesTensors, match="three dimensions"):
        Scorer(engine, tensors, ["amount"])


def test_features_are_told_by_name_not_by_the_contracts_order(tmp_path: Path) -> None:
    """PostgreSQL gives the keys of a JSON document back in an order of its own."""
    engine, metadata = inspected(tmp_path, onnx_models.linear_regressor(3))
    turned = {name: metadata.contract[name] for name in reversed(metadata.features)}
    table = np.random.default_rng(7).normal(size=(20, 3)).astype(np.float32)
    columns = {name: table[:, i].tolist() for i, name in enumerate(metadata.features)}

    scorer = Scorer(engine, msgspec.structs.replace(metadata, contract=turned), list(columns))

    expected = table @ onnx_models.weights(3) + 0.25
    np.testing.assert_allclose(compute(scorer, columns)["_result"], expected, rtol=1e-5, atol=1e-6)
