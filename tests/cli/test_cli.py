"""Every verb of `phoenix-ml`, on real adapters: in this process, or as one of its own where that matters."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from stat import S_ISREG
from typing import Any
from uuid import uuid4

import click
import httpx
import pyarrow as pa
import pytest
import zoo
from click.testing import CliRunner, Result
from lanes import ServerLane, ok
from phoenix_server import PhoenixServer
from pyarrow import csv, parquet
from receiver import receiving
from servers import free_port, wait_until

from phoenix_ml.cli import main
from phoenix_ml.domain.features import PackedFeatures, packed_signature
from phoenix_ml.domain.rows import Column, ElementType
from phoenix_ml.infrastructure.features.sqlite import SqliteFeatures
from phoenix_ml.infrastructure.sql.database import Database

pytestmark = pytest.mark.system

Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither the environment nor a phoenix.toml of whoever runs the tests."""
    for name in [name for name in os.environ if name.startswith("PHOENIX_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "300")  # so that no line is folded
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """An empty data folder."""
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


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A regressor: the sum of x_0, x_1 and x_2, weighted 1, 2, 3."""
    return zoo.linear(tmp_path / "model.onnx", [1, 2, 3])


def fails(done: Result, code: str) -> str:
    """The message of a failure: one line on standard error, with its code, without a traceback."""
    assert done.exit_code == 1, done.output
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    found = re.fullmatch(r"error (\w+) (.+)", lines[0])
    assert found is not None, lines[0]
    assert found[1] == code
    assert "Traceback" not in done.output
    return found[2]


def test_an_error_is_one_line_however_narrow_the_terminal_is(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Programs read it line by line, from files too."""
    monkeypatch.setenv("COLUMNS", "40")

    assert len(fails(run("models", "show", "a-model-with-a-long-name", code=1), "model_unknown")) > 40


def test_the_options_of_rich_output_do_not_reach_json(run: Run, model: Path) -> None:
    """A script parses what --json prints, whatever the terminal."""
    printed = run("models", "register", str(model), "--id", "m", "--version", "1.0.0", "--json").stdout

    assert "\x1b" not in printed
    assert json.loads(printed)["id"] == "m"


# Help and usage.


def commands(
    command: click.Command, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command below this one that does something itself."""
    if isinstance(command, click.Group):
        for name, one in command.commands.items():
            yield from commands(one, (*path, name))
    else:
        yield path, command


ALL = dict(commands(main))


def test_the_verbs_of_the_architecture_are_there() -> None:
    """Scripts and documents name them."""
    assert {" ".join(path) for path in ALL} >= {
        "serve",
        "work",
        "db upgrade",
        "doctor",
        "models register",
        "models list",
        "models show",
        "models stage",
        "models activate",
        "models deactivate",
        "models routing",
        "features load",
        "features get",
        "features put",
        "predict",
        "bench",
        "predictions list",
        "predictions show",
        "predictions replay",
        "predictions export",
        "drift check",
        "drift show",
        "incidents list",
        "incidents ack",
        "heal status",
        "heal run",
        "heal pause",
        "heal resume",
        "demo",
    }


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_every_command_helps_with_an_example_of_itself(path: tuple[str, ...]) -> None:
    """An example answers what a list of options leaves open; it must not be one that does not work."""
    done = CliRunner().invoke(main, [*path, "--help"])

    assert done.exit_code == 0
    _, _, text = done.stdout.partition("Example:")
    example = text.strip().splitlines()[0]
    assert f"phoenix-ml {' '.join(path)}" in example
    options = {name for parameter in ALL[path].params for name in parameter.opts}
    assert set(re.findall(r"--[a-z-]+", example)) <= options


@pytest.mark.parametrize(
    "path", [path for path in ALL if path[0] not in {"serve", "work", "demo"}], ids=" ".join
)
def test_every_command_that_prints_data_takes_json(path: tuple[str, ...]) -> None:
    """A script need not remember which of them do."""
    assert any("--json" in parameter.opts for parameter in ALL[path].params)


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["models"],
        ["models", "register"],
        ["models", "register", "there-is-no-such-file.onnx", "--id", "m", "--version", "1.0.0"],
        ["models", "register", __file__, "--id", "m", "--version", "1.0"],
        ["models", "register", __file__, "--id", "a/b", "--version", "1.0.0"],
        ["models", "stage", "m", "1.0.0", "live"],
        ["models", "routing", "m", "1.0.0", "--strategy", "pinned"],
        ["features", "put", "e"],
        ["features", "put", "e", "income"],
        ["features", "put", "e", "=5"],
        ["features", "load", "there-is-no-such-file.csv", "--entity", "id"],
        ["predictions", "list", "--limit", "0"],
        ["predictions", "list", "--limit", "1001"],
        ["work", "dance"],
        ["work"],
        ["serve", "--port", "many"],
        ["serve", "--port", "65536"],
        ["serve", "--grpc-port", "-2"],
        ["work", "log", "--metrics-port", "99999"],
        ["demo", "--port", "99999"],
        ["models", "list", "--data", ""],
        ["models", "routing", "m", "--strategy", "canary"],
        ["models", "routing", "m", "--salt", "s"],
        ["models", "routing", "m", "1.0.0", "--clear"],
        ["predict"],
        ["predict", "m", "--feature", "X_0"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2_and_says_what_is_wrong(arguments: list[str]) -> None:
    """A script tells by it that it is written wrongly, and not that something failed."""
    done = CliRunner().invoke(main, arguments)

    assert done.exit_code == 2
    assert "Usage:" in done.output


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"PHOENIX_PORT": "many"}, "PHOENIX_PORT"),
        ({"PHOENIX_WORKERS": "0"}, "PHOENIX_WORKERS"),
        ({"PHOENIX_HOST": ""}, "PHOENIX_HOST: it is empty"),
        ({"PHOENIX_FEATURES": "redis:/127.0.0.1"}, "write redis://HOST:PORT"),
        ({"PHOENIX_DATABASE": "sqlite://file.db"}, "sqlite:///FILE"),
        ({"PHOENIX_DATABASE": "mysql://x"}, "sqlite, postgresql"),
        ({"PHOENIX_DATABASE": "nonsense"}, "PHOENIX_DATABASE"),
        ({"PHOENIX_FEATURES": "memcached://x"}, "sqlite:, redis://"),
        ({"PHOENIX_EVENTS": "rabbit://x"}, "local:"),
        ({"PHOENIX_ARTIFACTS": "ftp://x"}, "file:"),
        ({"PHOENIX_TRAINER": "cron:x"}, "process:COMMAND"),
        ({"PHOENIX_TRAINER": "process:python {data}"}, "{export}"),
        ({"PHOENIX_TRAINER": "github:me/repo"}, "PHOENIX_TRAINER_TOKEN"),
    ],
    ids=str,
)
def test_a_setting_that_is_wrong_is_named_with_what_would_be_right(
    monkeypatch: pytest.MonkeyPatch, run: Run, settings: dict[str, str], named: str
) -> None:
    """The first thing that goes wrong at every installation."""
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    verb = ["features", "get", "e"] if "PHOENIX_FEATURES" in settings else ["models", "list"]

    assert named in fails(run(*verb, code=1), "misconfigured")


@pytest.mark.parametrize(
    "arguments",
    [
        ["models", "list"],
        ["models", "show", "m"],
        ["models", "activate", "m", "1.0.0"],
        ["models", "monitoring", "m"],
        ["predictions", "list"],
        ["predictions", "list", "--model", "m"],
        ["drift", "show", "m"],
        ["heal", "status"],
        ["features", "get", "e"],
        ["events", "dead", "list"],
    ],
    ids=" ".join,
)
def test_who_looks_in_the_wrong_folder_hears_of_it_and_leaves_nothing_there(
    tmp_path: Path, arguments: list[str]
) -> None:
    """An empty list says that there is nothing, and an empty folder that there was something once."""
    done = CliRunner().invoke(main, arguments)

    assert list(tmp_path.iterdir()) == []
    if done.exit_code:
        assert fails(done, "entity_unknown" if "get" in arguments else "model_unknown").endswith(
            "; looked in phoenix-data of this folder (--data or PHOENIX_DATA say where)"
        )
    elif arguments == ["models", "list"]:
        assert "no model is registered yet in phoenix-data of this folder" in done.stdout


@pytest.mark.parametrize("roles", ["ship", "log,ship"])
def test_serve_that_ships_nowhere_is_refused_at_once(tmp_path: Path, roles: str) -> None:
    """Without Kafka its background process ended five times before the server gave up."""
    done = CliRunner().invoke(main, ["serve", "--roles", roles, "--port", "0"])

    assert "there is nowhere to ship to" in fails(done, "misconfigured")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "advice"),
    [
        (["--roles", "log", "--roles", "monitor"], "with commas between: --roles log,monitor"),
        (["--roles", "log monitor"], "write all, none, or one or more of ship, log"),
        (["--roles", "log,watch"], "write all, none, or one or more of ship, log"),
        (["--roles", "all,log"], "write all, none, or one or more of ship, log"),
        (["--roles", ""], "write all, none, or one or more of ship, log"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_roles_that_are_typed_in_another_way_are_refused_with_what_to_type(
    tmp_path: Path, given: list[str], advice: str
) -> None:
    """A server that drops one of two roles in silence watches nothing."""
    done = CliRunner().invoke(main, ["serve", *given, "--port", "0"])

    assert done.exit_code == 2
    assert advice in " ".join(done.stderr.split())
    assert list(tmp_path.iterdir()) == []


def test_drift_of_what_has_no_baseline_is_refused(run: Run, model: Path, tmp_path: Path) -> None:
    """It would be waited for in vain: no report will ever come."""
    rows = tmp_path / "rows.csv"
    rows.write_text("x_0,x_1,x_2\n1,2,3\n4,5,6\n")
    register = ["models", "register", str(model), "--id", "m", "--version"]
    run(*register, "1.0.0")
    before = run("drift", "show", "m", code=1)
    run(*register, "1.1.0", "--reference", str(rows))

    assert "m 1.0.0 has no baseline" in fails(before, "no_baseline")
    assert "m 1.0.0 has" in fails(run("drift", "show", "m", "--version", "1.0.0", code=1), "no_baseline")
    assert "no report yet" in run("drift", "show", "m").stdout
    assert "no report yet" in run("drift", "show", "m", "--version", "1.1.0").stdout
    fails(run("drift", "show", "m", "--version", "9.9.9", code=1), "version_unknown")


def test_an_empty_variable_names_no_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A script's unset variable would have everything written into the current folder."""
    monkeypatch.setenv("PHOENIX_DATA", "")

    done = CliRunner().invoke(main, ["features", "put", "e", "a=1"])

    assert fails(done, "misconfigured") == "PHOENIX_DATA: it is empty; leave it out for the default"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("features", "hidden", "said"),
    [
        ("foo://x", "nothing", "known are sqlite:, redis://, rediss://"),
        ("redis://127.0.0.1", "redis", "pip install redis hiredis"),
        ("redis://127.0.0.1:port", "nothing", "the feature store's URL is not usable"),
    ],
)
def test_serve_refuses_a_feature_store_that_cannot_be_before_it_starts_a_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, features: str, hidden: str, said: str
) -> None:
    """A process that can never start must not be started again and again."""
    monkeypatch.setenv("PHOENIX_FEATURES", features)
    # A library that is not installed, as the import system sees it.
    program = f"import sys; sys.modules[{hidden!r}] = None; from phoenix_ml.cli import main; main()"

    done = subprocess.run(
        [sys.executable, "-c", program, "serve", "--port", "0"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert done.returncode == 1
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"workers = 2\nport = \n", "phoenix.toml is not TOML: Invalid value (at line 2, column 8)"),
        (b'workers = 2\ndata = "\xff"\n', "phoenix.toml, line 2, is not UTF-8"),
        (b"workres = 2\n", "phoenix.toml: 'workres' is not a setting; did you mean workers?"),
        (b"PHOENIX_PORT = 80\n", "phoenix.toml: 'PHOENIX_PORT' is not a setting; did you mean port"),
        (b"[tool]\nx = 2\n", "phoenix.toml: 'tool' is not a setting; remove it"),
    ],
)
def test_a_phoenix_toml_that_is_wrong_is_named_with_the_place(
    run: Run, tmp_path: Path, content: bytes, said: str
) -> None:
    """It is written by hand."""
    (tmp_path / "phoenix.toml").write_bytes(content)

    message = fails(run("models", "list", code=1), "misconfigured")

    assert said in message
    assert str(tmp_path) in message


