"""How many cores there are for this process: those of its affinity mask, or fewer if its control group has a quota."""

from __future__ import annotations

import os
from functools import cache
from math import ceil, inf
from pathlib import Path

GROUPS, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def usable_cores() -> int:
    """Cores that this process may keep busy at once; at least 1.

    A container's limit (`docker run --cpus`, `limits.cpu` of Kubernetes) is a quota of time, which neither `os.cpu_count` nor
    the affinity mask shows.
    """
    mask = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(mask, ceil(min(quota(), mask))))


@cache
def quota() -> float:
    """Cores' worth of time that the process's control group may take, or one that holds it; infinite without a limit."""
    try:
        lines = OWN.read_text().splitlines()
    except OSError:  # no Linux, or no /proc
        return inf
    least = inf
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            root, names = GROUPS, ["cpu.max"]
        elif "cpu" in controllers.split(","):
            root, names = GROUPS / "cpu", ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        else:
            continue
        group = root / path.lstrip("/")
        # A container may see the path of its host, of which only the root is mounted there.
        for folder in (group, *group.parents):
            if root in (folder, *folder.parents):
                least = min(least, _limit(folder, names))
    return least


def _limit(folder: Path, names: list[str]) -> float:
    try:
        words = " ".join((folder / name).read_text() for name in names).split()
        time, period = map(int, words)
    except (OSError, ValueError):  # no such group, or `max`
        return inf
    return time / period if time > 0 and period > 0 else inf  # -1 is no limit
