"""The figures that the drift alarm and the loss detector promise, simulated with fixed seeds."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.system]
SIMULATION = Path(__file__).parents[2] / "benchmarks" / "statistics" / "simulate.py"


@pytest.mark.timeout(400)
def test_every_figure_is_within_its_bound_and_the_naive_rule_is_not() -> None:
    """False alarms and delays are what the explanation says, or the monitor cannot be trusted."""
    command = [sys.executable, str(SIMULATION), "--reduced"]
    simulated = subprocess.run(command, capture_output=True, text=True, check=False)

    assert (simulated.returncode, "0 of the figures out of bounds" in simulated.stdout) == (0, True), (
        simulated.stdout
    )
