"""A contract finds each value of a row in the right place, and says where it found it."""

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phoenix_ml.domain.errors import (
    FeatureCountWrong,
    FeatureInvalid,
    FeatureMissing,
    FeatureUnknown,
    InvalidField,
    ModelRefused,
    PhoenixError,
)
from phoenix_ml.domain.features import (
    SOURCE_LETTER,
    SOURCE_OF_LETTER,
    FeatureContract,
    FeatureRule,
    FeatureType,
    Given,
    Source,
    StoredFeatures,
    check_feature_name,
    packed_signature,
)
from phoenix_ml.domain.rows import Column, ElementType, Scalar

NOW_MS = 1_000_000_000
FLOAT, INTEGER, BOOLEAN, STRING = FeatureType
ELEMENT = {
    FLOAT: ElementType.FLOAT32,
    INTEGER: ElementType.INT64,
    BOOLEAN: ElementType.BOOL,
    STRING: ElementType.STRING,
}
WRONG_VALUES: list[tuple[FeatureType, Scalar]] = [
    (FLOAT, True),
    (FLOAT, "1.0"),
    (INTEGER, 1.0),
    (INTEGER, True),
    (INTEGER, "1"),
    (BOOLEAN, 1),
    (BOOLEAN, "true"),
    (STRING, 1),
    (STRING, False),
]


def contract_of(**rules: FeatureRule) -> FeatureContract:
    columns = [Column(name, ELEMENT[rule.type]) for name, rule in rules.items()]
    return FeatureContract(columns, FeatureContract.check(columns, rules))


def stored_now(**values: Scalar) -> StoredFeatures:
    return StoredFeatures(values, NOW_MS)


# Where a value is taken from


def test_the_store_comes_before_the_request_and_the_request_before_the_default() -> None:
    """The order is the promise that training and serving see the same values."""
    contract = contract_of(
        a=FeatureRule(FLOAT, default=0.5),
        b=FeatureRule(FLOAT, default=0.5),
        c=FeatureRule(FLOAT, default=0.5),
    )

    values, letters = contract.resolve(stored_now(a=1.0), {"a": 2.0, "b": 2.0}, NOW_MS)

    assert values == [1.0, 2.0, 0.5]
    assert letters == "srd"


@pytest.mark.parametrize(
    ("stored", "given_features", "letter"),
    [
        (stored_now(a=1.0, b=2.0), None, "s"),
        (None, {"a": 1.0, "b": 2.0}, "r"),
        (None, [1.0, 2.0], "r"),
        (stored_now(), [1.0, 2.0], "r"),
    ],
)
def test_one_letter_stands_for_all_features_of_one_source(
    stored: StoredFeatures | None, given_features: Given | None, letter: str
) -> None:
    """The usual prediction has one source, and its answer and its record stay short."""
    contract = contract_of(a=FeatureRule(FLOAT), b=FeatureRule(FLOAT))

    assert contract.resolve(stored, given_features, NOW_MS) == ([1.0, 2.0], letter)


def test_a_list_is_taken_in_signature_order() -> None:
    """Callers with an array need no names."""
    contract = contract_of(a=FeatureRule(FLOAT), b=FeatureRule(STRING), c=FeatureRule(INTEGER))

    assert contract.resolve(None, [1.0, "x", 3], NOW_MS) == ([1.0, "x", 3], "r")


def test_null_in_a_request_means_not_given() -> None:
    """Clients that always send every key send null for what they do not know."""
    contract = contract_of(a=FeatureRule(FLOAT, default=7.0), b=FeatureRule(FLOAT))

    assert contract.resolve(None, {"a": None, "b": 1.0}, NOW_MS) == ([7.0, 1.0], "dr")
    assert contract.resolve(None, [None, 1.0], NOW_MS) == ([7.0, 1.0], "dr")


def test_features_that_the_model_does_not_take_are_left_in_the_store() -> None:
    """One entity serves many models."""
    contract = contract_of(a=FeatureRule(FLOAT))

    assert contract.resolve(stored_now(a=1.0, other=2.0), None, NOW_MS) == ([1.0], "s")


@pytest.mark.parametrize("source", Source)
def test_every_source_has_a_letter_of_its_own(source: Source) -> None:
    """The journal stores letters; two sources with one letter could never be told apart again."""
    assert SOURCE_OF_LETTER[SOURCE_LETTER[source]] == source.value
    assert len(set(SOURCE_LETTER.values())) == len(Source)


