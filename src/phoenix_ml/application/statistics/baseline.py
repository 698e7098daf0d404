"""The training data's distribution, stored with a version."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from phoenix_ml.domain.errors import ModelRefused
from phoenix_ml.domain.features import FeatureRule, FeatureType
from phoenix_ml.domain.rows import Scalar

CELLS = 32
MOST_LEVELS = 50


def describe_reference(
    columns: Mapping[str, Sequence[Scalar | None]], contract: Mapping[str, FeatureRule]
) -> dict[str, Any]:
    """A JSON document with one entry a feature: rows, missing, and cells or levels with their counts.

    A number's cells are cut at the reference's quantiles 1/32, 2/32, …; a cell holds the values in
    (previous cut, cut], and equal cuts fall together, so the counts are integers that can be compared with and merged
    into any other sample's. A category keeps its 50 most frequent levels; ``other`` counts the rest.
    Raises ModelRefused when the reference lacks a feature or a value is not of the feature's type.

    >>> describe_reference({"x": [1.0, 2.0, None]}, {"x": FeatureRule(FeatureType.FLOAT)})
    {'rows': 3, 'features': {'x': {'missing': 1, 'cuts': [1.0, 2.0], 'counts': [1, 1, 0]}}}
    """
    if absent := [name for name in contract if name not in columns]:
        raise ModelRefused(
            f"the reference has no column for {', '.join(absent)}; it has {', '.join(columns)}",
            features=absent,
        )
    rows = max((len(column) for column in columns.values()), default=0)
    if not rows:
        raise ModelRefused("the reference has no rows")
    features = {}
    for name, rule in contract.items():
        present = [v for v in columns[name] if v is not None and v == v]  # noqa: PLR0124 - NaN differs from itself
        entry: dict[str, Any] = {"missing": len(columns[name]) - len(present)}
        if rule.type in (FeatureType.FLOAT, FeatureType.INTEGER):
            entry |= _cells(name, present)
        else:
            entry |= _levels(present)
        features[name] = entry
    return {"rows": rows, "features": features}


def _cells(name: str, present: Sequence[Scalar]) -> dict[str, Any]:
    try:
        values = np.asarray(present, dtype=np.float64)
    except (TypeError, ValueError) as exc:
        raise ModelRefused(f"the reference's column {name!r} is not numeric: {exc}", feature=name) from exc
    if values.ndim != 1:
        raise ModelRefused(f"the reference's column {name!r} holds lists, not numbers", feature=name)
    if not np.isfinite(values).all():
        raise ModelRefused(f"the reference's column {name!r} holds infinite values", feature=name)
    if not len(values):
        return {"cuts": [], "counts": [0]}
    quantiles = np.arange(1, CELLS) / CELLS
    cuts = np.unique(np.quantile(values, quantiles, method="inverted_cdf"))
    counts = np.bincount(np.searchsorted(cuts, values, side="left"), minlength=len(cuts) + 1)
    return {"cuts": cuts.tolist(), "counts": counts.tolist()}


def _levels(present: Sequence[Scalar]) -> dict[str, Any]:
    counts = Counter(str(value) for value in present)
    levels = dict(counts.most_common(MOST_LEVELS))
    return {"levels": levels, "other": len(present) - sum(levels.values())}
