"""A drift report as one HTML file that needs nothing else: no scripts, no fonts, no network."""

from collections.abc import Sequence
from html import escape

from phoenix_ml.domain.drift import DriftReport, FeatureDrift, Verdict
from phoenix_ml.infrastructure.console.drift import CLASSIC_LEGEND, importance

_STYLE = """
:root { --ink: #1c2430; --soft: #667085; --line: #e4e7ec; --paper: #fff; --card: #fcfcfd;
  --before: #98a2b3; --now: #2563eb; --bad: #c0262d; --warn: #b54708; --good: #067647; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #98a2b3; --line: #2b3340; --paper: #11161d;
  --card: #171d26; --before: #667085; --now: #60a5fa; --bad: #f97066; --warn: #fdb022; --good: #47cd89; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 32px 24px 64px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 18px; margin: 36px 0 12px; }
p, li { color: var(--soft); margin: 4px 0; } b, strong { color: var(--ink); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 7px 10px; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; font-size: 13px; } td.n, th.n { text-align: right; }
.drift { color: var(--bad); font-weight: 600; } .advisory { color: var(--warn); font-weight: 600; }
.steady { color: var(--good); } .other { color: var(--soft); }
.cards { display: grid; gap: 16px; grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 14px 16px; }
.card h3 { margin: 0; font-size: 15px; overflow-wrap: anywhere; } .card p { font-size: 13px; }
svg { display: block; width: 100%; height: auto; margin-top: 8px; } svg text { fill: var(--soft); font-size: 11px; }
.key { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin: 0 5px 0 12px; }
"""
_WIDTH, _HEIGHT, _FOOT = 320.0, 110.0, 18.0
_CLASS = {Verdict.STEADY: "steady", Verdict.DRIFT: "drift", Verdict.ADVISORY: "advisory"}


def drift_page(report: DriftReport, title: str, about: Sequence[str]) -> str:
    """The page; ``about`` are sentences that say of what and when it is."""
    features = sorted(report.features, key=importance)
    drifted = len(report.drifted)
    verdict = f"{drifted} of {len(features)} features drifted" if drifted else "no feature drifted"
    notes = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
    head = "".join(
        f'<th class="{"n" if is_number else ""}">{name}</th>'
        for name, is_number in (
            ("feature", False),
            ("verdict", False),
            ("D", True),
            ("p", True),
            ("p adjusted", True),
            ("PSI", True),
            ("JS", True),
            ("W1/σ", True),
            ("missing", True),
            ("rows", True),
        )
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
{"".join(f"<p>{escape(line)}</p>" for line in about)}
<p><strong>{verdict}</strong>: {report.rows} recent rows beside {report.reference_rows} of the reference.
<span class="key" style="background: var(--before)"></span>reference
<span class="key" style="background: var(--now)"></span>recent</p>
{f"<ul>{notes}</ul>" if notes else ""}
<h2>Features</h2>
<table><thead><tr>{head}</tr></thead><tbody>
{"".join(map(_row, features))}
</tbody></table>
{f"<p>{escape(CLASSIC_LEGEND)}</p>" if any(one.is_classic_drift for one in features) else ""}
<h2>Distributions</h2>
<p>Shares of the rows in each cell. The cells of a number are cut at the reference's quantiles, so that a steady
feature is as flat as the reference.</p>
<div class="cards">
{"".join(map(_card, features))}
</div>
</body>
</html>
"""


def _row(one: FeatureDrift) -> str:
    numbers = (
        (one.statistic if one.test == "ks" else one.distance, "{:.4f}"),
        (one.p, "{:.2g}*" if one.is_classic_drift else "{:.2g}"),
        (one.p_adjusted, "{:.2g}"),
        (one.psi, "{:.4f}"),
        (one.jensen_shannon, "{:.4f}"),
        (one.wasserstein, "{:.3f}"),
        (one.missing, "{:.2%}"),
        (one.rows, "{}"),
    )
    cells = "".join(
        f'<td class="n">{"" if value is None else form.format(value)}</td>' for value, form in numbers
    )
    return f"<tr><td>{escape(one.feature)}</td><td>{_verdict(one)}</td>{cells}</tr>\n"


def _verdict(one: FeatureDrift) -> str:
    words = [f'<span class="{_CLASS.get(one.verdict, "other")}">{one.verdict}</span>']
    words += [f'<span class="drift">{violation.kind}</span>' for violation in one.violations]
    return ", ".join(words)


def _card(one: FeatureDrift) -> str:
    said = []
    if one.alarm is not None:
        where = f", {one.alarm.direction}" if one.alarm.direction else ""
        said.append(f"distance {one.alarm.distance:.3f}{where}")
    said += [f"{v.violating} of {v.rows} values: {v.kind}" for v in one.violations]
    said.append(f"missing {one.missing:.1%}, {one.reference_missing:.1%} in the reference")
    return (
        f'<div class="card"><h3>{escape(one.feature)}</h3><p>{_verdict(one)} · {escape("; ".join(said))}</p>'
        f"{_histogram(one)}</div>\n"
    )


def _histogram(one: FeatureDrift) -> str:
    """Both distributions over the same cells: the reference as grey bars behind, the recent values in front."""
    count = len(one.shares)
    if not count:
        return ""
    top = max([*one.shares, *one.reference_shares]) or 1.0
    step = _WIDTH / count
    bars = []
    for i, (label, before, now) in enumerate(zip(one.labels, one.reference_shares, one.shares, strict=True)):
        said = f"{label}: {now:.1%} now, {before:.1%} in the reference"
        bars.append(
            f"<g><title>{escape(said)}</title>"
            f"{_bar(i * step, step * 0.92, before / top, 'before', 0.55)}"
            f"{_bar(i * step + step * 0.18, step * 0.56, now / top, 'now', 0.9)}</g>"
        )
    first, last = escape(_short(one.labels[0])), escape(_short(one.labels[-1]))
    foot = _HEIGHT + 13
    return (
        f'<svg viewBox="0 0 {_WIDTH:g} {_HEIGHT + _FOOT:g}" role="img" aria-label="{escape(one.feature)}">'
        f"{''.join(bars)}"
        f'<line x1="0" x2="{_WIDTH:g}" y1="{_HEIGHT:g}" y2="{_HEIGHT:g}" stroke="var(--line)"/>'
        f'<text x="0" y="{foot:g}">{first}</text>'
        f'<text x="{_WIDTH:g}" y="{foot:g}" text-anchor="end">{last}</text></svg>'
    )


def _bar(x: float, width: float, share: float, colour: str, opacity: float) -> str:
    height = (_HEIGHT - 4) * share
    return (
        f'<rect x="{x:.2f}" y="{_HEIGHT - height:.2f}" width="{width:.2f}" height="{height:.2f}" '
        f'fill="var(--{colour})" opacity="{opacity}"/>'
    )


def _short(label: str) -> str:
    return label if len(label) <= 22 else f"{label[:21]}…"
