"""`phoenix-ml events dead list` and `requeue`, and the roles of `work`, over both roads that events take."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from confluent_kafka import Message
from roads import KafkaRoad, LocalRoad, Road, read_items
from sample_events import outcome, prediction
from servers import HOST, free_port

from phoenix_ml.application.ports import UnreadableEvent
from phoenix_ml.cli import main
from phoenix_ml.domain.events import Event

pytestmark = pytest.mark.system

Run = Callable[..., Result]
REASON = "no such model: [/bold] Ærø"  # what rich would take for markup


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither the environment nor a phoenix.toml of whoever runs the tests."""
    for name in [name for name in os.environ if name.startswith("PHOENIX_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "300")  # so that no line is folded
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def run(data: Path) -> Run:
    """Runs `phoenix-ml ARGUMENTS --data DATA` in this process."""

    def invoke(*arguments: str, code: int = 0) -> Result:
        done = CliRunner().invoke(main, [*arguments, "--data", str(data)])
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        assert done.exit_code == code, done.output
        return done

    return invoke


@pytest.fixture(params=["local", "kafka"])
def road(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, data: Path) -> Road:
    """Each of the two roads, which the commands take by their settings."""
    if request.param == "local":
        return LocalRoad(data)
    url = request.getfixturevalue("kafka_url")
    monkeypatch.setenv("PHOENIX_EVENTS", url)
    return KafkaRoad(url)


def bury(road: Road, events: list[Event]) -> list[str]:
    """Where each of them lay."""
    road.record(events)
    source = road.source()
    items = read_items(source, len(events))
    source.commit()
    letters = road.dead_letters()
    for item in items:
        letters.bury(UnreadableEvent(item.payload, REASON, item.origin))
    return [origin_of(item.origin) for item in items]


def origin_of(origin: object) -> str:
    """How the place begins that a person is shown."""
    return f"{origin.topic()}[{origin.partition()}]@" if isinstance(origin, Message) else "api-0/"


def test_without_letters_a_person_is_told_so(run: Run, road: Road) -> None:
    """An empty table would leave open whether anything was looked at."""
    listed, as_json = run("events", "dead", "list").stdout, run("events", "dead", "list", "--json").stdout
    requeued = run("events", "dead", "requeue").stdout

    assert listed == "there are no dead letters\n"
    assert json.loads(as_json) == {"items": []}
    assert requeued == "0 events on the way to the log again\n"


def test_a_person_reads_when_where_what_and_why(run: Run, road: Road) -> None:
    """That is all there is to find the cause by; and what foreign bytes say is shown as it is."""
    made = prediction()
    (origin,) = bury(road, [made])

    head, row = run("events", "dead", "list").stdout.strip().splitlines()

    assert head.split("  ")[0].strip() == "buried at"
    at, place, event, reason = re.split(r"\s{2,}", row.strip())
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{3})?Z", at)
    assert place.startswith(origin)
    assert (event, reason) == (f"prediction {made.id}", REASON)


def test_a_script_reads_the_event_too(run: Run, road: Road) -> None:
    """To find out which callers are concerned."""
    made = prediction()
    bury(road, [made, outcome(made.id)])

    items = json.loads(run("events", "dead", "list", "--json").stdout)["items"]
    one = json.loads(run("events", "dead", "list", "--limit", "1", "--json").stdout)["items"]

    assert {item["event"]["kind"] for item in items} == {"prediction", "outcome"}
    assert {item["reason"] for item in items} == {REASON}
    assert all(item["payload_bytes"] > 0 for item in items)
    assert one == items[:1]


def test_requeue_says_how_many_and_the_list_is_shorter_by_them(run: Run, road: Road) -> None:
    """A person must see that it worked, and when there is no more to do."""
    made: list[Event] = [prediction() for _ in range(3)]
    bury(road, made)

    first = run("events", "dead", "requeue", "--limit", "2").stdout
    left = json.loads(run("events", "dead", "list", "--json").stdout)["items"]
    second = json.loads(run("events", "dead", "requeue", "--json").stdout)

    assert first == "2 events on the way to the log again\n"
    assert len(left) == 1
    assert second == {"requeued": 1}
    assert run("events", "dead", "list").stdout == "there are no dead letters\n"
    assert len(read_items(road.source(), 3)) == 3


def test_a_kafka_that_is_down_is_said_in_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The letters are there, they only cannot be reached: neither none nor a traceback."""
    address = f"{HOST}:{free_port()}"
    monkeypatch.setenv("PHOENIX_EVENTS", f"kafka://{address}?sasl.password=unspoken")

    done = run("events", "dead", "list", code=1)

    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(f"error events_unavailable kafka://{address} does not answer: ")
    assert "Connection refused" in line
    assert "unspoken" not in done.output


def test_there_is_nowhere_to_ship_to_without_kafka(run: Run) -> None:
    """Whoever starts the role by itself has forgotten the setting: waiting for ever would not tell him."""
    done = run("work", "ship", code=1)

    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error misconfigured there is nowhere to ship to: PHOENIX_EVENTS is local:")
    assert "kafka://" in line


def test_a_scheme_that_is_unknown_does_not_show_the_password(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A typing error in a URL must not print what stands in the rest of it."""
    monkeypatch.setenv("PHOENIX_EVENTS", f"kafak://{HOST}?sasl.password=unspoken")

    done = run("doctor", code=1)

    assert "'kafak' is no known scheme; known are local:, kafka://" in done.stdout
    assert "unspoken" not in done.output
