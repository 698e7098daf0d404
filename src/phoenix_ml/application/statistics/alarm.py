"""The drift alarm: what opens an incident, at a stated rate of false alarms."""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Final, Literal

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray
from scipy.special import betaln
from scipy.stats import chi2

from phoenix_ml.application.statistics.cells import (
    ABOVE,
    BELOW,
    EXTRAS,
    FAR,
    INFINITE,
    MISSING,
    WRONG_TYPE,
    CellCounter,
    CellCounts,
)
from phoenix_ml.application.statistics.design_effect import effect_at
from phoenix_ml.domain.baselines import RESULT, SCORE, WINDOWS, Baseline, FeatureBaseline, FeatureKind
from phoenix_ml.domain.drift import SCORE_MOVED, DriftCheck, FeatureAlarm, SchemaViolation, Verdict

Numbers = NDArray[np.float64]
FEWEST_ROWS: Final = 200
# Below, the tail of the Anderson-Darling half is not yet the one that its threshold is made of.
_FEWEST_ROWS_OF_AD: Final = 1000
_FEWEST_EXPECTED: Final = 20


class AlarmSettings(Struct, frozen=True):
    """``arl``: checks between two false alarms, at least. ``effect``: the least distance that matters, ``effects`` by
    feature. ``left_out``: features nobody looks at, which may be SCORE and RESULT.
    """

    arl: float = 1e4
    batch_rows: int = 1000
    effect: float = 0.02
    effects: Mapping[str, float] = {}
    left_out: tuple[str, ...] = ()


def ks_threshold(budget: float, effective_rows: Any) -> Any:
    """The distance that two samples of one distribution exceed with probability budget/2 at most.

    √(ln(4/a) / (2·n_eff)), the two-sided Dvoretzky-Kiefer-Wolfowitz bound with Massart's constant (1990; for two samples:
    Wei, Dudley 2012).

    >>> round(float(ks_threshold(0.05, 500.0)), 4)
    0.0662
    """
    return np.sqrt(math.log(4 / budget) / (2 * effective_rows))


@lru_cache(maxsize=1024)
def weigh_cuts(shares: tuple[float, ...]) -> tuple[float, float]:
    """λ₁ and κ of the Anderson-Darling statistic over cells, from the cumulative shares at the cuts.

    λ are the eigenvalues of w(min(q_j, q_k) − q_j q_k) / √(q_j(1 − q_j) q_k(1 − q_k)) with w = 1/(cuts + 1), the
    covariance of the weighted Brownian bridge, and κ = Π_{i≥2} (1 − λ_i/λ₁)^(−1/2). Then
    P(A > x) ≈ κ · P(χ²₁ > x/λ₁) in the tail (Zolotarev 1961; Anderson, Darling 1952).

    >>> [round(x, 4) for x in weigh_cuts((0.25, 0.5, 0.75))]
    [0.5, 1.3416]
    """
    q = np.asarray(shares)
    spread = np.sqrt(q * (1 - q))
    covariance = (np.minimum.outer(q, q) - np.outer(q, q)) / np.outer(spread, spread) / (len(q) + 1)
    eigenvalues = np.linalg.eigvalsh(covariance)[::-1]
    return float(eigenvalues[0]), float(np.prod((1 - eigenvalues[1:] / eigenvalues[0]) ** -0.5))


@lru_cache(maxsize=1024)
def ad_threshold(shares: tuple[float, ...], budget: float) -> float:
    """The Anderson-Darling statistic that is exceeded with probability budget/2: λ₁ · χ²₁⁻¹((a/2)/κ).

    >>> round(ad_threshold((0.25, 0.5, 0.75), 0.1), 2)
    2.17
    """
    largest, kappa = weigh_cuts(shares)
    return largest * float(chi2.isf(min(budget / 2 / kappa, 1.0), 1))


