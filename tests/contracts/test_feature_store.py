"""Every feature store keeps the port's promises, on real servers: one suite over all adapters."""

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Iterable
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from phoenix_ml.application.ports import FeatureStore
from phoenix_ml.domain.errors import FeatureInvalid, FeatureStoreUnavailable, InvalidField, PhoenixError
from phoenix_ml.domain.features import (
    FeatureType,
    PackedFeatures,
    PackedSignature,
    StoredFeatures,
    packed_signature,
)
from phoenix_ml.domain.rows import Column, ElementType, Scalar
from phoenix_ml.infrastructure.features.cache import CachedFeatures
from phoenix_ml.infrastructure.features.redis import RedisFeatures
from phoenix_ml.infrastructure.features.sqlite import SqliteFeatures

pytestmark = pytest.mark.anyio

PATIENT_MS = 10_000.0
Opener = Callable[[], FeatureStore]


def signature_of(*names: str) -> PackedSignature:
    signature = packed_signature([Column(name, ElementType.FLOAT32) for name in names])
    assert signature is not None
    return signature


ABC = signature_of("a", "b", "c")

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)
# Text that a store could take for a number, a boolean, or a string in quotes.
tricky_texts = st.sampled_from(
    [
        *("12", "-0", "1.50", "007", "1e5", "1_000", " 1 ", "+1", ".5", "5.", "9" * 30, "١٢"),
        *("inf", "Infinity", "nan", "NaN", "true", "false", "True", "null", "_at:x"),
        *("", '"', '""', '"x', '"x"', '"1"', "\\", "\n"),
    ]
)
scalars = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False),
    st.integers(-(2**63), 2**63 - 1),
    st.booleans(),
    texts,
    tricky_texts,
)
names = texts.filter(lambda name: name != "" and not name.startswith("_"))
rows = st.dictionaries(names, scalars, min_size=1, max_size=8)
entity_ids = texts.filter(bool)
fresh_entity = (f"entity-{number}" for number in count())

on_one_store = settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(params=["sqlite", "redis", "redis_cluster", "redis_sentinel", "cache"])
async def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Opener]:
    """Opens store after store on the same data."""
    opened: list[FeatureStore] = []
    is_redis = request.param.startswith("redis")
    url = request.getfixturevalue(f"{request.param}_url") if is_redis else ""

    def open_one() -> FeatureStore:
        store: FeatureStore = (
            RedisFeatures(url, PATIENT_MS, PATIENT_MS)
            if is_redis
            else SqliteFeatures(tmp_path / "features.db")
        )
        if request.param == "cache":
            store = CachedFeatures(store, PATIENT_MS, 100, lambda: None, lambda: None)
        opened.append(store)
        return store

    yield open_one
    for store in opened:
        await store.close()


@pytest.fixture
async def store(open_store: Opener) -> FeatureStore:
    return open_store()


def exactly(value: object) -> tuple[type, str]:
    """The value in a form that tells 1, 1.0, True and "1" apart, and 0.0 from -0.0."""
    return type(value), repr(value)


def in_type(value: Scalar, wanted: FeatureType) -> Scalar:
    """What the port promises for a read in a type, said in another way than the adapters do."""
    if isinstance(value, bool):
        return value if wanted is FeatureType.BOOLEAN else str(value).lower()
    if isinstance(value, int):
        return {FeatureType.INTEGER: value, FeatureType.FLOAT: float(value)}.get(wanted, str(value))
    if isinstance(value, float):
        return value if wanted is FeatureType.FLOAT else str(value)
    return value


async def all_of(store: FeatureStore, entity_id: str) -> StoredFeatures:
    stored = await store.read_all(entity_id)
    assert stored is not None
    return stored


@on_one_store
@given(entity_id=entity_ids, row=rows)
async def test_what_was_written_comes_back_equal_and_of_the_same_type(
    store: FeatureStore, entity_id: str, row: dict[str, Scalar]
) -> None:
    """A store that turned "007" into 7 would feed a model something else than was stored."""
    before = await store.read_all(entity_id)
    removed = dict.fromkeys(before.values if before else ())

    await store.write({entity_id: removed | row}, 1_000)

    stored = await all_of(store, entity_id)
    assert {n: exactly(v) for n, v in row.items()} == {n: exactly(v) for n, v in stored.values.items()}
    assert (stored.updated_at_ms, stored.at_ms) == (1_000, {})