def test_a_phoenix_toml_that_may_not_be_read_is_named(run: Run, tmp_path: Path) -> None:
    """Left out, a server would start with other settings than its owner believes."""
    # Root may read anything, but not even root this.
    (tmp_path / "phoenix.toml").symlink_to("/proc/self/mem")

    message = fails(run("models", "list", code=1), "misconfigured")

    assert "phoenix.toml cannot be read" in message


def test_a_variable_that_looks_like_a_misspelt_setting_is_doubted_but_no_error(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A letter too few, and a server runs with the default; other programs have the prefix, too."""
    monkeypatch.setenv("PHOENIX_WORKRES", "2")
    monkeypatch.setenv("PHOENIX_API_KEY", "of another product")

    found = json.loads(run("doctor", "--json").stdout)

    doubts = {finding["check"]: finding["found"] for finding in found}["environment"]
    assert doubts == "warning: PHOENIX_WORKRES is not a setting: is PHOENIX_WORKERS meant?"


@pytest.mark.parametrize(
    "arguments", [("models", "list"), ("features", "put", "e", "a=1"), ("db", "upgrade")]
)
def test_each_command_doubts_a_misspelt_variable_beside_its_answer(
    run: Run, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    """With PHOENIX_DATABSE a command looks into another database than its owner believes."""
    monkeypatch.setenv("PHOENIX_DATABSE", "sqlite:///elsewhere.db")
    monkeypatch.setenv("PHOENIX_API_KEY", "of another product")

    done = run(*arguments, "--json")

    json.loads(done.stdout)
    said = "warning PHOENIX_DATABSE is not a setting and is ignored: is PHOENIX_DATABASE meant?"
    assert done.stderr.splitlines() == [said]


# What is written, and who may read it.


def test_what_a_command_writes_is_for_its_user_alone(run: Run, model: Path, data: Path) -> None:
    """Requests, features and answers are about people, on machines that others use as well."""
    before = os.umask(0o022)
    try:
        run("models", "register", str(model), "--id", "m", "--version", "1.0.0")
        run("features", "put", "cust_1", "income=2100")
        run("doctor")
    finally:
        after = os.umask(before)

    assert for_others(data) == []
    assert (data / "phoenix.db").exists()
    assert (data / "features.db").exists()
    assert after == 0o022


def test_a_data_folder_that_exists_keeps_its_mode(run: Run, data: Path) -> None:
    """Whoever made it may have meant a group to read it."""
    data.mkdir()
    data.chmod(0o750)

    run("models", "list")

    assert data.stat().st_mode & 0o777 == 0o750


def for_others(data: Path) -> list[str]:
    """What others than the owner could read or enter of a data folder; artifacts are behind a folder's door."""
    found = []
    for path in (data, *data.rglob("*")):
        with suppress(FileNotFoundError):  # of a server that runs, and removes what it needs no more
            mode = path.stat().st_mode
            if mode & 0o077 and not (S_ISREG(mode) and path.is_relative_to(data / "artifacts")):
                found.append(str(path))
    return found


# The catalogue.


def test_a_model_lives_its_life_on_the_command_line(run: Run, model: Path, tmp_path: Path) -> None:
    """Everything that HTTP can, without a server."""
    contract = tmp_path / "contract.json"
    contract.write_text(
        '{"a": {"type": "float"}, "b": {"type": "float", "default": null}, "c": {"type": "float"}}'
    )
    reference = tmp_path / "train.csv"
    reference.write_text("a,b,c\n" + "".join(f"{n},{n % 7},{n % 3}\n" for n in range(100)))
    register = ["models", "register", str(model), "--id", "m", "--features", str(contract)]

    first = run(*register, "--version", "1.0.0", "--reference", str(reference), "--activate", "--json")
    run(*register, "--version", "1.1.0", "--stage", "staging", "--task", "regression")
    activated = run("models", "activate", "m", "1.1.0", "--json")
    staged = run("models", "stage", "m", "1.1.0", "prod", "--json")
    listed = run("models", "list", "--json")
    table = run("models", "list")
    shown = run("models", "show", "m", "1.0.0", "--baseline", "--json")
    both = run("models", "show", "m", "--json")
    default = run("models", "routing", "m", "--json")
    routed = run(
        "models", "routing", "m", "1.0.0=90", "1.1.0=10", "--strategy", "canary", "--salt", "s", "--json"
    )
    refused = run("models", "deactivate", "m", "1.1.0", code=1)
    cleared = run("models", "routing", "m", "--clear", "--json")
    deactivated = run("models", "deactivate", "m", "1.1.0", "--json")
    in_words = run("models", "activate", "m", "1.1.0")

    assert json.loads(first.stdout)["is_active"]
    assert json.loads(first.stdout)["has_baseline"]
    assert json.loads(first.stdout)["features"]["b"]["default"] is None
    assert json.loads(activated.stdout)["is_active"]
    assert in_words.stdout == "m 1.1.0  prod  active\n"
    assert json.loads(staged.stdout)["stage"] == "prod"
    assert [one["version"] for one in json.loads(listed.stdout)] == ["1.0.0", "1.1.0"]
    assert re.findall(r"m +(\S+) .* champion \(default\)", table.stdout) == ["1.1.0"]
    assert json.loads(shown.stdout)["baseline"]
    assert [one["version"] for one in json.loads(both.stdout)] == ["1.0.0", "1.1.0"]
    assert json.loads(default.stdout)["is_default"]
    assert json.loads(default.stdout)["routing"]["arms"][0]["version"] == "1.1.0"
    assert json.loads(routed.stdout) == {
        "routing": {
            "strategy": "canary",
            "arms": [
                {"version": "1.0.0", "role": "champion", "weight": 90.0},
                {"version": "1.1.0", "role": "challenger", "weight": 10.0},
            ],
            "salt": "s",
        },
        "is_default": False,
    }
    assert "change the routing first" in fails(refused, "routing_conflict")
    assert json.loads(cleared.stdout)["is_default"]
    assert not json.loads(deactivated.stdout)["is_active"]


def test_people_read_tables(run: Run, model: Path) -> None:
    """The same, without --json."""
    empty = run("models", "list")
    registered = run("models", "register", str(model), "--id", "m", "--version", "1.0.0")
    unrouted = run("models", "routing", "m")
    run("models", "activate", "m", "1.0.0")
    listed = run("models", "list")
    shown = run("models", "show", "m", "1.0.0")
    routed = run("models", "routing", "m", "1.0.0")

    assert "phoenix-ml models register" in empty.stdout
    assert "inactive" in registered.stdout
    assert "phoenix-ml models activate m VERSION" in unrouted.stdout
    assert re.search(r"m +1\.0\.0 +dev +yes", listed.stdout)
    assert re.search(r"x_0 +float +required", shown.stdout)
    assert re.search(r"1\.0\.0 +champion +1", routed.stdout)


def test_shadow_arms_take_their_role_from_the_strategy(run: Run, model: Path) -> None:
    """Nobody types roles that follow from what was said already."""
    for version in ("1.0.0", "1.1.0"):
        run("models", "register", str(model), "--id", "m", "--version", version, "--activate")

    shown = run("models", "routing", "m", "1.0.0", "1.1.0", "--strategy", "shadow", "--json")

    roles = [arm["role"] for arm in json.loads(shown.stdout)["routing"]["arms"]]
    assert roles == ["champion", "shadow"]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["models", "show", "nowhere"], "model_unknown"),
        (["models", "show", "m", "9.9.9"], "version_unknown"),
        (["models", "activate", "nowhere", "1.0.0"], "model_unknown"),
        (["models", "stage", "m", "1.0.0", "prod"], "stage_conflict"),
        (["models", "routing", "nowhere"], "model_unknown"),
        (["models", "routing", "m", "1.0.0=0"], "routing_invalid"),
        (["models", "routing", "m", "1.0.0=nan"], "routing_invalid"),
        (["models", "routing", "m", "1.0.0", "1.0.0"], "routing_invalid"),
        (["models", "routing", "m", "1.0.0"], "version_inactive"),
        (["models", "routing", "m", "7.0.0"], "version_unknown"),
        (["features", "get", "nobody"], "entity_unknown"),
        (["features", "put", "e", "_updated_at=5"], "invalid_field"),
        (["features", "put", "e", "a=99999999999999999999"], "feature_invalid"),
        (["predictions", "show", str(uuid4())], "prediction_unknown"),
        (["predictions", "show", "cust_1"], "invalid_field"),
        (["predictions", "list", "--cursor", "x"], "invalid_field"),
        (["predictions", "list", "--model", "nope"], "model_unknown"),
        (["incidents", "list", "--model", "nope"], "model_unknown"),
        (["alerts", "list", "--model", "nope"], "model_unknown"),
        (["heal", "status", "--model", "nope"], "model_unknown"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_what_fails_is_one_line_with_a_code_and_exits_with_1(
    run: Run, model: Path, arguments: list[str], code: str
) -> None:
    """A person reads the words, a script the code, nobody a traceback."""
    run("models", "register", str(model), "--id", "m", "--version", "1.0.0")

    fails(run(*arguments, code=1), code)


def test_a_file_that_is_no_model_is_refused_and_nothing_is_registered(run: Run, tmp_path: Path) -> None:
    """In the loader's own words."""
    file = tmp_path / "model.onnx"
    file.write_bytes(b"not a model")

    message = fails(
        run("models", "register", str(file), "--id", "m", "--version", "1.0.0", code=1), "model_refused"
    )

    assert "not an ONNX model" in message
    assert json.loads(run("models", "list", "--json").stdout) == []


@pytest.mark.parametrize(
    ("name", "content", "code", "said"),
    [
        (
            "contract.json",
            "{",
            "malformed_body",
            "contract.json is no feature contract, which is a file of JSON",
        ),
        ("rows.parquet", "PAR1\x00", "malformed_body", "rows.parquet is no feature contract"),
        ("contract.json", "[]", "invalid_field", "contract.json: Expected `object`, got `array`"),
        (
            "contract.json",
            '{"a": {"type": "float"}, "b": {"type": "double"}}',
            "invalid_field",
            "contract.json: Invalid enum value 'double' at $['b'].type; it is one of float, integer, boolean, string",
        ),
        ("contract.json", '{"a": {"typ": "float"}}', "invalid_field", "at $['a']; is type meant?"),
        ("contract.json", '{"a": {"type": "float"}}', "model_refused", "takes 3 features, 1 are named"),
    ],
)
def test_a_contract_that_is_wrong_is_refused(
    run: Run, model: Path, tmp_path: Path, name: str, content: str, code: str, said: str
) -> None:
    """A contract is written by hand."""
    contract = tmp_path / name
    contract.write_text(content)

    done = run(
        "models",
        "register",
        str(model),
        "--id",
        "m",
        "--version",
        "1.0.0",
        "--features",
        str(contract),
        code=1,
    )

    assert said in fails(done, code)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("batch_rows=abc", "batch_rows: 'abc' is no value for it: write a number, true or false"),
        ("effects=income", "write FEATURE:NUMBER, such as income:0.05"),
        ("challenger_policy=ab:3", "write shadow, none, or ab:SHARE with a share between 0 and 1"),
    ],
)
def test_a_setting_of_a_model_that_is_no_value_is_refused_in_words(run: Run, setting: str, said: str) -> None:
    """A regular expression tells few people what to type."""
    assert said in fails(run("models", "monitoring", "*", "--set", setting, code=1), "invalid_field")


