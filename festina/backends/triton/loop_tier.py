# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment"
"""The loop tier: a program takes a block of rows through all steps in one launch, with their states in registers.

The recurrent product is computed inside, so H and P are small; a diagonal cell has no such product and may have any
width. `packed_start` is the first step's first row among all packed steps, `chunk_start` that in the chunk; each step
moves both by `stride` rows, a negative number if steps are taken from the last to the first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from festina.backends.triton.launch import block, launch, programs, rows_per_program
from festina.backends.triton.step import Chunk, chunk_step, chunk_step_backward, load_flags, zoneout, zoneout_backward
from festina.backends.triton.tile import load_row, load_tile, moved, place, store_tile

if TYPE_CHECKING:
    from festina.backends.triton.direction import Direction, Gradients, Run, States


@triton.jit
def load_matrix(ptr, row, col, rows: tl.constexpr, cols: tl.constexpr, stride: tl.constexpr):
    """`[rows, cols]` of a matrix whose rows are `stride` apart, 0 outside."""
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    return tl.load(ptr + row[:, None] * stride + col[None, :], mask=inside, other=0.0)


@triton.jit
def dot(a, b, precision: tl.constexpr):
    """a · b with a cast to the dtype of b, a weight."""
    return tl.dot(a.to(b.dtype), b, input_precision=precision)


@triton.jit
def recurrent_product(h, hh, col, col_p, plan: tl.constexpr, precision: tl.constexpr):
    """W_hh · h, one tile per gate; `hh` is the transposed W_hh `[P, G·H]`, or the diagonal."""
    if plan.is_diagonal:
        return (h * load_row(hh, col, plan.H, 1)[0],)
    else:
        G: tl.constexpr = plan.G
        p = ()
        for g in tl.static_range(G):
            p += (dot(h, load_matrix(hh + g * plan.H, col_p, col, plan.P, plan.H, G * plan.H), precision),)
        return p


@triton.jit
def recurrent_product_backward(d_p, w, col, col_p, plan: tl.constexpr, precision: tl.constexpr):
    """The gradient of h."""
    if plan.is_diagonal:
        return d_p[0] * load_row(w.hh, col, plan.H, 1)[0]
    else:
        G: tl.constexpr = plan.G
        d_h = dot(d_p[0], load_matrix(w.hh, col, col_p, plan.H, plan.P, plan.P), precision)
        for g in tl.static_range(1, G):
            block = load_matrix(w.hh + g * plan.H * plan.P, col, col_p, plan.H, plan.P, plan.P)
            d_h += dot(d_p[g], block, precision)
        return d_h


@triton.jit(do_not_specialize=["packed_start", "chunk_start", "stride", "steps", "rows"])
def loop_forward(
    X, HH_T, HR_T, S_H, S_C, OUT, C, w, around, packed_start, chunk_start, stride, steps, rows,
    plan: tl.constexpr, precision: tl.constexpr, out_width: tl.constexpr,
    BM: tl.constexpr, BH: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """`steps` steps of `rows` rows; HH_T and HR_T are the transposed weights of both products. The states S_H and S_C are
    overwritten; C, unless None, is c of all steps."""
    first = place(rows, packed_start, chunk_start, plan.H, BM, BH)
    first_p = place(rows, packed_start, chunk_start, plan.P, BM, BP)
    packed_row, chunk_row = first.packed_row, first.chunk_row
    h = load_tile(S_H, first_p.row, first_p, plan.P)
    c = None
    if plan.has_c:
        c = load_tile(S_C, first.row, first, plan.H)
    for _ in range(steps):
        tile, tile_p = moved(first, packed_row, chunk_row), moved(first_p, packed_row, chunk_row)
        is_reset = load_flags(around.resets, tile)
        h = tl.where(is_reset, 0.0, h)
        if plan.has_c:
            c = tl.where(is_reset, 0.0, c)
        p = recurrent_product(h, HH_T, tile.col, tile_p.col, plan, precision)
        new_h, new_c = chunk_step(X, C, p, h, c, w, around, tile, plan)
        if plan.has_c:
            c = new_c
        if plan.is_projected:
            new_h = dot(new_h, load_matrix(HR_T, tile.col, tile_p.col, plan.H, plan.P, plan.P), precision)
        h = zoneout(h, new_h, around.keep_h, around.rate_h, tile_p, plan.P)
        h = h.to(OUT.dtype.element_ty).to(tl.float32)  # backward starts from what the output holds
        store_tile(OUT, h, packed_row, tile_p, out_width)
        packed_row += stride
        chunk_row += stride
    store_tile(S_H, h, first_p.row, first_p, plan.P)
    if plan.has_c:
        store_tile(S_C, c, first.row, first, plan.H)


@triton.jit(do_not_specialize=["packed_start", "chunk_start", "stride", "steps", "rows"])
def loop_backward(
    chunk, D_OUT, D_H, D_C, w, around, packed_start, chunk_start, stride, steps, rows,
    plan: tl.constexpr, precision: tl.constexpr, out_width: tl.constexpr,
    BM: tl.constexpr, BH: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Backward of `loop_forward`, from the last step; D_H and D_C, the gradients of the states, are overwritten."""
    first = place(rows, packed_start, chunk_start, plan.H, BM, BH)
    first_p = place(rows, packed_start, chunk_start, plan.P, BM, BP)
    packed_row, chunk_row = first.packed_row, first.chunk_row
    d_h = load_tile(D_H, first_p.row, first_p, plan.P)
    d_c = None
    if plan.has_c:
        d_c = load_tile(D_C, first.row, first, plan.H)
    for _ in range(steps):
        tile, tile_p = moved(first, packed_row, chunk_row), moved(first_p, packed_row, chunk_row)
        is_reset = load_flags(around.resets, tile)
        if D_OUT is not None:
            d_h += load_tile(D_OUT, packed_row, tile_p, out_width)
        d_kept, d_new = zoneout_backward(d_h, around.keep_h, around.rate_h, tile_p, plan.P)
        if plan.is_projected:
            store_tile(chunk.d_projected, d_new, chunk_row, tile_p, plan.P)
            d_new = dot(d_new, load_matrix(w.hr, tile_p.col, tile.col, plan.P, plan.H, plan.H), precision)
        d_p, d_old = chunk_step_backward(chunk, d_new, d_c, w, around, is_reset, tile, plan)
        d_h = tl.where(is_reset, 0.0, d_kept)
        d_h += recurrent_product_backward(d_p, w, tile.col, tile_p.col, plan, precision)
        if plan.has_c:
            d_c = d_old
        else:
            d_h += d_old
        packed_row += stride
        chunk_row += stride
    store_tile(D_H, d_h, first_p.row, first_p, plan.P)
    if plan.has_c:
        store_tile(D_C, d_c, first.row, first, plan.H)


