"""Which rows of an export were made of broken data."""

import pytest

from phoenix_ml.application.broken_data import BrokenData
from phoenix_ml.application.reports import iso_time
from phoenix_ml.application.watched_version import join_periods

CHAMPION = ((str(iso_time(1_000)), iso_time(2_000)), (str(iso_time(9_000)), None))
OTHER = ((str(iso_time(5_000)), iso_time(6_000)),)


@pytest.mark.parametrize(
    ("version", "at_ms", "is_whole"),
    [
        ("1.0.0", 999, True),
        ("1.0.0", 1_000, False),
        ("1.0.0", 2_000, False),
        ("1.0.0", 2_001, True),
        ("1.0.0", 9_001, False),  # it goes on
        # Its own few rows may have told nothing of what the champion was sent by the same callers.
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

    rows = BrokenData(CHAMPION, {"1.1.0": OTHER}).without([row])

    assert rows == ([row] if is_whole else [])


def test_a_defect_that_comes_and_goes_for_months_is_never_forgotten() -> None:
    """The state must stay small, and what was broken three months ago may still be exported."""
    every_day = [(day * 1_000, day * 1_000 + 10) for day in range(500)]

    kept = join_periods([*every_day, (500_000, None)], 100)

    assert len(kept) == 100
    assert kept[-1][1] is None
    for start, end in every_day:
        assert any(first <= start and (last is None or end <= last) for first, last in kept)
