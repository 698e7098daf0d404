"""The process in which a model is tried out: arguments are the file of the trial, and that of its findings."""

import sys
from pathlib import Path

from phoenix_ml.application.trial import try_out
from phoenix_ml.bootstrap import open_engines
from phoenix_ml.infrastructure.tables import read_spread
from phoenix_ml.infrastructure.training.trial import read_trial, write_findings
from phoenix_ml.settings import load_settings


def main(asked: str, found: str) -> None:
    """The settings are those of the process that starts it."""
    write_findings(Path(found), try_out(open_engines(load_settings()), read_trial(Path(asked)), read_spread))


if __name__ == "__main__":
    main(*sys.argv[1:])
