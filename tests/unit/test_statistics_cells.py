"""Counts over cells are exact, merge by addition, and know what is no value."""

import math
import random
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phoenix_ml.application.statistics.alarm import check_schema
from phoenix_ml.application.statistics.baseline import (
    describe_reference,
    read_reference,
    reference_columns,
    write_reference,
)
from phoenix_ml.application.statistics.cells import (
    ABOVE,
    BELOW,
    FAR,
    INFINITE,
    MISSING,
    WRONG_TYPE,
    CellCounter,
)
from phoenix_ml.domain.baselines import RESULT, SCORE, Baseline, FeatureBaseline, FeatureKind
from phoenix_ml.domain.errors import InvalidField
from phoenix_ml.domain.features import FeatureRule, FeatureType
from phoenix_ml.domain.models import Task
from phoenix_ml.domain.rows import ElementType, Outputs

FLOAT, STRING, BOOLEAN = (
    FeatureRule(FeatureType.FLOAT),
    FeatureRule(FeatureType.STRING),
    FeatureRule(FeatureType.BOOLEAN),
)
numbers = st.none() | st.floats() | st.integers(-9, 9)
columns = st.lists(numbers, max_size=60)


def normal_baseline(seed: int = 0, rows: int = 1000) -> Baseline:
    values = np.random.default_rng(seed).normal(size=rows).tolist()
    return describe_reference({"x": values}, {"x": FLOAT})


@given(columns)
def test_every_row_of_a_numeric_column_is_counted_once(column: list[float | None]) -> None:
    """What is counted nowhere is a hole that no alarm can see through; the oracle is a loop over the rows."""
    baseline = normal_baseline()
    counter = CellCounter(baseline)
    entry = baseline.features["x"]
    assert entry.cuts is not None
    assert entry.low is not None
    assert entry.high is not None
    far = 10 * (entry.high - entry.low)
    expected = [0] * (len(entry.counts) + 6)
    for value in column:
        if value is None or math.isnan(value):
            expected[len(entry.counts) + MISSING] += 1
        elif math.isinf(value):
            expected[len(entry.counts) + INFINITE] += 1
        else:
            expected[sum(cut < value for cut in entry.cuts)] += 1
            expected[len(entry.counts) + BELOW] += value < entry.low
            expected[len(entry.counts) + ABOVE] += value > entry.high
            expected[len(entry.counts) + FAR] += value < entry.low - far or value > entry.high + far
    assert expected == counter.count({"x": column}).counts.tolist()


@given(columns, columns)
def test_counts_of_parts_add_up_to_the_counts_of_the_whole(one: list[float], other: list[float]) -> None:
    """Monitors on several machines count parts of one stream, and a batch survives its way through the database."""
    counter = CellCounter(normal_baseline())
    whole = counter.count({"x": [*one, *other]})
    parts = counter.count({"x": one}) + counter.read(counter.count({"x": other}).to_json())
    assert whole == parts
    assert counter.zero() + whole == whole


def test_arrays_and_lists_count_alike() -> None:
    """The log gives arrays, a file gives lists; the same rows are the same counts."""
    values = np.random.default_rng(1).normal(size=500).astype(np.float32)
    values[7] = np.nan
    counter = CellCounter(normal_baseline())
    assert counter.count({"x": values.tolist()}) == counter.count({"x": values})


def test_counts_over_other_cells_are_refused() -> None:
    """Added up they would be nonsense that looks like drift."""
    one, other = CellCounter(normal_baseline(1)), CellCounter(normal_baseline(2))
    with pytest.raises(InvalidField, match="another baseline"):
        other.read(one.zero().to_json())
    with pytest.raises(InvalidField, match="cannot be added"):
        other.zero() + one.zero()


def test_a_value_filled_in_by_a_default_is_missing() -> None:
    """A store that loses a feature must show as missing values, not as a pile of defaults."""
    reference: dict[str, Any] = {"x": [1.0, 2.0, None] * 10, "c": ["a", "b", ""] * 10}
    baseline = describe_reference(reference, {"x": FLOAT, "c": STRING})
    counter = CellCounter(baseline)
    counts = counter.count({"x": [0.0, 2.0], "c": ["", "b"]}, absent={"x": [True, False]})
    assert (counter.aside(counts, "x", MISSING), counter.cells(counts, "x").tolist()) == (1, [0, 1, 0])
    assert (counter.aside(counts, "c", MISSING), counter.cells(counts, "c").tolist()) == (1, [0, 1, 0])


def test_a_truth_that_the_model_takes_as_a_number_is_still_a_truth() -> None:
    """A boolean feature of a float32 tensor comes back from the log as 1.0."""
    reference = {"m": [True, False, True, None]}
    baseline = describe_reference(reference, {"m": BOOLEAN}, elements={"m": ElementType.FLOAT32})
    counter = CellCounter(baseline)
    counts = counter.count({"m": np.array([1.0, 0.0, 1.0, 7.0], dtype=np.float32)})
    assert (
        counter.cells(counts, "m").tolist()
        == counter.cells(counter.count({"m": [True, False, True]}), "m").tolist()
    )
    assert counter.aside(counts, "m", WRONG_TYPE) == 1