@on_one_store
@given(typed=st.dictionaries(names, st.tuples(scalars, st.sampled_from(FeatureType)), min_size=1, max_size=8))
async def test_a_read_gives_the_type_asked_for_or_the_text(
    store: FeatureStore, typed: dict[str, tuple[Scalar, FeatureType]]
) -> None:
    """The contract can name a wrong value only when every store reports it the same way."""
    entity_id = next(fresh_entity)
    await store.write({entity_id: {name: value for name, (value, _) in typed.items()}}, 1_000)
    types = {name: wanted for name, (_, wanted) in typed.items()}

    stored = await store.read(entity_id, types)

    assert stored is not None
    expected = {name: exactly(in_type(value, wanted)) for name, (value, wanted) in typed.items()}
    assert expected == {name: exactly(stored.values[name]) for name in types}


@pytest.mark.parametrize("wanted", FeatureType)
async def test_whole_numbers_are_floats_where_floats_are_asked_for(
    store: FeatureStore, wanted: FeatureType
) -> None:
    """Other systems write 3 where they mean 3.0, and a row of floats must not fail on it."""
    await store.write({"e": {"a": 3, "b": 2.5}}, 1_000)

    stored = await store.read("e", {"a": wanted, "b": FeatureType.FLOAT})

    assert stored is not None
    assert exactly(in_type(3, wanted)) == exactly(stored.values["a"])
    assert exactly(2.5) == exactly(stored.values["b"])


async def test_an_unknown_entity_is_none(store: FeatureStore) -> None:
    """Absent and empty differ: one is an error of the caller, the other a row of defaults."""
    await store.write({"known": {"a": 1}}, 1_000)

    assert await store.read("unknown", {"a": FeatureType.INTEGER}) is None
    assert await store.read_all("unknown") is None
    assert await store.read("\udcff", {"a": FeatureType.INTEGER}) is None


async def test_a_feature_that_is_not_stored_is_absent(store: FeatureStore) -> None:
    """What is not stored must be left to the request and the default, never be made up."""
    await store.write({"e": {"a": 1}}, 1_000)

    stored = await store.read("e", {"b": FeatureType.FLOAT})

    assert stored is not None
    assert "b" not in stored.values
    assert stored.updated_at_ms == 1_000


async def test_a_write_merges(store: FeatureStore) -> None:
    """Several pipelines each write their own features of the same entity."""
    await store.write({"e": {"a": 1, "b": 2}}, 1_000)
    await store.write({"e": {"b": 3, "c": 4}}, 2_000)

    assert (await all_of(store, "e")).values == {"a": 1, "b": 3, "c": 4}


async def test_a_write_of_a_part_times_that_part(store: FeatureStore) -> None:
    """Else one fresh feature would make every old one look fresh, past its max age."""
    await store.write({"e": {"a": 1, "b": 2}}, 1_000)
    await store.write({"e": {"b": 3, "c": 4}}, 2_000)

    stored = await all_of(store, "e")
    read = await store.read("e", {"a": FeatureType.INTEGER, "c": FeatureType.INTEGER})

    assert {n: stored.written_at_ms(n) for n in "abc"} == {"a": 1_000, "b": 2_000, "c": 2_000}
    assert read is not None
    assert [read.written_at_ms("a"), read.written_at_ms("c")] == [1_000, 2_000]


async def test_a_write_of_all_features_times_the_entity(store: FeatureStore) -> None:
    """Times of single features that outlived a whole write would make fresh features look stale."""
    await store.write({"e": {"a": 1, "b": 2}}, 1_000)
    await store.write({"e": {"b": 3}}, 2_000)
    await store.write({"e": {"a": 5, "b": None, "c": 6}}, 3_000)

    stored = await all_of(store, "e")

    assert (stored.values, stored.updated_at_ms, stored.at_ms) == ({"a": 5, "c": 6}, 3_000, {})


async def test_none_removes_a_feature_and_its_time(store: FeatureStore) -> None:
    """A feature that comes back later must not inherit the time of its former life."""
    await store.write({"e": {"a": 1, "b": 2}}, 1_000)
    await store.write({"e": {"b": 3}}, 2_000)
    await store.write({"e": {"b": None}}, 3_000)

    stored = await all_of(store, "e")

    assert (stored.values, stored.updated_at_ms, stored.at_ms) == ({"a": 1}, 1_000, {})


