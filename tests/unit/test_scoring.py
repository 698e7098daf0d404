"""Answers for a whole table are those that would be given one by one."""

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import onnx_models
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import UNSET
from onnx import TensorProto, helper

from phoenix_ml.application.ports import Engine, ModelHints
from phoenix_ml.application.scoring import Scorer
from phoenix_ml.domain.errors import FeatureInvalid, FeatureMissing, PhoenixError
from phoenix_ml.domain.features import FeatureContract, FeatureRule, FeatureType
from phoenix_ml.domain.models import Metadata
from phoenix_ml.domain.rows import RowFormat, Rows
from phoenix_ml.infrastructure.engines.onnx import OnnxEngines

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
    metadata = msgspec.structs.replace(metadata, contract=contract, row_independent=True)
    return engines.load(path, metadata), metadata


def one_by_one(engine: Engine, metadata: Metadata, columns: dict[str, list[Any]]) -> list[float] | str:
    """What ``/predict`` would answer to each row; the words of the first refusal."""
    contract, row_format = (
        FeatureContract(metadata.columns, metadata.contract),
        RowFormat(metadata.columns),
    )
    results: list[float] = []
    for i, row in enumerate(zip(*columns.values(), strict=True)):
        try:
            values, _ = contract.resolve(None, dict(zip(columns, row, strict=True)), 0)
            results += engine.run(Rows([values], [row_format.pack(values)])).results
        except PhoenixError as exc:
            return f"row {i + 1}: {exc.message}"
    return results


def scored(engine: Engine, metadata: Metadata, columns: dict[str, list[Any]]) -> Sequence[Any] | str:
    rows = len(next(iter(columns.values())))
    try:
        return Scorer(engine, metadata, list(columns)).compute(columns, rows, 1)["_result"]
    except PhoenixError as exc:
        return exc.message


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
        np.testing.assert_array_equal(np.array(actual), np.array(expected))


def test_columns_that_a_table_lacks_have_their_defaults(loaded: tuple[Engine, Metadata]) -> None:
    """As a request may leave them out."""
    columns: dict[str, list[Any]] = {"amount": [1.0, 2.0], "income": [10.0, 20.0], "unknown": [None, None]}

    scorer = Scorer(*loaded, list(columns))

    assert list(scorer.wanted) == ["amount", "income"]
    assert scorer.compute(columns, 2, 1) == {"_result": [14.0, 25.0]}


def test_a_table_without_a_required_column_is_refused_at_once(loaded: tuple[Engine, Metadata]) -> None:
    """Not after an hour, and not by its first row."""
    with pytest.raises(FeatureMissing, match="the table has no column amount; it has income"):
        Scorer(*loaded, ["income"])


def test_rows_that_bear_on_each_other_run_alone(loaded: tuple[Engine, Metadata]) -> None:
    """An answer must not depend on who else is in the file."""
    engine, metadata = loaded
    alone = msgspec.structs.replace(metadata, row_independent=False)
    columns: dict[str, list[Any]] = {"amount": [1.0, 2.0, "x"], "income": [10.0, 20.0, 30.0]}

    assert Scorer(engine, alone, list(columns)).compute(
        {name: values[:2] for name, values in columns.items()}, 2, 1
    ) == {"_result": [14.0, 25.0]}
    with pytest.raises(FeatureInvalid, match="row 13: feature 'amount'"):
        Scorer(engine, alone, list(columns)).compute(columns, 3, 11)


def test_the_rules_are_complete() -> None:
    """Each kind of default is tried: none, missing, a value."""
    assert {rule.default for rule in RULES.values()} == {UNSET, None, 3}
