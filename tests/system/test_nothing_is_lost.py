"""Real processes, real load, real kills: an answer that left is in the log, once, as it was answered."""

import os
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from numbered import MODEL, assert_exactly_once, make_body, register_champion_and_challenger
from onnx_models import linear_regressor, write
from phoenix_server import PhoenixServer
from servers import has_ended, wait_until
from traffic import Traffic, await_logged

from phoenix_ml.domain.routing import Arm, Routing, Strategy

pytestmark = [pytest.mark.system]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[PhoenixServer]:
    """Two API processes that serve a champion and a challenger, half of the traffic each."""
    server = PhoenixServer(tmp_path, workers=2, registry_poll_ms=100)
    register_champion_and_challenger(server)
    with server:
        yield server


def test_five_thousand_answers_of_two_processes_are_five_thousand_rows(server: PhoenixServer) -> None:
    """The log is only worth something when it is exactly what was answered, no row more and none less."""
    traffic = Traffic(server.url, make_body)

    traffic.ask(5000, clients=16)

    with server.opened() as phoenix:
        rows = await_logged(phoenix, MODEL, set(traffic.answers))
    assert (traffic.refusals, traffic.broken) == ([], 0)
    assert len(rows) == len(traffic.answers) == 5000
    assert_exactly_once(traffic, rows)
    assert {row.model_version for row in rows} == {"1.0.0", "1.1.0"}


def test_metrics_count_the_requests_of_all_processes(server: PhoenixServer) -> None:
    """A scrape reaches one of the processes; it must tell the sum of them all."""
    traffic = Traffic(server.url, make_body)

    traffic.ask(400, clients=8)

    text = httpx.get(f"{server.url}/metrics").text
    counted = [
        float(line.rsplit(" ", 1)[1])
        for line in text.splitlines()
        if line.startswith("phoenix_requests_total{") and 'code="200"' in line
    ]
    assert sum(counted) == 400


def test_killed_api_process_loses_no_answer(server: PhoenixServer) -> None:
    """The journal is written before the answer, so kill -9 can only take what nobody was told."""
    traffic = Traffic(server.url, make_body)

    with traffic.flowing(clients=8):
        traffic.await_answers(300)
        killed = server.kill_child("api-0")
        server.wait_for_child("api-0", after=killed)
        traffic.await_answers(300)
        killed = server.kill_child("api-1")
        server.wait_for_child("api-1", after=killed)
        traffic.await_answers(300)

    with server.opened() as phoenix:
        rows = await_logged(phoenix, MODEL, set(traffic.answers))
    assert traffic.refusals == []
    assert_exactly_once(traffic, rows)
    assert 'phoenix_process_restarts_total{slot="api-0"} 1' in httpx.get(f"{server.url}/metrics").text


def test_killed_background_process_loses_no_answer_and_doubles_none(server: PhoenixServer) -> None:
    """It reads the journals again from the start, and ids are keys: what it had written stays single."""
    traffic = Traffic(server.url, make_body)

    with traffic.flowing(clients=8):
        for _ in range(3):
            traffic.await_answers(300)
            killed = server.kill_child("background")
            server.wait_for_child("background", after=killed)
        traffic.await_answers(300)

    with server.opened() as phoenix:
        rows = await_logged(phoenix, MODEL, set(traffic.answers))
    assert (traffic.refusals, traffic.broken) == ([], 0)
    assert_exactly_once(traffic, rows)


def test_everything_killed_at_once_loses_no_answer(server: PhoenixServer) -> None:
    """The next start finds the journals of the dead and logs them."""
    traffic = Traffic(server.url, make_body)
    with traffic.flowing(clients=8):
        traffic.await_answers(500)
        server.kill()

    server.start()

    with server.opened() as phoenix:
        rows = await_logged(phoenix, MODEL, set(traffic.answers))
    assert_exactly_once(traffic, rows)


