"""Healing: a retrain job goes from a request to a challenger, or to the reason why there is none.

One ``Healer`` takes one job at a time. Each step is stored before the next begins, so that a healer which is killed leaves
a job that another one finishes; what a job registers is found again by its digest, so that nothing is registered twice.
The lease on the job is renewed while it is worked on, and looked at again before anything becomes of the model.
"""

import contextlib
import hashlib
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import msgspec
import numpy as np
from msgspec import Struct

from phoenix_ml.application.broken_data import find_broken_data
from phoenix_ml.application.catalogue import (
    SCORED_ROWS,
    Registration,
    activate,
    register,
    score,
    set_routing,
)
from phoenix_ml.application.export import (
    OUTCOME_COLUMN,
    export_columns,
    export_rows,
    is_held_out,
    to_train_on,
)
from phoenix_ml.application.ports import (
    ArtifactStore,
    Engines,
    IncidentQuery,
    Monitoring,
    PredictionLog,
    PredictionQuery,
    Registry,
    RemoteTrainer,
    RetrainJobs,
    TrainingFailed,
    TrainingRequest,
    TrainingStopped,
)
from phoenix_ml.application.statistics.quality import losses
from phoenix_ml.application.trial import Findings, Trial, Trials
from phoenix_ml.domain.errors import PhoenixError, Unavailable
from phoenix_ml.domain.features import FeatureRule
from phoenix_ml.domain.healing import JobStatus, RetrainJob
from phoenix_ml.domain.models import ModelVersion, Stage, Task, next_version
from phoenix_ml.domain.routing import Arm, Role, Routing, Strategy, default_routing
from phoenix_ml.domain.rows import Outputs

log = logging.getLogger(__name__)
# What a trainer leaves, and what stands beside it.
MODEL_FILE, CONTRACT_FILE, SAMPLE_FILE = "model.onnx", "features.json", "sample.parquet"
EXPORT_FILE, UNSEEN_FILE, TRAINED_FILE = "export.parquet", "unseen.parquet", "trained.json"
LOG_FILE, TRIAL_LOG_FILE = "trainer.log", "trial.log"
FEWEST_HELD_OUT = 50
# The newest: with many of the world as it was, the champion that suffers now would win.
_MOST_COMPARED = 200
_LEASE_MS = 60_000
_RENEWED_BEFORE_MS = 40_000
_FIRST_PAUSE_MS = 60_000
_PUT_OFF_MS = 60_000
_MOST_CONTRACT_BYTES = 1024 * 1024
_ACTOR = "healer"
_LOG_TAIL_BYTES = 8192


@runtime_checkable
class Trainer(Protocol):
    """Makes a model of an export."""

    def train(self, fields: Mapping[str, str], log_path: Path, keep_going: Callable[[], bool]) -> None:
        """Leaves ``model.onnx`` in the folder ``out``. Raises TrainingFailed."""
        ...


class HealerSettings(Struct, frozen=True):
    """``folder`` holds what jobs leave; ``days`` is how far an export goes back; ``limit_s`` is how long an outside
    trainer may take.
    """

    folder: Path
    days: float = 90.0
    limit_s: float = 3600.0
    most_attempts: int = 3


class Comparison(Struct, frozen=True):
    """Both versions over the same outcomes that the trainer has not seen. ``loss`` is the share of wrong answers, or
    the mean absolute error; ``difference`` is the new one's less the champion's, with its standard error.
    """

    n: int
    loss: float
    champion_loss: float
    difference: float
    standard_error: float

    @property
    def is_worse(self) -> bool:
        return self.difference > self.standard_error


class _Trained(Struct, frozen=True):
    """What a training has left that came to a good end."""

    attempt: int
    sha256: str


class Rejected(Exception):
    """The trainer's model is no candidate; another attempt would make the same."""


