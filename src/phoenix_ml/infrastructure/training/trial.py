"""Models are tried out by a program of ours, with limits: one that hangs it, or kills it, does no other harm."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from phoenix_ml.application.ports import TrainingFailed, TrainingNotStarted, TrainingStopped
from phoenix_ml.application.trial import Description, Findings, Trial
from phoenix_ml.domain.errors import Overloaded
from phoenix_ml.domain.models import Framework
from phoenix_ml.infrastructure.training.process import run_limited

# The libraries alone take 400 MiB of addresses, the largest model that is taken by itself 2 GiB.
LEAST_MEMORY_BYTES, USUAL_MEMORY_BYTES = 2 * 1024**3, 8 * 1024**3
_LAST_WORDS = 300


class ProcessTrials:
    """Runs ``words`` with two more: the file of a trial, and the file that its findings go into."""

    def __init__(
        self,
        words: Sequence[str],
        environment: Mapping[str, str] | None = None,
        *,
        limit_s: float,
        memory_bytes: int = USUAL_MEMORY_BYTES,
    ) -> None:
        self._words = words
        self._environment = environment
        self._limit_s = limit_s
        self._memory_bytes = max(memory_bytes, LEAST_MEMORY_BYTES)

    def run(self, trial: Trial | Description, log_path: Path, keep_going: Callable[[], bool]) -> Findings:
        asked, found = trial.folder / "trial.json", trial.folder / "findings.msgpack"
        asked.write_bytes(msgspec.json.encode(trial, enc_hook=_as_text))
        words = [*self._words, str(asked), str(found)]
        # CUDA reserves addresses for all the memory that there is.
        is_on_gpu = trial.registration.framework is Framework.TENSORRT
        memory_bytes = None if is_on_gpu else self._memory_bytes
        try:
            run_limited(
                words, log_path, keep_going, self._limit_s, memory_bytes, environment=self._environment
            )
        except TrainingStopped:
            raise
        except TrainingNotStarted as exc:
            raise Overloaded(f"there is no process to run the model in, try again later: {exc}") from exc
        except TrainingFailed as exc:
            said = log_path.read_bytes()[-_LAST_WORDS:].decode(errors="replace").split("\n")
            last = next((line for line in reversed(said) if line.strip()), "")
            raise TrainingFailed(f"{exc}: {last}" if last else str(exc)) from exc
        return read_findings(found)


def read_trial(path: Path) -> Trial | Description:
    return msgspec.json.decode(path.read_bytes(), type=Trial | Description, dec_hook=_as_path)


def write_findings(path: Path, findings: Findings) -> None:
    # Some answers are no numbers, for which JSON has no word; some defaults are integers too large for msgpack.
    said = msgspec.json.encode(msgspec.structs.replace(findings, answers=[]), enc_hook=_as_text)
    path.write_bytes(msgspec.msgpack.encode((said, findings.answers)))


def read_findings(path: Path) -> Findings:
    said, answers = msgspec.msgpack.decode(path.read_bytes(), type=tuple[bytes, list[Any]])
    findings = msgspec.json.decode(said, type=Findings, dec_hook=_as_path)
    return msgspec.structs.replace(findings, answers=answers)


def _as_text(path: Any) -> str:
    return str(path)


def _as_path(_kind: type, text: str) -> Path:
    return Path(text)
