"""The bytes that go on record are exactly the values that the engine gets."""

import math
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phoenix_ml.domain.errors import FeatureInvalid
from phoenix_ml.domain.rows import Column, ElementType, RowFormat, Rows, Scalar

FLOAT32, FLOAT64, INT64, INT32, BOOL, STRING, TENSOR = ElementType
LARGEST_FLOAT32 = float(np.finfo(np.float32).max)
VALUES: dict[ElementType, st.SearchStrategy[Scalar]] = {
    FLOAT32: st.floats(width=32),
    FLOAT64: st.floats(),
    INT64: st.integers(-(2**63), 2**63 - 1),
    INT32: st.integers(-(2**31), 2**31 - 1),
    BOOL: st.booleans(),
    STRING: st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
}
cells = st.sampled_from(list(VALUES)).flatmap(lambda element: st.tuples(st.just(element), VALUES[element]))


def format_of(*elements: ElementType) -> RowFormat:
    return RowFormat([Column(f"f{i}", element) for i, element in enumerate(elements)])


@given(st.lists(cells, max_size=12))
def test_a_row_comes_back_as_it_was_packed(row: list[tuple[ElementType, Scalar]]) -> None:
    """Replay computes the answer again from these bytes, and nothing else is left of the request."""
    row_format = format_of(*(element for element, _ in row))

    back = row_format.unpack(row_format.pack([value for _, value in row]))

    # repr tells 1, 1.0 and True apart, and takes NaN for equal to itself.
    assert list(map(repr, back)) == [repr(value) for _, value in row]


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_rounding_to_float32_is_numpy_s(value: float) -> None:
    """The record must hold what the engine computed with, to the last bit."""
    row_format = format_of(FLOAT32)
    with np.errstate(over="ignore"):
        rounded = float(np.float32(value))

    if math.isinf(rounded):
        with pytest.raises(FeatureInvalid):
            row_format.pack([value])
    else:
        assert row_format.unpack(row_format.pack([value])) == [rounded]


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=40))
def test_a_row_of_numbers_is_an_array_in_column_order(values: list[float]) -> None:
    """The engine reads the bytes as they are, without a copy."""
    packed = format_of(*[FLOAT32] * len(values)).pack(values)

    assert np.frombuffer(packed, "<f4").tolist() == values


def test_numbers_come_first_then_strings_with_their_lengths() -> None:
    """Other programs read the log; the layout is documented, so it must not move."""
    packed = format_of(STRING, FLOAT32, STRING, INT64, BOOL).pack(["ä", 1.5, "", -2, True])

    assert packed == struct.pack("<fq?", 1.5, -2, True) + b"\x02\0\0\0\xc3\xa4" + b"\0\0\0\0"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), -0.0])
def test_special_numbers_stay_what_they_are(value: float) -> None:
    """NaN means missing to a model, and must be NaN in the replay."""
    for element in (FLOAT32, FLOAT64):
        row_format = format_of(element)
        assert repr(row_format.unpack(row_format.pack([value]))[0]) == repr(value)


@pytest.mark.parametrize(
    ("element", "value"),
    [
        (FLOAT32, LARGEST_FLOAT32 * 1.01),
        (FLOAT32, -1e39),
        (FLOAT32, 10**400),
        (FLOAT64, 10**400),
        (INT64, 2**63),
        (INT64, -(2**63) - 1),
        (INT32, 2**31),
        (INT64, 1.5),
        (FLOAT64, "1"),
    ],
)
@pytest.mark.parametrize("others", [(FLOAT32,), (STRING,)], ids=["numbers", "with strings"])
def test_a_value_that_does_not_fit_its_column_is_named(
    element: ElementType, value: Scalar, others: tuple[ElementType, ...]
) -> None:
    """Infinity in place of a large number would be predicted from without a word."""
    fine: Scalar = "text" if others == (STRING,) else 0.5

    with pytest.raises(FeatureInvalid, match=f"'f1'.*{element}") as error:
        format_of(*others, element).pack([fine, value])

    assert error.value.details == {"feature": "f1"}


def test_the_largest_float32_still_fits() -> None:
    """The limit belongs to the range."""
    row_format = format_of(FLOAT32, FLOAT32)

    assert row_format.unpack(row_format.pack([LARGEST_FLOAT32, -LARGEST_FLOAT32])) == [
        LARGEST_FLOAT32,
        -LARGEST_FLOAT32,
    ]


@pytest.mark.parametrize(("element", "expected"), [(FLOAT32, 1.0), (INT64, 1), (INT32, 1)])
def test_a_boolean_is_one_in_a_column_of_numbers(element: ElementType, expected: Scalar) -> None:
    """A contract may call a column boolean that the model takes as a number."""
    row_format = format_of(element)

    assert repr(row_format.unpack(row_format.pack([True]))) == repr([expected])


def test_rows_count_by_their_bytes() -> None:
    """The batcher sizes batches by it."""
    row_format = format_of(FLOAT32)

    assert len(Rows([[1.0], [2.0]], [row_format.pack([1.0]), row_format.pack([2.0])])) == 2