def test_stop_under_load_answers_what_it_accepted_and_logs_it(server: PhoenixServer) -> None:
    """A rolling deployment sends SIGTERM to a busy server: it must end by itself, clean, with nothing owed."""
    traffic = Traffic(server.url, make_body)

    with traffic.flowing(clients=8):
        traffic.await_answers(300)
        exit_code = server.stop()

    with server.opened() as phoenix:
        rows = await_logged(phoenix, MODEL, set(traffic.answers))
    assert exit_code == 0
    assert traffic.refusals == []
    assert_exactly_once(traffic, rows)
    assert list(server.settings.journal_folder.glob("*/*.segment")) == []


def test_processes_end_when_their_supervisor_is_killed(server: PhoenixServer) -> None:
    """Orphans would keep the port and the journals, and the next start would fail."""
    pids = server.pids().values()

    server.kill_supervisor()

    wait_until(lambda: all(map(has_ended, pids)), 30, "no process is left")
    server.start()
    assert httpx.get(f"{server.url}/health/ready").status_code == 200


def test_start_outwaits_the_processes_of_a_supervisor_that_was_killed(server: PhoenixServer) -> None:
    """An init system starts it again at once, while they still finish what they had accepted."""
    traffic = Traffic(server.url, make_body)
    traffic.ask(20, clients=2)
    earlier = frozen_orphans(server)
    try:
        server.spawn()
        wait_until(lambda: "until api-0, api-1 of an earlier 'serve'" in server.log(), 30, "it waits")
        for slot in ("api-0", "api-1"):
            os.kill(earlier[slot], signal.SIGCONT)
        wait_until(lambda: "until another process has ended" in server.log(), 30, "the log role waits")
        os.kill(earlier["background"], signal.SIGCONT)
        wait_until(lambda: server.is_ready or server.exit_code is not None, 60, "it is ready")
        traffic.ask(20, clients=2)
    finally:
        kill_all(earlier.values())

    with server.opened() as phoenix:
        rows = await_logged(phoenix, MODEL, set(traffic.answers))
    assert (traffic.refusals, traffic.broken) == ([], 0)
    assert_exactly_once(traffic, rows)
    assert "ended by itself" not in server.log()


def test_start_says_which_processes_of_a_killed_supervisor_do_not_end(tmp_path: Path) -> None:
    """A process that hangs is for a person to end, who must learn of it."""
    server = PhoenixServer(tmp_path, stop_timeout_s=1)
    server.start()
    earlier = frozen_orphans(server)
    try:
        server.spawn()
        wait_until(lambda: server.exit_code is not None, 60, "it gives up")
    finally:
        server.kill()
        kill_all(earlier.values())

    assert server.exit_code == 1
    assert "api-0 of an earlier 'serve'" in server.log(all_starts=False)
    assert "did not end within 6 s: end what 'fuser" in server.log(all_starts=False)
    assert "Traceback" not in server.log()


def test_start_that_waits_for_earlier_processes_can_be_stopped(server: PhoenixServer) -> None:
    """Ctrl-C works at any time."""
    earlier = frozen_orphans(server)
    try:
        server.spawn()
        wait_until(lambda: "of an earlier 'serve' has ended" in server.log(), 30, "it waits")
        exit_code = server.stop()
    finally:
        server.kill()
        kill_all(earlier.values())

    assert exit_code == 0


def frozen_orphans(server: PhoenixServer) -> dict[str, int]:
    """The processes of the server by slot, halted, so that they outlive their supervisor, which is killed."""
    pids = server.pids()
    for slot in pids:
        server.kill_child(slot, signal.SIGSTOP)
    server.kill_supervisor()
    return pids


