"""Quality equals scikit-learn's, estimates find a known truth, and the detector keeps its promise."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression
from sklearn.metrics import (
    accuracy_score,
    brier_score_loss,
    log_loss,
    mean_absolute_error,
    roc_auc_score,
    root_mean_squared_error,
)

from phoenix_ml.application.statistics.baseline import describe_reference
from phoenix_ml.application.statistics.detector import BLOCK, LossDetector, objective
from phoenix_ml.application.statistics.estimation import (
    estimate_performance,
    expected_auc,
    fit_calibration,
    is_drop_confirmed,
)
from phoenix_ml.application.statistics.quality import (
    area_under_curve,
    calibration_error,
    losses,
    measure_quality,
)
from phoenix_ml.domain.baselines import Baseline, Estimate, Quality
from phoenix_ml.domain.errors import InvalidField, ModelRefused
from phoenix_ml.domain.features import FeatureRule, FeatureType
from phoenix_ml.domain.models import Task
from phoenix_ml.domain.rows import ElementType, Outputs

FLOAT = FeatureRule(FeatureType.FLOAT)
# Two digits make ties.
chances = st.integers(0, 100).map(lambda n: n / 100)
CLASSIFICATION, REGRESSION = Task.CLASSIFICATION, Task.REGRESSION


def binary(p: list[float]) -> Outputs:
    return Outputs([int(x >= 0.5) for x in p], [max(x, 1 - x) for x in p], [[1 - x, x] for x in p])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(chances, st.booleans()), min_size=2, max_size=60))
def test_quality_of_two_classes_equals_scikit_learn(rows: list[tuple[float, bool]]) -> None:
    """What is shown beside a model must be what its makers measured."""
    p, truth = [row[0] for row in rows], [int(row[1]) for row in rows]
    found = measure_quality(CLASSIFICATION, binary(p), truth, class_labels=(0, 1))
    assert accuracy_score(truth, [int(x >= 0.5) for x in p]) == pytest.approx(found.accuracy, abs=1e-12)
    assert log_loss(truth, p, labels=[0, 1]) == pytest.approx(found.log_loss, rel=1e-9)
    assert brier_score_loss(truth, p, pos_label=1) == pytest.approx(found.brier, abs=1e-12)
    if len(set(truth)) == 2:
        assert roc_auc_score(truth, p) == pytest.approx(found.auc, abs=1e-12)
    else:
        assert found.auc is None


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.sampled_from("abc")),
        min_size=3,
        max_size=60,
    )
)
def test_quality_of_three_classes_equals_scikit_learn(rows: list[tuple[int, int, int, str]]) -> None:
    """Probabilities of all classes, and the mean of one-against-the-rest areas."""
    weights = np.array([row[:3] for row in rows], dtype=float)
    p = weights / weights.sum(axis=1, keepdims=True)
    truth = [row[3] for row in rows]
    outputs = Outputs(["abc"[i] for i in p.argmax(axis=1)], p.max(axis=1).tolist(), p.tolist())
    found = measure_quality(CLASSIFICATION, outputs, truth, class_labels=("a", "b", "c"))
    assert log_loss(truth, p, labels=["a", "b", "c"]) == pytest.approx(found.log_loss, rel=1e-9)
    hits = np.array([[label == name for name in "abc"] for label in truth])
    assert ((p - hits) ** 2).sum(axis=1).mean() == pytest.approx(found.brier, abs=1e-12)
    if set(truth) == set("abc"):
        expected = roc_auc_score(truth, p, multi_class="ovr", labels=["a", "b", "c"])
        assert expected == pytest.approx(found.auc, abs=1e-12)


@given(st.lists(st.tuples(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6)), min_size=1, max_size=60))
def test_quality_of_a_regression_equals_scikit_learn(rows: list[tuple[float, float]]) -> None:
    """Mean absolute and root mean squared error, and the share beyond a tolerance."""
    answers, truth = [row[0] for row in rows], [row[1] for row in rows]
    found = measure_quality(REGRESSION, Outputs(list(answers)), truth, tolerance=10.0)
    assert mean_absolute_error(truth, answers) == pytest.approx(found.mae, rel=1e-9, abs=1e-12)
    assert root_mean_squared_error(truth, answers) == pytest.approx(found.rmse, rel=1e-9, abs=1e-12)
    assert np.mean(losses(REGRESSION, Outputs(list(answers)), truth, 10.0)) == found.error_rate


def test_calibration_error_is_worked_from_its_bins() -> None:
    """0.05, 0.15 and 0.95 fall into three of ten bins; the figure is the weighted mean of their gaps."""
    p = np.array([0.05, 0.15, 0.15, 0.95])
    came = np.array([False, False, True, True])
    assert calibration_error(p, came) == pytest.approx((0.05 + 2 * 0.35 + 0.05) / 4)


def test_outcomes_compare_whatever_road_they_took() -> None:
    """An answer of 1 was right where the outcome is true, 1.0 or "1"."""
    outputs = Outputs([1, 1, 1, 0])
    assert losses(CLASSIFICATION, outputs, [True, 1.0, "1", 1]).tolist() == [0.0, 0.0, 0.0, 1.0]


@given(st.lists(st.tuples(chances, st.booleans()), min_size=2, max_size=60))
def test_calibration_is_the_isotonic_regression_of_scipy(rows: list[tuple[float, bool]]) -> None:
    """Between the knots that are kept nothing is lost: the function through them gives every fitted value."""
    scores, hits = np.array([row[0] for row in rows]), np.array([row[1] for row in rows])
    knots, fitted = fit_calibration(scores, hits)
    unique, places = np.unique(scores, return_inverse=True)
    counts = np.bincount(places)
    expected = isotonic_regression(np.bincount(places, weights=hits) / counts, weights=counts).x
    assert expected == pytest.approx(np.interp(unique, knots, fitted), abs=1e-12)


def test_the_expected_auc_is_that_of_all_pairs() -> None:
    """Summed over all pairs by a loop."""
    rng = np.random.default_rng(1)
    scores, p = rng.integers(0, 8, 60) / 8, rng.random(60)
    won = weight = 0.0
    for i in range(60):
        for j in range(60):
            if i != j:
                pair = p[i] * (1 - p[j])
                weight += pair
                won += pair * (1.0 if scores[i] > scores[j] else 0.5 if scores[i] == scores[j] else 0.0)
    assert won / weight == pytest.approx(expected_auc(scores, p), rel=1e-12)


def classified(rng: np.random.Generator, x: NDArray[np.float64]) -> tuple[Outputs, list[int]]:
    """Answers of a logistic model that is too sure of itself, and outcomes by the true probability."""
    truth = (rng.random(len(x)) < 1 / (1 + np.exp(-x))).astype(int).tolist()
    return binary((1 / (1 + np.exp(-2 * x))).tolist()), truth


def binary_baseline(rng: np.random.Generator) -> Baseline:
    x = rng.normal(0, 2, 10_000)
    outputs, truth = classified(rng, x)
    return describe_reference(
        {"x": x.tolist()},
        {"x": FLOAT},
        outputs=outputs,
        outcomes=truth,
        task=CLASSIFICATION,
        class_labels=(0, 1),
    )


@pytest.mark.parametrize("std", [2.0, 1.0, 0.5])
def test_accuracy_is_estimated_without_outcomes(std: float) -> None:
    """Harder rows come: the estimate follows the truth that it cannot see, though the model is badly calibrated."""
    rng = np.random.default_rng(3)
    baseline = binary_baseline(rng)
    outputs, truth = classified(rng, rng.normal(0, std, 20_000))
    estimate = estimate_performance(baseline, CLASSIFICATION, outputs)
    actual = measure_quality(CLASSIFICATION, outputs, truth, class_labels=(0, 1))
    assert estimate is not None
    assert actual.accuracy == pytest.approx(estimate.value, abs=0.015)
    assert actual.auc == pytest.approx(estimate.auc, abs=0.015)


def test_a_drop_is_confirmed_by_two_windows_and_not_by_chance() -> None:
    """Rows like the reference's confirm nothing in 100 windows; rows that are twice as hard do at once."""
    rng = np.random.default_rng(4)
    baseline = binary_baseline(rng)

    def windows(std: float, count: int) -> list[Estimate]:
        found = [
            estimate_performance(baseline, CLASSIFICATION, classified(rng, rng.normal(0, std, 1000))[0])
            for _ in range(count)
        ]
        return [one for one in found if one is not None]

    same, hard = windows(2.0, 100), windows(0.8, 2)
    assert not any(is_drop_confirmed(baseline, a, b) for a, b in itertools.pairwise(same))
    assert is_drop_confirmed(baseline, hard[0], hard[1])
    assert not is_drop_confirmed(baseline, same[0], hard[0])