def test_a_reference_in_order_of_time_that_is_too_short_is_warned_of(
    run: Run, model: Path, tmp_path: Path
) -> None:
    """Otherwise its owner waits in vain for an incident: what drifts is advisory. Times that are no dates are refused."""
    reference = tmp_path / "train.csv"
    rows = [f"{n},{n % 7},{n % 3},{n},{n % 12 + 1}/24/2024\n" for n in range(300)]
    reference.write_text("x_0,x_1,x_2,at,day\n" + "".join(rows))
    register = ["models", "register", str(model), "--id", "m", "--reference", str(reference)]

    warned = run(*register, "--version", "1.0.0", "--time", "at", "--json")
    silent = run(*register, "--version", "1.1.0", "--json")
    refused = run(*register, "--version", "1.2.0", "--time", "day", code=1)

    assert "300 rows in order of time, too few to know" in warned.stderr
    assert "From 2,000 on great changes are told" in warned.stderr
    assert json.loads(warned.stdout)["has_baseline"]
    assert silent.stderr == ""
    assert "'1/24/2024', which is no date of ISO 8601" in fails(refused, "invalid_field")


@pytest.mark.parametrize(("name", "content"), [("train.csv", ""), ("train.txt", "x"), ("train.parquet", "x")])
def test_a_reference_set_that_cannot_be_read_is_refused(
    run: Run, model: Path, tmp_path: Path, name: str, content: str
) -> None:
    """Also one that is not there at all."""
    reference = tmp_path / name
    reference.write_text(content)
    register = ["models", "register", str(model), "--id", "m", "--version", "1.0.0", "--reference"]

    fails(run(*register, str(reference), code=1), "invalid_field")
    fails(run(*register, str(tmp_path / "gone.csv"), code=1), "invalid_field")


