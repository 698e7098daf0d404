"""What monitors conclude from what is logged, step by step, over the embedded database."""

import itertools
import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx_models
import pytest
from numpy.typing import NDArray
from sample_events import AT_MS, outcome, prediction
from scipy.stats import ks_2samp, wasserstein_distance
from servers import wait_until
from sqlalchemy import update

from phoenix_ml.application.casebook import Casebook, CaseState
from phoenix_ml.application.catalogue import Reference, Registration, activate, register
from phoenix_ml.application.monitoring import Monitor, Seen
from phoenix_ml.application.ports import IncidentQuery, JobQuery, RecordedEvent
from phoenix_ml.application.watch import ModelState
from phoenix_ml.bootstrap import Phoenix, bootstrap
from phoenix_ml.domain.events import OutcomeReported, PredictionMade
from phoenix_ml.domain.features import FeatureRule, FeatureType
from phoenix_ml.domain.incidents import IncidentKind, Severity
from phoenix_ml.domain.models import ModelVersion, Stage
from phoenix_ml.domain.routing import Role
from phoenix_ml.domain.rows import RowFormat
from phoenix_ml.infrastructure.sql.schema import prediction_logs
from phoenix_ml.infrastructure.telemetry.metrics import MetricsWriter
from phoenix_ml.processes.monitor import MonitorRole
from phoenix_ml.settings import Settings, fixed_settings, load_settings

CONTRACT = {name: FeatureRule(FeatureType.FLOAT) for name in ("age", "income")}
BATCH_ROWS = 1000
# Far beyond what the reference's errors allow.
WRONG = 50.0
MINUTE_MS, HOUR_MS = 60_000, 3_600_000


