"""The composition root: settings in, the application's parts out. Adapters are chosen by URL scheme and
imported only where they are chosen.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from phoenix_ml.application.infer import Infer
from phoenix_ml.application.ports import (
    ArtifactStore,
    DeadLetters,
    Deliveries,
    Engines,
    FeatureStore,
    Journal,
    Meter,
    Monitoring,
    PredictionLog,
    Registry,
    RemoteTrainer,
    RetrainJobs,
)
from phoenix_ml.application.predict import Predict
from phoenix_ml.application.serving import LiveModels
from phoenix_ml.domain.errors import Misconfigured
from phoenix_ml.extras import install
from phoenix_ml.settings import Settings

if TYPE_CHECKING:  # SQLAlchemy takes half a second to import, which `phoenix-ml --help` need not wait for
    from phoenix_ml.infrastructure.events.kafka import Kafka, ModelAnnouncer
    from phoenix_ml.infrastructure.sql.database import Database
    from phoenix_ml.infrastructure.training.process import ProcessTrainer
    from phoenix_ml.infrastructure.training.trial import ProcessTrials

_REDIS = ("redis", "rediss", "redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster", "unix")


@dataclass(frozen=True)
class Phoenix:
    """What management needs: the catalogue, the log, and what they stand on."""

    settings: Settings
    database: Database
    registry: Registry
    prediction_log: PredictionLog
    monitoring: Monitoring
    deliveries: Deliveries
    retrain_jobs: RetrainJobs
    artifacts: ArtifactStore
    engines: Engines
    kafka: Kafka | None
    announcer: ModelAnnouncer | None

    def close(self) -> None:
        """Lets go of the connections."""
        if self.announcer is not None:
            self.announcer.close()
        self.database.close()


def bootstrap(settings: Settings) -> Phoenix:
    """The application. Opens no connection yet. Raises Misconfigured, saying which setting to change."""
    from phoenix_ml.infrastructure.alerts.channels import KAFKA, channel_names
    from phoenix_ml.infrastructure.sql.database import Database
    from phoenix_ml.infrastructure.sql.deliveries import SqlDeliveries
    from phoenix_ml.infrastructure.sql.healing import SqlRetrainJobs
    from phoenix_ml.infrastructure.sql.monitoring import SqlMonitoring
    from phoenix_ml.infrastructure.sql.predictions import SqlPredictionLog
    from phoenix_ml.infrastructure.sql.registry import SqlRegistry

    kafka = open_kafka(settings)
    # Neither connects yet: what no process could use is said before there are any.
    if _scheme(settings.features) != "sqlite":
        open_features(settings)
    open_trainer(settings)
    if not settings.database:
        make_data_folder(settings)
    database = Database(settings.database_url)
    announcer = None if kafka is None else kafka.announcer()
    channels = channel_names(settings.alerts, settings.alerts_secret, has_kafka=kafka is not None)
    retrain_channels = () if kafka is None else (KAFKA,)
    return Phoenix(
        settings,
        database,
        SqlRegistry(database) if announcer is None else SqlRegistry(database, announcer),
        SqlPredictionLog(database),
        SqlMonitoring(database, channels, retrain_channels),
        SqlDeliveries(database),
        SqlRetrainJobs(database, retrain_channels),
        open_artifacts(settings),
        open_engines(settings),
        kafka,
        announcer,
    )


def bootstrap_predict(
    phoenix: Phoenix, features: FeatureStore, journal: Journal, meter: Meter
) -> tuple[LiveModels, Predict]:
    """The serving half, which only API processes need."""
    live = LiveModels(phoenix.registry, phoenix.artifacts, phoenix.engines, meter)
    settings = phoenix.settings
    predict = Predict(
        live,
        features,
        journal,
        meter,
        batch_limit=settings.batch_limit,
        queue_limit=settings.queue_limit,
        queue_deadline_s=settings.queue_deadline_ms / 1000,
    )
    return live, predict


def bootstrap_infer(
    phoenix: Phoenix, live: LiveModels, predict: Predict, journal: Journal, meter: Meter
) -> Infer:
    """The use case of the Open Inference Protocol, over the same models."""
    settings = phoenix.settings
    return Infer(
        live,
        predict,
        journal,
        meter,
        batch_limit=settings.batch_limit,
        record_limit_bytes=settings.tensor_record_limit_bytes,
    )


def make_data_folder(settings: Settings) -> None:
    """For this user alone, as it will hold what callers sent; one that exists keeps its mode."""
    try:
        settings.data.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as exc:
        raise Misconfigured(
            f"PHOENIX_DATA: the folder {settings.data} cannot be made: {exc.strerror}", setting="PHOENIX_DATA"
        ) from exc


def open_features(settings: Settings, deadline_ms: float | None = None) -> FeatureStore:
    """The feature store that the settings name; belongs to the event loop that first uses it."""
    url = settings.features
    if _scheme(url) == "sqlite":
        from phoenix_ml.infrastructure.features.sqlite import SqliteFeatures

        if path := url.removeprefix("sqlite:"):
            return SqliteFeatures(Path(path))
        make_data_folder(settings)
        return SqliteFeatures(settings.data / "features.db")
    if _scheme(url) in _REDIS:
        if not url.startswith(f"{_scheme(url)}://"):
            place = "/FILE" if _scheme(url) == "unix" else "HOST:PORT"
            raise Misconfigured(
                f"PHOENIX_FEATURES: write {_scheme(url)}://{place}, with two slashes",
                setting="PHOENIX_FEATURES",
            )
        try:
            from phoenix_ml.infrastructure.features.redis import RedisFeatures
        except ModuleNotFoundError as exc:
            raise Misconfigured(f"Redis needs its client: {install('redis')}") from exc
        return RedisFeatures(url, deadline_ms or settings.features_deadline_ms)
    raise _unknown_scheme("PHOENIX_FEATURES", url, ["sqlite:", *(f"{scheme}://" for scheme in _REDIS)])


def open_trainer(settings: Settings) -> ProcessTrainer | RemoteTrainer | None:
    """The trainer that the settings name; None where they name none. Raises Misconfigured."""
    if not settings.trainer:
        return None
    kind, _, command = settings.trainer.partition(":")
    if kind != "process":
        from phoenix_ml.infrastructure.training.webhook import open_remote_trainer

        return open_remote_trainer(settings.trainer, settings.trainer_token)
    from phoenix_ml.infrastructure.training.process import ProcessTrainer

    memory = settings.trainer_memory_mib * 1024 * 1024
    return ProcessTrainer(command.strip(), limit_s=settings.trainer_limit_s, memory_bytes=memory or None)


def open_trials(settings: Settings, *, limit_s: float, memory_mib: int) -> ProcessTrials:
    """Where models are tried out: a process each, with these limits; 0 MiB is the usual limit."""
    from phoenix_ml.infrastructure.training.trial import USUAL_MEMORY_BYTES, ProcessTrials

    return ProcessTrials(
        [sys.executable, "-m", "phoenix_ml.processes.trial"],
        os.environ | settings.environment(),
        limit_s=limit_s,
        memory_bytes=memory_mib * 1024 * 1024 or USUAL_MEMORY_BYTES,
    )


def cache_features(
    store: FeatureStore, settings: Settings, count_hit: Callable[[], None], count_miss: Callable[[], None]
) -> FeatureStore:
    """The store, behind a cache where the settings want one."""
    if not settings.features_cache_ms:
        return store
    from phoenix_ml.infrastructure.features.cache import CachedFeatures

    limit = settings.features_cache_entities
    return CachedFeatures(store, settings.features_cache_ms, limit, count_hit, count_miss)


def open_kafka(settings: Settings) -> Kafka | None:
    """The cluster that the settings name; None where the log role reads the journals itself."""
    url = settings.events
    if _scheme(url) == "local":
        return None
    if _scheme(url) != "kafka":
        raise _unknown_scheme("PHOENIX_EVENTS", url, ["local:", "kafka://"])
    try:
        from phoenix_ml.infrastructure.events.kafka import Kafka
    except ModuleNotFoundError as exc:
        raise Misconfigured(f"Kafka needs its client: {install('kafka')}") from exc
    return Kafka(url, settings.kafka_partitions)


def open_dead_letters(settings: Settings) -> list[DeadLetters]:
    """The letters beside the journal, and those in Kafka where events take that road."""
    from phoenix_ml.infrastructure.events.deadletters import FileDeadLetters

    beside_journal = FileDeadLetters(settings.dead_letters_file, settings.journal_folder)
    kafka = open_kafka(settings)
    return [beside_journal] if kafka is None else [beside_journal, kafka.dead_letters()]


def open_artifacts(settings: Settings) -> ArtifactStore:
    url = settings.artifacts
    if _scheme(url) == "file":
        from phoenix_ml.infrastructure.artifacts.files import FileArtifacts

        return FileArtifacts(Path(url.removeprefix("file:") or settings.data / "artifacts"))
    raise _unknown_scheme("PHOENIX_ARTIFACTS", url, ["file:"])


def open_engines(settings: Settings) -> Engines:
    import onnxruntime

    from phoenix_ml.infrastructure.cpu import cpu_limit
    from phoenix_ml.infrastructure.engines.gpu import Devices
    from phoenix_ml.infrastructure.engines.onnx import OnnxEngines

    devices = Devices(
        settings.device,
        onnxruntime.get_available_providers(),
        engine_cache=settings.data / "engines",
        memory_limit_bytes=settings.gpu_memory_mib * 1024 * 1024,
    )
    # More threads than processors only wait for each other.
    return OnnxEngines(min(settings.engine_threads or cpu_limit(), cpu_limit()), devices)


def _scheme(url: str) -> str:
    return url.partition(":")[0]


def _unknown_scheme(setting: str, url: str, known: list[str]) -> Misconfigured:
    return Misconfigured(
        # No more of the URL: it may hold a password.
        f"{setting}: {_scheme(url)!r} is no known scheme; known are {', '.join(known)}",
        setting=setting,
    )