# Features.


def test_features_are_put_and_got_in_their_types(run: Run) -> None:
    """What looks like a number is one; everything else is text."""
    written = run(
        "features",
        "put",
        "cust_1",
        "income=2100",
        "rate=0.5",
        "owner=true",
        "city=Zürich",
        "x=null",
        "--json",
    )
    got = json.loads(run("features", "get", "cust_1", "--json").stdout)
    run("features", "put", "cust_1", "rate=null", "city=a=b")
    table = run("features", "get", "cust_1").stdout

    assert json.loads(written.stdout) == {"written": 1}
    assert got["features"] == {"income": 2100, "rate": 0.5, "owner": True, "city": "Zürich"}
    assert set(got["updated_at_ms"]) == set(got["features"])
    assert "rate" not in table
    assert "a=b" in table


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_table_is_loaded_and_its_empty_cells_remove(run: Run, tmp_path: Path, kind: str) -> None:
    """The export of yesterday says "missing" by leaving a cell empty, or by NaN."""
    columns: dict[str, list[Any]] = {
        "customer": ["cust_1", "cust_2", "cust_3"],
        "income": [2100.5, None, float("nan")],
        "age": [30, 40, 50],
        "city": ["Oslo", None, "Lima"],
    }
    file = tmp_path / f"table.{kind}"
    if kind == "parquet":
        parquet.write_table(pa.table(columns), file)
    else:
        file.write_text("customer,income,age,city\ncust_1,2100.5,30,Oslo\ncust_2,,40,\ncust_3,nan,50,Lima\n")
    for entity in ("cust_2", "cust_3"):
        run("features", "put", entity, "income=1", "other=2")

    loaded = run("features", "load", str(file), "--entity", "customer", "--json")

    def stored(entity: str) -> dict[str, Any]:
        features: dict[str, Any] = json.loads(run("features", "get", entity, "--json").stdout)["features"]
        return features

    assert json.loads(loaded.stdout) == {"entities": 3}
    assert stored("cust_1") == {"income": 2100.5, "age": 30, "city": "Oslo"}
    assert stored("cust_2") == {"age": 40, "other": 2}
    assert stored("cust_3") == {"age": 50, "city": "Lima", "other": 2}


def test_features_are_stored_packed_for_active_models(
    run: Run, model: Path, data: Path, tmp_path: Path
) -> None:
    """A prediction then reads the row that the engine takes, for one field in place of one a feature."""
    run("models", "register", str(model), "--id", "m", "--version", "1.0.0", "--activate")
    file = tmp_path / "table.csv"
    file.write_text("id,x_0,x_1,x_2\n7,1.5,2,3\n8,1,,3\n")

    run("features", "load", str(file), "--entity", "id")
    run("features", "put", "9", "x_0=4", "x_1=5", "x_2=6.5")

    signature = packed_signature([Column(f"x_{n}", ElementType.FLOAT32) for n in range(3)])
    assert signature is not None

    async def rows() -> list[object]:
        store = SqliteFeatures(data / "features.db")
        try:
            found = [await store.read_packed(entity, signature) for entity in ("7", "8", "9")]
        finally:
            await store.close()
        return [answer.row if isinstance(answer, PackedFeatures) else None for answer in found]

    assert [struct.pack("<3f", 1.5, 2, 3), None, struct.pack("<3f", 4, 5, 6.5)] == asyncio.run(rows())


