"""Predictions that were made of broken data, as the monitor has seen it: nothing is to be learned from them."""

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
from msgspec import Struct

from phoenix_ml.application.export import TIME_COLUMN
from phoenix_ml.application.ports import Monitoring
from phoenix_ml.application.reports import iso_time
from phoenix_ml.application.watch import ModelState
from phoenix_ml.application.watched_version import Period
from phoenix_ml.domain.errors import ModelUnknown


class BrokenData(Struct, frozen=True):
    """The periods ``of_all`` versions, and ``by_version`` those of one that somebody asked for by its number."""

    of_all: tuple[Period, ...] = ()
    by_version: Mapping[str, tuple[Period, ...]] = {}

    def without(self, page: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """The rows of an export that were made of whole data."""
        of_all = _spans(self.of_all)
        alone = {version: _spans(periods) for version, periods in self.by_version.items()}
        return [
            row
            for row in page
            if not any(
                start <= row[TIME_COLUMN] <= end
                for start, end in (*of_all, *alone.get(row["_model_version"], ()))
            )
        ]

    def goes_on_at(self, at_ms: int) -> bool:
        """Whether data that all versions are sent was broken then."""
        return any(period.holds(at_ms) for period in self.of_all)


def find_broken_data(monitoring: Monitoring, model_id: str) -> BrokenData:
    """What the model's monitor knows by now; nothing where none has seen the model. Raises DatabaseUnavailable."""
    try:
        _, stored = monitoring.state(model_id)
    except ModelUnknown:
        return BrokenData()
    return broken_data_in(msgspec.msgpack.decode(stored, type=ModelState)) if stored else BrokenData()


def broken_data_in(state: ModelState) -> BrokenData:
    """What the monitor's state of the model says."""
    periods = [(version, period) for version, one in state.versions.items() for period in one.broken]
    alone: dict[str, tuple[Period, ...]] = {}
    for version, period in periods:
        if not period.is_of_all:
            alone[version] = (*alone.get(version, ()), period)
    return BrokenData(tuple(period for _, period in periods if period.is_of_all), alone)


def _spans(periods: Iterable[Period]) -> list[tuple[str, str]]:
    """As an export has times, where texts are in the order of their instants."""
    return [(str(iso_time(one.start_ms)), iso_time(one.end_ms) or "9999") for one in periods]
