"""``phoenix-ml doctor``: what a server would need on this machine, tried out without leaving a trace."""

import asyncio
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct

from phoenix_ml.application.serving import load_version
from phoenix_ml.bootstrap import Phoenix, bootstrap, open_artifacts, open_features, open_kafka
from phoenix_ml.domain.errors import ModelLoadFailed, PhoenixError
from phoenix_ml.infrastructure.cpu import cpu_limit
from phoenix_ml.processes.supervisor import check_address
from phoenix_ml.settings import Settings, misspelt_variables

if TYPE_CHECKING:  # Kafka's library is an extra
    from phoenix_ml.infrastructure.events.kafka import Kafka

_LEAST_FREE_BYTES = 1 << 30


class Finding(Struct, frozen=True):
    check: str
    ok: bool
    found: str


def examine(settings: Settings) -> list[Finding]:
    """One finding a check; a check that fails says what to do."""
    findings = [_check("python", lambda: f"{platform.python_version()} at {sys.executable}")]
    findings.append(_check("processors", lambda: f"{cpu_limit()} may be used"))
    findings.append(_check("environment", _environment))
    findings.append(_check("data folder", lambda: _data_folder(settings)))
    findings.append(_check("onnx runtime", _onnx_runtime))
    findings.append(_check("address", lambda: _address(settings)))
    findings.append(_check("feature store", lambda: asyncio.run(_features(settings))))
    findings.append(_check("artifact store", lambda: _artifacts(settings)))
    try:
        if (missing := _missing(settings.database_url, "sqlite:///")) is not None:
            # Bootstrap would make its folder.
            findings += _events(open_kafka(settings))
            return [*findings, _check("database", lambda: _to_be_made(missing))]
        phoenix = bootstrap(settings)
    except (PhoenixError, OSError) as exc:
        return [*findings, Finding("settings", False, _words(exc))]
    findings += _events(phoenix.kafka)
    findings.append(_check("database", lambda: _database(phoenix)))
    if findings[-1].ok:
        findings.append(_check("models", lambda: _models(phoenix)))
    phoenix.database.close()
    return findings


def _check(name: str, find: Callable[[], str]) -> Finding:
    try:
        return Finding(name, True, find())
    except (PhoenixError, OSError) as exc:
        return Finding(name, False, _words(exc))


def _words(error: PhoenixError | OSError) -> str:
    return error.message if isinstance(error, PhoenixError) else str(error)


def _environment() -> str:
    doubts = misspelt_variables(os.environ)
    meant = "; ".join(f"{name} is not a setting: is {near} meant?" for name, near in doubts.items())
    return f"warning: {meant}" if meant else "no PHOENIX_ variable looks misspelt"


def _missing(url: str, scheme: str) -> Path | None:
    """The file that the URL names, if it names one that does not exist."""
    file = Path(url.removeprefix(scheme).partition("?")[0])
    return file if url.startswith(scheme) and not file.exists() else None


def _to_be_made(path: Path) -> str:
    there = _try_to_write(path.absolute().parent)
    return f"{path} is not there yet, {there} is writable: 'serve' makes it"


def _try_to_write(folder: Path) -> Path:
    """The folder, or of those above it the first that is there. Raises OSError where no file can be made in it."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"x")
            os.fsync(file.fileno())
    except OSError as exc:
        raise OSError(f"nothing can be made in {there}: {exc.strerror}") from exc
    return there


def _data_folder(settings: Settings) -> str:
    folder = settings.data.absolute()
    there = _try_to_write(folder)
    free_bytes = shutil.disk_usage(there).free
    if free_bytes < _LEAST_FREE_BYTES:
        raise OSError(f"{there} has {free_bytes >> 20} MiB free; the journal alone may need 1024")
    state = "is writable" if there == folder else f"is not there yet, {there} is writable"
    return f"{folder} {state}, {free_bytes >> 30} GiB free"


def _onnx_runtime() -> str:
    import onnxruntime as ort

    return f"{ort.__version__} with {', '.join(ort.get_available_providers())}"


def _address(settings: Settings) -> str:
    check_address(settings)
    return f"{settings.host}:{settings.port}"


async def _features(settings: Settings) -> str:
    default = f"sqlite:{settings.data / 'features.db'}"
    url = default if settings.features == "sqlite:" else settings.features
    if (missing := _missing(url, "sqlite:")) is not None:
        return _to_be_made(missing)
    store = open_features(settings, 1000.0)
    try:
        await store.check()
    finally:
        await store.close()
    return f"{store.name} answers"


def _artifacts(settings: Settings) -> str:
    open_artifacts(settings)
    folder = Path(settings.artifacts.removeprefix("file:") or settings.data / "artifacts").absolute()
    there = _try_to_write(folder)
    return f"{folder} " + ("is writable" if there == folder else f"is not there yet, {there} is writable")


def _events(kafka: "Kafka | None") -> list[Finding]:
    if kafka is None:
        return []
    return [_check("events", lambda: f"{kafka.name} answers: cluster {kafka.check()}")]


def _database(phoenix: Phoenix) -> str:
    phoenix.database.check()
    return f"{phoenix.database.name} has the tables of this version"


def _models(phoenix: Phoenix) -> str:
    versions = phoenix.registry.list_versions()
    active = [version for version in versions if version.is_active]
    displaced = []
    for version in active:
        try:
            placement = load_version(version, phoenix.artifacts, phoenix.engines).engine.placement
        except PhoenixError as exc:
            raise ModelLoadFailed(f"{version.model_id} {version.version}: {exc.message}") from exc
        if placement.reason:
            displaced.append(
                f"{version.model_id} {version.version} on {placement.device} ({placement.reason})"
            )
    where = f"; not where they should run: {', '.join(displaced)}" if displaced else ""
    return f"registered versions: {len(versions)}; active: {len(active)}, all of those load{where}"
