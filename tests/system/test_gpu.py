"""A real GPU: what runs on it, and what becomes of answers when its memory is too small. ``make test`` says how many
of these tests it left out where there is none.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import onnx_models
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from phoenix_ml.application.ports import Engine, ModelHints, Placement
from phoenix_ml.domain.models import Framework, Metadata
from phoenix_ml.domain.rows import Outputs, Rows
from phoenix_ml.infrastructure.engines.gpu import Devices
from phoenix_ml.infrastructure.engines.onnx import OnnxEngines

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

WIDTH, HIDDEN, ROWS = 512, 2048, 4096
_MIB = 1024 * 1024
# The weights take 4 MiB. What the hidden layer of all rows takes, 32 MiB, does not fit beside them; half of it does.
_FITS_HALF = 32 * _MIB
_FITS_NOTHING = 1 * _MIB


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Metadata]:
    """A network with one hidden layer."""
    content = onnx_models.network_classifier(WIDTH, hidden=HIDDEN)
    path = onnx_models.write(tmp_path_factory.mktemp("gpu") / "network.onnx", content)
    metadata = OnnxEngines().inspect(path, ModelHints())
    return path, msgspec.structs.replace(metadata, row_independent=True)


@pytest.fixture(scope="module")
def rows() -> Rows:
    array = np.random.default_rng(7).normal(size=(ROWS, WIDTH)).astype(np.float32)
    return Rows([()] * ROWS, [row.tobytes() for row in array])


def probabilities(outputs: Outputs) -> NDArray[np.float64]:
    return np.array(outputs.probabilities)


def load(
    model: tuple[Path, Metadata], memory_bytes: int = 0, framework: Framework = Framework.ONNX
) -> Engine:
    cache = model[0].parent / "engines"
    devices = Devices(
        "cuda", ort.get_available_providers(), engine_cache=cache, memory_limit_bytes=memory_bytes
    )
    return OnnxEngines(devices=devices).load(*model, framework)


def test_the_gpu_answers_as_the_cpu_does(model: tuple[Path, Metadata], rows: Rows) -> None:
    """But for rounding: it adds in another order, and may in lower precision."""
    expected = OnnxEngines().load(*model).run(rows)

    found = load(model).run(rows)

    assert found.execution.device == "cuda:0"
    np.testing.assert_allclose(probabilities(found), probabilities(expected), atol=1e-2)


def test_a_batch_that_memory_is_too_small_for_is_halved(model: tuple[Path, Metadata], rows: Rows) -> None:
    """With the words that CUDA's arena really uses."""
    expected = load(model).run(rows)

    found = load(model, _FITS_HALF).run(rows)

    assert found.execution.device == "cuda:0"
    assert found.execution.out_of_memory >= 1
    np.testing.assert_allclose(probabilities(found), probabilities(expected), atol=1e-2)


def test_a_model_that_memory_is_too_small_for_serves_on_the_cpu(
    model: tuple[Path, Metadata], rows: Rows
) -> None:
    """As it would without a GPU, bit for bit."""
    expected = OnnxEngines().load(*model).run(rows)

    engine = load(model, _FITS_NOTHING)

    assert (engine.placement.device, engine.placement.out_of_memory) == ("cpu", True)
    assert engine.run(rows) == expected


def test_tensorrt_keeps_its_engine_for_the_next_start(model: tuple[Path, Metadata], rows: Rows) -> None:
    """Building one takes long; a restart must not wait for it again. Where TensorRT is not installed this fails."""
    engine = load(model, framework=Framework.TENSORRT)
    few = Rows(rows.values[:16], rows.packed[:16])
    first = engine.run(few)
    kept = {file: file.stat().st_mtime_ns for file in (model[0].parent / "engines").rglob("*.engine")}

    second = load(model, framework=Framework.TENSORRT).run(few)

    assert engine.placement == Placement("tensorrt:0")
    assert kept
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    np.testing.assert_allclose(probabilities(second), probabilities(first), atol=1e-3)
