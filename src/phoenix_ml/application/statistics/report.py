"""The drift report: what a person reads. It decides nothing; the verdicts in it are the alarm's."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import jensenshannon
from scipy.stats import chi2_contingency, false_discovery_control, kstwo, wasserstein_distance

from phoenix_ml.application.statistics.alarm import FEWEST_ROWS, AlarmSettings, DriftAlarm, check_schema
from phoenix_ml.application.statistics.cells import MISSING, CellCounter, CellCounts, Column
from phoenix_ml.application.statistics.design_effect import short_reference_note
from phoenix_ml.application.statistics.outputs import output_columns
from phoenix_ml.domain.baselines import SCORE, Baseline, FeatureBaseline
from phoenix_ml.domain.drift import DriftReport, FeatureAlarm, FeatureDrift, Verdict
from phoenix_ml.domain.models import Task
from phoenix_ml.domain.rows import Outputs

Numbers = NDArray[np.float64]
CLASSIC: Final = 0.05
_DECILES: Final = np.arange(1, 10) / 10


def drift_report(
    baseline: Baseline,
    reference: Mapping[str, Numbers] | None,
    columns: Mapping[str, Column],
    *,
    absent: Mapping[str, Sequence[bool] | NDArray[np.bool_]] | None = None,
    outputs: Outputs | None = None,
    task: Task | None = None,
    settings: AlarmSettings | None = None,
) -> DriftReport:
    """Recent rows beside the reference, feature by feature.

    ``reference`` are the sorted columns that ``read_reference`` gives; without them the Kolmogorov-Smirnov distance is that
    over the baseline's cells.

    >>> baseline = Baseline(4, {"city": FeatureBaseline(0, levels={"Oslo": 3, "Lima": 1})})
    >>> found = drift_report(baseline, None, {"city": ["Lima"] * 3 + ["Oslo"]}).features[0]
    >>> found.test, round(found.p, 4), round(found.psi, 4), found.verdict.value
    ('chi2', 0.4795, 0.6778, 'insufficient data')
    """
    alarm = DriftAlarm(baseline, settings)
    counter = alarm.counter
    counts = counter.count(columns, absent=absent, outputs=outputs, task=task)
    check = alarm.check_one(counts)
    by_feature = {found.feature: found for found in check.alarms}
    violations = check_schema(baseline, counts, alarm.settings)
    given: dict[str, Any] = dict(columns)
    if outputs is not None and (score := output_columns(task, outputs)[0]) is not None:
        given[SCORE] = score
    features = []
    for name, entry in counter.entries.items():
        own = counter.cells(counts, name)
        described = _describe(name, entry, own, counter, counts)
        if entry.levels is None:
            recent = _finite(given.get(name, ()), (absent or {}).get(name))
            described |= _compare_numbers(entry, own, (reference or {}).get(name), recent)
        else:
            described |= _compare_levels(entry, own)
        features.append(
            FeatureDrift(
                **described,
                verdict=check.verdicts[name],
                alarm=by_feature.get(name),
                violations=tuple(found for found in violations if found.feature == name),
            )
        )
    return DriftReport(
        counts.rows, baseline.rows, _adjust(features), _notes(baseline, reference, counts, alarm.settings)
    )


def classic_alarms(report: DriftReport) -> tuple[FeatureAlarm, ...]:
    """The classical rule: every p below 0.05 is drift, however many there are and however little it means. Only what
    is left out is not looked at.
    """
    return tuple(
        FeatureAlarm(
            one.feature, one.kind, "classic", 1, one.rows, one.p, CLASSIC, one.distance or 0.0, test=one.test
        )
        for one in report.features
        if one.p is not None and one.p < CLASSIC and one.verdict is not Verdict.LEFT_OUT
    )


def ks_two_sample(reference: Numbers, recent: Numbers) -> tuple[float, float | None]:
    """The Kolmogorov-Smirnov distance of two sorted samples, and how likely one as great is by chance.

    D = max |F − G|; p = P(D_N ≥ D) for one sample of N = round(mn/(m + n)), as scipy.stats.ks_2samp(method="asymp") has it (Hodges
    1958). None where N is 0.

    >>> ks_two_sample(np.array([1.0, 2.0, 3.0, 4.0]), np.array([3.0, 4.0, 5.0, 6.0]))
    (0.5, 0.5)
    """
    m, n = len(reference), len(recent)
    both = np.concatenate([reference, recent])
    below = np.searchsorted(reference, both, side="right") / m
    differences = below - np.searchsorted(recent, both, side="right") / n
    distance = float(np.abs(differences).max())
    return distance, _ks_p(distance, m, n)


def population_stability_index(reference: NDArray[Any], recent: NDArray[Any]) -> float:
    """Σ (p − q) · ln(p / q) over cells, half a row added to each so that an empty one has a logarithm (Siddiqi 2006).

    >>> round(population_stability_index(np.array([50, 50]), np.array([60, 40])), 4)
    0.0397
    """
    q = (reference + 0.5) / (reference.sum() + 0.5 * len(reference))
    p = (recent + 0.5) / (recent.sum() + 0.5 * len(recent))
    return float(((p - q) * np.log(p / q)).sum())


def jensen_shannon_distance(reference: NDArray[Any], recent: NDArray[Any]) -> float:
    """√(½ KL(p‖m) + ½ KL(q‖m)), m = ½(p + q), in bits: from 0 for equal shares to 1 for none in common (Lin 1991).

    >>> round(jensen_shannon_distance(np.array([1, 1]), np.array([1, 0])), 4), jensen_shannon_distance(np.array([1, 0]), np.array([0, 1]))
    (0.5579, 1.0)
    """
    return float(jensenshannon(reference, recent, base=2))


def _ks_p(distance: float, m: int, n: int) -> float | None:
    effective = np.round(m * n / (m + n))
    if not effective:
        return None
    p = float(kstwo.sf(distance, effective))
    return None if math.isnan(p) else min(max(p, 0.0), 1.0)


def _describe(
    name: str, entry: FeatureBaseline, own: NDArray[np.int64], counter: CellCounter, counts: CellCounts
) -> dict[str, Any]:
    missing = counter.aside(counts, name, MISSING)
    present = int(own.sum())
    reference = np.asarray(entry.cells)
    return {
        "feature": name,
        "kind": entry.kind,
        "rows": present,
        "missing": missing / max(missing + present, 1),
        "reference_missing": entry.missing / max(entry.missing + entry.present, 1),
        "labels": _labels(entry),
        "shares": tuple((own / max(present, 1)).tolist()),
        "reference_shares": tuple((reference / max(entry.present, 1)).tolist()),
    }


def _labels(entry: FeatureBaseline) -> tuple[str, ...]:
    if entry.levels is not None:
        return (*entry.levels, "(other)")
    cuts = [f"{cut:.6g}" for cut in entry.cuts or ()]
    if not cuts:
        return ("all",)
    return (f"≤ {cuts[0]}", *(f"{low} – {high}" for low, high in pairwise(cuts)), f"> {cuts[-1]}")


def _finite(column: Any, mask: Any) -> Numbers:
    if not isinstance(column, np.ndarray) or column.dtype.kind not in "fiub":
        column = [v if isinstance(v, int | float) else math.nan for v in column]
    values = np.asarray(column, dtype=np.float64)
    keep = np.isfinite(values)
    if mask is not None:
        keep &= ~np.asarray(mask, dtype=bool)
    return np.sort(values[keep])


def _compare_numbers(
    entry: FeatureBaseline, own: NDArray[np.int64], reference: Numbers | None, recent: Numbers
) -> dict[str, Any]:
    cells = np.asarray(entry.cells)
    if not len(recent) or not entry.present:
        return {}
    found: dict[str, Any] = {"test": "ks", "jensen_shannon": jensen_shannon_distance(cells, own)}
    if reference is None or not len(reference):
        differences = own.cumsum() / own.sum() - cells.cumsum() / entry.present
        distance = float(np.abs(differences).max())
        found |= {
            "statistic": distance,
            "p": _ks_p(distance, entry.present, len(recent)),
            "psi": population_stability_index(cells, own),
        }
    else:
        distance, p = ks_two_sample(reference, recent)
        cuts = np.unique(np.quantile(reference, _DECILES, method="inverted_cdf"))
        both = [
            np.bincount(np.searchsorted(cuts, values, side="left"), minlength=len(cuts) + 1)
            for values in (reference, recent)
        ]
        found |= {"statistic": distance, "p": p, "psi": population_stability_index(both[0], both[1])}
        if entry.std:
            found["wasserstein"] = float(wasserstein_distance(reference, recent)) / entry.std
    found["distance"] = found["statistic"]
    return found


def _compare_levels(entry: FeatureBaseline, own: NDArray[np.int64]) -> dict[str, Any]:
    reference = np.asarray(entry.cells)
    if not own.sum() or not reference.sum():
        return {}
    differences = own / own.sum() - reference / reference.sum()
    # A level that nobody has, such as "other" where all levels are known, is no cell.
    filled = (own + reference) > 0
    found: dict[str, Any] = {
        "jensen_shannon": jensen_shannon_distance(reference, own),
        "psi": population_stability_index(reference[filled], own[filled]),
        "distance": float(np.abs(differences).max()),
    }
    if filled.sum() > 1:
        test = chi2_contingency(np.array([reference[filled], own[filled]]))
        found |= {"test": "chi2", "statistic": float(test.statistic), "p": float(test.pvalue)}
    return found


def _adjust(features: Sequence[FeatureDrift]) -> tuple[FeatureDrift, ...]:
    """With Benjamini-Hochberg's p, over all features that have one (1995)."""
    tested = [i for i, one in enumerate(features) if one.p is not None]
    adjusted = list(features)
    if tested:
        for i, p in zip(tested, false_discovery_control([features[i].p for i in tested]), strict=True):
            adjusted[i] = msgspec.structs.replace(
                features[i], p_adjusted=float(p), is_classic_drift=(features[i].p or 0.0) < CLASSIC
            )
    return tuple(adjusted)


def _notes(
    baseline: Baseline, reference: Mapping[str, Numbers] | None, counts: CellCounts, settings: AlarmSettings
) -> tuple[str, ...]:
    notes = []
    if counts.rows < FEWEST_ROWS:
        notes.append(
            f"{counts.rows} rows are too few to tell: at least {FEWEST_ROWS} are needed for a verdict."
        )
    if baseline.is_time_ordered:
        notes.append(
            "Swings in time are allowed for as far as the reference shows them, if its rows are all the traffic of a time and not a "
            "sample of it: they are learned over rows. The rate of false alarms is an empirical one, not a theorem."
        )
        if (note := short_reference_note(baseline, settings.batch_rows)) is not None:
            notes.append(note)
    else:
        notes.append(
            f"The reference has no order in time. At most one check in {settings.arl:,.0f} alarms falsely, if rows are independent; "
            "swings such as those of day and night look like drift (models register --time)."
        )
    if reference is None:
        notes.append("The reference's rows are not stored: distances are those over the baseline's cells.")
    return tuple(notes)
