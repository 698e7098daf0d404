"""A version's answers for a whole table, without a server: the same as it would give one by one."""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from msgspec import UNSET, Struct, UnsetType
from numpy.typing import NDArray

from phoenix_ml.application.ports import Engine, PredictionLog, RecordedEvent, Registry
from phoenix_ml.domain.errors import FeatureMissing, InferenceFailed, InvalidField, InvalidRequest
from phoenix_ml.domain.events import PredictionMade
from phoenix_ml.domain.features import SOURCE_LETTER, FeatureContract, FeatureRule, FeatureType, Source
from phoenix_ml.domain.ids import row_ids
from phoenix_ml.domain.models import Metadata, ModelVersion, Task, check_takes_rows
from phoenix_ml.domain.routing import Choice, Role, Router, Strategy, default_routing
from phoenix_ml.domain.rows import ColumnOutputs, ElementType, Outputs, RowFormat, Rows

RESULT_COLUMN, CONFIDENCE_COLUMN, PROBABILITY_PREFIX = "_result", "_confidence", "_probability_"
ID_COLUMN = "_prediction_id"
_DTYPES: Mapping[ElementType, Any] = {
    ElementType.FLOAT32: np.float32,
    ElementType.FLOAT64: np.float64,
    ElementType.INT64: np.int64,
    ElementType.INT32: np.int32,
    ElementType.BOOL: np.bool_,
    ElementType.STRING: object,
}
# The kinds of numpy's types that are of a feature's type.
_KINDS: Mapping[FeatureType, str] = {
    FeatureType.FLOAT: "fiu",
    FeatureType.INTEGER: "iu",
    FeatureType.BOOLEAN: "b",
    FeatureType.STRING: "O",
}
_LABEL_TYPES = {"string": FeatureType.STRING, "bool": FeatureType.BOOLEAN}
_LONGEST_ENTITY_ID = 512


@dataclass(frozen=True)
class Cells:
    """A part of a table's column. NaN is missing too, as data frames write it.

    ``array`` holds numbers or truths, or each different text once, and ``codes`` then tells which text a row has;
    it is None for anything else, such as dates. Where ``missing`` is set the array's value means nothing. ``listed``
    gives the values as Python has them, and None for missing.
    """

    array: NDArray[Any] | None
    listed: Callable[[], list[Any]]
    codes: NDArray[Any] | None = None
    missing: NDArray[np.bool_] | None = None


class Scored(Struct):
    """The answers for some rows, which ran ``batch_size`` at once.

    For a record also, of each row, the features' bytes and sources, a letter for all or one each, and the device it ran on.
    """

    outputs: ColumnOutputs
    batch_size: int
    packed: Sequence[bytes] = ()
    sources: Sequence[str] = ()
    devices: Sequence[str] = ()


