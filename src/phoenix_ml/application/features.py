"""Storing and showing features of entities."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import isfinite
from typing import Any

from phoenix_ml.application.ports import FeatureStore
from phoenix_ml.domain.errors import EntityUnknown, FeatureInvalid, InvalidField, InvalidRequest
from phoenix_ml.domain.features import FeatureType, PackedSignature, packed_signature
from phoenix_ml.domain.models import ModelVersion
from phoenix_ml.domain.rows import Scalar

Features = Mapping[str, Scalar | None]


def packed_signatures(versions: Iterable[ModelVersion]) -> tuple[PackedSignature, ...]:
    """The signatures of active versions that are read as packed rows.

    A contract that asks for more than numbers, such as an age, needs the single values.
    """
    found = {}
    for version in versions:
        metadata = version.metadata
        rules = metadata.contract.values()
        is_plain = len(metadata.signature.inputs) == 1 and all(
            rule.type is FeatureType.FLOAT and rule.max_age_s is None for rule in rules
        )
        signature = packed_signature(metadata.columns)
        if version.is_active and is_plain and signature is not None:
            found[signature.digest] = signature
    return tuple(found.values())


async def store_features(
    store: FeatureStore, entities: Mapping[str, Features], signatures: Sequence[PackedSignature] = ()
) -> int:
    """How many entities were written; each merges into what is stored, None removes a feature.

    Rows of the signatures are packed where an entity has all their features.

    Raises InvalidField and FeatureInvalid before anything is written, and FeatureStoreUnavailable.
    """
    for entity_id, features in entities.items():
        if not 0 < len(entity_id) <= 512:
            raise InvalidField(
                f"an entity id has 1 to 512 characters, {entity_id[:40]!r} has {len(entity_id)}",
                field="entity_id",
            )
        if not features:
            raise InvalidField(f"entity {entity_id!r}: no features are given", field="features")
        for name, value in features.items():
            if isinstance(value, float) and not isfinite(value):
                raise FeatureInvalid(f"entity {entity_id!r}: {name!r} is not a finite number", feature=name)
            if type(value) is int and not -(2**63) <= value < 2**63:
                raise FeatureInvalid(f"entity {entity_id!r}: {name!r} is beyond 64 bits", feature=name)
    await store.write(entities, time.time_ns() // 1_000_000, signatures)
    return len(entities)


async def load_features(
    store: FeatureStore,
    batches: Iterable[tuple[Mapping[str, Sequence[Scalar | None]], float]],
    entity: str,
    on_progress: Callable[[float, int], None],
    signatures: Sequence[PackedSignature] = (),
) -> int:
    """How many rows of a table were stored: one entity a row, named by the column ``entity``.

    Every batch is columns and the share of the table read so far; ``on_progress`` is told that share and how
    many are stored. Empty cells and NaN, which is how data frames write "missing", remove the feature. Raises
    what ``store_features`` raises, and names the row that cannot be stored.
    """
    loaded = row_count = 0
    for columns, share in batches:
        names = [name for name in columns if name != entity]
        rows = zip(*(columns[name] for name in names), strict=True)
        entities: dict[str, Features] = {}
        row_of: dict[str, int] = {}
        for key, row in zip(columns[entity], rows, strict=True):
            row_count += 1
            if key is None:
                raise InvalidField(f"row {row_count} has no entity id in column {entity!r}", field="entity")
            row_of[str(key)] = row_count
            entities[str(key)] = {
                name: None if value != value else value  # noqa: PLR0124 - NaN differs from itself
                for name, value in zip(names, row, strict=True)
            }
        try:
            loaded += await store_features(store, entities, signatures)
        except InvalidRequest:
            # None of them is stored. Up to the one that is to blame they are, one by one.
            for key, features in entities.items():
                try:
                    loaded += await store_features(store, {key: features}, signatures)
                except InvalidRequest as exc:
                    exc.message = f"row {row_of[key]}: {exc.message}"
                    raise
                on_progress(share, loaded)
        on_progress(share, loaded)
    return loaded


async def show_features(store: FeatureStore, entity_id: str) -> dict[str, Any]:
    """All that is stored for the entity, and when each feature was written, in ms since the epoch.

    Raises EntityUnknown and FeatureStoreUnavailable.
    """
    stored = await store.read_all(entity_id)
    if stored is None:
        raise EntityUnknown(f"no features are stored for entity {entity_id!r}", entity_id=entity_id)
    return {
        "entity_id": entity_id,
        "features": stored.values,
        "updated_at_ms": {name: stored.written_at_ms(name) for name in stored.values},
    }
