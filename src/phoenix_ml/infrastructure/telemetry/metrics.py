"""Counters, gauges and histograms that stay right over several processes and cost the hot path almost nothing.

Each process slot (`api-0`, `background`) writes float64 values into a file of its own, mapped into memory;
any process renders the sum of all files for `/metrics`. A worker that is killed and started again in its
slot goes on from the values it left, so no counter ever goes backwards.

Own arrays, because prometheus_client's multiprocess mode takes 0.7 µs a counter and 1.6 µs a histogram
(here 0.15 and 0.2), and own text, because its `generate_latest` takes 31 ms for 2,000 counters and 300 ms for
2,000 histograms (here 1 and 6, from three processes), which would stop an event loop that long.

The layout of a file, sparse, so that only what is used takes space:

    0          u64: how many bytes of keys are complete
    8          the keys: a line of JSON for each series, in order; a series is never moved or removed
    VALUES_AT  the values: float64, in the order of the keys, as many for each as its kind needs
"""

import fcntl
import mmap
import os
import re
import struct
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from errno import ENOSPC
from functools import lru_cache
from itertools import pairwise
from math import inf
from pathlib import Path
from threading import Lock
from typing import Literal, NamedTuple, Self, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray
from prometheus_client.utils import floatToGoString

# From 100 µs to 1 s.
LATENCY_BUCKETS_SECONDS = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)

KEYS_AT = 8
VALUES_AT = 8 << 20
FILE_BYTES = 16 << 20
MAX_VALUES = (FILE_BYTES - VALUES_AT) // 8

_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_LABEL_NAME = re.compile(r"(?!__)[a-zA-Z_][a-zA-Z0-9_]*")


class MetricsFullError(RuntimeError):
    """A process has more series or longer labels than its file holds: some label takes too many values."""


@dataclass(frozen=True)
class _Definition:
    name: str
    help: str
    labelnames: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"not a metric name: {self.name!r}")
        for label in self.labelnames:
            if not _LABEL_NAME.fullmatch(label) or label in {"le", "process"}:
                raise ValueError(f"{self.name}: not a label name, or one that rendering adds: {label!r}")
        if len(set(self.labelnames)) < len(self.labelnames):
            raise ValueError(f"{self.name}: a label is named twice: {self.labelnames}")