# Age


@pytest.mark.parametrize(
    ("age_ms", "letter"),
    [(0, "s"), (60_000, "s"), (60_001, "r"), (-5_000, "s")],
    ids=["new", "limit", "old", "future"],
)
def test_a_value_older_than_its_max_age_is_not_used(age_ms: int, letter: str) -> None:
    """An old balance is worse than the one that the caller just sent."""
    contract = contract_of(a=FeatureRule(FLOAT, max_age_s=60))
    stored = StoredFeatures({"a": 1.0}, NOW_MS - age_ms)

    assert contract.resolve(stored, {"a": 2.0}, NOW_MS)[1] == letter


def test_the_time_of_the_feature_counts_before_that_of_the_entity() -> None:
    """A partial write makes what it wrote fresh, and nothing else."""
    contract = contract_of(
        a=FeatureRule(FLOAT, max_age_s=60), b=FeatureRule(FLOAT, max_age_s=60, default=0.0)
    )
    stored = StoredFeatures({"a": 1.0, "b": 2.0}, NOW_MS - 100_000, {"a": NOW_MS})

    assert contract.resolve(stored, None, NOW_MS) == ([1.0, 0.0], "so")


def test_a_value_without_a_time_is_stale_where_age_matters() -> None:
    """Unknown age is not young."""
    contract = contract_of(a=FeatureRule(FLOAT, max_age_s=60, default=0.0), b=FeatureRule(FLOAT))

    assert contract.resolve(StoredFeatures({"a": 1.0, "b": 2.0}), None, NOW_MS) == ([0.0, 2.0], "os")


def test_a_stale_value_of_a_required_feature_is_an_error_that_says_stale() -> None:
    """Whoever reads "missing" would look in the store, find the value and be puzzled."""
    contract = contract_of(a=FeatureRule(FLOAT, max_age_s=60))

    with pytest.raises(FeatureMissing, match=r"'a'.*too old") as error:
        contract.resolve(StoredFeatures({"a": 1.0}, 0), None, NOW_MS)

    assert error.value.details == {"feature": "a", "reason": "stale"}


# Defaults


def test_a_required_feature_that_is_nowhere_is_named() -> None:
    """Never a silent 0.0."""
    contract = contract_of(a=FeatureRule(FLOAT), b=FeatureRule(FLOAT))

    with pytest.raises(FeatureMissing, match="'b'") as error:
        contract.resolve(stored_now(a=1.0), None, NOW_MS)

    assert error.value.details == {"feature": "b", "reason": "missing"}


@pytest.mark.parametrize("default", [0, 0.0, -1])
def test_a_default_that_is_zero_is_a_default(default: float) -> None:
    """Zero is falsy, and a default all the same."""
    contract = contract_of(a=FeatureRule(FLOAT, default=default))

    assert contract.resolve(None, {}, NOW_MS) == ([default], "d")


@pytest.mark.parametrize(("stored", "letter"), [(None, "m"), (StoredFeatures({"a": 5.0, "b": "x"}, 0), "o")])
def test_a_default_of_null_gives_what_models_take_for_missing(
    stored: StoredFeatures | None, letter: str
) -> None:
    """Gradient boosting was trained with NaN where nothing was known."""
    contract = contract_of(
        a=FeatureRule(FLOAT, default=None, max_age_s=60), b=FeatureRule(STRING, default=None, max_age_s=60)
    )

    values, letters = contract.resolve(stored, None, NOW_MS)

    assert isinstance(values[0], float)
    assert math.isnan(values[0])
    assert values[1] == ""
    assert letters == letter


# What is refused


def test_a_feature_that_the_model_does_not_have_is_named_with_those_it_has() -> None:
    """A misspelt name would otherwise silently become a default."""
    contract = contract_of(age=FeatureRule(FLOAT, default=0.0), income=FeatureRule(FLOAT, default=0.0))

    with pytest.raises(FeatureUnknown, match=r"'agee'.*age, income") as error:
        contract.resolve(None, {"agee": 1.0}, NOW_MS)

    assert error.value.details == {"feature": "agee"}


