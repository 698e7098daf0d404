"""What the tests take from PyPI apart from their own environment: clients, and wheels for what lies in them.

The clients of others need other versions than we do (`clients/NAME.txt`), so each has a virtual environment.
Of some wheels only the files are wanted, not the code and what it depends on (`wheels/NAME.txt`): those are
unpacked into a folder. Both lie in .venv, are made where they are missing or their requirements have changed,
and are kept. `python tests/support/environments.py` makes all of them, or those that it is told.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Not that of the running Python: it may be another one, and this is where `make clean` looks.
VENV = HERE.parents[1] / ".venv"
LIMIT_S = 900
OUTPUT_TAIL_LINES = 6

# With the newest Python that their authors allow.
CLIENTS: dict[str, tuple[int, int]] = {"triton": (3, 99), "kserve": (3, 13), "mlserver": (3, 12)}
WHEELS = ("perf_analyzer", "onnx_suite", "neural_networks")


class NotInstalled(RuntimeError):
    """The message ends with the last lines of pip."""


def python_of(client: str) -> Path:
    """The interpreter of the environment of a client; its commands lie in the same folder."""
    if not can_run(client):
        raise NotInstalled(f"{client} is not for Python {sys.version_info.major}.{sys.version_info.minor}")
    folder = _made(VENV / "clients" / client, HERE / "clients" / f"{client}.txt", _make_environment)
    return folder / "bin" / "python"


def can_run(client: str) -> bool:
    """Whether that client is for this Python."""
    return sys.version_info[:2] <= CLIENTS[client]


def folder_of(wheels: str) -> Path:
    """The folder where those wheels are unpacked."""
    return _made(VENV / "wheels" / wheels, HERE / "wheels" / f"{wheels}.txt", _unpack)


def _made(folder: Path, requirements: Path, make: Callable[[Path, Path], None]) -> Path:
    stamp = folder / "requirements.sha256"
    # Another Python needs other wheels; a virtual environment even dies with the one it was made by.
    wanted = hashlib.sha256(requirements.read_bytes() + sys.version.encode()).hexdigest()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        # Two runs at a time: the second waits for what the first makes.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not stamp.exists() or stamp.read_text() != wanted:
            print(f"installing what '{folder.name}' needs (hash-checked) …", file=sys.stderr, flush=True)
            shutil.rmtree(folder, ignore_errors=True)
            make(folder, requirements)
            stamp.write_text(wanted)
    return folder


def _make_environment(folder: Path, requirements: Path) -> None:
    _run([sys.executable, "-m", "venv", str(folder)])
    _run([*_pip(folder / "bin" / "python"), "--require-hashes", "-r", str(requirements)])


def _unpack(folder: Path, requirements: Path) -> None:
    # Without dependencies, without compiling what nobody imports, and whatever Python its code would want.
    options = [
        "--require-hashes",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--no-compile",
        "--ignore-requires-python",
    ]
    _run([*_pip(Path(sys.executable)), *options, "--target", str(folder), "-r", str(requirements)])


def _pip(python: Path) -> list[str]:
    return [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as exc:
        raise NotInstalled(f"it took longer than {LIMIT_S} s: {' '.join(command)}") from exc
    if done.returncode:
        tail = "\n".join(done.stdout.strip().splitlines()[-OUTPUT_TAIL_LINES:])
        raise NotInstalled(f"{' '.join(command)} ended with status {done.returncode}:\n{tail}")


def main(names: list[str]) -> None:
    """Makes what is named, or everything."""
    for name in names or [*WHEELS, *filter(can_run, CLIENTS)]:
        try:
            if name in WHEELS:
                folder_of(name)
            elif name in CLIENTS:
                python_of(name)
            else:
                sys.exit(f"there is no {name}, but {', '.join([*WHEELS, *CLIENTS])}")
        except NotInstalled as exc:
            sys.exit(str(exc))


if __name__ == "__main__":
    main(sys.argv[1:])
