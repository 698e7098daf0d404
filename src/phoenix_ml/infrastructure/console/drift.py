"""A drift report at the terminal."""

from collections.abc import Sequence
from itertools import pairwise

from rich.markup import escape
from rich.table import Table

from phoenix_ml.domain.drift import DriftReport, FeatureDrift, Verdict

_BARS = " ▁▂▃▄▅▆▇█"
_WIDTH = 16
CLASSIC_LEGEND = "* p < 0.05: what the classical rule alone calls drift, in one of twenty steady features too"
_COLOUR = {
    Verdict.STEADY: "green",
    Verdict.DRIFT: "bold red",
    Verdict.ADVISORY: "yellow",
    Verdict.INSUFFICIENT: "dim",
    Verdict.LEFT_OUT: "dim",
}


def drift_table(report: DriftReport) -> Table:
    """One row a feature, those that drifted first."""
    table = Table(
        "feature", "verdict", "D", "p", "p adj", "PSI", "W1/σ", "missing", "reference", "now", box=None
    )
    if any(one.is_classic_drift for one in report.features):
        table.caption, table.caption_justify = CLASSIC_LEGEND, "left"
    for column in ("D", "p", "p adj", "PSI", "W1/σ", "missing"):
        next(one for one in table.columns if one.header == column).justify = "right"
    for one in sorted(report.features, key=importance):
        before, now = sparklines(one)
        notes = [
            f"{violation.kind}: {violation.violating} of {violation.rows}" for violation in one.violations
        ]
        verdict = ", ".join([str(one.verdict), *notes])
        colour = "bold red" if one.violations else _COLOUR[one.verdict]
        table.add_row(
            escape(one.feature),
            f"[{colour}]{escape(verdict)}[/]",
            _figure(one.distance if one.statistic is None or one.test != "ks" else one.statistic, "{:.3f}"),
            _figure(one.p, "{:.2g}") + ("*" if one.is_classic_drift else ""),
            _figure(one.p_adjusted, "{:.2g}"),
            _figure(one.psi, "{:.3f}"),
            _figure(one.wasserstein, "{:.2f}"),
            f"{one.missing:.1%}",
            f"[dim]{before}[/]",
            now,
        )
    return table


def sparklines(one: FeatureDrift) -> tuple[str, str]:
    """The reference's distribution and the recent one, on the same scale.

    >>> feature = FeatureDrift("x", "numeric", Verdict.DRIFT, 2, 0.0, 0.0, ("a", "b"), (0.0, 1.0), (0.5, 0.5))
    >>> sparklines(feature)
    ('▄▄', ' █')
    """
    before, now = _narrow(one.reference_shares), _narrow(one.shares)
    top = max([*before, *now], default=0.0) or 1.0
    return _line(before, top), _line(now, top)


def _line(shares: Sequence[float], top: float) -> str:
    # What is there at all is seen.
    return "".join(_BARS[max(1, round(8 * share / top))] if share else _BARS[0] for share in shares)


def _narrow(shares: Sequence[float]) -> list[float]:
    """At most so many cells as a column of the table has characters."""
    if len(shares) <= _WIDTH:
        return list(shares)
    bounds = [len(shares) * i // _WIDTH for i in range(_WIDTH + 1)]
    return [sum(shares[low:high]) for low, high in pairwise(bounds)]


def importance(one: FeatureDrift) -> tuple[int, float]:
    """A sort key: what somebody should look at comes first."""
    order = (Verdict.DRIFT, Verdict.ADVISORY, Verdict.STEADY, Verdict.INSUFFICIENT, Verdict.LEFT_OUT)
    return (-1 if one.violations else order.index(one.verdict)), -(one.distance or 0.0)


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
