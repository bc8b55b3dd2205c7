# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment"
"""The step tier: one launch a step, beside a recurrent product by `torch.mm`. For any H.

A program has a few rows in their whole width, so it computes their statistics alone. A projection puts a second product
between the cell and Zoneout, and so splits the launch in two.

`packed_start` is the step's first row among all packed steps, `chunk_start` that in the chunk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from festina.backends.triton.launch import block, launch, programs, rows_per_program
from festina.backends.triton.step import Chunk, chunk_step, chunk_step_backward, load_flags, zoneout, zoneout_backward
from festina.backends.triton.tile import load_tile, load_tiles, place, store_tile

if TYPE_CHECKING:
    from festina.backends.triton.direction import Direction, Gradients, Run, States


@triton.jit
def finish_step(h, S_H, OUT, around, is_reset, tile, plan: tl.constexpr, out_width: tl.constexpr):
    """Zoneout on h, which is stored as state and as output."""
    old = tl.where(is_reset, 0.0, load_tile(S_H, tile.row, tile, plan.P))
    h = zoneout(old, h, around.keep_h, around.rate_h, tile, plan.P)
    store_tile(S_H, h, tile.row, tile, plan.P)
    store_tile(OUT, h, tile.packed_row, tile, out_width)


@triton.jit
def finish_step_backward(D_OUT, PENDING, D_H, around, is_reset, tile, plan: tl.constexpr, out_width: tl.constexpr):
    """Backward of `finish_step`: the gradient of the old h, as far as it comes by Zoneout, and that of the new h."""
    d = load_tile(D_H, tile.row, tile, plan.P) + load_tile(PENDING, tile.row, tile, plan.P)
    if D_OUT is not None:
        d += load_tile(D_OUT, tile.packed_row, tile, out_width)
    d_kept, d_h = zoneout_backward(d, around.keep_h, around.rate_h, tile, plan.P)
    return tl.where(is_reset, 0.0, d_kept), d_h


@triton.jit(do_not_specialize=["packed_start", "chunk_start", "rows"])
def step_forward(
    X, PRODUCT, UNPROJECTED, S_H, S_C, OUT, C, w, around, packed_start, chunk_start, rows,
    plan: tl.constexpr, out_width: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """One step, from the recurrent product. The states S_H and S_C are overwritten; C, unless None, is c of all steps.

    With a projection h goes to UNPROJECTED, and `finish_forward` does the rest.
    """
    tile = place(rows, packed_start, chunk_start, plan.H, BM, BH)
    is_reset = load_flags(around.resets, tile)

    G: tl.constexpr = plan.G
    products = load_tiles(PRODUCT, tile.row, tile, plan.H, G)
    p = ()
    for g in tl.static_range(G):
        p += (tl.where(is_reset, 0.0, products[g]),)
    h, c = None, None
    if plan.has_c:
        c = tl.where(is_reset, 0.0, load_tile(S_C, tile.row, tile, plan.H))
    else:
        h = tl.where(is_reset, 0.0, load_tile(S_H, tile.row, tile, plan.H))
    new_h, new_c = chunk_step(X, C, p, h, c, w, around, tile, plan)
    if plan.has_c:
        store_tile(S_C, new_c, tile.row, tile, plan.H)
    if plan.is_projected:
        store_tile(UNPROJECTED, new_h, tile.row, tile, plan.H)
    else:
        finish_step(new_h, S_H, OUT, around, is_reset, tile, plan, out_width)


@triton.jit(do_not_specialize=["packed_start", "rows"])
def finish_forward(
    PROJECTED, S_H, OUT, around, packed_start, rows,
    plan: tl.constexpr, out_width: tl.constexpr, BM: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """The rest of a step, from the projected h."""
    tile = place(rows, packed_start, 0, plan.P, BM, BP)
    is_reset = load_flags(around.resets, tile)
    h = load_tile(PROJECTED, tile.row, tile, plan.P)
    finish_step(h, S_H, OUT, around, is_reset, tile, plan, out_width)


@triton.jit(do_not_specialize=["packed_start", "chunk_start", "rows"])
def step_backward(
    chunk, D_OUT, D_UNPROJECTED, PENDING, D_H, D_C, w, around, packed_start, chunk_start, rows,
    plan: tl.constexpr, out_width: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """Backward of one step. PENDING is the product d_p · W_hh of the following step, not yet in D_H; D_H and D_C, the
    gradients of the states, are overwritten.

    With a projection `finish_backward` ran before, and D_UNPROJECTED is the gradient of h before its projection.
    """
    tile = place(rows, packed_start, chunk_start, plan.H, BM, BH)
    is_reset = load_flags(around.resets, tile)

    d_kept, d_c = None, None
    if plan.is_projected:
        d_h = load_tile(D_UNPROJECTED, tile.row, tile, plan.H)
    else:
        d_kept, d_h = finish_step_backward(D_OUT, PENDING, D_H, around, is_reset, tile, plan, out_width)
    if plan.has_c:
        d_c = load_tile(D_C, tile.row, tile, plan.H)
    _, d_old = chunk_step_backward(chunk, d_h, d_c, w, around, is_reset, tile, plan)
    if plan.has_c:
        store_tile(D_C, d_old, tile.row, tile, plan.H)
        if not plan.is_projected:
            store_tile(D_H, d_kept, tile.row, tile, plan.P)
    else:
        store_tile(D_H, d_kept + d_old, tile.row, tile, plan.P)


@triton.jit(do_not_specialize=["packed_start", "chunk_start", "rows"])
def finish_backward(
    D_OUT, PENDING, D_H, D_PROJECTED, around, packed_start, chunk_start, rows,
    plan: tl.constexpr, out_width: tl.constexpr, BM: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Backward of `finish_forward`; D_PROJECTED, of the whole chunk, is the gradient of the projected h."""
    tile = place(rows, packed_start, chunk_start, plan.P, BM, BP)
    is_reset = load_flags(around.resets, tile)
    d_kept, d_h = finish_step_backward(D_OUT, PENDING, D_H, around, is_reset, tile, plan, out_width)
    store_tile(D_PROJECTED, d_h, tile.chunk_row, tile, plan.P)
    store_tile(D_H, d_kept, tile.row, tile, plan.P)


