"""Virtual environments of what we compare ourselves with, apart from our own; kept for the next run."""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent / ".venvs"


class NotInstalled(Exception):
    """The message ends with the last lines of pip."""


def python_of(name: str, requirements: Path, limit_s: float = 900) -> Path:
    """The interpreter of an environment that holds the requirements; made where it is not there yet."""
    folder = FOLDER / name
    python, stamp = folder / "bin" / "python", folder / "requirements.sha256"
    digest = hashlib.sha256(requirements.read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text() == digest:
        return python
    print(f"installing {requirements.name} into {folder} …", file=sys.stderr, flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [
        str(python),
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "-r",
        str(requirements),
    ]
    try:
        done = subprocess.run(pip, capture_output=True, text=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired as exc:
        raise NotInstalled(f"pip took longer than {limit_s:g} s") from exc
    if done.returncode:
        raise NotInstalled("pip: " + " | ".join(done.stderr.strip().splitlines()[-4:]))
    stamp.write_text(digest)
    return python