def test_the_error_of_a_regression_is_estimated_from_truths_that_come_back_as_numbers() -> None:
    """A boolean of a float32 tensor is 1.0 in the log; taken for another level, the model of the error would ignore it."""
    rng = np.random.default_rng(14)
    flag = rng.random(4000) < 0.5
    truth = np.where(flag, 5.0, 0.5)
    baseline = describe_reference(
        {"flag": flag.tolist()},
        {"flag": FeatureRule(FeatureType.BOOLEAN)},
        elements={"flag": ElementType.FLOAT32},
        outputs=Outputs([0.0] * 4000),
        outcomes=truth.tolist(),
        task=REGRESSION,
    )
    estimate = estimate_performance(
        baseline, REGRESSION, Outputs([0.0] * 1000), {"flag": np.ones(1000, dtype=np.float32)}
    )
    assert estimate is not None
    assert estimate.value == pytest.approx(5.0, abs=0.05)


def test_the_error_of_a_regression_is_estimated_from_its_rows() -> None:
    """Noise grows with x: where more of it comes, the loss model says so."""
    rng = np.random.default_rng(5)

    def rows(mean: float, n: int) -> tuple[dict[str, Any], Outputs, list[float]]:
        x = rng.normal(mean, 1, n)
        y = 3 * x + rng.normal(size=n) * np.exp(x / 2)
        return {"x": x.tolist()}, Outputs((3 * x).tolist()), y.tolist()

    columns, outputs, truth = rows(0.0, 10_000)
    baseline = describe_reference(columns, {"x": FLOAT}, outputs=outputs, outcomes=truth, task=REGRESSION)
    columns, outputs, truth = rows(1.0, 10_000)
    estimate = estimate_performance(baseline, REGRESSION, outputs, columns)
    actual = measure_quality(REGRESSION, outputs, truth).mae
    assert estimate is not None
    assert actual == pytest.approx(estimate.value, rel=0.15)
    assert baseline.quality is not None
    assert baseline.quality.mae is not None
    assert estimate.value > 1.3 * baseline.quality.mae
    assert is_drop_confirmed(baseline, estimate, estimate)


