"""The feature cache before a real store: what it remembers, for how long, and what it must never hide."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from phoenix_ml.domain.errors import FeatureStoreUnavailable
from phoenix_ml.domain.features import (
    FeatureContract,
    FeatureRule,
    FeatureType,
    PackedFeatures,
    PackedSignature,
    StoredFeatures,
)
from phoenix_ml.domain.rows import Column, ElementType
from phoenix_ml.infrastructure.features.cache import CachedFeatures
from phoenix_ml.infrastructure.features.sqlite import SqliteFeatures

pytestmark = pytest.mark.anyio

KEEP_MS = 1_000.0
TYPES = {"a": FeatureType.FLOAT}
SIGNATURE = PackedSignature("digest", TYPES)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def counts() -> "Counter[str]":
    return Counter()


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteFeatures]:
    """Another process's way to the same features."""
    opened = SqliteFeatures(tmp_path / "features.db")
    yield opened
    await opened.close()


@pytest.fixture
async def cache(tmp_path: Path, clock: Clock, counts: "Counter[str]") -> AsyncIterator[CachedFeatures]:
    def count(outcome: str) -> None:
        counts[outcome] += 1

    inner = SqliteFeatures(tmp_path / "features.db")
    opened = CachedFeatures(inner, KEEP_MS, 3, lambda: count("hit"), lambda: count("miss"), clock)
    yield opened
    await opened.close()


async def test_a_second_read_is_a_hit_until_the_time_is_over(
    cache: CachedFeatures, store: SqliteFeatures, clock: Clock, counts: "Counter[str]"
) -> None:
    """The setting says how old an answer may be: no less is worth it, no more is allowed."""
    await store.write({"e": {"a": 1.0}}, 1_000)
    found = [await cache.read("e", TYPES)]
    await store.write({"e": {"a": 2.0}}, 2_000)
    clock.now_s = 0.999
    found.append(await cache.read("e", TYPES))
    clock.now_s = 1.0
    found.append(await cache.read("e", TYPES))

    assert [StoredFeatures({"a": 1.0}, 1_000)] * 2 + [StoredFeatures({"a": 2.0}, 2_000)] == found
    assert counts == {"hit": 1, "miss": 2}


async def test_packed_rows_and_values_are_kept_beside_each_other(
    cache: CachedFeatures, clock: Clock, counts: "Counter[str]"
) -> None:
    """Two models ask for the same entity in two ways; what is kept of one must not answer the other."""
    await cache.write({"e": {"a": 1.0, "b": 2}}, 1_000, [SIGNATURE])
    others = {"b": FeatureType.INTEGER}

    found = [(await cache.read_packed("e", SIGNATURE), await cache.read("e", others)) for _ in range(3)]

    packed, values = found[-1]
    assert PackedFeatures(b"\0\0\x80?", 1_000) == packed
    assert values is not None
    assert values.values["b"] == 2
    assert counts == {"hit": 4, "miss": 2}


async def test_what_is_read_later_is_kept_no_longer_than_what_was_read_first(
    cache: CachedFeatures, store: SqliteFeatures, clock: Clock
) -> None:
    """All that is known of an entity is forgotten together, so that two models see the same entity."""
    await store.write({"e": {"a": 1.0}}, 1_000)
    await cache.read("e", TYPES)
    clock.now_s = 0.9
    other_types = dict(TYPES)
    await cache.read("e", other_types)
    await store.write({"e": {"a": 2.0}}, 2_000)
    clock.now_s = 1.0

    assert StoredFeatures({"a": 2.0}, 2_000) == await cache.read("e", other_types)


async def test_a_write_through_the_cache_is_seen_at_once(cache: CachedFeatures) -> None:
    """Whoever stores features and asks the same process for a prediction gets one from them."""
    await cache.write({"e": {"a": 1.0}}, 1_000)
    await cache.read("e", TYPES)
    await cache.write({"e": {"a": 2.0}}, 2_000)

    assert StoredFeatures({"a": 2.0}, 2_000) == await cache.read("e", TYPES)


class Held(SqliteFeatures):
    """A store whose reads return when they are let go, as over a network."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.has_read, self.may_return = asyncio.Event(), asyncio.Event()

    async def read(self, entity_id: str, types: object) -> StoredFeatures | None:
        stored = await super().read(entity_id, TYPES)
        self.has_read.set()
        await self.may_return.wait()
        return stored


async def test_a_read_that_a_write_has_overtaken_is_not_kept(tmp_path: Path, clock: Clock) -> None:
    """Its answer is from before the write; kept, it would hide the write after it was confirmed."""
    inner = Held(tmp_path / "features.db")
    cache = CachedFeatures(inner, KEEP_MS, 3, lambda: None, lambda: None, clock)
    await cache.write({"e": {"a": 1.0}}, 1_000)
    early = asyncio.create_task(cache.read("e", TYPES))
    await inner.has_read.wait()
    await cache.write({"e": {"a": 2.0}}, 2_000)
    inner.may_return.set()
    await early

    assert StoredFeatures({"a": 2.0}, 2_000) == await cache.read("e", TYPES)
    await cache.close()


async def test_an_unknown_entity_is_asked_for_each_time(cache: CachedFeatures, store: SqliteFeatures) -> None:
    """It is often stored right after somebody asked in vain."""
    assert await cache.read("e", TYPES) is None
    assert await cache.read_packed("e", SIGNATURE) is None
    await store.write({"e": {"a": 1.0}}, 1_000)

    assert StoredFeatures({"a": 1.0}, 1_000) == await cache.read("e", TYPES)


async def test_the_oldest_entities_make_room(
    cache: CachedFeatures, store: SqliteFeatures, counts: "Counter[str]"
) -> None:
    """A process that is asked for millions of entities must not keep them all."""
    await store.write({f"e{n}": {"a": float(n)} for n in range(4)}, 1_000)
    for n in (0, 1, 2, 3):
        await cache.read(f"e{n}", TYPES)

    await cache.read("e1", TYPES)
    await cache.read("e0", TYPES)

    assert counts == {"hit": 1, "miss": 5}


async def test_a_kept_feature_grows_too_old_like_any_other(cache: CachedFeatures, clock: Clock) -> None:
    """A contract's max age counts from when the feature was written, not from when it was read."""
    await cache.write({"e": {"a": 1.0}}, 10_000)
    rules = {"a": FeatureRule(FeatureType.FLOAT, default=0.0, max_age_s=0.5)}
    contract = FeatureContract([Column("a", ElementType.FLOAT32)], rules)
    await cache.read("e", TYPES)

    kept = await cache.read("e", TYPES)

    assert contract.resolve(kept, None, 10_500) == ([1.0], "s")
    assert contract.resolve(kept, None, 10_501) == ([0.0], "o")


async def test_an_error_is_not_kept(cache: CachedFeatures, clock: Clock) -> None:
    """A store that is back is asked again at once."""
    await cache.write({"e": {"a": 1.0}}, 1_000)
    await cache.read("e", TYPES)
    clock.now_s = 2.0
    await cache.close()

    for read in (cache.read("e", TYPES), cache.read_packed("e", SIGNATURE)):
        with pytest.raises(FeatureStoreUnavailable):
            await read