def forward(direction: Direction, run: Run, x: Tensor, chunk_origin: int, states: States) -> None:
    """The steps of a run. `x` is the chunk's input product; the chunk begins at packed row `chunk_origin`."""
    plan, parameters, h = direction.plan, direction.parameters, states.h
    first, stride = direction.start_and_stride(run)
    rows, BH, BP = run.rows, block(plan.H), block(plan.P)
    BM = rows_per_program(BH)
    product = h.new_empty(rows, direction.width)
    unprojected, projected = (h.new_empty(rows, size) if plan.is_projected else None for size in (plan.H, plan.P))
    for t in range(run.steps):
        packed_start = first + t * stride
        torch.mm(h[:rows], parameters["weight_hh"].t(), out=product)
        launch(
            step_forward, programs(rows, BM), BM * BH,
            X=x, PRODUCT=product, UNPROJECTED=unprojected, S_H=h, S_C=states.c, OUT=states.output, C=states.every_c,
            w=direction.weights, around=direction.around, packed_start=packed_start,
            chunk_start=packed_start - chunk_origin, rows=rows, plan=plan, out_width=states.out_width, BM=BM, BH=BH,
        )  # fmt: skip
        if unprojected is not None and projected is not None:
            torch.mm(unprojected, parameters["weight_hr"].t(), out=projected)
            launch(
                finish_forward, programs(rows, BM), BM * BP,
                PROJECTED=projected, S_H=h, OUT=states.output, around=direction.around, packed_start=packed_start,
                rows=rows, plan=plan, out_width=states.out_width, BM=BM, BP=BP,
            )  # fmt: skip


def backward(direction: Direction, run: Run, chunk: Chunk, chunk_origin: int, gradients: Gradients) -> None:
    """Backward of the steps of a run. The chunk begins at packed row `chunk_origin`."""
    plan, parameters, pending = direction.plan, direction.parameters, gradients.pending
    first, stride = direction.start_and_stride(run, backward=True)
    rows, BH, BP = run.rows, block(plan.H), block(plan.P)
    BM = rows_per_program(BH)
    d_unprojected = pending.new_empty(rows, plan.H) if plan.is_projected else None
    for t in range(run.steps):
        packed_start = first + t * stride
        chunk_start = packed_start - chunk_origin
        step_rows = slice(chunk_start, chunk_start + rows)
        if d_unprojected is not None:
            launch(
                finish_backward, programs(rows, BM), BM * BP,
                D_OUT=gradients.output, PENDING=pending, D_H=gradients.h, D_PROJECTED=chunk.d_projected,
                around=direction.around, packed_start=packed_start, chunk_start=chunk_start, rows=rows,
                plan=plan, out_width=gradients.out_width, BM=BM, BP=BP,
            )  # fmt: skip
            torch.mm(chunk.d_projected[step_rows], parameters["weight_hr"], out=d_unprojected)
        launch(
            step_backward, programs(rows, BM), BM * BH,
            chunk=chunk, D_OUT=gradients.output, D_UNPROJECTED=d_unprojected, PENDING=pending, D_H=gradients.h,
            D_C=gradients.c, w=direction.weights, around=direction.around, packed_start=packed_start,
            chunk_start=chunk_start, rows=rows, plan=plan, out_width=gradients.out_width, BM=BM, BH=BH,
        )  # fmt: skip
        torch.mm(chunk.d_p[step_rows], parameters["weight_hh"], out=pending[:rows])
