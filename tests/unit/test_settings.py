"""Settings that mean more than one word."""

import pytest

from phoenix_ml.domain.errors import Misconfigured
from phoenix_ml.settings import fixed_settings, load_settings

KAFKA = "kafka://broker:9092"


@pytest.mark.parametrize(
    ("roles", "events", "expected"),
    [
        ("all", KAFKA, ("ship", "log", "monitor", "alert", "heal")),
        ("all", "local:", ("log", "monitor", "alert", "heal")),
        ("none", KAFKA, ()),
        ("log", "local:", ("log",)),
        ("log, monitor", "local:", ("log", "monitor")),
        ("heal,ship,heal", KAFKA, ("heal", "ship")),
    ],
)
def test_the_background_process_has_the_roles_that_are_named(
    roles: str, events: str, expected: tuple[str, ...]
) -> None:
    """One, some or all; each once, as two of a kind would fight for the same journals."""
    assert fixed_settings(roles=roles, events=events).background_roles == expected


@pytest.mark.parametrize("roles", ["", "log,", "log;monitor", "none,log", "Log"])
def test_roles_that_are_none_are_refused_by_name(roles: str) -> None:
    """The variable is named, and what may stand there."""
    with pytest.raises(Misconfigured, match=r"PHOENIX_ROLES: .*write all, none, or one or more of ship, log"):
        load_settings(roles=roles)
