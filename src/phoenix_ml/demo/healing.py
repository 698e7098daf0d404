"""``phoenix-ml demo --healing``: applicants change, quality falls, and the model is healed; a unit bug heals nothing."""

import asyncio
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from msgspec import convert
from rich.console import Console
from rich.table import Table

from phoenix_ml.application.catalogue import Reference, Registration, activate, register
from phoenix_ml.application.ports import IncidentQuery, JobQuery, PredictionQuery
from phoenix_ml.bootstrap import Phoenix, bootstrap
from phoenix_ml.demo.show import (
    end_in_order,
    free_port,
    point_on,
    renew,
    running_server,
    typed_command,
    version_table,
    wait_for_interrupt,
)
from phoenix_ml.demo.training import MODEL_NAME, OUTCOME, CreditData, Training, train
from phoenix_ml.domain.errors import PredictionUnknown, ServerUnreachable
from phoenix_ml.domain.features import FeatureRule
from phoenix_ml.domain.healing import ENDED, JobStatus, RetrainJob
from phoenix_ml.domain.models import Stage
from phoenix_ml.infrastructure.tables import read_columns
from phoenix_ml.settings import fixed_settings

OTHER_BANK = "credit-risk-b"
BATCH_ROWS = 500
APPLICANTS_A_DAY = 250
_DEADLINE_S = 120.0
_DAYS_BESIDE = 6
# What changes on day 9: prices and incomes rise, and three in ten applicants work for platforms, where
# most of those who would have paid do not.
INFLATION, NEW_JOB, NEW_JOB_SHARE, NEW_JOB_RISK = 1.6, "platform", 0.3, 0.85


@dataclass(frozen=True)
class Applicant:
    features: dict[str, Any]
    outcome: str


def applicants(data: CreditData, seed: int, *, changed: bool, in_cents: bool = False) -> Iterator[Applicant]:
    """Real applicants, drawn again and again; those of the changed world where it has changed."""
    rng = random.Random(seed)  # noqa: S311 - a simulation
    while True:
        row = rng.randrange(len(data.ids))
        features: dict[str, Any] = {name: column[row] for name, column in data.columns.items()}
        outcome = data.outcomes[row]
        income = features["income"]
        if changed:
            if income is not None:
                features["income"] = round(income * INFLATION)
            if rng.random() < NEW_JOB_SHARE:
                features["job"] = NEW_JOB
                if rng.random() < NEW_JOB_RISK:
                    outcome = "bad"
        if in_cents and income is not None:
            features["income"] = income * 1000
        yield Applicant(features, outcome)


class Story:
    """Tells at the terminal what happens, as it happens, by the day of the simulation."""

    def __init__(self, console: Console, phoenix: Phoenix) -> None:
        self._console = console
        self._phoenix = phoenix
        self._seen: set[tuple[str, str]] = set()
        self.day = 0

    def say(self, words: str) -> None:
        self._console.print(f"[dim]day {self.day:2}[/]  {words}", highlight=False)

    def quote(self, command: str) -> None:
        """Shows a command in one piece, so that it can be copied."""
        self._console.print(f"        {command}\n", highlight=False, soft_wrap=True)

    def show(self, table: Table) -> None:
        self._console.print(table)

    def look(self) -> None:
        """Says what is new in the database: incidents, retrain jobs."""
        found, _ = self._phoenix.monitoring.incidents(IncidentQuery(limit=100))
        for one in reversed(found):
            if self._is_new(one.id, one.status):
                colour = "green" if one.status == "resolved" else "red"
                ended = f": {one.resolution}" if one.resolution else ""
                self.say(
                    f"[{colour}]incident {one.status}[/] {one.model_id} {one.kind}: {one.summary}{ended}"
                )
        jobs, _ = self._phoenix.retrain_jobs.page(JobQuery())
        for job in reversed(jobs):
            if self._is_new(job.id, job.status):
                self.say(f"[bold magenta]healer[/] {_say_job(job)}")

    def _is_new(self, subject: str, state: str) -> bool:
        if (subject, state) in self._seen:
            return False
        self._seen.add((subject, state))
        return True


