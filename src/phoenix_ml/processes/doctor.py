"""``phoenix-ml doctor``: what a server would need on this machine, tried out."""

import asyncio
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable

from msgspec import Struct

from phoenix_ml.bootstrap import Phoenix, bootstrap, open_features
from phoenix_ml.domain.errors import ModelLoadFailed, PhoenixError
from phoenix_ml.infrastructure.cpu import cpu_limit
from phoenix_ml.processes.supervisor import check_address
from phoenix_ml.settings import Settings

_LEAST_FREE_BYTES = 1 << 30


class Finding(Struct, frozen=True):
    check: str
    ok: bool
    found: str


def examine(settings: Settings) -> list[Finding]:
    """One finding a check; a check that fails says what to do."""
    findings = [_check("python", lambda: f"{platform.python_version()} at {sys.executable}")]
    findings.append(_check("processors", lambda: f"{cpu_limit()} may be used"))
    findings.append(_check("data folder", lambda: _data_folder(settings)))
    findings.append(_check("onnx runtime", _onnx_runtime))
    findings.append(_check("address", lambda: _address(settings)))
    findings.append(_check("feature store", lambda: asyncio.run(_features(settings))))
    try:
        phoenix = bootstrap(settings)
    except PhoenixError as exc:
        return [*findings, Finding("settings", False, exc.message)]
    findings.append(_check("database", lambda: _database(phoenix)))
    if findings[-1].ok:
        findings.append(_check("models", lambda: _models(phoenix)))
    phoenix.database.close()
    return findings


def _check(name: str, find: Callable[[], str]) -> Finding:
    try:
        return Finding(name, True, find())
    except (PhoenixError, OSError) as exc:
        return Finding(name, False, exc.message if isinstance(exc, PhoenixError) else str(exc))


def _data_folder(settings: Settings) -> str:
    settings.data.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=settings.data) as file:
        file.write(b"x")
        os.fsync(file.fileno())
    free_bytes = shutil.disk_usage(settings.data).free
    if free_bytes < _LEAST_FREE_BYTES:
        raise OSError(f"{settings.data} has {free_bytes >> 20} MiB free; the journal alone may need 1024")
    return f"{settings.data.absolute()} is writable, {free_bytes >> 30} GiB free"


def _onnx_runtime() -> str:
    import onnxruntime as ort

    return f"{ort.__version__} with {', '.join(ort.get_available_providers())}"


def _address(settings: Settings) -> str:
    check_address(settings)
    return f"{settings.host}:{settings.port}"


async def _features(settings: Settings) -> str:
    store = open_features(settings, 1000.0)
    try:
        await store.check()
    finally:
        await store.close()
    return f"{store.name} answers"


def _database(phoenix: Phoenix) -> str:
    phoenix.database.upgrade_if_embedded()
    return f"{phoenix.database.name} has the tables of this version"


def _models(phoenix: Phoenix) -> str:
    versions = phoenix.registry.list_versions()
    active = [version for version in versions if version.is_active]
    for version in active:
        try:
            path = phoenix.artifacts.fetch(version.uri, version.sha256)
            phoenix.engines.load(path, version.metadata)
        except PhoenixError as exc:
            raise ModelLoadFailed(f"{version.model_id} {version.version}: {exc.message}") from exc
    return f"{len(versions)} versions are registered, {len(active)} active, all of those load"
