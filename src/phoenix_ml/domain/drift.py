"""What counts as drift, and when a model suffers from it."""

from enum import StrEnum
from typing import Final, Literal

from msgspec import Struct

from phoenix_ml.domain.baselines import RESULT, SCORE

Test = Literal["ks", "chi2"]
Rule = Literal["ks", "ad", "level", "chi2", "missing", "constant", "classic"]

# How far the scores must move, as a Kolmogorov-Smirnov distance, to be evidence that the model suffers.
SCORE_MOVED: Final = 0.1
# A smaller share of broken values changes no distribution by more than chance does.
_FEW_VIOLATING: Final = 0.02


class Verdict(StrEnum):
    """``advisory``: past the threshold at a scale whose design effect the reference is too short to teach."""

    STEADY = "steady"
    DRIFT = "drift"
    ADVISORY = "advisory"
    INSUFFICIENT = "insufficient data"
    LEFT_OUT = "left out"


class FeatureAlarm(Struct, frozen=True):
    """A feature whose distribution changed more than chance explains, and more than the effect that matters.

    ``statistic`` passed ``threshold`` in the last ``window`` batches of ``rows`` values; for the rules ``level`` and
    ``classic`` both are probabilities, and the statistic is the smaller one. ``distance`` is the greatest difference of the
    distributions over cells, or of a level's share, which ``level`` names. ``direction`` is where the values went. ``test``
    made the probability of ``classic``.
    """

    feature: str
    kind: str
    rule: Rule
    window: int
    rows: int
    statistic: float
    threshold: float
    distance: float
    direction: Literal["higher", "lower", ""] = ""
    level: str | None = None
    design_effect: float = 1.0
    is_advisory: bool = False
    test: Test | None = None

    @property
    def explains_drift(self) -> bool:
        """Whether the data is to blame: more values of a feature stay away than in the reference."""
        is_output = self.feature in (SCORE, RESULT)
        return self.rule == "missing" and self.direction == "higher" and not is_output

    @property
    def summary(self) -> str:
        """One line for people."""
        name = {SCORE: "the model's scores", RESULT: "the model's answers"}.get(self.feature, self.feature)
        if self.rule == "missing":
            return f"{name}: missing values changed by {self.distance:.1%} of {self.rows} rows"
        if self.level is not None:
            return f"{name}: the share of {self.level!r} changed by {self.distance:.1%}, {self.rows} rows"
        where = f", {self.direction}" if self.direction else ""
        return f"{name} drifted{where}: distance {self.distance:.3f} over {self.rows} rows"


class SchemaViolation(Struct, frozen=True):
    """Values that are no values of this feature: they blame the data and never retrain.

    ``unit``: most values are outside of the reference's range, as dollars are that come as cents. ``range``: some are.
    """

    feature: str
    kind: Literal["infinite", "type", "unit", "range"]
    rows: int
    violating: int
    low: float | None = None
    high: float | None = None

    @property
    def explains_drift(self) -> bool:
        """Whether drift of the feature, and of what the model makes of it, says nothing beyond the violation.

        A value or two in a batch are told, but explain nothing.
        """
        return self.kind != "range" and self.violating >= _FEW_VIOLATING * self.rows

    @property
    def summary(self) -> str:
        """One line for people."""
        share = f"{self.violating} of {self.rows} values"
        span = f" {self.low:g} to {self.high:g}" if self.low is not None and self.high is not None else ""
        return {
            "infinite": f"{self.feature}: {share} are infinite",
            "type": f"{self.feature}: {share} are of another type",
            "unit": f"{self.feature}: {share} lie outside of the reference's{span}; is it another unit?",
            "range": f"{self.feature}: {share} lie outside of the reference's{span}",
        }[self.kind]


class DriftCheck(Struct, frozen=True):
    """What one look at the ring of batches saw.

    ``distances`` has each feature's distance in the shortest window that had enough values, ``verdicts`` a word a
    feature. ``score_moved``: the scores of the two newest batches each differ by SCORE_MOVED or more.
    """

    alarms: tuple[FeatureAlarm, ...]
    distances: dict[str, float]
    verdicts: dict[str, Verdict]
    score_moved: bool
    rows: int

    @property
    def insufficient(self) -> tuple[str, ...]:
        return tuple(name for name, verdict in self.verdicts.items() if verdict is Verdict.INSUFFICIENT)


class FeatureDrift(Struct, frozen=True):
    """One feature as a person reads it; both distributions are shares of the values over the same cells.

    ``test`` made ``statistic`` (for ``ks`` the distance D) and ``p``; ``p_adjusted`` is Benjamini-Hochberg's over the report.
    ``is_classic_drift`` is what p < 0.05 alone would say. ``psi``, ``jensen_shannon`` and ``wasserstein`` (in standard
    deviations of the reference) are sizes of an effect; they have no p. ``labels`` name the cells.
    """

    feature: str
    kind: str
    verdict: Verdict
    rows: int
    missing: float
    reference_missing: float
    labels: tuple[str, ...]
    shares: tuple[float, ...]
    reference_shares: tuple[float, ...]
    test: Test | None = None
    statistic: float | None = None
    p: float | None = None
    p_adjusted: float | None = None
    is_classic_drift: bool = False
    distance: float | None = None
    psi: float | None = None
    jensen_shannon: float | None = None
    wasserstein: float | None = None
    alarm: FeatureAlarm | None = None
    violations: tuple[SchemaViolation, ...] = ()


class DriftReport(Struct, frozen=True):
    """Recent rows beside the reference. ``notes`` are sentences that a reader must know to judge it."""

    rows: int
    reference_rows: int
    features: tuple[FeatureDrift, ...]
    notes: tuple[str, ...] = ()

    @property
    def drifted(self) -> tuple[str, ...]:
        return tuple(one.feature for one in self.features if one.verdict is Verdict.DRIFT)


class Evidence(Struct, frozen=True):
    """What is known of a version's troubles when somebody asks whether it should be trained again.

    ``drifted`` are the causes of open drift incidents, ``missing`` those that are about missing values only, ``broken`` those of
    open incidents that blame the data (Incident.is_broken_data).
    """

    drifted: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    broken: tuple[str, ...] = ()
    is_drop_confirmed: bool = False
    is_outcome_alarm: bool = False
    score_moved: bool = False


def wants_retraining(evidence: Evidence) -> str | None:
    """Why the version should be trained again; None where it should not.

    Drift alone is no reason: there must be a sign that the model suffers. Broken data is a reason not to: a model
    that is trained on it has learned the defect.

    >>> wants_retraining(Evidence(drifted=("income",), is_drop_confirmed=True))
    'drift and an estimated drop'
    >>> wants_retraining(Evidence(drifted=("income",)))
    >>> wants_retraining(Evidence(is_outcome_alarm=True))
    'outcomes'
    >>> wants_retraining(Evidence(broken=("schema:income:unit",), is_outcome_alarm=True))
    """
    if evidence.broken:
        return None
    if evidence.is_outcome_alarm:
        return "outcomes"
    if set(evidence.drifted) <= set(evidence.missing):
        return None
    if evidence.is_drop_confirmed:
        return "drift and an estimated drop"
    if evidence.score_moved:
        return "drift and moved scores"
    return None
