"""The alarm's thresholds are those of its formulas, and it sees what it must in every kind of feature."""

import math
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binom, chi2, fisher_exact, hypergeom, poisson

from phoenix_ml.application.statistics.alarm import (
    AlarmSettings,
    DriftAlarm,
    ad_threshold,
    level_p_value,
    level_squares,
    number_squares,
    weigh_cuts,
)
from phoenix_ml.application.statistics.baseline import describe_reference
from phoenix_ml.application.statistics.cells import CellCounts
from phoenix_ml.application.statistics.design_effect import design_effects
from phoenix_ml.domain.baselines import SCORE, Baseline
from phoenix_ml.domain.drift import DriftCheck, Evidence, FeatureAlarm, Verdict, wants_retraining
from phoenix_ml.domain.features import FeatureRule, FeatureType
from phoenix_ml.domain.models import Task
from phoenix_ml.domain.rows import Outputs

FLOAT, STRING = FeatureRule(FeatureType.FLOAT), FeatureRule(FeatureType.STRING)


def look(reference: list[Any], batches: list[Any], rule: FeatureRule = FLOAT, **kwargs: Any) -> DriftCheck:
    alarm = DriftAlarm(describe_reference({"x": reference}, {"x": rule}), AlarmSettings(**kwargs))
    return alarm.check([alarm.counter.count({"x": batch}) for batch in batches])


def normal(seed: int, rows: int, mean: float = 0.0, std: float = 1.0) -> list[float]:
    values: list[float] = np.random.default_rng(seed).normal(mean, std, rows).tolist()
    return values


def the_alarm(check: DriftCheck) -> FeatureAlarm:
    (alarm,) = check.alarms
    return alarm


def test_the_budget_is_shared_by_all_features_and_windows() -> None:
    """ARL checks between two false alarms, for all features together: each is tested, and its missing values, in 7 windows."""
    columns = {f"f{i}": normal(i, 300) for i in range(30)}
    alarm = DriftAlarm(describe_reference(columns, dict.fromkeys(columns, FLOAT)), AlarmSettings(arl=1e4))
    assert pytest.approx(alarm.budget) == 1 / (1e4 * 60 * 7)


def test_the_ks_alarm_reports_the_figures_of_its_formula() -> None:
    """Worked from the samples themselves: the cells hold every value, so D over them is the difference at the cuts."""
    reference, recent = normal(1, 5000), normal(2, 800, mean=1.0)
    found = the_alarm(look(reference, [recent]))
    cuts = np.quantile(reference, np.arange(1, 32) / 32, method="inverted_cdf")
    distance = max(abs(np.mean(recent <= cut) - np.mean(reference <= cut)) for cut in cuts)
    budget = 1 / (1e4 * 2 * 7)
    assert found.rule == "ks"
    assert found.statistic == pytest.approx(distance, rel=1e-12)
    assert found.threshold == pytest.approx(
        math.sqrt(math.log(4 / budget) / (2 * 800 * 5000 / 5800)), rel=1e-12
    )
    assert (found.window, found.rows, found.direction) == (1, 800, "higher")


def test_the_eigenvalues_over_equal_cells_are_those_of_the_hahn_polynomials() -> None:
    """For K equal cells, λ_i = 1 / (i(i + 1)), the same as the continuous statistic's: an exact oracle."""
    cells = 32
    shares = tuple((np.arange(1, cells) / cells).tolist())
    largest, kappa = weigh_cuts(shares)
    expected = math.prod((1 - 2 / (i * (i + 1))) ** -0.5 for i in range(2, cells))
    assert largest == pytest.approx(0.5, rel=1e-9)
    assert kappa == pytest.approx(expected, rel=1e-9)
    assert ad_threshold(shares, 1e-4) == pytest.approx(0.5 * chi2.isf(0.5e-4 / expected, 1), rel=1e-9)


