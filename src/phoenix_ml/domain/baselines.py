"""What a version's predictions are compared with: the reference's distribution, its scores and its quality."""

from enum import StrEnum
from typing import Final, Literal

from msgspec import Struct

# Trailing windows that drift is looked for in, in batches of predictions.
WINDOWS: Final = (1, 2, 4, 8, 16, 32, 64)
# The model's own outputs are watched like features; no feature's name can start with "_".
SCORE: Final = "_score"
RESULT: Final = "_result"


class FeatureKind(StrEnum):
    NUMERIC = "numeric"
    CATEGORICAL = "categorical"
    HIGH_CARDINALITY = "high_cardinality"
    CONSTANT = "constant"


class FeatureBaseline(Struct, frozen=True, omit_defaults=True):
    """One feature's distribution in the reference, as cells or as levels.

    A number's cells are cut at the reference's quantiles: cell i holds what lies in (cuts[i − 1], cuts[i]]. A
    category has its most frequent ``levels``, the rest are ``other``; where the reference's own rows had to choose the
    levels, those rows are not counted, so ``present`` and ``missing`` may be fewer than the reference's. ``low`` and ``high`` are the least and the
    greatest number. ``design_effects`` has one entry a window of WINDOWS, None where the reference is too short to
    learn it; it is empty where the reference has no order in time. ``missing_design_effects`` are those of the
    rate of missing values.
    """

    missing: int
    cuts: tuple[float, ...] | None = None
    counts: tuple[int, ...] = ()
    levels: dict[str, int] | None = None
    other: int = 0
    mean: float | None = None
    std: float | None = None
    low: float | None = None
    high: float | None = None
    design_effects: tuple[float | None, ...] = ()
    missing_design_effects: tuple[float | None, ...] = ()

    @property
    def present(self) -> int:
        """How many of the rows that are counted have a value."""
        return sum(self.counts) + sum((self.levels or {}).values()) + self.other

    @property
    def kind(self) -> FeatureKind:
        if self.levels is not None:
            if len(self.levels) == 1 and not self.other:
                return FeatureKind.CONSTANT
            return FeatureKind.HIGH_CARDINALITY if self.other else FeatureKind.CATEGORICAL
        return FeatureKind.CONSTANT if self.low is not None and self.low == self.high else FeatureKind.NUMERIC

    @property
    def cells(self) -> tuple[int, ...]:
        """The reference's counts in the order in which CellCounts has a sample's: ``other`` ends the levels."""
        return self.counts if self.levels is None else (*self.levels.values(), self.other)


class Calibration(Struct, frozen=True):
    """A probability as a function of the score: straight lines between the knots, level beyond them.

    It is the probability of the label ``positive``, the last of two classes, or, where that is None, that of the
    answer being right.
    """

    positive: str | None
    scores: tuple[float, ...]
    probabilities: tuple[float, ...]


class LossModel(Struct, frozen=True):
    """A regression's absolute error, expected from a row's cells: an intercept, and a summand a feature.

    A feature's cells share its summands in equal parts, in order; the last summand is that of a missing value.
    """

    intercept: float
    summands: dict[str, tuple[float, ...]]


class Quality(Struct, frozen=True, omit_defaults=True):
    """How good answers were, over ``n`` outcomes; None is what the task or the model does not give.

    ``error_rate`` is the share of wrong labels; for a regression the share of absolute errors above the
    ``tolerance``, which is the reference's own 90 % quantile.
    """

    n: int
    error_rate: float
    accuracy: float | None = None
    auc: float | None = None
    log_loss: float | None = None
    brier: float | None = None
    calibration_error: float | None = None
    mae: float | None = None
    rmse: float | None = None
    tolerance: float | None = None


class Estimate(Struct, frozen=True):
    """A metric that was estimated without outcomes, and the standard error of the estimate."""

    metric: Literal["accuracy", "mae"]
    n: int
    value: float
    se: float
    auc: float | None = None


class Baseline(Struct, frozen=True, omit_defaults=True):
    """The reference that a version was registered with; JSON of at most 50 kB at 30 features.

    ``batch_rows`` is the batch of the design effects. ``estimate`` is what the estimator says of the reference
    itself, which later estimates are compared with. ``reference_uri`` is a stored file of the sorted columns
    (``read_reference``), from which exact statistics are computed for people.
    """

    rows: int
    features: dict[str, FeatureBaseline]
    score: FeatureBaseline | None = None
    result: FeatureBaseline | None = None
    calibration: Calibration | None = None
    loss_model: LossModel | None = None
    quality: Quality | None = None
    estimate: Estimate | None = None
    is_time_ordered: bool = False
    batch_rows: int = 1000
    reference_uri: str | None = None
    reference_sha256: str | None = None

    @property
    def watched(self) -> dict[str, FeatureBaseline]:
        """All that is counted: the features, and the model's own outputs under SCORE and RESULT."""
        outputs = {SCORE: self.score, RESULT: self.result}
        return self.features | {name: entry for name, entry in outputs.items() if entry is not None}
