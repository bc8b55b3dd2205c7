# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment"
"""Tiles: the rows and columns that a program works on, and moving them between memory and registers.

Values of a row that come gate by gate, such as pre-activations, are a tuple with one tile `[BM, BLOCK]` per gate.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Tile(NamedTuple):
    """The rows and columns of one program, `[BM, BLOCK]`; both are powers of two, so some may lie outside the tensors.

    A row stands at a different place in each kind of tensor, hence three indices.
    """

    row: Any  # int64 [BM]: in tensors over the rows of one step, such as the states
    packed_row: Any  # int64 [BM]: in tensors over all packed steps
    chunk_row: Any  # int64 [BM]: in tensors over the packed steps of a chunk
    col: Any  # [BLOCK]
    is_row: Any  # [BM]: the row exists
    mask: Any  # [BM, BLOCK]: row and column exist


@triton.jit
def place(block, col, rows, packed_start, chunk_start, width: tl.constexpr, BM: tl.constexpr):
    """Block `block` of a step of `rows` rows, and columns `col`; the two starts say where the step's first row stands."""
    row = tl.cast(block, tl.int64) * BM + tl.arange(0, BM)
    is_row = row < rows
    packed_row, chunk_row = tl.cast(packed_start, tl.int64) + row, tl.cast(chunk_start, tl.int64) + row
    return Tile(row, packed_row, chunk_row, col, is_row, is_row[:, None] & (col < width)[None, :])


@triton.jit
def moved(tile, packed_row, chunk_row):
    """The same rows at another step."""
    return Tile(tile.row, packed_row, chunk_row, tile.col, tile.is_row, tile.mask)


@triton.jit
def load_row(ptr, col, width: tl.constexpr, gates: tl.constexpr):
    """A parameter `[gates · width]` as a tuple of float32 rows `[1, BLOCK]`."""
    row = ()
    for g in tl.static_range(gates):
        row += (tl.load(ptr + g * width + col, mask=col < width, other=0.0).to(tl.float32)[None, :],)
    return row


@triton.jit
def load_tiles(ptr, row, tile, width: tl.constexpr, gates: tl.constexpr):
    """Rows `row` of a `[..., gates · width]` tensor as a tuple of float32 tiles."""
    tiles = ()
    offset = row[:, None] * (gates * width) + tile.col[None, :]
    for g in tl.static_range(gates):
        tiles += (tl.load(ptr + offset + g * width, mask=tile.mask, other=0.0).to(tl.float32),)
    return tiles


@triton.jit
def load_tile(ptr, row, tile, width: tl.constexpr):
    """Rows `row` of a `[..., width]` tensor as one float32 tile."""
    return load_tiles(ptr, row, tile, width, 1)[0]


@triton.jit
def store_tiles(ptr, tiles, row, tile, width: tl.constexpr, gates: tl.constexpr):
    """Inverse of `load_tiles`, in the dtype of the tensor."""
    offset = row[:, None] * (gates * width) + tile.col[None, :]
    for g in tl.static_range(gates):
        tl.store(ptr + offset + g * width, tiles[g].to(ptr.dtype.element_ty), mask=tile.mask)


@triton.jit
def store_tile(ptr, values, row, tile, width: tl.constexpr):
    """Inverse of `load_tile`."""
    store_tiles(ptr, (values,), row, tile, width, 1)
