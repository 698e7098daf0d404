"""Tables that people have at hand, CSV and Parquet, read and written in batches of any file size."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from phoenix_ml.domain.errors import InvalidField
from phoenix_ml.domain.features import FeatureType

_BATCH_ROWS = 4096
Columns = dict[str, list[Any]]


@dataclass(frozen=True)
class Table:
    """``batches`` yields (columns as lists of Python values with None for missing, share of the file read)."""

    names: tuple[str, ...]
    batches: Iterator[tuple[Columns, float]]


@contextmanager
def open_table(path: Path, *, text_columns: Sequence[str] = ()) -> Iterator[Table]:
    """The table in a ``.csv`` or ``.parquet`` file. Raises InvalidField for what is neither.

    ``text_columns`` of a CSV file are read as they stand there: ids such as 007 are no numbers.
    """
    with _open_arrow(path, text_columns) as (schema, batches):
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
        yield lambda rows: writer.write_table(pa.Table.from_pylist(list(rows), schema=schema))


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

    def compute(self, columns: Columns, count: int, first_row: int) -> Mapping[str, Sequence[Any]]:
        """The values of the new columns, for so many rows of which the first has this number."""
        ...


def extend_table(
    source: Path, target: Path, make: Callable[[Sequence[str]], Extension]
) -> Iterator[tuple[int, float]]:
    """Writes the source with more columns, and yields the rows so far and the share of the source that is read.

    ``make`` is told the source's columns. The target is there when all is written. Raises InvalidField for what is no
    table, for a column that is there already, and for a place where none can be written.
    """
    import pyarrow as pa

    with _open_arrow(source) as (schema, batches):
        extension = make(schema.names)
        if taken := sorted(set(extension.added) & set(schema.names)):
            raise InvalidField(f"{source.name} has {', '.join(taken)} already: leave it out", field="input")
        types = {name: _arrow_type(kind) for name, kind in extension.added.items()}
        whole = pa.schema([*schema, *map(pa.field, types, types.values())])
        with _writing(target, whole, "output") as writer:
            done = 0
            for batch, share in batches:
                columns = batch.select(list(extension.wanted)).to_pydict()
                values = extension.compute(columns, batch.num_rows, done + 1)
                arrays = [pa.array(values[name], kind) for name, kind in types.items()]
                writer.write_batch(pa.RecordBatch.from_arrays([*batch.columns, *arrays], schema=whole))
                done += batch.num_rows
                yield done, share


@contextmanager
def _writing(path: Path, schema: Any, field: str) -> Iterator[Any]:
    import pyarrow as pa
    from pyarrow import csv, parquet

    writers = {".parquet": parquet.ParquetWriter, ".csv": csv.CSVWriter}
    if path.suffix not in writers:
        raise InvalidField(f"{path.name}: the file must be .csv or .parquet", field=field)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with writers[path.suffix](str(part), schema) as writer:
            yield writer
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


def _parquet_batches(file: Any) -> Iterator[tuple[Any, float]]:
    total = max(1, file.metadata.num_rows)
    done = 0
    for batch in file.iter_batches(batch_size=_BATCH_ROWS):
        done += batch.num_rows
        yield batch, done / total


def _csv_batches(reader: Any, raw: Any, size: int) -> Iterator[tuple[Any, float]]:
    for batch in reader:
        yield batch, min(1.0, raw.tell() / max(1, size))


@contextmanager
def _open_arrow(
    path: Path, text_columns: Sequence[str] = ()
) -> Iterator[tuple[Any, Iterator[tuple[Any, float]]]]:
    """The table's schema, and its record batches, each with the share of the file that is read."""
    import pyarrow as pa
    from pyarrow import csv, parquet

    try:
        if path.suffix == ".parquet":
            with parquet.ParquetFile(path) as file:
                yield file.schema_arrow, _parquet_batches(file)
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
