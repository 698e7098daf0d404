"""Requests whose features tell their number, and what the log must hold of their answers."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from onnx_models import linear_regressor, weights, write
from phoenix_server import PhoenixServer
from traffic import Traffic

from phoenix_ml.application.ports import LoggedPrediction
from phoenix_ml.domain.routing import Arm, Role, Routing, Strategy

MODEL = "linear"
BIAS = {"1.0.0": 0.25, "1.1.0": 100.25}


def register_champion_and_challenger(server: PhoenixServer) -> None:
    """Two versions that share the traffic, half of it each; their answers differ."""
    for version, bias in BIAS.items():
        artifact = write(server.folder / f"{version}.onnx", linear_regressor(3, bias=bias))
        server.register(artifact, MODEL, version)
    with server.opened() as phoenix:
        phoenix.registry.set_routing(MODEL, half_and_half(), "test")


def half_and_half() -> Routing:
    return Routing(Strategy.AB_TEST, (Arm("1.0.0"), Arm("1.1.0", Role.CHALLENGER)))


def make_body(number: int) -> Mapping[str, Any]:
    """A request whose features tell its number, so that a swapped or altered row would show."""
    return {"model_id": MODEL, "features": features_of(number), "request_id": f"r{number}"}


def features_of(number: int) -> list[float]:
    return [float(number), float(number % 7), -1.5]


def assert_exactly_once(traffic: Traffic, rows: list[LoggedPrediction]) -> None:
    """Every answer is in the log once, with the values that were answered and the inputs that were sent."""
    times = Counter(row.id for row in rows)
    by_id = {row.id: row for row in rows}
    for prediction_id, answer in traffic.answers.items():
        row = by_id[prediction_id]
        sent = features_of(int(row.request_id.removeprefix("r")))
        expected = float(np.float32(np.dot(sent, weights(3))) + np.float32(BIAS[row.model_version]))
        assert times[prediction_id] == 1
        assert (row.result, row.model_version, row.route["role"], row.latency_ms) == (
            answer["result"],
            answer["model_version"],
            answer["role"],
            answer["latency_ms"],
        )
        assert list(row.features.values()) == sent
        assert np.frombuffer(row.inputs, "<f4").tolist() == sent
        assert row.result == pytest.approx(expected, rel=1e-5)
