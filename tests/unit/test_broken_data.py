"""Which rows of an export were made of broken data."""

import pytest

from phoenix_ml.application.broken_data import BrokenData, broken_data_in
from phoenix_ml.application.reports import iso_time
from phoenix_ml.application.watch import ModelState
from phoenix_ml.application.watched_version import Period, VersionState, join_periods

ALL = (Period(1_000, 2_000), Period(9_000))
ALONE = (Period(5_000, 6_000, is_of_all=False),)


@pytest.mark.parametrize(
    ("version", "at_ms", "is_whole"),
    [
        ("1.0.0", 999, True),
        ("1.0.0", 1_000, False),
        ("1.0.0", 2_000, False),
        ("1.0.0", 2_001, True),
        ("1.0.0", 9_001, False),  # it goes on
        # Its own few rows may have told nothing of what another was sent by the same callers.
        ("1.1.0", 1_500, False),
        ("1.1.0", 5_500, False),
        # One that somebody asks for by its number, with nonsense, takes no row from the others.
        ("1.0.0", 5_500, True),
    ],
)
def test_rows_of_broken_data_are_told_by_their_version_and_time(
    version: str, at_ms: int, is_whole: bool
) -> None:
    """Too few left out, and a model learns what is no data; too many, and there is nothing to learn."""
    row = {"_model_version": version, "_created_at": iso_time(at_ms)}

    rows = BrokenData(ALL, {"1.1.0": ALONE}).without([row])

    assert rows == ([row] if is_whole else [])


def test_a_defect_that_comes_and_goes_for_months_is_never_forgotten() -> None:
    """The state must stay small, and what was broken three months ago may still be exported."""
    every_day = [Period(day * 1_000, day * 1_000 + 10, is_of_all=day % 2 == 0) for day in range(500)]

    kept = join_periods([*every_day, Period(500_000)], 100)

    assert len(kept) == 100
    assert kept[-1].end_ms is None
    for period in every_day:
        assert any(one.holds(period.start_ms) and one.holds(period.start_ms + 10) for one in kept)


def test_what_one_version_was_sent_in_the_routing_counts_for_all_whoever_is_champion_now() -> None:
    """After a promotion the new champion's own rows of that time are among those to train on."""
    with_part, by_number = Period(1_000, 2_000), Period(5_000, 6_000, is_of_all=False)
    state = ModelState({"1.0.0": VersionState(broken=[with_part, by_number]), "1.1.0": VersionState()})

    found = broken_data_in(state)

    assert found == BrokenData((with_part,), {"1.0.0": (by_number,)})
    assert [found.goes_on_at(at_ms) for at_ms in (999, 1_000, 5_500)] == [False, True, False]