def test_the_tail_of_the_anderson_darling_half_is_the_simulated_one() -> None:
    """Σ λ_i χ²₁ simulated 400,000 times: at a budget of 1 % half of it, 0.5 %, is beyond the threshold."""
    cells = 32
    shares = tuple((np.arange(1, cells) / cells).tolist())
    weights = [1 / (i * (i + 1)) for i in range(1, cells)]
    rng = np.random.default_rng(6)
    total = sum(weight * rng.standard_normal(400_000) ** 2 for weight in weights)
    beyond = float(np.mean(total > ad_threshold(shares, 0.01)))
    assert beyond == pytest.approx(0.005, abs=4 * math.sqrt(0.005 / 400_000))


@pytest.mark.parametrize(
    ("x", "n", "c", "m"), [(8, 10, 1, 6), (0, 300, 40, 1000), (30, 300, 40, 1000), (5, 5, 0, 7)]
)
def test_a_level_is_tested_by_fishers_exact_tails(x: int, n: int, c: int, m: int) -> None:
    """Exact at any count: the rare level is where approximations fail."""
    table = [[x, n - x], [c, m - c]]
    tails = [fisher_exact(table, alternative=side).pvalue for side in ("greater", "less")]
    assert level_p_value(x, n, c, m) == pytest.approx(min(1.0, 2 * min(tails)), rel=1e-9)


@pytest.mark.parametrize("effect", [1.0, 3.0])
def test_p_values_of_levels_in_the_thousands_are_scipys(effect: float) -> None:
    """The tail is summed up for all levels at once; above the budget the sum is left out, and only there."""
    rng = np.random.default_rng(21)
    n, m = rng.integers(500, 64_000, 200), rng.integers(500, 20_000, 200)
    share = rng.beta(0.5, 3, 200)
    x, c = rng.binomial(n, np.minimum(1, share * rng.uniform(0.6, 1.6, 200))), rng.binomial(m, share)
    fewer = [np.rint(values / effect) for values in (x, n, c, m)]
    upper = hypergeom.sf(fewer[0] - 1, fewer[1] + fewer[3], fewer[0] + fewer[2], fewer[1])
    lower = hypergeom.cdf(fewer[0], fewer[1] + fewer[3], fewer[0] + fewer[2], fewer[1])
    expected = np.minimum(1, 2 * np.minimum(upper, lower))
    is_small = expected < 0.1
    assert is_small.sum() > 50
    assert level_p_value(x, n, c, m, effect)[is_small] == pytest.approx(
        expected[is_small], rel=1e-7, abs=1e-280
    )
    assert ((level_p_value(x, n, c, m, effect, 1e-6) <= 1e-6) == (expected <= 1e-6)).all()


@pytest.mark.parametrize(("m", "n"), [(300, 1000), (500, 4000), (2000, 1000), (10_000, 1000), (10_000, 4000)])
@pytest.mark.parametrize("share", [0.01, 0.02, 0.05, 0.1, 0.3])
def test_the_anderson_darling_half_keeps_its_budget_on_two_valued_numbers(
    m: int, n: int, share: float
) -> None:
    """Exact: the sum over both binomials of what is beyond the threshold. Over q(1 − q) alone it was up to 7,000 times a/2."""
    budget = 1 / (1e4 * 2 * 30 * 7)
    c, x = np.arange(m + 1), np.arange(n + 1)
    c, x = c[binom.pmf(c, m, share) > 1e-14], x[binom.pmf(x, n, share) > 1e-14]
    chances = np.outer(binom.pmf(c, m, share), binom.pmf(x, n, share))
    recent, reference = np.broadcast_arrays(x / n, (c / m)[:, None])
    squares = number_squares(recent, reference, np.add.outer(c, x) / (m + n))
    # One cut: its weight is ½, and the threshold that of any share.
    beyond = n * m / (n + m) * squares / 2 >= ad_threshold((0.5,), budget)
    assert chances[beyond & (np.abs(recent - reference) >= 0.02)].sum() <= budget / 2


