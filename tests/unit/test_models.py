"""Versions sort as semver.org says, and move one step of the ladder at a time."""

from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phoenix_ml.domain.errors import InvalidField, ModelRefused, StageConflict
from phoenix_ml.domain.models import (
    Signature,
    Stage,
    TensorSpec,
    check_model_id,
    check_promotion,
    check_version,
    version_precedence,
)
from phoenix_ml.domain.rows import Column, ElementType

# semver.org, 11, and the lists that it links to from its regular expression.
IN_ORDER = (
    *("0.0.0", "0.0.1", "0.9.0", "1.0.0-0", "1.0.0-1", "1.0.0-9", "1.0.0-10", "1.0.0-alpha", "1.0.0-alpha.1"),
    *("1.0.0-alpha.beta", "1.0.0-beta", "1.0.0-beta.2", "1.0.0-beta.11", "1.0.0-rc.1", "1.0.0"),
    *("1.0.1", "1.9.0", "1.10.0", "1.11.0", "2.0.0", "2.1.0", "2.1.1", "10.0.0"),
)
VALID = (
    *("0.0.4", "1.2.3", "10.20.30", "1.1.2-prerelease+meta", "1.1.2+meta", "1.1.2+meta-valid", "1.0.0-alpha"),
    *("1.0.0-beta", "1.0.0-alpha.beta", "1.0.0-alpha.beta.1", "1.0.0-alpha.1", "1.0.0-alpha0.valid"),
    *("1.0.0-alpha.0valid", "1.0.0-alpha-a.b-c-somethinglong+build.1-aef.1-its-okay", "1.0.0-rc.1+build.1"),
    *("2.0.0-rc.1+build.123", "1.2.3-beta", "10.2.3-DEV-SNAPSHOT", "1.2.3-SNAPSHOT-123", "2.0.0", "1.1.7"),
    *("2.0.0+build.1848", "2.0.1-alpha.1227", "1.0.0-alpha+beta", "1.2.3----RC-SNAPSHOT.12.9.1--.12+788"),
    *(
        "1.2.3----R-S.12.9.1--.12+meta",
        "1.2.3----RC-SNAPSHOT.12.9.1--.12",
        "1.0.0+0.build.1-rc.10000aaa-kk-0.1",
    ),
    "1.0.0-0A.is.legal",
)
INVALID = (
    *(
        "",
        "1",
        "1.2",
        "1.2.3-0123",
        "1.2.3-0123.0123",
        "1.1.2+.123",
        "+invalid",
        "-invalid",
        "-invalid+invalid",
    ),
    *("-invalid.01", "alpha", "alpha.beta", "alpha.beta.1", "alpha.1", "alpha+beta", "alpha_beta", "alpha."),
    *("alpha..", "beta", "1.0.0-alpha_beta", "-alpha.", "1.0.0-alpha..", "1.0.0-alpha..1", "1.0.0-alpha...1"),
    *(
        "01.1.1",
        "1.01.1",
        "1.1.01",
        "1.2.3.DEV",
        "1.2-SNAPSHOT",
        "1.2.31.2.3----RC-SNAPSHOT.12.09.1--..12+788",
    ),
    *("1.2-RC-SNAPSHOT", "-1.0.3-gamma+b7718", "+justmeta", "9.8.7+meta+meta", "9.8.7-whatever+meta+meta"),
    *("v1.0.0", " 1.0.0", "1.0.0\n", "1.0.0 ", "latest", "١.٠.٠", "1.0.0-ä"),
)


@pytest.mark.parametrize("version", VALID)
def test_semantic_versions_are_versions(version: str) -> None:
    """People bring the versions that their tools make."""
    check_version(version)
    version_precedence(version)


@pytest.mark.parametrize("version", INVALID)
def test_what_is_no_semantic_version_is_refused(version: str) -> None:
    """A version that cannot be sorted could never be the newest, nor the oldest."""
    with pytest.raises(InvalidField, match="semantic version"):
        check_version(version)
    with pytest.raises(InvalidField, match="semantic version"):
        version_precedence(version)


