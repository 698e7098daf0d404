"""A version's answers for a whole table, without a server: the same as it would give one by one."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from msgspec import UNSET, UnsetType
from numpy.typing import NDArray

from phoenix_ml.application.ports import Engine
from phoenix_ml.domain.errors import FeatureMissing, InvalidRequest
from phoenix_ml.domain.features import PYTHON_TYPES, FeatureContract, FeatureRule, FeatureType
from phoenix_ml.domain.models import Metadata, Task, check_takes_rows
from phoenix_ml.domain.rows import ElementType, Outputs, RowFormat, Rows

RESULT_COLUMN, CONFIDENCE_COLUMN, PROBABILITY_PREFIX = "_result", "_confidence", "_probability_"
_DTYPES: Mapping[ElementType, Any] = {
    ElementType.FLOAT32: np.float32,
    ElementType.FLOAT64: np.float64,
    ElementType.INT64: np.int64,
    ElementType.INT32: np.int32,
    ElementType.BOOL: np.bool_,
    ElementType.STRING: object,
}
_LABEL_TYPES = {"string": FeatureType.STRING, "bool": FeatureType.BOOLEAN}
_NONE = type(None)


class Scorer:
    """Scores tables with one version. Raises FeatureMissing for a table without a column that has no default."""

    def __init__(self, engine: Engine, metadata: Metadata, names: Sequence[str]) -> None:
        check_takes_rows(metadata)
        self._engine = engine
        self._metadata = metadata
        self._contract = FeatureContract(metadata.columns, metadata.contract)
        self._row_format = RowFormat(metadata.columns)
        self._rules = metadata.contract
        self._elements = {column.name: column.element for column in metadata.columns}
        required = [name for name, rule in self._rules.items() if isinstance(rule.default, UnsetType)]
        if lacking := [name for name in required if name not in names]:
            raise FeatureMissing(
                f"the table has no column {', '.join(lacking)}; it has {', '.join(names)}",
                feature=lacking[0],
                reason="missing",
            )
        self._present = [name for name in self._rules if name in names]

    @property
    def wanted(self) -> Sequence[str]:
        """The columns that are looked at; the model's others have their defaults."""
        return self._present

    @property
    def added(self) -> dict[str, FeatureType]:
        """What ``compute`` answers, by column."""
        metadata, labels = self._metadata, self._metadata.class_labels
        if metadata.task is Task.REGRESSION:
            return {RESULT_COLUMN: FeatureType.FLOAT}
        label = next((one for one in metadata.signature.outputs if one.name == metadata.label_output), None)
        if label is not None:
            result = _LABEL_TYPES.get(label.type, FeatureType.INTEGER)
        else:
            result = FeatureType.STRING if labels and isinstance(labels[0], str) else FeatureType.INTEGER
        columns = {RESULT_COLUMN: result, CONFIDENCE_COLUMN: FeatureType.FLOAT}
        return columns | {f"{PROBABILITY_PREFIX}{label}": FeatureType.FLOAT for label in labels}

    def compute(
        self, columns: Mapping[str, Sequence[Any]], count: int, first_row: int
    ) -> dict[str, Sequence[Any]]:
        """The answers for so many rows; ``first_row`` is the number of their first in the table.

        Raises InvalidRequest, naming the row, for a value that ``/predict`` would refuse, and InferenceFailed.
        """
        arrays = self._arrays(columns, count) if self._metadata.row_independent else None
        if arrays is not None:
            outputs = self._engine.run_columns(arrays, count)
        else:
            outputs = self._score_one_by_one(columns, count, first_row)
        return self._describe(outputs, count)

    def _arrays(self, columns: Mapping[str, Sequence[Any]], count: int) -> dict[str, NDArray[Any]] | None:
        """The columns as the engine takes them; None where a value needs to be looked at by itself."""
        arrays = {}
        for name, rule in self._rules.items():
            element = self._elements[name]
            values = columns.get(name) or [None] * count
            array = _fill(values, rule, element)
            if array is None:
                return None
            arrays[name] = array
        return arrays

    def _score_one_by_one(self, columns: Mapping[str, Sequence[Any]], count: int, first_row: int) -> Outputs:
        answers = Outputs([], [], [])
        for i in range(count):
            given = {name: columns[name][i] for name in self._present}
            try:
                values, _ = self._contract.resolve(None, given, 0)
                packed = self._row_format.pack(values)
            except InvalidRequest as exc:
                raise type(exc)(f"row {first_row + i}: {exc.message}", **exc.details) from exc
            one = self._engine.run(Rows([values], [packed]))
            answers.results += one.results
            if answers.confidences is not None and one.confidences is not None:
                answers.confidences += one.confidences
            if answers.probabilities is not None and one.probabilities is not None:
                answers.probabilities += one.probabilities
        return answers

    def _describe(self, outputs: Outputs, count: int) -> dict[str, Sequence[Any]]:
        columns: dict[str, Sequence[Any]] = {RESULT_COLUMN: outputs.results}
        if CONFIDENCE_COLUMN in self.added:
            columns[CONFIDENCE_COLUMN] = outputs.confidences or [None] * count
            probabilities = np.array(outputs.probabilities or [], dtype=np.float64)
            for i, label in enumerate(self._metadata.class_labels):
                known: list[Any] = probabilities[:, i].tolist() if probabilities.size else [None] * count
                columns[f"{PROBABILITY_PREFIX}{label}"] = known
        return columns


def _fill(values: Sequence[Any], rule: FeatureRule, element: ElementType) -> NDArray[Any] | None:
    types = set(map(type, values))
    if _NONE in types:
        if rule.default is UNSET:
            return None
        empty = "" if rule.type is FeatureType.STRING else float("nan")
        filler = empty if rule.default is None else rule.default
        values = [filler if value is None else value for value in values]
        types = types - {_NONE} | {type(filler)}
    if not types <= PYTHON_TYPES[rule.type]:
        return None
    dtype = _DTYPES[element]
    if element is ElementType.STRING:
        return None if any("\0" in text for text in values) else np.array(values, dtype=object)
    if element is not ElementType.FLOAT32:
        try:
            return np.array(values, dtype=dtype)
        except OverflowError:
            return None
    wide = np.array(values, dtype=np.float64)
    with np.errstate(over="ignore"):
        narrow = wide.astype(np.float32)
    return None if (np.isinf(narrow) & ~np.isinf(wide)).any() else narrow