async def test_an_entity_without_features_is_unknown(store: FeatureStore) -> None:
    """Forgetting a person means that nothing is left, not even that they were known."""
    await store.write({"e": {"a": 1, "b": 2}, "other": {"a": 1}}, 1_000)
    await store.write({"e": {"a": None, "b": None}, "never": {"a": None}, "empty": {}}, 2_000)

    for entity_id in ("e", "never", "empty"):
        assert await store.read_all(entity_id) is None
        assert await store.read(entity_id, {"a": FeatureType.INTEGER}) is None
    assert (await all_of(store, "other")).values == {"a": 1}


async def test_an_empty_write_changes_nothing(store: FeatureStore) -> None:
    """A loader's row of empty cells is no news, neither of values nor of times."""
    await store.write({"e": {"a": 1}}, 1_000)
    await store.write({"e": {}}, 2_000)
    await store.write({}, 3_000)

    stored = await all_of(store, "e")

    assert (stored.values, stored.updated_at_ms) == ({"a": 1}, 1_000)


async def test_nan_is_no_value(store: FeatureStore) -> None:
    """NaN is how data frames say missing; stored as a number it would hide the default."""
    await store.write({"e": {"a": 1.0, "b": 2.0}}, 1_000)
    await store.write({"e": {"a": math.nan}}, 2_000)

    stored = await store.read("e", {"a": FeatureType.FLOAT, "b": FeatureType.FLOAT})

    assert stored is not None
    assert stored.values == {"b": 2.0}


@pytest.mark.parametrize(
    ("features", "error", "named"),
    [
        ({"a": math.inf}, FeatureInvalid, "'a'"),
        ({"a": 2**63}, FeatureInvalid, "'a'"),
        ({"a": -(2**63) - 1}, FeatureInvalid, "'a'"),
        ({"a": np.float64(1.5)}, FeatureInvalid, "'a'"),
        ({"a": "\ud800"}, FeatureInvalid, "'a'"),
        ({"a": [1]}, FeatureInvalid, "'a'"),
        ({"\ud800": 1}, FeatureInvalid, "ud800"),
        ({"_updated_at": 1}, InvalidField, "_updated_at"),
        ({"_x": None}, InvalidField, "_x"),
        ({"": 1}, InvalidField, "''"),
    ],
    ids=str,
)
async def test_what_could_not_come_back_equal_is_refused_before_anything_is_written(
    store: FeatureStore, features: dict[str, Scalar | None], error: type[PhoenixError], named: str
) -> None:
    """A load that fails half way leaves a mixture that nobody asked for."""
    with pytest.raises(error) as refused:
        await store.write({"good": {"a": 1}, "bad": features}, 1_000)

    assert named in refused.value.message
    assert await store.read_all("good") is None


@pytest.mark.parametrize("entity_id", ["", "\udcff", "a\0b"])
async def test_an_entity_id_that_is_no_text_is_refused(store: FeatureStore, entity_id: str) -> None:
    """It could never be asked for over HTTP."""
    with pytest.raises(InvalidField):
        await store.write({"good": {"a": 1}, entity_id: {"a": 1}}, 1_000)

    assert await store.read_all("good") is None


async def test_entities_are_kept_apart(store: FeatureStore) -> None:
    """Ids are opaque: no prefix, pattern, case or spelling may make two entities one."""
    entity_ids = ["a", "A", "a ", "a:b", "a*", "a%", "features:a", "ä", "a\u0308", "0", "00", "0.0"]
    await store.write({entity_id: {"n": n} for n, entity_id in enumerate(entity_ids)}, 1_000)

    found = [(await all_of(store, entity_id)).values["n"] for entity_id in entity_ids]

    assert list(range(len(entity_ids))) == found


async def test_two_stores_share_their_data(open_store: Opener) -> None:
    """A loader writes while other processes serve."""
    one, other = open_store(), open_store()

    await one.write({"e": {"a": 1}}, 1_000)
    await other.write({"e": {"b": 2}}, 2_000)

    assert (await all_of(one, "e")).values == {"a": 1, "b": 2}
    assert (await all_of(other, "e")).values == {"a": 1, "b": 2}


async def test_concurrent_writes_of_one_entity_lose_nothing(open_store: Opener) -> None:
    """Read, change, write without a lock would lose whichever feature was written in between."""
    stores = [open_store(), open_store()]
    await stores[0].write({"e": {"first": 0}}, 1_000)

    await asyncio.gather(*(stores[n % 2].write({"e": {f"f{n}": n}}, 2_000 + n) for n in range(60)))

    stored = await all_of(stores[0], "e")
    assert {"first": 0} | {f"f{n}": n for n in range(60)} == stored.values
    assert {f"f{n}": 2_000 + n for n in range(60)} == stored.at_ms


