"""Tables that people have at hand, CSV and Parquet, read and written in batches of any file size."""

import hashlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from phoenix_ml.application.scoring import Cells
from phoenix_ml.domain.errors import InvalidField
from phoenix_ml.domain.features import FeatureType

_BATCH_ROWS, _RUN_ROWS = 4096, 1000
# What is written to a Parquet file together: each call makes a row group, with dictionaries and statistics of its own.
_GROUP_ROWS, _GROUP_BYTES = 131_072, 64 * 1024 * 1024
Columns = dict[str, list[Any]]


@dataclass(frozen=True)
class Table:
    """``batches`` yields (columns as lists of Python values with None for missing, share of the file read)."""

    names: tuple[str, ...]
    batches: Iterator[tuple[Columns, float]]


@contextmanager
def open_table(
    path: Path, *, text_columns: Sequence[str] = (), rows_at_once: int = _BATCH_ROWS
) -> Iterator[Table]:
    """The table in a ``.csv`` or ``.parquet`` file. Raises InvalidField for what is neither.

    ``text_columns`` of a CSV file are read as they stand there: ids such as 007 are no numbers. The batches of a
    Parquet file have so many rows.
    """
    with _open_arrow(path, text_columns, rows_at_once) as (schema, batches):
        yield Table(tuple(schema.names), ((batch.to_pydict(), share) for batch, share in batches))


def read_columns(path: Path) -> Columns:
    """All columns of a table that fits into memory, such as a reference set."""
    columns: Columns = {}
    with open_table(path) as table:
        columns = {name: [] for name in table.names}
        for batch, _ in table.batches:
            for name, values in batch.items():
                columns[name].extend(values)
    return columns


def read_spread(path: Path, most_rows: int) -> Columns:
    """All columns of a table of any size, of so many rows at most: runs of 1,000, evenly spread, in their order."""
    runs: list[Columns] = []
    every = 1
    with open_table(path, rows_at_once=_RUN_ROWS) as table:
        for i, (run, _) in enumerate(table.batches):
            if i % every:
                continue
            runs.append(run)
            if len(runs) > 1 and sum(map(_count_rows, runs)) > most_rows:
                runs, every = runs[::2], 2 * every
        return {name: [value for run in runs for value in run[name]][:most_rows] for name in table.names}


def _count_rows(columns: Columns) -> int:
    return len(next(iter(columns.values()), ()))


@contextmanager
def write_table(
    path: Path, columns: Mapping[str, FeatureType]
) -> Iterator[Callable[[Sequence[Mapping[str, Any]]], None]]:
    """A function that adds rows to a ``.parquet`` or ``.csv`` file, which is there when the block has ended well.

    Raises InvalidField for another kind of file, and for a place where none can be written.
    """
    import pyarrow as pa

    schema = pa.schema([(name, _arrow_type(kind)) for name, kind in columns.items()])
    with _writing(path, schema, "out") as writer:
        yield lambda rows: writer.add(pa.RecordBatch.from_pylist(list(rows), schema=schema))


class Extension(Protocol):
    """What a table is extended by."""

    @property
    def wanted(self) -> Sequence[str]:
        """The columns to compute from."""
        ...

    @property
    def added(self) -> Mapping[str, FeatureType]:
        """The new columns."""
        ...

    @property
    def distinct(self) -> Collection[str]:
        """Those of the new columns in which hardly any value comes twice."""
        ...

    def compute(
        self, columns: Mapping[str, Cells], count: int, first_row: int
    ) -> Mapping[str, NDArray[Any] | None]:
        """The values of the new columns, for so many rows of which the first has this number; None for empty ones."""
        ...


def extend_table(
    source: Path,
    target: Path,
    make: Callable[[Sequence[str]], Extension],
    *,
    rows_at_once: int = _BATCH_ROWS,
    text_columns: Sequence[str] = (),
) -> Iterator[tuple[int, float]]:
    """Writes the source with more columns, and yields the rows so far and the share of the source that is read.

    ``make`` is told the source's columns; ``text_columns`` as for ``open_table``. The target is there when all is
    written. Raises InvalidField for what is no table, for a column that is there already, and for a place where none
    can be written.
    """
    import pyarrow as pa

    with _open_arrow(source, text_columns, rows_at_once) as (schema, batches):
        if twice := sorted({name for name in schema.names if schema.names.count(name) > 1}):
            raise InvalidField(f"{source.name} has two columns {', '.join(twice)}", field="input")
        extension = make(schema.names)
        if taken := sorted(set(extension.added) & set(schema.names)):
            raise InvalidField(f"{source.name} has {', '.join(taken)} already: leave it out", field="input")
        types = {name: _arrow_type(kind) for name, kind in extension.added.items()}
        whole = pa.schema([*schema, *map(pa.field, types, types.values())], metadata=schema.metadata)
        # A dictionary of values that hardly ever come twice costs twice the time and more space than none.
        with _writing(target, whole, "output", extension.distinct) as writer:
            done = 0
            for larger, share in batches:
                for start in range(0, larger.num_rows, rows_at_once):
                    batch = larger.slice(start, rows_at_once)
                    columns = {name: as_cells(batch.column(name)) for name in extension.wanted}
                    values = extension.compute(columns, batch.num_rows, done + 1)
                    arrays = [_as_arrow(values[name], kind, batch.num_rows) for name, kind in types.items()]
                    writer.add(pa.RecordBatch.from_arrays([*batch.columns, *arrays], schema=whole))
                    done += batch.num_rows
                    yield done, share


