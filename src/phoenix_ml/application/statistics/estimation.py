"""How good a model is likely to be while no outcomes are there. It assumes that what a row means did not change."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from phoenix_ml.application.statistics.cells import Column, is_missing, level_of
from phoenix_ml.application.statistics.outputs import labels_of, output_columns, steady
from phoenix_ml.domain.baselines import (
    RESULT,
    SCORE,
    Baseline,
    Calibration,
    Estimate,
    FeatureBaseline,
    LossModel,
)
from phoenix_ml.domain.models import Task
from phoenix_ml.domain.rows import Outputs

Numbers = NDArray[np.float64]
FEWEST_ROWS: Final = 200
# The one-sided normal quantile of 10⁻⁴.
_CONFIDENCE: Final = 3.72
_KNOTS: Final = 64
_REPLICATES: Final = 200
# Neighbouring cells share a summand of the loss model: 240 unknowns at 30 features, not 960.
_GROUPS: Final = 8
_RIDGE: Final = 10.0


def estimate_performance(
    baseline: Baseline,
    task: Task | None,
    outputs: Outputs,
    columns: Mapping[str, Column] | None = None,
    *,
    seed: int = 0,
) -> Estimate | None:
    """The estimate over one window; None where the baseline was registered without outcomes or has too few rows.

    Two classes whose labels are known: with p̂ the calibrated probability of the last one, accuracy = mean(p̂ where
    it was answered, else 1 − p̂), and AUC from the expected pair counts. Others: the mean calibrated confidence. A
    regression: the mean of its loss model. The standard error is a bootstrap's over the window's rows.

    Confidence-based performance estimation (NannyML; Białek et al. 2024). It assumes no concept drift.

    >>> calibrated = Calibration("1", (0.0, 1.0), (0.1, 0.9))
    >>> outputs = Outputs([1, 0] * 150, None, [[0.0, 1.0], [0.5, 0.5]] * 150)
    >>> estimate = estimate_performance(Baseline(9, {}, calibration=calibrated), Task.CLASSIFICATION, outputs)
    >>> round(estimate.value, 6), round(estimate.auc, 3)
    (0.7, 0.739)
    """
    if len(outputs.results) < FEWEST_ROWS:
        return None
    found = _expected(baseline, task, outputs, columns)
    if found is None:
        return None
    expected, probabilities, score = found
    # Means of resampled rows; resampling one row at a time in place keeps 200 replicates small.
    generator = np.random.default_rng(seed)
    n = len(expected)
    means = [expected[generator.integers(0, n, n)].mean() for _ in range(_REPLICATES)]
    return Estimate(
        "mae" if task is Task.REGRESSION else "accuracy",
        n,
        float(expected.mean()),
        float(np.std(means, ddof=1)),
        expected_auc(score, probabilities) if probabilities is not None else None,
    )


def is_drop_confirmed(baseline: Baseline, earlier: Estimate, later: Estimate, margin: float = 0.01) -> bool:
    """Whether both of two successive disjoint windows are worse than the reference by more than chance and the margin.

    drop − 3.72·se > margin, with se from the window and the reference; the margin of a mean absolute error is a share of it.

    >>> reference = Estimate("accuracy", 10_000, 0.90, 0.003)
    >>> bad = Estimate("accuracy", 1000, 0.80, 0.01)
    >>> is_drop_confirmed(Baseline(10_000, {}, estimate=reference), bad, bad)
    True
    """
    before = baseline.estimate
    if before is None:
        return False
    if before.metric == "mae":
        margin *= before.value
    sign = 1.0 if before.metric == "accuracy" else -1.0
    return all(
        sign * (before.value - window.value) - _CONFIDENCE * math.hypot(window.se, before.se) > margin
        for window in (earlier, later)
    )


def expected_auc(scores: Numbers, probabilities: Numbers) -> float | None:
    """The AUC to expect of scores whose rows are positive with these probabilities, independently.

    Σ_{i≠j} p_i(1 − p_j)([s_i > s_j] + ½[s_i = s_j]) / Σ_{i≠j} p_i(1 − p_j).

    >>> expected_auc(np.array([0.2, 0.8]), np.array([0.0, 1.0]))
    1.0
    """
    _, places = np.unique(scores, return_inverse=True)
    negatives = np.bincount(places, weights=1 - probabilities)
    below = negatives.cumsum() - negatives
    own = probabilities * (1 - probabilities)
    pairs = probabilities.sum() * (1 - probabilities).sum() - own.sum()
    if pairs <= 0:
        return None
    won = (probabilities * (below[places] + (negatives[places] - (1 - probabilities)) / 2)).sum()
    return float(won / pairs)


def fit_calibration(scores: Numbers, hits: NDArray[np.bool_]) -> tuple[Numbers, Numbers]:
    """Knots of the monotone function of the score that fits the hits best in least squares.

    Isotonic regression (scipy.optimize.isotonic_regression, pool-adjacent-violators); equal scores are pooled first.

    >>> fit_calibration(np.array([0.1, 0.2, 0.3, 0.4]), np.array([False, True, False, True]))
    (array([0.1, 0.2, 0.3, 0.4]), array([0. , 0.5, 0.5, 1. ]))
    """
    from scipy.optimize import isotonic_regression

    knots, places = np.unique(scores, return_inverse=True)
    counts = np.bincount(places)
    shares = np.bincount(places, weights=hits) / counts
    fitted = isotonic_regression(shares, weights=counts).x
    # Only the ends of each level stretch bear on the lines between them.
    changes = np.diff(fitted) != 0
    kept = np.flatnonzero(np.append(True, changes) | np.append(changes, True))
    if len(kept) > _KNOTS:
        kept = kept[np.linspace(0, len(kept) - 1, _KNOTS).round().astype(int)]
    return knots[kept], fitted[kept]


def with_estimator(
    baseline: Baseline,
    task: Task | None,
    outputs: Outputs,
    outcomes: Sequence[Any],
    columns: Mapping[str, Any],
    class_labels: Sequence[str | int],
) -> Baseline:
    """The baseline with what estimates need, fitted on the reference, and what it says of the reference itself."""
    score, labels = output_columns(task, outputs)
    if task is Task.REGRESSION:
        if score is None:
            return baseline
        errors = np.abs(
            np.asarray(outputs.results, dtype=np.float64).reshape(-1) - np.asarray(outcomes, dtype=np.float64)
        )
        if not np.isfinite(errors).all():  # JSON has no NaN: a version that holds one is never read again
            return baseline
        baseline = msgspec.structs.replace(baseline, loss_model=_fit_losses(baseline, columns, errors))
        spread = errors
    else:
        if labels is None:
            return baseline
        truth = labels_of(outcomes)
        is_correct = np.array([a == b for a, b in zip(labels, truth, strict=True)])
        classes = labels_of(class_labels)
        # The score is the probability of the last class only where all answers and outcomes are of the two.
        is_binary = len(classes) == 2 and _is_binary(outputs) and {*truth, *labels} <= set(classes)
        positive = classes[-1] if is_binary else None
        hits = np.array([label == positive for label in truth]) if is_binary else is_correct
        score = score if is_binary else _confidences(outputs)
        if score is None:
            return baseline
        scores, probabilities = fit_calibration(score, hits)
        calibration = Calibration(
            positive,
            tuple(scores.tolist()),
            tuple(probabilities.round(6).tolist()),
        )
        baseline = msgspec.structs.replace(baseline, calibration=calibration)
        spread = is_correct.astype(np.float64)
    found = _expected(baseline, task, outputs, columns)
    if found is None:
        return baseline
    expected, hit_chances, score = found
    estimate = Estimate(
        "mae" if task is Task.REGRESSION else "accuracy",
        len(expected),
        float(expected.mean()),
        # How well the reference knows itself: its outcomes, of which the fit is made, came by chance too.
        float(spread.std() / math.sqrt(len(spread))),
        expected_auc(score, hit_chances) if hit_chances is not None else None,
    )
    return msgspec.structs.replace(baseline, estimate=estimate)


def _is_binary(outputs: Outputs) -> bool:
    return bool(outputs.probabilities) and all(
        row is not None and len(row) == 2 for row in outputs.probabilities or ()
    )


def _confidences(outputs: Outputs) -> Numbers | None:
    return steady(np.asarray(outputs.confidences, dtype=np.float64)) if outputs.confidences else None


def _expected(
    baseline: Baseline, task: Task | None, outputs: Outputs, columns: Mapping[str, Any] | None
) -> tuple[Numbers, Numbers | None, Numbers] | None:
    """A row's expected accuracy or error, its calibrated probability of being positive, and its score."""
    score, labels = output_columns(task, outputs)
    if task is Task.REGRESSION:
        if score is None or baseline.loss_model is None or columns is None:
            return None
        expected = np.full(len(score), baseline.loss_model.intercept)
        for name, column in (dict(columns) | {SCORE: score}).items():
            if (summands := baseline.loss_model.summands.get(name)) is not None:
                places = _groups(baseline.watched[name], column, len(summands) - 1)
                expected += np.asarray(summands)[places]
        return np.maximum(expected, 0.0), None, score
    calibration = baseline.calibration
    if calibration is None or labels is None:
        return None
    if calibration.positive is None:
        score = _confidences(outputs)
    if score is None:
        return None
    is_number = np.isfinite(score)
    score = score[is_number]
    probabilities = np.interp(score, calibration.scores, calibration.probabilities)
    if calibration.positive is None:
        return probabilities, None, score
    answered = np.array([label == calibration.positive for label in labels])[is_number]
    return np.where(answered, probabilities, 1 - probabilities), probabilities, score