@pytest.mark.parametrize(("m", "n"), [(500, 1000), (10_000, 1000), (10_000, 64_000)])
@pytest.mark.parametrize("levels", [2, 10])
def test_the_chi_square_half_keeps_its_budget_on_rare_levels(m: int, n: int, levels: int) -> None:
    """Levels of 20 rows each in the smaller sample, as Poisson counts, which sum up by convolution; χ² alone took 10 times."""
    budget, cell = 1 / (1e4 * 2 * 30 * 7), 0.02
    share = 20 / min(n, m)
    c, x = np.arange(int(poisson.isf(1e-15, m * share))), np.arange(int(poisson.isf(1e-15, n * share)))
    chances = np.outer(poisson.pmf(c, m * share), poisson.pmf(x, n * share))
    recent, reference = np.broadcast_arrays(x / n, (c / m)[:, None])
    statistics = n * m / (n + m) * level_squares(recent, reference, np.add.outer(c, x) / (m + n))
    size = 1 << 14
    places = np.minimum((statistics / cell).round().astype(int), size - 1)
    one = np.bincount(places.ravel(), weights=chances.ravel(), minlength=size)
    whole = np.fft.irfft(np.fft.rfft(one, 2 * size) ** levels, 2 * size)
    # Independent Poisson counts have one degree of freedom more than shares that add up to one.
    threshold = math.ceil(chi2.isf(budget / 2, levels) / cell)
    assert whole[threshold:].sum() <= budget / 2


@pytest.mark.parametrize("rule", ["flags", "zero-inflated"])
def test_rare_values_of_numbers_ring_no_alarm(rule: str) -> None:
    """30 numbers that are 0 but for one row in fifty: 4 % of checks rang."""
    names = [f"f{i}" for i in range(30)]
    contract = dict.fromkeys(names, FLOAT)

    def columns(rng: np.random.Generator, rows: int) -> dict[str, Any]:
        is_up = rng.random((30, rows)) < 0.02
        values = is_up if rule == "flags" else is_up * rng.lognormal(size=(30, rows))
        return dict(zip(names, values.astype(np.float64), strict=True))

    found: list[FeatureAlarm] = []
    for seed in range(40):
        rng = np.random.default_rng([15, seed])
        reference = {name: column.tolist() for name, column in columns(rng, 500).items()}
        alarm = DriftAlarm(describe_reference(reference, contract))
        for _ in range(5):
            found += alarm.check([alarm.counter.count(columns(rng, 1000))]).alarms
    assert found == []


@pytest.mark.parametrize(("levels", "m"), [(60, 300), (1000, 2000), (1000, 10_000), (10**6, 1000)])
def test_many_levels_ring_no_alarm(levels: int, m: int) -> None:
    """Streets, shops, ids: the levels that are kept were chosen, which must not look like drift in other rows."""
    rng = np.random.default_rng([16, levels, m])

    def draw(rows: int) -> list[str]:
        return [f"v{i}" for i in rng.integers(0, levels, rows)]

    alarm = DriftAlarm(describe_reference({"x": draw(m)}, {"x": STRING}))
    batches = [alarm.counter.count({"x": draw(1000)}) for _ in range(64)]
    assert [a for i in range(1, 65) for a in alarm.check(batches[:i]).alarms] == []


def test_an_effect_below_the_gate_is_no_alarm_however_sure_it_is() -> None:
    """At a million rows everything differs; what matters is how much. A feature can have a gate of its own."""
    reference, recent = normal(1, 200_000), normal(2, 200_000, mean=0.1)
    assert look(reference, [recent], effect=0.05).verdicts == {"x": Verdict.STEADY}
    assert look(reference, [recent], effect=0.05, effects={"x": 0.02}).verdicts == {"x": Verdict.DRIFT}


def test_a_small_shift_is_found_in_a_longer_window() -> None:
    """One batch cannot tell a tenth of a standard deviation, sixteen can."""
    reference = normal(1, 10_000)
    batches = [normal(100 + i, 1000, mean=0.1) for i in range(16)]
    assert look(reference, batches[:1]).alarms == ()
    assert the_alarm(look(reference, batches)).window > 1


def test_fewer_than_200_rows_are_carried_forward_and_said_to_be_too_few() -> None:
    """No data is never "no drift": the window that has enough of them decides."""
    reference = normal(1, 5000)
    thin = [normal(i, 150, mean=1.0) for i in range(2)]
    first, second = look(reference, thin[:1]), look(reference, thin)
    assert (first.insufficient, "x" in first.distances) == (("x",), False)
    assert [(found.rule, found.window) for found in second.alarms] == [("ks", 2)]