async def test_concurrent_reads_each_get_their_own_entity(open_store: Opener) -> None:
    """Reads share a connection; an answer in the wrong hands would be another person's data."""
    store = open_store()
    await store.write({f"e{n}": {"n": n} for n in range(300)}, 1_000)

    found = await asyncio.gather(*(store.read(f"e{n}", {"n": FeatureType.INTEGER}) for n in range(300)))

    assert list(range(300)) == [stored.values["n"] for stored in found if stored is not None]


async def test_cancelled_reads_leave_the_others_their_own_answers(open_store: Opener) -> None:
    """Clients hang up in the middle of a request, and only they may notice."""
    store = open_store()
    await store.write({f"e{n}": {"n": n} for n in range(100)}, 1_000)
    reads = [asyncio.create_task(store.read(f"e{n}", {"n": FeatureType.INTEGER})) for n in range(100)]
    await asyncio.sleep(0)

    for read in reads[::2]:
        read.cancel()
    found = await asyncio.gather(*reads, return_exceptions=True)

    kept = [found[n].values["n"] for n in range(1, 100, 2) if isinstance(found[n], StoredFeatures)]  # type: ignore[union-attr]
    assert list(range(1, 100, 2)) == kept


async def test_five_thousand_entities_in_one_write(open_store: Opener) -> None:
    """Loading a table is one call, and reads go on meanwhile."""
    store = open_store()
    entities = {f"e{n}": {f"f{i}": n + i / 10 for i in range(10)} for n in range(5_000)}
    write = asyncio.create_task(store.write(entities, 1_000))

    reads = 0
    while not write.done():
        await store.read("e4999", {"f9": FeatureType.FLOAT})
        await asyncio.sleep(0)
        reads += 1
    await write

    assert reads > 1
    assert entities["e0"] == (await all_of(store, "e0")).values
    assert entities["e4999"] == (await all_of(store, "e4999")).values


def bits(answer: PackedFeatures | StoredFeatures | None, names: Iterable[str]) -> bytes | None:
    """The row that a model would get, by numpy; None where the contract has to decide."""
    if isinstance(answer, PackedFeatures):
        return answer.row
    values = [answer.values.get(name) if answer is not None else None for name in names]
    if not {float, int}.issuperset(map(type, values)):
        return None
    with np.errstate(over="ignore"):
        row = np.array(values, np.float64).astype("<f4")
    return row.tobytes() if np.isfinite(row).all() else None


async def test_a_row_of_numbers_is_read_packed(store: FeatureStore) -> None:
    """It is the engine's input as it is; the numbers are rounded once, as they would be without it."""
    await store.write({"e": {"a": 0.1, "b": 3, "c": -1e-3, "s": "rent"}}, 1_000, [ABC])

    answer = await store.read_packed("e", ABC)

    expected = np.array([0.1, 3, -1e-3], "<f4").tobytes()
    assert PackedFeatures(expected, 1_000) == answer


async def test_a_part_that_completes_the_row_packs_it(store: FeatureStore) -> None:
    """Several pipelines each write their own features; the last one makes the row whole."""
    await store.write({"e": {"a": 1.0, "b": 2.0}}, 1_000, [ABC])
    await store.write({"e": {"c": 4.0}}, 2_000, [ABC])
    await store.write({"e": {"b": 3.0}}, 3_000, [ABC])

    answer = await store.read_packed("e", ABC)

    assert PackedFeatures(np.array([1, 3, 4], "<f4").tobytes(), 1_000) == answer


@pytest.mark.parametrize("change", [{"b": 3.0}, {"b": None}, {"b": "x"}, {"other": 1}, {"b": 1e300}], ids=str)
async def test_a_writer_that_knows_no_signatures_leaves_no_old_row(
    store: FeatureStore, change: dict[str, Scalar | None]
) -> None:
    """An older program, or one that cannot reach the registry, must not make a model see the past."""
    before: dict[str, Scalar | None] = {"a": 1.0, "b": 2.0, "c": 4.0}
    await store.write({"e": before}, 1_000, [ABC])
    await store.read_packed("e", ABC)
    await store.write({"e": change}, 1_000)

    answer = await store.read_packed("e", ABC)

    left = {name: value for name, value in (before | change).items() if value is not None}
    assert bits(StoredFeatures(left), "abc") == bits(answer, "abc")


