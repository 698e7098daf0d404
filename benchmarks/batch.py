"""What scoring a file costs beside ONNX Runtime alone, for the demonstration's two models.

    python benchmarks/batch.py [--rounds 5] [--rows 500000] [--logged-rows 20000]

The applicants of the demonstration, drawn at random, in a Parquet file. The reference is ONNX Runtime's session over
the same rows, that are there as arrays already, in runs of as many rows and on one thread; "reading" is pyarrow
over the file without a look at it. "scoring" is ``phoenix-ml predict --input --output`` from open to close, progress
bar included, without the start of Python; "with --log" also puts every row on record in SQLite. All on one processor,
in rounds in which the cases take turns; CPU time of this process with all its threads, the median of the rounds.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime as ort
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from phoenix_server import PhoenixServer

from phoenix_ml.cli.calls import SCORED_ROWS, score_file
from phoenix_ml.demo.training import CATEGORIES, FEATURES, MODEL_NAME, Training, train
from phoenix_ml.domain.features import FeatureRule

REFERENCE, READING, SCORING, LOGGED = "ONNX Runtime alone", "reading the file alone", "scoring", "with --log"


def cpu_us(work: Callable[[], object], rows: int) -> float:
    """CPU µs of this process a row."""
    started = time.process_time()
    work()
    return (time.process_time() - started) / rows * 1e6


def make_rows(training: Training, rows: int) -> pa.Table:
    drawn = np.random.default_rng(0).integers(0, len(training.data.ids), rows)
    return pq.read_table(training.features_path).take(pa.array(drawn))


def as_arrays(table: pa.Table) -> dict[str, Any]:
    arrays = {}
    for name in FEATURES:
        if name in CATEGORIES:
            column = np.array([text or "" for text in table[name].to_pylist()], object)
        else:
            column = table[name].to_numpy().astype(np.float32)
        arrays[name] = column.reshape(-1, 1)
    return arrays


def open_session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run_session(session: ort.InferenceSession, arrays: Mapping[str, Any], rows: int) -> None:
    for start in range(0, rows, SCORED_ROWS):
        part = {name: array[start : start + SCORED_ROWS] for name, array in arrays.items()}
        session.run(["label", "probabilities"], part)


def read_file(path: Path) -> None:
    with pq.ParquetFile(path) as file:
        for _ in file.iter_batches(batch_size=SCORED_ROWS):
            pass


def measured(
    folder: Path, rounds: int, rows: int, logged_rows: int
) -> tuple[list[str], dict[tuple[str, str], list[float]]]:
    training = train(folder / "training")
    server = PhoenixServer(folder)  # for its data folder: it is never started
    contract = msgspec.convert(json.loads(training.contract_path.read_text()), dict[str, FeatureRule])
    for trained in training.versions:
        server.register(trained.onnx_path, MODEL_NAME, trained.version, contract=contract)
    table = make_rows(training, rows)
    source, target = folder / "rows.parquet", folder / "scored.parquet"
    pq.write_table(table, source)
    arrays = as_arrays(table)
    sessions = {trained.version: open_session(trained.onnx_path) for trained in training.versions}
    found: dict[tuple[str, str], list[float]] = {}
    for number in range(rounds):
        # Other rows each time, as those that are on record already would be skipped.
        logged = folder / f"logged-{number}.parquet"
        pq.write_table(table.slice(number * logged_rows, logged_rows), logged)
        for version, session in sessions.items():
            cases: dict[str, tuple[Callable[[], object], int]] = {
                REFERENCE: (partial(run_session, session, arrays, rows), rows),
                READING: (partial(read_file, source), rows),
                SCORING: (
                    partial(score_file, MODEL_NAME, version, source, target, server.data, False, None),
                    rows,
                ),
                LOGGED: (
                    partial(score_file, MODEL_NAME, version, logged, target, server.data, True, None),
                    logged_rows,
                ),
            }
            for name, (work, count) in cases.items():
                found.setdefault((version, name), []).append(cpu_us(work, count))
    return [f"{trained.version}, {trained.title}" for trained in training.versions], found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--logged-rows", type=int, default=20_000)
    given = parser.parse_args()
    if given.rounds * given.logged_rows > given.rows:
        parser.error("--rows must be at least --rounds times --logged-rows")
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as folder:
        titles, found = measured(Path(folder), given.rounds, given.rows, given.logged_rows)
    table = Table("version", "what", "CPU µs a row", "rows a CPU second", "× ONNX Runtime", "least", box=None)
    for title in titles:
        version = title.partition(",")[0]
        for name in (REFERENCE, READING, SCORING, LOGGED):
            times = found[version, name]
            ratios = [one / alone for one, alone in zip(times, found[version, REFERENCE], strict=True)]
            us = statistics.median(times)
            table.add_row(
                title,
                name,
                f"{us:.2f}",
                f"{1e6 / us:,.0f}",
                f"{statistics.median(ratios):.2f}",
                f"{min(times):.2f}",
            )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