def test_missing_values_are_a_feature_of_their_own() -> None:
    """A feature that stops coming has the same distribution where it is there."""
    found = the_alarm(look(normal(1, 5000), [[*normal(2, 900), *[None] * 100]]))
    assert (found.rule, found.direction, found.distance) == ("missing", "higher", 0.1)
    assert found.statistic == pytest.approx(2 * hypergeom.sf(99, 6000, 100, 1000), rel=1e-9)


def test_a_new_level_is_an_alarm() -> None:
    """A kind of job that nobody had when the model was trained."""
    found = the_alarm(look(["a", "b"] * 2500, [["a"] * 480 + ["b"] * 480 + ["new"] * 40], STRING))
    assert (found.rule, found.level, found.direction) == ("level", "(other)", "higher")


def test_many_small_changes_of_levels_are_found_by_the_whole_table() -> None:
    """Forty levels that each move by less than the gate move the model together."""
    names = [f"v{i}" for i in range(40)]
    reference = names * 500
    shares = np.array([1.0 + (0.5 if i % 2 else -0.5) for i in range(40)])
    counts = (shares / shares.sum() * 8000).round().astype(int)
    recent = [name for name, count in zip(names, counts, strict=True) for _ in range(count)]
    found = the_alarm(look(reference, [recent], STRING))
    assert found.rule == "chi2"


@pytest.mark.parametrize(
    ("reference", "batch", "rule"),
    [([5.0] * 1000, [5.0] * 900 + [4.0] * 100, FLOAT), (["a"] * 1000, ["a"] * 900 + ["b"] * 100, STRING)],
)
def test_a_constant_that_varies_is_an_alarm(
    reference: list[Any], batch: list[Any], rule: FeatureRule
) -> None:
    """A feature that never varied has no cells to move between; the model has never seen another value."""
    found = the_alarm(look(reference, [batch], rule))
    assert found.rule == "constant"
    assert found.distance == pytest.approx(0.1)


def test_an_equal_stream_rings_no_alarm_in_any_kind_of_feature() -> None:
    """64 batches of the same distribution, looked at 64 times: numbers, ties, levels, rare and missing values."""
    rng = np.random.default_rng(12)

    def columns(rows: int) -> dict[str, Any]:
        levels: list[str] = rng.choice([f"v{i}" for i in range(80)], size=rows, p=_zipf(80)).tolist()
        number: NDArray[np.float64] = rng.normal(size=rows)
        number[rng.random(rows) < 0.1] = np.nan
        return {
            "number": number,
            "ties": rng.poisson(1.0, rows).astype(float),
            "levels": levels,
            "same": np.ones(rows),
        }

    contract = {"number": FLOAT, "ties": FLOAT, "levels": STRING, "same": FLOAT}
    alarm = DriftAlarm(describe_reference({n: list(c) for n, c in columns(10_000).items()}, contract))
    ring: list[CellCounts] = []
    found: list[FeatureAlarm] = []
    for _ in range(64):
        ring.append(alarm.counter.count(columns(1000)))
        found += alarm.check(ring).alarms
    assert found == []


def _zipf(levels: int) -> NDArray[np.float64]:
    weights = 1 / np.arange(1, levels + 1)
    share: NDArray[np.float64] = weights / weights.sum()
    return share


def test_scores_that_move_in_two_batches_in_a_row_are_evidence() -> None:
    """One odd batch is a Monday morning; two are what the model makes of changed rows."""
    rng = np.random.default_rng(8)

    def outputs(mean: float, rows: int) -> Outputs:
        return Outputs((mean + rng.normal(size=rows)).tolist())

    reference = {"x": normal(1, 5000)}
    baseline = describe_reference(reference, {"x": FLOAT}, outputs=outputs(0.0, 5000), task=Task.REGRESSION)
    alarm = DriftAlarm(baseline)
    same, moved = (
        alarm.counter.count({"x": normal(2, 1000)}, outputs=outputs(mean, 1000), task=Task.REGRESSION)
        for mean in (0.0, 0.5)
    )
    checks = [alarm.check(ring) for ring in ([same, moved], [moved, same], [moved, moved], [moved])]
    assert [check.score_moved for check in checks] == [False, False, True, False]
    assert [found.feature for found in checks[2].alarms] == [SCORE]
    blind = DriftAlarm(baseline, AlarmSettings(left_out=(SCORE,))).check([moved, moved])
    assert (blind.score_moved, blind.alarms) == (False, ())


