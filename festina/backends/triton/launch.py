"""How kernels are started."""

from __future__ import annotations

from typing import Any

import triton

Kernel = Any
"""A function under `triton.jit`."""


def block(width: int) -> int:
    """The tile that a row of `width` values takes: a power of two, and what `tl.dot` asks for at least."""
    return max(16, int(triton.next_power_of_2(width)))


def rows_per_program(tile: int, values: int = 512) -> int:
    """How many rows, each a `tile` wide, make about `values`."""
    return max(1, values // tile)


def launch(kernel: Kernel, programs: int, values: int, /, **arguments: object) -> None:
    """Start `programs` programs, each with a few threads for the `values` of a tile: four a thread, if they can be had."""
    warps = min(16, max(1, values // 128))
    kernel[(programs,)](**arguments, num_warps=warps, num_stages=1, enable_fp_fusion=True)


def programs(rows: int, rows_of_one: int) -> int:
    """How many it takes."""
    return -(-rows // rows_of_one)
