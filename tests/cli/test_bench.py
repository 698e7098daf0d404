"""`phoenix-ml bench`: the load on a real server, and what the generator makes of servers that behave badly."""

from __future__ import annotations

import json
import os
import re
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import zoo
from click.testing import CliRunner, Result
from phoenix_server import PhoenixServer
from servers import HOST, free_port, wait_until
from traffic import logged

from phoenix_ml.bench import Load, Target, _keep_pace, _Open, listening_pids, run_load
from phoenix_ml.cli import main

pytestmark = pytest.mark.system

# Answers what is to be sent for the request of that number; None closes the connection without one.
Answer = Callable[[int], bytes | None]


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither the environment nor a phoenix.toml of whoever runs the tests."""
    for name in [name for name in os.environ if name.startswith("PHOENIX_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "300")  # so that no line is folded
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PhoenixServer]:
    """A running server with the models `abc` and `signs`."""
    folder = tmp_path_factory.mktemp("served")
    phoenix = PhoenixServer(folder)
    phoenix.register(zoo.linear(folder / "abc.onnx", [1, 2, 3]), "abc", "1.0.0", contract=zoo.ABC)
    phoenix.register(zoo.classifier(folder / "signs.onnx"), "signs", "1.0.0")
    with phoenix:
        yield phoenix


def bench(url: str, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["bench", *arguments, "--url", url])


def measured(done: Result) -> list[dict[str, Any]]:
    """The runs of a load on which nothing failed."""
    assert done.exit_code == 0, done.output
    runs: list[dict[str, Any]] = json.loads(done.stdout)["runs"]
    assert all(run["errors"] == {} for run in runs), runs
    return runs


def refusal(done: Result) -> tuple[str, str]:
    """Code and message of a command that failed before its first run."""
    assert done.exit_code == 1, done.output
    found = re.fullmatch(r"error (\w+) (.+)\n", done.stderr)
    assert found is not None, done.stderr
    return found[1], found[2]


# On a real server.


def test_every_answer_that_is_counted_is_on_record(server: PhoenixServer) -> None:
    """The load is made of real predictions: what is measured is what a caller would get."""
    done = bench(server.url, "signs", "--connections", "1,4", "--seconds", "1", "--json")

    runs = measured(done)
    counted = sum(run["requests"] for run in runs) + 1  # the first is asked before the runs
    with server.opened() as phoenix:
        wait_until(lambda: len(logged(phoenix, "signs")) >= counted, 60, "all are logged")
        assert len(logged(phoenix, "signs")) == counted
    assert [run["connections"] for run in runs] == [1, 4]
    for run in runs:
        assert run["p50_ms"] <= run["p95_ms"] <= run["p99_ms"]
        assert run["requests_per_second"] == pytest.approx(run["requests"] / run["seconds"], rel=0.01)


def test_cpu_is_that_of_the_processes_that_hold_the_port(server: PhoenixServer) -> None:
    """The supervisor and the API process listen; the background process and the test itself do not."""
    (run,) = measured(bench(server.url, "signs", "--connections", "2", "--seconds", "1", "--json"))

    assert listening_pids(server.port) == sorted([server.pid, server.pids()["api-0"]])
    assert run["cpu_processes"] == 2
    assert run["cpu_us_per_request"] > 0


def test_rows_come_from_entities_from_a_file_or_from_the_record(
    server: PhoenixServer, tmp_path: Path
) -> None:
    """Three features that must be given: without a choice of rows the load is one that the model can answer."""
    asked = ("abc", "--connections", "1", "--seconds", "1", "--rate", "10", "--json")
    table = tmp_path / "rows.csv"
    table.write_text("label,a,b,c\nyes,1,2,3\nno,4,5,6\n")
    CliRunner().invoke(main, ["features", "put", "cust_1", "a=7", "b=8", "c=9", "--data", str(server.data)])

    def rows() -> set[tuple[float, ...]]:
        with server.opened() as phoenix:
            return {tuple(row.features.values()) for row in logged(phoenix, "abc")}

    zeros = measured(bench(server.url, *asked))
    wait_until(lambda: rows() == {(0.0, 0.0, 0.0)}, 60, "zeros are logged")
    by_entity = measured(bench(server.url, *asked, "--entity", "cust_1"))
    wait_until(lambda: (7.0, 8.0, 9.0) in rows(), 60, "the entity's row is logged")
    from_file = measured(bench(server.url, *asked, "--features", str(table)))
    wait_until(lambda: rows() >= {(1.0, 2.0, 3.0), (4.0, 5.0, 6.0)}, 60, "both rows of the file are logged")

    assert all(run["requests"] > 0 for run in [*zeros, *by_entity, *from_file])


def test_a_rate_is_kept(server: PhoenixServer) -> None:
    """As many requests as are due in that time, no matter how fast they are answered."""
    (run,) = measured(
        bench(server.url, "signs", "--connections", "4", "--seconds", "1", "--rate", "50", "--json")
    )

    assert run["rate"] == 50
    assert run["requests"] == 50


def test_people_read_a_table(server: PhoenixServer) -> None:
    """With what the figures mean, and how many processes the CPU time is of."""
    done = bench(server.url, "signs", "--connections", "1", "--seconds", "0.1")

    assert done.exit_code == 0
    assert "requests/s" in done.stdout
    assert f"of the 2 processes that hold port {server.port}" in done.stdout


def test_a_model_must_be_named_where_there_are_several(server: PhoenixServer) -> None:
    """Load on the wrong one would tell nothing."""
    code, message = refusal(bench(server.url))

    assert code == "invalid_field"
    assert "abc, signs" in message


def test_what_the_server_refuses_is_said_once_before_any_load(server: PhoenixServer, tmp_path: Path) -> None:
    """Instead of a table full of errors."""
    table = tmp_path / "rows.csv"
    table.write_text("nothing\n1\n")

    assert refusal(bench(server.url, "nowhere"))[0] == "model_unknown"
    assert refusal(bench(server.url, "abc", "--entity", "nobody"))[0] == "entity_unknown"
    assert refusal(bench(server.url, "abc", "--features", str(table)))[0] == "invalid_field"


def test_without_a_server_the_load_says_how_to_start_one() -> None:
    """Also for what is no URL at all."""
    code, message = refusal(bench(f"http://{HOST}:{free_port()}", "m"))

    assert code == "server_unreachable"
    assert "phoenix-ml serve" in message
    nonsense = bench("localhost:8000", "m")
    assert nonsense.exit_code == 2
    assert "write http://HOST:PORT" in nonsense.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["--connections", "0"],
        ["--connections", "1,"],
        ["--connections", "many"],
        ["--seconds", "0"],
        ["--rate", "0"],
        ["--entity", "e", "--features", "rows.csv"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    """Before the server is asked anything."""
    assert bench("http://127.0.0.1:1", "m", *arguments).exit_code == 2


def test_the_first_error_is_shown_in_words(server: PhoenixServer, tmp_path: Path) -> None:
    """A status says what kind of error it was, and not which row of a file has no value."""
    rows = tmp_path / "rows.csv"
    rows.write_text("a,b,c\n1,2,3\n4,,6\n")
    done = bench(server.url, "abc", "--features", str(rows), "--connections", "1", "--seconds", "1")

    assert done.exit_code == 1
    assert "× status 422" in done.stdout
    assert "the first error: feature_missing feature 'b' is required" in done.stdout


# On servers that behave badly.


class _Bad(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, answer: Answer) -> None:
        super().__init__((HOST, 0), _BadHandler)
        self.answer = answer
        self.numbers = count()


class _BadHandler(socketserver.StreamRequestHandler):
    server: _Bad

    def handle(self) -> None:
        while self.rfile.readline():
            length = 0
            while (line := self.rfile.readline()) not in (b"\r\n", b""):
                if line.lower().startswith(b"content-length:"):
                    length = int(line.split(b":")[1])
            self.rfile.read(length)
            answer = self.server.answer(next(self.server.numbers))
            if answer is None:
                return
            self.wfile.write(answer)


@contextmanager
def bad_server(answer: Answer) -> Iterator[Target]:
    with _Bad(answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield Target(HOST, server.server_address[1])
        server.shutdown()


def load(
    target: Target,
    *,
    connections: int = 2,
    seconds: float = 1.0,
    rate: float | None = None,
    patience_s: float = 20,
) -> Load:
    return run_load(target, [target.post("/", b"{}")], connections, seconds, rate, patience_s)


def ok(*headers: bytes) -> bytes:
    return b"\r\n".join([b"HTTP/1.1 200 OK", *headers, b"Content-Length: 2", b"", b"{}"])


def test_a_server_that_halts_is_charged_with_every_request_that_was_due() -> None:
    """A generator that waits for the answer before it asks again would see one slow request, not a hundred."""
    halted_until: list[float] = []
    lock = threading.Lock()

    def answer(_: int) -> bytes:
        with lock:
            if not halted_until:
                halted_until.append(time.monotonic() + 0.5)
        time.sleep(max(0.0, halted_until[0] - time.monotonic()))
        return ok()

    with bad_server(answer) as target:
        found = load(target, rate=200)

    assert found.errors == {}
    assert found.requests == 200
    # Due in the first 0.4 s of the half second, they wait for 0.1 s at least, however fast the machine is.
    assert sum(ms >= 100 for ms in found.latencies_ms) >= 80


def test_requests_are_sent_though_the_generator_wakes_up_after_all_of_them_were_due() -> None:
    """On a busy machine the load would be smaller than what was asked for, and the last ones be left out."""
    at_once: Any = SimpleNamespace(call_soon_threadsafe=lambda release, due: release(due))
    paced, begun = _Open(), time.perf_counter() - 10

    _keep_pace(at_once, paced, 50, begun, 1.1)

    assert list(paced.waiting) == pytest.approx([begun + turn / 50 for turn in range(55)])


def test_answers_are_understood_in_pieces_in_chunks_and_in_any_case() -> None:
    """Proxies write their heads as they like."""
    forms = [
        ok(),
        b"HTTP/1.1 200 OK\r\ncontent-length:2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n1\r\n}\r\n0\r\n\r\n",
        b"HTTP/1.1 204 No Content\r\nCONTENT-LENGTH: 0\r\n\r\n",
    ]
    with bad_server(lambda number: forms[number % len(forms)]) as target:
        found = load(target)

    assert found.errors == {}
    assert found.requests > len(forms)


def test_a_connection_that_the_server_ends_is_made_anew() -> None:
    """nginx ends each after a thousand requests, and says so."""
    with bad_server(lambda _: ok(b"Connection: close")) as target:
        found = load(target)

    assert found.errors == {}
    assert found.requests > 2


def test_what_fails_is_counted_by_what_it_was() -> None:
    """Half of the requests are refused, and a part of the others gets no answer at all."""
    busy = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 2\r\n\r\n{}"
    with bad_server(lambda number: [busy, ok(), busy, None][number % 4]) as target:
        found = load(target, connections=1)

    assert set(found.errors) == {"status 503", "the connection was closed before the answer"}
    assert found.failures == found.errors.total()
    assert 0 < found.errors["status 503"] < found.requests
    assert found.refusal == ""


def test_a_server_that_never_answers_ends_the_load_nevertheless() -> None:
    """Each request in flight is an error, and each that found no connection is one too."""
    over = threading.Event()

    def answer(_: int) -> None:
        over.wait(30)

    with bad_server(answer) as target:
        closed = load(target, patience_s=0.2)
        paced = load(target, rate=10, patience_s=0.2)
        over.set()

    assert closed.requests == 0
    assert closed.errors == {"no answer in time": 2}
    assert paced.errors == {"no answer in time": 2, "not sent in time: no connection was free": 8}
    assert closed.quantile_ms(0.5) != closed.quantile_ms(0.5)  # NaN: there is none


def test_a_server_that_goes_away_is_an_error_and_no_crash() -> None:
    """Nothing listens any more when the load begins."""
    found = load(Target(HOST, free_port()), connections=1)

    assert found.requests == 0
    assert [error.startswith("no connection") for error in found.errors] == [True]