def test_design_effects_are_the_ratio_of_the_variances_of_blocks() -> None:
    """Worked by a loop over blocks and cuts, with the lower 5 % of chi-square."""
    batches = np.random.default_rng(3).multinomial(1000, [0.25] * 4, size=16) + np.array(
        [[50, 0, 0, 0], [0, 50, 0, 0]] * 8
    )
    total = batches.sum(axis=0)
    q = (total.cumsum() / total.sum())[:-1]
    found = design_effects(batches, is_ordered=True)
    for position, window in enumerate((1, 2)):
        blocks = [batches[i : i + window].sum(axis=0) for i in range(0, 16, window)]
        squares = [
            sum(b.sum() * (b[: k + 1].sum() / b.sum() - q[k]) ** 2 / (q[k] * (1 - q[k])) for b in blocks)
            for k in range(3)
        ]
        expected = max(1.0, float(np.mean(squares)) / chi2.ppf(0.05, len(blocks) - 1))
        assert found[position] == pytest.approx(expected, abs=1e-4)
    assert found[2:] == (None,) * 5


def test_blocks_without_a_value_teach_no_design_effect() -> None:
    """Counted as blocks that do not differ, they would make a season look like chance; by hand: 8 blocks, 1 cut at ½."""
    full = np.array([[60, 40], [40, 60]] * 4)
    empty = np.zeros((12, 2), dtype=np.int64)
    # Σ n(F − ½)² / ¼ = 8 · 100 · 0.01 · 4 = 32, over the lower 5 % of chi-square with 7 degrees of freedom.
    expected = round(32 / 2.16735, 4)
    assert design_effects(np.concatenate([full, empty]), is_ordered=True)[0] == pytest.approx(expected, 1e-4)
    assert design_effects(np.concatenate([full[:7], empty]), is_ordered=True)[0] is None


def seasonal(rows: int, seed: int) -> list[float]:
    hours = np.arange(rows) // 200 % 24
    values: list[float] = (
        0.5 * np.sin(hours * 2 * np.pi / 24) + np.random.default_rng(seed).normal(size=rows)
    ).tolist()
    return values


def seasonal_baseline(days: int) -> Baseline:
    rows = days * 4800
    return describe_reference({"x": seasonal(rows, 1)}, {"x": FLOAT}, time=range(rows), batch_rows=200)


def test_the_order_of_time_comes_from_the_column_of_times() -> None:
    """A table is seldom sorted; its design effects must be those of the sorted one."""
    rows = 10 * 4800
    values = seasonal(rows, 1)
    shuffled = np.random.default_rng(2).permutation(rows).tolist()
    mixed = describe_reference(
        {"x": [values[i] for i in shuffled]}, {"x": FLOAT}, time=shuffled, batch_rows=200
    )
    assert seasonal_baseline(10) == mixed


def test_a_season_that_the_reference_knows_rings_no_alarm() -> None:
    """With a daily cycle every rule for independent rows alarms in every day."""
    baseline = seasonal_baseline(30)
    settings = AlarmSettings(batch_rows=200)
    alarm = DriftAlarm(baseline, settings)
    entry = msgspec.structs.replace(baseline.features["x"], design_effects=(), missing_design_effects=())
    without = msgspec.structs.replace(baseline, features={"x": entry}, is_time_ordered=False)
    plain = DriftAlarm(without, settings)
    values = np.array(seasonal(2 * 4800, 5))
    batches = [alarm.counter.count({"x": part}) for part in np.split(values, 48)]
    checks = range(1, len(batches) + 1)
    assert [a for i in checks for a in alarm.check(batches[:i]).alarms] == []
    assert any(plain.check(batches[:i]).alarms for i in checks)


