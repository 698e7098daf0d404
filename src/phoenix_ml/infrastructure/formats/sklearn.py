"""Estimators and pipelines of scikit-learn, those of XGBoost and LightGBM inside or alone."""

import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from phoenix_ml.domain.errors import ModelRefused
from phoenix_ml.domain.features import FeatureType
from phoenix_ml.infrastructure.formats.graph import GRAPH_NAME, INPUT_NAME, TARGET_OPSETS
from phoenix_ml.infrastructure.formats.parity import Answers, Original
from phoenix_ml.infrastructure.formats.sample import Array, Sample, as_frame, as_matrix


def open_pickle(path: Path) -> Original:
    """The model in a ``.joblib`` or ``.pkl`` file. This executes whatever code the file holds.

    Raises ModelRefused for what cannot be opened, and for what is no model.
    """
    import joblib

    try:
        model = joblib.load(path)
    except ModuleNotFoundError as exc:
        raise ModelRefused(
            f"{path.name} needs {exc.name}, which is not installed here: pip install {str(exc.name).partition('.')[0]}, "
            "in the version that the model was trained with"
        ) from exc
    except Exception as exc:  # opening it executes code, which may raise anything
        raise ModelRefused(f"{path.name} cannot be opened: {type(exc).__name__}: {exc}") from exc
    library = type(model).__module__.partition(".")[0]
    if library == "xgboost" and type(model).__name__ == "Booster":
        from phoenix_ml.infrastructure.formats.xgboost import from_booster

        return from_booster(model)
    if library == "lightgbm" and type(model).__name__ == "Booster":
        from phoenix_ml.infrastructure.formats.lightgbm import Booster

        return Booster(model)
    return Estimator(model)


class Estimator:
    """A fitted classifier or regressor, or a pipeline that ends in one. See ``Original``."""

    def __init__(self, model: Any) -> None:
        from sklearn.base import is_classifier, is_regressor
        from sklearn.exceptions import NotFittedError
        from sklearn.utils.validation import check_is_fitted

        if not hasattr(model, "predict") or not (is_classifier(model) or is_regressor(model)):
            raise ModelRefused(f"{type(model).__name__} is neither a classifier nor a regressor")
        try:
            check_is_fitted(model)
        except NotFittedError as exc:
            raise ModelRefused(f"{type(model).__name__} is not fitted: save it after its training") from exc
        self._model = model
        self.is_classifier = bool(is_classifier(model))
        self._libraries = sorted({type(part).__module__.partition(".")[0] for part in _parts(model)})
        names = getattr(model, "feature_names_in_", None)
        self.names: Sequence[str] | None = None if names is None else [str(name) for name in names]
        self.width: int | None = getattr(model, "n_features_in_", None)

    @property
    def library(self) -> str:
        own = {"sklearn": "scikit-learn"}
        known = [name for name in self._libraries if name in ("sklearn", "xgboost", "lightgbm")]
        versions = {name: importlib.import_module(name).__version__ for name in known}
        return ", ".join(f"{own.get(name, name)} {version}" for name, version in versions.items())

    def takes_one_tensor(self, sample: Sample) -> bool:
        # What picks columns by their names, or their types, needs them apart.
        picks = any(type(part).__name__ == "ColumnTransformer" for part in _parts(self._model))
        return not sample.has_text and not (picks and self.names is not None)

    def answer(self, columns: dict[str, Array]) -> Answers:
        model = self._model
        table = as_matrix(columns) if self.names is None else as_frame(columns)
        predicted = np.asarray(model.predict(table))
        if not self.is_classifier:
            return Answers(predicted.astype(np.float64).reshape(len(predicted), -1))
        if predicted.ndim != 1:
            raise ModelRefused("a classifier with several labels a row cannot be converted")
        classes = np.asarray(model.classes_).tolist()
        probabilities = model.predict_proba(table) if hasattr(model, "predict_proba") else None
        numbers = None if probabilities is None else np.asarray(probabilities, np.float64)
        return Answers(numbers, predicted.tolist(), classes)

    def export(self, sample: Sample, floats_only: bool) -> Any:
        from skl2onnx import convert_sklearn
        from skl2onnx.common.data_types import FloatTensorType, Int64TensorType, StringTensorType
        from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
        from sklearn.preprocessing import StandardScaler

        for library in {"xgboost", "lightgbm"}.intersection(self._libraries):
            importlib.import_module(f"phoenix_ml.infrastructure.formats.{library}").prepare(
                _parts(self._model)
            )
        inputs: list[tuple[str, Any]] = [(INPUT_NAME, FloatTensorType([None, len(sample.names)]))]
        if not self.takes_one_tensor(sample):
            whole = FloatTensorType if floats_only else Int64TensorType
            tensors = {FeatureType.FLOAT: FloatTensorType, FeatureType.STRING: StringTensorType}
            inputs = [(name, tensors.get(sample.types[name], whole)([None, 1])) for name in sample.names]
        # Without probabilities only the label is kept, and not every classifier knows the option then.
        has_probabilities = self.is_classifier and hasattr(self._model, "predict_proba")
        return convert_sklearn(
            self._model,
            name=GRAPH_NAME,
            initial_types=inputs,
            options={id(self._model): {"zipmap": False}} if has_probabilities else None,
            target_opset=TARGET_OPSETS,
            custom_conversion_functions={
                StandardScaler: _convert_scaler,
                HistGradientBoostingClassifier: _convert_histogram_trees,
                HistGradientBoostingRegressor: _convert_histogram_trees,
            },
        )


