"""Rows on their way into an engine: typed columns, and the exact bytes that go on record."""

import struct
from collections.abc import Sequence
from enum import StrEnum
from typing import Any, Final

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from phoenix_ml.domain.errors import FeatureInvalid
from phoenix_ml.domain.tensors import describe_packed

Scalar = float | int | bool | str


class ElementType(StrEnum):
    """Tensor elements that a tabular feature can have; ``TENSOR`` is a whole input of a version that takes tensors."""

    FLOAT32 = "float32"
    FLOAT64 = "float64"
    INT64 = "int64"
    INT32 = "int32"
    BOOL = "bool"
    STRING = "string"
    TENSOR = "tensor"


_STRUCT_CODE: Final = {
    ElementType.FLOAT32: "f",
    ElementType.FLOAT64: "d",
    ElementType.INT64: "q",
    ElementType.INT32: "i",
    ElementType.BOOL: "?",
}


_OF_ANY_LENGTH: Final = {ElementType.STRING, ElementType.TENSOR}


class Column(Struct, frozen=True):
    """One feature as the engine takes it."""

    name: str
    element: ElementType


class RowFormat:
    """Rows of a signature as bytes: the exact values that the engine gets.

    Numbers are packed little-endian in column order, then the strings in column order, each as a
    32-bit length and UTF-8. A row of 30 float32 is 120 bytes, ready to be read as an array. A tensor stands there
    as a string does, as its packed bytes.
    """

    def __init__(self, columns: Sequence[Column]) -> None:
        self.columns = tuple(columns)
        self.names = tuple(column.name for column in columns)
        self._strings = [i for i, c in enumerate(columns) if c.element in _OF_ANY_LENGTH]
        self._numbers = [i for i, c in enumerate(columns) if c.element not in _OF_ANY_LENGTH]
        self._struct = struct.Struct("<" + "".join(_STRUCT_CODE[columns[i].element] for i in self._numbers))

    def pack(self, values: Sequence[Scalar]) -> bytes:
        """The row's bytes. Raises FeatureInvalid, naming the feature that does not fit its column."""
        try:
            if not self._strings:
                return self._struct.pack(*values)
            numbers = self._struct.pack(*[values[i] for i in self._numbers])
        except (struct.error, OverflowError):
            raise self._misfit(values) from None
        try:
            texts = [str(values[i]).encode() for i in self._strings]
        except UnicodeEncodeError:
            raise FeatureInvalid("a text has half of a surrogate pair, which is no Unicode") from None
        if any(b"\0" in text for text in texts):
            raise FeatureInvalid("a text contains U+0000, which no database can store in a text")
        return numbers + b"".join(len(text).to_bytes(4, "little") + text for text in texts)

    def unpack(self, row: bytes) -> list[Scalar]:
        """The values that ``pack`` was given, as the engine got them (float32 rounded)."""
        numbers = self._struct.unpack_from(row)
        if not self._strings:
            return list(numbers)
        values: list[Any] = [""] * len(self.columns)
        for i, number in zip(self._numbers, numbers, strict=True):
            values[i] = number
        offset = self._struct.size
        for i in self._strings:
            end = offset + 4 + int.from_bytes(row[offset : offset + 4], "little")
            text = row[offset + 4 : end]
            is_tensor = self.columns[i].element is ElementType.TENSOR
            values[i] = describe_packed(text) if is_tensor else text.decode()
            offset = end
        return values

    def pack_tensors(self, tensors: Sequence[bytes]) -> bytes:
        """The bytes of a row whose columns are all tensors, each packed already."""
        return b"".join(
            [piece for packed in tensors for piece in (len(packed).to_bytes(4, "little"), packed)]
        )

    def split_tensors(self, row: bytes) -> dict[str, bytes]:
        """What ``pack_tensors`` was given, by column."""
        tensors = {}
        offset = 0
        for name in self.names:
            end = offset + 4 + int.from_bytes(row[offset : offset + 4], "little")
            tensors[name] = row[offset + 4 : end]
            offset = end
        return tensors

    def unpack_columns(self, rows: Sequence[bytes]) -> dict[str, "NDArray[Any] | list[str]"]:
        """The rows' values column by column: numbers as arrays of their elements, strings as lists.

        Raises ValueError for rows that were packed by another format.
        """
        size = self._struct.size
        # 1,000 rows of 30 numbers: 90 µs, row by row 2,400.
        codes = [_STRUCT_CODE[self.columns[i].element] for i in self._numbers]
        element = np.dtype([(f"f{i}", f"<{code}") for i, code in zip(self._numbers, codes, strict=True)])
        heads = rows if not self._strings else [row[:size] for row in rows]
        numbers = np.frombuffer(b"".join(heads), dtype=element)
        if len(numbers) != len(rows):
            raise ValueError(
                f"{len(rows)} rows do not have the {size} bytes of numbers that their columns take"
            )
        columns: dict[str, NDArray[Any] | list[str]] = {}
        texts = [self.unpack(row) for row in rows] if self._strings else []
        for i, name in enumerate(self.names):
            if self.columns[i].element in _OF_ANY_LENGTH:
                columns[name] = [str(values[i]) for values in texts]
            else:
                columns[name] = numbers[f"f{i}"]
        return columns

    def _misfit(self, values: Sequence[Scalar]) -> FeatureInvalid:
        for column, value in zip(self.columns, values, strict=True):
            if column.element in _OF_ANY_LENGTH:
                continue
            try:
                struct.pack("<" + _STRUCT_CODE[column.element], value)
            except (struct.error, OverflowError):
                shown = repr(value)
                shown = shown if len(shown) <= 80 else f"{shown[:77]}…"
                return FeatureInvalid(
                    f"feature {column.name!r}: {shown} does not fit a {column.element}",
                    feature=column.name,
                )
        return FeatureInvalid("a value does not fit its column")