def compare(
    task: Task | None, ours: Sequence[Any], champions: Sequence[Any], outcomes: Sequence[Any]
) -> Comparison:
    """Row by row, so that what is hard for both does not count.

    >>> compare(Task.CLASSIFICATION, ["a", "b"], ["b", "b"], ["a", "b"]).difference
    -0.5
    """
    if any(isinstance(one, list) for one in (*ours, *champions)):
        raise Rejected("several numbers a row cannot be compared with one outcome")
    if task is Task.REGRESSION:
        truth = np.asarray(outcomes, dtype=np.float64)
        new, old = (np.abs(np.asarray(one, dtype=np.float64) - truth) for one in (ours, champions))
    else:
        new, old = (losses(task, Outputs(list(one)), outcomes) for one in (ours, champions))
    paired = new - old
    error = float(paired.std(ddof=1) / np.sqrt(len(paired))) if len(paired) > 1 else float("inf")
    return Comparison(len(paired), float(new.mean()), float(old.mean()), float(paired.mean()), error)


def is_finite(result: Any) -> bool:
    """Whether it is no NaN and no infinity; labels never are.

    >>> is_finite("good"), is_finite(float("nan")), is_finite([1.0, float("inf")])
    (True, False, False)
    """
    if isinstance(result, list):
        return all(map(is_finite, result))
    return not isinstance(result, float) or math.isfinite(result)