def _groups(entry: FeatureBaseline, column: Column, groups: int) -> NDArray[np.int64]:
    """The summand that each row of a column has: its cell's, or the last where it has no value."""
    cells = len(entry.cells)
    if entry.levels is None:
        values = np.array([np.nan if v is None else v for v in column], dtype=np.float64)
        places = np.asarray(entry.cuts, dtype=np.float64).searchsorted(values, side="left")
        return np.where(np.isnan(values), groups, places * groups // cells)
    known = {level: i for i, level in enumerate(entry.levels)}
    found = []
    for value in column.tolist() if isinstance(column, np.ndarray) else column:
        level = None if is_missing(value) else level_of(value, known)
        found.append(groups if level is None else known.get(level, len(known)) * groups // cells)
    return np.array(found)


def _fit_losses(baseline: Baseline, columns: Mapping[str, Any], errors: Numbers) -> LossModel:
    """Ridge regression of the error on which group of cells each feature is in."""
    names = [name for name in baseline.watched if name != RESULT]
    groups = {name: min(_GROUPS, len(baseline.watched[name].cells)) for name in names}
    blocks = [
        np.eye(groups[name] + 1)[_groups(baseline.watched[name], columns[name], groups[name])]
        for name in names
    ]
    design = np.concatenate(blocks, axis=1)
    center = design.mean(axis=0)
    design = design - center
    gram = design.T @ design + _RIDGE * np.eye(design.shape[1])
    weights = np.linalg.solve(gram, design.T @ (errors - errors.mean()))
    ends = np.cumsum([groups[name] + 1 for name in names])
    parts = np.split(weights, ends[:-1])
    return LossModel(
        float(errors.mean() - center @ weights),
        {name: tuple(float(f"{x:.6g}") for x in part) for name, part in zip(names, parts, strict=True)},
    )
