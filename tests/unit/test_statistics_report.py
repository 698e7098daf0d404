"""The figures that people read are scipy's, whatever the samples hold."""

import io
import itertools
import math
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from rich.console import Console
from scipy.spatial.distance import jensenshannon
from scipy.stats import chi2_contingency, false_discovery_control, ks_2samp, norm, wasserstein_distance

from phoenix_ml.application.statistics.alarm import AlarmSettings
from phoenix_ml.application.statistics.baseline import describe_reference, reference_columns
from phoenix_ml.application.statistics.report import classic_alarms, drift_report, ks_two_sample
from phoenix_ml.domain.baselines import SCORE
from phoenix_ml.domain.drift import Verdict
from phoenix_ml.domain.features import FeatureRule, FeatureType
from phoenix_ml.domain.models import Task
from phoenix_ml.domain.rows import Outputs
from phoenix_ml.infrastructure.console.drift import drift_table
from phoenix_ml.infrastructure.console.drift_page import drift_page

FLOAT, STRING = FeatureRule(FeatureType.FLOAT), FeatureRule(FeatureType.STRING)
# Few different values make ties, also between the samples.
few = st.integers(-3, 3).map(float)
values = st.lists(few | st.floats(-1e6, 1e6), min_size=1, max_size=80)
with_gaps = st.lists(few | st.floats(-1e6, 1e6) | st.none() | st.just(math.nan), min_size=1, max_size=80)


def present(column: list[float | None]) -> list[float]:
    return [value for value in column if value is not None and not math.isnan(value)]


@settings(max_examples=300)
@given(values, values)
def test_ks_equals_scipy(reference: list[float], recent: list[float]) -> None:
    """Ties, constants and samples of one value included: a figure of ours that differs from scipy's is a defect."""
    with np.errstate(divide="ignore", invalid="ignore"):  # samples of one value have no p
        expected = ks_2samp(reference, recent, method="asymp")
    statistic, p = ks_two_sample(np.sort(reference), np.sort(recent))
    assert expected.statistic == pytest.approx(statistic, abs=1e-12)
    if math.isnan(expected.pvalue):
        assert p is None
    else:
        assert expected.pvalue == pytest.approx(p, abs=1e-12)


@settings(max_examples=150, deadline=None)
@given(with_gaps, with_gaps)
def test_a_numeric_feature_of_the_report_equals_scipy(
    reference: list[float | None], recent: list[float | None]
) -> None:
    """From the columns to the page: missing values are left out of the tests and counted apart."""
    baseline = describe_reference({"x": reference}, {"x": FLOAT})
    arrays = reference_columns({"x": reference}, {"x": FLOAT})

    (found,) = drift_report(baseline, arrays, {"x": recent}).features

    assert found.missing == pytest.approx(1 - len(present(recent)) / len(recent))
    assert found.reference_missing == pytest.approx(1 - len(present(reference)) / len(reference))
    if not present(recent) or not present(reference):
        assert found.test is None
        return
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = ks_2samp(present(reference), present(recent), method="asymp")
    assert expected.statistic == pytest.approx(found.statistic, abs=1e-12)
    if found.p is not None:
        assert expected.pvalue == pytest.approx(found.p, abs=1e-12)
    sigma = np.std(present(reference))
    if sigma > 0:
        distance = wasserstein_distance(present(reference), present(recent)) / sigma
        assert distance == pytest.approx(found.wasserstein, rel=1e-12, abs=1e-12)
    cuts = np.unique(np.quantile(present(reference), np.arange(1, 32) / 32, method="inverted_cdf"))
    shares = [
        np.histogram(np.searchsorted(cuts, present(column)), np.arange(len(cuts) + 2))[0]
        for column in (reference, recent)
    ]
    assert jensenshannon(*shares, base=2) == pytest.approx(found.jensen_shannon, abs=1e-12)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from("abc"), min_size=1), st.lists(st.sampled_from("abcd"), min_size=1))
def test_a_category_of_the_report_equals_scipy(reference: list[str], recent: list[str]) -> None:
    """The two-sample test: the reference is a sample too."""
    reference = reference * 10  # no level is rare, so that all rows count
    baseline = describe_reference({"c": reference}, {"c": STRING})

    (found,) = drift_report(baseline, None, {"c": recent}).features

    levels = sorted(set(reference)) + (["new"] if set(recent) - set(reference) else [])
    table = [
        [
            column.count(level) if level != "new" else sum(v not in reference for v in column)
            for level in levels
        ]
        for column in (reference, recent)
    ]
    if len(levels) == 1:
        assert found.p is None
        return
    expected = chi2_contingency(table)
    assert expected.statistic == pytest.approx(found.statistic, rel=1e-12, abs=1e-12)
    assert expected.pvalue == pytest.approx(found.p, abs=1e-12)


