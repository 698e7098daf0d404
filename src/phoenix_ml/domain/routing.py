"""Which version answers: strategies as one deterministic choice from (arms, key)."""

from collections.abc import Iterable, Sequence
from enum import StrEnum
from hashlib import blake2b
from typing import Final

from msgspec import Struct

from phoenix_ml.domain.errors import RoutingInvalid
from phoenix_ml.domain.models import ModelVersion, Stage, version_precedence


class Strategy(StrEnum):
    SINGLE = "single"
    AB_TEST = "ab_test"
    CANARY = "canary"
    SHADOW = "shadow"
    # The request named its version; such answers belong to no experiment.
    PINNED = "pinned"


class Role(StrEnum):
    CHAMPION = "champion"
    CHALLENGER = "challenger"
    SHADOW = "shadow"


class Arm(Struct, frozen=True, forbid_unknown_fields=True):
    """One version's part in a routing; only the ratios of the weights matter."""

    version: str
    role: Role = Role.CHAMPION
    weight: float = 1.0


class Routing(Struct, frozen=True, forbid_unknown_fields=True):
    """How a model's requests are shared out. The salt separates experiments from each other."""

    strategy: Strategy
    arms: tuple[Arm, ...]
    salt: str = ""

    @property
    def versions(self) -> tuple[str, ...]:
        return tuple(arm.version for arm in self.arms)


class Choice(Struct, frozen=True):
    """The version that answers, in which role, and with what probability it was chosen."""

    version: str
    strategy: Strategy
    role: Role
    probability: float


def name_choice(error: Exception, choice: Choice) -> None:
    """Notes on the error who was to answer, for who counts it."""
    error.__dict__["choice"] = choice


def choice_of(error: Exception) -> Choice | None:
    """Who was to answer; None where the request failed before that was chosen."""
    choice: Choice | None = error.__dict__.get("choice")
    return choice


def check_routing(routing: Routing) -> None:
    """Raises RoutingInvalid, saying what to change, unless the strategy can follow the arms."""
    strategy, arms = routing.strategy, routing.arms
    roles = [arm.role for arm in arms]
    challengers = roles.count(Role.CHALLENGER)
    shadows = roles.count(Role.SHADOW)
    problem = None
    if strategy is Strategy.PINNED:
        problem = "'pinned' is what a request with a model_version gets; it cannot be set"
    elif len(set(routing.versions)) != len(arms):
        problem = "a version stands in two arms"
    elif roles.count(Role.CHAMPION) != 1:
        problem = f"{strategy} needs exactly one arm with the role champion"
    elif any(not 0 < arm.weight < float("inf") for arm in arms):
        problem = "each weight must be a number above 0; leave an arm out instead of giving it weight 0"
    elif sum(arm.weight for arm in arms) == float("inf"):
        problem = "the weights are too large to be added up; only their ratios matter"
    elif strategy is Strategy.SINGLE and len(arms) != 1:
        problem = "single takes one arm"
    elif strategy is Strategy.AB_TEST and (challengers < 1 or shadows):
        problem = "ab_test takes a champion and one or more challengers"
    elif strategy is Strategy.CANARY and (challengers != 1 or shadows):
        problem = "canary takes a champion and one challenger"
    elif strategy is Strategy.SHADOW and (shadows < 1 or challengers):
        problem = "shadow takes a champion and one or more shadows"
    if problem:
        raise RoutingInvalid(problem, strategy=strategy)


def default_routing(active: Iterable[ModelVersion]) -> Routing | None:
    """The routing of a model that was given none: its most trusted active version answers.

    The highest stage wins, then the highest version, so a new version never takes traffic from a
    ``prod`` one merely by being activated. None where nothing is active.
    """
    stages = list(Stage)
    best = max(active, key=lambda v: (stages.index(v.stage), version_precedence(v.version)), default=None)
    return None if best is None else Routing(Strategy.SINGLE, (Arm(best.version),))


def unit_interval(salt: str, key: str) -> float:
    """A number in [0, 1) that depends on nothing but the salt and the key."""
    digest = blake2b(f"{salt}\0{key}".encode(), digest_size=8).digest()
    # 53 bits: the most that a float holds exactly, so the result never rounds up to 1.0.
    return (int.from_bytes(digest) >> 11) / (1 << 53)


class Router:
    """A routing made ready for requests.

    Challengers hold the low end of the unit interval in the order of the arms, the champion the
    rest. So while the challengers' share grows no key ever goes back to the champion, and with one
    challenger a key moves at most once.
    """

    def __init__(self, model_id: str, routing: Routing) -> None:
        self.routing = routing
        self._salt = f"{model_id}\0{routing.salt}"
        answering = [arm for arm in routing.arms if arm.role is not Role.SHADOW]
        answering.sort(key=lambda arm: arm.role is Role.CHAMPION)
        total = sum(arm.weight for arm in answering)
        self._choices = [
            Choice(arm.version, routing.strategy, arm.role, arm.weight / total) for arm in answering
        ]
        self._bounds: list[float] = []
        reached = 0.0
        for arm in answering:
            reached += arm.weight / total
            self._bounds.append(reached)
        self.shadows: Final[Sequence[str]] = [a.version for a in routing.arms if a.role is Role.SHADOW]
        self._roles = {arm.version: arm.role for arm in routing.arms}

    def choose(self, key: str) -> Choice:
        """The choice for a routing key: the same key and routing give the same version, always."""
        choices = self._choices
        if len(choices) == 1:
            return choices[0]
        u = unit_interval(self._salt, key)
        for choice, bound in zip(choices, self._bounds, strict=True):
            if u < bound:
                return choice
        return choices[-1]

    def pin(self, version: str) -> Choice:
        """The choice of a request that names its version."""
        return Choice(version, Strategy.PINNED, self._roles.get(version, Role.CHALLENGER), 1.0)
