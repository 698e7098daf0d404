"""How much more a reference's blocks differ from each other than independent rows would."""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from phoenix_ml.domain.baselines import WINDOWS, Baseline, FeatureBaseline

FEWEST_BLOCKS = 8
# Of a reference that is shorter than 8 batches, blocks of so large a part of a batch still tell something.
SMALLEST_PART = 0.25
Learned = tuple[float | None, ...]


def design_effects(batches: NDArray[np.int64], *, is_ordered: bool) -> Learned:
    """One design effect a window of WINDOWS, from counts of shape (batches in time order, cells).

    With B blocks of w batches that have a value, F_bk the cumulative share at cut k of block b, q_k that of all and
    n_b its values: s = mean_k Σ_b n_b (F_bk − q_k)² / (q_k(1 − q_k)) / (B − 1), and the effect is
    max(1, s(B − 1) / χ²_0.05(B − 1)), the upper end of a 95 % interval for it, because too small an effect lets a
    season ring the alarm. Levels, which have no order, are compared by their own shares. None where B < 8.

    The ratio of variances is Kish's design effect (L. Kish, Survey Sampling, 1965).

    >>> rows = np.array([[60, 40], [40, 60]] * 8)
    >>> [effect and round(effect, 2) for effect in design_effects(rows, is_ordered=True)[:3]]
    [8.81, 1.0, None]
    """
    # chi2.ppf is twice this; scipy.stats takes a second to import, for which every upload with a reference would wait.
    from scipy.special import gammaincinv

    effects: list[float | None] = []
    for window in WINDOWS:
        whole = len(batches) // window
        counts = batches[: whole * window].reshape(whole, window, batches.shape[1]).sum(axis=1)
        values = counts.sum(axis=1, keepdims=True)
        # A block without a value says nothing of how blocks differ.
        counts, values = counts[values[:, 0] > 0], values[values[:, 0] > 0]
        blocks = len(counts)
        if blocks < FEWEST_BLOCKS:
            effects.append(None)
            continue
        total = counts.sum(axis=0)
        shares, expected = counts / values, total / total.sum()
        if is_ordered:
            shares, expected = shares.cumsum(axis=1)[:, :-1], expected.cumsum()[:-1]
        inside = (expected > 1e-12) & (expected < 1 - 1e-12)
        if not inside.any():
            effects.append(1.0)
            continue
        expected = expected[inside]
        squares = values * (shares[:, inside] - expected) ** 2 / (expected * (1 - expected))
        spread = float(squares.sum(axis=0).mean())
        effects.append(round(max(1.0, spread / float(2 * gammaincinv((blocks - 1) / 2, 0.05))), 4))
    return tuple(effects)


@lru_cache(maxsize=4096)
def effect_at(learned: Learned, rows: int, batch_rows: int) -> tuple[float, bool]:
    """The design effect of a window of so many rows, and whether the reference is too short to know it.

    ``learned`` is that of WINDOWS, in batches of ``batch_rows``. Between two scales the greater effect of both counts;
    beyond the known ones, the greatest that is known. Without order in time, rows count as independent.

    >>> effect_at((1.5, 4.0, None, None, None, None, None), 1500, 1000)
    (4.0, False)
    >>> effect_at((1.5, 4.0, None, None, None, None, None), 4000, 1000)
    (4.0, True)
    """
    if not learned:
        return 1.0, False
    known = [effect for effect in learned if effect is not None]
    for i, window in enumerate(WINDOWS):
        scale = window * batch_rows
        if rows <= scale:
            beside = learned[max(i - 1, 0) : i + 1] if rows < scale else learned[i : i + 1]
            effects = [effect for effect in beside if effect is not None]
            if len(effects) == len(beside):
                return max(effects), False
            break
    return (max(known) if known else 1.0), True


def short_reference_note(baseline: Baseline, batch_rows: int | None = None) -> str | None:
    """Which windows the reference is too short to know, and what would help; None where it knows all, or has no time.

    ``batch_rows`` is the monitor's batch where it is another than the baseline's.

    >>> x = FeatureBaseline(0, cuts=(), counts=(9000,), design_effects=(3.2, *[None] * 6))
    >>> print(short_reference_note(Baseline(9000, {"x": x}, is_time_ordered=True)))
    The reference has 9,000 rows in order of time, too few to know windows of more than 1,000: drift that shows only in those is advisory and opens no incident. 16,000 rows would teach windows of 2,000, 512,000 those of 64,000.
    """
    if not baseline.is_time_ordered:
        return None
    scales = [window * baseline.batch_rows for window in WINDOWS]
    windows = [window * (batch_rows or baseline.batch_rows) for window in WINDOWS]
    known = {
        name: sum(
            not any(effect_at(of, rows, baseline.batch_rows)[1] for of in _learned(entry)) for rows in windows
        )
        for name, entry in baseline.watched.items()
        if entry.present
    }
    most = max(known.values(), default=len(windows))
    fewer = [name for name, count in known.items() if count < most]
    said = []
    if most < len(windows):
        longest = min(windows[-1], scales[-1])
        needed = [FEWEST_BLOCKS * scale for scale in scales if windows[most] <= scale < 2 * longest]
        has = f"The reference has {baseline.rows:,} rows in order of time"
        silent = "is advisory and opens no incident"
        if not most:
            said.append(f"{has}, too few to know how much batches differ: whatever drifts {silent}.")
            least = round(FEWEST_BLOCKS * SMALLEST_PART * baseline.batch_rows)
            said.append(
                f"From {least:,} on great changes are told; without --time, rows count as independent."
            )
        else:
            said.append(
                f"{has}, too few to know windows of more than {windows[most - 1]:,}: drift that shows only in those {silent}."
            )
        if needed:
            said.append(
                f"{needed[0]:,} rows would teach windows of {windows[most]:,}, {needed[-1]:,} those of {longest:,}."
            )
    if fewer:
        said.append(f"Too few blocks have a value of {', '.join(fewer)}: there more is advisory.")
    return " ".join(said) or None


def _learned(entry: FeatureBaseline) -> tuple[Learned, Learned]:
    return entry.design_effects, entry.missing_design_effects