def test_a_reference_that_was_kept_without_scores_compares_them_over_cells() -> None:
    """So do versions that were registered before scores were kept; their features have their rows."""
    column = np.random.default_rng(1).normal(size=900).tolist()
    outputs = Outputs(column)
    baseline = describe_reference({"x": column}, {"x": FLOAT}, outputs=outputs, task=Task.REGRESSION)
    arrays = reference_columns({"x": column}, {"x": FLOAT})

    report = drift_report(baseline, arrays, {"x": column}, outputs=outputs, task=Task.REGRESSION)

    found = {one.feature: (one.statistic, one.wasserstein) for one in report.features}
    assert found == {"x": (0.0, 0.0), SCORE: (0.0, None)}


def test_population_stability_index_is_that_of_the_references_deciles() -> None:
    """Worked by hand from its definition, over deciles of the reference with half a row added to each cell."""
    rng = np.random.default_rng(2)
    reference, recent = rng.normal(size=500), rng.normal(0.3, size=400)
    baseline = describe_reference({"x": reference.tolist()}, {"x": FLOAT})
    (found,) = drift_report(baseline, {"x": np.sort(reference)}, {"x": recent}).features
    edges = [-math.inf, *np.sort(reference)[[49, 99, 149, 199, 249, 299, 349, 399, 449]], math.inf]
    shares = []
    for sample in (reference, recent):
        counts = [sum(low < v <= high for v in sample) + 0.5 for low, high in itertools.pairwise(edges)]
        shares.append([count / sum(counts) for count in counts])
    expected = sum((p - q) * math.log(p / q) for q, p in zip(*shares, strict=True))
    assert expected == pytest.approx(found.psi, rel=1e-12)


def test_adjusted_p_values_are_benjamini_hochbergs() -> None:
    """With 30 features, one p below 0.05 is what chance gives."""
    rng = np.random.default_rng(4)
    names = [f"f{i}" for i in range(12)]
    reference: dict[str, Any] = {name: rng.normal(size=500).tolist() for name in names}
    contract = dict.fromkeys(names, FLOAT)
    baseline = describe_reference(reference, contract)
    recent = {name: rng.normal(0.02 * i, size=500) for i, name in enumerate(names)}

    report = drift_report(baseline, reference_columns(reference, contract), recent)

    ps = [one.p for one in report.features]
    assert None not in ps
    assert false_discovery_control(ps).tolist() == [one.p_adjusted for one in report.features]
    assert [p < 0.05 for p in ps if p is not None] == [one.is_classic_drift for one in report.features]
    assert [alarm.feature for alarm in classic_alarms(report)] == [
        one.feature for one in report.features if one.is_classic_drift
    ]


def test_a_report_of_few_rows_says_that_it_cannot_tell() -> None:
    """No data is never "no drift"."""
    baseline = describe_reference({"x": list(map(float, range(1000)))}, {"x": FLOAT})
    report = drift_report(baseline, None, {"x": [5000.0] * 20})
    assert report.features[0].verdict is Verdict.INSUFFICIENT
    assert any("too few" in note for note in report.notes)


@pytest.mark.parametrize(
    ("rows", "batch_rows", "words"),
    [
        (
            1500,
            1000,
            "1,500 rows in order of time, too few to know .* whatever drifts is advisory .* From 2,000 on",
        ),
        (
            5000,
            1000,
            "too few to know windows of more than 1,000: drift that shows only in those is advisory",
        ),
        (
            16_000,
            1000,
            "windows of more than 2,000: .* 32,000 rows would teach windows of 4,000, 512,000 those of 64,000",
        ),
        (
            16_000,
            300,
            "windows of more than 1,200: .* 32,000 rows would teach windows of 2,400, 256,000 those of 19,200",
        ),
    ],
)
def test_a_report_says_which_windows_the_reference_is_too_short_to_know(
    rows: int, batch_rows: int, words: str
) -> None:
    """A finding that opens no incident must not look like an alarm that is off; a person learns how many rows would do."""
    values = np.random.default_rng(17).normal(size=rows).tolist()
    baseline = describe_reference({"x": values}, {"x": FLOAT}, time=range(rows))
    report = drift_report(baseline, None, {"x": values[:1000]}, settings=AlarmSettings(batch_rows=batch_rows))
    assert any(re.search(words, note) for note in report.notes), report.notes