def number_squares(recent: Numbers, reference: Numbers, pooled: Numbers) -> Numbers:
    """How far cumulative shares F lie from the reference's q, in squares whose mean is about 1/n_eff by chance.

    The lesser of (F − q)² / (p(1 − p)), p the share in both samples together, and 4(asin√F − asin√q)². Where few rows are on one
    side of a cut, the first is too often great because more came, the second because fewer did: each rings many times
    the budget, the lesser keeps it (found by exact sums over both binomials, and by importance sampling over more cells).

    >>> number_squares(np.array([0.5, 0.03]), np.array([0.4, 0.01]), np.array([0.45, 0.02])).round(4).tolist()
    [0.0404, 0.0204]
    """
    variation = pooled * (1 - pooled)
    squares = np.divide((recent - reference) ** 2, variation, out=np.zeros_like(recent), where=variation > 0)
    least: Numbers = np.minimum(
        squares, 4 * (np.arcsin(np.sqrt(recent)) - np.arcsin(np.sqrt(reference))) ** 2
    )
    return least


def level_squares(recent: Numbers, reference: Numbers, pooled: Numbers) -> Numbers:
    """The same for the shares of levels, whose sum is χ² / n_eff: the lesser of (f − g)² / p and 4(√f − √g)².

    >>> level_squares(np.array([0.5, 0.03]), np.array([0.4, 0.01]), np.array([0.45, 0.02])).round(4).tolist()
    [0.0222, 0.02]
    """
    squares = np.divide((recent - reference) ** 2, pooled, out=np.zeros_like(recent), where=pooled > 0)
    least: Numbers = np.minimum(squares, 4 * (np.sqrt(recent) - np.sqrt(reference)) ** 2)
    return least


def level_p_value(
    count: Any, rows: Any, reference_count: Any, reference_rows: Any, effect: Any = 1.0, budget: Any = 1.0
) -> Numbers:
    """How likely two samples of one distribution differ as much in one level: twice the hypergeometric tail.

    With a design effect, as if both samples had that many times fewer rows (Fisher's exact test; Kish 1965). Where the
    likelihood of this very table alone is above the ``budget``, the tail is not summed up: what comes back is above it too.

    >>> round(float(level_p_value(8, 10, 1, 6)), 6)  # 2 · scipy.stats.fisher_exact([[8, 2], [1, 5]], "greater").pvalue
    0.048951
    """
    given = np.broadcast_arrays(count, rows, reference_count, reference_rows, effect, budget)
    x, n, c, m = (np.rint(values / given[4]) for values in given[:4])
    # The tail of the other sample's complement is that of this one: look at the one that has more of the level.
    is_more = x * m >= c * n
    x, n, c, m = (np.where(is_more, *pair) for pair in ((x, c), (n, m), (c, x), (m, n)))
    log_p = _log_choose(n, x) + _log_choose(m, c) - _log_choose(n + m, x + c)
    p: Numbers = np.asarray(2 * np.exp(log_p))
    close = p <= given[5]
    x, n, c, m = (values[close][:, None] for values in (x, n, c, m))
    total, last = np.ones(len(x)), np.ones(len(x))
    i: NDArray[np.float64] = np.arange(64.0)
    while len(x) and (last > 1e-16 * total).any():
        ratios = np.maximum(c - i, 0) * np.maximum(n - x - i, 0) / ((x + i + 1) * (m - c + i + 1))
        products = last[:, None] * ratios.cumprod(axis=1)
        total, last, i = total + products.sum(axis=1), products[:, -1], i + len(i)
    p[close] *= total
    return p.clip(max=1.0)


def _log_choose(n: Numbers, k: Numbers) -> Numbers:
    logarithm: Numbers = -betaln(n - k + 1, k + 1) - np.log1p(n)
    return logarithm


class _Window(Struct, frozen=True):
    """One trailing window: how many batches it is called, and the counts in it."""

    batches: int
    counts: NDArray[np.int64]


