"""Counting predictions into a baseline's cells: integers, which merge by addition across processes and machines."""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from hashlib import blake2b
from itertools import compress
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from phoenix_ml.application.statistics.outputs import output_columns
from phoenix_ml.domain.baselines import RESULT, SCORE, Baseline, FeatureBaseline
from phoenix_ml.domain.errors import InvalidField
from phoenix_ml.domain.models import Task
from phoenix_ml.domain.rows import Outputs

Column = Sequence[Any] | NDArray[Any]
# After the cells of a feature: values that are missing, infinite, of another type, below the reference's least
# value, above its greatest, and farther outside than FAR_SPANS times the whole range. The last three are also
# counted in their cells.
MISSING, INFINITE, WRONG_TYPE, BELOW, ABOVE, FAR = range(6)
EXTRAS: Final = 6
# No population moves so far; a factor of a hundred or a thousand does.
FAR_SPANS: Final = 10.0
_TRUTHS: Final = frozenset({"True", "False"})


class _Stored(msgspec.Struct):
    rows: int
    layout: str
    counts: list[int]


class CellCounts:
    """How many rows fell into each cell; ``layout`` names the baseline's cells, and only equal ones add up."""

    __slots__ = ("counts", "layout", "rows")

    def __init__(self, rows: int, layout: str, counts: NDArray[np.int64]) -> None:
        self.rows = rows
        self.layout = layout
        self.counts = counts

    def __add__(self, other: "CellCounts") -> "CellCounts":
        if self.layout != other.layout:
            raise InvalidField("counts over different cells cannot be added", field="counts")
        return CellCounts(self.rows + other.rows, self.layout, self.counts + other.counts)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, CellCounts):
            return NotImplemented
        same = self.rows == other.rows and self.layout == other.layout
        return same and bool((self.counts == other.counts).all())

    __hash__ = None  # type: ignore[assignment]

    def to_json(self) -> bytes:
        return msgspec.json.encode(_Stored(self.rows, self.layout, self.counts.tolist()))