@pytest.mark.parametrize("values", [[], [1.0], [1.0, 2.0, 3.0]])
@pytest.mark.parametrize("stored", [None, stored_now(a=1.0, b=1.0)])
def test_a_list_of_another_length_is_refused(
    values: list[Scalar | None], stored: StoredFeatures | None
) -> None:
    """Values in the wrong places would give a plausible answer."""
    contract = contract_of(a=FeatureRule(FLOAT, default=0.0), b=FeatureRule(FLOAT, default=0.0))

    with pytest.raises(FeatureCountWrong, match="takes 2: a, b") as error:
        contract.resolve(stored, values, NOW_MS)

    assert error.value.details == {"expected": 2, "given": len(values)}


@pytest.mark.parametrize(("wanted", "value"), WRONG_VALUES)
@pytest.mark.parametrize("source", ["store", "request", "list"])
def test_a_value_of_another_type_is_named_with_its_source(
    wanted: FeatureType, value: Scalar, source: str
) -> None:
    """Python takes True for 1 and Redis holds text; a model must get neither unnoticed."""
    contract = contract_of(a=FeatureRule(wanted))
    stored = stored_now(a=value) if source == "store" else None
    sent: dict[str, Given] = {"request": {"a": value}, "list": [value]}

    with pytest.raises(FeatureInvalid, match="'a'") as error:
        contract.resolve(stored, sent.get(source), NOW_MS)

    assert error.value.details == {"feature": "a", "source": "store" if source == "store" else "request"}


def test_a_whole_number_is_a_float() -> None:
    """JSON has no way to insist on 3.0."""
    assert contract_of(a=FeatureRule(FLOAT)).resolve(None, [3], NOW_MS) == ([3], "r")


def test_a_long_value_is_shortened_in_the_message() -> None:
    """A megabyte of text in a feature must not become a megabyte of error."""
    with pytest.raises(FeatureInvalid) as error:
        contract_of(a=FeatureRule(FLOAT)).resolve(None, ["x" * 10_000], NOW_MS)

    assert len(error.value.message) < 300


# The short cut for uniform rows

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-9, 9), st.floats(-9, 9), st.sampled_from(["", "a", "1", "true"])
)
rules = st.builds(
    lambda kind, default, max_age_s: FeatureRule(kind, default, max_age_s) if default else FeatureRule(kind),
    st.sampled_from(FeatureType),
    st.sampled_from([None, 1.5]),
    st.sampled_from([None, 60.0]),
)
by_name = st.dictionaries(st.sampled_from("abc"), scalars)
by_place = st.lists(scalars, min_size=2, max_size=4)
times = st.one_of(st.none(), st.sampled_from([NOW_MS, NOW_MS - 60_001]))


def outcome(resolve: Any, *arguments: Any) -> object:
    try:
        return repr(resolve(*arguments))
    except PhoenixError as error:
        return type(error), error.message, error.details


@given(
    kinds=st.lists(rules, min_size=3, max_size=3),
    same=st.booleans(),
    values=st.one_of(st.none(), by_name.map(lambda row: {n: v for n, v in row.items() if v is not None})),
    written=st.tuples(times, st.dictionaries(st.sampled_from("abc"), st.just(NOW_MS))),
    sent=st.one_of(st.none(), by_name, by_place),
)
def test_the_short_cut_and_the_long_way_agree(
    kinds: list[FeatureRule],
    same: bool,
    values: Mapping[str, Scalar] | None,
    written: tuple[int | None, dict[str, int]],
    sent: Given | None,
) -> None:
    """The short cut serves nearly all requests; a difference would be a bug nobody tests for."""
    chosen = dict(zip("abc", [kinds[0]] * 3 if same else kinds, strict=True))
    contract = FeatureContract([Column(name, ELEMENT[rule.type]) for name, rule in chosen.items()], chosen)
    stored = None if values is None else StoredFeatures(dict(values), *written)

    short = outcome(contract.resolve, stored, sent, NOW_MS)

    assert short == outcome(contract._resolve_one_by_one, stored, sent, NOW_MS)


# The contract itself


