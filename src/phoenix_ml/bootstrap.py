"""The composition root: settings in, the application's parts out. Adapters are chosen by URL scheme and
imported only where they are chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from phoenix_ml.application.ports import (
    ArtifactStore,
    Engines,
    FeatureStore,
    Journal,
    Meter,
    PredictionLog,
    Registry,
)
from phoenix_ml.application.predict import Predict
from phoenix_ml.application.serving import LiveModels
from phoenix_ml.domain.errors import Misconfigured
from phoenix_ml.settings import Settings

if TYPE_CHECKING:  # SQLAlchemy takes half a second to import, which `phoenix-ml --help` need not wait for
    from phoenix_ml.infrastructure.sql.database import Database


@dataclass(frozen=True)
class Phoenix:
    """What management needs: the catalogue, the log, and what they stand on."""

    settings: Settings
    database: Database
    registry: Registry
    prediction_log: PredictionLog
    artifacts: ArtifactStore
    engines: Engines


def bootstrap(settings: Settings) -> Phoenix:
    """The application. Opens no connection yet. Raises Misconfigured, saying which setting to change."""
    from phoenix_ml.infrastructure.sql.database import Database
    from phoenix_ml.infrastructure.sql.predictions import SqlPredictionLog
    from phoenix_ml.infrastructure.sql.registry import SqlRegistry

    if _scheme(settings.events) != "local":
        raise _unknown_scheme("PHOENIX_EVENTS", settings.events, ["local:"])
    database = Database(settings.database_url)
    return Phoenix(
        settings,
        database,
        SqlRegistry(database),
        SqlPredictionLog(database),
        open_artifacts(settings),
        open_engines(settings),
    )


def bootstrap_predict(
    phoenix: Phoenix, features: FeatureStore, journal: Journal, meter: Meter
) -> tuple[LiveModels, Predict]:
    """The serving half, which only API processes need."""
    live = LiveModels(phoenix.registry, phoenix.artifacts, phoenix.engines, meter)
    predict = Predict(live, features, journal, meter, batch_limit=phoenix.settings.batch_limit)
    return live, predict


def open_features(settings: Settings, deadline_ms: float | None = None) -> FeatureStore:
    """The feature store that the settings name; belongs to the event loop that first uses it."""
    url = settings.features
    if _scheme(url) == "sqlite":
        from phoenix_ml.infrastructure.features.sqlite import SqliteFeatures

        return SqliteFeatures(Path(url.removeprefix("sqlite:") or settings.data / "features.db"))
    if _scheme(url) in ("redis", "rediss"):
        try:
            from phoenix_ml.infrastructure.features.redis import RedisFeatures
        except ModuleNotFoundError as exc:
            raise Misconfigured("Redis needs its client: pip install 'phoenix-ml[redis]'") from exc
        return RedisFeatures(url, deadline_ms or settings.features_deadline_ms)
    raise _unknown_scheme("PHOENIX_FEATURES", url, ["sqlite:", "redis://", "rediss://"])


def open_artifacts(settings: Settings) -> ArtifactStore:
    url = settings.artifacts
    if _scheme(url) == "file":
        from phoenix_ml.infrastructure.artifacts.files import FileArtifacts

        return FileArtifacts(Path(url.removeprefix("file:") or settings.data / "artifacts"))
    raise _unknown_scheme("PHOENIX_ARTIFACTS", url, ["file:"])


def open_engines(settings: Settings) -> Engines:
    from phoenix_ml.infrastructure.cpu import cpu_limit
    from phoenix_ml.infrastructure.engines.onnx import OnnxEngines

    # More threads than processors only wait for each other.
    return OnnxEngines(min(settings.engine_threads or cpu_limit(), cpu_limit()))


def _scheme(url: str) -> str:
    return url.partition(":")[0]


def _unknown_scheme(setting: str, url: str, known: list[str]) -> Misconfigured:
    return Misconfigured(
        f"{setting}: {url!r} has no known scheme; known are {', '.join(known)}", setting=setting
    )
