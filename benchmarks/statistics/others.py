"""What another tool says, at its defaults, of the data of `simulate.py`; runs in an environment of that tool's own."""

import json
import sys

import numpy as np

FEATURES, BATCH, REFERENCE = 30, 1000, 10_000


def evidently(reference, recent):
    """Whether any column is called drifted, which is what a person is shown."""
    import pandas as pd
    from evidently import Report
    from evidently.presets import DataDriftPreset

    names = [f"f{i}" for i in range(FEATURES)]
    tables = [pd.DataFrame(rows, columns=names) for rows in (recent, reference)]
    found = Report([DataDriftPreset()]).run(*tables).dict()
    (count,) = (m["value"]["count"] for m in found["metrics"] if isinstance(m["value"], dict))
    return count > 0


def alibi(reference, recent):
    from alibi_detect.cd import KSDrift

    return bool(KSDrift(reference, p_val=0.05).predict(recent)["data"]["is_drift"])


TOOLS = {
    "evidently": (evidently, "Evidently", "DataDriftPreset, any column drifted", 100),
    "alibi": (alibi, "alibi-detect", "KSDrift, p_val=0.05, Bonferroni", 1000),
}


def main() -> None:
    is_drift, tool, rule, checks = TOOLS[sys.argv[1]]
    rng = np.random.default_rng(53)

    def share(times, *, rows=BATCH, reference_rows=REFERENCE, features=0, shift=0.0):
        found = 0
        for _ in range(times):
            reference = rng.normal(size=(reference_rows, FEATURES))
            recent = rng.normal(size=(rows, FEATURES))
            recent[:, :features] += shift
            found += is_drift(reference, recent)
        return found / times

    print(
        json.dumps(
            {
                "tool": tool,
                "rule": rule,
                "null": 10_000 * share(checks),
                "small": share(checks // 5, features=1, shift=0.1),
                "irrelevant": share(10, rows=100_000, reference_rows=100_000, features=FEATURES, shift=0.025),
            }
        )
    )


main()