def test_a_scale_that_the_reference_is_too_short_to_teach_is_advisory() -> None:
    """Two days cannot tell how days differ: the finding is shown, but opens nothing."""
    alarm = DriftAlarm(seasonal_baseline(1), AlarmSettings(batch_rows=200))
    batch = alarm.counter.count({"x": normal(7, 3200, mean=3.0)})
    check = alarm.check_one(batch)
    assert the_alarm(check).is_advisory
    assert check.verdicts == {"x": Verdict.ADVISORY}


@pytest.mark.parametrize(
    ("rows", "verdict"), [(1900, Verdict.ADVISORY), (2000, Verdict.DRIFT), (8000, Verdict.DRIFT)]
)
def test_a_reference_of_two_batches_knows_enough_for_a_great_change(rows: int, verdict: Verdict) -> None:
    """Five standard deviations in every row are no season of the day that the reference shows; 2,000 rows make 8 blocks."""
    baseline = describe_reference({"x": normal(1, rows)}, {"x": FLOAT}, time=range(rows))
    alarm = DriftAlarm(baseline)
    assert alarm.check([alarm.counter.count({"x": normal(7, 1000, mean=5.0)})]).verdicts == {"x": verdict}


def test_the_design_effect_of_a_batch_is_at_most_that_of_its_parts_times_their_number() -> None:
    """8 blocks of 500 rows for batches of 1,000: a mean over more rows varies no more, so the effect is at most double."""
    values = [float(i % 2) if i // 500 % 2 else 0.0 for i in range(4000)]
    batches = np.array([[500, 0], [250, 250]] * 4)
    (learned, *longer) = (
        describe_reference({"x": values}, {"x": FLOAT}, time=range(4000)).features["x"].design_effects
    )
    assert learned == pytest.approx(2 * (design_effects(batches, is_ordered=True)[0] or 0), abs=1e-3)
    assert longer == [None] * 6


def test_counts_of_a_feature_that_is_left_out_ring_no_alarm() -> None:
    """Somebody knows that it moves."""
    check = look(normal(1, 5000), [normal(2, 1000, mean=3.0)], left_out=("x",))
    assert (check.alarms, check.verdicts) == ((), {"x": Verdict.LEFT_OUT})


RETRAINING = [
    (Evidence(drifted=("a",)), None),
    (Evidence(is_drop_confirmed=True), None),
    (Evidence(score_moved=True), None),
    (Evidence(drifted=("a",), is_drop_confirmed=True), "drift and an estimated drop"),
    (Evidence(drifted=("a",), score_moved=True), "drift and moved scores"),
    (Evidence(drifted=("a",), missing=("a",), score_moved=True), None),
    (Evidence(drifted=("a", "b"), missing=("a",), score_moved=True), "drift and moved scores"),
    (Evidence(is_outcome_alarm=True), "outcomes"),
    (Evidence(drifted=("missing:a",), missing=("missing:a",), is_outcome_alarm=True), "outcomes"),
    (Evidence(broken=("missing:a",), missing=("missing:a",), is_outcome_alarm=True), None),
    (Evidence(broken=("missing:a",), drifted=("missing:a", "drift:b"), is_drop_confirmed=True), None),
    (Evidence(broken=("missing:a",), drifted=("missing:a", "drift:b"), score_moved=True), None),
    (Evidence(broken=("a",), drifted=("b",), is_outcome_alarm=True, is_drop_confirmed=True), None),
]


@pytest.mark.parametrize(
    ("feature", "rule", "direction", "explains"),
    [
        ("income", "missing", "higher", True),
        ("income", "missing", "lower", False),
        ("income", "ks", "higher", False),
        # What the model does not answer blames the model.
        (SCORE, "missing", "higher", False),
    ],
)
def test_values_that_stay_away_blame_the_data(
    feature: str, rule: Any, direction: Any, explains: bool
) -> None:
    """Fewer missing ones do not, nor does any other change."""
    alarm = FeatureAlarm(feature, "numeric", rule, 1, 1000, 0.0, 0.1, 0.5, direction)
    assert alarm.explains_drift is explains


@pytest.mark.parametrize(("evidence", "reason"), RETRAINING)
def test_a_model_is_trained_again_only_where_it_suffers(evidence: Evidence, reason: str | None) -> None:
    """Drift alone is no reason, and broken data is a reason not to."""
    assert reason == wants_retraining(evidence)
