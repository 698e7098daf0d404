"""A model that somebody else has trained is looked at and run: in a process of its own, which it may hang or kill.

Who healed it, or was sent it, takes what was found as it stands, and runs nothing of the model before it is registered.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
from msgspec import Struct

from phoenix_ml.application.catalogue import Described, Reference, Registration, describe, score
from phoenix_ml.application.export import OUTCOME_COLUMN, RESULT_COLUMN, TIME_COLUMN
from phoenix_ml.application.ports import Engine, Engines, ModelHints, TrainingFailed, TrainingStopped
from phoenix_ml.application.statistics.outputs import labels_of
from phoenix_ml.domain import errors
from phoenix_ml.domain.errors import ModelRefused, PhoenixError
from phoenix_ml.domain.features import FeatureContract
from phoenix_ml.domain.models import Metadata, Task

log = logging.getLogger(__name__)
# Of an export of any size, so many rows describe what a version was trained on.
REFERENCE_ROWS = 100_000
SAMPLE_ROWS = 10_000
# Where a tree splits, rounding to float32 makes another answer of one row in thousands.
_TOLERANCE, _SHARE_APART = 1e-3, 0.01

_LAST_OUTPUT = 4000

Columns = dict[str, list[Any]]
# The columns of a table: of so many rows at most, spread over all of it.
ReadColumns = Callable[[Path, int], Columns]


class Trial(Struct, frozen=True, tag=True):
    """What is tried out, over which files; ``folder`` is for what is found.

    ``export`` is what it was trained on, ``unseen`` what it was not, the newest first; the answers to the first
    ``compared`` of these are wanted. ``sent`` are the features that the champion is sent. ``sample`` has rows with
    what the trainer's own library answers, where there is one.
    """

    model: Path
    registration: Registration
    sent: tuple[str, ...]
    export: Path
    unseen: Path
    compared: int
    folder: Path
    sample: Path | None = None


class Description(Struct, frozen=True, tag=True):
    """What is to be described, as it is sent to be registered: the model, and the table of its reference, of which
    ``time`` and ``outcome`` name columns. ``folder`` is for what is found.
    """

    model: Path
    registration: Registration
    folder: Path
    reference: Path | None = None
    time: str | None = None
    outcome: str | None = None


class Refusal(Struct, frozen=True):
    """An error of ours, to be raised in another process."""

    kind: str
    message: str
    details: dict[str, Any]

    @classmethod
    def of(cls, error: PhoenixError) -> "Refusal":
        return cls(type(error).__name__, error.message, error.details)

    def error(self) -> PhoenixError:
        kind: type[PhoenixError] = getattr(errors, self.kind)
        return kind(self.message, **self.details)


class Findings(Struct, frozen=True):
    """``refused`` says why the model is no candidate, ``refusal`` why it cannot be described; else there is what it was
    ``described`` as, and its answers.
    """

    refused: str | None = None
    refusal: Refusal | None = None
    described: Described | None = None
    answers: list[Any] = []


class Trials(Protocol):
    """Where models are tried out."""

    def run(self, trial: Trial | Description, log_path: Path, keep_going: Callable[[], bool]) -> Findings:
        """Raises TrainingFailed for a model that comes to no end, or that takes too much, and Overloaded where there is
        no process to run it in.
        """
        ...


def describe_apart(trials: Trials, wanted: Description, keep_going: Callable[[], bool]) -> Described:
    """What ``describe`` would find, and raise, were the model run here.

    Raises ModelRefused, too, for a model that comes to no end, takes too much, or kills its process, Overloaded
    where there is no process to run it in, and TrainingStopped where ``keep_going`` says no.
    """
    log_path = wanted.folder / "trial.log"
    try:
        found = trials.run(wanted, log_path, keep_going)
    except TrainingStopped:
        raise  # nobody waits for an answer any more
    except TrainingFailed as exc:
        # Of a defect of ours the traceback is there.
        output = log_path.read_text(errors="replace")[-_LAST_OUTPUT:] if log_path.is_file() else ""
        log.warning("an uploaded model comes to no good end: %s\n%s", exc, output)
        raise ModelRefused(f"running the model comes to no good end: {exc}") from exc
    if found.refusal is not None:
        raise found.refusal.error()
    assert found.described is not None, "what is not refused is described"
    return found.described


def describe_here(engines: Engines, wanted: Description, read_all: Callable[[Path], Columns]) -> Findings:
    """The model described, in this process, which it may hang or kill."""
    try:
        reference = None
        if wanted.reference is not None:
            reference = Reference(read_all(wanted.reference), wanted.time, wanted.outcome)
        described = describe(engines, wanted.model, wanted.registration, reference, wanted.folder)
    except PhoenixError as exc:
        return Findings(refusal=Refusal.of(exc))
    return Findings(described=described)


class _Refused(Exception):
    """The model is no candidate."""


def try_out(engines: Engines, trial: Trial, read_columns: ReadColumns) -> Findings:
    """What there is to say of the model."""
    try:
        return _try_out(engines, trial, read_columns)
    except _Refused as exc:
        return Findings(refused=str(exc))
    except PhoenixError as exc:
        return Findings(refused=f"the model is not fit to be registered: {exc.message}")


def _try_out(engines: Engines, trial: Trial, read_columns: ReadColumns) -> Findings:
    registration = trial.registration
    hints = ModelHints(registration.task, tuple(registration.features), registration.framework)
    metadata = engines.inspect(trial.model, hints)
    metadata = msgspec.structs.replace(
        metadata, contract=FeatureContract.check(metadata.columns, registration.features)
    )
    if lacking := [name for name in metadata.contract if name not in trial.sent]:
        raise _Refused(f"it takes {', '.join(lacking)}, which nobody sends to the champion")
    engine = engines.load(trial.model, metadata, registration.framework, on_cpu=True)
    unseen = read_columns(trial.unseen, REFERENCE_ROWS)
    answers = _answers(engine, metadata, {name: unseen[name][: trial.compared] for name in metadata.contract})
    if trial.sample is not None:
        _check_parity(engine, metadata, read_columns(trial.sample, SAMPLE_ROWS))
    export = read_columns(trial.export, REFERENCE_ROWS)
    seen = len(export[OUTCOME_COLUMN])
    whole = {name: column + unseen[name] for name, column in export.items()}
    # By rows that it has learned it would be held to what it cannot do.
    places = range(seen, seen + len(unseen[OUTCOME_COLUMN]))
    reference = Reference(whole, TIME_COLUMN, OUTCOME_COLUMN, places)
    described = describe(engines, trial.model, registration, reference, trial.folder)
    return Findings(described=described, answers=answers)


def _answers(engine: Engine, metadata: Metadata, columns: Mapping[str, Sequence[Any]]) -> list[Any]:
    try:
        return score(engine, metadata, columns).results
    except PhoenixError as exc:
        raise _Refused(f"the model does not run over the predictions on record: {exc.message}") from exc


def _check_parity(engine: Engine, metadata: Metadata, sample: Mapping[str, Sequence[Any]]) -> None:
    """Raises _Refused where the file answers other than the library that it was made with."""
    if lacking := [name for name in (*metadata.contract, RESULT_COLUMN) if name not in sample]:
        raise _Refused(f"the trainer's sample has no column {', '.join(lacking)}")
    wanted = sample[RESULT_COLUMN]
    if not wanted:
        raise _Refused("the trainer's sample has no rows")
    answered = score(engine, metadata, sample).results
    try:
        apart = rows_apart(metadata.task, wanted, answered)
    except (TypeError, ValueError) as exc:
        raise _Refused(f"the trainer's sample cannot be compared: {exc}") from exc
    if len(apart) > _SHARE_APART * len(wanted):
        row = apart[0]
        raise _Refused(
            f"it does not answer as the trainer's own library: {len(apart)} of {len(wanted)} rows of its sample "
            f"differ, such as row {row + 1}, {answered[row]!r} instead of {wanted[row]!r}"
        )


def rows_apart(task: Task | None, wanted: Sequence[Any], answered: Sequence[Any]) -> list[int]:
    """The rows with another label, or with a number that is off by more than a thousandth of itself, or of the mean
    magnitude where that is larger. Raises ValueError for what is no number.

    >>> rows_apart(Task.CLASSIFICATION, ["a", "b"], ["a", "a"])
    [1]
    >>> rows_apart(Task.REGRESSION, [100.0, 0.001, 1.0], [100.05, 0.02, 1.1])
    [2]
    """
    if task is not Task.REGRESSION:
        pairs = enumerate(zip(labels_of(wanted), labels_of(answered), strict=True))
        return [row for row, (one, other) in pairs if one != other]
    ours, theirs = (np.asarray(one, dtype=np.float64).reshape(len(wanted)) for one in (answered, wanted))
    scale = np.maximum(np.abs(theirs), np.abs(theirs).mean())
    is_near = np.abs(ours - theirs) <= _TOLERANCE * scale
    return [int(row) for row in np.flatnonzero(~is_near)]