def test_too_few_rows_or_no_outcomes_give_no_estimate() -> None:
    """No data is no estimate, rather than a bad one."""
    baseline = binary_baseline(np.random.default_rng(6))
    assert estimate_performance(baseline, CLASSIFICATION, binary([0.7] * 199)) is None
    assert estimate_performance(Baseline(9, {}), CLASSIFICATION, binary([0.7] * 500)) is None


def test_a_reference_with_a_hole_in_its_times_is_refused() -> None:
    """An order that is guessed teaches the wrong design effects."""
    with pytest.raises(ModelRefused, match="a time in every row"):
        describe_reference({"x": [1.0, 2.0]}, {"x": FLOAT}, time=[1, None])
    with pytest.raises(ModelRefused, match="put into order"):
        describe_reference({"x": [1.0, 2.0]}, {"x": FLOAT}, time=[1, (2,)])


@pytest.mark.parametrize("text", ["12/31/2024", "31.12.2024", "Tue", "1735689600"])
def test_a_text_that_is_no_date_is_refused_as_a_time(text: str) -> None:
    """As text, 12/31/2024 comes after 01/01/2025: design effects over the wrong order would be silent nonsense."""
    with pytest.raises(InvalidField, match=r"which is no date of ISO 8601.*give dates such as 2024-12-31"):
        describe_reference({"x": [1.0, 2.0]}, {"x": FLOAT}, time=["2025-01-01", text])