class Scorer:
    """Scores tables with one version. Raises FeatureMissing for a table without a column that has no default.

    ``is_recorded`` says that the rows go on record, so that what a record needs of them is kept.
    """

    def __init__(
        self, engine: Engine, metadata: Metadata, names: Sequence[str], *, is_recorded: bool = False
    ) -> None:
        check_takes_rows(metadata)
        self._engine = engine
        self._metadata = metadata
        self._contract = FeatureContract(metadata.columns, metadata.contract)
        self._row_format = RowFormat(metadata.columns)
        # In the order of the columns, which the engine counts by: a database may keep the contract in another.
        self._rules = {column.name: metadata.contract[column.name] for column in metadata.columns}
        self._elements = {column.name: column.element for column in metadata.columns}
        self._is_recorded = is_recorded
        required = [name for name, rule in self._rules.items() if isinstance(rule.default, UnsetType)]
        if lacking := [name for name in required if name not in names]:
            raise FeatureMissing(
                f"the table has no column {', '.join(lacking)}; it has {', '.join(names)}",
                feature=lacking[0],
                reason="missing",
            )
        self._present = [name for name in self._rules if name in names]
        self._answer_count = self._count_answers() if metadata.task is Task.REGRESSION else None

    @property
    def wanted(self) -> Sequence[str]:
        """The columns that are looked at; the model's others have their defaults."""
        return self._present

    @property
    def added(self) -> dict[str, FeatureType]:
        """What ``compute`` answers, by column; several answers a row are columns with their position."""
        metadata, labels = self._metadata, self._metadata.class_labels
        if self._answer_count is not None:
            return {f"{RESULT_COLUMN}_{i}": FeatureType.FLOAT for i in range(self._answer_count)}
        if metadata.task is Task.REGRESSION:
            return {RESULT_COLUMN: FeatureType.FLOAT}
        label = next((one for one in metadata.signature.outputs if one.name == metadata.label_output), None)
        if label is not None:
            result = _LABEL_TYPES.get(label.type, FeatureType.INTEGER)
        else:
            result = FeatureType.STRING if labels and isinstance(labels[0], str) else FeatureType.INTEGER
        columns = {RESULT_COLUMN: result, CONFIDENCE_COLUMN: FeatureType.FLOAT}
        return columns | {f"{PROBABILITY_PREFIX}{label}": FeatureType.FLOAT for label in labels}

    @property
    def distinct(self) -> Collection[str]:
        """Those of the added columns in which hardly any value comes twice."""
        return [name for name, kind in self.added.items() if kind is FeatureType.FLOAT]

    def compute(
        self, columns: Mapping[str, Cells], count: int, first_row: int
    ) -> Mapping[str, NDArray[Any] | None]:
        """The answers for so many rows, None where there is none for a column.

        ``first_row`` is the number of their first in the table. Raises InvalidRequest, naming the row, for a value
        that ``/predict`` would refuse, and InferenceFailed.
        """
        return self.describe(self.score(columns, count, first_row).outputs)

    def score(self, columns: Mapping[str, Cells], count: int, first_row: int) -> Scored:
        """As ``compute``, before the answers become columns."""
        filled = self._fill(columns, count) if self._metadata.row_independent else None
        if filled is None:
            return self._score_one_by_one(columns, count, first_row)
        arrays, letters = filled
        outputs = self._engine.run_columns(arrays, count)
        if not self._is_recorded:
            return Scored(outputs, count)
        rows = zip(*(array.tolist() for array in arrays.values()), strict=True)
        packed = [self._row_format.pack(row) for row in rows]
        devices = [outputs.execution.device] * count
        return Scored(outputs, count, packed, _join_letters(letters, count), devices)

    def describe(self, outputs: ColumnOutputs) -> dict[str, NDArray[Any] | None]:
        """The answers by column. Raises InferenceFailed for more or fewer answers a row than the sample had."""
        results = outputs.results
        given = results.shape[1] if results.ndim > 1 else None
        if len(results) and given != self._answer_count:
            raise InferenceFailed(
                f"the model answers {given or 1} numbers for a row; for its sample it was {self._answer_count or 1}"
            )
        if self._answer_count is not None:
            return {f"{RESULT_COLUMN}_{i}": results[:, i] for i in range(self._answer_count)}
        columns: dict[str, NDArray[Any] | None] = {RESULT_COLUMN: results}
        if self._metadata.task is not Task.REGRESSION:
            columns[CONFIDENCE_COLUMN] = outputs.confidences
            for i, label in enumerate(self._metadata.class_labels):
                probabilities = outputs.probabilities
                columns[f"{PROBABILITY_PREFIX}{label}"] = (
                    None if probabilities is None else probabilities[:, i]
                )
        return columns

    def _count_answers(self) -> int | None:
        """How many numbers the model answers for a row; None for one that is no list."""
        values, _ = self._contract.resolve(None, list(self._metadata.sample), 0)
        answer = self._engine.run(Rows([values], [self._row_format.pack(values)])).results[0]
        return len(answer) if isinstance(answer, list) else None

    def _fill(
        self, columns: Mapping[str, Cells], count: int
    ) -> tuple[dict[str, NDArray[Any]], list[NDArray[np.uint8] | int]] | None:
        """The columns as the engine takes them, and where their values came from, as letters; None where a
        value needs to be looked at by itself.
        """
        arrays: dict[str, NDArray[Any]] = {}
        letters: list[NDArray[np.uint8] | int] = []
        for name, rule in self._rules.items():
            element = self._elements[name]
            letter = _letter_without(rule)
            if name not in columns:
                arrays[name] = np.full(count, _filler(rule), _DTYPES[element])
                letters.append(letter)
                continue
            found = _fill_column(columns[name], rule, element)
            if found is None:
                return None
            arrays[name], missing = found
            letters.append(_GIVEN if missing is None else np.where(missing, letter, _GIVEN).astype(np.uint8))
        return arrays, letters

    def _score_one_by_one(self, columns: Mapping[str, Cells], count: int, first_row: int) -> Scored:
        listed = {name: columns[name].listed() for name in self._present}
        answers = Outputs([], [], [])
        rows, sources, devices = [], [], []
        for i in range(count):
            # NaN alone differs from itself.
            given = {
                name: None if (value := values[i]) is None or value != value else value  # noqa: PLR0124
                for name, values in listed.items()
            }
            try:
                resolved, letters = self._contract.resolve(None, given, 0)
                packed = self._row_format.pack(resolved)
            except InvalidRequest as exc:
                raise type(exc)(f"row {first_row + i:,}: {exc.message}", **exc.details) from exc
            one = self._engine.run(Rows([resolved], [packed]))
            rows.append(packed)
            sources.append(letters)
            devices.append(one.execution.device)
            answers.results += one.results
            answers.confidences = _add(answers.confidences, one.confidences)
            answers.probabilities = _add(answers.probabilities, one.probabilities)
        return Scored(ColumnOutputs.of(answers), 1, rows, sources, devices)


