"""The command line in this process."""

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from phoenix_ml.cli import main

Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs `phoenix-ml ARGUMENTS` in this process, on a data folder of the test."""

    def invoke(*arguments: str | Path, code: int = 0) -> Result:
        done = CliRunner().invoke(main, [*map(str, arguments), "--data", str(tmp_path / "data")])
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        assert done.exit_code == code, done.output
        return done

    return invoke