@pytest.mark.parametrize("version", ["9999999999.0.0", "1.0.0-" + "a" * 60])
def test_versions_have_bounds(version: str) -> None:
    """They stand in file names, labels and integer columns."""
    with pytest.raises(InvalidField):
        check_version(version)


@pytest.mark.parametrize(("lower", "higher"), list(pairwise(IN_ORDER)))
def test_precedence_is_that_of_semver_org(lower: str, higher: str) -> None:
    """The newest version must be the one that everybody means, 1.10.0 and not 1.9.0."""
    assert version_precedence(lower) < version_precedence(higher)


@given(st.permutations(IN_ORDER))
def test_sorting_gives_the_order_from_any_order(shuffled: list[str]) -> None:
    """Keys of different kinds must still compare with each other."""
    assert tuple(sorted(shuffled, key=version_precedence)) == IN_ORDER


def test_build_metadata_has_no_say_in_precedence() -> None:
    """semver.org, 10."""
    assert version_precedence("1.0.0+a") == version_precedence("1.0.0+b") == version_precedence("1.0.0")


@pytest.mark.parametrize(("current", "wanted"), list(product(Stage, repeat=2)))
def test_a_version_moves_one_step_of_the_ladder_at_a_time(current: Stage, wanted: Stage) -> None:
    """Nothing reaches prod that was not in staging, and nothing falls from prod to dev unseen."""
    if {current, wanted} == {Stage.DEV, Stage.PROD}:
        with pytest.raises(StageConflict, match="staging first") as error:
            check_promotion(current, wanted)
        assert error.value.details == {"current": current, "wanted": wanted}
    else:
        check_promotion(current, wanted)


@pytest.mark.parametrize("model_id", ["a", "9", "credit-risk", "a.b_c-D", "x" * 128])
def test_usable_model_ids_are_taken(model_id: str) -> None:
    """Names that teams already have."""
    check_model_id(model_id)


@pytest.mark.parametrize(
    "model_id",
    [
        "",
        "x" * 129,
        ".",
        "..",
        ".a",
        "-a",
        "_a",
        "a/b",
        "a\\b",
        "a b",
        "ä",
        "a\n",
        "a\0",
        "../etc",
        "a%2f",
        "a:b",
        "１",
    ],
)
def test_unusable_model_ids_are_refused(model_id: str) -> None:
    """They become paths, and a path must not lead out of its folder."""
    with pytest.raises(InvalidField, match="not usable"):
        check_model_id(model_id)


def signature_of(*inputs: TensorSpec) -> Signature:
    return Signature(inputs, ())


def test_columns_follow_the_inputs() -> None:
    """Values are packed in this order, for ever."""
    signature = signature_of(
        TensorSpec("x", "float32", (None, 2)),
        TensorSpec("city", "string", (None, 1)),
        TensorSpec("n", "int64", (1,)),
    )

    assert signature.widths == (2, 1, 1)
    assert signature.columns() == (
        Column("x_0", ElementType.FLOAT32),
        Column("x_1", ElementType.FLOAT32),
        Column("city", ElementType.STRING),
        Column("n", ElementType.INT64),
    )
    assert [column.name for column in signature.columns("abcd")] == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (TensorSpec("x", "float16", (None, 2)), "elements of type float16"),
        (TensorSpec("x", "float32", (None, None)), "shape"),
        (TensorSpec("x", "float32", (None, 3, 8)), "shape"),
        (TensorSpec("x", "float32", ()), "shape"),
        (TensorSpec("x", "float32", (7, 2)), "exactly 7 rows"),
    ],
)
def test_an_input_that_is_no_table_is_refused(spec: TensorSpec, message: str) -> None:
    """An image model would load, and fail at each request."""
    with pytest.raises(ModelRefused, match=message):
        signature_of(spec).columns()
