"""A trainer that is a command of the user's: run with limits, its output kept, and gone when its healer is."""

import ctypes
import os
import resource
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from phoenix_ml.application.ports import TrainingFailed, TrainingStopped
from phoenix_ml.domain.errors import Misconfigured

_LOOK_EVERY_S = 0.2
_TERM_PATIENCE_S = 10.0
_PR_SET_PDEATHSIG = 1
# Loaded here: between fork and exec, beside other threads, nothing may be imported.
_LIBC = ctypes.CDLL(None)
LOG_LIMIT_BYTES = 16 * 1024 * 1024
FIELDS = ("export", "out", "model", "version")


class ProcessTrainer:
    """Runs ``COMMAND`` with ``{export}``, ``{out}``, ``{model}`` and ``{version}`` filled in.

    The command runs without a shell, in ``out``, in a process group of its own; it has ended with the group when
    ``train`` returns. ``memory_bytes`` limits the address space of each of its processes.
    """

    def __init__(self, command: str, *, limit_s: float, memory_bytes: int | None) -> None:
        try:
            self._words = shlex.split(command)
            for word in self._words:
                word.format_map(dict.fromkeys(FIELDS, ""))
        except (ValueError, KeyError, IndexError) as exc:
            raise Misconfigured(
                f"PHOENIX_TRAINER: {command!r} is no command: write process:COMMAND with "
                f"{', '.join('{' + name + '}' for name in FIELDS)} where they are wanted ({exc})",
                setting="PHOENIX_TRAINER",
            ) from exc
        if not self._words:
            raise Misconfigured("PHOENIX_TRAINER: process: has no command", setting="PHOENIX_TRAINER")
        self._limit_s = limit_s
        self._memory_bytes = memory_bytes

    def train(self, fields: Mapping[str, str], log_path: Path, keep_going: Callable[[], bool]) -> None:
        """Returns when the command has ended well. Raises TrainingFailed.

        ``keep_going`` is asked a few times a second; the command is ended when it says no.
        """
        words = [word.format_map(fields) for word in self._words]
        give_up_at = time.monotonic() + self._limit_s
        with log_path.open("wb") as log:
            try:
                process = subprocess.Popen(  # noqa: S603 - the user's own command, from the settings
                    words,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd=fields["out"],
                    start_new_session=True,
                    preexec_fn=self._limit,  # noqa: PLW1509 - calls the C library only
                )
            except OSError as exc:
                raise TrainingFailed(f"{words[0]} cannot be started: {exc.strerror}") from exc
            watcher = _watch_over(process.pid)
            try:
                while process.poll() is None:
                    if time.monotonic() > give_up_at:
                        raise TrainingFailed(f"it took longer than the {self._limit_s:g} s that it has")
                    if not keep_going():
                        raise TrainingStopped("the healer stops")
                    if log_path.stat().st_size > LOG_LIMIT_BYTES:
                        raise TrainingFailed(f"it has written more than {LOG_LIMIT_BYTES} bytes of output")
                    with_patience(process, _LOOK_EVERY_S)
            finally:
                end_group(process)
                watcher.kill()
                watcher.communicate()
        if process.returncode:
            raise TrainingFailed(_describe_end(process.returncode))

    def _limit(self) -> None:
        """In the new process, before the command: it ends with its healer, and takes no more memory than it may."""
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if self._memory_bytes is not None:
            resource.setrlimit(resource.RLIMIT_AS, (self._memory_bytes, self._memory_bytes))


def _watch_over(group: int) -> "subprocess.Popen[bytes]":
    """A process that kills the group when this one is gone: the death signal reaches the command alone, not what
    it has started.
    """
    return subprocess.Popen(  # noqa: S603 - a program of our own, and a number
        ["/bin/sh", "-c", 'read -r _; kill -s KILL -- "-$1"', "sh", str(group)],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )


def with_patience(process: "subprocess.Popen[bytes]", seconds: float) -> None:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return


def end_group(process: "subprocess.Popen[bytes]") -> None:
    """The process and all that it has started are gone when it returns."""
    for number, patience_s in ((signal.SIGTERM, _TERM_PATIENCE_S), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        if number is signal.SIGTERM and process.poll() is None:
            with_patience(process, patience_s or 0)
    process.wait()


def _describe_end(code: int) -> str:
    if code < 0:
        return f"it was ended by signal {signal.Signals(-code).name}"
    return f"it ended with exit code {code}"
