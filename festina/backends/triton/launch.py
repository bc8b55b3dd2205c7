"""Starting kernels: tile sizes, the number of programs, warps."""

from __future__ import annotations

from typing import Any

import torch
import triton

Kernel = Any
"""A function under `triton.jit`."""


def block(width: int) -> int:
    """The width of a tile that holds rows of `width` values: a power of two, at least 16 as `tl.dot` requires."""
    return max(16, int(triton.next_power_of_2(width)))


def rows_per_program(tile: int, values: int = 512) -> int:
    """The number of rows, each `tile` wide, that make about `values` values; at least 1."""
    return max(1, values // tile)


WARP = 64 if torch.version.hip else 32
"""Threads of a warp."""


def launch(kernel: Kernel, programs: int, values: int, /, **arguments: object) -> None:
    """Start `programs` programs on the current stream, with threads for a tile of `values` values, four to a thread.

    At most 8 warps: more would leave each thread fewer registers than a backward step has numbers.
    """
    warps = min(8, max(1, values // (4 * WARP)))
    kernel[(programs,)](**arguments, num_warps=warps, num_stages=1, enable_fp_fusion=True)


def programs(rows: int, program_rows: int) -> int:
    """Programs needed for `rows` rows, `program_rows` rows each."""
    return -(-rows // program_rows)