def test_features_are_stored_while_the_database_is_down(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The feature store needs no database; that rows are not packed costs speed, not answers."""
    monkeypatch.setenv("PHOENIX_DATABASE", f"postgresql://nobody@127.0.0.1:{free_port()}/none")

    done = run("features", "put", "e", "a=1")

    assert "no rows are packed" in done.stderr
    assert json.loads(run("features", "get", "e", "--json").stdout)["features"] == {"a": 1}


def test_features_that_no_active_model_takes_are_pointed_out(run: Run, model: Path, tmp_path: Path) -> None:
    """They may be for a model to come; misspelt, they would be missed at each prediction."""
    file = tmp_path / "table.csv"
    file.write_text("id,x_0,x_O1,colour\n7,1.5,2,red\n")

    before = run("features", "load", str(file), "--entity", "id")
    run("models", "register", str(model), "--id", "m", "--version", "1.0.0", "--activate")
    after = run("features", "load", str(file), "--entity", "id")
    put = run("features", "put", "7", "x_0=1")

    assert "note" not in before.stderr
    assert "note no active model takes x_O1 (is x_1 meant?), colour" in after.stderr
    assert put.stdout == "1 feature of 7 written\n"
    assert "note" not in put.stderr


def test_numbers_name_entities_too(run: Run, tmp_path: Path) -> None:
    """Most systems number their customers."""
    file = tmp_path / "table.csv"
    file.write_text("id,a\n7,1.5\n8,2.5\n")

    run("features", "load", str(file), "--entity", "id")

    assert json.loads(run("features", "get", "8", "--json").stdout)["features"] == {"a": 2.5}


def test_a_large_table_that_cannot_be_loaded_says_how_far_it_came(run: Run, tmp_path: Path) -> None:
    """It is stored in pieces, and who mends the row has to know what is there already."""
    file = tmp_path / "table.csv"
    rows = [f"{'x' * 100}_{number},{number}.5" for number in range(15_000)]
    rows[12_000] = "cust,inf"
    file.write_text("\n".join(["id,a", *rows]))

    done = run("features", "load", str(file), "--entity", "id", code=1)

    message = " ".join(done.stderr.split())
    assert (
        "feature_invalid row 12001: entity 'cust': 'a' is not a finite number; the 12000 entities" in message
    )
    stored = json.loads(run("features", "get", f"{'x' * 100}_11999", "--json").stdout)
    assert stored["features"] == {"a": 11_999.5}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("t.csv", "id,a\n1,2\n", "no column 'customer'; it has id, a"),
        ("t.csv", "customer,a\n,2\n", "row 1 has no entity id in column 'customer'"),
        ("t.csv", "customer,a\nx,1\ny\0z,2\n", "row 2: entity id 'y\\x00z' is not usable"),
        (
            "t.csv",
            "customer,a\nx,1\ny,2\nz,inf\n",
            "row 3: entity 'z': 'a' is not a finite number; the 2 entities before",
        ),
        ("t.csv", "customer,a\nx,1\ny,2,3\n", "cannot be read"),
        ("t.csv", "", "cannot be read"),
        ("t.parquet", "nonsense", "cannot be read"),
        ("t.xlsx", "x", "must be .csv or .parquet"),
    ],
)
def test_a_table_that_cannot_be_loaded_says_why(
    run: Run, tmp_path: Path, name: str, content: str, said: str
) -> None:
    """With the names it does have, as the mistake is mostly in a name."""
    file = tmp_path / name
    file.write_text(content)

    done = run("features", "load", str(file), "--entity", "customer", code=1)

    assert said in " ".join(done.stderr.split())
    assert re.search("error (invalid_field|feature_invalid)", done.stderr)
    assert "Traceback" not in done.output


# Database and doctor.


def test_an_upgrade_may_be_repeated(run: Run, data: Path) -> None:
    """Every deployment runs it."""
    first, second = run("db", "upgrade"), run("db", "upgrade")

    assert "is at revision" in first.stdout
    assert second.stdout == first.stdout
    assert (data / "phoenix.db").exists()


def test_a_doctor_who_finds_nothing_says_what_was_looked_at(run: Run, model: Path) -> None:
    """Also that the active models load."""
    run("models", "register", str(model), "--id", "m", "--version", "1.0.0", "--activate")

    found = json.loads(run("doctor", "--json").stdout)
    table = run("doctor").stdout

    assert all(finding["ok"] for finding in found)
    by_check = {finding["check"]: finding["found"] for finding in found}
    assert set(by_check) >= {"python", "data folder", "onnx runtime", "feature store", "database", "models"}
    assert by_check["models"] == "registered versions: 1; active: 1, all of those load"
    assert "failed" not in table


def test_a_doctor_who_finds_something_exits_with_1_and_names_it(
    run: Run, data: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One thing that is wrong does not keep the others from being looked at."""
    run("models", "register", str(model), "--id", "m", "--version", "1.0.0", "--activate")
    next((data / "artifacts").rglob("*/*/*")).unlink()
    monkeypatch.setenv("PHOENIX_HOST", "0.0.0.0")
    monkeypatch.setenv("PHOENIX_FEATURES", f"redis://127.0.0.1:{free_port()}/0")

    found = json.loads(run("doctor", "--json", code=1).stdout)
    table = run("doctor", code=1).stdout

    failed = {finding["check"]: finding["found"] for finding in found if not finding["ok"]}
    assert set(failed) == {"address", "feature store", "models"}
    assert "--insecure" in failed["address"]
    assert "redis" in failed["feature store"]
    assert failed["models"].startswith("m 1.0.0: ")
    assert "failed" in table


def test_a_doctor_makes_nothing(run: Run, data: Path) -> None:
    """A look at what is there must not change it, and a fresh machine is no illness."""
    found = json.loads(run("doctor", "--json").stdout)

    by_check = {finding["check"]: finding["found"] for finding in found}
    assert not data.exists()
    assert "is not there yet" in by_check["data folder"]
    assert "features.db is not there yet" in by_check["feature store"]
    assert "artifacts is not there yet" in by_check["artifact store"]
    assert "phoenix.db is not there yet" in by_check["database"]


@pytest.mark.parametrize(
    ("setting", "url", "check"),
    [
        ("PHOENIX_DATABASE", "sqlite:////proc/x.db", "database"),
        ("PHOENIX_DATABASE", "sqlite:///{file}/x.db", "database"),
        ("PHOENIX_FEATURES", "sqlite:/proc/f.db", "feature store"),
        ("PHOENIX_FEATURES", "sqlite:{file}/f.db", "feature store"),
        ("PHOENIX_ARTIFACTS", "file:/proc/art", "artifact store"),
        ("PHOENIX_ARTIFACTS", "file:{file}", "artifact store"),
        ("PHOENIX_ARTIFACTS", "s3://bucket", "artifact store"),
    ],
)
def test_a_doctor_tries_whether_what_is_not_there_could_be_made(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, url: str, check: str
) -> None:
    """A server that is said to be well and then cannot start has had no doctor."""
    file = tmp_path / "a file"
    file.touch()
    monkeypatch.setenv(setting, url.format(file=file))

    found = json.loads(run("doctor", "--json", code=1).stdout)

    assert [finding["check"] for finding in found if not finding["ok"]] == [check]
    assert [path.name for path in tmp_path.iterdir()] == ["a file"]


@pytest.mark.parametrize("arguments", [("doctor", "--json"), ("models", "list"), ("predictions", "list")])
def test_only_an_upgrade_that_is_asked_for_changes_the_tables_of_an_older_version(
    run: Run, data: Path, arguments: tuple[str, ...]
) -> None:
    """Processes of the older version may be serving it at that moment."""
    run("db", "upgrade")
    with closing(Database(f"sqlite:///{data / 'phoenix.db'}")) as database:
        with database.write() as connection:
            connection.exec_driver_sql("UPDATE alembic_version SET version_num = '0000'")
        refusal = run(*arguments, code=1)
        with database.read() as connection:
            revision = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()

    assert "at schema 0000" in refusal.output
    assert "run 'phoenix-ml db upgrade'" in refusal.output
    assert revision == "0000"


def test_a_doctor_in_front_of_a_damaged_database_says_so(run: Run, data: Path) -> None:
    """A diagnosis that ends in a traceback is none."""
    data.mkdir()
    (data / "phoenix.db").write_bytes(b"this is no database" * 100)

    found = json.loads(run("doctor", "--json", code=1).stdout)

    failed = {finding["check"]: finding["found"] for finding in found if not finding["ok"]}
    assert set(failed) == {"database"}
    assert "phoenix.db" in failed["database"]


# With a server.


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PhoenixServer]:
    """A running server with the model `abc`."""
    folder = tmp_path_factory.mktemp("served")
    phoenix = PhoenixServer(folder)
    phoenix.register(zoo.linear(folder / "abc.onnx", [1, 2, 3]), "abc", "1.0.0", contract=zoo.ABC)
    phoenix.register(zoo.classifier(folder / "signs.onnx"), "signs", "1.0.0")
    with phoenix:
        yield phoenix