class Recorder:
    """Puts scored rows on record as ``/predict/batch`` does, each once however often the file is scored.

    The id of a row's prediction is made from the version, the file's digest and the row's number. So whoever runs
    the same command again, after a crash or by mistake, finds the same rows and adds what is not there yet; ids
    that are drawn would count such rows twice, and an output written for the first run would bear ids of its own.
    Rows go on record before their answers are in the output, which has its name only when it is whole: a run that
    breaks leaves rows on record and no output, never an output whose rows are not on record.

    ``choice`` is how the version was chosen, ``file_digest`` stands for all that is in the file.
    """

    def __init__(self, log: PredictionLog, version: ModelVersion, choice: Choice, file_digest: bytes) -> None:
        self._log = log
        self._version = version
        self._choice = choice
        self._row_format = RowFormat(version.metadata.columns)
        self._named = f"{version.model_id}\0{version.version}\0{version.sha256}\0".encode() + file_digest
        self.rows = self.new_rows = 0

    def record(
        self, scored: Scored, entities: Sequence[Any] | None, first_row: int, latency_s: float
    ) -> list[str]:
        """The ids of the rows, now on record in one commit. Raises DatabaseUnavailable, and InvalidField for an
        entity that has no usable id; then none of these is.
        """
        answers = scored.outputs.listed()
        count = len(answers.results)
        ids = row_ids(self._named, first_row, count)
        version, choice = self._version, self._choice
        now_ms = time.time_ns() // 1_000_000
        events = []
        for i, prediction_id in enumerate(ids):
            entity_id = None if entities is None else _entity_id(entities[i], first_row + i)
            made = PredictionMade(
                prediction_id,
                version.model_id,
                version.version,
                version.sha256,
                choice.strategy,
                choice.role,
                choice.probability,
                entity_id,
                prediction_id,
                entity_id or prediction_id,
                scored.packed[i],
                scored.sources[i],
                answers.results[i],
                None if answers.confidences is None else answers.confidences[i],
                None if answers.probabilities is None else answers.probabilities[i],
                int(latency_s * 1e6) / 1e3,
                now_ms,
                scored.batch_size,
                i if scored.batch_size > 1 else 0,
                device=scored.devices[i],
            )
            # The bytes are for what is sent on; the log takes the event itself.
            events.append(RecordedEvent(made, b"", self._row_format))
        self.new_rows += self._log.write(events)
        self.rows += count
        return ids


class RecordedScorer:
    """A scorer whose answers are on record before anybody has them; ``entity_column`` tells whom a row is about."""

    def __init__(self, scorer: Scorer, recorder: Recorder, entity_column: str | None = None) -> None:
        self._scorer = scorer
        self._recorder = recorder
        self._entity_column = entity_column

    @property
    def wanted(self) -> Sequence[str]:
        entity = self._entity_column
        return self._scorer.wanted if entity is None else list(dict.fromkeys([*self._scorer.wanted, entity]))

    @property
    def added(self) -> dict[str, FeatureType]:
        return self._scorer.added | {ID_COLUMN: FeatureType.STRING}

    @property
    def distinct(self) -> Collection[str]:
        return [*self._scorer.distinct, ID_COLUMN]

    def compute(
        self, columns: Mapping[str, Cells], count: int, first_row: int
    ) -> Mapping[str, NDArray[Any] | None]:
        """As ``Scorer.compute``, with the ids. Raises DatabaseUnavailable too."""
        started = time.perf_counter()
        scored = self._scorer.score(columns, count, first_row)
        described = self._scorer.describe(scored.outputs)
        took_s = time.perf_counter() - started
        entity = self._entity_column
        entities = None if entity is None else columns[entity].listed()
        ids = self._recorder.record(scored, entities, first_row, took_s)
        return described | {ID_COLUMN: np.array(ids, object)}


