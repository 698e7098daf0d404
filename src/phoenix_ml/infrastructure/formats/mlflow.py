"""Models that MLflow keeps: by name in its registry, or as a folder."""

import logging
import os
from pathlib import Path
from typing import Any, Final

import msgspec

from phoenix_ml.domain.errors import ModelRefused
from phoenix_ml.extras import install

SCHEME: Final = "models:/"
# The flavours that can be taken, the first the soonest, and what each calls its file.
_FLAVOURS: Final = {"onnx": "data", "sklearn": "pickled_model", "xgboost": "data", "lightgbm": "data"}


class _MLmodel(msgspec.Struct):
    flavors: dict[str, dict[str, Any]]


def fetch(uri: str, folder: Path, tracking_uri: str | None) -> Path:
    """The file of a model such as ``models:/credit-risk@champion``, downloaded into the folder.

    Raises ModelRefused, in MLflow's own words, for what it does not have.
    """
    mlflow = _import_mlflow()
    # Its own words come with our error.
    for name in ("mlflow", "urllib3"):
        logging.getLogger(name).setLevel(logging.ERROR)
    hint = ""
    if tracking_uri is not None:
        mlflow.set_tracking_uri(tracking_uri)
    elif "MLFLOW_TRACKING_URI" not in os.environ:
        hint = "; --tracking-uri or MLFLOW_TRACKING_URI say where it keeps its models"
    try:
        downloaded = mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(folder))
    except Exception as exc:  # each of its stores has errors of its own
        raise ModelRefused(f"MLflow does not give {uri}: {_said(exc)}{hint}") from exc
    return find_file(Path(downloaded), folder)


def is_folder(path: Path) -> bool:
    return (path / "MLmodel").is_file()


def find_file(model: Path, folder: Path) -> Path:
    """The file of an MLflow model's folder: ONNX if there is, else one that can be converted.

    ``folder`` takes what has to be written anew. Raises ModelRefused where there is neither.
    """
    flavours = _read_flavours(model)
    for flavour, key in _FLAVOURS.items():
        if flavour not in flavours:
            continue
        name = flavours[flavour].get(key)
        if not isinstance(name, str) or not (model / name).resolve().is_relative_to(model.resolve()):
            raise ModelRefused(f"the file MLmodel does not say where the {flavour} file is")
        path = model / name
        if not path.is_file():
            raise ModelRefused(f"MLflow's model has no file {name}, which its {flavour} flavour names")
        if path.suffix == ".skops":
            raise ModelRefused(
                "skops files are not read: log the model with serialization_format='cloudpickle', or with mlflow.onnx"
            )
        return _whole(path, folder) if flavour == "onnx" else path
    raise ModelRefused(
        f"MLflow's model has the flavours {', '.join(flavours)}; {', '.join(_FLAVOURS)} can be registered"
    )


def _read_flavours(model: Path) -> dict[str, dict[str, Any]]:
    """What the folder's file ``MLmodel`` says of its flavours: MLflow itself would need pandas to read it."""
    try:
        import yaml
    except ModuleNotFoundError as exc:
        raise _not_installed() from exc
    try:
        content = yaml.safe_load((model / "MLmodel").read_text(encoding="utf-8"))
        return msgspec.convert(content, _MLmodel).flavors
    except (yaml.YAMLError, OSError, ValueError) as exc:
        raise ModelRefused(f"{model.name} is no model of MLflow: {_said(exc)}") from exc


def _whole(path: Path, folder: Path) -> Path:
    """The ONNX file with all its tensors inside, which MLflow writes beside it by default."""
    import onnx
    from google.protobuf.message import DecodeError
    from onnx.checker import ValidationError

    whole = folder / f"whole-{path.name}"
    try:
        model = onnx.load(str(path), load_external_data=False)
        if not any(tensor.external_data for tensor in model.graph.initializer):
            return path
        whole.write_bytes(onnx.load(str(path)).SerializeToString(deterministic=True))
    except (DecodeError, ValidationError, OSError, ValueError) as exc:
        raise ModelRefused(f"MLflow's {path.name} cannot be read: {_said(exc)}") from exc
    return whole


def _said(exc: Exception) -> str:
    return " ".join(str(exc).split())


def _import_mlflow() -> Any:
    # It would tell its makers of each use, draw progress bars, and wait minutes for a server that is away.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    try:
        import mlflow
        import mlflow.artifacts
    except ModuleNotFoundError as exc:
        raise _not_installed() from exc
    return mlflow


def _not_installed() -> ModelRefused:
    return ModelRefused(f"models of MLflow take its library: {install('mlflow')}")
