"""Do the outcomes say that the model is worse than it was? Valid at every look."""

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from phoenix_ml.domain.baselines import Quality

ALARM: Final = 1e4
# How many outcomes make one update. The bound on false alarms counts updates, so a greater block has fewer; the
# last outcomes wait in the state until their block is full, so that the result does not depend on how they came.
BLOCK: Final = 100
_ALTERNATIVES: Final = (0.05, 0.15, 0.4)
# The sum in exp() needs more room than the alarm; beyond that nothing changes.
_MOST_LOG: Final = 600.0


def objective(quality: Quality) -> float:
    """The reference's error rate, with the margin of what is not known of it: 2/√m on the scale of Cohen's h.

    >>> round(objective(Quality(n=10_000, error_rate=0.1)), 4)
    0.1061
    """
    return _raise(quality.error_rate, 2 / math.sqrt(quality.n))


class LossDetector(Struct, frozen=True):
    """The Shiryaev-Roberts e-detector on losses in [0, 1] whose mean should be at most p₀.

    After each block of n losses with the sum S: R_t = (1 + R_{t−1}) · (p₁/p₀)^S · ((1 − p₁)/(1 − p₀))^(n − S),
    averaged over alternatives p₁ that lie h = 0.05, 0.15 and 0.4 above p₀ (Cohen's h = 2·asin√p₁ − 2·asin√p₀). While the
    mean is p₀ or less, R_t − t is a supermartingale, so that P(an alarm within T blocks) ≤ T/10⁴, whatever
    the model answers and however often one looks (Shin, Ramdas, Rinaldo, E-detectors, 2023).

    >>> detector = LossDetector.start(0.1)
    >>> detector.update(([0.0] * 9 + [1.0]) * 100).is_alarm, detector.update([1.0, 0.0] * 200).is_alarm
    (False, True)
    """

    p0: float
    log_r: tuple[float, ...]
    outcomes: int = 0
    alarmed_at: int | None = None
    waiting: tuple[float, ...] = ()

    @classmethod
    def start(cls, p0: float) -> "LossDetector":
        if not 0 < p0 < 1:
            raise ValueError(f"the error rate to hold is {p0}; it must lie between 0 and 1")
        return cls(p0, (-math.inf,) * len(_ALTERNATIVES))

    @property
    def evidence(self) -> float:
        """The mean of R over the alternatives; an alarm from 10⁴ on."""
        return sum(math.exp(log_r) for log_r in self.log_r) / len(self.log_r)

    @property
    def is_alarm(self) -> bool:
        return self.alarmed_at is not None

    def update(self, losses: Sequence[float] | NDArray[np.float64]) -> "LossDetector":
        """The state after more losses. Raises ValueError for one outside of [0, 1]."""
        values = np.asarray(losses, dtype=np.float64)
        if not ((values >= 0) & (values <= 1)).all():
            raise ValueError("losses must lie between 0 and 1: scale them first")
        all_losses = np.concatenate([np.asarray(self.waiting, dtype=np.float64), values])
        blocks = len(all_losses) // BLOCK
        sums = all_losses[: blocks * BLOCK].reshape(blocks, BLOCK).sum(axis=1).tolist()
        steps = []
        for h in _ALTERNATIVES:
            p1 = _raise(self.p0, h)
            steps.append((math.log(p1 / self.p0), math.log((1 - p1) / (1 - self.p0))))
        log_r = list(self.log_r)
        alarmed_at = self.alarmed_at
        counted = self.outcomes - len(self.waiting)
        for s in sums:
            counted += BLOCK
            for i, (wrong, right) in enumerate(steps):
                before = log_r[i]
                # log(1 + R), which is R's own logarithm where R is great.
                grown = before if before > 30 else math.log1p(math.exp(before))
                log_r[i] = min(grown + s * wrong + (BLOCK - s) * right, _MOST_LOG)
            if alarmed_at is None and sum(map(math.exp, log_r)) / len(log_r) >= ALARM:
                alarmed_at = counted
        return LossDetector(
            self.p0,
            tuple(log_r),
            self.outcomes + len(values),
            alarmed_at,
            tuple(all_losses[blocks * BLOCK :].tolist()),
        )


def _raise(p: float, h: float) -> float:
    """The probability that lies h above p on the scale of 2·asin√p.

    >>> _raise(0.0, 2.0) < _raise(0.5, 3.0) < 1
    True
    """
    return min(math.sin(min(math.asin(math.sqrt(p)) + h / 2, math.pi / 2)) ** 2, 1 - 1e-9)
