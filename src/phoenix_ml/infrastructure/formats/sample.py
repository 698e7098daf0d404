"""Rows that a model of another library and its ONNX file are both asked."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phoenix_ml.domain.errors import InvalidField, ModelRefused
from phoenix_ml.domain.features import FeatureType

Array = NDArray[Any]
_NONE = type(None)


def choose_features(
    columns: Mapping[str, Sequence[Any]],
    left_out: Collection[str],
    known: Sequence[str] | None,
    width: int | None,
) -> dict[str, Sequence[Any]]:
    """The columns that are features, in the model's order. Raises InvalidField where they cannot be told.

    Without ``known`` names they are all columns but those left out, in the order of the table.
    """
    if known is None:
        usable = {name: column for name, column in columns.items() if name not in left_out}
        if width is not None and len(usable) != width:
            raise InvalidField(
                f"the model takes {width} features, the sample has {len(usable)} columns: {', '.join(usable)}; "
                "name the one with the truth by --outcome, or the features, in order, in --features",
                field="sample",
            )
        return usable
    # LightGBM keeps names with underscores for spaces.
    named = {name.replace(" ", "_"): name for name in columns} | {name: name for name in columns}
    if lacking := [name for name in known if name not in named]:
        raise InvalidField(
            f"the sample has no column {', '.join(lacking)}, which the model was trained on; "
            f"it has {', '.join(columns)}",
            field="sample",
        )
    return {named[name]: columns[named[name]] for name in known}


class Sample:
    """The features of some rows, as they are in the table and as an ONNX file takes them.

    ``lacking`` are those that have no value in some row.
    """

    def __init__(self, columns: Mapping[str, Sequence[Any]]) -> None:
        self.names = tuple(columns)
        self.rows = len(next(iter(columns.values()), ()))
        if not self.rows:
            raise InvalidField("the sample has no rows: nothing could be compared", field="sample")
        self._given = columns
        self.types = {name: _type_of(name, column) for name, column in columns.items()}
        self.lacking = {name for name, column in columns.items() if any(map(_is_missing, column))}
        texts = {name for name, kind in self.types.items() if kind is FeatureType.STRING}
        self.has_text = bool(texts)
        self.lacks_text = bool(texts & self.lacking)

    def exact(self) -> dict[str, Array]:
        """The columns as the table has them; a missing text is None."""
        made: dict[str, Array] = {}
        for name, column in self._given.items():
            kind = self.types[name]
            if kind is FeatureType.STRING:
                made[name] = np.array(column, dtype=object)
            elif kind is FeatureType.FLOAT:
                made[name] = np.array([np.nan if value is None else value for value in column], np.float64)
            else:
                made[name] = np.array(column, np.bool_ if kind is FeatureType.BOOLEAN else np.int64)
        return made

    def rounded(self, floats_only: bool) -> dict[str, Array]:
        """The columns with the values that reach the ONNX file, in the types of the table."""
        made = self.exact()
        for name, array in made.items():
            kind = self.types[name]
            if kind is FeatureType.FLOAT or (kind is FeatureType.INTEGER and floats_only):
                with np.errstate(over="ignore"):
                    narrow = array.astype(np.float32)
                # Integers stay integers where rounding leaves them alone: libraries look at a column's type.
                if not np.array_equal(narrow.astype(np.float64), array, equal_nan=kind is FeatureType.FLOAT):
                    made[name] = narrow.astype(np.float64)
        return made

    def blurred(self, floats_only: bool) -> list[str]:
        """The columns of which different values are the same once they are rounded."""
        exact, rounded = self.exact(), self.rounded(floats_only)
        numbers = [name for name in self.names if exact[name].dtype != object]
        return [name for name in numbers if len(np.unique(exact[name])) > len(np.unique(rounded[name]))]

    def inputs(self, floats_only: bool) -> dict[str, Array]:
        """The columns as the ONNX file takes them: integers as float32 if so wanted, a missing text as ""."""
        made = self.exact()
        for name, array in made.items():
            kind = self.types[name]
            if kind is FeatureType.STRING:
                made[name] = np.array(["" if value is None else value for value in array], dtype=object)
            elif floats_only or kind is FeatureType.FLOAT:
                with np.errstate(over="ignore"):
                    made[name] = array.astype(np.float32)
            else:
                made[name] = array.astype(np.int64)
        return made


def as_matrix(columns: Mapping[str, Array]) -> Array:
    """One array of all columns: of float64, or of objects where one of them is text."""
    arrays = list(columns.values())
    has_text = any(array.dtype == object for array in arrays)
    return np.column_stack([array.astype(object if has_text else np.float64) for array in arrays])


def as_frame(columns: Mapping[str, Array]) -> Any:
    """A pandas.DataFrame. Raises ModelRefused where pandas is not installed."""
    try:
        import pandas as pd
    except ModuleNotFoundError as exc:
        raise ModelRefused(
            "the model was trained on a table with named columns, which takes pandas: pip install pandas"
        ) from exc
    return pd.DataFrame({name: list(a) if a.dtype == object else a for name, a in columns.items()})


def _is_missing(value: Any) -> bool:
    return value is None or value != value  # noqa: PLR0124 - only NaN is not itself


def _type_of(name: str, column: Sequence[Any]) -> FeatureType:
    types = set(map(type, column))
    is_whole = _NONE not in types
    types -= {_NONE}
    if types == {str}:
        return FeatureType.STRING
    if types == {bool} and is_whole:
        return FeatureType.BOOLEAN
    if types == {int} and is_whole:
        return FeatureType.INTEGER
    if types <= {int, float, bool}:
        return FeatureType.FLOAT
    shown = " and ".join(sorted(kind.__name__ for kind in types))
    raise InvalidField(
        f"column {name!r} of the sample holds {shown}: a feature is a number, a boolean or a text",
        field="sample",
    )