class World:
    """Models whose rows are standard normal, and a monitor that watches them."""

    def __init__(self, folder: Path, settings: Settings | None = None) -> None:
        self.folder = folder
        self.phoenix: Phoenix = bootstrap(settings or fixed_settings(data=folder / "data"))
        self.phoenix.database.upgrade_if_new()
        self.now_ms = AT_MS
        self.random = np.random.default_rng(5)
        self.versions: dict[tuple[str, str], ModelVersion] = {}
        self.monitor = self.new_monitor()

    def new_monitor(self, *, group_ms: int = 0) -> Monitor:
        where = self.phoenix.monitoring, self.phoenix.registry, self.phoenix.artifacts
        return Monitor(*where, group_ms=group_ms, now_ms=lambda: self.now_ms)

    def add(
        self,
        model_id: str = "risk",
        version: str = "1.0.0",
        *,
        with_outcomes: bool = True,
        missing: float = 0.0,
        has_flag: bool = False,
        is_hard_above: float = math.inf,
    ) -> None:
        """``missing`` is the share of the reference's rows whose income is not known; it is yes or no with ``has_flag``.

        Errors are ten times as large where the income is above ``is_hard_above``.
        """
        artifact = onnx_models.write(
            self.folder / "model.onnx", onnx_models.linear_regressor(2, bias=float(len(self.versions)))
        )
        values = self.rows(4000)
        values[: round(missing * len(values)), 1] = 0.0
        values = flags(values) if has_flag else values
        self.reference = values
        spread = np.where(values[:, 1] > is_hard_above, 10.0, 1.0)
        truth = self.answers(model_id, version, values) + spread * self.random.normal(size=len(values))
        columns = {"age": values[:, 0].tolist(), "income": values[:, 1].tolist(), "y": truth.tolist()}
        columns["income"] = [bool(v) if has_flag else v or None for v in columns["income"]]
        contract = CONTRACT | ({"income": FeatureRule(FeatureType.BOOLEAN)} if has_flag else {})
        where = self.phoenix.registry, self.phoenix.artifacts, self.phoenix.engines
        register(
            *where,
            artifact,
            Registration(model_id, version, Stage.PROD, contract),
            actor="ann",
            reference=Reference(columns, None, "y" if with_outcomes else None),
        )
        self.versions[model_id, version] = activate(*where, model_id, version, actor="ann")

    def set(self, model_id: str = "risk", **changes: object) -> None:
        self.phoenix.monitoring.change_settings(model_id, changes, "ann")

    def rows(self, count: int, *, shift: float = 0.0) -> NDArray[np.float64]:
        return self.random.normal([0.0, shift], size=(count, 2))

    def answers(self, model_id: str, version: str, values: NDArray[np.float64]) -> NDArray[np.float64]:
        known = list(self.versions)
        bias = known.index((model_id, version)) if (model_id, version) in known else len(known)
        return values @ onnx_models.weights(2) + bias

    def log(
        self,
        values: NDArray[np.float64],
        model_id: str = "risk",
        version: str = "1.0.0",
        *,
        errors: Sequence[float] | NDArray[np.float64] | None = None,
        truth: object = None,
        sources: Sequence[str] | None = None,
    ) -> None:
        """Logs an answer a row, and its outcome where there are errors, or one truth for all; ``sources`` has a row's letters."""
        registered = self.versions[model_id, version]
        row_format = RowFormat(registered.metadata.columns)
        recorded = []
        results = self.answers(model_id, version, values)
        for i, (row, result) in enumerate(zip(values.astype(np.float32).tolist(), results, strict=True)):
            made = prediction(
                model_id=model_id,
                model_version=version,
                inputs=row_format.pack(tuple(row)),
                result=float(result) if math.isfinite(result) else None,
                confidence=None,
                probabilities=None,
                role=Role.CHAMPION,
                sha256=registered.sha256,
                sources="rr" if sources is None else sources[i],
                created_at_ms=self.now_ms,
            )
            events: list[PredictionMade | OutcomeReported] = [made]
            if errors is not None:
                events.append(outcome(made.id, float(result + errors[i])))
            elif truth is not None:
                events.append(outcome(made.id, truth))
            recorded += [RecordedEvent(one, msgspec.msgpack.encode(one), row_format) for one in events]
        self.phoenix.prediction_log.write(recorded)

    def step(self) -> Seen:
        """Everything that is logged by now has been looked at when it returns."""
        while True:
            self.now_ms += 1000
            seen = self.monitor.step()
            if not seen.rows and not seen.outcomes:
                return seen

    def see(self, *batches: NDArray[np.float64]) -> None:
        for values in batches:
            self.log(values)
            self.step()

    def incidents(self, version: str = "1.0.0", *, unresolved: bool = True) -> list[str]:
        found, _ = self.phoenix.monitoring.incidents(
            IncidentQuery("risk", version, unresolved=unresolved, limit=1000)
        )
        return sorted(one.cause for one in found)

    def requests(self) -> list[str]:
        jobs, _ = self.phoenix.retrain_jobs.page(JobQuery())
        return [job.reason for job in jobs]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    with closing(world.phoenix):
        yield world


def thousandfold(values: NDArray[np.float64], share: float = 1.0) -> NDArray[np.float64]:
    broken = values.copy()
    broken[: round(share * len(values)), 1] *= 1000
    return broken


def test_a_batch_of_broken_data_hides_no_drift_that_comes_after_it(world: World) -> None:
    """A defect of an hour must not switch the alarm off for the 64 batches that remember it."""
    world.add()
    world.set(left_out=["_score"])
    world.see(thousandfold(world.rows(BATCH_ROWS)), *(world.rows(BATCH_ROWS) for _ in range(2)))
    after_the_defect = world.incidents()

    world.see(world.rows(BATCH_ROWS, shift=1.0))

    assert after_the_defect == []
    assert world.incidents() == ["drift:income"]


def test_an_infinite_value_now_and_then_hides_no_drift(world: World) -> None:
    """One odd row in a thousand is told of; the other 999 are what they are."""
    world.add()
    world.set(left_out=["_score"])
    values = world.rows(BATCH_ROWS, shift=1.0)
    values[0, 1] = np.inf

    world.see(values)

    assert world.incidents() == ["drift:income", "schema:income:infinite"]