def test_a_report_on_a_long_reference_says_nothing_of_short_ones() -> None:
    """8 blocks of 64 batches teach all windows."""
    values = np.random.default_rng(18).normal(size=8 * 64 * 10).tolist()
    baseline = describe_reference({"x": values}, {"x": FLOAT}, time=range(len(values)), batch_rows=10)
    report = drift_report(baseline, None, {"x": values[:300]}, settings=AlarmSettings(batch_rows=10))
    assert not any("advisory" in note for note in report.notes)
    assert any("all the traffic of a time" in note for note in report.notes)


def test_a_report_judges_as_the_alarm_does() -> None:
    """A p of 0.01 in 30 features is chance; half a standard deviation is not. A person can leave a feature out."""
    rng = np.random.default_rng(5)
    names = ["same", "moved", "ignored"]
    reference: dict[str, Any] = {name: rng.normal(size=5000).tolist() for name in names}
    baseline = describe_reference(reference, dict.fromkeys(names, FLOAT))
    recent = {name: rng.normal(0.0 if name == "same" else 0.5, size=1000) for name in names}

    report = drift_report(baseline, None, recent, settings=AlarmSettings(left_out=("ignored",)))

    assert {one.feature: one.verdict for one in report.features} == {
        "same": Verdict.STEADY,
        "moved": Verdict.DRIFT,
        "ignored": Verdict.LEFT_OUT,
    }
    assert report.drifted == ("moved",)
    assert [alarm.feature for alarm in classic_alarms(report)] == ["moved"]


def test_a_report_tells_of_no_broken_values_that_open_no_incident() -> None:
    """What somebody has left out, or allowed to vary more, in red beside no incident looks like a monitor that sleeps."""
    rng = np.random.default_rng(6)
    names = ["ignored", "allowed", "watched"]
    reference: dict[str, Any] = {name: rng.normal(size=5000).tolist() for name in names}
    baseline = describe_reference(reference, dict.fromkeys(names, FLOAT))
    recent = {name: rng.normal(size=1000) for name in names}
    recent["ignored"] *= 1000
    for name in ("allowed", "watched"):
        recent[name][:300] += 10  # out of the range, but not by another unit

    settings = AlarmSettings(left_out=("ignored",), effects={"allowed": 0.5})
    report = drift_report(baseline, None, recent, settings=settings)

    told = {one.feature: [found.kind for found in one.violations] for one in report.features}
    assert told == {"ignored": [], "allowed": [], "watched": ["range"]}


def test_both_forms_of_a_report_show_p_its_adjustment_and_what_the_classical_rule_calls_drift() -> None:
    """The one that looks at many features needs the adjusted p; the mark says what would have rung without it."""

    def grid(rows: int) -> NDArray[np.float64]:
        values: NDArray[np.float64] = norm.ppf((np.arange(rows) + 0.5) / rows)
        return values

    names = ["steady", "a_feature_with_a_long_name", "by_chance"]
    baseline = describe_reference(dict.fromkeys(names, grid(5000).tolist()), dict.fromkeys(names, FLOAT))
    means = {"steady": 0.0, "a_feature_with_a_long_name": 0.5, "by_chance": 0.15}
    report = drift_report(baseline, None, {name: grid(1000) + mean for name, mean in means.items()})
    by_name = {one.feature: one for one in report.features}
    assert [by_name[name].is_classic_drift for name in names] == [False, True, True]

    console = Console(width=120, record=True, file=io.StringIO())
    console.print(drift_table(report))
    table, page = console.export_text(), drift_page(report, "Drift", [])

    for one in report.features:
        mark = "*" if one.is_classic_drift else ""
        (line,) = (line for line in table.splitlines() if line.strip().startswith(one.feature[:8]))
        assert f"{one.p:.2g}{mark} " in line
        assert f" {one.p_adjusted:.2g} " in line
        assert f'<td class="n">{one.p:.2g}{mark}</td><td class="n">{one.p_adjusted:.2g}</td>' in page
    assert all("* p < 0.05" in text for text in (table, page.replace("&lt;", "<")))