def _say_job(job: RetrainJob) -> str:
    if job.status is not JobStatus.REGISTERED:
        said = {
            JobStatus.REQUESTED: f"asked to train again: {job.error or job.reason}",
            JobStatus.TRAINING: f"trains {job.new_version} on what came true …",
            JobStatus.CHECKING: f"checks {job.new_version} …",
        }
        return said.get(job.status, f"{job.status}: {job.error}")
    assert job.result is not None
    found = job.result["comparison"]
    return f"{job.new_version} is registered: " + (
        f"wrong in {found['loss']:.1%} of {found['n']} outcomes that it never saw, the champion in "
        f"{found['champion_loss']:.1%}; routing: {job.result['routing']}"
    )


async def _live(url: str, model_id: str, people: Sequence[Applicant]) -> tuple[int, str]:
    """Asks for each applicant, and tells what came of it; how many answers came true, and the last one's id."""
    right, last_id = 0, ""
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        for start in range(0, len(people), 250):
            part = people[start : start + 250]
            body = {"model_id": model_id, "instances": [{"features": one.features} for one in part]}
            answered = (await client.post("/predict/batch", json=body)).raise_for_status().json()
            told = [
                {"prediction_id": answer["prediction_id"], "outcome": one.outcome}
                for answer, one in zip(answered["predictions"], part, strict=True)
            ]
            (await client.post("/feedback", json=told)).raise_for_status()
            last_id = told[-1]["prediction_id"]
            right += sum(
                a["result"] == one.outcome for a, one in zip(answered["predictions"], part, strict=True)
            )
    return right, last_id


def run_healing_demo(data: Path, port: int, exit_after: bool, console: Console | None = None) -> int:
    """The exit code; ends after the story with ``exit_after``, else with Ctrl-C."""
    end_in_order()
    console = console or Console()
    renew(data)
    console.rule("[bold]Phoenix ML[/] — a model that suffers, and is healed")
    with console.status("training a model on 3,118 applications …"):
        training = train(data / "training")
    trainer = f"process:{sys.executable} -m phoenix_ml.demo.retrain {{export}} {{out}}"
    settings = fixed_settings(data=data.absolute(), trainer=trainer, alerts_group_s=5)
    phoenix = bootstrap(settings)
    phoenix.database.upgrade_if_embedded()
    for model_id in (MODEL_NAME, OTHER_BANK):
        _register(phoenix, training, model_id)
    with running_server(phoenix, free_port(port, console), console) as url:
        story = Story(console, phoenix)
        _act_one(story, phoenix, training.data, url, data)
        _act_two(story, phoenix, training.data, url)
        _point_on(console, None if exit_after else url, data)
        if not exit_after:
            console.print("\nStill serving. [bold]Ctrl-C[/] stops it.")
            wait_for_interrupt()
    phoenix.close()
    return 0


def _register(phoenix: Phoenix, training: Training, model_id: str) -> None:
    contract = convert(json.loads(training.contract_path.read_text()), dict[str, FeatureRule])
    where = phoenix.registry, phoenix.artifacts, phoenix.engines
    reference = Reference(read_columns(training.reference_path), outcome=OUTCOME)
    registration = Registration(model_id, "1.0.0", Stage.PROD, contract)
    register(*where, training.versions[0].onnx_path, registration, actor="demo", reference=reference)
    activate(*where, model_id, "1.0.0", actor="demo")
    wanted = {"batch_rows": BATCH_ROWS, "challenger_policy": "ab:0.5"}
    phoenix.monitoring.change_settings(model_id, wanted, "demo")


