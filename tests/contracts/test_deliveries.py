"""What waits to be told: the table's contract over SQLite and PostgreSQL, and the attempts that follow from it."""

import dataclasses
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import msgspec
import pytest
from databases import empty
from sample_events import AT_MS
from sqlalchemy import insert, select

from phoenix_ml.application.deliver import Deliverer
from phoenix_ml.application.ports import Delivery, DeliveryFailed
from phoenix_ml.bootstrap import bootstrap
from phoenix_ml.domain.ids import new_id
from phoenix_ml.infrastructure.sql.database import Database
from phoenix_ml.infrastructure.sql.deliveries import SqlDeliveries
from phoenix_ml.infrastructure.sql.schema import deliveries as table
from phoenix_ml.infrastructure.telemetry.metrics import MetricsWriter
from phoenix_ml.processes.alert import AlertRole
from phoenix_ml.settings import load_settings

HOUR_MS = 3_600_000


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    with closing(Database(url)) as database:
        empty(database)
        yield database


@pytest.fixture
def deliveries(database: Database) -> SqlDeliveries:
    return SqlDeliveries(database)


def wait_for(database: Database, channel: str, count: int, kind: str = "alert") -> list[Delivery]:
    """Deliveries as the monitor's commit leaves them, a millisecond apart."""
    made = [Delivery(new_id(), channel, kind, {"title": f"{i}"}, AT_MS + i, 0) for i in range(count)]
    keep_waiting(database, *made)
    return made


def keep_waiting(database: Database, *made: Delivery) -> None:
    with database.write() as connection:
        for one in made:
            row = msgspec.structs.asdict(one)
            row["created_at"] = row["not_before"] = row.pop("created_at_ms")
            connection.execute(insert(table).values(row))


def test_the_oldest_of_a_channel_come_first_and_only_once(
    database: Database, deliveries: SqlDeliveries
) -> None:
    """Two processes that tell the same people must not tell them twice."""
    made = wait_for(database, "log", 3)
    wait_for(database, "chat", 1)

    first = deliveries.take("log", AT_MS + 10, AT_MS + 1000, 2)
    second = deliveries.take("log", AT_MS + 10, AT_MS + 1000, 5)

    assert first == made[:2]
    assert second == made[2:]
    assert deliveries.take("log", AT_MS + 10, AT_MS + 1000, 5) == []


def test_what_a_killed_process_had_in_hand_comes_again(database: Database, deliveries: SqlDeliveries) -> None:
    """A lease ends; an alert that nobody finished must not be lost."""
    (made,) = wait_for(database, "log", 1)
    deliveries.take("log", AT_MS, AT_MS + 1000, 1)

    again = deliveries.take("log", AT_MS + 1000, AT_MS + 2000, 1)

    assert again == [msgspec.structs.replace(made, attempts=1)]


