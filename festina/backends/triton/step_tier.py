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

from festina.backends.triton.launch import block, programs, rows_per_program
from festina.backends.triton.step import (
    chunk_step,
    chunk_step_backward,
    load_flags,
    store_chunk,
    zoneout,
    zoneout_backward,
)
from festina.backends.triton.tile import load_tile, load_tiles, place, store_tile

if TYPE_CHECKING:
    from festina.backends.triton.direction import Direction
    from festina.backends.triton.recurrence import Backward, States
    from festina.backends.triton.runs import Run


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
    packed_start, chunk_start, rows, X, PRODUCT, UNPROJECTED, S_H, S_C, OUT, C, w, around,
    plan: tl.constexpr, out_width: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """One step, from the recurrent product. The states S_H and S_C are overwritten; C, unless None, is c of all steps.

    With a projection h goes to UNPROJECTED, and `finish_forward` does the rest.
    """
    tile = place(tl.program_id(0), tl.arange(0, BH), rows, packed_start, chunk_start, plan.H, BM)
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
    x = load_tiles(X, tile.chunk_row, tile, plan.H, G)
    new_h, new_c, _ = chunk_step(C, x, p, h, c, w, around, tile, plan, None)
    if plan.has_c:
        store_tile(S_C, new_c, tile.row, tile, plan.H)
    if plan.is_projected:
        store_tile(UNPROJECTED, new_h, tile.row, tile, plan.H)
    else:
        finish_step(new_h, S_H, OUT, around, is_reset, tile, plan, out_width)