@pytest.mark.parametrize("value", ["1.5", True, 1e39, -3.5e38, None], ids=str)
async def test_what_is_no_float32_is_left_to_the_contract(store: FeatureStore, value: Scalar | None) -> None:
    """Only the contract can say what is wrong with which feature, or what stands in for it."""
    await store.write({"e": {"a": 1.0, "b": value, "c": 4.0}}, 1_000, [ABC])

    answer = await store.read_packed("e", ABC)

    assert isinstance(answer, StoredFeatures)
    assert ("b" in answer.values) == (value is not None)


async def test_each_signature_has_a_row_of_its_own(store: FeatureStore) -> None:
    """Two versions of a model take other features, or the same in another order."""
    cab = signature_of("c", "a", "b")
    await store.write({"e": {"a": 1.0, "b": 2.0, "c": 4.0}}, 1_000, [ABC, cab])

    answers = [await store.read_packed("e", signature) for signature in (ABC, cab)]

    rows = [np.array(row, "<f4").tobytes() for row in ([1, 2, 4], [4, 1, 2])]
    assert [PackedFeatures(row, 1_000) for row in rows] == answers


async def test_an_unknown_or_forgotten_entity_has_no_row(store: FeatureStore) -> None:
    """Forgetting a person includes what was packed of them."""
    await store.write({"e": {"a": 1.0, "b": 2.0, "c": 4.0}}, 1_000, [ABC])
    await store.read_packed("e", ABC)
    await store.write({"e": dict.fromkeys("abc")}, 2_000, [ABC])

    assert await store.read_packed("e", ABC) is None
    assert await store.read_packed("never", ABC) is None
    assert await store.read_packed("\udcff", ABC) is None


async def test_rows_that_are_packed_later_are_found(store: FeatureStore) -> None:
    """A store that looked in vain for a while stops looking each time, but not for ever."""
    await store.write({f"e{n}": {"a": n, "b": 2.0, "c": 4.0} for n in range(100)}, 1_000)
    found = [bits(await store.read_packed(f"e{n}", ABC), "abc") for n in range(100)]
    await store.write({f"e{n}": {"a": n, "b": 2.0, "c": 4.0} for n in range(100)}, 2_000, [ABC])

    found_later = [await store.read_packed(f"e{n}", ABC) for n in range(100)]

    rows = [np.array([n, 2, 4], "<f4").tobytes() for n in range(100)]
    assert rows == found
    assert [PackedFeatures(row, 2_000) for row in rows][-1] == found_later[-1]


merges = st.dictionaries(
    st.sampled_from("abcd"),
    st.one_of(
        st.none(),
        st.floats(allow_nan=False, allow_infinity=False),
        st.floats(width=32, allow_nan=False, allow_infinity=False),
        st.integers(-(2**63), 2**63 - 1),
        st.sampled_from([0.0, -0.0, 3.4028234e38, 3.4028236e38, 1e-45, 7e-46, "12", True, "x"]),
    ),
    max_size=4,
)


@on_one_store
@given(steps=st.lists(st.tuples(merges, st.booleans()), min_size=1, max_size=8))
async def test_packed_and_single_reads_give_the_same_bits_after_any_merges(
    store: FeatureStore, steps: list[tuple[dict[str, Scalar | None], bool]]
) -> None:
    """Whether a row was packed must never be seen in an answer."""
    entity_id = next(fresh_entity)
    # With a digest of its own, the store has not looked in vain for its rows yet.
    signature = PackedSignature(entity_id, ABC.types)
    for at_ms, (features, is_told) in enumerate(steps, 1_000):
        await store.write({entity_id: features}, at_ms, [signature] if is_told else [])

        packed = await store.read_packed(entity_id, signature)
        single = await store.read(entity_id, ABC.types)

        assert (single is None) == (packed is None)
        assert bits(single, "abc") == bits(packed, "abc")
        if single is not None and packed is not None:
            assert single.updated_at_ms == packed.updated_at_ms


async def test_check_returns_while_the_store_answers(store: FeatureStore) -> None:
    """Readiness asks it."""
    await store.check()


async def test_a_closed_store_says_that_it_is_unavailable(store: FeatureStore) -> None:
    """A request that comes in during shutdown gets an error of ours, not the library's."""
    await store.write({"e": {"a": 1}}, 1_000)
    await store.close()

    for refused in (
        store.read("e", {"a": FeatureType.INTEGER}),
        store.read_all("e"),
        store.read_packed("e", ABC),
        store.write({"e": {"a": 2}}, 2_000),
        store.check(),
    ):
        with pytest.raises(FeatureStoreUnavailable, match=store.name) as error:
            await refused
        assert store.name == error.value.details["store"]
