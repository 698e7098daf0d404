"""Healing by real processes, whatever dies in between: one alert, one request, one challenger."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import onnx_models
import pytest
from log_group import PARTITIONS, Group
from phoenix_server import PhoenixServer
from servers import KafkaServer, PostgresServer, has_ended, new_prefix, wait_until
from sqlalchemy import update
from traffic import await_logged

from phoenix_ml.application.ports import IncidentQuery, JobQuery
from phoenix_ml.domain.features import FeatureRule, FeatureType
from phoenix_ml.domain.healing import JobStatus, RetrainJob
from phoenix_ml.domain.routing import Arm, Role, Routing, Strategy
from phoenix_ml.infrastructure.events.kafka import MODEL_ALERTS, RETRAIN_REQUESTS
from phoenix_ml.infrastructure.sql.database import Database
from phoenix_ml.infrastructure.sql.schema import retrain_jobs

pytestmark = [pytest.mark.system, pytest.mark.timeout(240)]
MODEL = "linear"
CONTRACT = {name: FeatureRule(FeatureType.FLOAT) for name in ("age", "income")}
BATCH_ROWS = 200
# What the world adds to a person's figure: as the champion has learned it, and since it has changed.
THEN, NOW = 0.0, 3.0
CHALLENGE = Routing(Strategy.SHADOW, (Arm("1.0.0"), Arm("1.1.0", Role.SHADOW)))


class People:
    """Applicants with their outcomes, and the ids of the answers that they got."""

    def __init__(self, server: PhoenixServer) -> None:
        self.answers: set[str] = set()
        self._server = server
        self._random = np.random.default_rng(7)

    def table(self, count: int, *, shift: float = 0.0, world: float = THEN) -> dict[str, list[float]]:
        age, income = self._random.normal(size=(2, count)).astype(np.float32)
        income += np.float32(shift)
        figure = np.stack([age, income], axis=1) @ onnx_models.weights(2) + world
        noise = self._random.normal(scale=0.5, size=count)
        return {"age": age.tolist(), "income": income.tolist(), "figure": (figure + noise).tolist()}

    def ask(self, count: int, *, shift: float = 0.0, world: float = THEN) -> None:
        """Each is answered, and tells its outcome."""
        table = self.table(count, shift=shift, world=world)
        for start in range(0, count, 200):
            part = {name: column[start : start + 200] for name, column in table.items()}
            instances = [
                {"features": {"age": age, "income": income}}
                for age, income in zip(part["age"], part["income"], strict=True)
            ]
            body = {"model_id": MODEL, "instances": instances}
            answered = self._post("/predict/batch", body)["predictions"]
            ids = [answer["prediction_id"] for answer in answered]
            self._post(
                "/feedback",
                [
                    {"prediction_id": one, "outcome": outcome}
                    for one, outcome in zip(ids, part["figure"], strict=True)
                ],
            )
            self.answers.update(ids)

    def _post(self, path: str, body: Any) -> Any:
        return httpx.post(f"{self._server.url}{path}", json=body, timeout=30).raise_for_status().json()


def register_champion(server: PhoenixServer, people: People) -> None:
    """With a reference of 4,000 outcomes, watched in small batches; its scores are not looked at."""
    assert server.command("db", "upgrade").returncode == 0
    artifact = onnx_models.write(server.folder / "champion.onnx", onnx_models.linear_regressor(2, bias=THEN))
    server.register(
        artifact,
        MODEL,
        "1.0.0",
        stage="prod",
        contract=CONTRACT,
        reference=people.table(4000),
        outcome="figure",
    )
    changes = [f"batch_rows={BATCH_ROWS}", "left_out=_score"]
    told = server.command(
        "models", "monitoring", MODEL, *(word for one in changes for word in ("--set", one))
    )
    assert told.returncode == 0, told.stderr


def make_trainer(folder: Path, *, waits: bool = False) -> str:
    """A program that writes down who it is, and leaves the model that is right since the world has changed."""
    onnx_models.write(folder / "right.onnx", onnx_models.linear_regressor(2, bias=NOW))
    script = folder / "train.py"
    wait = f"while not os.path.exists({str(folder / 'go')!r}): time.sleep(0.05)"
    script.write_text(
        "import os, shutil, sys, time\n"
        f"open({str(folder / 'trainers')!r}, 'a').write(f'{{os.getpid()}}\\n')\n"
        f"{wait if waits else ''}\n"
        f"shutil.copy({str(folder / 'right.onnx')!r}, sys.argv[1] + '/model.onnx')\n"
    )
    return f"process:{sys.executable} {script} {{out}}"


def trainers(server: PhoenixServer) -> list[int]:
    """The trainers that were started, by their process ids."""
    written = server.folder / "trainers"
    return [int(line) for line in written.read_text().split()] if written.exists() else []


@contextmanager
def working(server: PhoenixServer, *roles: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process `phoenix-ml work ROLES`; it is killed at the end where it still runs."""
    worker = server.popen("work", *roles, log=server.folder / f"work-{'-'.join(roles)}.log")
    try:
        yield worker
    finally:
        worker.kill()
        worker.wait()


def jobs(server: PhoenixServer) -> list[RetrainJob]:
    with server.opened() as phoenix:
        return phoenix.retrain_jobs.page(JobQuery(MODEL))[0]


def versions(server: PhoenixServer) -> list[str]:
    with server.opened() as phoenix:
        return [one.version for one in phoenix.registry.list_versions(MODEL)]


def routing(server: PhoenixServer) -> Routing | None:
    with server.opened() as phoenix:
        return phoenix.registry.routings().get(MODEL)


def let_leases_end(server: PhoenixServer) -> None:
    """As if a minute had passed."""
    with server.opened() as phoenix:
        assert isinstance(phoenix.database, Database)
        with phoenix.database.write() as connection:
            connection.execute(update(retrain_jobs).values(owned_until=0, not_before=0))