def on(server: PhoenixServer, *arguments: str) -> Result:
    """`phoenix-ml ARGUMENTS` in this process, on the server's data or against its URL."""
    where = ["--url", server.url] if arguments[0] == "predict" else ["--data", str(server.data)]
    return CliRunner().invoke(main, [*arguments, *where])


def test_predictions_are_asked_for_listed_and_shown(server: PhoenixServer) -> None:
    """From the answer to its row in the log."""
    put = on(server, "features", "put", "cust_1", "a=1", "b=1")
    asked = on(server, "predict", "abc", "--entity", "cust_1", "--feature", "c=2", "--json")
    read = on(server, "predict", "signs", "--feature", "x=3")
    answer = json.loads(asked.stdout)
    stranger = str(uuid4())
    lane = ServerLane(server.url)
    ok(lane.request("POST", "/feedback", json={"prediction_id": stranger, "outcome": "lost"}), 202)
    lane.close()
    wait_until(
        lambda: (
            on(server, "predictions", "show", answer["prediction_id"]).exit_code == 0
            and stranger in on(server, "predictions", "unmatched").stdout
        ),
        60,
        "prediction and outcome are logged",
    )

    shown = json.loads(on(server, "predictions", "show", answer["prediction_id"], "--json").stdout)
    listed = json.loads(
        on(server, "predictions", "list", "--entity", "cust_1", "--model", "abc", "--json").stdout
    )
    table = on(server, "predictions", "list", "--limit", "1")
    unmatched = json.loads(on(server, "predictions", "unmatched", "--json").stdout)

    assert put.exit_code == asked.exit_code == read.exit_code == table.exit_code == 0
    assert answer["result"] == 9
    assert answer["feature_sources"] == {"a": "store", "b": "store", "c": "request"}
    assert "confidence 0.9" in read.stdout
    assert shown["features"] == {"a": 1.0, "b": 1.0, "c": 2.0}
    assert [item["prediction_id"] for item in listed["items"]] == [answer["prediction_id"]]
    assert "more: --cursor " in table.stdout
    assert unmatched["count"] == 1
    assert unmatched["items"][0]["prediction_id"] == stranger


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["nowhere", "--entity", "x"], "model_unknown"),
        (["abc", "--entity", "nobody"], "entity_unknown"),
        (["abc"], "invalid_field"),
        (["abc", "--feature", "a=1"], "feature_missing"),
        (["abc", "--version", "9.9.9", "--feature", "a=1"], "version_unknown"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_the_servers_refusals_are_shown_with_the_servers_codes(
    server: PhoenixServer, arguments: list[str], code: str
) -> None:
    """As if the command had found out itself."""
    fails(on(server, "predict", *arguments), code)


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_a_file_is_scored_without_a_server(run: Run, model: Path, tmp_path: Path, suffix: str) -> None:
    """Row by row as the server would answer, with all that the file had, over several pages."""
    run("models", "register", str(model), "--id", "m", "--version", "1.0.0")
    rows = 10_000
    table = pa.table({"id": list(range(rows)), **{f"x_{i}": [float(i)] * rows for i in range(3)}})
    source, target = tmp_path / f"rows{suffix}", tmp_path / f"scored{suffix}"
    write, read = (
        (parquet.write_table, parquet.read_table) if suffix == ".parquet" else (csv.write_csv, csv.read_csv)
    )
    write(table, source)

    done = run("predict", "m", "--input", str(source), "--output", str(target))

    assert done.stdout == f"wrote 10,000 rows with the answers of m 1.0.0 to {target}\n"
    scored = read(target)
    assert scored.schema.names == ["id", "x_0", "x_1", "x_2", "_result"]
    assert scored["id"].to_pylist() == list(range(rows))
    assert scored["_result"].to_pylist() == [8.0] * rows


def test_a_file_that_cannot_be_scored_leaves_no_output(run: Run, model: Path, tmp_path: Path) -> None:
    """A half of an output would be taken for the whole."""
    run("models", "register", str(model), "--id", "m", "--version", "1.0.0")
    source, target = tmp_path / "rows.csv", tmp_path / "scored.csv"
    source.write_text("x_0,x_1,x_2\n1,1,1\n1,,1\n")

    lacking = run("predict", "m", "--input", str(source), "--output", str(target), code=1)
    source.write_text("x_0,x_1\n1,1\n")
    narrow = run("predict", "m", "--input", str(source), "--output", str(target), code=1)
    absent = run("predict", "m", "--input", str(tmp_path / "no.csv"), "--output", str(target), code=1)

    assert "row 2: feature 'x_1' is required and missing" in fails(lacking, "feature_missing")
    assert "the table has no column x_2" in fails(narrow, "feature_missing")
    assert "there is no such file" in fails(absent, "invalid_field")
    assert not list(tmp_path.glob("*scored*"))


def test_scored_rows_that_are_logged_are_predictions_like_any_other(
    run: Run, model: Path, tmp_path: Path
) -> None:
    """Found by entity, computed again, and not doubled by a second run."""
    run("models", "register", str(model), "--id", "m", "--version", "1.0.0", "--activate")
    source, target = tmp_path / "rows.csv", tmp_path / "scored.csv"
    source.write_text("entity_id,customer,x_0,x_1,x_2\n007,a,1,1,1\n008,b,2,1,0\n")
    command = ["predict", "m", "--input", str(source), "--output", str(target), "--log"]

    first = run(*command)
    second = json.loads(run(*command, "--json").stdout)
    listed = json.loads(run("predictions", "list", "--entity", "007", "--json").stdout)["items"]

    assert first.stdout.splitlines() == [
        f"wrote 2 rows with the answers of m 1.0.0 to {target}",
        "2 of them are new on record",
    ]
    assert (second["rows"], second["on_record"], second["new_on_record"]) == (2, 2, 0)
    scored = csv.read_csv(target).to_pylist()
    assert [row["_result"] for row in scored] == [6.0, 4.0]
    assert [item["prediction_id"] for item in listed] == [scored[0]["_prediction_id"]]
    assert listed[0]["result"] == 6.0
    assert "identical" in run("predictions", "replay", scored[1]["_prediction_id"]).stdout
    assert "2 were on record before" in run(*command, "--entity-column", "customer").stdout


def test_the_column_of_entities_is_named_where_it_is_another(run: Run, model: Path, tmp_path: Path) -> None:
    """A column that is not there is a slip that would leave the rows without anybody they are about."""
    run("models", "register", str(model), "--id", "m", "--version", "1.0.0")
    source, target = tmp_path / "rows.csv", tmp_path / "scored.csv"
    source.write_text("customer,x_0,x_1,x_2\n00a,1,1,1\n")
    command = ["predict", "m", "--input", str(source), "--output", str(target), "--log", "--entity-column"]

    slip = run(*command, "costumer", code=1)
    run(*command, "customer")

    assert "no column 'costumer'; it has customer, x_0" in fails(slip, "invalid_field")
    listed = json.loads(run("predictions", "list", "--json").stdout)["items"]
    assert [item["entity_id"] for item in listed] == ["00a"]


def test_a_scoring_that_is_interrupted_says_what_is_on_record(
    run: Run, model: Path, data: Path, tmp_path: Path
) -> None:
    """Whoever ends it must know that the rest follows when it is run again, and find no half of an output."""
    run("models", "register", str(model), "--id", "m", "--version", "1.0.0")
    rows = 200_000
    source, target = tmp_path / "rows.parquet", tmp_path / "scored.parquet"
    parquet.write_table(pa.table({f"x_{i}": [float(i)] * rows for i in range(3)}), source)
    arguments = ["predict", "m", "--input", str(source), "--output", str(target), "--log"]
    process = subprocess.Popen(
        [sys.executable, "-m", "phoenix_ml.cli", *arguments, "--data", str(data)],
        stderr=subprocess.PIPE,
        text=True,
    )

    # The first thousand are seen a moment before their writer has counted them, but none after them is.
    wait_until(lambda: count_predictions(data) > 1000, 60, "rows are on record")
    process.send_signal(signal.SIGINT)
    _, shown = process.communicate(timeout=120)

    assert process.returncode == 1
    assert "rows are on record, and no output is written: run the same command again" in shown
    assert "Traceback" not in shown
    assert 0 < count_predictions(data) < rows
    assert not list(tmp_path.glob("*scored*"))


def count_predictions(data: Path) -> int:
    with closing(sqlite3.connect(data / "phoenix.db")) as connection:
        return int(connection.execute("SELECT count(*) FROM prediction_logs").fetchone()[0])


def test_a_file_is_not_written_over_itself(run: Run, model: Path, tmp_path: Path) -> None:
    """A typing error would cost the original."""
    run("models", "register", str(model), "--id", "m", "--version", "1.0.0")
    source = tmp_path / "rows.csv"
    source.write_text("x_0,x_1,x_2\n1,1,1\n")
    (tmp_path / "link.csv").symlink_to(source)

    refused = run("predict", "m", "--input", str(source), "--output", str(tmp_path / "link.csv"), code=2)

    assert "--output is the file of --input" in refused.stderr
    assert source.read_text() == "x_0,x_1,x_2\n1,1,1\n"


def test_a_version_that_takes_tensors_scores_no_file(run: Run, tmp_path: Path) -> None:
    """Its inputs are no columns; the refusal says who answers for it."""
    run("models", "register", str(zoo.outer_sum(tmp_path / "sums.onnx")), "--id", "s", "--version", "1.0.0")
    source = tmp_path / "rows.csv"
    source.write_text("a\n1\n")

    done = run("predict", "s", "--input", str(source), "--output", str(tmp_path / "o.csv"), code=1)

    assert "/v2/models/" in fails(done, "takes_tensors")


def test_a_scored_table_keeps_the_types_of_its_columns(run: Run, model: Path, tmp_path: Path) -> None:
    """What reads the input reads the output, in row groups as large as other writers make them."""
    run("models", "register", str(model), "--id", "m", "--version", "1.0.0")
    rows = 200_000
    kept = {
        "day": pa.array([19000] * rows, pa.date32()),
        "city": pa.array(["Oslo", "Rome"] * (rows // 2)).dictionary_encode(),
        "tags": pa.array([["a"]] * rows),
        "x_0": pa.array([1] * rows, pa.int16()),
        "x_1": pa.array([1.0] * rows, pa.float32()),
        "x_2": pa.array([None, 1.0] * (rows // 2)),
    }
    source, target = tmp_path / "rows.parquet", tmp_path / "scored.parquet"
    contract = tmp_path / "contract.json"
    contract.write_text(json.dumps({f"x_{i}": {"type": "float", "default": 2.0} for i in range(3)}))
    run("models", "register", str(model), "--id", "d", "--version", "1.0.0", "--features", str(contract))
    parquet.write_table(pa.table(kept), source)

    run("predict", "d", "--input", str(source), "--output", str(target))

    scored = parquet.read_table(target)
    assert scored.drop(["_result"]).equals(parquet.read_table(source))
    assert scored["_result"].to_pylist() == [9.0, 6.0] * (rows // 2)
    assert parquet.ParquetFile(target).num_row_groups == 2


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["m", "--model", "m"],
        ["m", "--input", "x.csv"],
        ["m", "--output", "x.csv"],
        ["m", "--input", "x.csv", "--output", "y.csv", "--entity", "e"],
        ["m", "--input", "x.csv", "--output", "y.csv", "--entity-column", "e"],
        ["m", "--entity", "e", "--log"],
    ],
)
def test_a_prediction_that_is_asked_for_in_two_ways_is_refused(arguments: list[str]) -> None:
    """Before anything is read or written."""
    assert CliRunner().invoke(main, ["predict", *arguments]).exit_code == 2


def test_without_a_server_a_prediction_says_how_to_start_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It is asked for where the settings would have it listen."""
    ports = [free_port() for _ in range(3)]
    given = CliRunner().invoke(main, ["predict", "m", "--url", f"http://127.0.0.1:{ports[0]}"])
    (tmp_path / "phoenix.toml").write_text(f"port = {ports[1]}\n")
    from_file = CliRunner().invoke(main, ["predict", "m"])
    monkeypatch.setenv("PHOENIX_PORT", str(ports[2]))
    monkeypatch.setenv("PHOENIX_HOST", "0.0.0.0")
    from_environment = CliRunner().invoke(main, ["predict", "m"])
    monkeypatch.setenv("PHOENIX_PORT", "0")

    for done, port in zip((given, from_file, from_environment), ports, strict=True):
        message = fails(done, "server_unreachable")
        assert message.startswith(f"http://127.0.0.1:{port} does not answer")
        assert "phoenix-ml serve" in message
    assert "--url" in fails(CliRunner().invoke(main, ["predict", "m"]), "misconfigured")


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (404, b'{"detail": "Not Found"}'),
        (404, b"<html>no such page</html>"),
        (400, b'{"error": "invalid_request"}'),
        (500, b"\xff\xfe"),
        (301, b""),
        (200, b"<html>welcome</html>"),
        (200, b'{"status": "ok"}'),
        (200, b"[]"),
    ],
)
def test_another_server_than_ours_is_said_to_be_one(status: int, body: bytes) -> None:
    """Port 8000 is everybody's favourite."""

    class Foreign(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
            """Says nothing."""

    with HTTPServer(("127.0.0.1", 0), Foreign) as foreign:
        thread = threading.Thread(target=foreign.handle_request)
        thread.start()
        url = f"http://127.0.0.1:{foreign.server_port}"
        done = CliRunner().invoke(main, ["predict", "m", "--url", url])
        thread.join()

    message = fails(done, "server_unreachable")
    assert message.startswith(f"{url} answered with status {status}, but is not a Phoenix server")


def test_a_data_folder_is_served_by_one_server_only(server: PhoenixServer, tmp_path: Path) -> None:
    """Two would write the same journals."""
    done = command(tmp_path, "serve", "--port", "0", "--data", str(server.data))

    assert done.returncode == 1
    assert f"is being served already by process {server.pid}" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_log_of_a_served_folder_is_not_worked_twice(
    server: PhoenixServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two would read the same journals, and each would delete what the other has not read."""
    monkeypatch.setenv("PHOENIX_STOP_TIMEOUT_S", "1")

    done = on(server, "work", "log")

    assert done.exit_code == 1
    assert "another process reads the journals" in done.output


def test_a_start_that_can_only_fail_again_is_tried_once(tmp_path: Path) -> None:
    """The message is the same each time, and the fifth hides the first."""
    server = PhoenixServer(tmp_path, features="sqlite:/proc/features.db")

    done = server.command("serve")

    assert done.returncode == 1
    assert done.stderr.count("the feature store sqlite at /proc/features.db is unavailable") == 1
    assert "Traceback" not in done.stderr


def test_a_port_in_use_is_said_to_be(server: PhoenixServer, tmp_path: Path) -> None:
    """The commonest failure of a second start."""
    done = command(tmp_path, "serve", "--port", str(server.port), "--data", str(tmp_path / "other"))

    assert done.returncode == 1
    assert f"127.0.0.1:{server.port}" in done.stderr
    assert "choose another --port" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_test_alert_shows_which_channel_takes_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong URL is to be found before the night in which it matters."""
    with receiving() as good, receiving() as bad:
        bad.status = 403
        urls = [f"webhook+http://{one.host}/secret" for one in (good, bad)]
        monkeypatch.setenv("PHOENIX_ALERTS", " ".join(urls))
        done = run("alerts", "test", "--json", code=1)

    outcomes = json.loads(done.stdout)
    assert list(outcomes.values()) == ["told", "failed: HTTP 403"]
    assert "secret" not in done.stdout
    (_, _, body), *_ = good.calls
    assert json.loads(body)["data"]["title"] == "Phoenix ML: a test"
    assert "no alerts" in run("alerts", "list").stdout


def test_a_test_alert_says_which_channel_has_a_defect(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a proxy that is none; a traceback would hide what the others say."""
    monkeypatch.setenv("HTTP_PROXY", "ftp://proxy.example.com")
    monkeypatch.setenv("PHOENIX_ALERTS", "webhook+http://hooks.example.com/secret log:")

    done = run("alerts", "test", "--json", code=1)

    assert list(json.loads(done.stdout).values()) == ["failed: a defect, ValueError", "told"]


# Processes of their own.


def on_a_terminal(folder: Path, *arguments: str) -> tuple[str, str]:
    """What `phoenix-ml ARGUMENTS` printed into a pipe, and what it showed on a terminal meanwhile."""
    screen, line = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "phoenix_ml.cli", *arguments],
        cwd=folder,
        env=os.environ | {"TERM": "xterm"},
        stdout=subprocess.PIPE,
        stderr=line,
        text=True,
    ) as process:
        os.close(line)
        shown = b""
        with suppress(OSError):  # Linux says so when nobody has the line any more
            while piece := os.read(screen, 65536):
                shown += piece
        os.close(screen)
        assert process.stdout is not None
        printed = process.stdout.read()
    assert process.returncode == 0, shown
    return printed, shown.decode()


def test_what_takes_long_shows_on_a_terminal_that_it_goes_on_and_nowhere_else(
    run: Run, model: Path, data: Path, tmp_path: Path
) -> None:
    """Somebody who sees nothing for a minute stops it; a script must find nothing but the JSON."""
    reference = tmp_path / "rows.csv"
    reference.write_text("x_0,x_1,x_2\n" + "".join(f"{n},{n % 7},{n % 3}\n" for n in range(100)))
    register = ("models", "register", str(model), "--reference", str(reference), "--id", "m", "--version")
    commands: dict[str, tuple[str, ...]] = {
        "upgrading": ("db", "upgrade"),
        "registering m 1.0.0": (*register, "1.0.0"),
        "comparing m 1.0.0 with its reference": ("drift", "check", "m"),
    }

    for shown, arguments in commands.items():
        printed, screen = on_a_terminal(tmp_path, *arguments, "--data", str(data), "--json")
        assert shown in screen
        assert json.loads(printed)
        assert shown not in run(*arguments, "--json").output


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The outcome of `phoenix-ml ARGUMENTS` as a process of its own."""
    return PhoenixServer(folder / "command").command(*arguments)


def test_another_address_than_this_machines_is_refused_without_insecure(tmp_path: Path) -> None:
    """Whoever reaches the port may change models, as there are no keys yet."""
    done = command(tmp_path, "serve", "--host", "0.0.0.0", "--port", "0")

    assert done.returncode == 1
    assert "misconfigured" in done.stderr
    assert "--insecure" in done.stderr
    assert "Traceback" not in done.stderr


def test_with_insecure_the_start_up_log_says_so(tmp_path: Path) -> None:
    """So that nobody can say they did not know."""
    insecure = PhoenixServer(tmp_path / "insecure", host="0.0.0.0", insecure=True)
    insecure.spawn()
    try:
        wait_until(lambda: " serves " in insecure.log() or insecure.exit_code is not None, 60, "it serves")
        answered = httpx.get(f"{insecure.url}/health/live").status_code
        code = insecure.stop()
    finally:
        insecure.kill()

    assert (answered, code) == (200, 0)
    warnings = [record for record in insecure.log_records() if record["level"] == "CRITICAL"]
    assert any("INSECURE" in one["message"] and "0.0.0.0" in one["message"] for one in warnings)


def test_what_a_server_writes_is_for_its_user_alone(tmp_path: Path) -> None:
    """Also in the processes that it starts, whatever they write later."""
    before = os.umask(0o022)
    try:
        with PhoenixServer(tmp_path) as served:
            statuses = [Path(f"/proc/{pid}/status").read_text() for pid in served.pids().values()]
            readable = for_others(served.data)
            files = {path.name for path in served.data.rglob("*")}
    finally:
        os.umask(before)

    assert [re.findall(r"Umask:\s*(\d+)", status) for status in statuses] == [["0077"], ["0077"]]
    assert readable == []
    assert files >= {"phoenix.db", "features.db", "run", "journal"}


def test_a_variable_that_looks_like_a_misspelt_setting_is_doubted_in_the_log(tmp_path: Path) -> None:
    """Once at the start, where whoever looks for the reason looks first."""
    done = PhoenixServer(tmp_path / "doubted", workres=2, host="256.0.0.0", insecure=True).command("serve")

    assert done.stderr.count("PHOENIX_WORKRES is not a setting and is ignored: is PHOENIX_WORKERS meant") == 1


def test_the_log_role_runs_by_itself_with_metrics(tmp_path: Path) -> None:
    """In a cluster each role is a process of its own, and is scraped like one."""
    port = free_port()
    worker = PhoenixServer(tmp_path / "worker")
    process = worker.popen("work", "log", "--metrics-port", str(port), log=tmp_path / "work.log")

    def answers() -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{port}/health/live").status_code == 200
        except httpx.TransportError:
            assert process.poll() is None, (tmp_path / "work.log").read_text()
            return False

    try:
        wait_until(answers, 60, "the worker answers")
        metrics = httpx.get(f"http://127.0.0.1:{port}/metrics")
        nothing = httpx.get(f"http://127.0.0.1:{port}/nothing")
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
    finally:
        process.kill()
        process.wait()

    assert metrics.status_code == 200
    assert "phoenix_log_heartbeat_timestamp_seconds" in metrics.text
    assert nothing.status_code == 404
    assert code == 0


def test_metrics_are_not_shown_to_others_without_insecure(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The address is refused wherever something listens on it."""
    monkeypatch.setenv("PHOENIX_HOST", "0.0.0.0")

    done = run("work", "log", "--metrics-port", str(free_port()), code=1)

    assert "--insecure" in done.stderr


def test_a_metrics_port_in_use_is_said_to_be(run: Run) -> None:
    """A readable line, as for every other port."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = run("work", "log", "--metrics-port", str(taken.getsockname()[1]), code=1)

    fails(done, "misconfigured")
