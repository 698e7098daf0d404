"""The process in which a model is tried out: arguments are the file of the trial, and that of its findings."""

import resource
import sys
from pathlib import Path

from phoenix_ml.application.trial import Trial, describe_here, try_out
from phoenix_ml.bootstrap import open_engines
from phoenix_ml.infrastructure.tables import read_columns, read_spread
from phoenix_ml.infrastructure.training.trial import read_trial, write_findings
from phoenix_ml.settings import load_settings


def main(asked: str, found: str) -> None:
    """The settings are those of the process that starts it."""
    # Of a model that kills it nothing is left behind.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    engines = open_engines(load_settings())
    trial = read_trial(Path(asked))
    findings = (
        try_out(engines, trial, read_spread)
        if isinstance(trial, Trial)
        else describe_here(engines, trial, read_columns)
    )
    write_findings(Path(found), findings)


if __name__ == "__main__":
    main(*sys.argv[1:])