def kill_all(pids: Iterable[int]) -> None:
    """Ends those that still run."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_start_beside_a_worker_that_reads_the_journals_ends_and_says_why(tmp_path: Path) -> None:
    """It would never be ready, and a server that starts its log role for ever looks like one that comes up."""
    server = PhoenixServer(tmp_path, stop_timeout_s=1)
    work_log = tmp_path / "work.log"
    worker = server.popen("work", "log", log=work_log)
    lock = server.settings.run_folder / "journals.lock"
    wait_until(lambda: lock.exists() and (server.data / "phoenix.db").exists(), 30, "the worker works")
    try:
        server.spawn()
        wait_until(lambda: server.exit_code is not None, 120, "it gives up")
    finally:
        server.kill()
        worker.terminate()

    assert worker.wait(30) == 0
    assert server.exit_code == 1
    assert "'serve --roles none'" in server.log()
    assert server.log().count("background ended by itself") == 1
    assert "Traceback" not in server.log()


def test_routing_change_reaches_every_process_within_a_second_and_fails_no_request(
    server: PhoenixServer,
) -> None:
    """Traffic is shifted while it flows; a rollback that takes long, or drops requests, is none."""
    # With pauses: the promise is not for a machine that this test alone keeps busy, and it takes over a second.
    traffic = Traffic(server.url, make_body, pause_s=0.005)

    with traffic.flowing(clients=4):
        traffic.await_answers(200)
        with server.opened() as phoenix:
            phoenix.registry.set_routing(MODEL, Routing(Strategy.SINGLE, (Arm("1.1.0"),)), "test")
        changed_at_ms = time.time() * 1000
        traffic.await_answers(1000)

    with server.opened() as phoenix:
        rows = await_logged(phoenix, MODEL, set(traffic.answers))
    # Poll interval 0.1 s; the second is the promise, measured on the rows' own clock.
    late = [row for row in rows if row.created_at_ms > changed_at_ms + 1000 and row.model_version == "1.0.0"]
    assert late == []
    assert (traffic.refusals, traffic.broken) == ([], 0)
    assert any(row.created_at_ms > changed_at_ms and row.model_version == "1.1.0" for row in rows)


def test_outcomes_attach_whether_they_come_before_or_after_the_row(server: PhoenixServer) -> None:
    """Feedback travels the same road as predictions, in another journal: their order is not given."""
    traffic = Traffic(server.url, make_body)
    background = server.pids()["background"]
    server.kill_child("background", signal.SIGSTOP)
    traffic.ask(20, clients=2)
    feedback = [{"prediction_id": prediction_id, "outcome": 1} for prediction_id in traffic.answers]

    response = httpx.post(f"{server.url}/feedback", json=feedback)
    server.kill_child("background", signal.SIGCONT)

    assert (response.status_code, response.json()) == (202, {"accepted": 20})
    assert server.pids()["background"] == background
    with server.opened() as phoenix:
        await_logged(phoenix, MODEL, set(traffic.answers))
        wait_until(lambda: phoenix.prediction_log.unmatched_outcomes(1)[0] == 0, 30, "all are matched")
        assert {phoenix.prediction_log.get(prediction_id).outcome for prediction_id in traffic.answers} == {1}


def test_log_role_by_itself_writes_what_a_server_without_one_has_answered(tmp_path: Path) -> None:
    """Roles can be split over processes; meanwhile readiness says that nobody writes the log."""
    server = PhoenixServer(tmp_path, roles="none")
    server.register(write(tmp_path / "model.onnx", linear_regressor(3)), MODEL, "1.0.0")
    with server:
        traffic = Traffic(server.url, make_body)
        traffic.ask(50, clients=2)
        slots = server.pids()
        before = httpx.get(f"{server.url}/health/ready").json()
        worker = server.popen("work", "log", log=tmp_path / "work.log")
        with server.opened() as phoenix:
            rows = await_logged(phoenix, MODEL, set(traffic.answers))
        after = httpx.get(f"{server.url}/health/ready").json()
        worker.terminate()

    assert list(slots) == ["api-0"]
    assert before["status"] == "degraded"
    assert "no role takes them from there" in before["checks"]["log"]
    assert after["status"] == "ok"
    assert worker.wait(30) == 0
    assert_exactly_once(traffic, rows)