class Healer:
    """Takes up retrain jobs, one at a time. Belongs to one thread."""

    def __init__(
        self,
        jobs: RetrainJobs,
        monitoring: Monitoring,
        registry: Registry,
        artifacts: ArtifactStore,
        engines: Engines,
        prediction_log: PredictionLog,
        trainer: Trainer | RemoteTrainer | None,
        trials: Trials,
        settings: HealerSettings,
        *,
        owner: str,
        now_ms: Callable[[], int],
        write_table: Callable[..., Any],
    ) -> None:
        self._jobs = jobs
        self._monitoring = monitoring
        self._registry = registry
        self._artifacts = artifacts
        self._engines = engines
        self._log = prediction_log
        self._trainer = trainer
        self._trials = trials
        self._settings = settings
        self._owner = owner
        self._now_ms = now_ms
        self._write_table = write_table
        # The job in hand, as this healer has stored it last: what another has made of it since is theirs.
        self._held: RetrainJob
        self._leased_until_ms = 0
        self._keep_going: Callable[[], bool]

    def step(self, keep_going: Callable[[], bool]) -> RetrainJob | None:
        """The job as this step has left it; None where none waits, or another healer has it by now.

        Raises Unavailable; the job is taken up again once its lease is over.
        """
        now_ms = self._now_ms()
        job = self._jobs.lease(
            self._owner, now_ms, now_ms + _LEASE_MS, takes_requests=self._trainer is not None
        )
        if job is None:
            return None
        self._held = job
        self._leased_until_ms = now_ms + _LEASE_MS
        self._keep_going = keep_going
        try:
            return self._take_up(job)
        except Unavailable:  # no fault of the model's: what is trained stays
            with contextlib.suppress(Unavailable):
                self._uncount_check(self._leased_until_ms)
            raise
        except Rejected as exc:
            return self._end(self._held, JobStatus.REJECTED, str(exc))
        except TrainingStopped as exc:
            return self._give_back(job, str(exc))
        except (PhoenixError, TrainingFailed, OSError) as exc:
            return self._again(self._held, str(exc))
        except Exception as exc:
            # The log is written by the same process: a defect here must not take it down.
            log.exception("job %s cannot be worked on", job.id)
            return self._again(
                self._held, f"a defect of Phoenix ML, see its log: {type(exc).__name__}: {exc}"
            )

    def _take_up(self, job: RetrainJob) -> RetrainJob | None:
        if job.status is JobStatus.REQUESTED:
            return self._begin(job)
        why = "the healer that had it is gone"
        result = job.result or {}
        if job.status is JobStatus.CHECKING:
            if "error" in result:
                why = f"the trainer says: {result['error']}"
            elif self._model_of(job) is not None:
                return self._check(job)
        elif isinstance(self._trainer, Trainer):
            if (sha256 := self._trained(job)) is not None:
                return self._go_on_checking(job, sha256)
        elif "asked" in result:
            why = f"no model came within {self._settings.limit_s:g} s"
        else:
            return self._ask(job)  # again, perhaps: the run id tells the other side
        return self._again(job, why)

    def _begin(self, job: RetrainJob) -> RetrainJob | None:
        # What a person has asked for goes on all the same.
        if job.evidence and self._monitoring.settings(job.model_id).healing_paused:
            now_ms = self._now_ms()
            why = "healing is paused: heal resume, or heal run"
            return self._jobs.move(
                job, JobStatus.REQUESTED, now_ms, error=why, not_before=now_ms + _PUT_OFF_MS
            )
        self._refuse_broken_data(job)
        return self._train(job)

    # The lease.

    def _is_mine(self) -> bool:
        """Whether to go on with the job in hand; asked all the time."""
        if not self._keep_going():
            return False
        now_ms = self._now_ms()
        if self._leased_until_ms - now_ms > _RENEWED_BEFORE_MS:
            return True
        try:
            return self._renew(now_ms)
        except Unavailable:  # hours of training are not given up for a database that restarts
            return now_ms < self._leased_until_ms

    def _renew(self, now_ms: int) -> bool:
        if not self._jobs.renew(self._held, now_ms + _LEASE_MS):
            return False
        self._leased_until_ms = now_ms + _LEASE_MS
        return True

    def _go_on(self) -> None:
        """Raises TrainingStopped where the job in hand is to be left alone."""
        if not self._is_mine():
            raise TrainingStopped("the healer stops")

    def _make_sure(self) -> None:
        """As before a step that others see: the database is asked whose the job is. Raises TrainingStopped."""
        if not (self._keep_going() and self._renew(self._now_ms())):
            raise TrainingStopped("the healer stops")

    # Training.

    def _train(self, job: RetrainJob) -> RetrainJob | None:
        champion = self._champion(job)
        version = next_version([one.version for one in self._registry.list_versions(job.model_id)])
        moved = self._jobs.move(
            job,
            JobStatus.TRAINING,
            self._now_ms(),
            attempts=job.attempts + 1,
            new_version=version,
            result=None,
            error=None,
        )
        if moved is None:
            return None
        self._held = moved
        trainer = self._trainer
        if not isinstance(trainer, Trainer):
            return self._ask(moved)
        folder = self._folder(job)
        shutil.rmtree(folder, ignore_errors=True)
        out = folder / "out"
        out.mkdir(parents=True)
        rows, left_out = self._export(job, champion, folder / EXPORT_FILE)
        if not rows:
            raise TrainingFailed(
                "no prediction of the last days has an outcome: there is nothing to train on"
                + _describe_left_out(left_out)
            )
        fields = {
            "export": str(folder / EXPORT_FILE),
            "out": str(out),
            "model": job.model_id,
            "version": version,
        }

        trainer.train(fields, folder / LOG_FILE, self._is_mine)
        model = out / MODEL_FILE
        if not model.is_file():
            raise TrainingFailed(f"it ended well, and left no {MODEL_FILE} in {{out}}")
        # Where the database is away just now, the model need not be trained again for that.
        trained = _Trained(moved.attempts, _digest(model))
        part = folder / f"{TRAINED_FILE}.part"
        part.write_bytes(msgspec.json.encode(trained))
        part.replace(folder / TRAINED_FILE)
        return self._go_on_checking(moved, trained.sha256)

    def _trained(self, job: RetrainJob) -> str | None:
        """The digest of the model that a training of this attempt has left here, of which the database knows nothing."""
        try:
            trained = msgspec.json.decode((self._folder(job) / TRAINED_FILE).read_bytes(), type=_Trained)
        except (OSError, msgspec.DecodeError):
            return None
        model = self._folder(job) / "out" / MODEL_FILE
        is_whole = trained.attempt == job.attempts and model.is_file() and _digest(model) == trained.sha256
        return trained.sha256 if is_whole else None

    def _go_on_checking(self, job: RetrainJob, sha256: str) -> RetrainJob | None:
        result = {**(self._held.result or {}), "sha256": sha256}
        checking = self._jobs.move(job, JobStatus.CHECKING, self._now_ms(), result=result)
        if checking is None:
            return None
        self._held = checking
        return self._check(checking)

    def _ask(self, job: RetrainJob) -> RetrainJob | None:
        """The job as one that a system outside works on. Raises TrainingFailed."""
        assert not isinstance(self._trainer, Trainer)
        assert self._trainer is not None
        request = TrainingRequest(
            run_id=f"{job.id}-{job.attempts}",
            job_id=job.id,
            model_id=job.model_id,
            model_version=job.model_version,
            new_version=str(job.new_version),
            reason=job.reason,
            evidence=job.evidence,
            since_ms=self._since_ms(job),
        )
        # First: a trainer may hand its model in before it has answered.
        handed = self._jobs.hand_over(job, self._now_ms() + _LEASE_MS, {"asking": request.run_id})
        if handed is None:
            return None
        self._held = handed
        self._trainer.ask(request)
        until_ms = self._now_ms() + round(self._settings.limit_s * 1000)
        return self._jobs.hand_over(handed, until_ms, {"asked": request.run_id})

    def _export(self, job: RetrainJob, champion: ModelVersion, path: Path) -> tuple[int, int]:
        """Writes what the trainer gets, less what is kept from it and what was made of broken data: how many rows that is,
        and of how many the data was broken.
        """
        written = left_out = 0
        exported_at_ms = self._now_ms()
        broken = find_broken_data(self._monitoring, job.model_id)
        with self._write_table(path, export_columns(champion.metadata)) as add_rows:
            for page in self._rows(job, champion):
                whole = broken.without(page)
                left_out += len(page) - len(whole)
                given = to_train_on(whole)
                add_rows(given)
                written += len(given)
                self._go_on()
        if left_out:
            log.warning("%s, job %s%s", job.model_id, job.id, _describe_left_out(left_out))
            self._note(left_out_as_broken=left_out)
        self._note(exported_at_ms=exported_at_ms)
        return written, left_out

    def _rows(self, job: RetrainJob, champion: ModelVersion) -> Iterator[list[dict[str, Any]]]:
        query = PredictionQuery(job.model_id, since_ms=self._since_ms(job))
        return export_rows(self._log, query, champion.metadata, with_outcomes=True)

    def _since_ms(self, job: RetrainJob) -> int:
        return job.requested_at_ms - round(self._settings.days * 24 * 3_600_000)

    # Checking, and what follows.

    def _check(self, job: RetrainJob) -> RetrainJob | None:
        """Registers the model where it is fit to be a challenger. Raises Rejected."""
        checks = (job.result or {}).get("checks", 0)
        if checks >= self._settings.most_attempts:
            return self._end(job, JobStatus.FAILED, f"its check has begun {checks} times, and come to no end")
        self._count_check(checks + 1)
        champion, model = self._champion(job), self._model_of(job)
        assert model is not None
        sha256 = _digest(model)
        if sha256 == champion.sha256:
            raise Rejected(f"it is the very file of {champion.version}")
        contract = self._contract(job, model, champion)
        unseen, left_out = self._held_out(job, champion)
        if len(unseen) < FEWEST_HELD_OUT:
            raise Rejected(
                f"{len(unseen)} outcomes are kept for a comparison, and it takes {FEWEST_HELD_OUT}"
                + _describe_left_out(left_out)
            )
        registration = Registration(
            job.model_id,
            str(job.new_version),
            Stage.STAGING,
            contract,
            champion.metadata.task,
            champion.framework,
        )
        found = self._try_out(job, model, champion, registration, unseen)
        comparison = self._compare(champion, found.answers, unseen[:_MOST_COMPARED])
        result = {"sha256": sha256, "comparison": msgspec.to_builtins(comparison)}
        if noted := (self._held.result or {}).get("left_out_as_broken"):
            result["left_out_as_broken"] = noted
        if comparison.is_worse:
            raise Rejected(
                f"it is worse than {champion.version}: {comparison.loss:.4g} against {comparison.champion_loss:.4g} "
                f"over {comparison.n} outcomes that it was not trained on"
            )
        self._refuse_broken_data(job)
        self._refuse_broken_export(job)
        if _digest(model) != sha256:
            raise Rejected("it was changed while it was checked")
        described = found.described
        assert described is not None, "what is not refused is described"
        self._make_sure()
        try:
            version = register(
                self._registry,
                self._artifacts,
                self._engines,
                model,
                registration,
                actor=_ACTOR,
                described=lambda: described,
            )
        except Unavailable:
            raise
        except PhoenixError as exc:
            raise Rejected(f"the model is not fit to be registered: {exc.message}") from exc
        self._make_sure()
        result["routing"] = self._route(job.model_id, champion, version)
        done = self._jobs.move(
            job,
            JobStatus.REGISTERED,
            self._now_ms(),
            result=result,
            log_tail=self._log_tail(job),
            error=None,
        )
        return self._clear_up(done)

    def _count_check(self, checks: int) -> None:
        """A check that kills its healer again and again must come to an end all the same."""
        self._note(checks=checks)

    def _note(self, **facts: object) -> None:
        """Stores more of what has come of the job in hand. Raises TrainingStopped where it is somebody else's by now."""
        result = {**(self._held.result or {}), **facts}
        if not self._jobs.renew(self._held, self._leased_until_ms, result=result):
            raise TrainingStopped("the healer stops")
        self._held = msgspec.structs.replace(self._held, result=result)

    def _uncount_check(self, leased_until_ms: int) -> None:
        """It was left in order, and begins again when the lease is over."""
        result = dict(self._held.result or {})
        if self._held.status is JobStatus.CHECKING and "checks" in result:
            result["checks"] -= 1
            self._jobs.renew(self._held, leased_until_ms, result=result)

    def _try_out(
        self,
        job: RetrainJob,
        model: Path,
        champion: ModelVersion,
        registration: Registration,
        unseen: Sequence[Mapping[str, Any]],
    ) -> Findings:
        """Raises Rejected for a model that cannot be run, or answers nothing that could be compared."""
        folder = self._folder(job)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / EXPORT_FILE).is_file():  # trained outside
            self._export(job, champion, folder / EXPORT_FILE)
        with self._write_table(folder / UNSEEN_FILE, export_columns(champion.metadata)) as add_rows:
            add_rows(unseen)
        trial = Trial(
            model,
            registration,
            tuple(champion.metadata.contract),
            folder / EXPORT_FILE,
            folder / UNSEEN_FILE,
            min(len(unseen), _MOST_COMPARED),
            folder,
            self._sample(job, model),
        )
        try:
            found = self._trials.run(trial, folder / TRIAL_LOG_FILE, self._is_mine)
        except TrainingStopped:
            raise
        except TrainingFailed as exc:
            raise Rejected(f"running the model comes to no good end: {exc}") from exc
        if found.refused is not None:
            raise Rejected(found.refused)
        answers = found.answers
        if len({str(result) for result in answers}) == 1:
            raise Rejected(f"it answers {answers[0]!r} to everything")
        if unanswered := sum(not is_finite(result) for result in answers):
            raise Rejected(f"it answers no number to {unanswered} of {len(answers)} predictions on record")
        return found

    def _compare(
        self, champion: ModelVersion, answers: Sequence[Any], held_out: Sequence[Mapping[str, Any]]
    ) -> Comparison:
        columns = {name: [row[name] for row in held_out] for name in champion.metadata.contract}
        artifact = self._artifacts.fetch(champion.uri, champion.sha256)
        engine = self._engines.load(artifact, champion.metadata, champion.framework, on_cpu=True)
        champions = score(engine, champion.metadata, columns).results
        outcomes = [row[OUTCOME_COLUMN] for row in held_out]
        return compare(champion.metadata.task, answers, champions, outcomes)

    def _held_out(self, job: RetrainJob, champion: ModelVersion) -> tuple[list[dict[str, Any]], int]:
        """The newest predictions with outcomes that the trainer has not had; and how many were passed over, as their data
        was broken.
        """
        found: list[dict[str, Any]] = []
        left_out = 0
        broken = find_broken_data(self._monitoring, job.model_id)
        for page in self._rows(job, champion):
            whole = broken.without(page)
            left_out += len(page) - len(whole)
            found += [
                row for row in whole if row[OUTCOME_COLUMN] is not None and is_held_out(row["_prediction_id"])
            ]
            if len(found) >= SCORED_ROWS:
                break
            self._go_on()
        return found[:SCORED_ROWS], left_out

    def _refuse_broken_data(self, job: RetrainJob) -> None:
        """Raises Rejected where the monitor's request has been overtaken by what it has seen since."""
        if not job.evidence:  # a person has asked, who may know better
            return
        query = IncidentQuery(job.model_id, job.model_version, unresolved=True, limit=1000)
        found, _ = self._monitoring.incidents(query)
        broken = [one.cause for one in found if one.is_broken_data]
        if broken:
            raise Rejected(f"its data is broken, which no model must learn: {', '.join(broken)} is open")

    def _refuse_broken_export(self, job: RetrainJob) -> None:
        """Raises Rejected where the trainer was given broken data, as is known by now.

        A defect is told when its batch is full: rows of it may have been exported before, and it may be over since.
        """
        exported_at_ms = (self._held.result or {}).get("exported_at_ms")
        if (
            job.evidence
            and exported_at_ms is not None
            and find_broken_data(self._monitoring, job.model_id).goes_on_at(exported_at_ms)
        ):
            raise Rejected("what it was trained on was broken, as was seen after its export")

    def _contract(self, job: RetrainJob, model: Path, champion: ModelVersion) -> dict[str, FeatureRule]:
        """What the trainer says of its features, or those of the champion."""
        if features := (job.result or {}).get("features"):
            return msgspec.convert(features, dict[str, FeatureRule])
        said = model.with_name(CONTRACT_FILE)
        if not said.is_file():
            return dict(champion.metadata.contract)
        if said.stat().st_size > _MOST_CONTRACT_BYTES:
            raise Rejected(f"{CONTRACT_FILE} has more than {_MOST_CONTRACT_BYTES} bytes")
        try:
            return msgspec.json.decode(said.read_bytes(), type=dict[str, FeatureRule])
        except (msgspec.DecodeError, UnicodeDecodeError) as exc:
            raise Rejected(f"{CONTRACT_FILE} is no feature contract: {exc}") from exc

    def _sample(self, job: RetrainJob, model: Path) -> Path | None:
        """Rows with what the trainer's own library answers, where it has left some."""
        if handed_in := (job.result or {}).get("sample"):
            # What kind of table it is stands in its name, which the store does not keep.
            sample = self._folder(job) / SAMPLE_FILE
            shutil.copyfile(self._artifacts.fetch(handed_in["uri"], handed_in["sha256"]), sample)
            return sample
        left = model.with_name(SAMPLE_FILE)
        return left if left.is_file() else None

    def _route(self, model_id: str, champion: ModelVersion, version: ModelVersion) -> str:
        """What became of the routing, in words; done twice it is as done once."""
        policy = self._monitoring.settings(model_id).challenger_policy
        if policy == "none":
            return "none: it waits in staging"
        alone, wanted = _alone(champion.version), _challenge(policy, champion.version, version.version)
        active = [one for one in self._registry.list_versions(model_id) if one.is_active]
        stored = self._registry.routings().get(model_id)
        current = stored or default_routing(active)
        if current is None:
            return f"unchanged: {champion.version} is active no more"
        if current not in (alone, wanted):
            return f"unchanged: {current.strategy} of {', '.join(current.versions)} goes on"
        if stored is None:
            # Without a routing the best stage answers: beside a champion in dev that is the challenger in staging.
            set_routing(self._registry, model_id, alone, actor=_ACTOR)
        activate(self._registry, self._artifacts, self._engines, model_id, version.version, actor=_ACTOR)
        set_routing(self._registry, model_id, wanted, actor=_ACTOR)
        return f"{wanted.strategy} beside {champion.version}"

    # A job's end, and its next attempt.

    def _again(self, job: RetrainJob, why: str) -> RetrainJob | None:
        if job.status is JobStatus.REQUESTED or job.attempts >= self._settings.most_attempts:
            return self._end(job, JobStatus.FAILED, why)
        pause_ms = _FIRST_PAUSE_MS << max(0, job.attempts - 1)
        now_ms = self._now_ms()
        return self._jobs.move(
            job,
            JobStatus.REQUESTED,
            now_ms,
            error=_storable(why),
            not_before=now_ms + pause_ms,
            log_tail=self._log_tail(job),
        )

    def _give_back(self, job: RetrainJob, why: str) -> RetrainJob | None:
        """As it was before: a stop of the healer is no attempt of the trainer's, and what is trained stays."""
        if self._held.status is JobStatus.CHECKING:
            self._uncount_check(0)
            return None
        return self._jobs.move(
            self._held, JobStatus.REQUESTED, self._now_ms(), error=why, attempts=job.attempts
        )

    def _end(self, job: RetrainJob, status: JobStatus, why: str) -> RetrainJob | None:
        log.warning("%s is not retrained, job %s: %s", job.model_id, job.id, why)
        done = self._jobs.move(
            job, status, self._now_ms(), error=_storable(why), log_tail=self._log_tail(job)
        )
        return self._clear_up(done)

    def _clear_up(self, done: RetrainJob | None) -> RetrainJob | None:
        """Of a job that has ended here, what may be large goes; the logs stay."""
        if done is not None and self._folder(done).is_dir():
            for path in self._folder(done).iterdir():
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                elif path.name not in (LOG_FILE, TRIAL_LOG_FILE) or not path.stat().st_size:
                    with contextlib.suppress(OSError):
                        path.unlink()
            with contextlib.suppress(OSError):  # there are logs in it
                self._folder(done).rmdir()
        return done

    # What a job has.

    def _champion(self, job: RetrainJob) -> ModelVersion:
        return self._registry.get(job.model_id, job.model_version)

    def _folder(self, job: RetrainJob) -> Path:
        # A trainer runs in another folder than we do.
        return self._settings.folder.absolute() / job.id

    def _model_of(self, job: RetrainJob) -> Path | None:
        """The trainer's model, if it is still as it was when training ended."""
        result = job.result or {}
        wanted = result.get("sha256")
        if "uri" in result:  # handed in
            return self._artifacts.fetch(result["uri"], result["sha256"])
        model = self._folder(job) / "out" / MODEL_FILE
        return model if model.is_file() and _digest(model) == wanted else None

    def _log_tail(self, job: RetrainJob) -> str:
        path = self._folder(job) / LOG_FILE
        if not path.is_file():
            return ""
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _LOG_TAIL_BYTES))
            return file.read().decode(errors="replace").replace("\0", "")


def _storable(text: str) -> str:
    """The text as every database takes it: what it quotes may come from anywhere."""
    return text.replace("\0", "").encode(errors="replace").decode()


def _describe_left_out(rows: int) -> str:
    """To be said after something else; nothing where there are none."""
    return f"; {rows} predictions are left out, as their data was broken" if rows else ""


def _alone(champion: str) -> Routing:
    return Routing(Strategy.SINGLE, (Arm(champion),))


def _challenge(policy: str, champion: str, challenger: str) -> Routing:
    if policy == "shadow":
        return Routing(Strategy.SHADOW, (Arm(champion), Arm(challenger, Role.SHADOW)))
    share = float(policy.removeprefix("ab:"))
    return Routing(
        Strategy.AB_TEST, (Arm(champion, weight=1 - share), Arm(challenger, Role.CHALLENGER, share))
    )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
