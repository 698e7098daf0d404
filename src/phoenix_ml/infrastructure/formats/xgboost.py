"""Boosters of XGBoost, and how its estimators are converted inside of pipelines."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from phoenix_ml.domain.errors import ModelRefused
from phoenix_ml.infrastructure.formats.sklearn import Estimator


def open_model(path: Path) -> Estimator:
    """The model in a ``.json`` or ``.ubj`` file that XGBoost has saved. Raises ModelRefused for another."""
    try:
        import xgboost as xgb
    except ModuleNotFoundError as exc:
        raise ModelRefused(
            f"{path.name} takes XGBoost: pip install xgboost (or xgboost-cpu), in the version it was trained with"
        ) from exc
    booster = xgb.Booster()
    try:
        booster.load_model(path)
    except xgb.core.XGBoostError as exc:
        raise ModelRefused(f"{path.name} is no model of XGBoost: {str(exc).splitlines()[0]}") from exc
    return from_booster(booster)


def from_booster(booster: Any) -> Estimator:
    """The estimator of a booster; a classifier's labels are 0, 1, …, as XGBoost has them."""
    import xgboost as xgb

    objective = json.loads(booster.save_config())["learner"]["objective"]["name"]
    is_classifier = objective.startswith(("binary:", "multi:"))
    model = xgb.XGBClassifier() if is_classifier else xgb.XGBRegressor()
    model.load_model(booster.save_raw("json"))
    if objective == "multi:softmax":
        # The same trees, which tell the probabilities too.
        model.get_booster().set_param({"objective": "multi:softprob"})
        model.set_params(objective="multi:softprob")
    names = booster.feature_names
    found = Estimator(model)
    found.names = list(names) if names else None
    return found


def prepare(parts: Iterable[Any]) -> None:
    """Tells skl2onnx how XGBoost's estimators are converted, and makes these ready for it.

    Raises ModelRefused for boosters that are no trees. The estimators have lost their features' names then.
    """
    import xgboost as xgb
    from onnxmltools.convert.xgboost.operator_converters.XGBoost import convert_xgboost
    from skl2onnx import update_registered_converter
    from skl2onnx.common.shape_calculator import (
        calculate_linear_classifier_output_shapes,
        calculate_linear_regressor_output_shapes,
    )

    update_registered_converter(
        xgb.XGBClassifier,
        "XGBoostXGBClassifier",
        calculate_linear_classifier_output_shapes,
        convert_xgboost,
        options={"nocl": [True, False], "zipmap": [True, False, "columns"]},
    )
    update_registered_converter(
        xgb.XGBRegressor, "XGBoostXGBRegressor", calculate_linear_regressor_output_shapes, convert_xgboost
    )
    for part in parts:
        if not isinstance(part, xgb.XGBModel) or not part.__sklearn_is_fitted__():
            continue
        booster = part.get_booster()
        kind = json.loads(booster.save_config())["learner"]["gradient_booster"]["name"]
        if kind != "gbtree":
            raise ModelRefused(f"XGBoost's booster {kind!r} cannot be converted to ONNX, gbtree can")
        # The converter takes no other names than its own.
        booster.feature_names = None