def _act_one(story: Story, phoenix: Phoenix, data: CreditData, url: str, folder: Path) -> None:
    story.say(
        f"{MODEL_NAME} 1.0.0 answers, {APPLICANTS_A_DAY} applicants a day; outcomes come in the evening"
    )
    usual = applicants(data, 1, changed=False)
    changed = applicants(data, 2, changed=True)
    for story.day in range(1, 31):
        if story.day == 9:
            story.say(
                f"[bold yellow]the world changes[/]: incomes × {INFLATION}, and three in ten applicants have the job "
                f"'{NEW_JOB}', which the model has never seen"
            )
        source = usual if story.day < 9 else changed
        people = [next(source) for _ in range(APPLICANTS_A_DAY)]
        right, last_id = asyncio.run(_live(url, MODEL_NAME, people))
        if story.day % 4 == 0 or story.day == 9:
            story.say(f"{right / len(people):.1%} of the answers came true")
        _await_monitor(phoenix, story, MODEL_NAME, last_id)
        jobs, _ = phoenix.retrain_jobs.page(JobQuery(MODEL_NAME))
        if jobs:
            _await(
                lambda: all(j.status in ENDED for j in phoenix.retrain_jobs.page(JobQuery(MODEL_NAME))[0]),
                story,
            )
            break
    since_ms = time.time_ns() // 1_000_000
    for _ in range(_DAYS_BESIDE):
        story.day += 1
        people = [next(changed) for _ in range(APPLICANTS_A_DAY)]
        _, last_id = asyncio.run(_live(url, MODEL_NAME, people))
        _await_monitor(phoenix, story, MODEL_NAME, last_id)
    story.say(f"champion and challenger side by side, since day {story.day - _DAYS_BESIDE}:")
    query = PredictionQuery(MODEL_NAME, since_ms=since_ms, limit=_DAYS_BESIDE * APPLICANTS_A_DAY)
    rows, _ = phoenix.prediction_log.page(query)
    story.show(version_table(rows))
    story.say("a person decides who stays, such as by:")
    story.quote(f"{typed_command()} models routing {MODEL_NAME} 1.1.0 --data {folder}")


def _act_two(story: Story, phoenix: Phoenix, data: CreditData, url: str) -> None:
    broken = applicants(data, 3, changed=False, in_cents=True)
    story.day = 1
    story.say(f"another bank, {OTHER_BANK}, sends incomes × 1000: a bug, not a new world")
    for story.day in range(2, 10):
        people = [next(broken) for _ in range(APPLICANTS_A_DAY)]
        _, last_id = asyncio.run(_live(url, OTHER_BANK, people))
        _await_monitor(phoenix, story, OTHER_BANK, last_id)
    jobs, _ = phoenix.retrain_jobs.page(JobQuery(OTHER_BANK))
    story.say(f"retrainings asked for: [bold]{len(jobs)}[/]; a model must not learn broken data")


def _await_monitor(phoenix: Phoenix, story: Story, model_id: str, last_id: str) -> None:
    """Until the last answer and its outcome are logged, and all before them is counted."""

    def is_counted() -> bool:
        try:
            if phoenix.prediction_log.get(last_id).outcome is None:
                return False
        except PredictionUnknown:
            return False
        reached = phoenix.monitoring.standings()[model_id].position
        waits, _ = phoenix.monitoring.outcomes(reached.outcome, 1)
        return not waits and not phoenix.monitoring.predictions(reached.seq, 1)

    _await(is_counted, story)


def _await(condition: Any, story: Story) -> None:
    deadline = time.monotonic() + _DEADLINE_S
    while not condition():
        story.look()
        if time.monotonic() > deadline:
            raise ServerUnreachable("the monitor does not get on; see serve.log in the demo's folder")
        time.sleep(0.1)
    story.look()


def _point_on(console: Console, url: str | None, data: Path) -> None:
    phoenix_ml = typed_command()
    point_on(
        console,
        f"{phoenix_ml} incidents list --data {data}",
        f"{phoenix_ml} drift check {MODEL_NAME} --html drift.html --data {data}",
        f"{phoenix_ml} heal status --data {data}",
        f"{phoenix_ml} models routing {MODEL_NAME} --data {data}",
        f"{phoenix_ml} serve --data {data}" if url is None else f"curl {url}/alerts",
    )
