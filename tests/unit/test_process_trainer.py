"""A command of the user's trains: within its limits, with its output kept, and gone with all that it started."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from servers import _children_of, has_ended, wait_until

from phoenix_ml.application.ports import TrainingFailed, TrainingNotStarted
from phoenix_ml.domain.errors import Misconfigured
from phoenix_ml.infrastructure.training.process import LOG_LIMIT_BYTES, ProcessTrainer

GIB = 1024**3


def run(
    folder: Path,
    program: str,
    *,
    limit_s: float = 30.0,
    memory_bytes: int | None = None,
    keep_going: Callable[[], bool] = lambda: True,
) -> str:
    """Trains with a Python program; what it wrote."""
    script = folder / "train.py"
    script.write_text(program)
    (folder / "out").mkdir(exist_ok=True)
    command = f"{sys.executable} {script} --data {{export}} --out {{out}} --name {{model}}={{version}}"
    trainer = ProcessTrainer(command, limit_s=limit_s, memory_bytes=memory_bytes)
    fields = {"export": "x.parquet", "out": str(folder / "out"), "model": "risk", "version": "1.1.0"}
    trainer.train(fields, folder / "log", keep_going)
    return (folder / "log").read_text()


def test_a_command_gets_what_it_needs_and_its_output_is_kept(tmp_path: Path) -> None:
    """A name with a space stays one word: no shell is involved."""
    program = "import os, sys; print(sys.argv[1:]); print(os.getcwd()); open('model.onnx', 'w').close()"
    folder = tmp_path / "a folder"
    folder.mkdir()
    script = folder / "train.py"
    script.write_text(program)
    (folder / "out").mkdir()
    trainer = ProcessTrainer(
        f"{sys.executable} '{script}' {{export}} {{model}}", limit_s=30, memory_bytes=None
    )

    fields = {"export": "a b", "out": str(folder / "out"), "model": "risk", "version": "1"}
    trainer.train(fields, folder / "log", lambda: True)

    assert (folder / "log").read_text() == f"['a b', 'risk']\n{folder / 'out'}\n"
    assert (folder / "out" / "model.onnx").exists()


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("raise SystemExit(3)", "exit code 3"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "signal SIGSEGV"),
    ],
)
def test_a_command_that_fails_says_how(tmp_path: Path, program: str, words: str) -> None:
    """The end of a job is for a person to read."""
    with pytest.raises(TrainingFailed, match=words):
        run(tmp_path, program)


def test_a_command_that_takes_too_long_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    """A worker that is left behind would train for ever."""
    program = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "open('child', 'w').write(str(child.pid)); time.sleep(600)\n"
    )
    with pytest.raises(TrainingFailed, match="longer than the 6 s"):
        run(tmp_path, program, limit_s=6)

    child = int((tmp_path / "out" / "child").read_text())
    wait_until(lambda: has_ended(child), 30, "the child has ended")


def test_a_command_that_takes_too_much_memory_fails_by_itself(tmp_path: Path) -> None:
    """The server beside it must not be what the kernel ends."""
    with pytest.raises(TrainingFailed, match="exit code 1"):
        run(tmp_path, "x = bytearray(2 * 1024**3)", memory_bytes=GIB)

    assert "MemoryError" in (tmp_path / "log").read_text()


def test_a_command_is_ended_when_it_is_wanted_no_more(tmp_path: Path) -> None:
    """A stop does not wait for a training, and a job that is somebody else's is left to them."""
    asked = iter([True, True, False])
    with pytest.raises(TrainingFailed, match="the healer stops"):
        run(tmp_path, "import time; time.sleep(600)", keep_going=lambda: next(asked))


def test_output_beyond_all_measure_ends_the_command(tmp_path: Path) -> None:
    """A disk that is full would stop the journals."""
    with pytest.raises(TrainingFailed, match="output"):
        run(tmp_path, "while True: print('x' * 100_000, flush=True)")

    assert (tmp_path / "log").stat().st_size <= LOG_LIMIT_BYTES


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("open('large', 'wb').truncate(3 * 1024**3)", "exit code 1"),
        ("[open(name, 'wb').truncate(1500 * 1024**2) for name in 'ab']", "left more than 2147483648 bytes"),
        (
            "import os, time; os.mkdir('deep'); [open(f'deep/{name}', 'wb').truncate(1500 * 1024**2) for name in 'ab']; "
            "time.sleep(600)",
            "left more than 2147483648 bytes",
        ),
    ],
)
def test_files_beyond_all_measure_end_the_command(tmp_path: Path, program: str, words: str) -> None:
    """What it leaves is on the same disk as the journals. (The files have holes, and take no space here.)"""
    with pytest.raises(TrainingFailed, match=words):
        run(tmp_path, program)