class CellCounter:
    """Counts rows over the cells of one baseline.

    >>> baseline = Baseline(4, {"x": FeatureBaseline(0, cuts=(1.0, 2.0), counts=(2, 1, 1), low=0.0, high=3.0)})
    >>> counter = CellCounter(baseline)
    >>> counts = counter.count({"x": [0.5, 2.0, None, 9.0]}) + counter.count({"x": [1.5, float("inf")]})
    >>> counter.cells(counts, "x").tolist(), counter.aside(counts, "x", MISSING), counter.aside(counts, "x", ABOVE)
    ([1, 2, 1], 1, 1)
    """

    def __init__(self, baseline: Baseline) -> None:
        self.entries = baseline.watched
        self.offsets: dict[str, int] = {}
        self._cuts: dict[str, NDArray[np.float64]] = {}
        self._levels: dict[str, dict[str, int]] = {}
        digest = blake2b(digest_size=8)
        self.size = 0
        for name, entry in self.entries.items():
            self.offsets[name] = self.size
            self.size += len(entry.cells) + EXTRAS
            if entry.levels is None:
                self._cuts[name] = np.asarray(entry.cuts, dtype=np.float64)
            else:
                self._levels[name] = {level: i for i, level in enumerate(entry.levels)}
            digest.update(
                msgspec.json.encode(
                    [name, entry.cuts, list(entry.levels or ()), entry.low, entry.high, EXTRAS]
                )
            )
        self.layout = digest.hexdigest()

    def zero(self) -> CellCounts:
        return CellCounts(0, self.layout, np.zeros(self.size, dtype=np.int64))

    def read(self, stored: bytes) -> CellCounts:
        """The counts that ``to_json`` wrote. Raises InvalidField for those of another baseline."""
        found = msgspec.json.decode(stored, type=_Stored)
        if found.layout != self.layout:
            raise InvalidField("the counts are over the cells of another baseline", field="counts")
        return CellCounts(found.rows, found.layout, np.asarray(found.counts, dtype=np.int64))

    def cells(self, counts: CellCounts, name: str) -> NDArray[np.int64]:
        offset = self.offsets[name]
        return counts.counts[offset : offset + len(self.entries[name].cells)]

    def without(self, counts: CellCounts, names: Iterable[str]) -> CellCounts:
        """The counts as if these features had come without a column."""
        kept = counts.counts.copy()
        for name in names:
            if (entry := self.entries.get(name)) is not None:
                kept[self.offsets[name] : self.offsets[name] + len(entry.cells) + EXTRAS] = 0
        return CellCounts(counts.rows, counts.layout, kept)

    def aside(self, counts: CellCounts, name: str, which: int) -> int:
        return int(counts.counts[self.offsets[name] + len(self.entries[name].cells) + which])

    def count(
        self,
        columns: Mapping[str, Column],
        *,
        absent: Mapping[str, Sequence[bool] | NDArray[np.bool_]] | None = None,
        outputs: Outputs | None = None,
        task: Task | None = None,
    ) -> CellCounts:
        """The rows' counts; ``absent`` marks the rows whose value was filled in by a default: they are missing.

        None, NaN and the empty text are missing too. A feature without a column counts nothing.
        """
        given = dict(columns)
        if outputs is not None:
            score, results = output_columns(task, outputs)
            given |= {SCORE: score} if score is not None else {}
            given |= {RESULT: results} if results is not None else {}
        counts = np.zeros(self.size, dtype=np.int64)
        rows = 0
        for name, entry in self.entries.items():
            column = given.get(name)
            if column is None:
                continue
            rows = max(rows, len(column))
            offset = self.offsets[name]
            own = counts[offset : offset + len(entry.cells) + EXTRAS]
            if absent is not None and (mask := absent.get(name)) is not None:
                keep = ~np.asarray(mask, dtype=bool)
                own[len(entry.cells) + MISSING] += len(column) - np.count_nonzero(keep)
                column = column[keep] if isinstance(column, np.ndarray) else list(compress(column, keep))
            if entry.levels is None:
                self._count_numbers(name, entry, column, own)
            else:
                self._count_levels(name, column, own)
        return CellCounts(rows, self.layout, counts)

    def _count_numbers(
        self, name: str, entry: FeatureBaseline, column: Column, own: NDArray[np.int64]
    ) -> None:
        if len(column) == 0:
            return
        extras = own[len(entry.cells) :]
        values = column if isinstance(column, np.ndarray) else _as_array(column)
        if values.dtype.kind not in "fiub":
            values = self._only_numbers(values.tolist(), extras)
        # NaN and infinity spoil the sum, so one pass tells that there are none; a sum that overflows only takes
        # the longer way.
        with np.errstate(over="ignore", invalid="ignore"):
            is_clean = values.dtype.kind != "f" or math.isfinite(values.sum())
        if not is_clean:
            finite = np.isfinite(values)
            missing = int(np.count_nonzero(np.isnan(values)))
            extras[MISSING] += missing
            extras[INFINITE] += len(values) - missing - np.count_nonzero(finite)
            values = values[finite]
        if not len(values):
            return
        cells = self._cuts[name].searchsorted(values, side="left")
        own[: len(entry.cells)] += np.bincount(cells, minlength=len(entry.cells))
        if entry.low is None or entry.high is None:
            return
        far = FAR_SPANS * (entry.high - entry.low)
        if (least := values.min()) < entry.low:
            extras[BELOW] += np.count_nonzero(values < entry.low)
            if least < entry.low - far:
                extras[FAR] += np.count_nonzero(values < entry.low - far)
        if (greatest := values.max()) > entry.high:
            extras[ABOVE] += np.count_nonzero(values > entry.high)
            if greatest > entry.high + far:
                extras[FAR] += np.count_nonzero(values > entry.high + far)

    def _only_numbers(self, values: Iterable[Any], extras: NDArray[np.int64]) -> NDArray[np.float64]:
        numbers = []
        for value in values:
            if value is None:
                extras[MISSING] += 1
            elif isinstance(value, int | float):
                numbers.append(float(value))
            else:
                extras[WRONG_TYPE] += 1
        return np.asarray(numbers, dtype=np.float64)

    def _count_levels(self, name: str, column: Column, own: NDArray[np.int64]) -> None:
        levels = self._levels[name]
        extras = own[len(levels) + 1 :]
        values = column.tolist() if isinstance(column, np.ndarray) else column
        found = [0] * (len(levels) + 1)
        for value, count in Counter(values).items():
            if isinstance(value, str) and value:
                found[levels.get(value, -1)] += count
            elif is_missing(value):
                extras[MISSING] += count
            elif (level := level_of(value, levels)) is None:
                extras[WRONG_TYPE] += count
            else:
                found[levels.get(level, -1)] += count
        own[: len(found)] += found


def level_of(value: object, levels: Collection[str]) -> str | None:
    """The level that a value is; None for a number that is no truth, where the known levels are truths.

    A truth that the model takes as a number comes back from the log as one. A text is what it says, whatever the levels.

    >>> level_of(1.0, ["True", "False"]), level_of(7.0, ["True"]), level_of("7", ["True"]), level_of(7, ["a"])
    ('True', None, '7', '7')
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not levels or not _TRUTHS.issuperset(levels):
        return str(value)
    return str(bool(value)) if value in (0, 1) else None


def is_missing(value: object) -> bool:
    """Whether a category has no value: None, NaN, or the empty text that stands for it in a row of strings."""
    return value is None or value == "" or value != value  # noqa: PLR0124 - NaN differs from itself


def _as_array(column: Sequence[Any]) -> NDArray[Any]:
    """The column as numbers where all are; else as objects, so that nothing is turned into text."""
    try:
        values = np.asarray(column)
    except (ValueError, OverflowError):  # lists of different lengths, or integers beyond 64 bits
        return np.fromiter(column, dtype=object, count=len(column))
    return (
        values
        if values.dtype.kind in "fiub" and values.ndim == 1
        else np.fromiter(column, object, len(column))
    )