class DriftAlarm:
    """Looks for drift in the trailing windows of a ring of batches.

    Each test of a feature in a window may alarm falsely with probability a = 1/(ARL · 2d · windows), so that all together
    do so at most every ARL checks on average, however they depend on each other, as long as rows are independent. It is 2d
    for d features because each has two tests: of its values, and of how many are missing. The design effects that
    stand in for independence where there is none make it an empirical rule, not a theorem.

    >>> rng = np.random.default_rng(1)
    >>> from phoenix_ml.application.statistics.baseline import describe_reference
    >>> from phoenix_ml.domain.features import FeatureRule, FeatureType
    >>> baseline = describe_reference({"x": rng.normal(size=10_000).tolist()}, {"x": FeatureRule(FeatureType.FLOAT)})
    >>> counter, alarm = CellCounter(baseline), DriftAlarm(baseline)
    >>> alarm.check([counter.count({"x": rng.normal(size=1000)})]).verdicts
    {'x': <Verdict.STEADY: 'steady'>}
    >>> alarm.check([counter.count({"x": rng.normal(1.0, size=1000)})]).alarms[0].direction
    'higher'
    """

    def __init__(self, baseline: Baseline, settings: AlarmSettings | None = None) -> None:
        self.baseline = baseline
        self.settings = settings or AlarmSettings()
        self.counter = CellCounter(baseline)
        entries = self.counter.entries
        self._names = [name for name in entries if name not in self.settings.left_out]
        # A feature, and its missing values.
        self.budget = 1 / (self.settings.arl * 2 * max(len(self._names), 1) * len(WINDOWS))
        self._effects = {name: self.settings.effects.get(name, self.settings.effect) for name in self._names}
        of_levels = [n for n in self._names if entries[n].levels is not None]
        numbers = [n for n in self._names if entries[n].levels is None]
        self._constant = [n for n in numbers if entries[n].kind is FeatureKind.CONSTANT]
        self._numeric = [n for n in numbers if entries[n].kind is FeatureKind.NUMERIC and entries[n].present]
        self._by_levels = [n for n in of_levels if entries[n].present]
        self._prepare_numbers()
        self._prepare_levels()
        ends = [self.counter.offsets[n] + len(entries[n].cells) for n in self._names]
        self._missing_at = np.array(ends, dtype=np.int64) + MISSING
        self._spans = [(self.counter.offsets[n], end) for n, end in zip(self._names, ends, strict=True)]

    def check(self, ring: Sequence[CellCounts]) -> DriftCheck:
        """One look at the newest batches, the newest last; those before the last 64 are not looked at."""
        newest = [batch.counts for batch in reversed(ring[-WINDOWS[-1] :])]
        sums = np.cumsum(np.array(newest).reshape(len(newest), self.counter.size), axis=0)
        windows = [_Window(w, sums[w - 1]) for w in WINDOWS if w <= len(newest)]
        return self._look(windows, newest[:2], ring[-1].rows if ring else 0)

    def check_one(self, counts: CellCounts) -> DriftCheck:
        """The same rule for one window of any size."""
        batches = max(1, round(counts.rows / self.settings.batch_rows))
        return self._look([_Window(batches, counts.counts)], [counts.counts], counts.rows)

    def _look(self, windows: Sequence[_Window], newest: Sequence[NDArray[np.int64]], rows: int) -> DriftCheck:
        alarms: dict[str, list[FeatureAlarm]] = {}
        distances: dict[str, float] = {}
        for alarm in self._look_at_numbers(windows, distances):
            alarms.setdefault(alarm.feature, []).append(alarm)
        for alarm in self._look_at_levels(windows, distances):
            alarms.setdefault(alarm.feature, []).append(alarm)
        for name in self._constant:
            if found := self._look_at_constant(name, windows, distances):
                alarms.setdefault(name, []).extend(found)
        missing = self._look_at_missing(windows)
        verdicts = {}
        chosen = []
        for name in self.counter.entries:
            if name not in self._effects:
                verdicts[name] = Verdict.LEFT_OUT
                continue
            told = [_first(of) for of in (alarms.get(name), missing.get(name)) if of]
            chosen += told
            if told:
                verdicts[name] = Verdict.ADVISORY if all(a.is_advisory for a in told) else Verdict.DRIFT
            else:
                verdicts[name] = Verdict.STEADY if name in distances else Verdict.INSUFFICIENT
        return DriftCheck(tuple(chosen), distances, verdicts, self._has_score_moved(newest), rows)

    def _prepare_numbers(self) -> None:
        """All numeric features side by side, those with fewer cells filled up with cuts that weigh nothing."""
        entries = [self.counter.entries[name] for name in self._numeric]
        count, most = len(entries), max((len(entry.cells) for entry in entries), default=1)
        # One position past the counts, where a zero is put, is what the filling counts.
        self._gather = np.full((count, most), self.counter.size, dtype=np.int64)
        self._shares = np.ones((count, most - 1))
        self._weights = np.zeros((count, most - 1))
        self._ad_thresholds = np.full(count, np.inf)
        for i, (name, entry) in enumerate(zip(self._numeric, entries, strict=True)):
            cells = len(entry.cells)
            self._gather[i, :cells] = self.counter.offsets[name] + np.arange(cells)
            q = np.cumsum(entry.cells)[:-1] / entry.present
            self._shares[i, : cells - 1] = q
            inside = (q > 0) & (q < 1)
            if inside.any():
                self._weights[i, : cells - 1][inside] = 1 / (inside.sum() + 1)
                self._ad_thresholds[i] = ad_threshold(tuple(q[inside].tolist()), self.budget)
        self._present = np.array([entry.present for entry in entries], dtype=np.float64)
        self._gates = np.array([self._effects[name] for name in self._numeric])

    def _look_at_numbers(self, windows: Sequence[_Window], distances: dict[str, float]) -> list[FeatureAlarm]:
        if not self._numeric or not windows:
            return []
        cumulated = _gathered(windows, self._gather).cumsum(axis=2)
        n = cumulated[:, :, -1].astype(np.float64)
        recent = cumulated[:, :, :-1] / np.maximum(n, 1)[:, :, None]
        differences = recent - self._shares
        sizes = np.abs(differences)
        d = sizes.max(axis=2, initial=0.0)
        effects, advisory = self._design_effects(windows, self._numeric)
        effective = np.maximum(n * self._present / (n + self._present), 1e-9) / effects
        ks = ks_threshold(self.budget, effective)
        pooled = self._shares + differences * (n / (n + self._present))[:, :, None]
        squares = number_squares(recent, self._shares, np.clip(pooled, 0.0, 1.0))
        ad = effective * (squares * self._weights).sum(axis=2)
        enough = n >= FEWEST_ROWS
        # The filling has a share and a count of one, which is no difference, but only where there are rows.
        matters = enough & (d >= self._gates)
        is_ks = matters & (d >= ks)
        is_ad = matters & (n >= _FEWEST_ROWS_OF_AD) & (ad >= self._ad_thresholds)
        for i, name in enumerate(self._numeric):
            if enough[:, i].any():
                distances[name] = float(d[enough[:, i].argmax(), i])
        alarms = []
        for w, i in np.argwhere(is_ks | is_ad):
            name = self._numeric[i]
            by_ks = bool(is_ks[w, i])
            at = int(sizes[w, i].argmax())
            alarms.append(
                FeatureAlarm(
                    name,
                    self.counter.entries[name].kind,
                    "ks" if by_ks else "ad",
                    windows[w].batches,
                    int(n[w, i]),
                    float(d[w, i] if by_ks else ad[w, i]),
                    float(ks[w, i] if by_ks else self._ad_thresholds[i]),
                    float(d[w, i]),
                    "higher" if differences[w, i, at] < 0 else "lower",
                    design_effect=float(effects[w, i]),
                    is_advisory=bool(advisory[w, i]),
                )
            )
        return alarms

    def _design_effects(
        self, windows: Sequence[_Window], names: Sequence[str], *, of_missing: bool = False
    ) -> tuple[Numbers, NDArray[np.bool_]]:
        """By window and feature: the design effect, and whether the reference is too short to know it."""
        effects = np.ones((len(windows), len(names)))
        advisory = np.zeros(effects.shape, dtype=bool)
        if not self.baseline.is_time_ordered:
            return effects, advisory
        entries = [self.counter.entries[name] for name in names]
        learned = [entry.missing_design_effects if of_missing else entry.design_effects for entry in entries]
        for w, window in enumerate(windows):
            rows = window.batches * self.settings.batch_rows
            for i, of_feature in enumerate(learned):
                effects[w, i], advisory[w, i] = effect_at(of_feature, rows, self.baseline.batch_rows)
        return effects, advisory

    def _prepare_levels(self) -> None:
        """All categories side by side, those with fewer levels filled up with levels that nobody has."""
        entries = [self.counter.entries[name] for name in self._by_levels]
        count, most = len(entries), max((len(entry.cells) for entry in entries), default=1)
        self._level_gather = np.full((count, most), self.counter.size, dtype=np.int64)
        self._level_counts = np.zeros((count, most))
        for i, (name, entry) in enumerate(zip(self._by_levels, entries, strict=True)):
            self._level_gather[i, : len(entry.cells)] = self.counter.offsets[name] + np.arange(
                len(entry.cells)
            )
            self._level_counts[i, : len(entry.cells)] = entry.cells
        self._level_rows = self._level_counts.sum(axis=1)
        self._level_gates = np.array([self._effects[name] for name in self._by_levels])
        # A level is one of two halves; the other is the whole table.
        self._level_budgets = self.budget / 2 / np.array([len(entry.cells) for entry in entries])
        # By degrees of freedom; without any there is nothing to test.
        self._chi2_thresholds = np.append(np.inf, chi2.isf(self.budget / 2, np.arange(1, most)))

    def _look_at_levels(self, windows: Sequence[_Window], distances: dict[str, float]) -> list[FeatureAlarm]:
        if not self._by_levels or not windows:
            return []
        counts = _gathered(windows, self._level_gather)
        n, m = counts.sum(axis=2), self._level_rows
        recent, reference = counts / np.maximum(n, 1)[:, :, None], self._level_counts / m[:, None]
        differences = recent - reference
        sizes = np.abs(differences)
        effects, advisory = self._design_effects(windows, self._by_levels)
        enough = n >= FEWEST_ROWS
        for i, name in enumerate(self._by_levels):
            if enough[:, i].any():
                distances[name] = float(sizes[enough[:, i].argmax(), i].max())
        surprising = self._surprising_levels(counts, n, sizes, effects, enough)
        changed = self._changed_tables(counts, n, sizes, effects, enough)
        alarms = []
        for w, i in sorted(surprising.keys() | changed.keys()):
            name, window = self._by_levels[i], windows[w]
            entry = self.counter.entries[name]
            effect, is_advisory = float(effects[w, i]), bool(advisory[w, i])
            if (w, i) in surprising:
                k, p = surprising[w, i]
                alarms.append(
                    FeatureAlarm(
                        name,
                        entry.kind,
                        "constant" if entry.kind is FeatureKind.CONSTANT else "level",
                        window.batches,
                        int(n[w, i]),
                        p,
                        float(self._level_budgets[i]),
                        float(sizes[w, i, k]),
                        "higher" if differences[w, i, k] > 0 else "lower",
                        [*(entry.levels or ()), "(other)"][k],
                        effect,
                        is_advisory,
                    )
                )
            else:
                statistic, threshold = changed[w, i]
                alarms.append(
                    FeatureAlarm(
                        name,
                        entry.kind,
                        "chi2",
                        window.batches,
                        int(n[w, i]),
                        statistic,
                        threshold,
                        float(sizes[w, i].sum() / 2),
                        design_effect=effect,
                        is_advisory=is_advisory,
                    )
                )
        return alarms

    def _changed_tables(
        self,
        counts: NDArray[np.int64],
        n: NDArray[np.int64],
        sizes: Numbers,
        effects: Numbers,
        enough: NDArray[np.bool_],
    ) -> dict[tuple[int, int], tuple[float, float]]:
        """By window and feature, χ² over the whole table and its threshold, where that is passed."""
        at = np.nonzero(enough & (sizes.sum(axis=2) / 2 >= self._level_gates))
        of, rows, m = counts[at], n[at], self._level_rows[at[1]]
        reference = self._level_counts[at[1]]
        pooled = (of + reference) / (rows + m)[:, None]
        filled = pooled > 0
        freedom = filled.sum(axis=1) - 1
        expected = np.where(filled, pooled, 1.0).min(axis=1) * np.minimum(rows, m) / effects[at]
        squares = level_squares(of / rows[:, None], reference / m[:, None], pooled).sum(axis=1)
        statistics = rows * m / (rows + m) / effects[at] * squares
        is_testable = (freedom > 0) & (expected >= _FEWEST_EXPECTED)
        thresholds = np.where(is_testable, self._chi2_thresholds[freedom], np.inf)
        return {
            (int(at[0][j]), int(at[1][j])): (float(statistics[j]), float(thresholds[j]))
            for j in np.flatnonzero(statistics >= thresholds)
        }

    def _surprising_levels(
        self,
        counts: NDArray[np.int64],
        n: NDArray[np.int64],
        sizes: Numbers,
        effects: Numbers,
        enough: NDArray[np.bool_],
    ) -> dict[tuple[int, int], tuple[int, float]]:
        """By window and feature, the level beyond its budget that changed most, and its p."""
        w, i, k = np.nonzero((sizes >= self._level_gates[:, None]) & enough[:, :, None])
        budgets = self._level_budgets[i]
        p = level_p_value(
            counts[w, i, k], n[w, i], self._level_counts[i, k], self._level_rows[i], effects[w, i], budgets
        )
        found: dict[tuple[int, int], tuple[int, float]] = {}
        beyond = np.flatnonzero(p <= budgets)
        for j in beyond[np.argsort(-sizes[w, i, k][beyond], kind="stable")]:
            found.setdefault((int(w[j]), int(i[j])), (int(k[j]), float(p[j])))
        return found

    def _look_at_constant(
        self, name: str, windows: Sequence[_Window], distances: dict[str, float]
    ) -> list[FeatureAlarm]:
        """The reference has one number: how many values are another?"""
        entry = self.counter.entries[name]
        start = self.counter.offsets[name]
        end = start + len(entry.cells)
        alarms = []
        for window in windows:
            n = int(window.counts[start:end].sum())
            below, above = int(window.counts[end + BELOW]), int(window.counts[end + ABOVE])
            if n < FEWEST_ROWS:
                continue
            share = (below + above) / n
            distances.setdefault(name, share)
            if share < self._effects[name]:
                continue
            p = float(level_p_value(below + above, n, 0, entry.present))
            if p <= self.budget:
                direction: Literal["higher", "lower"] = "higher" if above >= below else "lower"
                alarms.append(
                    FeatureAlarm(
                        name, entry.kind, "constant", window.batches, n, p, self.budget, share, direction
                    )
                )
        return alarms

    def _look_at_missing(self, windows: Sequence[_Window]) -> dict[str, list[FeatureAlarm]]:
        alarms: dict[str, list[FeatureAlarm]] = {}
        if not windows or not self._names:
            return alarms
        present = [[int(window.counts[start:end].sum()) for start, end in self._spans] for window in windows]
        missing = np.array([window.counts[self._missing_at] for window in windows])
        rows = np.array(present) + missing
        entries = [self.counter.entries[name] for name in self._names]
        reference = np.array([entry.missing for entry in entries])
        reference_rows = np.array([entry.missing + entry.present for entry in entries])
        differences = missing / np.maximum(rows, 1) - reference / np.maximum(reference_rows, 1)
        gates = np.array([self._effects[name] for name in self._names])
        at = np.nonzero((np.abs(differences) >= gates) & (rows >= FEWEST_ROWS))
        if not len(at[0]):
            return alarms
        effects, advisory = self._design_effects(windows, self._names, of_missing=True)
        ps = level_p_value(
            missing[at], rows[at], reference[at[1]], reference_rows[at[1]], effects[at], self.budget
        )
        for w, i, p in zip(*at, ps, strict=True):
            if p > self.budget:
                continue
            name, difference = self._names[i], float(differences[w, i])
            alarms.setdefault(name, []).append(
                FeatureAlarm(
                    name,
                    entries[i].kind,
                    "missing",
                    windows[w].batches,
                    int(rows[w, i]),
                    float(p),
                    self.budget,
                    abs(difference),
                    "higher" if difference > 0 else "lower",
                    design_effect=float(effects[w, i]),
                    is_advisory=bool(advisory[w, i]),
                )
            )
        return alarms

    def _has_score_moved(self, newest: Sequence[NDArray[np.int64]]) -> bool:
        name = SCORE if SCORE in self.counter.entries else RESULT
        entry = self.counter.entries.get(name)
        if entry is None or name in self.settings.left_out or not entry.present or len(newest) < 2:
            return False
        start = self.counter.offsets[name]
        return all(
            _distance(entry, counts[start : start + len(entry.cells)]) >= SCORE_MOVED for counts in newest
        )


