"""Boosters of LightGBM, and how its estimators are converted inside of pipelines."""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from phoenix_ml.domain.errors import ModelRefused
from phoenix_ml.infrastructure.formats.graph import GRAPH_NAME, INPUT_NAME
from phoenix_ml.infrastructure.formats.parity import Answers
from phoenix_ml.infrastructure.formats.sample import Array, Sample, as_matrix

# The newest that onnxmltools writes a booster for by itself.
_TARGET_OPSET = 15


def open_model(path: Path) -> "Booster":
    """The model in a ``.txt`` file that LightGBM has saved. Raises ModelRefused for another."""
    try:
        import lightgbm as lgb
    except ModuleNotFoundError as exc:
        raise ModelRefused(
            f"{path.name} takes LightGBM: pip install lightgbm, in the version it was trained with"
        ) from exc
    # LightGBM ends the whole process at files that are not whole.
    text = path.read_bytes()
    if not text.startswith(b"tree\n") or b"\nend of trees\n" not in text:
        raise ModelRefused(
            f"{path.name} is no model of LightGBM, or not a whole one: it begins with a line 'tree', and has 'end of trees'"
        )
    lgb.register_logger(logging.getLogger("lightgbm"))
    try:
        return Booster(lgb.Booster(model_file=str(path)))
    except lgb.basic.LightGBMError as exc:
        raise ModelRefused(f"{path.name} is no model of LightGBM: {exc}") from exc


class Booster:
    """A booster without an estimator around it; a classifier's labels are 0, 1, …. See ``Original``."""

    def __init__(self, booster: Any) -> None:
        if booster.pandas_categorical:
            raise ModelRefused(
                "the booster was trained on pandas' categories, whose numbers an ONNX file does not know: "
                "train it on the numbers (Series.cat.codes)"
            )
        self._booster = booster
        objective = str(booster.dump_model(num_iteration=1).get("objective", "")).split(" ")[0]
        self.is_classifier = objective in ("binary", "multiclass", "multiclassova")
        names = booster.feature_name()
        # Its own names, where it was given none.
        has_own = names == [f"Column_{i}" for i in range(len(names))]
        self.names: Sequence[str] | None = None if has_own else names
        self.width = len(names)

    @property
    def library(self) -> str:
        import lightgbm as lgb

        return f"lightgbm {lgb.__version__}"

    def takes_one_tensor(self, sample: Sample) -> bool:
        if sample.has_text:
            raise ModelRefused("a booster of LightGBM takes numbers, and the sample has texts")
        return True

    def answer(self, columns: dict[str, Array]) -> Answers:
        numbers = np.asarray(self._booster.predict(as_matrix(columns)), np.float64)
        if not self.is_classifier:
            return Answers(numbers.reshape(len(numbers), -1))
        if numbers.ndim == 1:
            numbers = np.column_stack([1 - numbers, numbers])
        return Answers(numbers, numbers.argmax(axis=1).tolist(), range(numbers.shape[1]))

    def export(self, sample: Sample, floats_only: bool) -> Any:
        from onnxmltools import convert_lightgbm
        from onnxmltools.convert.common.data_types import FloatTensorType

        return convert_lightgbm(
            self._booster,
            name=GRAPH_NAME,
            initial_types=[(INPUT_NAME, FloatTensorType([None, self.width]))],
            zipmap=False,
            target_opset=_TARGET_OPSET,
        )


def prepare(parts: Iterable[Any]) -> None:
    """Tells skl2onnx how LightGBM's estimators are converted."""
    import lightgbm as lgb
    from onnxmltools.convert.lightgbm.operator_converters.LightGbm import convert_lightgbm
    from skl2onnx import update_registered_converter
    from skl2onnx.common.shape_calculator import (
        calculate_linear_classifier_output_shapes,
        calculate_linear_regressor_output_shapes,
    )

    update_registered_converter(
        lgb.LGBMClassifier,
        "LightGbmLGBMClassifier",
        calculate_linear_classifier_output_shapes,
        convert_lightgbm,
        options={"nocl": [True, False], "zipmap": [True, False, "columns"]},
    )
    update_registered_converter(
        lgb.LGBMRegressor,
        "LightGbmLGBMRegressor",
        calculate_linear_regressor_output_shapes,
        convert_lightgbm,
        options={"split": None},
    )
