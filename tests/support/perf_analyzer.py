"""NVIDIA's perf_analyzer, the load generator of Triton: it speaks the V2 protocol, REST and gRPC (Linux, x86-64)."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

from environments import folder_of

# Debian's libb64-0d; nothing on PyPI carries it.
LIBB64 = "libb64.so.0d"


class PerfAnalyzerUnavailable(RuntimeError):
    """It cannot run here; the message says what is missing."""


@dataclass(frozen=True)
class PerfAnalyzer:
    """A program that runs, given that environment."""

    program: Path
    library_path: str

    @property
    def environment(self) -> dict[str, str]:
        """This process's environment, with the libraries that the program is linked against."""
        return {**os.environ, "LD_LIBRARY_PATH": self.library_path}


def perf_analyzer() -> PerfAnalyzer:
    """Where it is; its wheels are fetched where they are not there yet."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise PerfAnalyzerUnavailable("NVIDIA publishes perf_analyzer for Linux on x86-64 only")
    # Looked for rather than loaded: ctypes would keep it in this process.
    folders = [
        Path("/usr/lib/x86_64-linux-gnu"),
        Path("/usr/lib64"),
        Path("/usr/lib"),
        Path("/usr/local/lib"),
    ]
    if not any((folder / LIBB64).exists() for folder in folders):
        raise PerfAnalyzerUnavailable(
            f"perf_analyzer needs {LIBB64}: run tests/support/install_servers.sh, or install the Debian package libb64-0d"
        )
    folder = folder_of("perf_analyzer")
    libraries = [str(folder / "nvidia" / "cuda_runtime" / "lib")]
    libraries += filter(None, [os.environ.get("LD_LIBRARY_PATH")])
    return PerfAnalyzer(folder / "bin" / "perf_analyzer", ":".join(libraries))