def _gathered(windows: Sequence[_Window], places: NDArray[np.int64]) -> NDArray[np.int64]:
    """The counts at these places of each window, with a zero at the place past the last."""
    padded = np.zeros((len(windows), len(windows[0].counts) + 1), dtype=np.int64)
    padded[:, :-1] = [window.counts for window in windows]
    return padded[:, places]


def check_schema(
    baseline: Baseline, counts: CellCounts, settings: AlarmSettings | None = None
) -> tuple[SchemaViolation, ...]:
    """What in one batch are no values of the feature: infinite, of another type, or outside of the reference's range.

    Features that are left out are not looked at. Values outside of the range count from a share of ``effect`` on, and where that many of n would
    exceed the extremes of m reference rows by chance less often than once in 10⁶: Π_{i<k} (n − i)/(n + m − i), whatever the
    distribution (Wilks 1942). They are a wrong unit where they are most values, or where the share that counts is
    farther outside than FAR_SPANS times the range: one client of several that sends cents.

    >>> baseline = Baseline(100, {"x": FeatureBaseline(0, cuts=(1.0,), counts=(50, 50), low=0.0, high=2.0)})
    >>> counts = CellCounter(baseline).count({"x": [1000.0] * 300})
    >>> [(found.kind, found.violating) for found in check_schema(baseline, counts)]
    [('unit', 300)]
    """
    settings = settings or AlarmSettings()
    counter = CellCounter(baseline)
    violations = []
    for name, entry in counter.entries.items():
        if name in settings.left_out:
            continue
        start = counter.offsets[name]
        own = counts.counts[start : start + len(entry.cells) + EXTRAS]
        extras = own[len(entry.cells) :]
        values = int(own[: len(entry.cells)].sum())
        rows = values + int(extras[MISSING] + extras[INFINITE] + extras[WRONG_TYPE])
        kinds: list[tuple[Literal["infinite", "type"], int]] = [("infinite", INFINITE), ("type", WRONG_TYPE)]
        violations += [
            SchemaViolation(name, kind, rows, int(extras[which]), entry.low, entry.high)
            for kind, which in kinds
            if extras[which]
        ]
        # The model's own answers have no unit, and a constant has no range to leave but itself.
        if name in (SCORE, RESULT) or entry.kind is FeatureKind.CONSTANT or values < FEWEST_ROWS:
            continue
        effect = settings.effects.get(name, settings.effect)
        outside, enough = int(extras[BELOW] + extras[ABOVE]), effect * values
        if outside >= enough and _log_chance_outside(outside, values, entry.present) < -math.log(1e6):
            is_unit = 2 * outside > values or extras[FAR] >= enough
            kind: Literal["unit", "range"] = "unit" if is_unit else "range"
            violations.append(SchemaViolation(name, kind, rows, outside, entry.low, entry.high))
    return tuple(violations)


def _log_chance_outside(outside: int, values: int, reference: int) -> float:
    """Of either side; half of the values on both is the worst split of them."""
    i = np.arange((outside + 1) // 2)
    return float(np.log((values - i) / (values + reference - i)).sum()) + math.log(2)


def _distance(entry: FeatureBaseline, counts: NDArray[np.int64]) -> float:
    n = int(counts.sum())
    if n < FEWEST_ROWS:
        return 0.0
    differences = counts / n - np.asarray(entry.cells) / entry.present
    if entry.levels is not None:
        return float(np.abs(differences).max())
    return float(np.abs(differences.cumsum()).max())


def _first(alarms: Sequence[FeatureAlarm]) -> FeatureAlarm:
    """The one of the shortest window, which tells of the latest rows; an advisory one only where there is no other."""
    return min(alarms, key=lambda alarm: (alarm.is_advisory, alarm.window))