@triton.jit(do_not_specialize=["packed_start", "rows"])
def finish_forward(
    packed_start, rows, PROJECTED, S_H, OUT, around,
    plan: tl.constexpr, out_width: tl.constexpr, BM: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """The rest of a step, from the projected h."""
    tile = place(tl.program_id(0), tl.arange(0, BP), rows, packed_start, 0, plan.P, BM)
    is_reset = load_flags(around.resets, tile)
    h = load_tile(PROJECTED, tile.row, tile, plan.P)
    finish_step(h, S_H, OUT, around, is_reset, tile, plan, out_width)


@triton.jit(do_not_specialize=["packed_start", "chunk_start", "rows"])
def step_backward(
    packed_start, chunk_start, rows, chunk, D_OUT, D_UNPROJECTED, PENDING, D_H, D_C, w, around,
    plan: tl.constexpr, out_width: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """Backward of one step. PENDING is the product d_p · W_hh of the following step, not yet in D_H; D_H and D_C, the
    gradients of the states, are overwritten.

    With a projection `finish_backward` ran before, and D_UNPROJECTED is the gradient of h before its projection.
    """
    tile = place(tl.program_id(0), tl.arange(0, BH), rows, packed_start, chunk_start, plan.H, BM)
    is_reset = load_flags(around.resets, tile)

    d_kept, d_c = None, None
    if plan.is_projected:
        d_h = load_tile(D_UNPROJECTED, tile.row, tile, plan.H)
    else:
        d_kept, d_h = finish_step_backward(D_OUT, PENDING, D_H, around, is_reset, tile, plan, out_width)
    if plan.has_c:
        d_c = load_tile(D_C, tile.row, tile, plan.H)
    found, d_old = chunk_step_backward(chunk, d_h, d_c, w, around, is_reset, tile, plan, None, None)
    store_chunk(chunk, found, tile, plan)
    if plan.has_c:
        store_tile(D_C, d_old, tile.row, tile, plan.H)
        if not plan.is_projected:
            store_tile(D_H, d_kept, tile.row, tile, plan.P)
    else:
        store_tile(D_H, d_kept + d_old, tile.row, tile, plan.P)


@triton.jit(do_not_specialize=["packed_start", "chunk_start", "rows"])
def finish_backward(
    packed_start, chunk_start, rows, D_OUT, PENDING, D_H, D_PROJECTED, around,
    plan: tl.constexpr, out_width: tl.constexpr, BM: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Backward of `finish_forward`; D_PROJECTED, of the whole chunk, is the gradient of the projected h."""
    tile = place(tl.program_id(0), tl.arange(0, BP), rows, packed_start, chunk_start, plan.P, BM)
    is_reset = load_flags(around.resets, tile)
    d_kept, d_h = finish_step_backward(D_OUT, PENDING, D_H, around, is_reset, tile, plan, out_width)
    store_tile(D_PROJECTED, d_h, tile.chunk_row, tile, plan.P)
    store_tile(D_H, d_kept, tile.row, tile, plan.P)


def forward(direction: Direction, run: Run, x: Tensor, origin: int, states: States) -> None:
    """The steps of a run. `x` is the chunk's input product; the chunk begins at packed row `origin`."""
    plan, parameters = direction.plan, direction.parameters
    start, stride = direction.start_and_stride(run)
    rows, BH, BP = run.rows, block(plan.H), block(plan.P)
    BM = rows_per_program(BH)
    h, grid = states.h.view(-1, plan.P)[:rows], programs(rows, BM)
    weight = parameters["weight_hh"].t()
    product = h.new_empty(rows, direction.setup.width)
    unprojected, projected = (h.new_empty(rows, size) if plan.is_projected else None for size in (plan.H, plan.P))
    tensors = (x, product, unprojected, states.h, states.c, states.output, states.every_c)
    parts = (tensors, direction.weights, direction.around)
    step = direction.launch(step_forward, grid, BM * BH, parts, states.out_width, BM, BH)
    parts = ((projected, states.h, states.output), direction.around)
    finish = direction.launch(finish_forward, grid, BM * BP, parts, states.out_width, BM, BP)
    weight_hr = parameters["weight_hr"].t() if plan.is_projected else weight
    for packed_start in range(start, start + run.steps * stride, stride):
        torch.mm(h, weight, out=product)
        step(packed_start, packed_start - origin, rows)
        if unprojected is not None:
            torch.mm(unprojected, weight_hr, out=projected)
            finish(packed_start, rows)


def backward(direction: Direction, run: Run, of_direction: Backward) -> None:
    """Backward of the steps of a run."""
    plan, parameters, chunk, gradients = (
        direction.plan,
        direction.parameters,
        of_direction.chunk,
        of_direction.gradients,
    )
    start, stride = direction.start_and_stride(run, backward=True)
    rows, BH, BP = run.rows, block(plan.H), block(plan.P)
    BM = rows_per_program(BH)
    grid, weight = programs(rows, BM), parameters["weight_hh"]
    if of_direction.pending is None:
        of_direction.pending = torch.zeros_like(direction.call.h_0[direction.d], memory_format=torch.contiguous_format)
    pending = of_direction.pending
    d_unprojected = pending.new_empty(rows, plan.H) if plan.is_projected else None
    tensors = (gradients.output, d_unprojected, pending, gradients.h, gradients.c)
    parts = (chunk, tensors, direction.weights, direction.around)
    step = direction.launch(step_backward, grid, BM * BH, parts, gradients.out_width, BM, BH)
    parts = ((gradients.output, pending, gradients.h, chunk.d_projected), direction.around)
    finish = direction.launch(finish_backward, grid, BM * BP, parts, gradients.out_width, BM, BP)
    last = start - of_direction.origin + (run.steps - 1) * stride
    d_p = chunk.d_p[min(start - of_direction.origin, last) :][: rows * run.steps].split(
        rows
    )  # in the order of packed rows
    d_projected = d_p
    out = pending[:rows]
    if d_unprojected is not None:
        d_projected = chunk.d_projected[min(start - of_direction.origin, last) :][: rows * run.steps].split(rows)
    order = range(run.steps) if stride > 0 else range(run.steps - 1, -1, -1)
    for t, packed_start in zip(order, range(start, start + run.steps * stride, stride), strict=True):
        chunk_start = packed_start - of_direction.origin
        if d_unprojected is not None:
            finish(packed_start, chunk_start, rows)
            torch.mm(d_projected[t], parameters["weight_hr"], out=d_unprojected)
        step(packed_start, chunk_start, rows)
        torch.mm(d_p[t], weight, out=out)
