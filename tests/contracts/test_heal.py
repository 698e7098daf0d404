"""From a request to a challenger, or to the reason why there is none, with real trainers over SQLite and PostgreSQL."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx_models
import pytest
from databases import empty
from onnx import TensorProto, helper
from receiver import receiving
from sample_events import AT_MS, outcome, prediction

from phoenix_ml.application.catalogue import Reference, Registration, activate, register
from phoenix_ml.application.export import is_held_out
from phoenix_ml.application.heal import Healer, HealerSettings
from phoenix_ml.application.monitoring import Monitor
from phoenix_ml.application.ports import (
    IncidentQuery,
    JobQuery,
    MonitorStep,
    RecordedEvent,
    RemoteTrainer,
    TrainingRequest,
    TrainingStopped,
)
from phoenix_ml.application.retraining import accept_failure, accept_model, ask_for_retraining
from phoenix_ml.application.trial import Description, Findings, Trial, try_out
from phoenix_ml.application.watch import ModelState
from phoenix_ml.application.watched_version import Period, VersionState
from phoenix_ml.bootstrap import Phoenix, bootstrap
from phoenix_ml.domain.errors import ArtifactStoreUnavailable, DatabaseUnavailable, JobConflict
from phoenix_ml.domain.features import FeatureRule, FeatureType
from phoenix_ml.domain.healing import JobStatus, RetrainJob
from phoenix_ml.domain.ids import new_id
from phoenix_ml.domain.incidents import Incident, IncidentKind, IncidentStatus, Severity
from phoenix_ml.domain.models import ModelVersion, Stage
from phoenix_ml.domain.routing import Arm, Role, Routing, Strategy, default_routing
from phoenix_ml.domain.rows import RowFormat
from phoenix_ml.infrastructure.artifacts.files import FileArtifacts
from phoenix_ml.infrastructure.engines.onnx import OnnxEngines
from phoenix_ml.infrastructure.sql.healing import SqlRetrainJobs
from phoenix_ml.infrastructure.sql.registry import SqlRegistry
from phoenix_ml.infrastructure.tables import read_columns, read_spread, write_table
from phoenix_ml.infrastructure.training.process import ProcessTrainer
from phoenix_ml.infrastructure.training.webhook import open_remote_trainer
from phoenix_ml.settings import fixed_settings

CONTRACT = {name: FeatureRule(FeatureType.FLOAT) for name in ("age", "income")}
ROWS = 600
# The champion adds 0.25; since the world has changed, 3 would be right.
CHAMPION, RIGHT, WRONG = (onnx_models.linear_regressor(2, bias=bias) for bias in (0.25, 3.0, 9.0))


class Clock:
    now_ms = AT_MS + 10_000

    def __call__(self) -> int:
        return self.now_ms


@pytest.fixture
def phoenix(url: str, tmp_path: Path) -> Iterator[Phoenix]:
    """A champion with 600 predictions on record, all with outcomes."""
    phoenix = bootstrap(fixed_settings(data=tmp_path / "data", database=url))
    with closing(phoenix):
        empty(phoenix.database)
        champion = add(phoenix, "1.0.0", onnx_models.write(tmp_path / "champion.onnx", CHAMPION))
        log_predictions(phoenix, champion)
        yield phoenix


def add(phoenix: Phoenix, version: str, artifact: Path) -> ModelVersion:
    where = phoenix.registry, phoenix.artifacts, phoenix.engines
    register(*where, artifact, Registration("risk", version, Stage.PROD, CONTRACT), actor="ann")
    return activate(*where, "risk", version, actor="ann")


def log_predictions(
    phoenix: Phoenix,
    version: ModelVersion,
    *,
    shift: float = 3.0,
    at_ms: int = AT_MS,
    rows: int = ROWS,
    unit: float = 1.0,
) -> None:
    """In another ``unit`` the model is sent incomes that are so many times what is true of a person."""
    values = np.random.default_rng(1).normal(size=(rows, 2)).astype(np.float32)
    row_format = RowFormat(version.metadata.columns)
    recorded: list[RecordedEvent] = []
    for age, income in values.tolist():
        y = float(np.dot([age, income], onnx_models.weights(2)))
        made = prediction(
            inputs=row_format.pack((age, unit * income)),
            result=float(np.dot([age, unit * income], onnx_models.weights(2))) + 0.25,
            confidence=None,
            probabilities=None,
            role=Role.CHAMPION,
            sha256=version.sha256,
            sources="rr",
            created_at_ms=at_ms,
        )
        recorded += [
            RecordedEvent(event, msgspec.msgpack.encode(event), row_format)
            for event in (made, outcome(made.id, y + shift))
        ]
    phoenix.prediction_log.write(recorded)


def healer(phoenix: Phoenix, folder: Path, program: str, clock: Clock | None = None) -> Healer:
    """Its trainer is a Python program that finds the three models beside it."""
    for name, model in (("right", RIGHT), ("wrong", WRONG), ("two", onnx_models.multi_output_regressor(2))):
        onnx_models.write(folder / f"{name}.onnx", model)
    script = folder / "train.py"
    script.write_text(
        f"import os, shutil, sys\nhere, export, out = {str(folder)!r}, *sys.argv[1:]\n{program}\n"
    )
    trainer = ProcessTrainer(f"{sys.executable} {script} {{export}} {{out}}", limit_s=60, memory_bytes=None)
    return healer_with(phoenix, folder, trainer, clock)


def healer_with(
    phoenix: Phoenix, folder: Path, trainer: ProcessTrainer | RemoteTrainer | None, clock: Clock | None = None
) -> Healer:
    return Healer(
        SqlRetrainJobs(phoenix.database),
        phoenix.monitoring,
        phoenix.registry,
        phoenix.artifacts,
        phoenix.engines,
        phoenix.prediction_log,
        trainer,
        TrialsInline(),
        HealerSettings(folder / "healing"),
        owner="healer-1",
        now_ms=clock or Clock(),
        write_table=write_table,
    )


class TrialsInline:
    """In the test's own process, which is quicker to start."""

    def run(self, trial: Trial | Description, log_path: Path, keep_going: Callable[[], bool]) -> Findings:
        assert isinstance(trial, Trial)
        return try_out(OnnxEngines(), trial, read_spread)


def ask(phoenix: Phoenix, **facts: Any) -> SqlRetrainJobs:
    jobs = SqlRetrainJobs(phoenix.database)
    job = RetrainJob("a" * 32, "risk", "1.0.0", "outcomes", {}, JobStatus.REQUESTED, AT_MS, AT_MS)
    assert jobs.add(msgspec.structs.replace(job, **facts))
    return jobs


TAKES = "shutil.copy(f'{here}/%s.onnx', f'{out}/model.onnx')"
KEEPS = "shutil.copy(export, f'{here}/kept.parquet')"


