"""The verbs of healing: what is asked for, what waits, and whose healing is paused."""

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import msgspec
import onnx_models
import pytest
from click.testing import Result
from sample_events import AT_MS, outcome, prediction

from phoenix_ml.application.ports import MonitorStep, RecordedEvent
from phoenix_ml.application.reports import iso_time
from phoenix_ml.application.watch import ModelState
from phoenix_ml.application.watched_version import Period, VersionState
from phoenix_ml.bootstrap import bootstrap
from phoenix_ml.domain.events import Event
from phoenix_ml.domain.rows import RowFormat
from phoenix_ml.settings import fixed_settings

Run = Callable[..., str]


@pytest.fixture
def told(run: Callable[..., Result], tmp_path: Path) -> Run:
    """Runs `phoenix-ml ARGUMENTS` where there are two models; what it printed."""
    model = onnx_models.write(tmp_path / "m.onnx", onnx_models.linear_regressor(2))
    for name in ("risk", "price"):
        run("models", "register", model, "--id", name, "--version", "1.0.0")
    return lambda *arguments: run(*arguments).output


def paused(told: Run) -> list[str]:
    names: list[str] = json.loads(told("heal", "status", "--json"))["paused"]
    return sorted(names)


def test_healing_is_paused_and_resumed_for_one_model_or_for_all(told: Run) -> None:
    """What is printed is what holds now: whoever resumes one model of all that are paused wants it to heal."""
    assert "no retraining of risk is asked for" in told("heal", "pause", "risk")
    assert paused(told) == ["risk"]
    assert "retrainings of risk are asked for again" in told("heal", "resume", "risk")
    assert paused(told) == []

    told("heal", "pause", "*")
    assert paused(told) == ["price", "risk"]
    assert "retrainings of risk are asked for again" in told("heal", "resume", "risk")
    assert paused(told) == ["price"]
    assert "by a setting of its own this is not so of: risk" in told("heal", "pause", "*")
    told("heal", "pause", "risk")
    assert paused(told) == ["price", "risk"]


def test_all_may_heal_again_but_those_that_were_paused_by_name(told: Run) -> None:
    """Somebody has had a reason."""
    told("heal", "pause", "risk")
    told("heal", "pause", "*")
    resumed = told("heal", "resume", "*")

    assert "retrainings of any model are asked for again" in resumed
    assert "by a setting of its own this is not so of: risk" in resumed
    assert paused(told) == ["risk"]


def test_the_status_says_whose_healing_is_paused(told: Run) -> None:
    """Else a request that waits looks like a healer that hangs."""
    told("heal", "pause", "risk")

    assert "healing is paused, until heal resume: risk" in told("heal", "status")
    assert "paused" not in told("heal", "status", "--model", "price")


def test_a_retraining_that_is_under_way_is_not_asked_for_twice(told: Run) -> None:
    """Typed twice it is one training."""
    first, second = told("heal", "run", "risk"), told("heal", "run", "risk")

    assert "is asked for: risk 1.0.0" in first
    assert "is asked for already, and requested: risk 1.0.0" in second
    assert first.split()[0] == second.split()[0]
    assert len(json.loads(told("heal", "status", "--json"))["items"]) == 1


def test_the_status_comes_in_pages(told: Run) -> None:
    """A year of retrainings does not fit on a screen."""
    for name in ("risk", "price"):
        told("heal", "run", name)
    whole = json.loads(told("heal", "status", "--json"))["items"]

    first = json.loads(told("heal", "status", "--limit", "1", "--json"))
    second = json.loads(told("heal", "status", "--limit", "1", "--cursor", first["next_cursor"], "--json"))

    assert [*first["items"], *second["items"]] == whole
    assert second["next_cursor"] is None
    assert f"more: --cursor {first['next_cursor']}" in told("heal", "status", "--limit", "1")


def test_an_export_to_train_on_leaves_out_what_was_broken(told: Run, tmp_path: Path) -> None:
    """A pipeline outside gets its data so; whoever exports all decides what to learn."""
    out = tmp_path / "x.csv"
    with closing(bootstrap(fixed_settings(data=tmp_path / "data"))) as phoenix:
        row_format = RowFormat(phoenix.registry.get("risk", "1.0.0").metadata.columns)
        for at_ms in (AT_MS, AT_MS + 10):
            inputs = row_format.pack((1.0, 2.0))
            made = [
                prediction(inputs=inputs, result=1.5, sources="rr", created_at_ms=at_ms) for _ in range(50)
            ]
            events: list[Event] = [*made, *(outcome(one.id, 1.0) for one in made)]
            phoenix.prediction_log.write(
                [RecordedEvent(one, msgspec.msgpack.encode(one), row_format) for one in events]
            )
        was = phoenix.monitoring.standings()["risk"].position
        now = msgspec.structs.replace(was, seq=was.seq + 1)
        state = msgspec.msgpack.encode(ModelState({"1.0.0": VersionState(broken=[Period(AT_MS, AT_MS + 9)])}))
        assert phoenix.monitoring.commit(MonitorStep("risk", was, now, state, AT_MS))

    everything = told("predictions", "export", "--model", "risk", "--with-outcomes", "--out", str(out))
    to_train_on = told("predictions", "export", "--model", "risk", "--for-training", "--out", str(out))

    assert everything.endswith(f"wrote 100 rows to {out}\n")
    assert to_train_on.endswith("left out 50 rows: their data was broken (see incidents list)\n")
    assert {line.split(",")[5] for line in out.read_text().splitlines()[1:]} == {f'"{iso_time(AT_MS + 10)}"'}
