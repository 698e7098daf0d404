"""Requests are shared out by key: always the same way, in the right shares, and never back and forth."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, chi2_contingency

from phoenix_ml.domain.errors import RoutingInvalid
from phoenix_ml.domain.features import FeatureRule
from phoenix_ml.domain.models import Framework, Metadata, ModelVersion, Signature, Stage, Task
from phoenix_ml.domain.routing import (
    Arm,
    Choice,
    Role,
    Router,
    Routing,
    Strategy,
    check_routing,
    default_routing,
    unit_interval,
)

CHAMPION, CHALLENGER, SHADOW = Role
KEYS = [f"cust_{n}" for n in range(20_000)]
# The keys are fixed, so a share that passes once passes always; this is how odd a good one may look.
ODD = 1e-3

keys = st.text(max_size=40)
shares = st.integers(1, 99)


def a_b(challenger_weight: float, champion_weight: float = 1.0, salt: str = "") -> Routing:
    arms = (Arm("1.0.0", CHAMPION, champion_weight), Arm("2.0.0", CHALLENGER, challenger_weight))
    return Routing(Strategy.AB_TEST, arms, salt)


def version(number: str, stage: Stage = Stage.DEV) -> ModelVersion:
    rules: dict[str, FeatureRule] = {}
    metadata = Metadata(Signature((), ()), (), rules, Task.REGRESSION)
    return ModelVersion("m", number, Framework.ONNX, "file:x", "0" * 64, stage, True, 0, metadata)


# The same key, the same version


@given(key=keys, weights=st.lists(st.floats(0.01, 100), min_size=2, max_size=5), salt=keys)
def test_a_key_stays_with_its_version(key: str, weights: list[float], salt: str) -> None:
    """A customer who sees two answers to one question trusts neither; restarts change nothing."""
    arms = tuple(Arm(f"{n}.0.0", CHALLENGER if n else CHAMPION, weight) for n, weight in enumerate(weights))

    choices = {Router("m", Routing(Strategy.AB_TEST, arms, salt)).choose(key) for _ in range(3)}

    assert len(choices) == 1


def test_choices_are_the_same_in_every_release() -> None:
    """An upgrade in the middle of an experiment must not deal the cards again."""
    # The numbers come from coreutils: b2sum -l 64.
    router = Router("credit-risk", a_b(1.0))

    assert unit_interval("salt", "cust_99") == 0.3922105501059052
    assert [router.choose(f"cust_{n}").version for n in range(6)] == [
        "1.0.0",
        "2.0.0",
        "1.0.0",
        "1.0.0",
        "1.0.0",
        "2.0.0",
    ]


@given(salt=keys, key=keys)
def test_the_unit_interval_leaves_out_one(salt: str, key: str) -> None:
    """At 1.0 a key would fall off the end of the arms."""
    assert 0.0 <= unit_interval(salt, key) < 1.0


@given(champion=shares, challenger=shares, factor=st.sampled_from([0.5, 2.0, 8.0]), key=keys)
def test_only_the_ratio_of_weights_matters(champion: int, challenger: int, factor: float, key: str) -> None:
    """90 and 10 mean the same as 0.9 and 0.1."""
    one = Router("m", a_b(challenger, champion)).choose(key)

    assert Router("m", a_b(challenger * factor, champion * factor)).choose(key).version == one.version


@given(keys)
def test_one_arm_answers_everything(key: str) -> None:
    """The usual case costs no hash."""
    router = Router("m", Routing(Strategy.SINGLE, (Arm("1.0.0", weight=0.1),)))

    assert router.choose(key) == Choice("1.0.0", Strategy.SINGLE, CHAMPION, 1.0)


# Shares


@pytest.mark.parametrize("share", [0.01, 0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("salt", ["", "second"])
def test_a_challenger_gets_its_share(share: float, salt: str) -> None:
    """A canary of 1 % that takes 3 % of the traffic is a risk that nobody took."""
    router = Router("m", a_b(share, 1 - share, salt))

    taken = sum(router.choose(key).role is CHALLENGER for key in KEYS)

    assert binomtest(taken, len(KEYS), share).pvalue > ODD


def test_each_of_several_arms_gets_its_share_and_says_so() -> None:
    """The probability on record is what the analysis weighs the answers by."""
    arms = (Arm("1.0.0", CHAMPION, 5), Arm("2.0.0", CHALLENGER, 3), Arm("3.0.0", CHALLENGER, 2))
    router = Router("m", Routing(Strategy.AB_TEST, arms))
    choices = [router.choose(key) for key in KEYS]

    for arm, share in zip(arms, (0.5, 0.3, 0.2), strict=True):
        own = [choice for choice in choices if choice.version == arm.version]
        assert binomtest(len(own), len(KEYS), share).pvalue > ODD
        assert {choice.probability for choice in own} == {share}
        assert {choice.role for choice in own} == {arm.role}


# A ramp


@given(steps=st.lists(shares, min_size=2, max_size=6, unique=True).map(sorted), key=keys, salt=keys)
def test_a_growing_canary_never_gives_a_key_back(steps: list[int], key: str, salt: str) -> None:
    """Customers move to the new version once, not to and fro at each step of the ramp."""
    answering = [Router("m", a_b(step, 100 - step, salt)).choose(key).role for step in steps]

    for earlier, later in pairwise(answering):
        assert not (earlier is CHALLENGER and later is CHAMPION)


@given(weights=st.lists(shares, min_size=2, max_size=4), factor=st.floats(1.0, 20.0), key=keys)
def test_no_key_goes_back_to_the_champion_while_all_challengers_grow(
    weights: list[int], factor: float, key: str
) -> None:
    """The promise also holds with several challengers."""

    def choice(factor: float) -> Role:
        challengers = (Arm(f"{n + 2}.0.0", CHALLENGER, weight * factor) for n, weight in enumerate(weights))
        return (
            Router("m", Routing(Strategy.AB_TEST, (Arm("1.0.0", CHAMPION, 100), *challengers)))
            .choose(key)
            .role
        )

    assert not (choice(1.0) is CHALLENGER and choice(factor) is CHAMPION)


def test_the_order_of_the_arms_does_not_matter_to_the_champion_s_keys() -> None:
    """Whoever writes the champion last means the same experiment."""
    routing = a_b(0.3, 0.7)
    turned = Routing(routing.strategy, routing.arms[::-1])

    one, other = Router("m", routing), Router("m", turned)

    assert [one.choose(key) for key in KEYS[:500]] == [other.choose(key) for key in KEYS[:500]]


# Independence


@pytest.mark.parametrize(
    ("one", "other"),
    [(("m", "first"), ("m", "second")), (("m", ""), ("n", "")), (("m", ""), ("m", "x"))],
    ids=["salts", "models", "salt and none"],
)
def test_experiments_are_independent(one: tuple[str, str], other: tuple[str, str]) -> None:
    """Else the same unlucky customers would get every challenger, and experiments would explain each other."""
    routers = [Router(model_id, a_b(0.5, 0.5, salt)) for model_id, salt in (one, other)]
    table = [[0, 0], [0, 0]]
    for key in KEYS:
        first, second = (router.choose(key).role is CHALLENGER for router in routers)
        table[first][second] += 1

    assert chi2_contingency(table).pvalue > ODD


# Shadows and pins


def test_a_shadow_answers_nobody() -> None:
    """Its answers are recorded, never returned."""
    arms = (Arm("2.0.0", SHADOW, 9.0), Arm("1.0.0", CHAMPION), Arm("3.0.0", SHADOW))
    router = Router("m", Routing(Strategy.SHADOW, arms))

    assert {router.choose(key).version for key in KEYS[:100]} == {"1.0.0"}
    assert list(router.shadows) == ["2.0.0", "3.0.0"]
    assert router.choose("k").probability == 1.0


@pytest.mark.parametrize(
    ("number", "role"), [("1.0.0", CHAMPION), ("2.0.0", CHALLENGER), ("9.0.0", CHALLENGER)]
)
def test_a_pinned_version_is_marked_as_pinned(number: str, role: Role) -> None:
    """Whoever names the version was not drawn, and must stay out of the experiment's numbers."""
    assert Router("m", a_b(1.0)).pin(number) == Choice(number, Strategy.PINNED, role, 1.0)


