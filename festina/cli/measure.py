"""Speed measurement: contestants take turns in one process and are compared pair by pair.

Machines drift: another program starts, a clock frequency changes. That affects two adjacent timings alike, so their ratio
is robust; a ratio of two medians taken minutes apart is not.
"""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

Work = Callable[[], object]


@dataclass(frozen=True)
class Spread:
    """Median, 20th and 80th percentile."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, values: np.ndarray) -> Spread:
        """The spread of `values`."""
        p20, median, p80 = np.percentile(values, (20, 50, 80))
        return cls(float(median), float(p20), float(p80))


@dataclass(frozen=True)
class Race:
    """The result of `race`.

    Args:
        time_us: microseconds per call, by contestant.
        ratio: the first contestant's time divided by each other's, round by round.
        rounds: number of rounds.
    """

    time_us: dict[str, Spread]
    ratio: dict[str, Spread]
    rounds: int


def race(contestants: Mapping[str, Work], seconds: float, device: str = "cpu", rounds: int = 7) -> Race:
    """Let the contestants take turns for `seconds`, at least `rounds` times; each turn lasts 2 ms or one call.

    The order rotates by one every round, so that no contestant always follows the same one.
    """
    names = list(contestants)
    repeats = {}
    for name, work in contestants.items():
        for _ in range(3):
            once = _time(work, 1, device)
        repeats[name] = max(1, int(2e-3 / once))
    times: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    done = 0
    while done < rounds or time.perf_counter() < end:
        for name in names[done % len(names) :] + names[: done % len(names)]:
            times[name].append(_time(contestants[name], repeats[name], device))
        done += 1
    by_name = {name: np.array(values) * 1e6 for name, values in times.items()}
    first = by_name[names[0]]
    return Race(
        {name: Spread.of(values) for name, values in by_name.items()},
        {name: Spread.of(first / by_name[name]) for name in names[1:]},
        done,
    )


def _time(work: Work, repeats: int, device: str) -> float:
    """Seconds per call."""
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            work()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3 / repeats
    begin = time.perf_counter()
    for _ in range(repeats):
        work()
    return (time.perf_counter() - begin) / repeats


def gemm_peak(dtype: torch.dtype, device: str) -> float:
    """GFLOP/s of torch's own matrix product, best of 7: the peak that percentages refer to."""
    size = 8192 if device == "cuda" else 1024
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    out = torch.empty_like(a)
    torch.mm(a, b, out=out)
    return 2e-9 * size**3 / min(_time(lambda: torch.mm(a, b, out=out), 3, device) for _ in range(7))


def machine(device: str) -> str:
    """The machine in words."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    facts = dict.fromkeys(("model name", "cpu family", "model"), "")
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in facts:
                facts[key.strip()] = value.strip()
    cpu = facts["model name"] or platform.processor() or platform.machine()
    if facts["cpu family"]:
        cpu += f" (family {facts['cpu family']}, model {facts['model']})"
    return f"{cpu}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


def commit() -> str:
    """The commit of the checkout that holds the package, marked if files differ from it; "" outside of a checkout."""
    answer = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=10"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return answer.stdout.strip()
