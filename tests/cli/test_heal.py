"""The verbs of healing: what is asked for, what waits, and whose healing is paused."""

import json
from collections.abc import Callable
from pathlib import Path

import onnx_models
import pytest
from click.testing import Result

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