def digest_file(path: Path) -> bytes:
    """The SHA-256 of what is in the file. Raises InvalidField for one that cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except FileNotFoundError as exc:
        raise InvalidField(f"{path}: there is no such file", field="file") from exc
    except OSError as exc:
        raise InvalidField(f"{path.name} cannot be read: {exc}", field="file") from exc


def as_cells(column: Any) -> Cells:
    """A column of Arrow as numpy has it, without a Python object a value."""
    import pyarrow as pa

    kind = column.type
    listed = column.to_pylist
    if pa.types.is_null(kind):
        return Cells(np.zeros(len(column)), listed, missing=np.ones(len(column), np.bool_))
    if pa.types.is_dictionary(kind) and (
        column.dictionary.null_count or not _is_text(kind.value_type) or not len(column.dictionary)
    ):
        column = column.dictionary_decode()
    missing = column.is_null().to_numpy(zero_copy_only=False) if column.null_count else None
    if _is_text(column.type):
        column = column.dictionary_encode()
    if pa.types.is_dictionary(column.type):
        codes = column.indices if missing is None else column.indices.fill_null(0)
        texts = column.dictionary.to_numpy(zero_copy_only=False)
        return Cells(texts, listed, codes.to_numpy(zero_copy_only=False), missing)
    if pa.types.is_floating(column.type):
        return Cells(column.to_numpy(zero_copy_only=False), listed)  # with NaN for what is missing
    if pa.types.is_integer(column.type) or pa.types.is_boolean(column.type):
        known = column if missing is None else column.fill_null(pa.scalar(0).cast(column.type))
        return Cells(known.to_numpy(zero_copy_only=False), listed, missing=missing)
    return Cells(None, listed)


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _as_arrow(values: NDArray[Any] | None, kind: Any, count: int) -> Any:
    import pyarrow as pa

    if values is None:
        return pa.nulls(count, kind)
    return pa.array(values).cast(kind, safe=False) if values.dtype.kind in "fiu" else pa.array(values, kind)


class _Writer:
    """Collects batches, so that each write is large."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer
        self._batches: list[Any] = []
        self._rows = self._bytes = 0

    def add(self, batch: Any) -> None:
        self._batches.append(batch)
        self._rows += batch.num_rows
        self._bytes += batch.nbytes
        if self._rows >= _GROUP_ROWS or self._bytes >= _GROUP_BYTES:
            self.flush()

    def flush(self) -> None:
        import pyarrow as pa

        if self._batches:
            self._writer.write_table(pa.Table.from_batches(self._batches))
        self._batches = []
        self._rows = self._bytes = 0


@contextmanager
def _writing(path: Path, schema: Any, field: str, distinct: Collection[str] = ()) -> Iterator[_Writer]:
    import pyarrow as pa
    from pyarrow import csv, parquet

    def make(part: str) -> Any:
        if path.suffix == ".csv":
            return csv.CSVWriter(part, schema)
        repeated = [name for name in schema.names if name not in distinct]
        return parquet.ParquetWriter(part, schema, use_dictionary=repeated if distinct else True)

    if path.suffix not in (".parquet", ".csv"):
        raise InvalidField(f"{path.name}: the file must be .csv or .parquet", field=field)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with make(str(part)) as opened:
            writer = _Writer(opened)
            yield writer
            writer.flush()
        part.replace(path)
    except (pa.ArrowException, OSError) as exc:
        raise InvalidField(f"{path} cannot be written: {exc}", field=field) from exc
    finally:
        part.unlink(missing_ok=True)


def _arrow_type(kind: FeatureType) -> Any:
    import pyarrow as pa

    types = {
        FeatureType.FLOAT: pa.float64(),
        FeatureType.INTEGER: pa.int64(),
        FeatureType.BOOLEAN: pa.bool_(),
        FeatureType.STRING: pa.string(),
    }
    return types[kind]


def _parquet_batches(file: Any, rows: int) -> Iterator[tuple[Any, float]]:
    total = max(1, file.metadata.num_rows)
    done = 0
    for batch in file.iter_batches(batch_size=rows):
        done += batch.num_rows
        yield batch, done / total


def _csv_batches(reader: Any, raw: Any, size: int) -> Iterator[tuple[Any, float]]:
    for batch in reader:
        yield batch, min(1.0, raw.tell() / max(1, size))


@contextmanager
def _open_arrow(
    path: Path, text_columns: Sequence[str] = (), rows: int = _BATCH_ROWS
) -> Iterator[tuple[Any, Iterator[tuple[Any, float]]]]:
    """The table's schema, and its record batches, each with the share of the file that is read. Those of a Parquet
    file have so many rows.
    """
    import pyarrow as pa
    from pyarrow import csv, parquet

    try:
        if path.suffix == ".parquet":
            with parquet.ParquetFile(path) as file:
                yield file.schema_arrow, _parquet_batches(file, rows)
        elif path.suffix == ".csv":
            size = path.stat().st_size
            # Empty fields of text columns are missing too: a CSV file has no other way to say it.
            convert = csv.ConvertOptions(
                strings_can_be_null=True,
                quoted_strings_can_be_null=False,
                column_types=dict.fromkeys(text_columns, pa.string()),
            )
            with path.open("rb") as raw, csv.open_csv(raw, convert_options=convert) as reader:
                yield reader.schema, _csv_batches(reader, raw, size)
        else:
            raise InvalidField(f"{path.name}: the file must be .csv or .parquet", field="file")
    except FileNotFoundError as exc:
        raise InvalidField(f"{path}: there is no such file", field="file") from exc
    except (pa.ArrowException, OSError, UnicodeDecodeError) as exc:
        raise InvalidField(f"{path.name} cannot be read: {exc}", field="file") from exc