@pytest.mark.parametrize(
    ("reference", "expected"), [(["", None] * 500, [3]), (["True", "False"] * 500, [0, 0, 3])]
)
def test_a_text_is_never_of_another_type_than_a_text(reference: list[Any], expected: list[int]) -> None:
    """A feature that is text may say "True" or nothing in its reference; "unknown" after that is another level, no defect."""
    baseline = describe_reference({"c": reference}, {"c": STRING})
    counter = CellCounter(baseline)
    counts = counter.count({"c": ["unknown"] * 3})
    assert counter.cells(counts, "c").tolist() == expected
    assert check_schema(baseline, counts) == ()


def test_a_reference_is_rounded_as_the_engine_rounds_it() -> None:
    """0.1 as float32 is above 0.1: unrounded, a third of the rows would move into the next cell without any change."""
    values = [0.1, 0.2, 0.3] * 100
    baseline = describe_reference({"x": values}, {"x": FLOAT}, elements={"x": ElementType.FLOAT32})
    counter = CellCounter(baseline)
    counts = counter.count({"x": np.array(values, dtype=np.float32)})
    assert tuple(counter.cells(counts, "x").tolist()) == baseline.features["x"].counts


def test_a_category_that_nobody_knew_is_other() -> None:
    """A new level is what an alarm has to see."""
    baseline = describe_reference({"c": ["a", "b"] * 10}, {"c": STRING})
    counter = CellCounter(baseline)
    assert counter.cells(counter.count({"c": ["a", "z", "z"]}), "c").tolist() == [1, 0, 2]


def test_levels_that_are_chosen_are_counted_on_other_rows() -> None:
    """Of 1,000 levels all alike, the 50 that came most often in a sample will not do so in the next one.

    Counted on the rows that they were chosen on, they had 1.4 times their share of 5 % and every check rang.
    """
    drawn = np.random.default_rng(4).integers(0, 1000, 10_000)
    column = [f"v{i}" if i % 10 else None for i in drawn]
    entry = describe_reference({"c": column}, {"c": STRING}).features["c"]
    assert entry.levels is not None
    rows = entry.present + entry.missing
    assert rows == pytest.approx(7500, abs=4 * math.sqrt(10_000 * 0.25 * 0.75))
    assert entry.missing / rows == pytest.approx(0.1, abs=4 * math.sqrt(0.09 / rows))
    share = 50 / 900
    assert sum(entry.levels.values()) / entry.present == pytest.approx(
        share, abs=4 * math.sqrt(share / entry.present)
    )


@pytest.mark.parametrize("rarest", [9, 10])
def test_levels_that_all_come_often_are_counted_on_all_rows(rarest: int) -> None:
    """Nothing was chosen there. Where one is rare, others may be lacking that nobody has seen."""
    column = ["a"] * 600 + ["b"] * 400 + ["c"] * rarest
    entry = describe_reference({"c": column}, {"c": STRING}).features["c"]
    assert (entry.present == len(column)) == (rarest == 10)


def test_a_boolean_has_no_other_levels_than_its_two() -> None:
    """A flag that is hardly ever up is no reason to count fewer rows."""
    entry = describe_reference({"m": [True] + [False] * 999}, {"m": BOOLEAN}).features["m"]
    assert entry.levels == {"False": 999, "True": 1}


def test_outputs_are_watched_as_score_and_result() -> None:
    """A model whose answers move is seen even where no single feature moves much."""
    outputs = Outputs([1, 0, 1] * 10, [0.9, 0.6, 0.7] * 10, [[0.1, 0.9], [0.6, 0.4], [0.3, 0.7]] * 10)
    baseline = describe_reference(
        {"x": [1.0, 2.0, 3.0] * 10}, {"x": FLOAT}, outputs=outputs, task=Task.CLASSIFICATION
    )
    counter = CellCounter(baseline)
    counts = counter.count({"x": [1.0]}, outputs=Outputs([0], [0.6], [[0.6, 0.4]]), task=Task.CLASSIFICATION)
    assert counter.cells(counts, SCORE).tolist() == [1, 0, 0, 0]
    assert counter.cells(counts, RESULT).tolist() == [0, 1, 0]


KINDS: list[tuple[FeatureType, list[Any], FeatureKind]] = [
    (FeatureType.FLOAT, [1.0, 2.0], FeatureKind.NUMERIC),
    (FeatureType.FLOAT, [2.0, 2.0], FeatureKind.CONSTANT),
    (FeatureType.STRING, ["a", "b"] * 10, FeatureKind.CATEGORICAL),
    (FeatureType.STRING, ["a"] * 10, FeatureKind.CONSTANT),
    (FeatureType.STRING, [str(i) for i in range(60)], FeatureKind.HIGH_CARDINALITY),
]


@pytest.mark.parametrize(("type_", "column", "kind"), KINDS)
def test_a_feature_is_of_the_kind_that_its_reference_shows(
    type_: FeatureType, column: list[Any], kind: FeatureKind
) -> None:
    """The kind picks the test; the wrong one has no power or false alarms."""
    assert kind is describe_reference({"x": column}, {"x": FeatureRule(type_)}).features["x"].kind