def precision() -> str:
    """How float32 products are computed: as torch computes its own."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def program_rows(direction: Direction) -> int:
    """Rows of one program: those of a tensor core's tile, or without a product, few enough for a wide launch."""
    return rows_per_program(block(direction.H)) if direction.plan.is_diagonal else 16


def forward(direction: Direction, run: Run, x: Tensor, chunk_origin: int, states: States) -> None:
    """The steps of a run. `x` is the chunk's input product; the chunk begins at packed row `chunk_origin`."""
    packed_start, stride = direction.start_and_stride(run)
    BM, BH, BP = program_rows(direction), block(direction.H), block(direction.P)
    launch(
        loop_forward, programs(run.rows, BM), BM * BH,
        X=x, HH_T=direction.transposed("weight_hh"), HR_T=direction.transposed("weight_hr"), S_H=states.h, S_C=states.c,
        OUT=states.output, C=states.every_c, w=direction.weights, around=direction.around, packed_start=packed_start,
        chunk_start=packed_start - chunk_origin, stride=stride, steps=run.steps, rows=run.rows,
        plan=direction.plan, precision=precision(), out_width=states.out_width, BM=BM, BH=BH, BP=BP,
    )  # fmt: skip


def backward(direction: Direction, run: Run, chunk: Chunk, chunk_origin: int, gradients: Gradients) -> None:
    """Backward of the steps of a run. The chunk begins at packed row `chunk_origin`."""
    packed_start, stride = direction.start_and_stride(run, backward=True)
    BM, BH, BP = program_rows(direction), block(direction.H), block(direction.P)
    launch(
        loop_backward, programs(run.rows, BM), BM * BH,
        chunk=chunk, D_OUT=gradients.output, D_H=gradients.h, D_C=gradients.c, w=direction.weights,
        around=direction.around, packed_start=packed_start, chunk_start=packed_start - chunk_origin, stride=stride,
        steps=run.steps, rows=run.rows, plan=direction.plan, precision=precision(), out_width=gradients.out_width,
        BM=BM, BH=BH, BP=BP,
    )  # fmt: skip