def _parts(model: Any) -> Iterator[Any]:
    """The model and every estimator in it."""
    yield model
    for part in getattr(model, "get_params", dict)().values():
        if hasattr(part, "fit"):
            yield part


class _PlainNumbers:
    """A container of skl2onnx that takes NumPy's booleans for numbers, which onnx 1.23 does not."""

    def __init__(self, container: Any) -> None:
        self._container = container

    def __getattr__(self, name: str) -> Any:
        return getattr(self._container, name)

    def add_node(self, *arguments: Any, **attributes: Any) -> Any:
        flags = "nodes_missing_value_tracks_true"
        if flags in attributes:
            attributes[flags] = [int(flag) for flag in attributes[flags]]
        return self._container.add_node(*arguments, **attributes)


def _convert_histogram_trees(scope: Any, operator: Any, container: Any) -> None:
    from skl2onnx.operator_converters import random_forest as trees

    if hasattr(operator.raw_operator, "classes_"):
        convert = trees.convert_sklearn_random_forest_classifier
    else:
        convert = trees.convert_sklearn_random_forest_regressor_converter
    convert(scope, operator, _PlainNumbers(container))


def _convert_scaler(scope: Any, operator: Any, container: Any) -> None:
    """Scales in float64, as scikit-learn does.

    skl2onnx 1.20 rounds the means to float32, even with its option ``div_cast``: then a value that lies on a
    tree's threshold, as counts and years do, goes the other way.
    """
    from onnx import TensorProto
    from skl2onnx.algebra.onnx_ops import OnnxCast, OnnxConcat, OnnxDiv, OnnxIdentity, OnnxSub

    scaler, version = operator.raw_operator, container.target_opset
    wide = [OnnxCast(v, to=TensorProto.DOUBLE, op_version=version) for v in operator.inputs]
    node = wide[0] if len(wide) == 1 else OnnxConcat(*wide, axis=1, op_version=version)
    if scaler.with_mean:
        node = OnnxSub(node, np.asarray(scaler.mean_, np.float64), op_version=version)
    if scaler.with_std:
        node = OnnxDiv(node, np.asarray(scaler.scale_, np.float64), op_version=version)
    narrow = OnnxCast(node, to=TensorProto.FLOAT, op_version=version)
    OnnxIdentity(narrow, op_version=version, output_names=[operator.outputs[0].full_name]).add_to(
        scope, container
    )