class Rows:
    """Rows of one signature on their way into an engine, as values and as their packed bytes."""

    __slots__ = ("packed", "values")

    def __init__(self, values: Sequence[Sequence[Scalar]], packed: Sequence[bytes]) -> None:
        self.values = values
        self.packed = packed

    def __len__(self) -> int:
        return len(self.packed)


class Execution(Struct, frozen=True):
    """How a run went: the ``device`` that answered, such as ``cpu``, ``cuda:0`` or ``tensorrt:0``, and how often a
    device's memory was too small on the way.
    """

    device: str = "cpu"
    out_of_memory: int = 0


ON_CPU: Final = Execution()


class Outputs(Struct):
    """What an engine answers for its rows, in their order.

    ``probabilities`` are a classifier's, one list a row in the order of the version's class labels;
    ``confidences`` the probability of each result. Both are None where the model gives none.
    """

    results: list[Any]
    confidences: list[float] | None = None
    probabilities: list[list[float]] | None = None
    execution: Execution = ON_CPU


class ColumnOutputs(Struct):
    """As ``Outputs``, but as arrays whose first dimension are the rows."""

    results: NDArray[Any]
    confidences: NDArray[Any] | None = None
    probabilities: NDArray[Any] | None = None
    execution: Execution = ON_CPU

    @classmethod
    def of(cls, outputs: Outputs) -> "ColumnOutputs":
        return cls(
            _as_array(outputs.results),
            None if outputs.confidences is None else np.array(outputs.confidences, np.float64),
            None if outputs.probabilities is None else np.array(outputs.probabilities, np.float64),
            outputs.execution,
        )

    def listed(self) -> Outputs:
        """The same as Python's own values."""
        return Outputs(
            self.results.tolist(),
            None if self.confidences is None else self.confidences.tolist(),
            None if self.probabilities is None else self.probabilities.tolist(),
            self.execution,
        )


def _as_array(results: list[Any]) -> NDArray[Any]:
    # Texts of a dtype of numpy's own are as wide as the longest, and lose a U+0000 at the end.
    return np.array(results, object if results and isinstance(results[0], str) else None)
