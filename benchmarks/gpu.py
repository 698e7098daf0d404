"""What a run costs on each device: microseconds a row of a network, by how many rows run together.

    .venv/bin/python benchmarks/gpu.py --help

The runs are those of the platform's own engines, rows as they come from requests, on one thread of a CPU, by CUDA and by
TensorRT; they are interleaved, and the medians compared with the CPU's of the same rounds. Where a device cannot be had, its
column says why.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort
from harness import write_network

from phoenix_ml.application.ports import Engine, ModelHints
from phoenix_ml.domain.models import Framework
from phoenix_ml.domain.rows import Rows
from phoenix_ml.infrastructure.engines.gpu import Devices
from phoenix_ml.infrastructure.engines.onnx import OnnxEngines

BATCHES = (1, 16, 64, 256, 1024)
WARM_UP_RUNS = 3


def load_engines(folder: Path, width: int, hidden: int) -> dict[str, Engine]:
    """The network on the CPU, by CUDA and by TensorRT, as far as they can be had."""
    path = write_network(folder / "network.onnx", width, hidden)
    devices = Devices("cuda", ort.get_available_providers(), engine_cache=folder / "engines")
    on_cpu, on_gpu = OnnxEngines(), OnnxEngines(devices=devices)
    metadata = on_cpu.inspect(path, ModelHints())
    return {
        "cpu": on_cpu.load(path, metadata),
        "cuda": on_gpu.load(path, metadata),
        "tensorrt": on_gpu.load(path, metadata, Framework.TENSORRT),
    }


def measure(engine: Engine, rows: Rows, seconds: float) -> float:
    """Microseconds a row."""
    runs, began_at = 0, time.perf_counter()
    while (took_s := time.perf_counter() - began_at) < seconds or not runs:
        engine.run(rows)
        runs += 1
    return took_s / runs / len(rows) * 1e6


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--seconds", type=float, default=1.0, help="of each run")
    options.add_argument("--width", type=int, default=256, help="features of the network")
    options.add_argument("--hidden", type=int, default=2048, help="units of its hidden layer")
    asked = options.parse_args()
    array = np.random.default_rng(8).normal(size=(max(BATCHES), asked.width)).astype(np.float32)
    packed = [row.tobytes() for row in array]
    with tempfile.TemporaryDirectory() as folder:
        engines = load_engines(Path(folder), asked.width, asked.hidden)
        for name, engine in engines.items():
            placement = engine.placement
            print(f"{name}: runs on {placement.device} {placement.reason and '(' + placement.reason + ')'}")
        able = {n: e for n, e in engines.items() if n == "cpu" or e.placement.device.startswith(n)}
        print("\n| rows |", " | ".join(f"{name} µs a row | × cpu" for name in able), "|")
        print("| ---: |" + " ---: | ---: |" * len(able))
        for count in BATCHES:
            rows = Rows([()] * count, packed[:count])
            for engine in able.values():
                for _ in range(WARM_UP_RUNS):
                    engine.run(rows)
            found: dict[str, list[float]] = {name: [] for name in able}
            for _ in range(asked.rounds):
                for name, engine in able.items():
                    found[name].append(measure(engine, rows, asked.seconds))
            ratios = {
                name: statistics.median(a / b for a, b in zip(each, found["cpu"], strict=True))
                for name, each in found.items()
            }
            cells = [f"{statistics.median(found[name]):.1f} | {ratios[name]:.3f}" for name in able]
            print(f"| {count} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
