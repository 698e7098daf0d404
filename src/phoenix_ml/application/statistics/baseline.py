"""The training data's distribution, stored with a version."""

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import compress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from phoenix_ml.application.statistics.cells import CellCounter, is_missing
from phoenix_ml.application.statistics.design_effect import (
    FEWEST_BLOCKS,
    SMALLEST_PART,
    Learned,
    design_effects,
)
from phoenix_ml.application.statistics.outputs import output_columns
from phoenix_ml.application.statistics.quality import measure_quality
from phoenix_ml.domain.baselines import RESULT, SCORE, Baseline, FeatureBaseline
from phoenix_ml.domain.errors import InvalidField, ModelRefused
from phoenix_ml.domain.features import FeatureRule, FeatureType
from phoenix_ml.domain.models import Task
from phoenix_ml.domain.rows import ElementType, Outputs, Scalar

CELLS = 32
MOST_LEVELS = 50
# Keeps the levels of 30 features within the size that a baseline may have.
MOST_LEVEL_BYTES = 1000
_LEVEL_BYTES = 10
# Where each level came so often, too few can be lacking to ring the alarm beyond its budget (from 7 on, by sums over
# the levels that may be unseen; at 5 it would take 2.4 times its half).
_OFTEN = 10
_CHOOSING = 0.25

_NUMBERS = frozenset({FeatureType.FLOAT, FeatureType.INTEGER})

Table = Mapping[str, Sequence[Scalar | None]]


