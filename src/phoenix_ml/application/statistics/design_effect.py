"""How much more a reference's blocks differ from each other than independent rows would."""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from phoenix_ml.domain.baselines import WINDOWS

FEWEST_BLOCKS = 8
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
    from scipy.stats import chi2

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
        effects.append(round(max(1.0, spread / float(chi2.ppf(0.05, blocks - 1))), 4))
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
