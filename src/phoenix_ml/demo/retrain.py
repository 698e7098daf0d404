"""The demonstration's trainer: ``python -m phoenix_ml.demo.retrain EXPORT OUT``, as a user would write one."""

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from phoenix_ml.demo.training import CATEGORIES, FEATURES, build_gradient_boosting, export_onnx


def main(export: str, out: str) -> None:
    rows = pq.read_table(export)
    # The newest are of the world as it is now.
    rows = rows.slice(0, min(rows.num_rows, 3000))
    columns = []
    for name in FEATURES:
        values = rows[name].to_pylist()
        if name in CATEGORIES:
            columns.append([value or "" for value in values])
        else:
            columns.append([np.float32(np.nan if value is None else value) for value in values])
    table = np.array(columns, dtype=object).T
    outcomes = np.array(rows["_outcome"].to_pylist())
    print(f"training on {len(outcomes)} applications with outcomes, {np.mean(outcomes == 'bad'):.1%} bad")
    estimator = build_gradient_boosting().fit(table, outcomes)
    print(f"accuracy on them: {estimator.score(table, outcomes):.3f}")
    Path(out, "model.onnx").write_bytes(export_onnx(estimator, "retrained"))
    # What the library itself answers, for Phoenix to compare with the file.
    sample = rows.select(list(FEATURES)).slice(0, 500)
    answers = pa.array(estimator.predict(table[:500]).tolist())
    pq.write_table(sample.append_column("_result", answers), Path(out, "sample.parquet"))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
