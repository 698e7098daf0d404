"""A model's answers as columns that can be watched and measured."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phoenix_ml.domain.models import Task
from phoenix_ml.domain.rows import Outputs


def output_columns(
    task: Task | None, outputs: Outputs
) -> tuple[NDArray[np.float64] | None, list[str] | None]:
    """The score of each row, and the label that was answered.

    The score is the probability of the last class where there are two, else that of the answer; a regression's is
    the answer itself, and it has no label. None is what the model does not give.

    >>> score, labels = output_columns(Task.CLASSIFICATION, Outputs([1, 0], [0.9, 0.8], [[0.1, 0.9], [0.8, 0.2]]))
    >>> score.tolist(), labels
    ([0.9, 0.2], ['1', '0'])
    """
    if task is Task.REGRESSION:
        try:
            return steady(np.asarray(outputs.results, dtype=np.float64).reshape(len(outputs.results))), None
        except (TypeError, ValueError):  # several numbers a row have no one distribution
            return None, None
    labels = labels_of(outputs.results)
    probabilities = outputs.probabilities
    if probabilities and all(row is not None and len(row) == 2 for row in probabilities):
        return steady(np.asarray(probabilities, dtype=np.float64)[:, 1]), labels
    if outputs.confidences:
        return steady(np.asarray(outputs.confidences, dtype=np.float64)), labels
    return None, labels


def steady(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The values to 6 significant digits.

    The last bits of an answer depend on the rows that it was computed with; where many rows share a score, a bit
    would move all of them across a cut and look like drift.

    >>> steady(np.array([0.12345649, 0.1234565, -1234567.0, 0.0])).tolist()
    [0.123456, 0.123456, -1234570.0, 0.0]
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        exponents = np.floor(np.log10(np.abs(values)))
        digits = np.clip(np.where(np.isfinite(exponents), 5 - exponents, 0), -300, 300)
        factors = 10.0 ** np.abs(digits)
        rounded = np.where(
            digits >= 0, np.round(values * factors) / factors, np.round(values / factors) * factors
        )
    return np.where(np.isfinite(rounded), rounded, values)


def labels_of(values: Sequence[Any]) -> list[str]:
    """Labels as text, so that an answer and its outcome compare whatever road they took.

    >>> labels_of([True, 1, 1.0, "1", "good", 2.5])
    ['1', '1', '1', '1', 'good', '2.5']
    """
    return [_label(value) for value in values]


def _label(value: Any) -> str:
    if isinstance(value, bool | np.bool_):
        return str(int(value))
    if isinstance(value, float | np.floating) and float(value).is_integer():
        return str(int(value))
    return str(value)
