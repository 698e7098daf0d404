"""How good answers were, once the outcomes are known. All figures equal scikit-learn's."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from phoenix_ml.application.statistics.outputs import labels_of
from phoenix_ml.domain.baselines import Quality
from phoenix_ml.domain.models import Task
from phoenix_ml.domain.rows import Outputs

Numbers = NDArray[np.float64]
# A regression's answer is wrong when its error is beyond what one in ten of the reference's was.
_TOLERATED = 0.9


class ReliabilityBin(Struct, frozen=True):
    """Answers of about the same probability: their mean probability, and how often it came true."""

    n: int
    probability: float
    share: float


def measure_quality(
    task: Task | None,
    outputs: Outputs,
    outcomes: Sequence[Any],
    *,
    class_labels: Sequence[str | int] = (),
    tolerance: float | None = None,
) -> Quality:
    """Everything that the answers and their outcomes tell; None where they do not.

    >>> quality = measure_quality(Task.REGRESSION, Outputs([1.0, 2.0]), [1.0, 4.0], tolerance=1.5)
    >>> quality.error_rate, quality.mae, quality.rmse
    (0.5, 1.0, 1.4142135623730951)
    """
    if task is Task.REGRESSION:
        errors = _errors(outputs, outcomes)
        limit = float(np.quantile(errors, _TOLERATED)) if tolerance is None else tolerance
        return Quality(
            n=len(errors),
            error_rate=float((errors > limit).mean()),
            mae=float(errors.mean()),
            rmse=math.sqrt(float((errors**2).mean())),
            tolerance=limit,
        )
    answered, truth = labels_of(outputs.results), labels_of(outcomes)
    is_correct = np.array([a == b for a, b in zip(answered, truth, strict=True)])
    accuracy = float(is_correct.mean())
    figures: dict[str, float | None] = {}
    if outputs.probabilities:
        figures = _of_probabilities(np.asarray(outputs.probabilities, dtype=np.float64), truth, class_labels)
    if outputs.confidences and "calibration_error" not in figures:
        figures["calibration_error"] = calibration_error(np.asarray(outputs.confidences), is_correct)
    return Quality(n=len(truth), error_rate=1 - accuracy, accuracy=accuracy, **figures)


def losses(
    task: Task | None, outputs: Outputs, outcomes: Sequence[Any], tolerance: float | None = None
) -> Numbers:
    """1 for each wrong answer, 0 for each right one; a regression's is wrong beyond the tolerance.

    >>> losses(Task.CLASSIFICATION, Outputs([1, 0, True]), [1, 1, 1.0]).tolist()
    [0.0, 1.0, 0.0]
    """
    if task is Task.REGRESSION:
        if tolerance is None:
            raise ValueError("a regression's losses need a tolerance: that of the baseline's quality")
        return (_errors(outputs, outcomes) > tolerance).astype(np.float64)
    pairs = zip(labels_of(outputs.results), labels_of(outcomes), strict=True)
    return np.array([float(answered != truth) for answered, truth in pairs])


def area_under_curve(scores: Numbers, positives: NDArray[np.bool_]) -> float | None:
    """The share of (positive, negative) pairs that the scores put in order, ties counted half.

    (ΣR − n₊(n₊ + 1)/2) / (n₊ n₋) with R the positives' ranks (Hanley, McNeil 1982). None without both kinds.

    >>> area_under_curve(np.array([0.1, 0.4, 0.35, 0.8]), np.array([False, False, True, True]))
    0.75
    """
    ahead = int(np.count_nonzero(positives))
    behind = len(positives) - ahead
    if not ahead or not behind:
        return None
    _, places, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (counts.cumsum() - (counts - 1) / 2)[places]
    return float((ranks[positives].sum() - ahead * (ahead + 1) / 2) / (ahead * behind))


def reliability(
    probabilities: Numbers, positives: NDArray[np.bool_], bins: int = 10
) -> tuple[ReliabilityBin, ...]:
    """Bins of equal width over [0, 1], the empty ones left out.

    >>> reliability(np.array([0.1, 0.2, 0.9]), np.array([False, True, True]), bins=2)
    (ReliabilityBin(n=2, probability=0.15000000000000002, share=0.5), ReliabilityBin(n=1, probability=0.9, share=1.0))
    """
    places = np.minimum((probabilities * bins).astype(np.int64), bins - 1)
    counts = np.bincount(places, minlength=bins)
    sums = np.bincount(places, weights=probabilities, minlength=bins)
    hits = np.bincount(places, weights=positives, minlength=bins)
    filled = np.flatnonzero(counts)
    return tuple(
        ReliabilityBin(int(counts[i]), float(sums[i] / counts[i]), float(hits[i] / counts[i])) for i in filled
    )


def calibration_error(probabilities: Numbers, positives: NDArray[np.bool_], bins: int = 10) -> float:
    """The expected calibration error: Σ_b n_b/n · |share − mean probability| (Naeini et al. 2015).

    >>> round(calibration_error(np.array([0.1, 0.2, 0.9]), np.array([False, True, True]), bins=2), 6)
    0.266667
    """
    found = reliability(probabilities, positives, bins)
    return sum(one.n * abs(one.share - one.probability) for one in found) / len(probabilities)


def _errors(outputs: Outputs, outcomes: Sequence[Any]) -> Numbers:
    answered = np.asarray(outputs.results, dtype=np.float64).reshape(len(outputs.results))
    return np.abs(answered - np.asarray(outcomes, dtype=np.float64))


def _of_probabilities(
    probabilities: Numbers, truth: Sequence[str], class_labels: Sequence[str | int]
) -> dict[str, float | None]:
    classes = labels_of(class_labels)
    if len(classes) != probabilities.shape[1] or not set(truth) <= set(classes):
        # Where it is not known which class a probability is of, or an outcome that the model cannot answer has none.
        return {}
    place = {label: i for i, label in enumerate(classes)}
    hits = np.zeros(probabilities.shape, dtype=bool)
    hits[np.arange(len(truth)), [place[label] for label in truth]] = True
    tiny = np.finfo(np.float64).eps
    figures: dict[str, float | None] = {
        "log_loss": float(-np.log(np.clip(probabilities[hits], tiny, 1 - tiny)).mean())
    }
    if len(classes) == 2:
        positive, came_true = probabilities[:, 1], hits[:, 1]
        figures["auc"] = area_under_curve(positive, came_true)
        figures["brier"] = float(((positive - came_true) ** 2).mean())
        figures["calibration_error"] = calibration_error(positive, came_true)
        return figures
    areas = [area_under_curve(probabilities[:, i], hits[:, i]) for i in range(len(classes))]
    known = [area for area in areas if area is not None]
    figures["auc"] = sum(known) / len(known) if len(known) == len(areas) else None
    figures["brier"] = float(((probabilities - hits) ** 2).sum(axis=1).mean())
    return figures