@dataclass(frozen=True)
class Counter(_Definition):
    """A sum that only grows. Its name ends in `_total`: the name in the code is the one on a dashboard.

    ValueError for a name or label name that Prometheus would refuse."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.name.endswith("_total"):
            raise ValueError(f"the name of a counter ends in _total: {self.name}")


@dataclass(frozen=True)
class Gauge(_Definition):
    """A current value: over the processes their sum, their maximum, or each with a label `process`.

    ValueError for a name or label name that Prometheus would refuse."""

    aggregate: Literal["sum", "max", "per_process"] = "sum"


@dataclass(frozen=True)
class Histogram(_Definition):
    """Counts of values up to each of `buckets`; the last one, +Inf, is added.

    ValueError for a name or label name that Prometheus would refuse, or buckets that do not ascend from at least 0."""

    buckets: tuple[float, ...] = LATENCY_BUCKETS_SECONDS

    def __post_init__(self) -> None:
        super().__post_init__()
        ascending = all(low < high for low, high in pairwise((*self.buckets, inf)))
        # OpenMetrics allows no sum beside a bucket for negative values.
        if not self.buckets or not ascending or self.buckets[0] < 0:
            raise ValueError(f"{self.name}: buckets ascend, finite, from at least 0: {self.buckets}")


Definition: TypeAlias = Counter | Gauge | Histogram
_Shape: TypeAlias = tuple[str, tuple[float, ...]]
_Values: TypeAlias = "memoryview[float]"


class _Key(msgspec.Struct, frozen=True, array_like=True):
    """What a file says of one series. With its shape, so that a definition changed since then never mixes in."""

    name: str
    labelnames: tuple[str, ...]
    labels: tuple[str, ...]
    shape: _Shape

    @property
    def size(self) -> int:
        return _size(self.shape)

    @property
    def unset(self) -> float:
        # A process that has not set a maximum yet must not win over one whose maximum is negative.
        return -inf if self.shape[0] == "max" else 0.0


_decode_key = msgspec.json.Decoder(_Key).decode


def _size(shape: _Shape) -> int:
    kind, buckets = shape
    return len(buckets) + 2 if kind == "histogram" else 1


def _shape(definition: Definition) -> _Shape:
    match definition:
        case Counter():
            return "counter", ()
        case Gauge():
            return definition.aggregate, ()
        case Histogram():
            return "histogram", definition.buckets


# Stores and loads of an aligned float64 are single on x86-64 and aarch64, so a reader sees the value before or
# after an increment, never half of one. The increment itself is a load and a store: each series has one
# writing thread at a time (the event loop's, or one background thread), else increments get lost.


class BoundCounter:
    """One counter of one process; one thread at a time adds to it."""

    __slots__ = ("_values",)

    def __init__(self, values: _Values) -> None:
        self._values = values

    def add(self, amount: float = 1.0) -> None:
        """Adds `amount`; ValueError if it is negative or NaN."""
        if not amount >= 0:
            raise ValueError(f"a counter only grows: {amount}")
        self._values[0] += amount


class BoundGauge:
    """One gauge of one process; any thread sets it."""

    __slots__ = ("_values",)

    def __init__(self, values: _Values) -> None:
        self._values = values

    def set(self, value: float) -> None:
        """Replaces the value."""
        self._values[0] = value


class BoundHistogram:
    """One histogram of one process; one thread at a time observes with it."""

    __slots__ = ("_buckets", "_values")

    def __init__(self, buckets: tuple[float, ...], values: _Values) -> None:
        self._buckets = buckets
        self._values = values

    def observe(self, value: float) -> None:
        """Counts `value`; a NaN is left out, since it would make the sum NaN for ever."""
        if value != value:  # noqa: PLR0124 - NaN; math.isnan() costs as much as the rest
            return
        values = self._values
        # One bucket a value, not every one above it: `render` sums them up, off the hot path.
        values[bisect_left(self._buckets, value)] += 1.0
        values[-1] += value


class MetricsWriter:
    """The metrics of one process slot, in the file at `path`, whose stem names the slot.

    Counters and histograms go on from what an earlier process of the slot left; gauges start again. Open it
    after a fork, never before. Best on tmpfs, where no write-back ever delays a store.
    BlockingIOError while another process has the slot open; OSError where the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        self._file = path.open("r+b", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._file.truncate(FILE_BYTES)
            mapped = memoryview(mmap.mmap(self._file.fileno(), FILE_BYTES))
        except OSError as error:
            self._file.close()
            error.add_note(f"No metrics for this process: is another one writing {path}?")
            raise
        self._lock = Lock()
        self._keys_used = mapped[:KEYS_AT].cast("Q")
        self._values = mapped[VALUES_AT:].cast("d")
        self._values_used = 0
        self._series: dict[bytes, _Values] = {}
        for line in bytes(mapped[KEYS_AT : KEYS_AT + self._keys_used[0]]).splitlines(keepends=True):
            key = _decode_key(line)
            values = self._take(line, key.size)
            if key.shape[0] not in {"counter", "histogram"}:
                values[0] = key.unset

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the slot for another writer. What was bound must not be used any more."""
        # The map keeps the file, and with it the lock, open for as long as a bound child lives.
        fcntl.flock(self._file, fcntl.LOCK_UN)
        self._file.close()

    def counter(self, definition: Counter, /, **labels: str) -> BoundCounter:
        """The counter with these labels; the same values for the same labels.

        TypeError for other labels than the definition's, UnicodeEncodeError for one that is not text,
        MetricsFullError or OSError where there is no more room."""
        return BoundCounter(self._bind(definition, labels))

    def gauge(self, definition: Gauge, /, **labels: str) -> BoundGauge:
        """The gauge with these labels, like `counter`."""
        return BoundGauge(self._bind(definition, labels))

    def histogram(self, definition: Histogram, /, **labels: str) -> BoundHistogram:
        """The histogram with these labels, like `counter`."""
        return BoundHistogram(definition.buckets, self._bind(definition, labels))

    def _bind(self, definition: Definition, labels: dict[str, str]) -> _Values:
        names = definition.labelnames
        if labels.keys() != set(names):
            raise TypeError(f"{definition.name} has the labels {names}, not {tuple(labels)}")
        key = _Key(definition.name, names, tuple(str(labels[name]) for name in names), _shape(definition))
        line = msgspec.json.encode(key) + b"\n"
        with self._lock:
            known = self._series.get(line)
            return self._append(line, key) if known is None else known

    def _append(self, line: bytes, key: _Key) -> _Values:
        keys_end = KEYS_AT + self._keys_used[0]
        if keys_end + len(line) > VALUES_AT or self._values_used + key.size > MAX_VALUES:
            raise MetricsFullError(f"no room for more series of {key.name}, after {len(self._series)} of all")
        # Written, not stored through the map: on a full disk a store into a hole of the file kills the process
        # with SIGBUS, a write raises OSError.
        self._write(VALUES_AT + 8 * self._values_used, struct.pack(f"={key.size}d", *[key.unset] * key.size))
        self._write(keys_end, line)
        # Last, so that a reader in another process never sees half a series.
        self._keys_used[0] += len(line)
        return self._take(line, key.size)

    def _take(self, line: bytes, size: int) -> _Values:
        self._series[line] = values = self._values[self._values_used : self._values_used + size]
        self._values_used += size
        return values

    def _write(self, position: int, data: bytes) -> None:
        if os.pwrite(self._file.fileno(), data, position) < len(data):
            raise OSError(ENOSPC, os.strerror(ENOSPC), self._file.name)


def clear(folder: Path) -> list[str]:
    """Forgets the values of processes that have ended. For the supervisor, before it starts the first one.

    The slots of processes that run, of `phoenix-ml work log` or of a supervisor that was killed."""
    running = []
    for path in sorted(folder.glob("*.mmap")):
        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                running.append(path.stem)
                continue
            path.unlink(missing_ok=True)
    return running


def negotiate(accept: str) -> tuple[bool, str]:
    """For the Accept header of a scraper: whether to render OpenMetrics, and the content type to answer with."""
    if "application/openmetrics-text" in accept:
        return True, "application/openmetrics-text; version=1.0.0; charset=utf-8"
    return False, "text/plain; version=0.0.4; charset=utf-8"


def render(folder: Path, definitions: Iterable[Definition], *, openmetrics: bool = False) -> bytes:
    """The exposition of all `definitions` over all processes, those without a series included.

    ValueError if two definitions share a name."""
    slots: list[tuple[str, bytes]] = []
    maps: list[mmap.mmap] = []
    for path in sorted(folder.glob("*.mmap")):
        try:
            with path.open("rb") as file:
                # A process that starts right now has created its file but not yet given it its size.
                if os.fstat(file.fileno()).st_size < FILE_BYTES:
                    continue
                mapped = mmap.mmap(file.fileno(), FILE_BYTES, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            continue
        maps.append(mapped)
        slots.append((path.stem, mapped[KEYS_AT : KEYS_AT + struct.unpack_from("=Q", mapped)[0]]))
    plan = _plan(tuple(slots), tuple(definitions), openmetrics)
    sizes = zip(maps, plan.values_per_slot, strict=True)
    read = [np.frombuffer(mapped, np.float64, size, VALUES_AT) for mapped, size in sizes]
    samples = _aggregate(plan, np.concatenate([*read, np.empty(0)]))
    pieces = [""] * (2 * len(samples) + 1)
    pieces[0::2] = plan.literals
    pieces[1::2] = map(repr, samples)
    return "".join(pieces).encode()


class _Family(NamedTuple):
    definition: Definition
    start: int
    series: int
    size: int


class _Plan(NamedTuple):
    """All of a scrape but the values; it changes only when a series is added.

    The literals go before, between and after the samples. The targets say, for each value read, which total
    it goes into: totals follow one another as the families do, and a last one takes what is not defined."""

    literals: list[str]
    values_per_slot: list[int]
    targets: NDArray[np.intp]
    families: list[_Family]


# Kept, because parsing the keys and writing the labels takes 25 ms of 26 for 2,000 counters in three processes.
# Four are in use: both formats of all metrics, the one that the health check reads, and the statistics of versions.
@lru_cache(maxsize=6)
def _plan(
    slots: tuple[tuple[str, bytes], ...], definitions: tuple[Definition, ...], openmetrics: bool
) -> _Plan:
    by_name = {definition.name: definition for definition in definitions}
    if len(by_name) < len(definitions):
        raise ValueError("two metrics share a name")
    labelnames = {d.name: d.labelnames + ("process",) * (_shape(d)[0] == "per_process") for d in definitions}
    series: dict[str, dict[tuple[str, ...], int]] = {
        name: {} if names else {(): 0} for name, names in labelnames.items()
    }
    read: list[tuple[str, int, int]] = []
    values_per_slot = []
    for process, lines in slots:
        keys = [_decode_key(line) for line in lines.splitlines()]
        values_per_slot.append(sum(key.size for key in keys))
        for key in keys:
            known = by_name.get(key.name)
            if known and (known.labelnames, _shape(known)) == (key.labelnames, key.shape):
                labels = (*key.labels, process) if key.shape[0] == "per_process" else key.labels
                read.append((key.name, series[key.name].setdefault(labels, len(series[key.name])), key.size))
            else:
                read.append(("", 0, key.size))

    literals, pending, start = [], "", 0
    families: dict[str, _Family] = {}
    for name, definition in by_name.items():
        size = _size(_shape(definition))
        families[name] = _Family(definition, start, len(series[name]), size)
        start += len(series[name]) * size
        pending += _head(definition, openmetrics)
        for values in series[name]:
            pairs = [f'{n}="{_escape(v, quote=True)}"' for n, v in zip(labelnames[name], values, strict=True)]
            for suffix, bucket in _lines(definition):
                shown = ",".join(pairs + bucket)
                literals.append(f"{pending}{name}{suffix}{f'{{{shown}}}' if shown else ''} ")
                pending = "\n"
    literals.append(pending + ("# EOF\n" if openmetrics else ""))

    targets: list[int] = []
    for name, ordinal, size in read:
        first = families[name].start + ordinal * size if name else 0
        targets.extend(range(first, first + size) if name else [start] * size)
    return _Plan(literals, values_per_slot, np.array(targets, np.intp), list(families.values()))


def _head(definition: Definition, openmetrics: bool) -> str:
    name = definition.name.removesuffix("_total") if openmetrics else definition.name
    kind = type(definition).__name__.lower()
    return f"# HELP {name} {_escape(definition.help, quote=openmetrics)}\n# TYPE {name} {kind}\n"


def _lines(definition: Definition) -> list[tuple[str, list[str]]]:
    if not isinstance(definition, Histogram):
        return [("", [])]
    bounds = [floatToGoString(bound) for bound in (*definition.buckets, inf)]  # type: ignore[no-untyped-call]
    buckets = [("_bucket", [f'le="{bound}"']) for bound in bounds]
    return [*buckets, ("_count", []), ("_sum", [])]


def _escape(text: str, *, quote: bool) -> str:
    text = text.replace("\\", r"\\").replace("\n", r"\n")
    return text.replace('"', r"\"") if quote else text


def _aggregate(plan: _Plan, values: NDArray[np.float64]) -> list[float]:
    total = sum(family.series * family.size for family in plan.families) + 1
    sums = np.bincount(plan.targets, weights=values, minlength=total).astype(np.float64, copy=False)
    peaks = np.full(total, -inf)
    # A gauge may be NaN, and a scrape is no place to warn of it.
    with np.errstate(invalid="ignore"):
        np.maximum.at(peaks, plan.targets, values)
    samples: list[NDArray[np.float64]] = [np.empty(0)]
    for definition, start, series, size in plan.families:
        part = slice(start, start + series * size)
        match definition:
            case Gauge(aggregate="max"):
                samples.append(np.where(peaks[part] == -inf, 0.0, peaks[part]))
            case Histogram():
                observed = sums[part].reshape(series, size)
                # The count is the last bucket, so that the two agree while a process is observing.
                upto = observed[:, :-1].cumsum(axis=1)
                samples.append(np.hstack([upto, upto[:, -1:], observed[:, -1:]]).ravel())
            case _:
                samples.append(sums[part])
    result: list[float] = np.concatenate(samples).tolist()
    return result
