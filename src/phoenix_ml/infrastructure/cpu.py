"""How many processors this process may really use."""

import contextlib
import os
from math import ceil
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def cpu_limit(cgroup: Path = _CGROUP) -> int:
    """Whole processors, at least one: the affinity mask, cut to the container's quota if it has one.

    ``os.cpu_count()`` tells the machine's processors; a thread pool of that size in a container with a
    quota of two is throttled for most of every period.
    """
    limits = [float(len(os.sched_getaffinity(0)))]
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
        if quota != "max":
            limits.append(int(quota) / int(period))
    except (OSError, ValueError):
        # The older layout of control groups; where neither can be read, the affinity mask is all we know.
        with contextlib.suppress(OSError, ValueError):
            quota_us = int((cgroup / "cpu/cpu.cfs_quota_us").read_text())
            if quota_us > 0:
                limits.append(quota_us / int((cgroup / "cpu/cpu.cfs_period_us").read_text()))
    return max(1, ceil(min(limits)))