def test_texts_that_are_dates_are_put_into_the_order_of_time() -> None:
    """As text, one in New York comes before the earlier one in Berlin."""
    times = ["2025-01-01T05:00:00-05:00", "2025-01-01T09:00:00+01:00", "2025-01-01T07:00:00"]
    values = [[3.0] * 1000, [2.0] * 1000, [1.0] * 1000]
    columns = {"x": [x for block in values for x in block]}
    mixed = describe_reference(
        columns, {"x": FLOAT}, time=[t for t in times for _ in range(1000)], batch_rows=150
    )
    columns = {"x": sorted(columns["x"])}
    assert mixed == describe_reference(columns, {"x": FLOAT}, time=range(3000), batch_rows=150)


@settings(deadline=None)
@given(st.lists(st.booleans(), max_size=1000), st.data())
def test_the_detector_sees_the_same_however_the_outcomes_come(wrong: list[bool], data: st.DataObject) -> None:
    """A restart, or another batch size, must not change what is an alarm."""
    stream = [float(x) for x in wrong]
    cut = data.draw(st.integers(0, len(stream)))
    start = LossDetector.start(0.1)
    assert start.update(stream) == start.update(stream[:cut]).update(stream[cut:])


def test_the_evidence_is_that_of_the_formula() -> None:
    """Two blocks worked by hand, in products rather than logarithms."""
    losses_ = [1.0] * 15 + [0.0] * 85 + [1.0] * 20 + [0.0] * 80
    found = LossDetector.start(0.1).update(losses_).evidence
    total = 0.0
    for h in (0.05, 0.15, 0.4):
        p1 = math.sin(math.asin(math.sqrt(0.1)) + h / 2) ** 2
        r = 0.0
        for wrong in (15, 20):
            r = (1 + r) * (p1 / 0.1) ** wrong * ((1 - p1) / 0.9) ** (BLOCK - wrong)
        total += r
    assert found == pytest.approx(total / 3, rel=1e-9)


def test_the_objective_is_the_references_error_with_a_margin() -> None:
    """Cohen's h between both is 2/√m."""
    p0 = objective(Quality(n=10_000, error_rate=0.1))
    h = 2 * math.asin(math.sqrt(p0)) - 2 * math.asin(math.sqrt(0.1))
    assert h == pytest.approx(0.02)
    assert objective(Quality(n=1000, error_rate=0.0)) > 0
    assert LossDetector.start(objective(Quality(n=4, error_rate=0.9))).p0 < 1


def test_an_alarm_stays_with_its_place_and_no_stream_overflows() -> None:
    """A million errors in a row are an alarm once, and a number that JSON can hold."""
    found = LossDetector.start(0.1).update([1.0] * 1_000_000)
    assert found.alarmed_at == BLOCK
    assert math.isfinite(found.evidence)
    assert found.update([0.0] * 100_000).is_alarm


@pytest.mark.parametrize("bad", [[2.0], [-0.1], [math.nan]])
def test_a_loss_outside_of_its_range_is_refused(bad: list[float]) -> None:
    """The bound on false alarms is one for losses in [0, 1]."""
    with pytest.raises(ValueError, match="between 0 and 1"):
        LossDetector.start(0.1).update(bad)


def test_areas_need_both_kinds_of_outcomes() -> None:
    """Without positives there is no order to be right about."""
    assert area_under_curve(np.array([0.1, 0.2]), np.array([False, False])) is None