def test_two_takers_at_once_share_what_waits(database: Database, deliveries: SqlDeliveries) -> None:
    """Each is taken by one of them, whoever is faster."""
    made = wait_for(database, "log", 40)
    taken: list[str] = []

    def take_all() -> None:
        while found := deliveries.take("log", AT_MS + 100, AT_MS + HOUR_MS, 3):
            taken.extend(one.id for one in found)

    threads = [threading.Thread(target=take_all) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert sorted(taken) == sorted(one.id for one in made)


class Recorder:
    """A channel that a test fills with what it did, and that fails while it is told to."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.is_down = False
        self.breaks_with: Exception | None = None

    def tell(self, delivery: Delivery) -> None:
        if self.breaks_with is not None:
            raise self.breaks_with
        if self.is_down:
            raise DeliveryFailed("connection refused")
        self.told.append(delivery.payload["title"])

    def close(self) -> None:
        """Nothing is held."""


class Clock:
    now_ms = AT_MS + 10

    def __call__(self) -> int:
        return self.now_ms


@pytest.fixture
def make_deliverer(deliveries: SqlDeliveries) -> Callable[[Recorder, Clock], Deliverer]:
    def make(channel: Recorder, clock: Clock) -> Deliverer:
        return Deliverer(
            deliveries,
            "log",
            channel,
            clock,
            give_up_ms=HOUR_MS,
            most_a_minute=5,
            jitter=lambda: 1.0,
        )

    return make


def test_a_channel_that_is_down_is_asked_ever_more_seldom_and_hears_all_when_it_is_back(
    database: Database, deliveries: SqlDeliveries, make_deliverer: Callable[[Recorder, Clock], Deliverer]
) -> None:
    """Nobody's server is hammered, and nothing is lost."""
    wait_for(database, "log", 1)
    channel, clock = Recorder(), Clock()
    deliverer = make_deliverer(channel, clock)
    channel.is_down = True
    attempts = []
    for _ in range(60):
        if deliverer.step() == (0, 1, 0):
            attempts.append((clock.now_ms - AT_MS - 10) // 1000)
        clock.now_ms += 1000

    channel.is_down = False
    clock.now_ms += 60_000
    told = deliverer.step()

    assert attempts == [0, 2, 6, 14, 30]
    assert (told, channel.told, deliveries.waiting()) == ((1, 0, 0), ["0"], {})


def test_after_the_time_given_it_is_given_up_and_the_next_is_told(
    database: Database, deliveries: SqlDeliveries, make_deliverer: Callable[[Recorder, Clock], Deliverer]
) -> None:
    """An alert of yesterday helps nobody; its error stays on record."""
    wait_for(database, "log", 1)
    channel, clock = Recorder(), Clock()
    channel.is_down = True
    clock.now_ms += HOUR_MS
    deliverer = make_deliverer(channel, clock)

    given_up = deliverer.step()
    clock.now_ms += 100 * HOUR_MS
    after = deliverer.step()

    assert (given_up, after, deliveries.waiting()) == ((0, 0, 1), (0, 0, 0), {})


def test_a_channel_that_breaks_has_failed_and_is_asked_again(
    database: Database,
    deliveries: SqlDeliveries,
    make_deliverer: Callable[[Recorder, Clock], Deliverer],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its library may raise anything: the log beside it must not stop for that, nor the alert be lost."""
    wait_for(database, "log", 1)
    channel, clock = Recorder(), Clock()
    channel.breaks_with = UnicodeError("https://example.com/secret")
    deliverer = make_deliverer(channel, clock)

    broken = deliverer.step()
    with database.read() as connection:
        on_record = connection.execute(select(table.c.error)).scalar_one()
    channel.breaks_with = None
    clock.now_ms += 2000
    told = deliverer.step()

    assert (broken, told, channel.told) == ((0, 1, 0), (1, 0, 0), ["0"])
    assert on_record == "UnicodeError; the log has its traceback"
    assert [(one.message, one.exc_info is not None) for one in caplog.records] == [
        ("channel log has a defect", True)
    ]


def test_a_channel_that_goes_on_breaking_is_given_up(
    database: Database, deliveries: SqlDeliveries, make_deliverer: Callable[[Recorder, Clock], Deliverer]
) -> None:
    """As one that is down."""
    wait_for(database, "log", 1)
    channel, clock = Recorder(), Clock()
    channel.breaks_with = UnicodeError()
    clock.now_ms += HOUR_MS

    assert make_deliverer(channel, clock).step() == (0, 0, 1)
    assert deliveries.waiting() == {}


class BrokenDeliveries(SqlDeliveries):
    """A table that has a defect for the channels, and none for who counts."""

    def take(self, *_: object) -> list[Delivery]:
        raise KeyError("created_at")


def test_a_defect_of_the_role_itself_ends_it_and_says_why(tmp_path: Path) -> None:
    """The process must end and be started again, and not go on with one channel silent."""
    with closing(bootstrap(load_settings(data=tmp_path))) as phoenix:
        phoenix.database.upgrade()
        broken = dataclasses.replace(phoenix, deliveries=BrokenDeliveries(phoenix.database))
        stopping = threading.Event()
        with (
            MetricsWriter(tmp_path / "alert.mmap") as metrics,
            closing(AlertRole(broken, metrics)) as role,
            pytest.raises(KeyError, match="created_at"),
        ):
            role.run(stopping)

    assert stopping.is_set()


def test_no_channel_hears_more_than_its_share_in_a_minute(
    database: Database, make_deliverer: Callable[[Recorder, Clock], Deliverer]
) -> None:
    """A hundred models that drift at once must not ring a phone a hundred times."""
    wait_for(database, "log", 12)
    channel, clock = Recorder(), Clock()
    clock.now_ms += 100
    deliverer = make_deliverer(channel, clock)
    told = []
    for _ in range(4):
        told.append(deliverer.step()[0])
        clock.now_ms += 30_000

    assert told == [5, 0, 5, 0]
    assert channel.told == [str(i) for i in range(10)]