def describe_reference(
    columns: Table,
    contract: Mapping[str, FeatureRule],
    *,
    elements: Mapping[str, ElementType] | None = None,
    time: Sequence[Any] | None = None,
    outputs: Outputs | None = None,
    outcomes: Sequence[Any] | None = None,
    task: Task | None = None,
    class_labels: Sequence[str | int] = (),
    batch_rows: int = 1000,
) -> Baseline:
    """The distribution of each feature of the reference; with ``outputs``, the model's answers to its rows, theirs too.

    A number's cells are cut at the reference's quantiles 1/32, 2/32, …; a cell holds the values in
    (previous cut, cut], and equal cuts fall together, so the counts are integers that can be compared with and merged
    into any other sample's. A category keeps its most frequent levels, at most 50 and no more than 1,000 bytes hold;
    ``other`` counts the rest. Where that leaves levels out, or some are rare, they are chosen on a quarter of the rows and
    counted on the rest: those that were chosen for being frequent in the same rows are less frequent in any others.
    ``elements`` says what the engine takes: a number is rounded as it will be, or equal values would differ.
    ``time`` orders the rows, from which design effects for batches of ``batch_rows`` are learned: they are those of
    production only where the rows are all the traffic of a time, not a sample of it. ``outcomes`` give quality and
    calibration. Raises ModelRefused when the reference lacks a feature or a value is not of the feature's type.

    >>> described = describe_reference({"x": [1.0, 2.0, None]}, {"x": FeatureRule(FeatureType.FLOAT)})
    >>> described.rows, described.features["x"].cuts, described.features["x"].counts
    (3, (1.0, 2.0), (1, 1, 0))
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
        if rule.type in _NUMBERS:
            values, present = _numbers(name, columns[name], (elements or {}).get(name))
            features[name] = _cells(values, len(present) - len(values))
        else:
            features[name] = _levels(columns[name], is_whole=rule.type is FeatureType.BOOLEAN)
    score, labels = output_columns(task, outputs) if outputs is not None else (None, None)
    baseline = Baseline(
        rows,
        features,
        score=_cells(score[np.isfinite(score)], int(np.count_nonzero(~np.isfinite(score))))
        if score is not None
        else None,
        result=_levels(labels) if labels is not None else None,
        batch_rows=batch_rows,
    )
    watched: dict[str, Any] = {
        name: _as_engine_sees(columns[name], (elements or {}).get(name)) for name in contract
    }
    watched |= {SCORE: score} if score is not None else {}
    watched |= {RESULT: labels} if labels is not None else {}
    if time is not None:
        baseline = _with_design_effects(baseline, watched, _in_order(time, rows))
    if outputs is not None and outcomes is not None:
        from phoenix_ml.application.statistics.estimation import with_estimator

        with np.errstate(over="ignore", invalid="ignore"):  # what cannot be stored is refused, in words
            quality = measure_quality(task, outputs, outcomes, class_labels=class_labels)
            baseline = msgspec.structs.replace(baseline, quality=quality)
            baseline = with_estimator(baseline, task, outputs, outcomes, watched, class_labels)
    return baseline


def reference_columns(
    columns: Table,
    contract: Mapping[str, FeatureRule],
    *,
    elements: Mapping[str, ElementType] | None = None,
    outputs: Outputs | None = None,
    task: Task | None = None,
) -> dict[str, NDArray[np.float64]]:
    """The numbers of each numeric feature, and the scores, sorted: what exact two-sample statistics need."""
    arrays = {
        name: np.sort(_numbers(name, columns[name], (elements or {}).get(name))[0])
        for name, rule in contract.items()
        if rule.type in _NUMBERS
    }
    score, _ = output_columns(task, outputs) if outputs is not None else (None, None)
    if score is not None:
        arrays[SCORE] = np.sort(score[np.isfinite(score)])
    return arrays


def write_reference(path: Path, arrays: Mapping[str, NDArray[np.float64]]) -> None:
    """Writes the columns as an ``.npz`` without pickles; the same columns make the same bytes."""
    names = np.frombuffer(msgspec.json.encode(list(arrays)), dtype=np.uint8)
    # Feature names may hold what a file name may not, so that the members are numbered.
    members = {str(i): array for i, array in enumerate(arrays.values())}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, names=names, **members)  # type: ignore[arg-type]
    path.write_bytes(buffer.getvalue())


def read_reference(path: Path) -> dict[str, NDArray[np.float64]]:
    with np.load(path, allow_pickle=False) as stored:
        names = msgspec.json.decode(stored["names"].tobytes(), type=list[str])
        return {name: stored[str(i)] for i, name in enumerate(names)}


def _numbers(
    name: str, column: Sequence[Scalar | None], element: ElementType | None
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """The values that are there, as the engine gets them, and which rows they are of."""
    present = np.fromiter((v is not None and v == v for v in column), bool, len(column))  # noqa: PLR0124 - NaN
    try:
        values = np.asarray([v for v, there in zip(column, present, strict=True) if there], dtype=np.float64)
    except (TypeError, ValueError) as exc:
        raise ModelRefused(f"the reference's column {name!r} is not numeric: {exc}", feature=name) from exc
    if values.ndim != 1:
        raise ModelRefused(f"the reference's column {name!r} holds lists, not numbers", feature=name)
    if element is ElementType.FLOAT32:
        with np.errstate(over="ignore"):
            values = values.astype(np.float32).astype(np.float64)
    if not np.isfinite(values).all():
        raise ModelRefused(f"the reference's column {name!r} holds infinite values", feature=name)
    return values, present


def _cells(values: NDArray[np.float64], missing: int) -> FeatureBaseline:
    if not len(values):
        return FeatureBaseline(missing, cuts=(), counts=(0,))
    # A sum depends on its order in the last bit: the same rows in any order are the same baseline.
    values = np.sort(values)
    quantiles = np.arange(1, CELLS) / CELLS
    cuts = np.unique(np.quantile(values, quantiles, method="inverted_cdf"))
    counts = np.bincount(np.searchsorted(cuts, values, side="left"), minlength=len(cuts) + 1)
    with np.errstate(over="ignore", invalid="ignore"):
        mean, std = float(values.mean()), float(values.std())
    return FeatureBaseline(
        missing,
        cuts=tuple(cuts.tolist()),
        counts=tuple(counts.tolist()),
        # Of the greatest floats they are beyond what a float, and JSON, can hold.
        mean=mean if np.isfinite(mean) else None,
        std=std if np.isfinite(std) else None,
        low=float(values.min()),
        high=float(values.max()),
    )


def _levels(column: Sequence[Scalar | None], *, is_whole: bool = False) -> FeatureBaseline:
    """``is_whole`` says that there can be no other levels than those of the column."""
    counts = _count_levels(column)
    chosen = _most_frequent(counts)
    if not is_whole and (len(chosen) < len(counts) or min(counts.values(), default=_OFTEN) < _OFTEN):
        is_choosing = np.random.default_rng(0).random(len(column)) < _CHOOSING
        chosen = _most_frequent(_count_levels(list(compress(column, is_choosing))))
        column = list(compress(column, ~is_choosing))
        counts = _count_levels(column)
    present = counts.total()
    levels = {level: counts[level] for level in chosen}
    return FeatureBaseline(len(column) - present, levels=levels, other=present - sum(levels.values()))


def _count_levels(column: Sequence[Scalar | None]) -> Counter[str]:
    return Counter(str(value) for value in column if not is_missing(value))


def _most_frequent(counts: Counter[str]) -> list[str]:
    levels = []
    room = MOST_LEVEL_BYTES
    for level, _ in counts.most_common(MOST_LEVELS):
        size = len(level.encode("utf-8", "surrogatepass")) + _LEVEL_BYTES
        if size <= room:
            levels.append(level)
            room -= size
    return levels


def _as_engine_sees(column: Sequence[Scalar | None], element: ElementType | None) -> Any:
    if element is not ElementType.FLOAT32:
        return column
    return np.array([np.nan if v is None else v for v in column], dtype=np.float32)


def times_of(column: Sequence[Any]) -> list[Any]:
    """A column of times that can be put into order: texts are read as dates of ISO 8601.

    Raises InvalidField for other texts, and ModelRefused for a row without a time.

    >>> times_of(["2024-12-31T23:00:00-02:00", "2025-01-01"])[0] > times_of(["2025-01-01"])[0]
    True
    """
    if any(value is None or value != value for value in column):  # noqa: PLR0124 - NaN differs from itself
        raise ModelRefused("the column of times must have a time in every row of the reference")
    return [_time_of(value) if isinstance(value, str) else value for value in column]


def _time_of(text: str) -> datetime:
    try:
        found = datetime.fromisoformat(text)
    except ValueError as exc:
        raise InvalidField(
            f"the column of times holds {text!r}, which is no date of ISO 8601, and the order of texts is not that of time: give "
            "dates such as 2024-12-31 or 2024-12-31T23:59:00Z, or numbers such as seconds since 1970",
            field="time",
        ) from exc
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def _in_order(time: Sequence[Any], rows: int) -> list[int]:
    if len(time) != rows:
        raise ModelRefused("the column of times must have a time in every row of the reference")
    times = times_of(time)
    try:
        return sorted(range(rows), key=times.__getitem__)
    except TypeError as exc:
        raise ModelRefused(f"the column of times cannot be put into order: {exc}") from exc


def _with_design_effects(baseline: Baseline, watched: Mapping[str, Any], order: Sequence[int]) -> Baseline:
    counter = CellCounter(baseline)
    size = baseline.batch_rows
    # A mean over more rows varies no more than one over fewer, so a batch's design effect is at most that of a part of it
    # times the parts that it has.
    part = len(order) // FEWEST_BLOCKS
    if SMALLEST_PART * size <= part < size:
        parts, size = size / part, part
    else:
        parts = 1.0
    batches = []
    for start in range(0, len(order) - size + 1, size):
        taken = order[start : start + size]
        batch = {
            name: column[taken] if isinstance(column, np.ndarray) else [column[i] for i in taken]
            for name, column in watched.items()
        }
        batches.append(counter.count(batch).counts)
    counts = np.array(batches, dtype=np.int64).reshape(len(batches), counter.size)
    learned = {}
    for name, entry in counter.entries.items():
        offset = counter.offsets[name]
        cells = counts[:, offset : offset + len(entry.cells)]
        missing = counts[:, offset + len(entry.cells)]
        learned[name] = msgspec.structs.replace(
            entry,
            design_effects=_times(parts, design_effects(cells, is_ordered=entry.levels is None)),
            missing_design_effects=_times(
                parts, design_effects(np.stack([missing, cells.sum(axis=1)], axis=1), is_ordered=True)
            ),
        )
    return msgspec.structs.replace(
        baseline,
        features={name: learned[name] for name in baseline.features},
        score=learned.get(SCORE),
        result=learned.get(RESULT),
        is_time_ordered=True,
    )


def _times(factor: float, effects: Learned) -> Learned:
    return tuple(None if effect is None else round(factor * effect, 4) for effect in effects)
