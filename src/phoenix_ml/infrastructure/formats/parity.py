"""Whether an ONNX file answers as the model that it was made from."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from phoenix_ml.application.ports import Engine
from phoenix_ml.domain.errors import ModelRefused
from phoenix_ml.domain.models import Metadata, Task
from phoenix_ml.infrastructure.formats.sample import Array, Sample


@dataclass(frozen=True)
class Answers:
    """What a model answers for some rows.

    ``numbers`` has one row each: the probabilities of ``classes``, or a regressor's values, or is None where
    a classifier gives labels alone. A regressor has no ``labels``.
    """

    numbers: NDArray[np.float64] | None
    labels: Sequence[Any] = ()
    classes: Sequence[Any] = ()


class Original(Protocol):
    """A model of another library."""

    @property
    def library(self) -> str:
        """The library and its version."""
        ...

    @property
    def names(self) -> Sequence[str] | None:
        """The features that it was trained on, where it knows them by name."""
        ...

    @property
    def width(self) -> int | None:
        """How many features it takes, where it knows."""
        ...

    @property
    def is_classifier(self) -> bool: ...

    def takes_one_tensor(self, sample: Sample) -> bool:
        """Whether its ONNX file has one input for all features, else it has one for each."""
        ...

    def answer(self, columns: dict[str, Array]) -> Answers: ...

    def export(self, sample: Sample, floats_only: bool) -> Any:
        """The ``onnx.ModelProto``, with integers as float32 if so wanted. The model answers nothing after this."""
        ...


class Conversion(Struct, frozen=True):
    """What was compared, and how far the answers were apart.

    Differences are absolute for probabilities; those of a regressor's values are relative to the value or to
    the mean magnitude in the sample, whichever is larger. ``rounded_rows`` have a number just beside a
    threshold: float32 puts it on the other side, and the original's own answer with it; they are not in
    ``max_difference``. ``labels_differing`` is None for a regressor.
    """

    source: str
    rows: int
    tolerance: float
    max_difference: float
    rounded_rows: int = 0
    labels_differing: int | None = None
    notes: tuple[str, ...] = ()


def ask_onnx(engine: Engine, metadata: Metadata, columns: dict[str, Array], rows: int) -> Answers:
    """What the ONNX file answers, through the engine that would serve it."""
    outputs = engine.run_columns(columns, rows)
    if metadata.task == Task.REGRESSION:
        return Answers(outputs.results.astype(np.float64).reshape(rows, -1))
    return Answers(outputs.probabilities, outputs.results.tolist(), metadata.class_labels)


def compare(
    source: str, exact: Answers, rounded: Answers, served: Answers, tolerance: float, hint: str = ""
) -> Conversion:
    """What there is to say of answers that are near enough.

    ``exact`` and ``rounded`` are the original's, to the sample as it is and to its numbers as float32; those
    served must be one of the two. Raises ModelRefused, with the worst row and the hint, for others.
    """
    apart = _distances(exact, served, tolerance)
    by_rounding = (apart > tolerance) & (_distances(rounded, served, tolerance) <= tolerance)
    apart = np.where(by_rounding, 0.0, apart)
    differing = int(_other_labels(exact, served).sum())
    row = int(apart.argmax())
    if apart[row] > tolerance:
        labels = f"; {differing} of {len(apart)} labels differ" if exact.labels else ""
        raise ModelRefused(
            f"the ONNX file does not answer as the original: in row {row + 1} of the sample "
            f"{_difference(exact, served, row, tolerance)}{labels}; nothing was registered{hint}",
            row=row + 1,
        )
    return Conversion(
        source,
        len(apart),
        tolerance,
        float(apart[row]),
        int(by_rounding.sum()),
        differing if exact.labels else None,
    )


def _distances(original: Answers, served: Answers, tolerance: float) -> NDArray[np.float64]:
    """How far each row's answers are apart, endlessly for another label, but of classes as good as equal."""
    other = _other_labels(original, served)
    if original.numbers is None:
        return np.where(other, np.inf, 0.0)
    apart = _differences(original, served)
    if original.labels and original.numbers.shape[1] > 1:
        second, first = np.sort(original.numbers, axis=1)[:, -2:].T
        apart[other & (first - second > tolerance)] = np.inf
    return apart


def _other_labels(original: Answers, served: Answers) -> NDArray[np.bool_]:
    """Which rows got another label."""
    return np.array([a != b for a, b in zip(original.labels, served.labels, strict=True)], np.bool_)


def _differences(one: Answers, other: Answers) -> NDArray[np.float64]:
    """How far each row's numbers are apart."""
    assert one.numbers is not None
    a, b = one.numbers, _in_order_of(one, other)
    if a.shape != b.shape:
        raise ModelRefused(
            f"the ONNX file answers {b.shape[1]} numbers a row, the original {a.shape[1]}; nothing was registered"
        )
    with np.errstate(invalid="ignore", over="ignore"):
        apart = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b))
        if not one.labels:
            finite = np.abs(a[np.isfinite(a)])
            typical = float(finite.mean()) if finite.size else 1.0
            scale = np.maximum(np.abs(a), typical)
            apart = np.divide(apart, scale, out=apart.copy(), where=scale > 0)
    # What is a number on one side alone is as wrong as can be.
    worst: NDArray[np.float64] = np.nan_to_num(apart, nan=np.inf, posinf=np.inf).max(axis=1)
    return worst


def _in_order_of(one: Answers, other: Answers) -> NDArray[np.float64]:
    """The other's probabilities in the order of the first one's classes."""
    if other.numbers is None:
        return np.empty((len(other.labels), 0))
    known = list(other.classes)
    if not known or set(known) != set(one.classes):
        return other.numbers
    return other.numbers[:, [known.index(label) for label in one.classes]]


def _difference(original: Answers, served: Answers, row: int, tolerance: float) -> str:
    if original.numbers is not None:
        a, b = original.numbers[row], _in_order_of(original, served)[row]
        place = int(np.argmax(np.nan_to_num(np.abs(a - b), nan=np.inf)))
        apart = float(_differences(original, served)[row])
        if apart > tolerance:
            what, kind = "the value", "relative difference"
            if original.labels:
                what, kind = f"the probability of {original.classes[place]!r}", "difference"
            return (
                f"{what} {a[place]:.9g} became {b[place]:.9g} ({kind} {apart:.3g}, tolerance {tolerance:g})"
            )
    return f"the label {original.labels[row]!r} became {served.labels[row]!r}"
