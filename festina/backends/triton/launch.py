"""How kernels are started."""

from __future__ import annotations

from typing import Any

import torch
import triton

Kernel = Any
"""A function under `triton.jit`."""


def block(width: int) -> int:
    """The tile that a row of `width` values takes: a power of two, and what `tl.dot` asks for at least."""
    return max(16, int(triton.next_power_of_2(width)))


def rows_per_program(tile: int, values: int = 512) -> int:
    """How many rows, each a `tile` wide, make about `values`."""
    return max(1, values // tile)


WARP = 64 if torch.version.hip else 32
"""Threads of a warp."""


def launch(kernel: Kernel, programs: int, values: int, /, **arguments: object) -> None:
    """Start `programs` programs on the current stream, each with threads enough for a tile of `values`: four a thread.

    More than 8 warps would leave each thread fewer registers than a backward step has numbers.
    """
    warps = min(8, max(1, values // (4 * WARP)))
    kernel[(programs,)](**arguments, num_warps=warps, num_stages=1, enable_fp_fusion=True)


def programs(rows: int, rows_of_one: int) -> int:
    """How many it takes."""
    return -(-rows // rows_of_one)