# Which routings are allowed


@pytest.mark.parametrize(
    ("strategy", "arms"),
    [
        (Strategy.SINGLE, [CHAMPION]),
        (Strategy.AB_TEST, [CHAMPION, CHALLENGER]),
        (Strategy.AB_TEST, [CHALLENGER, CHAMPION, CHALLENGER]),
        (Strategy.CANARY, [CHAMPION, CHALLENGER]),
        (Strategy.SHADOW, [CHAMPION, SHADOW]),
        (Strategy.SHADOW, [CHAMPION, SHADOW, SHADOW]),
    ],
)
def test_routings_that_can_be_followed_are_allowed(strategy: Strategy, arms: list[Role]) -> None:
    """The documented forms."""
    check_routing(Routing(strategy, tuple(Arm(f"{n}.0.0", role) for n, role in enumerate(arms))))


@pytest.mark.parametrize(
    ("strategy", "arms", "message"),
    [
        (Strategy.PINNED, [CHAMPION], "cannot be set"),
        (Strategy.SINGLE, [], "exactly one arm with the role champion"),
        (Strategy.SINGLE, [CHALLENGER], "exactly one arm with the role champion"),
        (Strategy.SINGLE, [CHAMPION, CHALLENGER], "single takes one arm"),
        (Strategy.SINGLE, [CHAMPION, SHADOW], "single takes one arm"),
        (Strategy.AB_TEST, [CHAMPION], "one or more challengers"),
        (Strategy.AB_TEST, [CHAMPION, CHAMPION], "exactly one arm with the role champion"),
        (Strategy.AB_TEST, [CHAMPION, CHALLENGER, SHADOW], "one or more challengers"),
        (Strategy.CANARY, [CHAMPION, CHALLENGER, CHALLENGER], "a champion and one challenger"),
        (Strategy.CANARY, [CHAMPION, SHADOW], "a champion and one challenger"),
        (Strategy.CANARY, [CHAMPION], "a champion and one challenger"),
        (Strategy.SHADOW, [CHAMPION], "one or more shadows"),
        (Strategy.SHADOW, [CHAMPION, SHADOW, CHALLENGER], "one or more shadows"),
        (Strategy.SHADOW, [SHADOW], "exactly one arm with the role champion"),
    ],
)
def test_a_routing_that_no_strategy_can_follow_says_what_to_change(
    strategy: Strategy, arms: list[Role], message: str
) -> None:
    """It is refused when it is set, not when the first request finds no version."""
    with pytest.raises(RoutingInvalid, match=message) as error:
        check_routing(Routing(strategy, tuple(Arm(f"{n}.0.0", role) for n, role in enumerate(arms))))

    assert error.value.details == {"strategy": strategy}


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_that_is_no_share_is_refused(weight: float) -> None:
    """Zero is how one would hope to pause an arm; leaving it out says so."""
    with pytest.raises(RoutingInvalid, match="weight must be a number above 0"):
        check_routing(a_b(weight))


def test_a_version_in_two_arms_is_refused() -> None:
    """Its answers could be attributed to neither."""
    with pytest.raises(RoutingInvalid, match="in two arms"):
        check_routing(Routing(Strategy.AB_TEST, (Arm("1.0.0"), Arm("1.0.0", CHALLENGER))))


# Without a routing


def test_the_most_trusted_active_version_answers_by_default() -> None:
    """A new version must not take traffic from prod merely by being activated."""
    active = [version("3.0.0"), version("1.0.0", Stage.PROD), version("2.0.0", Stage.STAGING)]

    assert default_routing(active) == Routing(Strategy.SINGLE, (Arm("1.0.0"),))


@pytest.mark.parametrize("stage", Stage)
def test_among_equals_the_highest_version_answers(stage: Stage) -> None:
    """Highest by meaning: 1.10.0 comes after 1.9.0, and a candidate before its release."""
    active = [version(number, stage) for number in ("1.9.0", "1.10.0-rc.1", "1.10.0", "1.2.0")]

    assert default_routing(active) == Routing(Strategy.SINGLE, (Arm("1.10.0"),))


def test_nothing_active_has_no_routing() -> None:
    """The caller gets an error that says so, rather than an arbitrary version."""
    assert default_routing([]) is None