def choose_for_file(registry: Registry, version: ModelVersion, *, is_named: bool) -> Choice:
    """How a record says that the version was chosen: as a request would be answered, where that leaves no choice.

    A version that was named is pinned, as in a request. So is the champion of a model that has several arms: the
    routing has not shared these rows out, and among its own answers they would tip the comparison of the arms.
    """
    active = [one for one in registry.list_versions(version.model_id) if one.is_active]
    routing = registry.routings().get(version.model_id) or default_routing(active)
    if routing is None:
        return Choice(version.version, Strategy.PINNED, Role.CHALLENGER, 1.0)
    router = Router(version.model_id, routing)
    if routing.strategy is Strategy.SINGLE and not is_named:
        return router.choose("")
    return router.pin(version.version)


_GIVEN = ord(SOURCE_LETTER[Source.REQUEST])


def _letter_without(rule: FeatureRule) -> int:
    return ord(SOURCE_LETTER[Source.MISSING if rule.default is None else Source.DEFAULT])


def _filler(rule: FeatureRule) -> Any:
    """What stands for a missing value; only asked where there is a default."""
    if rule.default is None:
        return "" if rule.type is FeatureType.STRING else float("nan")
    return rule.default


def _fill_column(
    cells: Cells, rule: FeatureRule, element: ElementType
) -> tuple[NDArray[Any], NDArray[np.bool_] | None] | None:
    """The values as the engine takes them and which of them were missing; None where one needs a look by itself."""
    array, missing = cells.array, cells.missing
    if array is None:
        return None
    if array.dtype.kind == "f" and (nans := np.isnan(array)).any():
        missing = nans if missing is None else missing | nans
    if missing is not None and rule.default is UNSET:
        return None
    if array.dtype.kind not in _KINDS[rule.type]:
        if missing is None or not missing.all():
            return None
        return np.full(len(missing), _filler(rule), _DTYPES[element]), missing
    if cells.codes is not None:
        return _fill_texts(array, cells.codes, missing, rule)
    filled = _narrow(array, missing, element)
    if filled is not None and missing is not None:
        filled[missing] = _filler(rule)
    return None if filled is None else (filled, missing)


def _fill_texts(
    texts: NDArray[Any], codes: NDArray[Any], missing: NDArray[np.bool_] | None, rule: FeatureRule
) -> tuple[NDArray[Any], NDArray[np.bool_] | None] | None:
    if any("\0" in text for text in texts):
        return None
    if missing is not None:
        texts = np.append(texts, np.array([_filler(rule)], object))
        codes = np.where(missing, len(texts) - 1, codes)
    return texts[codes], missing


def _narrow(
    array: NDArray[Any], missing: NDArray[np.bool_] | None, element: ElementType
) -> NDArray[Any] | None:
    """A copy as the element; None where a value that is there goes beyond it."""
    dtype = np.dtype(_DTYPES[element])
    if dtype.kind == "f":
        # By way of a float64, as Python's own numbers go.
        wide = array if array.dtype.kind == "f" else array.astype(np.float64)
        with np.errstate(over="ignore"):
            narrow = wide.astype(dtype)
        return (
            None if dtype.itemsize < wide.itemsize and (np.isinf(narrow) & ~np.isinf(wide)).any() else narrow
        )
    if array.dtype.kind in "iu" and not np.can_cast(array.dtype, dtype):
        known = array if missing is None else array[~missing]
        limits = np.iinfo(dtype)
        if len(known) and not (limits.min <= int(known.min()) and int(known.max()) <= limits.max):
            return None
    return array.astype(dtype)


def _join_letters(letters: Sequence[NDArray[np.uint8] | int], count: int) -> list[str]:
    """A row's letters, one alone where they are all the same."""
    table = np.empty((count, len(letters)), np.uint8)
    for i, column in enumerate(letters):
        table[:, i] = column
    alike = (table == table[:, :1]).all(axis=1).tolist()
    text, width = table.tobytes().decode("ascii"), len(letters)
    return [
        text[start] if one else text[start : start + width]
        for start, one in zip(range(0, count * width, width), alike, strict=True)
    ]


def _add(answers: list[Any] | None, more: list[Any] | None) -> list[Any] | None:
    if answers is None or more is None:
        return None
    answers += more
    return answers


def _entity_id(value: Any, row: int) -> str | None:
    """The id as text. Raises InvalidField, naming the row, for what is none."""
    if value is None:
        return None
    entity_id = str(value) if type(value) in (str, int) else ""
    if not 0 < len(entity_id) <= _LONGEST_ENTITY_ID or "\0" in entity_id:
        raise InvalidField(
            f"row {row:,}: {str(value)[:40]!r} is no entity id, which is a text of 1 to {_LONGEST_ENTITY_ID} characters",
            field="entity_id",
        )
    return entity_id