def test_a_better_model_becomes_a_shadow_beside_the_champion(phoenix: Phoenix, tmp_path: Path) -> None:
    """The new version arrives as a challenger, never as a swap."""
    ask(phoenix)

    job = healer(phoenix, tmp_path, TAKES % "right").step(lambda: True)

    assert job is not None
    assert (job.status, job.new_version, job.error) == (JobStatus.REGISTERED, "1.1.0", None)
    version = phoenix.registry.get("risk", "1.1.0")
    assert (version.stage, version.is_active) == (Stage.STAGING, True)
    assert version.metadata.baseline is not None
    assert phoenix.registry.routings()["risk"] == Routing(
        Strategy.SHADOW, (Arm("1.0.0"), Arm("1.1.0", Role.SHADOW))
    )
    comparison = (job.result or {})["comparison"]
    assert comparison["champion_loss"] == pytest.approx(2.75, abs=1e-5)
    assert comparison["loss"] == pytest.approx(0.0, abs=1e-5)


def test_a_trainer_finds_what_is_in_a_data_folder_that_is_given_by_half_a_path(
    phoenix: Phoenix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default is one, and the trainer runs elsewhere."""
    ask(phoenix)
    doctor = healer(phoenix, tmp_path, f"{KEEPS}; {TAKES % 'right'}")
    monkeypatch.chdir(tmp_path)
    doctor._settings = HealerSettings(Path("healing"))

    job = doctor.step(lambda: True)

    assert job is not None
    assert (job.status, job.error) == (JobStatus.REGISTERED, None)


def test_the_trainer_never_sees_what_versions_are_compared_over(phoenix: Phoenix, tmp_path: Path) -> None:
    """A model that has learned the answers by heart would win every comparison."""
    ask(phoenix)

    healer(phoenix, tmp_path, f"{KEEPS}; {TAKES % 'right'}").step(lambda: True)

    exported = read_columns(tmp_path / "kept.parquet")
    assert len(exported["_prediction_id"]) == pytest.approx(ROWS * 0.8, abs=50)
    assert not any(map(is_held_out, exported["_prediction_id"]))


def test_a_retrained_version_is_held_to_what_it_does_on_rows_that_it_has_not_learned(
    phoenix: Phoenix, tmp_path: Path
) -> None:
    """By its own training rows it would be held to less errors than it can do, and be blamed at once."""
    ask(phoenix)

    healer(phoenix, tmp_path, f"{KEEPS}; {TAKES % 'right'}").step(lambda: True)

    exported = read_columns(tmp_path / "kept.parquet")
    trained_on = len(exported["_prediction_id"])
    baseline = phoenix.registry.get("risk", "1.1.0").metadata.baseline
    assert baseline is not None
    assert baseline.quality is not None
    assert (baseline.rows, baseline.quality.n) == (ROWS, ROWS - trained_on)


@pytest.mark.parametrize(
    ("program", "status", "words"),
    [
        (TAKES % "wrong", JobStatus.REJECTED, "it is worse than 1.0.0: 6 against 2.75"),
        (TAKES % "champion", JobStatus.REJECTED, "it is the very file of 1.0.0"),
        ("open(f'{out}/model.onnx', 'wb').write(b'garbage')", JobStatus.REJECTED, "not an ONNX model"),
        (TAKES % "two", JobStatus.REJECTED, "several answers a row"),
        (
            f"{TAKES % 'right'}; open(f'{{out}}/features.json', 'wb').write(bytes([123, 34, 255, 34, 58]))",
            JobStatus.REJECTED,
            "features.json is no feature contract",
        ),
        (
            f"{TAKES % 'right'}; open(f'{{out}}/features.json', 'w').truncate(2_000_000)",
            JobStatus.REJECTED,
            "features.json has more than 1048576 bytes",
        ),
        ("raise SystemExit(3)", JobStatus.REQUESTED, "exit code 3"),
        ("pass", JobStatus.REQUESTED, "left no model.onnx"),
    ],
)
def test_a_model_that_is_no_better_changes_nothing_and_says_why(
    phoenix: Phoenix, tmp_path: Path, program: str, status: JobStatus, words: str
) -> None:
    """Healing must never make it worse."""
    ask(phoenix)
    before = phoenix.registry.revision()

    job = healer(phoenix, tmp_path, program).step(lambda: True)

    assert job is not None
    assert job.status is status
    assert words in str(job.error)
    assert phoenix.registry.revision() == before


def test_what_fails_is_tried_again_later_and_then_given_up(phoenix: Phoenix, tmp_path: Path) -> None:
    """A full disk passes, a wrong program does not."""
    ask(phoenix)
    clock = Clock()
    doctor = healer(phoenix, tmp_path, "print('no luck'); raise SystemExit(3)", clock)
    seen = []
    for _ in range(8):
        job = doctor.step(lambda: True)
        seen.append(None if job is None else (job.status.value, job.attempts))
        clock.now_ms += 60_000

    assert seen == [
        ("requested", 1),
        ("requested", 2),
        None,
        ("failed", 3),
        None,
        None,
        None,
        None,
    ]
    assert "no luck" in SqlRetrainJobs(phoenix.database).get("a" * 32).log_tail


def test_an_experiment_that_runs_is_not_disturbed(phoenix: Phoenix, tmp_path: Path) -> None:
    """Whoever set it up counts on its shares."""
    add(
        phoenix,
        "1.0.1",
        onnx_models.write(tmp_path / "other.onnx", onnx_models.linear_regressor(2, bias=1.0)),
    )
    running = Routing(Strategy.CANARY, (Arm("1.0.0", weight=9), Arm("1.0.1", Role.CHALLENGER)))
    phoenix.registry.set_routing("risk", running, "ann")
    ask(phoenix)

    job = healer(phoenix, tmp_path, TAKES % "right").step(lambda: True)

    assert job is not None
    assert (job.result or {})["routing"] == "unchanged: canary of 1.0.0, 1.0.1 goes on"
    assert phoenix.registry.routings()["risk"] == running


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("none", None),
        (
            "ab:0.25",
            Routing(Strategy.AB_TEST, (Arm("1.0.0", weight=0.75), Arm("1.1.0", Role.CHALLENGER, 0.25))),
        ),
    ],
)
def test_the_models_policy_says_what_a_challenger_does(
    phoenix: Phoenix, tmp_path: Path, policy: str, expected: Routing | None
) -> None:
    """Some take a share of the traffic at once, some wait for a person."""
    phoenix.monitoring.change_settings("risk", {"challenger_policy": policy}, "ann")
    ask(phoenix)

    healer(phoenix, tmp_path, TAKES % "right").step(lambda: True)

    assert phoenix.registry.routings().get("risk") == expected
    assert phoenix.registry.get("risk", "1.1.0").stage is Stage.STAGING


class LosesDatabase(SqlRetrainJobs):
    """The database goes away, once, just before a job becomes this."""

    def __init__(self, phoenix: Phoenix, before: JobStatus) -> None:
        super().__init__(phoenix.database)
        self._before: JobStatus | None = before

    def move(self, job: RetrainJob, status: JobStatus, at_ms: int, **facts: Any) -> RetrainJob | None:
        if status is self._before:
            self._before = None
            raise DatabaseUnavailable("the database is away")
        return super().move(job, status, at_ms, **facts)


@pytest.mark.parametrize("before", [JobStatus.CHECKING, JobStatus.REGISTERED])
def test_a_database_that_is_away_for_a_moment_costs_no_second_training(
    phoenix: Phoenix, tmp_path: Path, before: JobStatus
) -> None:
    """A training is hours of work; and there is exactly one challenger, whatever goes away in between."""
    jobs = ask(phoenix)
    clock = Clock()
    doctor = healer(phoenix, tmp_path, f"open(f'{{here}}/runs', 'a').write('x'); {TAKES % 'right'}", clock)
    doctor._jobs = LosesDatabase(phoenix, before)
    with pytest.raises(DatabaseUnavailable):
        doctor.step(lambda: True)
    clock.now_ms += 60_000
    doctor.step(lambda: True)

    job = jobs.get("a" * 32)
    assert (job.status, job.attempts, job.new_version) == (JobStatus.REGISTERED, 1, "1.1.0")
    assert (tmp_path / "runs").read_text() == "x"
    assert [one.version for one in phoenix.registry.list_versions("risk")] == ["1.0.0", "1.1.0"]


def test_a_model_that_was_changed_since_its_training_is_not_taken_for_it(
    phoenix: Phoenix, tmp_path: Path
) -> None:
    """Half of a file may be left where a disk was full."""
    jobs = ask(phoenix)
    clock = Clock()
    doctor = healer(phoenix, tmp_path, TAKES % "right", clock)
    doctor._jobs = LosesDatabase(phoenix, JobStatus.CHECKING)
    with pytest.raises(DatabaseUnavailable):
        doctor.step(lambda: True)
    (tmp_path / "healing" / ("a" * 32) / "out" / "model.onnx").write_bytes(RIGHT[:100])
    clock.now_ms += 60_000
    doctor.step(lambda: True)

    assert (jobs.get("a" * 32).status, jobs.get("a" * 32).error) == (
        JobStatus.REQUESTED,
        "the healer that had it is gone",
    )


def test_a_healer_that_has_lost_its_job_leaves_it_to_the_one_that_has_it(
    phoenix: Phoenix, tmp_path: Path
) -> None:
    """A healer that was stopped for a minute, with its machine, must not take the job back."""
    jobs = ask(phoenix)
    clock = Clock()
    slow = healer(phoenix, tmp_path, "import time; time.sleep(600)", clock)
    taken: list[Any] = []

    def another_comes() -> bool:
        clock.now_ms += 120_000
        taken.append(jobs.lease("healer-2", clock.now_ms, clock.now_ms + 60_000))
        return True

    slow.step(another_comes)

    assert taken[0] is not None
    assert jobs.get("a" * 32) == taken[0]


def test_a_stop_of_the_healer_is_no_failed_attempt(phoenix: Phoenix, tmp_path: Path) -> None:
    """Three deployments during a training would end it, and each would delay it."""
    jobs = ask(phoenix)

    healer(phoenix, tmp_path, "import time; time.sleep(600)").step(lambda: False)

    job = jobs.get("a" * 32)
    assert (job.status, job.attempts, job.not_before_ms <= Clock.now_ms) == (JobStatus.REQUESTED, 0, True)


class Trying(TrialsInline):
    """Something happens while the model is tried out."""

    def __init__(self, happens: Callable[[Callable[[], bool]], object]) -> None:
        self._happens = happens

    def run(self, trial: Trial | Description, log_path: Path, keep_going: Callable[[], bool]) -> Findings:
        self._happens(keep_going)
        return super().run(trial, log_path, keep_going)


def two_healers(phoenix: Phoenix, folder: Path, clock: Clock) -> tuple[Healer, Healer]:
    first, second = (healer(phoenix, folder / name, TAKES % "right", clock) for name in ("a", "b"))
    second._owner = "healer-2"
    return first, second


def test_a_check_that_takes_longer_than_a_lease_keeps_its_job(phoenix: Phoenix, tmp_path: Path) -> None:
    """Else another healer would train the model a second time, and one of two versions would have no job."""
    jobs = ask(phoenix)
    clock = Clock()
    first, second = two_healers(phoenix, tmp_path, clock)
    taken: list[RetrainJob | None] = []

    def last_long(keep_going: Callable[[], bool]) -> None:
        for _ in range(10):
            clock.now_ms += 30_000
            assert keep_going()
            taken.append(second.step(lambda: True))

    first._trials = Trying(last_long)
    done = first.step(lambda: True)

    assert taken == [None] * 10
    assert done == jobs.get("a" * 32)
    assert done.status is JobStatus.REGISTERED
    assert [one.version for one in phoenix.registry.list_versions("risk")] == ["1.0.0", "1.1.0"]


def test_a_healer_that_was_frozen_while_it_checked_registers_nothing(
    phoenix: Phoenix, tmp_path: Path
) -> None:
    """A machine that sleeps renews no lease, and wakes in the middle of another healer's work."""
    jobs = ask(phoenix)
    clock = Clock()
    first, second = two_healers(phoenix, tmp_path, clock)

    def sleep(_: Callable[[], bool]) -> None:
        clock.now_ms += 61_000
        assert second.step(lambda: True) is not None

    first._trials = Trying(sleep)
    assert first.step(lambda: True) is None
    meanwhile = [one.version for one in phoenix.registry.list_versions("risk")]
    clock.now_ms += 3_600_000
    second.step(lambda: True)

    assert meanwhile == ["1.0.0"]
    assert (jobs.get("a" * 32).status, jobs.get("a" * 32).new_version) == (JobStatus.REGISTERED, "1.1.0")
    assert [one.version for one in phoenix.registry.list_versions("risk")] == ["1.0.0", "1.1.0"]


def test_a_healer_that_was_frozen_while_it_registered_routes_nothing(
    phoenix: Phoenix, tmp_path: Path
) -> None:
    """Meanwhile somebody may have ended the job, or chosen another routing because of it."""
    jobs = ask(phoenix)
    clock = Clock()
    first, _ = two_healers(phoenix, tmp_path, clock)

    class Sleeps(SqlRegistry):
        def add(self, version: ModelVersion, actor: str) -> None:
            super().add(version, actor)
            clock.now_ms += 61_000
            assert jobs.lease("healer-2", clock.now_ms, clock.now_ms + 60_000) is not None

    first._registry = Sleeps(phoenix.database)

    assert first.step(lambda: True) is None
    assert jobs.get("a" * 32).owner == "healer-2"
    assert phoenix.registry.routings() == {}


def test_a_stop_during_the_check_costs_no_training(phoenix: Phoenix, tmp_path: Path) -> None:
    """What is trained is checked again by whoever comes next, at once."""
    jobs = ask(phoenix)
    doctor = healer(phoenix, tmp_path, f"open(f'{{here}}/runs', 'a').write('x'); {TAKES % 'right'}")

    def stop(_: Callable[[], bool]) -> None:
        raise TrainingStopped("the healer stops")

    doctor._trials = Trying(stop)
    for _ in range(4):
        assert doctor.step(lambda: True) is None
    doctor._trials = TrialsInline()
    doctor.step(lambda: True)

    assert (jobs.get("a" * 32).status, jobs.get("a" * 32).attempts) == (JobStatus.REGISTERED, 1)
    assert (tmp_path / "runs").read_text() == "x"


class KilledByTheKernel(BaseException):
    """As memory runs out: nothing of the healer runs after it."""


def test_a_check_that_kills_its_healer_again_and_again_comes_to_an_end(
    phoenix: Phoenix, tmp_path: Path
) -> None:
    """The healer's process writes the log: it would be restarted for ever."""
    jobs = ask(phoenix)
    clock = Clock()

    def die(_: Callable[[], bool]) -> None:
        raise KilledByTheKernel

    doctor = healer(phoenix, tmp_path, TAKES % "right", clock)
    doctor._trials = Trying(die)
    for _ in range(3):
        with pytest.raises(KilledByTheKernel):
            doctor.step(lambda: True)
        clock.now_ms += 60_000
    doctor.step(lambda: True)

    job = jobs.get("a" * 32)
    assert (job.status, job.error) == (
        JobStatus.FAILED,
        "its check has begun 3 times, and come to no end",
    )


def test_a_defect_ends_the_job_and_not_the_process(
    phoenix: Phoenix, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The log and the monitor are in the same process, which would be restarted with the same job for ever."""
    jobs = ask(phoenix)
    clock = Clock()

    def fail(_: Callable[[], bool]) -> None:
        raise ZeroDivisionError("a defect")

    doctor = healer(phoenix, tmp_path, TAKES % "right", clock)
    doctor._trials = Trying(fail)
    for _ in range(3):
        doctor.step(lambda: True)
        clock.now_ms += 3_600_000

    job = jobs.get("a" * 32)
    assert (job.status, job.attempts) == (JobStatus.FAILED, 3)
    assert "ZeroDivisionError: a defect" in str(job.error)
    assert "Traceback" in caplog.text


# What the monitor has seen since it asked, and what people have said.


def open_incident(phoenix: Phoenix, cause: str, *, explains_drift: bool) -> None:
    found = Incident(
        id=new_id(),
        model_id="risk",
        model_version="1.0.0",
        kind=IncidentKind(cause.partition(":")[0].replace("missing", "drift")),
        cause=cause,
        severity=Severity.CRITICAL,
        summary="income comes in another unit",
        evidence={"explains_drift": explains_drift},
        status=IncidentStatus.OPEN,
        opened_at_ms=AT_MS,
        updated_at_ms=AT_MS,
    )
    was = phoenix.monitoring.standings()["risk"].position
    now = msgspec.structs.replace(was, seq=was.seq + 1)
    assert phoenix.monitoring.commit(MonitorStep("risk", was, now, b"", AT_MS, opened=(found,)))


@pytest.mark.parametrize(
    ("cause", "explains_drift", "evidence", "status"),
    [
        ("schema:income:unit", True, {"drifted": ["income"]}, JobStatus.REJECTED),
        # A value out of its range may be of the new world, and one in a thousand is no reason.
        ("schema:income:range", False, {"drifted": ["income"]}, JobStatus.REGISTERED),
        ("schema:income:infinite", False, {"drifted": ["income"]}, JobStatus.REGISTERED),
        ("drift:income", False, {"drifted": ["income"]}, JobStatus.REGISTERED),
        ("missing:income", True, {"drifted": ["income"]}, JobStatus.REJECTED),
        ("missing:income", False, {"drifted": ["income"]}, JobStatus.REGISTERED),  # fewer are missing
        ("schema:income:unit", True, {}, JobStatus.REGISTERED),  # a person has asked
    ],
)
def test_nothing_is_trained_on_data_that_has_turned_out_to_be_broken(
    phoenix: Phoenix,
    tmp_path: Path,
    cause: str,
    explains_drift: bool,
    evidence: dict[str, Any],
    status: JobStatus,
) -> None:
    """The monitor may ask, and see a day later that amounts come in another unit."""
    jobs = ask(phoenix, evidence=evidence)
    open_incident(phoenix, cause, explains_drift=explains_drift)

    healer(phoenix, tmp_path, f"open(f'{{here}}/runs', 'a').write('x'); {TAKES % 'right'}").step(lambda: True)

    job = jobs.get("a" * 32)
    assert job.status is status
    assert (tmp_path / "runs").exists() is (status is JobStatus.REGISTERED)
    if status is JobStatus.REJECTED:
        assert job.error == f"its data is broken, which no model must learn: {cause} is open"


def test_a_model_whose_data_turns_out_to_be_broken_while_it_is_trained_is_not_registered(
    phoenix: Phoenix, tmp_path: Path
) -> None:
    """A training takes hours, in which the monitor goes on watching."""
    jobs = ask(phoenix, evidence={"drifted": ["income"]})
    doctor = healer(phoenix, tmp_path, TAKES % "right")
    doctor._trials = Trying(lambda _: open_incident(phoenix, "schema:income:unit", explains_drift=True))

    doctor.step(lambda: True)

    assert jobs.get("a" * 32).status is JobStatus.REJECTED
    assert [one.version for one in phoenix.registry.list_versions("risk")] == ["1.0.0"]


@pytest.mark.parametrize(
    ("evidence", "status"),
    [({"drifted": ["income"]}, JobStatus.REJECTED), ({}, JobStatus.REGISTERED)],  # a person may know better
)
def test_a_defect_that_begins_and_ends_while_a_model_is_trained_was_in_its_data(
    phoenix: Phoenix, tmp_path: Path, evidence: dict[str, Any], status: JobStatus
) -> None:
    """It is told when its batch is full: its first rows were exported before anybody knew."""
    clock = Clock()
    jobs = ask(phoenix, evidence=evidence, requested_at_ms=clock.now_ms)
    doctor = healer(phoenix, tmp_path, TAKES % "right", clock)
    it_was = Period(clock.now_ms - 1_000, clock.now_ms + 60_000)
    doctor._trials = Trying(lambda _: see_broken_data(phoenix, it_was))

    doctor.step(lambda: True)

    job = jobs.get("a" * 32)
    assert job.status is status
    if status is JobStatus.REJECTED:
        assert job.error == "what it was trained on was broken, as was seen after its export"


def see_broken_data(phoenix: Phoenix, *periods: Period) -> None:
    """As a monitor that has seen it."""
    was = phoenix.monitoring.standings()["risk"].position
    now = msgspec.structs.replace(was, seq=was.seq + 1)
    state = msgspec.msgpack.encode(ModelState({"1.0.0": VersionState(broken=list(periods))}))
    assert phoenix.monitoring.commit(MonitorStep("risk", was, now, state, AT_MS))


def watch_a_defect(phoenix: Phoenix, folder: Path) -> Clock:
    """Logs 800 whole rows around 300 of an income that comes a thousandfold; the monitor has seen it begin and end."""
    empty(phoenix.database)
    values = np.random.default_rng(4).normal(size=(4000, 2))
    where = phoenix.registry, phoenix.artifacts, phoenix.engines
    artifact = onnx_models.write(folder / "watched.onnx", CHAMPION)
    register(
        *where,
        artifact,
        Registration("risk", "1.0.0", Stage.PROD, CONTRACT),
        actor="ann",
        reference=Reference({"age": values[:, 0].tolist(), "income": values[:, 1].tolist()}),
    )
    champion = activate(*where, "risk", "1.0.0", actor="ann")
    phoenix.monitoring.change_settings("risk", {"batch_rows": 200}, "ann")
    clock = Clock()
    monitor = Monitor(phoenix.monitoring, phoenix.registry, phoenix.artifacts, now_ms=clock)
    # In batches of 200: one whole, one half and one fully broken, two whole ones that end it, two after that.
    for rows, unit in ((200, 1.0), (100, 1.0), (300, 1000.0), (400, 1.0), (400, 1.0)):
        clock.now_ms += 60_000
        log_predictions(phoenix, champion, at_ms=clock.now_ms, rows=rows, unit=unit)
        clock.now_ms += 1000
        while monitor.step().rows:
            pass
    return clock


def test_what_was_sent_while_the_data_was_broken_is_never_learned(phoenix: Phoenix, tmp_path: Path) -> None:
    """The defect is over, and its rows lie among those to train on, to compare over and to describe the model by."""
    clock = watch_a_defect(phoenix, tmp_path)
    (defect,), _ = phoenix.monitoring.incidents(IncidentQuery("risk", limit=1))
    ask(phoenix, requested_at_ms=clock.now_ms)

    job = healer(phoenix, tmp_path, f"{KEEPS}; {TAKES % 'right'}", clock).step(lambda: True)

    exported = read_columns(tmp_path / "kept.parquet")
    assert (defect.cause, defect.status) == ("schema:income:unit", "resolved")
    assert job is not None
    assert (job.status, job.error) == (JobStatus.REGISTERED, None)
    assert max(map(abs, exported["income"])) < 10
    # From the first row of the batch that showed it, to the second whole batch after it.
    result = job.result or {}
    assert result["left_out_as_broken"] == 100 + 300 + 400
    assert len(exported["income"]) + result["comparison"]["n"] == 200 + 400
    assert result["comparison"]["champion_loss"] == pytest.approx(2.75, abs=1e-5)
    assert result["comparison"]["loss"] == pytest.approx(0.0, abs=1e-5)
    baseline = phoenix.registry.get("risk", "1.1.0").metadata.baseline
    assert baseline is not None
    assert baseline.rows == 200 + 400


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (
            TAKES % "right",
            "there is nothing to train on; 600 predictions are left out, as their data was broken",
        ),
        (None, "0 outcomes are kept for a comparison, and it takes 50; 600 predictions are left out"),
    ],
)
def test_a_job_without_whole_data_says_that_it_was_broken(
    phoenix: Phoenix, tmp_path: Path, program: str | None, words: str
) -> None:
    """Whoever sees hundreds of outcomes on record would look for the fault in the healer."""
    ask(phoenix)
    see_broken_data(phoenix, Period(AT_MS))

    if program is None:
        hand_in(phoenix, tmp_path)
        job = healer_with(phoenix, tmp_path, None).step(lambda: True)
    else:
        job = healer(phoenix, tmp_path, program).step(lambda: True)

    assert job is not None
    assert words in str(job.error)


@pytest.mark.parametrize("paused", ["risk", "*"])
def test_what_the_monitor_has_asked_for_waits_while_healing_is_paused(
    phoenix: Phoenix, tmp_path: Path, paused: str
) -> None:
    """Whoever pauses does not want a challenger in an hour, because a request stood in the queue."""
    jobs = ask(phoenix, evidence={"drifted": ["income"]})
    clock = Clock()
    doctor = healer(phoenix, tmp_path, TAKES % "right", clock)
    phoenix.monitoring.change_settings(paused, {"healing_paused": True}, "ann")
    doctor.step(lambda: True)
    waits, at_once = jobs.get("a" * 32), doctor.step(lambda: True)

    phoenix.monitoring.change_settings(paused, {"healing_paused": None}, "ann")
    clock.now_ms += 60_000
    doctor.step(lambda: True)

    assert (waits.status, waits.attempts, waits.error) == (
        JobStatus.REQUESTED,
        0,
        "healing is paused: heal resume, or heal run",
    )
    assert at_once is None
    assert (jobs.get("a" * 32).status, jobs.get("a" * 32).error) == (JobStatus.REGISTERED, None)


def test_what_a_person_asks_for_goes_on_while_healing_is_paused(phoenix: Phoenix, tmp_path: Path) -> None:
    """The pause is of what the monitor asks; and a request of the monitor's that waits must not hide the person's."""
    jobs = ask(phoenix, evidence={"drifted": ["income"]})
    phoenix.monitoring.change_settings("risk", {"healing_paused": True}, "ann")

    asked, is_new = ask_as_ann(phoenix)
    doctor = healer(phoenix, tmp_path, TAKES % "right")
    doctor.step(lambda: True)
    doctor.step(lambda: True)

    assert is_new
    assert (jobs.get("a" * 32).status, jobs.get(asked.id).status) == (
        JobStatus.REQUESTED,
        JobStatus.REGISTERED,
    )


# Whether the file answers as the library that it was made with.


def sample(results: str) -> str:
    """Leaves a sample of 200 rows for which the trainer's own library answers this."""
    return (
        f"{TAKES % 'right'}; import numpy as np, pyarrow as pa, pyarrow.parquet as pq; "
        "a, b = np.random.default_rng(3).normal(size=(2, 200)).astype('float32'); right = 0.5 * a - b + 3; "
        f"pq.write_table(pa.table({{'age': a, 'income': b, '_result': {results}}}), f'{{out}}/sample.parquet')"
    )


@pytest.mark.parametrize(
    ("results", "words"),
    [
        ("right", None),
        ("right * 1.0005", None),
        ("np.where(np.arange(200) < 2, 99.0, right)", None),
        ("np.where(np.arange(200) < 3, 99.0, right)", "3 of 200 rows of its sample differ, such as row 1, "),
        ("right * 1.01", "rows of its sample differ"),
        ("np.where(np.arange(200) < 3, np.nan, right)", "200 of 200 rows"),
        ("['x'] * 200", "the trainer's sample cannot be compared"),
    ],
)
def test_a_file_that_answers_otherwise_than_its_library_is_rejected(
    phoenix: Phoenix, tmp_path: Path, results: str, words: str | None
) -> None:
    """A conversion that loses a category is a worse model than the one that was trained, if not worse than the champion."""
    ask(phoenix)

    job = healer(phoenix, tmp_path, sample(results)).step(lambda: True)

    assert job is not None
    assert job.status is (JobStatus.REJECTED if words else JobStatus.REGISTERED)
    assert (words or "") in str(job.error)


def test_a_job_that_has_ended_leaves_its_logs_and_no_more(phoenix: Phoenix, tmp_path: Path) -> None:
    """Exports and models of a year would fill the disk, which stops the journals."""
    ask(phoenix)

    healer(phoenix, tmp_path, f"print('well done'); {TAKES % 'right'}").step(lambda: True)

    left = [path for path in (tmp_path / "healing").rglob("*") if path.is_file()]
    assert [(path.name, path.read_text()) for path in left] == [("trainer.log", "well done\n")]


def test_a_champion_that_was_replaced_meanwhile_does_not_come_back(phoenix: Phoenix, tmp_path: Path) -> None:
    """A person has chosen another one since the monitor asked."""
    ask(phoenix)
    add(phoenix, "1.0.5", onnx_models.write(tmp_path / "o.onnx", onnx_models.linear_regressor(2, bias=2.0)))
    chosen = Routing(Strategy.SINGLE, (Arm("1.0.5"),))
    phoenix.registry.set_routing("risk", chosen, "ann")

    healer(phoenix, tmp_path, TAKES % "right").step(lambda: True)

    routing = phoenix.registry.routings()["risk"]
    assert next(arm.version for arm in routing.arms if arm.role is Role.CHAMPION) == "1.0.5"


def test_a_champion_that_was_deactivated_meanwhile_ends_no_process(phoenix: Phoenix, tmp_path: Path) -> None:
    """What a role raises ends the log and the monitor with it, again and again."""
    jobs = ask(phoenix)
    add(phoenix, "1.0.5", onnx_models.write(tmp_path / "o.onnx", onnx_models.linear_regressor(2, bias=2.0)))
    phoenix.registry.set_routing("risk", Routing(Strategy.SINGLE, (Arm("1.0.5"),)), "ann")
    phoenix.registry.set_active("risk", "1.0.0", False, "ann")

    healer(phoenix, tmp_path, TAKES % "right").step(lambda: True)

    assert jobs.get("a" * 32).error or jobs.get("a" * 32).status is JobStatus.REGISTERED


class StoreIsAway(FileArtifacts):
    """It takes nothing for now."""

    def put(self, path: Path) -> Any:
        raise ArtifactStoreUnavailable("the store is away")


def test_a_store_that_is_away_rejects_no_model(phoenix: Phoenix, tmp_path: Path) -> None:
    """It is no fault of the model's, and a training is hours of work: it is registered when the store is back."""
    jobs = ask(phoenix)
    clock = Clock()
    doctor = healer(phoenix, tmp_path, TAKES % "right", clock)
    doctor._artifacts = StoreIsAway(phoenix.settings.data / "artifacts")
    with pytest.raises(ArtifactStoreUnavailable):
        doctor.step(lambda: True)

    doctor._artifacts = phoenix.artifacts
    clock.now_ms += 60_000
    doctor.step(lambda: True)

    assert (jobs.get("a" * 32).status, jobs.get("a" * 32).attempts) == (JobStatus.REGISTERED, 1)


def test_a_disk_that_is_full_ends_no_process(phoenix: Phoenix, tmp_path: Path) -> None:
    """Then the log and the monitor must go on."""
    jobs = ask(phoenix)
    (tmp_path / "healing").write_text("not a folder")

    healer(phoenix, tmp_path, TAKES % "right").step(lambda: True)

    assert "Not a directory" in str(jobs.get("a" * 32).error)


def sometimes_nan() -> bytes:
    """Right where the first feature is positive, NaN elsewhere."""
    model = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["xw"]),
            helper.make_node("Add", ["xw", "b"], ["right"]),
            helper.make_node("MatMul", ["x", "first"], ["age"]),
            helper.make_node("Sqrt", ["age"], ["root"]),
            helper.make_node("Mul", ["root", "zero"], ["nothing"]),
            helper.make_node("Add", ["right", "nothing"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ("n", 2))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ("n", 1))],
        [
            helper.make_tensor("w", TensorProto.FLOAT, (2, 1), onnx_models.weights(2)),
            helper.make_tensor("first", TensorProto.FLOAT, (2, 1), [1.0, 0.0]),
            helper.make_tensor("b", TensorProto.FLOAT, (1,), [3.0]),
            helper.make_tensor("zero", TensorProto.FLOAT, (1,), [0.0]),
        ],
    )
    made = helper.make_model(model, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(made.SerializeToString())


def test_a_model_that_sometimes_answers_no_number_is_rejected(phoenix: Phoenix, tmp_path: Path) -> None:
    """A comparison with NaN in it is never worse."""
    jobs = ask(phoenix)
    onnx_models.write(tmp_path / "nan.onnx", sometimes_nan())

    healer(phoenix, tmp_path, TAKES % "nan").step(lambda: True)

    assert jobs.get("a" * 32).status is JobStatus.REJECTED
    assert "risk" not in phoenix.registry.routings()


def test_the_challenger_answers_nobody_while_it_is_put_in_place(phoenix: Phoenix, tmp_path: Path) -> None:
    """Without a routing the active version of the best stage answers: beside a champion in dev, the new one."""
    where = phoenix.registry, phoenix.artifacts, phoenix.engines
    empty(phoenix.database)
    first = onnx_models.write(tmp_path / "dev.onnx", onnx_models.linear_regressor(2))
    register(*where, first, Registration("risk", "1.0.0", Stage.DEV, CONTRACT), actor="ann")
    log_predictions(phoenix, activate(*where, "risk", "1.0.0", actor="ann"))
    ask(phoenix)
    doctor = healer(phoenix, tmp_path, TAKES % "right")
    answering: list[str] = []

    class Watched(SqlRegistry):
        def set_active(self, model_id: str, version: str, active: bool, actor: str) -> ModelVersion:
            done = super().set_active(model_id, version, active, actor)
            versions = [one for one in self.list_versions("risk") if one.is_active]
            routing = self.routings().get("risk") or default_routing(versions)
            assert routing is not None
            answering.append(next(arm.version for arm in routing.arms if arm.role is Role.CHAMPION))
            return done

    doctor._registry = Watched(phoenix.database)
    doctor.step(lambda: True)

    assert answering == ["1.0.0"]


def test_outcomes_of_the_world_as_it_was_do_not_outvote_those_since(phoenix: Phoenix, tmp_path: Path) -> None:
    """The champion is good at what was: that is why it suffers now."""
    empty(phoenix.database)
    champion = add(phoenix, "1.0.0", onnx_models.write(tmp_path / "c2.onnx", onnx_models.linear_regressor(2)))
    log_predictions(phoenix, champion, shift=0.25, at_ms=AT_MS - 20 * 24 * 3_600_000, rows=6000)
    log_predictions(phoenix, champion, shift=3.0, at_ms=AT_MS, rows=1500)
    jobs = ask(phoenix)

    healer(phoenix, tmp_path, TAKES % "right").step(lambda: True)

    assert (jobs.get("a" * 32).status, jobs.get("a" * 32).error) == (JobStatus.REGISTERED, None)


def test_a_reference_that_the_model_answers_with_nan_leaves_the_registry_readable(
    phoenix: Phoenix, tmp_path: Path
) -> None:
    """One version that cannot be read hides all models from every process."""
    values = np.random.default_rng(2).normal(size=(600, 2))
    columns = {"age": values[:, 0].tolist(), "income": values[:, 1].tolist(), "paid": values.sum(1).tolist()}
    artifact = onnx_models.write(tmp_path / "nan.onnx", sometimes_nan())

    register(
        phoenix.registry,
        phoenix.artifacts,
        phoenix.engines,
        artifact,
        Registration("other", "1.0.0", features=CONTRACT),
        actor="ann",
        reference=Reference(columns, outcome="paid"),
    )

    assert [one.model_id for one in phoenix.registry.list_versions()] == ["other", "risk"]


# Trainers outside.


def hand_in(phoenix: Phoenix, folder: Path, model: bytes = RIGHT, **facts: Any) -> RetrainJob:
    path = onnx_models.write(folder / "handed-in.onnx", model)
    where = phoenix.registry, SqlRetrainJobs(phoenix.database), phoenix.artifacts
    return accept_model(*where, "a" * 32, path, None, **{"now_ms": AT_MS} | facts)


def test_a_model_that_is_trained_outside_is_checked_and_registered(phoenix: Phoenix, tmp_path: Path) -> None:
    """Whoever trains elsewhere is asked once, and what they hand in goes the same way as any other."""
    jobs = ask(phoenix)
    clock = Clock()
    with receiving() as outside:
        trainer = open_remote_trainer(f"webhook:http://{outside.host}/train", "")
        doctor = healer_with(phoenix, tmp_path, trainer, clock)
        asked = doctor.step(lambda: True)
        again = doctor.step(lambda: True)
        hand_in(phoenix, tmp_path)
        job = doctor.step(lambda: True)

    assert asked is not None
    assert (asked.status, asked.owner) == (JobStatus.TRAINING, "outside")
    assert again is None
    ((_, _, body),) = outside.calls
    request = msgspec.json.decode(body)["data"]
    assert (request["job_id"], request["model_id"], request["new_version"]) == ("a" * 32, "risk", "1.1.0")
    assert job is not None
    assert (job.status, job.new_version, job.error) == (JobStatus.REGISTERED, "1.1.0", None)
    version = phoenix.registry.get("risk", "1.1.0")
    assert version.metadata.baseline is not None
    assert jobs.get("a" * 32) == job


@pytest.mark.parametrize(
    ("answers", "status"), [([3.5, 2.0, 3.0], JobStatus.REGISTERED), ([3.5, 2.0, 4.0], JobStatus.REJECTED)]
)
def test_a_model_that_is_handed_in_must_answer_as_its_own_library(
    phoenix: Phoenix, tmp_path: Path, answers: list[float], status: JobStatus
) -> None:
    """A pipeline outside converts models as well, and loses as much by it. The right one answers age / 2 - income + 3."""
    ask(phoenix)
    sample = tmp_path / "sample.parquet"
    columns = {"age": FeatureType.FLOAT, "income": FeatureType.FLOAT, "_result": FeatureType.FLOAT}
    with write_table(sample, columns) as add_rows:
        add_rows(
            [
                {"age": age, "income": income, "_result": answer}
                for age, income, answer in zip([1.0, 0.0, 0.0], [0.0, 1.0, 0.0], answers, strict=True)
            ]
        )

    hand_in(phoenix, tmp_path, sample=sample)
    sample.unlink()
    job = healer_with(phoenix, tmp_path, None).step(lambda: True)

    assert job is not None
    assert job.status is status
    if status is JobStatus.REJECTED:
        assert "1 of 3 rows of its sample differ, such as row 3, 3.0 instead of 4.0" in str(job.error)


def test_a_healer_that_died_while_it_asked_asks_for_the_same_run(phoenix: Phoenix, tmp_path: Path) -> None:
    """The other side can tell that it has been asked, and trains once."""
    jobs = ask(phoenix)
    clock = Clock()
    with receiving() as outside:
        trainer = open_remote_trainer(f"webhook:http://{outside.host}/train", "")
        leased = jobs.lease("gone", clock.now_ms, clock.now_ms + 60_000)
        assert leased is not None
        moved = jobs.move(leased, JobStatus.TRAINING, clock.now_ms, attempts=1, new_version="1.1.0")
        clock.now_ms += 60_000
        job = healer_with(phoenix, tmp_path, trainer, clock).step(lambda: True)

    assert moved is not None
    assert job is not None
    assert (job.status, job.owner, job.attempts) == (JobStatus.TRAINING, "outside", 1)
    assert [headers["webhook-id"] for _, headers, _ in outside.calls] == ["a" * 32 + "-1"]


class DiesOnceItHasAsked:
    """The healer is gone before it has noted that the other side was asked."""

    def __init__(self, trainer: RemoteTrainer) -> None:
        self._trainer = trainer

    def ask(self, request: TrainingRequest) -> None:
        self._trainer.ask(request)
        raise KilledByTheKernel


def test_what_a_healer_asked_before_it_died_is_asked_again_as_the_same_run(
    phoenix: Phoenix, tmp_path: Path
) -> None:
    """Nobody knows whether it was heard. Where the other side trains twice all the same, the second model is refused."""
    ask(phoenix)
    clock = Clock()
    with receiving() as outside:
        trainer = open_remote_trainer(f"webhook:http://{outside.host}/train", "")
        with pytest.raises(KilledByTheKernel):
            healer_with(phoenix, tmp_path, DiesOnceItHasAsked(trainer), clock).step(lambda: True)
        clock.now_ms += 60_000
        again = healer_with(phoenix, tmp_path, trainer, clock)
        asked = again.step(lambda: True)
        later = again.step(lambda: True)

    assert asked is not None
    assert (asked.status, asked.owner, asked.attempts, later) == (JobStatus.TRAINING, "outside", 1, None)
    assert [headers["webhook-id"] for _, headers, _ in outside.calls] == ["a" * 32 + "-1"] * 2
    hand_in(phoenix, tmp_path)
    with pytest.raises(JobConflict, match="is checking and waits for nothing"):
        hand_in(phoenix, tmp_path, WRONG)


class Eager:
    """It has trained before it says that it will."""

    def __init__(self, phoenix: Phoenix, folder: Path) -> None:
        self._where = phoenix, folder

    def ask(self, request: TrainingRequest) -> None:
        hand_in(*self._where)


def test_a_model_that_is_handed_in_before_the_trainer_has_answered_is_taken(
    phoenix: Phoenix, tmp_path: Path
) -> None:
    """A small webhook trains while its caller waits."""
    ask(phoenix)
    doctor = healer_with(phoenix, tmp_path, Eager(phoenix, tmp_path))

    doctor.step(lambda: True)
    job = doctor.step(lambda: True)

    assert job is not None
    assert (job.status, job.attempts) == (JobStatus.REGISTERED, 1)


def test_an_outside_trainer_that_says_nothing_is_asked_again_and_then_given_up(
    phoenix: Phoenix, tmp_path: Path
) -> None:
    """A pipeline that is lost must not leave a job open for ever."""
    jobs = ask(phoenix)
    clock = Clock()
    with receiving() as outside:
        trainer = open_remote_trainer(f"webhook:http://{outside.host}/train", "")
        doctor = healer_with(phoenix, tmp_path, trainer, clock)
        for _ in range(12):
            doctor.step(lambda: True)
            clock.now_ms += 3_600_000

    job = jobs.get("a" * 32)
    assert (job.status, job.error) == (JobStatus.FAILED, "no model came within 3600 s")
    assert [headers["webhook-id"][-2:] for _, headers, _ in outside.calls] == ["-1", "-2", "-3"]


def test_what_an_outside_trainer_says_of_its_failure_is_on_record(phoenix: Phoenix, tmp_path: Path) -> None:
    """Whoever looks after the model finds the reason in one place."""
    jobs = ask(phoenix)
    clock = Clock()
    with receiving() as outside:
        trainer = open_remote_trainer(f"webhook:http://{outside.host}/train", "")
        doctor = healer_with(phoenix, tmp_path, trainer, clock)
        doctor.step(lambda: True)
        accept_failure(jobs, "a" * 32, "the cluster is full", clock.now_ms)
        job = doctor.step(lambda: True)

    assert job is not None
    assert (job.status, job.error) == (JobStatus.REQUESTED, "the trainer says: the cluster is full")


def test_without_a_trainer_a_model_may_be_handed_in_by_whoever_heard_of_the_request(
    phoenix: Phoenix, tmp_path: Path
) -> None:
    """Some listen to Kafka, some are people."""
    ask(phoenix)
    doctor = healer_with(phoenix, tmp_path, None)

    untouched = doctor.step(lambda: True)
    hand_in(phoenix, tmp_path)
    job = doctor.step(lambda: True)

    assert untouched is None
    assert job is not None
    assert (job.status, job.new_version) == (JobStatus.REGISTERED, "1.1.0")


def test_a_model_that_is_handed_in_twice_is_one(phoenix: Phoenix, tmp_path: Path) -> None:
    """A pipeline that got no answer sends again."""
    ask(phoenix)

    first = hand_in(phoenix, tmp_path)
    healer_with(phoenix, tmp_path, None).step(lambda: True)
    second = hand_in(phoenix, tmp_path)

    assert first.status is JobStatus.CHECKING
    assert second.status is JobStatus.REGISTERED
    assert [one.version for one in phoenix.registry.list_versions("risk")] == ["1.0.0", "1.1.0"]


def test_another_model_for_a_job_that_has_ended_is_refused(phoenix: Phoenix, tmp_path: Path) -> None:
    """The second of two trainings must not slip in unchecked."""
    ask(phoenix)
    hand_in(phoenix, tmp_path)
    healer_with(phoenix, tmp_path, None).step(lambda: True)

    with pytest.raises(JobConflict, match="is registered and waits for nothing"):
        hand_in(phoenix, tmp_path, WRONG)


def test_a_person_asks_for_a_retraining_of_the_champion(phoenix: Phoenix) -> None:
    """Whatever the monitor thinks; who it was stands in the job."""
    jobs = SqlRetrainJobs(phoenix.database)

    job, is_new = ask_as_ann(phoenix)

    assert is_new
    assert (job.model_version, job.reason, job.status) == ("1.0.0", "asked for by ann", JobStatus.REQUESTED)
    assert jobs.get(job.id) == job


def ask_as_ann(phoenix: Phoenix) -> tuple[RetrainJob, bool]:
    jobs = SqlRetrainJobs(phoenix.database)
    return ask_for_retraining(phoenix.registry, jobs, phoenix.monitoring, "risk", "ann", AT_MS)


def test_who_asks_for_what_is_under_way_is_told_of_that(phoenix: Phoenix, tmp_path: Path) -> None:
    """Two trainings of one champion are one too many; when it has ended, a new one may be asked for."""
    first, _ = ask_as_ann(phoenix)
    second = ask_as_ann(phoenix)
    healer(phoenix, tmp_path, TAKES % "wrong").step(lambda: True)
    third, is_new = ask_as_ann(phoenix)

    assert second == (first, False)
    assert is_new
    assert third.id != first.id


def test_two_who_ask_at_once_ask_for_one(phoenix: Phoenix) -> None:
    """Neither sees the other's job before there is one."""

    class Blind(SqlRetrainJobs):
        def page(self, query: JobQuery) -> tuple[list[RetrainJob], str | None]:
            return [], None

    where = phoenix.registry, Blind(phoenix.database), phoenix.monitoring
    first, _ = ask_for_retraining(*where, "risk", "ann", AT_MS)
    second = ask_for_retraining(*where, "risk", "bob", AT_MS)

    assert second == (first, False)


# What people are told.


def test_a_retraining_that_comes_to_nothing_is_an_incident_until_one_succeeds(
    phoenix: Phoenix, tmp_path: Path
) -> None:
    """A model that suffers and cannot be healed needs a person."""
    jobs = ask(phoenix)
    clock = Clock()
    clock.now_ms = time.time_ns() // 1_000_000
    healer(phoenix, tmp_path, TAKES % "wrong", clock).step(lambda: True)
    monitor = Monitor(phoenix.monitoring, phoenix.registry, phoenix.artifacts, group_ms=0, now_ms=clock)

    monitor.step()
    monitor.step()
    (failed,), _ = phoenix.monitoring.incidents(IncidentQuery("risk"))
    jobs.add(RetrainJob("b" * 32, "risk", "1.0.0", "drift", {}, JobStatus.REQUESTED, AT_MS, AT_MS))
    clock.now_ms += 60_000
    healer(phoenix, tmp_path, TAKES % "right", clock).step(lambda: True)
    monitor.step()
    (ended,), _ = phoenix.monitoring.incidents(IncidentQuery("risk"))

    assert (failed.cause, failed.status) == ("retraining", "open")
    assert "it is worse than 1.0.0: 6 against 2.75" in failed.summary
    assert (ended.id, ended.status, ended.resolution) == (failed.id, "resolved", "1.1.0 is registered")
    told, _ = phoenix.monitoring.alerts("risk", 10, None)
    assert [one.title.partition(": ")[2] for one in reversed(told)] == [
        failed.summary,
        "1.1.0 is trained and registered: compare it, and promote it or not (+1)",
    ]
