"""Peak memory of a piece of work, beyond what was held before it."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path

import torch

from festina import backends

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_bytes(work: Callable[[], object], device: torch.device) -> int | None:
    """Do the work and return its peak in bytes; None if the system does not report it: for the CPU only Linux does."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        allocated = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - allocated
    before = _start_peak() if device.type == "cpu" else None
    work()
    return None if before is None else max(0, _resident("VmHWM") - before)


def _start_peak() -> int | None:
    """Reset the kernel's high-water mark to the resident memory, and return that in bytes."""
    try:
        # Work that reuses idle memory would not raise the mark, so release that memory now. A backend that keeps buffers
        # frees them in `release_memory`, glibc in malloc_trim.
        for name in backends.names():
            getattr(backends.get(name), "release_memory", bool)()
        ctypes.CDLL(None).malloc_trim(0)
        _RESET.write_text("5")
        return _resident("VmRSS")
    except (OSError, AttributeError):
        return None


def _resident(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"{_STATUS} has no {field}")
    return int(found[1]) * 1024
