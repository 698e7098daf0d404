"""The healing demonstration, as it is typed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.system


@pytest.mark.timeout(300)
def test_the_demo_heals_what_changed_and_leaves_what_is_broken(tmp_path: Path) -> None:
    """It is the first that people see of healing: a challenger that is better, and no retraining of broken data."""
    command = [sys.executable, "-m", "phoenix_ml.cli", "demo", "--healing", "--exit", "--port", "0"]
    ended = subprocess.run(
        [*command, "--data", str(tmp_path / "demo")], check=False, capture_output=True, text=True, timeout=280
    )

    told = " ".join(ended.stdout.split())
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "incident open credit-risk quality: answers are wrong more often" in told
    assert "healer 1.1.0 is registered" in told
    assert "ab_test beside 1.0.0" in told
    champion, challenger = (
        float(found) for found in re.findall(r"^ *1\.[01]\.0 +\d+ +(0\.\d+)", ended.stdout, re.MULTILINE)
    )
    assert challenger > champion
    assert "credit-risk-b schema: income" in told
    assert "retrainings asked for: 0" in told
    [routing] = re.findall(
        r"^ +(\S*phoenix-ml models routing credit-risk 1.1.0 .*)$", ended.stdout, re.MULTILINE
    )
    typed = subprocess.run(routing.split(), check=False, capture_output=True, text=True, timeout=60)
    assert "single" in typed.stdout, typed.stderr