def test_outcomes_of_broken_data_that_come_at_once_ask_for_no_retraining(world: World) -> None:
    """They raise the alarm before the batch is full in which the defect would be seen: a model must not learn it."""
    world.add()
    world.log(world.rows(900), errors=np.zeros(900))
    world.step()
    for _ in range(20):
        # Another scale, such as Fahrenheit: outside of the range, but not by orders of magnitude.
        world.log(world.rows(100, shift=8.0), errors=np.full(100, WRONG))
        world.step()

    assert world.requests() == []
    assert "quality:outcomes" in world.incidents(unresolved=False)
    assert "schema:income:unit" in world.incidents()


def test_one_client_of_several_with_another_unit_asks_for_no_retraining(world: World) -> None:
    """Most rows are whole then, and the outcomes of the others are bad all the same."""
    world.add()
    for _ in range(10):
        world.log(
            thousandfold(world.rows(BATCH_ROWS), share=0.3),
            errors=[WRONG] * 300 + [0.0] * (BATCH_ROWS - 300),
        )
        world.step()

    assert "schema:income:unit" in world.incidents()
    assert world.requests() == []


def flags(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.column_stack([values[:, 0], values[:, 1] > 0])


def absent(values: NDArray[np.float64], letter: str, share: float = 1.0) -> list[str]:
    """A row's letters of sources; the first rows have no income that anybody has measured."""
    count = round(share * len(values))
    return ["r" + letter] * count + ["rr"] * (len(values) - count)


@pytest.mark.parametrize("letter", ["m", "o", "d"])
@pytest.mark.parametrize("size", [100, BATCH_ROWS])
@pytest.mark.parametrize("policy", ["designed", "classic"])
def test_outcomes_of_values_that_stay_away_ask_for_no_retraining(
    world: World, letter: str, size: int, policy: str
) -> None:
    """Missing, stale or filled in by a default: the answers are wrong because a source is down, and no training mends it."""
    world.add()
    world.set(policy=policy, left_out=["_score", "age"], min_outcomes=0)
    for _ in range(3000 // size):
        values = world.rows(size)
        world.log(values, errors=np.full(size, WRONG), sources=absent(values, letter))
        world.step()

    # Outcomes that come before the batch is full in which it shows raise their alarm, the others are not looked at.
    assert world.incidents() == ["missing:income"] + ["quality:outcomes"] * (size < BATCH_ROWS)
    assert world.requests() == []


@pytest.mark.parametrize("policy", ["designed", "classic"])
def test_moved_answers_to_values_that_stay_away_ask_for_no_retraining(world: World, policy: str) -> None:
    """Another feature and the scores drift with them, as where a default stands in: two signs of one defect."""
    world.add()
    world.set(policy=policy, min_outcomes=0)
    for _ in range(3):
        values = world.rows(BATCH_ROWS)
        values[:, 0] += 2.0
        world.log(values, sources=absent(values, "d"))
        world.step()

    assert world.incidents() == ["drift:_score", "drift:age", "missing:income", "schema:age:range"]
    assert world.requests() == []


def test_what_outcomes_said_while_values_stayed_away_is_forgotten_once_they_are_back(world: World) -> None:
    """They judged the source that was down; asked for a day later, a retraining would be as wrong."""
    world.add()
    world.set(left_out=["_score"], min_outcomes=1)
    for _ in range(20):
        values = world.rows(100)
        world.log(values, errors=np.full(100, WRONG), sources=absent(values, "m"))
        world.step()
    while_away = world.incidents()
    world.monitor = world.new_monitor()

    world.see(*(world.rows(BATCH_ROWS) for _ in range(3)))
    once_back = world.incidents(), world.requests()
    for _ in range(2):
        world.log(world.rows(BATCH_ROWS), errors=np.full(BATCH_ROWS, WRONG))
        world.step()

    assert while_away == ["missing:income", "quality:outcomes"]
    assert once_back == ([], [])
    assert world.requests() == ["outcomes"]


def test_values_that_come_more_often_than_they_did_hold_up_no_retraining(world: World) -> None:
    """The source has become better; the model is wrong all the same."""
    world.add(missing=0.3)
    world.set(left_out=["_score"])
    for _ in range(3):
        world.log(world.rows(BATCH_ROWS), errors=np.full(BATCH_ROWS, WRONG))
        world.step()

    assert "missing:income" in world.incidents()
    assert world.requests() == ["outcomes"]


def test_outcomes_that_are_wrong_on_whole_data_ask_for_a_retraining_once(world: World) -> None:
    """The counter-example to the two before: there the model itself is to blame."""
    world.add()
    for _ in range(5):
        world.log(world.rows(300), errors=np.full(300, WRONG))
        world.step()

    assert world.requests() == ["outcomes"]


def test_an_alarm_by_another_objective_waits_for_rows_of_its_own(world: World) -> None:
    """Rows since an alarm that is forgotten say nothing of the data that the next one blames."""
    world.add()
    world.set(healing_paused=True)
    for _ in range(3):
        world.log(world.rows(300), errors=np.full(300, WRONG))
        world.step()
    world.set(error_rate=0.3, healing_paused=False)

    world.log(world.rows(100), errors=np.full(100, WRONG))
    world.step()
    at_once = world.requests()
    for _ in range(2):
        world.log(world.rows(150), errors=np.full(150, WRONG))
        world.step()

    assert at_once == []
    assert world.requests() == ["outcomes"]


def test_classic_policy_asks_for_no_retraining_on_broken_data(world: World) -> None:
    """It is hasty by design, but data that is none is no reason to train under any policy."""
    world.add()
    world.set(policy="classic", min_outcomes=0)
    world.see(thousandfold(world.rows(BATCH_ROWS)))

    assert "schema:income:unit" in world.incidents()
    assert world.requests() == []


@pytest.mark.parametrize(
    ("has_flag", "reason"),
    [(False, "a Kolmogorov-Smirnov p below 0.05"), (True, "a chi-square p below 0.05")],
)
def test_classic_policy_asks_at_once_and_says_by_which_test(
    world: World, has_flag: bool, reason: str
) -> None:
    """The rule that some must have: no outcome is waited for, and no effect is too small."""
    world.add(has_flag=has_flag)
    world.set(left_out=["_score", "age"], effect=0.3)
    designed, classic = (world.rows(BATCH_ROWS, shift=0.4) for _ in range(2))
    world.see(flags(designed) if has_flag else designed)
    by_design = world.incidents(), world.requests()
    world.set(policy="classic")

    world.see(flags(classic) if has_flag else classic)

    assert by_design == ([], [])
    assert world.incidents() == ["drift:income"]
    assert world.requests() == [reason]


def test_classic_policy_names_both_tests_where_both_have_found_something(world: World) -> None:
    """Whoever reads the request must not look at the wrong feature."""
    world.add(has_flag=True)
    world.set(policy="classic", left_out=["_score"])
    values = world.rows(BATCH_ROWS, shift=1.0)
    values[:, 0] += 1.0

    world.see(flags(values))

    assert world.requests() == ["a Kolmogorov-Smirnov and a chi-square p below 0.05"]


def test_the_policy_of_the_environment_is_that_of_the_monitor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read but not handed on, it would be a setting that does nothing."""
    monkeypatch.setenv("PHOENIX_DRIFT_POLICY", "classic")
    monkeypatch.setenv("PHOENIX_DATA", str(tmp_path / "data"))
    stopping = threading.Event()
    world = World(tmp_path, load_settings())
    with closing(world.phoenix), MetricsWriter(tmp_path / "monitor.mmap") as metrics:
        world.add()
        world.log(world.rows(BATCH_ROWS, shift=0.5))
        role = threading.Thread(target=MonitorRole(world.phoenix, metrics).run, args=(stopping,))
        role.start()
        try:
            wait_until(lambda: bool(world.requests()), 30, "the monitor asks for a retraining")
        finally:
            stopping.set()
            role.join()

        assert world.requests() == ["a Kolmogorov-Smirnov p below 0.05"]


def test_a_model_that_cannot_be_watched_holds_up_no_other(world: World) -> None:
    """Its rows come first in the log, and are more than one step reads."""
    world.add("bad")
    world.add("risk")
    world.step()
    world.log(world.rows(6000), "bad")
    with world.phoenix.database.write() as connection:
        is_bad = prediction_logs.c.model_id == "bad"
        connection.execute(update(prediction_logs).where(is_bad).values(inputs=b"no row"))
    world.log(world.rows(BATCH_ROWS, shift=3.0))

    failed = {name for _ in range(5) for name in world.monitor.step().failed}

    assert failed == {"bad"}
    assert "drift:income" in world.incidents()


def test_a_version_that_is_asked_for_by_its_number_keeps_its_incidents(world: World) -> None:
    """It is no arm of the routing; opened and ended anew with each batch, an incident would be a storm of alerts."""
    world.add(version="1.0.0")
    world.add(version="1.1.0")
    world.set(left_out=["_score"])
    for _ in range(6):
        world.log(world.rows(BATCH_ROWS, shift=1.0), version="1.0.0")
        world.step()

    assert world.incidents("1.0.0", unresolved=False) == ["drift:income"]


@pytest.mark.parametrize("is_reloaded", [False, True])
def test_a_version_that_leaves_while_its_data_is_broken_takes_all_its_incidents_along(
    world: World, is_reloaded: bool
) -> None:
    """With the defect ends what outcomes said of it, in whichever order they are known: a rollback is the likely answer."""
    world.add(version="1.0.0")
    world.log(world.rows(900), errors=np.full(900, WRONG))
    world.step()
    world.see(thousandfold(world.rows(BATCH_ROWS)), thousandfold(world.rows(BATCH_ROWS)))
    before = world.incidents()
    world.add(version="1.1.0")
    if is_reloaded:
        world.monitor = world.new_monitor()

    seen = world.step()

    assert {"quality:outcomes", "schema:income:unit"} <= set(before)
    assert (seen.failed, world.incidents()) == ((), [])


def test_incidents_end_when_another_version_takes_over(world: World) -> None:
    """Promotion is an answer to them."""
    world.add(version="1.0.0")
    world.see(world.rows(BATCH_ROWS, shift=1.0))
    before = world.incidents()
    world.add(version="1.1.0")

    world.step()

    assert "drift:income" in before
    assert world.incidents() == []


def test_a_version_that_comes_back_is_judged_by_what_it_sees_now(world: World) -> None:
    """What drifted two months ago, before another version took over, is no news."""
    world.add(version="1.0.0")
    world.see(*(world.rows(BATCH_ROWS, shift=1.0) for _ in range(3)))
    world.add(version="1.1.0")
    world.step()
    world.now_ms += 60 * 24 * 60 * MINUTE_MS
    world.phoenix.registry.set_active("risk", "1.1.0", False, "ann")

    world.see(*(world.rows(BATCH_ROWS) for _ in range(3)))

    assert world.incidents() == []


def test_missing_values_that_stay_keep_their_incident_when_the_others_drift_too(world: World) -> None:
    """An incident must not end with "the stream is back" while three of ten values are still missing."""
    world.add()
    world.set(left_out=["_score"])
    for shift in (0.0, 1.0, 1.0, 1.0):
        values = world.rows(BATCH_ROWS, shift=shift)
        values[:300, 1] = np.nan
        world.see(values)

    assert world.incidents() == ["drift:income", "missing:income"]


def test_the_report_that_is_kept_has_the_verdict_of_the_alarm(world: World) -> None:
    """The alarm has looked at more batches than the rows of the report: "steady" beside an open incident confuses."""
    world.add()
    world.set(left_out=["_score"])
    for _ in range(12):
        world.see(world.rows(BATCH_ROWS, shift=0.15))

    assert world.incidents() == ["drift:income"]
    ((report,), _) = world.phoenix.monitoring.reports("risk", "drift")
    verdicts = {one["feature"]: one["verdict"] for one in report.report["features"]}
    assert (verdicts["age"], verdicts["income"]) == ("steady", "drift")


def the_score(world: World) -> dict[str, Any]:
    """What the latest report has of the model's scores."""
    ((report,), _) = world.phoenix.monitoring.reports("risk", "drift")
    (found,) = (one for one in report.report["features"] if one["feature"] == "_score")
    return dict(found)


def test_scores_are_compared_with_those_of_the_reference_as_features_are(world: World) -> None:
    """Over cells their distance is too small, and there is none in standard deviations: they are what matters most."""
    world.add()
    recent = world.rows(BATCH_ROWS, shift=0.3)
    world.see(recent)

    reference, scores = (world.answers("risk", "1.0.0", rows) for rows in (world.reference, recent))
    expected = ks_2samp(reference, scores, method="asymp")
    found = the_score(world)
    # Scores are kept to six digits.
    assert found["statistic"] == pytest.approx(expected.statistic, abs=1e-3)
    assert found["p"] == pytest.approx(expected.pvalue, rel=0.1)
    distance = wasserstein_distance(reference, scores) / reference.std()
    assert found["wasserstein"] == pytest.approx(distance, rel=1e-4)


def test_an_incident_of_drift_ends_by_itself_when_the_stream_is_back(world: World) -> None:
    """Nobody should have to close by hand what a bad hour has opened."""
    world.add()
    world.set(left_out=["_score"], batch_rows=200)
    # So many that no window is new to which the two batches are.
    world.see(*(world.rows(200) for _ in range(16)))
    world.see(world.rows(200, shift=1.2), world.rows(200, shift=1.2))
    while_drifted = world.incidents()

    world.see(*(world.rows(200) for _ in range(30)))

    assert while_drifted == ["drift:income"]
    assert world.incidents() == []
    (over,), _ = world.phoenix.monitoring.incidents(IncidentQuery("risk"))
    assert over.resolution == "the stream is back"
    told, _ = world.phoenix.monitoring.alerts("risk", 1, None)
    assert told[0].text == "risk 1.0.0: over: drift:income, the stream is back"


def test_an_estimated_drop_is_an_incident_and_asks_for_a_retraining(world: World) -> None:
    """No outcome has come, but rows have that the model was always bad at; one batch of them may be chance."""
    world.add(is_hard_above=1.0)
    world.set(left_out=["_score"], min_outcomes=0)
    world.see(world.rows(BATCH_ROWS, shift=1.0))
    after_one = world.incidents(), world.requests()

    world.see(world.rows(BATCH_ROWS, shift=1.0))
    after_two = world.incidents(), world.requests()
    world.see(*(world.rows(BATCH_ROWS) for _ in range(2)))

    assert after_one == (["drift:income"], [])
    assert after_two == (["drift:income", "quality:estimate"], ["drift and an estimated drop"])
    assert "quality:estimate" not in world.incidents()


def test_a_retraining_is_asked_for_again_after_the_cooldown_and_within_the_budget(world: World) -> None:
    """Each costs money; a model that no training makes better must not be trained all day."""
    world.add()
    world.set(cooldown_s=3600, budget=2)

    def suffer() -> int:
        """How many requests there are after outcomes enough for one more."""
        for _ in range(2):
            world.log(world.rows(300), errors=np.full(300, WRONG))
            world.step()
        return len(world.requests())

    first, in_cooldown = suffer(), suffer()
    world.now_ms += 60 * MINUTE_MS
    second = suffer()
    world.now_ms += 24 * 60 * MINUTE_MS
    beyond_budget = suffer()
    world.now_ms += 30 * 24 * 60 * MINUTE_MS

    assert (first, in_cooldown, second, beyond_budget, suffer()) == (1, 1, 2, 2, 3)


def test_each_row_is_counted_once_by_monitors_that_work_side_by_side(world: World) -> None:
    """Counted twice it would be sure of what is chance; left out, blind."""
    models = ["a", "b", "c"]
    for name in models:
        world.add(name)
    is_logged, start = threading.Event(), threading.Barrier(3)
    counted: list[int] = []
    expected = dict.fromkeys(models, 10 * 330)

    def work() -> None:
        with closing(bootstrap(fixed_settings(data=world.folder / "data"))) as own:
            monitor = Monitor(own.monitoring, own.registry, own.artifacts, group_ms=0, read_rows=200)
            start.wait(30)
            while True:
                was_logged = is_logged.is_set()
                seen = monitor.step()
                counted.append(seen.rows)
                if was_logged and not seen.lag_rows:
                    return

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    start.wait(30)
    for _ in range(10):
        for name in models:
            world.log(world.rows(330), name)
    is_logged.set()
    for thread in threads:
        thread.join()

    assert sum(counted) == sum(expected.values())
    for name, rows in expected.items():
        batches = world.phoenix.monitoring.batches(name, "1.0.0")
        _, state = world.phoenix.monitoring.state(name)
        still_open = msgspec.msgpack.decode(state, type=ModelState).versions["1.0.0"].rows
        assert sum(one.rows for one in batches) + still_open == rows
        assert [one.number for one in batches] == [0, 1, 2]
        assert all(one.last_seq < other.first_seq for one, other in itertools.pairwise(batches))


def test_a_regression_for_which_nobody_said_what_an_error_is_has_no_error_rate(world: World) -> None:
    """Measured by the window's own errors it would be one in ten, whatever happens."""
    world.add(with_outcomes=False)
    world.set(error_rate=0.1)
    world.log(world.rows(BATCH_ROWS), errors=np.full(BATCH_ROWS, WRONG))
    world.step()
    ((before,), _) = world.phoenix.monitoring.reports("risk", "performance")
    world.set(tolerance=1.0)
    world.log(world.rows(BATCH_ROWS), errors=np.full(BATCH_ROWS, WRONG))
    world.step()
    ((after,), _) = world.phoenix.monitoring.reports("risk", "performance")

    assert "error_rate" not in before.report["quality"]
    assert after.report["quality"]["error_rate"] == 1.0
    assert "quality:outcomes" in world.incidents()


def performance(world: World, limit: int = 100) -> list[tuple[int, dict[str, Any]]]:
    """Rows and content of the reports, the newest first."""
    found, _ = world.phoenix.monitoring.reports("risk", "performance", limit=limit)
    return [(one.rows, one.report) for one in found]


def test_quality_is_reported_where_no_outcome_has_come(world: World) -> None:
    """Most models never hear how it went: the estimate is all that there is, and nothing is made up beside it."""
    world.add()
    world.see(*(world.rows(BATCH_ROWS) for _ in range(3)))
    before = performance(world)
    world.now_ms += HOUR_MS
    world.see(world.rows(BATCH_ROWS))
    after = performance(world)

    (rows, report) = after[0]
    assert (len(before), len(after)) == (1, 2)
    assert (rows, report["state"], report["quality"], report["measured_at"]) == (
        0,
        "insufficient data",
        {"n": 0},
        None,
    )
    # Errors of the reference are normal with a standard deviation of one: √(2/π) on average.
    assert report["estimate"]["metric"] == "mae"
    assert report["estimate"]["value"] == pytest.approx(math.sqrt(2 / math.pi), abs=0.05)


def test_who_asks_for_a_check_gets_the_estimate_of_quality_too(world: World) -> None:
    """Outcomes have not come, which is when somebody asks."""
    world.add()
    world.see(world.rows(BATCH_ROWS))
    world.phoenix.monitoring.request_check("risk", world.now_ms)

    world.step()

    assert [report["estimate"]["n"] for _, report in performance(world)] == [BATCH_ROWS] * 2


def test_an_estimate_hides_no_figures_that_were_measured(world: World) -> None:
    """Outcomes come once a day, batches all day: whoever asks for the latest sees both."""
    world.add()
    world.log(world.rows(BATCH_ROWS), errors=np.full(BATCH_ROWS, 0.5))
    world.step()
    measured_at = performance(world, 1)[0][1]["measured_at"]
    world.now_ms += HOUR_MS
    world.log(world.rows(10), errors=np.full(10, WRONG))

    world.see(world.rows(BATCH_ROWS))

    (rows, report) = performance(world, 1)[0]
    assert (rows, report["state"], report["measured_at"]) == (BATCH_ROWS, "measured", measured_at)
    assert report["quality"]["mae"] == pytest.approx(0.5, abs=1e-6)


def test_outcomes_that_say_nothing_are_no_outcomes_to_train_on(world: World) -> None:
    """A retraining needs so many of them."""
    world.add()
    world.set(min_outcomes=1)
    world.log(world.rows(BATCH_ROWS), truth="n/a")

    world.step()

    assert world.requests() == []


def test_a_monitor_that_is_started_anew_goes_on_where_the_other_was(world: World) -> None:
    """Counts, incidents and what was left out of the windows come back from the database."""
    world.add()
    world.set(left_out=["_score"])
    world.see(thousandfold(world.rows(BATCH_ROWS)), world.rows(BATCH_ROWS + 500))
    world.monitor = world.new_monitor()

    world.see(world.rows(500), world.rows(BATCH_ROWS, shift=1.0))

    assert world.incidents() == ["drift:income"]
    batches = world.phoenix.monitoring.batches("risk", "1.0.0")
    assert [one.rows for one in batches] == [BATCH_ROWS] * 4


# What people are told, and how often.


def flap(cases: Casebook, minute: int) -> None:
    """Seen at even minutes, over at odd ones."""
    at_ms = AT_MS + minute * MINUTE_MS
    if minute % 2 == 0:
        cases.saw("1.0.0", IncidentKind.DRIFT, "drift:x", Severity.WARNING, "x drifted", {}, at_ms)
    else:
        (incident,) = cases.unresolved("1.0.0").values()
        cases.resolve(incident, "the stream is back", at_ms)


def test_a_cause_that_lasts_is_told_once_and_so_is_its_end(world: World) -> None:
    """By the default grouping, over many groups, and by monitors that each die after a batch: no reminder, no echo."""
    world.add()
    world.set(batch_rows=200, left_out=["_score"])
    group_ms = world.phoenix.settings.alerts_group_s * 1000
    units = [1000.0] * 20 + [1.0] * 20
    for unit in units:
        world.monitor = world.new_monitor(group_ms=group_ms)
        world.now_ms += MINUTE_MS
        world.see(world.rows(200) * [1.0, unit])

    told, _ = world.phoenix.monitoring.alerts("risk", 100, None)
    assert group_ms <= 10 * MINUTE_MS
    assert world.incidents(unresolved=False) == ["schema:income:unit"]
    assert [one.text.partition(": ")[2].startswith("over: schema:income:unit") for one in told] == [
        True,
        False,
    ]
    assert told[0].incidents == told[1].incidents


def test_what_comes_and_goes_is_told_once_an_hour() -> None:
    """An alert every five minutes, all day, about the same feature, is switched off by whoever gets it."""
    cases = Casebook("risk", [], CaseState())
    alerts = []
    for minute in range(24 * 60):
        flap(cases, minute)
        alert = cases.alert(AT_MS + minute * MINUTE_MS, 5 * MINUTE_MS)
        alerts += [] if alert is None else [alert]

    # Opened, over, and then once an hour.
    assert len(alerts) in range(20, 28)
    assert max(len(alert.text.splitlines()) for alert in alerts) <= 3


def test_news_does_not_wait_for_what_comes_and_goes() -> None:
    """A new incident is told within the grouping time, whatever else flaps."""
    cases = Casebook("risk", [], CaseState())
    for minute in range(30):
        flap(cases, minute)
        cases.alert(AT_MS + minute * MINUTE_MS, 5 * MINUTE_MS)
    at_ms = AT_MS + 30 * MINUTE_MS
    cases.saw("1.0.0", IncidentKind.DRIFT, "drift:y", Severity.WARNING, "y drifted", {}, at_ms)

    alert = cases.alert(at_ms, 5 * MINUTE_MS)

    assert alert is not None
    assert "y drifted" in alert.text


def test_the_title_of_an_alert_is_of_what_is_wrong_not_of_what_is_over() -> None:
    """It is all that a telephone shows at night."""
    cases = Casebook("risk", [], CaseState())
    flap(cases, 0)
    cases.alert(AT_MS, 0)
    flap(cases, 1)
    cases.saw("1.0.0", IncidentKind.DRIFT, "drift:y", Severity.WARNING, "y drifted", {}, AT_MS + MINUTE_MS)

    alert = cases.alert(AT_MS + MINUTE_MS, 0)

    assert alert is not None
    assert alert.title == "risk 1.0.0: y drifted (+1)"