def test_a_healer_that_is_killed_while_it_trains_leaves_one_challenger(tmp_path: Path) -> None:
    """The next one takes the job up; nothing trains beside it, and nothing is registered twice."""
    server = PhoenixServer(tmp_path, roles="log", trainer=make_trainer(tmp_path, waits=True))
    people = People(server)
    register_champion(server, people)
    with server:
        people.ask(600, world=NOW)
        with server.opened() as phoenix:
            await_logged(phoenix, MODEL, people.answers)
        httpx.post(f"{server.url}/retrain-jobs", json={"model_id": MODEL}, timeout=30).raise_for_status()
        with working(server, "heal"):
            wait_until(lambda: len(trainers(server)) == 1, 60, "the trainer runs")
        (trainer,) = trainers(server)
        wait_until(lambda: has_ended(trainer), 30, "the trainer has ended with its healer")
        (left,) = jobs(server)

        (tmp_path / "go").touch()
        let_leases_end(server)
        with working(server, "heal"):
            wait_until(lambda: jobs(server)[0].status is JobStatus.REQUESTED, 60, "it is taken up")
            let_leases_end(server)
            wait_until(lambda: jobs(server)[0].status is JobStatus.REGISTERED, 60, "it is registered")

    (done,) = jobs(server)
    assert (left.status, left.attempts, done.attempts) == (JobStatus.TRAINING, 1, 2)
    assert len(trainers(server)) == 2
    assert versions(server) == ["1.0.0", "1.1.0"]
    assert routing(server) == CHALLENGE


@pytest.fixture
def spread_out(
    tmp_path: Path, kafka_server: KafkaServer, postgres_server: PostgresServer
) -> Iterator[PhoenixServer]:
    """A server that ships to Kafka; log, monitor, alerts and healing are processes of their own."""
    kafka_server.start()
    postgres_server.start()
    database = postgres_server.create_database()
    server = PhoenixServer(
        tmp_path,
        events=f"{kafka_server.url}/{new_prefix()}",
        database=database,
        roles="ship",
        registry_poll_ms=100,
        alerts="log:",
        alerts_group_s=3600,
        trainer=make_trainer(tmp_path),
    )
    yield server
    server.kill()
    postgres_server.drop_database(database)


def counted_rows(server: PhoenixServer) -> list[int]:
    with server.opened() as phoenix:
        return [batch.rows for batch in phoenix.monitoring.batches(MODEL, "1.0.0")]


def ids_in(group: Group, topic: str) -> set[str]:
    """A topic may hold a message more than once, under one id."""
    return {msgspec.json.decode(message.value() or b"")["id"] for message in group.messages(topic, 1)}


def test_planted_drift_leads_to_one_alert_one_request_and_one_challenger(spread_out: PhoenixServer) -> None:
    """In spite of a monitor that is killed twice, events that are delivered twice, and a restart of the server.

    What else there is to tell within the hour waits for the next alert; one that was forgotten would be told again.
    """
    server = spread_out
    people = People(server)
    register_champion(server, people)
    with server:
        group = Group(server)
        with working(server, "log") as log:
            with working(server, "monitor", "alert", "heal"):
                people.ask(1000)
                wait_until(lambda: len(counted_rows(server)) >= 2, 60, "the monitor has counted a part")
            people.ask(600, shift=1.0, world=NOW)
            group.await_members(PARTITIONS)
            log.send_signal(signal.SIGTERM)
            assert log.wait(60) == 0
        group.rewind()
        with working(server, "log"):
            with working(server, "monitor", "alert", "heal") as second:
                wait_until(lambda: len(incidents(server)) > 0, 60, "an incident is open")
                os.kill(second.pid, signal.SIGKILL)
            server.restart()
            people.ask(400, shift=1.0, world=NOW)
            with working(server, "monitor", "alert", "heal"):
                wait_until(lambda: len(counted_rows(server)) == 10, 60, "all batches are counted")
                wait_until(lambda: ended(server), 60, "the retraining has ended")
                wait_until(lambda: waiting(server) == 0, 60, "all is told")
            group.await_caught_up()

    with server.opened() as phoenix:
        rows = await_logged(phoenix, MODEL, people.answers)
        alerts, _ = phoenix.monitoring.alerts(MODEL, 100, None)
    (alert,) = alerts
    (job,) = jobs(server)
    assert sorted(row.id for row in rows if row.route["role"] == "champion") == sorted(people.answers)
    assert counted_rows(server) == [BATCH_ROWS] * 10
    assert incidents(server).count(("1.0.0", "drift:income")) == 1
    assert len(set(incidents(server))) == len(incidents(server))
    assert ids_in(group, MODEL_ALERTS) == {alert.id}
    assert ids_in(group, RETRAIN_REQUESTS) == {job.id}
    assert (job.status, job.error) == (JobStatus.REGISTERED, None)
    assert versions(server) == ["1.0.0", "1.1.0"]
    assert routing(server) == CHALLENGE


def incidents(server: PhoenixServer) -> list[tuple[str, str]]:
    with server.opened() as phoenix:
        found, _ = phoenix.monitoring.incidents(IncidentQuery(MODEL, limit=100))
    return [(one.model_version, one.cause) for one in found]


def ended(server: PhoenixServer) -> bool:
    found: Sequence[RetrainJob] = jobs(server)
    return bool(found) and all(
        job.status not in (JobStatus.REQUESTED, JobStatus.TRAINING, JobStatus.CHECKING) for job in found
    )


def waiting(server: PhoenixServer) -> int:
    with server.opened() as phoenix:
        return sum(phoenix.deliveries.waiting().values())