def test_features_that_a_contract_is_silent_on_are_required_and_of_the_column_s_type() -> None:
    """A contract says only what is special."""
    columns = [
        Column("a", ElementType.FLOAT32),
        Column("b", ElementType.INT32),
        Column("c", ElementType.STRING),
    ]

    complete = FeatureContract.check(columns, {"b": FeatureRule(INTEGER, default=1)})

    assert complete == {
        "a": FeatureRule(FLOAT),
        "b": FeatureRule(INTEGER, default=1),
        "c": FeatureRule(STRING),
    }
    assert list(complete) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("rule", "element", "message"),
    [
        (FeatureRule(FLOAT), ElementType.INT64, "of type float, the model takes int64"),
        (FeatureRule(INTEGER), ElementType.BOOL, "of type integer, the model takes bool"),
        (FeatureRule(STRING), ElementType.FLOAT32, "of type string, the model takes float32"),
        (FeatureRule(FLOAT), ElementType.STRING, "of type float, the model takes string"),
        (FeatureRule(INTEGER, default=None), ElementType.INT64, "integer has no value for missing"),
        (FeatureRule(BOOLEAN, default=None), ElementType.BOOL, "boolean has no value for missing"),
        (FeatureRule(FLOAT, default="0"), ElementType.FLOAT32, "default '0' is not of type float"),
        (FeatureRule(INTEGER, default=1.0), ElementType.INT64, "default 1.0 is not of type integer"),
        (FeatureRule(FLOAT, default=True), ElementType.FLOAT32, "default True is not of type float"),
        (FeatureRule(FLOAT, max_age_s=0), ElementType.FLOAT32, "max_age_s must be above 0"),
        (FeatureRule(FLOAT, max_age_s=-1), ElementType.FLOAT32, "max_age_s must be above 0"),
    ],
)
def test_a_rule_that_its_column_cannot_keep_is_refused(
    rule: FeatureRule, element: ElementType, message: str
) -> None:
    """It is found when the model is registered, not at its first prediction."""
    with pytest.raises(ModelRefused, match=message) as error:
        FeatureContract.check([Column("a", element)], {"a": rule})

    assert error.value.details["feature"] == "a"


@pytest.mark.parametrize(
    ("kind", "element"),
    [(INTEGER, ElementType.FLOAT32), (BOOLEAN, ElementType.FLOAT64), (BOOLEAN, ElementType.INT32)],
)
def test_a_wider_column_holds_a_narrower_feature(kind: FeatureType, element: ElementType) -> None:
    """Most models take one matrix of floats, whatever the columns mean."""
    assert FeatureContract.check([Column("a", element)], {"a": FeatureRule(kind)}) == {"a": FeatureRule(kind)}


def test_a_rule_for_no_feature_of_the_model_is_refused() -> None:
    """It is a misspelt name, and its default would never apply."""
    with pytest.raises(ModelRefused, match=r"'agee'.*'age'"):
        FeatureContract.check([Column("age", ElementType.FLOAT32)], {"agee": FeatureRule(FLOAT)})


@pytest.mark.parametrize("name", ["", "_", "_updated_at", "_at:age"])
def test_names_that_stores_need_for_themselves_are_refused(name: str) -> None:
    """A feature called _updated_at would overwrite the time of its entity."""
    with pytest.raises(InvalidField, match="not usable"):
        check_feature_name(name)


@pytest.mark.parametrize("name", ["a", "a_", "9", "Größe", "a:b", " "])
def test_other_names_are_allowed(name: str) -> None:
    """Names come from data frames, and those are people's own."""
    check_feature_name(name)


def test_a_signature_of_float32_has_a_digest_of_its_names_in_order() -> None:
    """The digest names rows in the store: what is documented must find them in every version of the program."""
    signature = packed_signature([Column(name, ElementType.FLOAT32) for name in ("a", "bc")])

    assert signature is not None
    assert signature.types == {"a": FLOAT, "bc": FLOAT}
    assert hashlib.blake2b(b"1:a2:bc", digest_size=8).hexdigest() == signature.digest


@given(
    st.lists(st.lists(st.text(max_size=3), min_size=1, max_size=3, unique=True), unique_by=tuple, min_size=2)
)
def test_no_two_signatures_share_their_rows(signatures: list[list[str]]) -> None:
    """A row under the wrong names would be another model's input."""
    made = [packed_signature([Column(name, ElementType.FLOAT32) for name in names]) for names in signatures]

    assert len(signatures) == len({signature.digest for signature in made if signature is not None})


@pytest.mark.parametrize("elements", [[], [ElementType.FLOAT64], [ElementType.FLOAT32, ElementType.INT64]])
def test_only_signatures_of_float32_are_packed(elements: list[ElementType]) -> None:
    """Another element in the row would be cut to a float32."""
    columns = [Column(f"f{n}", element) for n, element in enumerate(elements)]

    assert packed_signature(columns) is None