def test_the_baseline_of_30_features_is_at_most_50_kilobytes_of_json() -> None:
    """It is read by every process with each version; half numbers, half long levels, with everything that it can hold."""
    rng = np.random.default_rng(3)
    rows = 9000
    features: dict[str, Any] = {f"number {i}": rng.normal(size=rows).tolist() for i in range(15)}
    words = ["".join(random.Random(i).choices("abcdefgh ", k=40)) for i in range(90)]
    features |= {f"level {i}": rng.choice(words, size=rows).tolist() for i in range(15)}
    contract = {name: FLOAT if name.startswith("number") else STRING for name in features}
    answers = rng.normal(size=rows)

    baseline = describe_reference(
        features,
        contract,
        time=range(rows),
        outputs=Outputs(answers.tolist()),
        outcomes=(answers + rng.normal(size=rows)).tolist(),
        task=Task.REGRESSION,
    )

    assert baseline.is_time_ordered
    assert baseline.loss_model is not None
    assert len(msgspec.json.encode(baseline)) <= 50_000
    assert msgspec.json.decode(msgspec.json.encode(baseline), type=Baseline) == baseline


def test_a_baseline_that_was_stored_by_an_earlier_release_still_decodes() -> None:
    """Versions are immutable: what was registered must be served for ever."""
    stored = {
        "rows": 3,
        "features": {
            "x": {"missing": 1, "cuts": [1.0, 2.0], "counts": [1, 1, 0]},
            "c": {"missing": 0, "levels": {"a": 3}, "other": 0},
        },
    }
    expected = Baseline(
        3,
        {
            "x": FeatureBaseline(1, cuts=(1.0, 2.0), counts=(1, 1, 0)),
            "c": FeatureBaseline(0, levels={"a": 3}),
        },
    )
    assert expected == msgspec.convert(stored, Baseline)


def test_reference_columns_are_stored_as_they_are_and_in_the_same_bytes(tmp_path: Any) -> None:
    """Their digest is their name in the artifact store; a name of a feature may be no name of a file."""
    contract = {"a/b": FLOAT, "c": STRING}
    arrays = reference_columns({"a/b": [3.0, None, 1.0], "c": ["x", "y", "z"]}, contract)
    write_reference(tmp_path / "one.npz", arrays)
    write_reference(tmp_path / "two.npz", arrays)
    assert {name: column.tolist() for name, column in read_reference(tmp_path / "one.npz").items()} == {
        "a/b": [1.0, 3.0]
    }
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()


def test_values_times_a_thousand_are_a_wrong_unit() -> None:
    """The defect that retraining would only learn."""
    baseline = describe_reference({"x": np.linspace(1, 100, 1000).tolist()}, {"x": FLOAT})
    counts = CellCounter(baseline).count({"x": (np.linspace(1, 100, 500) * 1000)})
    assert [(found.kind, found.violating) for found in check_schema(baseline, counts)] == [("unit", 500)]


def test_one_client_of_several_that_sends_cents_is_a_wrong_unit_too() -> None:
    """Its values are few, but no population moves by a hundred times its own range; a retraining would learn them."""
    baseline = normal_baseline()
    values = np.random.default_rng(2).normal(size=1000)
    values[:50] *= 100_000
    (found,) = check_schema(baseline, CellCounter(baseline).count({"x": values}))
    assert (found.kind, found.explains_drift) == ("unit", True)


def test_a_value_or_two_that_are_none_are_told_and_explain_nothing() -> None:
    """Else one infinite value in a thousand would switch the alarm of its feature off."""
    baseline = normal_baseline()
    values = np.random.default_rng(2).normal(size=1000)
    values[0] = math.inf
    (found,) = check_schema(baseline, CellCounter(baseline).count({"x": values}))
    assert (found.kind, found.violating, found.explains_drift) == ("infinite", 1, False)


def test_infinite_values_and_other_types_are_violations_from_the_first_on() -> None:
    """No reference has them, so one is one too many."""
    counter = CellCounter(normal_baseline())
    counts = counter.count({"x": [0.0, math.inf, "old", -math.inf]})
    found = {violation.kind: violation.violating for violation in check_schema(normal_baseline(), counts)}
    assert found == {"infinite": 2, "type": 1}


@pytest.mark.parametrize("rows", [200, 1000, 100_000])
def test_new_extremes_of_the_same_distribution_are_no_violation(rows: int) -> None:
    """A sample of 1,000 does not know the range of 100,000 rows."""
    counts = CellCounter(normal_baseline()).count({"x": np.random.default_rng(9).normal(size=rows)})
    assert check_schema(normal_baseline(), counts) == ()


def test_some_values_beyond_the_range_are_told_but_explain_no_drift() -> None:
    """Incomes that inflate leave the range too, and that is drift, not a defect."""
    values = np.random.default_rng(9).normal(3.0, size=1000)
    (found,) = check_schema(normal_baseline(), CellCounter(normal_baseline()).count({"x": values}))
    assert (found.kind, found.explains_drift) == ("range", False)
