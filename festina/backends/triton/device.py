"""What the host must know of a GPU before it chooses how to run."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch


class Device(NamedTuple):
    """A GPU.

    Args:
        backend: "cuda" or "hip".
        capability: of CUDA, 90 for sm_90; 0 on ROCm.
        processors: streaming multiprocessors, or compute units.
        shared_bytes: the most shared memory that one program may have.
    """

    backend: str
    capability: int
    processors: int
    shared_bytes: int


INTERPRETER = Device("cuda", 90, 132, 227 << 10)
"""What the interpreter stands for: an H100."""


@cache
def _found(index: int) -> Device:
    properties: Any = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return Device("hip", 0, properties.multi_processor_count, 64 << 10)
    capability = 10 * properties.major + properties.minor
    return Device("cuda", capability, properties.multi_processor_count, properties.shared_memory_per_block_optin)


def index_of(device: torch.device) -> int | None:
    """The CUDA index of a device; None if it is no GPU, or is not there."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return torch.cuda.current_device() if device.index is None else device.index


def device_of(device: torch.device) -> Device:
    """The GPU that a device is; the interpreter's, if it is none or is not there."""
    index = index_of(device)
    return INTERPRETER if index is None else _found(index)
