"""A memory of what a feature store answered, for a short time, in one process.

For entities that are asked for again and again, where features may be so old: other processes' writes are seen
after that time. A hit takes 0.5 µs and touches neither the store nor the event loop.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from phoenix_ml.application.ports import FeatureStore
from phoenix_ml.domain.features import FeatureType, PackedFeatures, PackedSignature, StoredFeatures
from phoenix_ml.infrastructure.features.values import Given

# Until when it may be used, and what was read by whom: a packed row under its digest, what `read` answered under the
# identity of the types asked for, together with these types, which keeps the identity from being given to others.
_Kept = tuple[float, dict[str | int, tuple[object, Any]]]


class CachedFeatures:
    """A feature store before which the answers of its reads are kept, with the times that they had.

    Unknown entities are not kept: an entity is often stored right after it was found to be unknown, and callers who
    make ids up would push the real ones out. What is kept is nobody's to change. A read is a hit when it hands
    over the same mapping of types as the one before.
    """

    def __init__(
        self,
        store: FeatureStore,
        keep_ms: float,
        entities: int,
        count_hit: Callable[[], None],
        count_miss: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = store.name
        self._store = store
        self._keep_s = keep_ms / 1000
        self._limit = entities
        self._count_hit = count_hit
        self._count_miss = count_miss
        self._clock = clock
        # The oldest first, as all are kept equally long.
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._writes = 0

    async def read(self, entity_id: str, types: Mapping[str, FeatureType]) -> StoredFeatures | None:
        """What the store answers, or answered a short time ago. Raises what the store raises."""
        kept = self._kept.get(entity_id)
        if kept is not None and self._clock() < kept[0] and (found := kept[1].get(id(types))) is not None:
            self._count_hit()
            return found[1]  # type: ignore[no-any-return]
        self._count_miss()
        asked_at, writes = self._clock(), self._writes
        stored = await self._store.read(entity_id, types)
        if stored is not None and writes == self._writes:
            self._keep(entity_id, id(types), types, stored, asked_at)
        return stored

    async def read_packed(
        self, entity_id: str, signature: PackedSignature
    ) -> PackedFeatures | StoredFeatures | None:
        """What the store answers, or answered a short time ago. Raises what the store raises."""
        kept = self._kept.get(entity_id)
        if kept is not None and self._clock() < kept[0] and (found := kept[1].get(signature.digest)):
            self._count_hit()
            return found[1]  # type: ignore[no-any-return]
        self._count_miss()
        asked_at, writes = self._clock(), self._writes
        stored = await self._store.read_packed(entity_id, signature)
        if stored is not None and writes == self._writes:
            self._keep(entity_id, signature.digest, None, stored, asked_at)
        return stored

    async def read_all(self, entity_id: str) -> StoredFeatures | None:
        """All that is stored for the entity now, or None. Raises what the store raises."""
        return await self._store.read_all(entity_id)

    async def write(
        self, entities: Mapping[str, Given], at_ms: int, signatures: Sequence[PackedSignature] = ()
    ) -> None:
        """Writes to the store, and forgets the entities. Raises what the store raises."""
        try:
            await self._store.write(entities, at_ms, signatures)
        finally:
            # A read that began before the write ended may have seen what was there before.
            self._writes += 1
            for entity_id in entities:
                self._kept.pop(entity_id, None)

    async def check(self, patience_s: float = 0.0) -> None:
        await self._store.check(patience_s)

    async def close(self) -> None:
        self._kept.clear()
        await self._store.close()

    def _keep(self, entity_id: str, key: str | int, types: object, stored: object, asked_at: float) -> None:
        kept = self._kept.get(entity_id)
        if kept is not None and asked_at < kept[0]:
            # Until the time of what was read first, so that the order stays that of age.
            kept[1][key] = types, stored
            return
        if kept is not None:
            del self._kept[entity_id]
        elif len(self._kept) >= self._limit:
            self._kept.popitem(last=False)
        self._kept[entity_id] = asked_at + self._keep_s, {key: (types, stored)}
