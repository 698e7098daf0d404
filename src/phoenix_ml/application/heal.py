"""Healing: a retrain job goes from a request to a challenger, or to the reason why there is none.

One ``Healer`` takes one job at a time. Each step is stored before the next begins, so that a healer which is killed leaves
a job that another one finishes; what a job registers is found again by its digest, so that nothing is registered twice.
"""

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

from phoenix_ml.application.catalogue import (
    SCORED_ROWS,
    Reference,
    Registration,
    activate,
    register,
    score,
    set_routing,
)
from phoenix_ml.application.export import (
    OUTCOME_COLUMN,
    TIME_COLUMN,
    export_columns,
    export_rows,
    is_held_out,
    to_train_on,
)
from phoenix_ml.application.ports import (
    ArtifactStore,
    Engines,
    ModelHints,
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
from phoenix_ml.domain.errors import PhoenixError, Unavailable
from phoenix_ml.domain.features import FeatureContract, FeatureRule
from phoenix_ml.domain.healing import JobStatus, RetrainJob
from phoenix_ml.domain.models import ModelVersion, Stage, Task, next_version
from phoenix_ml.domain.routing import Arm, Role, Routing, Strategy, default_routing
from phoenix_ml.domain.rows import Outputs

log = logging.getLogger(__name__)
MODEL_FILE, CONTRACT_FILE, EXPORT_FILE, LOG_FILE = (
    "model.onnx",
    "features.json",
    "export.parquet",
    "trainer.log",
)
FEWEST_HELD_OUT = 50
# The newest: with many of the world as it was, the champion that suffers now would win.
_MOST_COMPARED = 200
_LEASE_MS = 60_000
_RENEWED_BEFORE_MS = 40_000
_FIRST_PAUSE_MS = 60_000
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


class Rejected(Exception):
    """The trainer's model is no candidate; another attempt would make the same."""


def compare(
    task: Task | None, ours: Sequence[Any], champions: Sequence[Any], outcomes: Sequence[Any]
) -> Comparison:
    """Row by row, so that what is hard for both does not count.

    >>> compare(Task.CLASSIFICATION, ["a", "b"], ["b", "b"], ["a", "b"]).difference
    -0.5
    """
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
        settings: HealerSettings,
        *,
        owner: str,
        now_ms: Callable[[], int],
        write_table: Callable[..., Any],
        read_columns: Callable[[Path], dict[str, list[Any]]],
    ) -> None:
        self._jobs = jobs
        self._monitoring = monitoring
        self._registry = registry
        self._artifacts = artifacts
        self._engines = engines
        self._log = prediction_log
        self._trainer = trainer
        self._settings = settings
        self._owner = owner
        self._now_ms = now_ms
        self._write_table = write_table
        self._read_columns = read_columns
        # The job in hand, as this healer has stored it last: what another has made of it since is theirs.
        self._held: RetrainJob

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
        try:
            return self._take_up(job, keep_going)
        except Unavailable:  # no fault of the model's: what is trained stays
            raise
        except Rejected as exc:
            return self._end(self._held, JobStatus.REJECTED, str(exc))
        except TrainingStopped as exc:
            return self._give_back(job, str(exc))
        except PhoenixError as exc:
            return self._again(self._held, exc.message)
        except (TrainingFailed, OSError) as exc:
            return self._again(self._held, str(exc))

    def _take_up(self, job: RetrainJob, keep_going: Callable[[], bool]) -> RetrainJob | None:
        if job.status is JobStatus.REQUESTED:
            return self._train(job, keep_going)
        result = job.result or {}
        if job.status is JobStatus.CHECKING:
            if "error" in result:
                return self._again(job, f"the trainer says: {result['error']}")
            if self._model_of(job) is not None:
                return self._check(job)
        elif not isinstance(self._trainer, Trainer):
            if "asked" in result:
                return self._again(job, f"no model came within {self._settings.limit_s:g} s")
            return self._ask(job)  # again, perhaps: the run id tells the other side
        return self._again(job, "the healer that had it is gone")

    # Training.

    def _train(self, job: RetrainJob, keep_going: Callable[[], bool]) -> RetrainJob | None:
        champion = self._champion(job)
        version = next_version([one.version for one in self._registry.list_versions(job.model_id)])
        moved = self._jobs.move(
            job,
            JobStatus.TRAINING,
            self._now_ms(),
            attempts=job.attempts + 1,
            new_version=version,
            result=None,
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

        leased_until_ms = moved.owned_until_ms

        def still_mine() -> bool:
            nonlocal leased_until_ms
            if not keep_going():
                return False
            now_ms = self._now_ms()
            if leased_until_ms - now_ms > _RENEWED_BEFORE_MS:
                return True
            try:
                if not self._jobs.renew(moved, now_ms + _LEASE_MS):
                    return False
            except Unavailable:  # hours of training are not given up for a database that restarts
                return now_ms < leased_until_ms
            leased_until_ms = now_ms + _LEASE_MS
            return True

        rows = self._export(job, champion, folder / EXPORT_FILE, still_mine)
        if not rows:
            raise TrainingFailed(
                "no prediction of the last days has an outcome: there is nothing to train on"
            )
        fields = {
            "export": str(folder / EXPORT_FILE),
            "out": str(out),
            "model": job.model_id,
            "version": version,
        }

        trainer.train(fields, folder / LOG_FILE, still_mine)
        model = out / MODEL_FILE
        if not model.is_file():
            raise TrainingFailed(f"it ended well, and left no {MODEL_FILE} in {{out}}")
        checking = self._jobs.move(
            moved, JobStatus.CHECKING, self._now_ms(), result={"sha256": _digest(model)}
        )
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

    def _export(
        self, job: RetrainJob, champion: ModelVersion, path: Path, still_mine: Callable[[], bool]
    ) -> int:
        """What the trainer gets; the predictions that are kept from it are left out."""
        written = 0
        with self._write_table(path, export_columns(champion.metadata)) as add_rows:
            for page in self._rows(job, champion):
                given = to_train_on(page)
                add_rows(given)
                written += len(given)
                if not still_mine():
                    raise TrainingStopped("the healer stops")
        return written

    def _rows(self, job: RetrainJob, champion: ModelVersion) -> Iterator[list[dict[str, Any]]]:
        query = PredictionQuery(job.model_id, since_ms=self._since_ms(job))
        return export_rows(self._log, query, champion.metadata, with_outcomes=True)

    def _since_ms(self, job: RetrainJob) -> int:
        return job.requested_at_ms - round(self._settings.days * 24 * 3_600_000)

    # Checking, and what follows.

    def _check(self, job: RetrainJob) -> RetrainJob | None:
        """Registers the model where it is fit to be a challenger. Raises Rejected."""
        champion, model = self._champion(job), self._model_of(job)
        assert model is not None
        if _digest(model) == champion.sha256:
            raise Rejected(f"it is the very file of {champion.version}")
        contract = self._contract(job, model, champion)
        held_out = self._held_out(job, champion, _MOST_COMPARED)
        try:
            comparison = self._compare(model, contract, champion, held_out)
        except Unavailable:
            raise
        except PhoenixError as exc:
            raise Rejected(f"the model does not run over the predictions on record: {exc.message}") from exc
        if comparison is None:
            raise Rejected(
                f"{len(held_out)} outcomes are kept for a comparison, and it takes {FEWEST_HELD_OUT}"
            )
        result = {"sha256": _digest(model), "comparison": msgspec.to_builtins(comparison)}
        if comparison.is_worse:
            raise Rejected(
                f"it is worse than {champion.version}: {comparison.loss:.4g} against {comparison.champion_loss:.4g} "
                f"over {comparison.n} outcomes that it was not trained on"
            )
        try:
            version = register(
                self._registry,
                self._artifacts,
                self._engines,
                model,
                Registration(
                    job.model_id,
                    str(job.new_version),
                    Stage.STAGING,
                    contract,
                    champion.metadata.task,
                    champion.framework,
                ),
                actor=_ACTOR,
                reference=self._reference(job, champion),
            )
        except Unavailable:
            raise
        except PhoenixError as exc:
            raise Rejected(f"the model is not fit to be registered: {exc.message}") from exc
        result["routing"] = self._route(job.model_id, champion, version)
        return self._jobs.move(
            job,
            JobStatus.REGISTERED,
            self._now_ms(),
            result=result,
            log_tail=self._log_tail(job),
            error=None,
        )

    def _compare(
        self,
        model: Path,
        contract: Mapping[str, FeatureRule],
        champion: ModelVersion,
        held_out: Sequence[Mapping[str, Any]],
    ) -> Comparison | None:
        if len(held_out) < FEWEST_HELD_OUT:
            return None
        framework = champion.framework
        hints = ModelHints(champion.metadata.task, tuple(contract), framework)
        metadata = self._engines.inspect(model, hints)
        metadata = msgspec.structs.replace(
            metadata, contract=FeatureContract.check(metadata.columns, contract)
        )
        if lacking := [name for name in metadata.contract if name not in champion.metadata.contract]:
            raise Rejected(f"it takes {', '.join(lacking)}, which nobody sends to {champion.version}")
        columns = {name: [row[name] for row in held_out] for name in champion.metadata.contract}
        new_engine = self._engines.load(model, metadata, framework, on_cpu=True)
        new = score(new_engine, metadata, columns)
        artifact = self._artifacts.fetch(champion.uri, champion.sha256)
        old_engine = self._engines.load(artifact, champion.metadata, framework, on_cpu=True)
        old = score(old_engine, champion.metadata, columns)
        if len({str(result) for result in new.results}) == 1:
            raise Rejected(f"it answers {new.results[0]!r} to everything")
        if unanswered := sum(not is_finite(result) for result in new.results):
            raise Rejected(f"it answers no number to {unanswered} of {len(held_out)} predictions on record")
        outcomes = [row[OUTCOME_COLUMN] for row in held_out]
        return compare(champion.metadata.task, new.results, old.results, outcomes)

    def _held_out(self, job: RetrainJob, champion: ModelVersion, most: int) -> list[dict[str, Any]]:
        """The newest predictions with outcomes that the trainer has not had."""
        found: list[dict[str, Any]] = []
        for page in self._rows(job, champion):
            found += [
                row for row in page if row[OUTCOME_COLUMN] is not None and is_held_out(row["_prediction_id"])
            ]
            if len(found) >= most:
                break
        return found[:most]

    def _contract(self, job: RetrainJob, model: Path, champion: ModelVersion) -> dict[str, FeatureRule]:
        """What the trainer says of its features, or those of the champion."""
        if features := (job.result or {}).get("features"):
            return msgspec.convert(features, dict[str, FeatureRule])
        said = model.with_name(CONTRACT_FILE)
        if not said.is_file():
            return dict(champion.metadata.contract)
        try:
            return msgspec.json.decode(said.read_bytes(), type=dict[str, FeatureRule])
        except msgspec.DecodeError as exc:
            raise Rejected(f"{CONTRACT_FILE} is no feature contract: {exc}") from exc

    def _reference(self, job: RetrainJob, champion: ModelVersion) -> Reference:
        path = self._folder(job) / EXPORT_FILE
        if not path.is_file():  # trained outside
            path.parent.mkdir(parents=True, exist_ok=True)
            self._export(job, champion, path, lambda: True)
        columns = self._read_columns(path)
        trained_on = len(columns[OUTCOME_COLUMN])
        unseen = self._held_out(job, champion, SCORED_ROWS)
        whole = {name: [*column, *(row[name] for row in unseen)] for name, column in columns.items()}
        # By rows that it has learned it would be held to what it cannot do.
        return Reference(whole, TIME_COLUMN, OUTCOME_COLUMN, range(trained_on, trained_on + len(unseen)))

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
            error=why,
            not_before=now_ms + pause_ms,
            log_tail=self._log_tail(job),
        )

    def _give_back(self, job: RetrainJob, why: str) -> RetrainJob | None:
        """As it was before: a stop of the healer is no attempt of the trainer's."""
        return self._jobs.move(
            self._held, JobStatus.REQUESTED, self._now_ms(), error=why, attempts=job.attempts
        )

    def _end(self, job: RetrainJob, status: JobStatus, why: str) -> RetrainJob | None:
        log.warning("%s is not retrained, job %s: %s", job.model_id, job.id, why)
        return self._jobs.move(job, status, self._now_ms(), error=why, log_tail=self._log_tail(job))

    # What a job has.

    def _champion(self, job: RetrainJob) -> ModelVersion:
        return self._registry.get(job.model_id, job.model_version)

    def _folder(self, job: RetrainJob) -> Path:
        return self._settings.folder / job.id

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
