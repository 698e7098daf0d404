"""A trainer that is a command of the user's: run with limits, its output kept, and gone when its healer is."""

import contextlib
import ctypes
import os
import resource
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from phoenix_ml.application.ports import TrainingFailed, TrainingNotStarted, TrainingStopped
from phoenix_ml.domain.errors import Misconfigured

_LOOK_EVERY_S = 0.2
_TERM_PATIENCE_S = 10.0
_PR_SET_PDEATHSIG = 1
# Loaded here: between fork and exec, beside other threads, nothing may be imported.
_LIBC = ctypes.CDLL(None)
LOG_LIMIT_BYTES = 16 * 1024 * 1024
# Of each file that it writes, and of all that it leaves.
OUT_LIMIT_BYTES = 2 * 1024 * 1024 * 1024
FIELDS = ("export", "out", "model", "version")


class ProcessTrainer:
    """Runs ``COMMAND`` with ``{export}``, ``{out}``, ``{model}`` and ``{version}`` filled in.

    The command runs without a shell, in ``out``, in a process group of its own; it has ended with the group when
    ``train`` returns. What has made itself a session of its own (setsid) goes on. ``memory_bytes`` limits the address
    space of each of its processes.
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
        out = Path(fields["out"])
        run_limited(words, log_path, keep_going, self._limit_s, self._memory_bytes, cwd=out, out=out)


def run_limited(
    words: Sequence[str],
    log_path: Path,
    keep_going: Callable[[], bool],
    limit_s: float,
    memory_bytes: int | None,
    *,
    cwd: Path | None = None,
    out: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Returns when the program has ended well, with its group; what is in ``out`` is limited. Raises TrainingFailed, and
    TrainingNotStarted where it did not begin.
    """
    limits = [_lowered(resource.RLIMIT_FSIZE, OUT_LIMIT_BYTES)]
    if memory_bytes is not None:
        limits.append(_lowered(resource.RLIMIT_AS, memory_bytes))

    def limit() -> None:
        """In the new process, before the program: it ends with its healer, and takes no more than it may."""
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        for kind, most_bytes in limits:
            resource.setrlimit(kind, (most_bytes, most_bytes))

    give_up_at = time.monotonic() + limit_s
    with log_path.open("wb") as log:
        try:
            process = subprocess.Popen(  # noqa: S603 - the user's own command, from the settings, or a program of ours
                words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=cwd,
                env=environment,
                start_new_session=True,
                preexec_fn=limit,  # noqa: PLW1509 - calls the C library only
            )
        except (OSError, subprocess.SubprocessError) as exc:
            raise _not_started(words, exc) from exc
        try:
            watcher = _watch_over(process.pid)
        except OSError as exc:
            end_group(process)
            raise _not_started(words, exc) from exc
        _offer_to_the_kernel(process.pid)
        try:
            while process.poll() is None:
                if time.monotonic() > give_up_at:
                    raise TrainingFailed(f"it took longer than the {limit_s:g} s that it has")
                if not keep_going():
                    raise TrainingStopped("the healer stops")
                _check_sizes(log_path, out)
                with_patience(process, _LOOK_EVERY_S)
            _check_sizes(log_path, out)
        finally:
            end_group(process)
            watcher.kill()
            watcher.communicate()
            # Between two looks it may have written more.
            if log_path.stat().st_size > LOG_LIMIT_BYTES:
                os.truncate(log_path, LOG_LIMIT_BYTES)
    if process.returncode:
        raise TrainingFailed(_describe_end(process.returncode))


def _lowered(kind: int, most_bytes: int) -> tuple[int, int]:
    """The limit, or this process's own where that is lower: nobody may raise what he has inherited."""
    _, inherited = resource.getrlimit(kind)
    return kind, most_bytes if inherited == resource.RLIM_INFINITY else min(most_bytes, inherited)


def _not_started(words: Sequence[str], error: OSError | subprocess.SubprocessError) -> TrainingNotStarted:
    why = error.strerror if isinstance(error, OSError) else error
    return TrainingNotStarted(f"{words[0]} cannot be started: {why}")


def _check_sizes(log_path: Path, out: Path | None) -> None:
    if log_path.stat().st_size > LOG_LIMIT_BYTES:
        raise TrainingFailed(f"it has written more than {LOG_LIMIT_BYTES} bytes of output")
    if out is not None and _size_of(out) > OUT_LIMIT_BYTES:
        raise TrainingFailed(f"it has left more than {OUT_LIMIT_BYTES} bytes in {{out}}")


def _size_of(folder: Path) -> int:
    """What the files in the folder take, links not followed; what goes away meanwhile takes nothing."""
    size = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                size += Path(path, name).lstat().st_size
    return size


def _offer_to_the_kernel(pid: int) -> None:
    """Where memory runs out this process is to be ended first, not the one that writes the log."""
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/oom_score_adj").write_text("1000")


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
