"""Predictions that were made of broken data, as the monitor has seen it: nothing is to be learned from them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Struct

from phoenix_ml.application.export import TIME_COLUMN
from phoenix_ml.application.ports import Monitoring
from phoenix_ml.application.reports import iso_time
from phoenix_ml.application.watch import ModelState
from phoenix_ml.domain.errors import ModelUnknown

# From when until when, as an export has it, where texts are in the order of their instants; None: it goes on.
Period = tuple[str, str | None]


class BrokenData(Struct, frozen=True):
    """The periods ``by_version`` in which its own data was broken, and ``of_all`` those of the champion: whoever sent it
    broken data then has sent it to the others as well, of which fewer rows may have told nothing.
    """

    of_all: tuple[Period, ...] = ()
    by_version: Mapping[str, tuple[Period, ...]] = {}

    def without(self, page: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """The rows of an export that were made of whole data."""
        return [row for row in page if not self._holds(row["_model_version"], row[TIME_COLUMN])]

    def _holds(self, version: str, at: str) -> bool:
        periods = (*self.of_all, *self.by_version.get(version, ()))
        return any(start <= at and (end is None or at <= end) for start, end in periods)


def find_broken_data(monitoring: Monitoring, model_id: str, champion: str) -> BrokenData:
    """What the model's monitor knows by now; nothing where none has seen the model. Raises DatabaseUnavailable."""
    try:
        _, stored = monitoring.state(model_id)
    except ModelUnknown:
        return BrokenData()
    state = msgspec.msgpack.decode(stored, type=ModelState) if stored else ModelState()
    periods = {version: _periods(one.broken) for version, one in state.versions.items() if one.broken}
    return BrokenData(periods.pop(champion, ()), periods)


def _periods(broken: Sequence[tuple[int, int | None]]) -> tuple[Period, ...]:
    return tuple((str(iso_time(start)), iso_time(end)) for start, end in broken)