def test_a_command_is_what_the_kernel_ends_where_memory_runs_out(tmp_path: Path) -> None:
    """By itself it may choose the process that writes the log."""
    looks = "import time\nwhile open('/proc/self/oom_score_adj').read() != '1000\\n': time.sleep(0.01)\n"

    assert run(tmp_path, looks) == ""


def test_a_command_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    """Most often it is a path that is true on another machine."""
    trainer = ProcessTrainer("/no/such/trainer {export}", limit_s=5, memory_bytes=None)
    with pytest.raises(TrainingNotStarted, match="/no/such/trainer cannot be started: No such file"):
        trainer.train(
            {"export": "", "out": str(tmp_path), "model": "", "version": ""}, tmp_path / "log", lambda: True
        )


def test_a_limit_that_the_healer_has_itself_is_the_commands_too(tmp_path: Path) -> None:
    """A service manager, or ulimit, has set it for good: to raise it failed every training, and every upload."""
    kinds = "(resource.RLIMIT_AS, resource.RLIMIT_FSIZE)"
    program = f"import resource; print([resource.getrlimit(kind) for kind in {kinds}])"
    before = f"import resource\nfor kind in {kinds}: resource.setrlimit(kind, ({GIB}, {GIB}))\n"

    with healer(tmp_path, program, before=before, memory_bytes=2 * GIB) as process:
        assert process.wait(60) == 0

    assert (tmp_path / "log").read_text() == f"[({GIB}, {GIB}), ({GIB}, {GIB})]\n"


def test_a_command_that_cannot_be_limited_is_not_started(tmp_path: Path) -> None:
    """What goes wrong between fork and exec is no OSError."""
    with pytest.raises(TrainingNotStarted, match="cannot be started"):
        run(tmp_path, "", memory_bytes=2**70)


@pytest.mark.parametrize("command", ["", "python {data}", "python 'x", "python {}", "python {0}"])
def test_a_command_that_cannot_be_filled_in_is_refused_at_the_start(command: str) -> None:
    """Not in the night when it is needed."""
    with pytest.raises(Misconfigured, match="PHOENIX_TRAINER"):
        ProcessTrainer(command, limit_s=5, memory_bytes=None)


@contextmanager
def healer(
    folder: Path, program: str, *, before: str = "", memory_bytes: int | None = None
) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that trains with the program, and runs other code ``before``."""
    (folder / "out").mkdir()
    (folder / "train.py").write_text(program)
    command = f"{sys.executable} {folder / 'train.py'}"
    heals = (
        f"{before}"
        "from pathlib import Path\n"
        "from phoenix_ml.infrastructure.training.process import ProcessTrainer\n"
        f"trainer = ProcessTrainer({command!r}, limit_s=600, memory_bytes={memory_bytes})\n"
        f"fields = {{'export': '', 'out': {str(folder / 'out')!r}, 'model': '', 'version': ''}}\n"
        f"trainer.train(fields, Path({str(folder / 'log')!r}), lambda: True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", heals]) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_trainer_dies_with_its_healer(tmp_path: Path) -> None:
    """Else a healer that was killed would leave a training that nobody knows of, and the next one starts another."""
    with healer(tmp_path, "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(600)"):
        trainer = await_pid(tmp_path / "out" / "pid")

    wait_until(lambda: has_ended(trainer), 30, "the trainer has ended")


def test_what_a_trainer_has_started_dies_with_the_healer_too(tmp_path: Path) -> None:
    """The program that trains is often a child of the command: ``uv run train.py``, ``make train``."""
    inner = "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(600)"
    with healer(
        tmp_path, f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    ) as process:
        child = await_pid(tmp_path / "out" / "pid")
        wait_until(
            lambda: len(_children_of(process.pid)) == 2,
            30,
            "who ends the command's children is there beside the command",
        )

    wait_until(lambda: has_ended(child), 30, "the child has ended")


def await_pid(written: Path) -> int:
    wait_until(lambda: written.exists() and bool(written.read_text()), 60, f"a process is in {written}")
    return int(written.read_text())
