# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment"
"""Tier 1: one launch a step, beside the product that `torch.mm` makes. For any H.

A program has a few rows in their whole width, so that statistics never leave it. A projection puts a second product
between the cell and Zoneout, and so splits the launch in two.

`first` is the place of the step's first row among all packed steps, `at` its place in the chunk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from festina.backends.triton.launch import block, launch, programs, rows_per_program
from festina.backends.triton.norm import load_tiles, store_tiles
from festina.backends.triton.step import Chunk, load_flags, place, step_back, step_on, zoneout, zoneout_backward

if TYPE_CHECKING:
    from festina.backends.triton.direction import Direction, Gradients, Run


@triton.jit
def settle(h, S_H, OUT, around, row, n, is_reset, col, mask, plan: tl.constexpr, out_width: tl.constexpr):
    """Zoneout on h, into the state and the output."""
    old = tl.where(is_reset, 0.0, load_tiles(S_H, row, col, mask, plan.P, 1)[0])
    h = zoneout(old, h, around.keep_h, around.rate_h, n, col, mask, plan.P)
    store_tiles(S_H, (h,), row, col, mask, plan.P, 1)
    store_tiles(OUT, (h,), n, col, mask, out_width, 1)


@triton.jit
def unsettle(D_OUT, Q, D_H, around, row, n, is_reset, col, mask, plan: tl.constexpr, out_width: tl.constexpr):
    """Back through `settle`: the gradient of the old h, as far as it comes past the step, and of the new one."""
    d = load_tiles(D_H, row, col, mask, plan.P, 1)[0] + load_tiles(Q, row, col, mask, plan.P, 1)[0]
    if D_OUT is not None:
        d += load_tiles(D_OUT, n, col, mask, out_width, 1)[0]
    d_kept, d_h = zoneout_backward(d, around.keep_h, around.rate_h, n, col, mask, plan.P)
    return tl.where(is_reset, 0.0, d_kept), d_h


@triton.jit(do_not_specialize=["first", "at", "rows"])
def step_forward(
    X, P, H_RAW, S_H, S_C, OUT, C, w, around, first, at, rows,
    plan: tl.constexpr, out_width: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """One step. P is the recurrent product; the states S_H and S_C are overwritten; C, where wanted, is c of all steps.

    With a projection h goes to H_RAW, and `settle_forward` does the rest.
    """
    row, n, col, is_row, mask = place(rows, first, plan.H, BM, BH)
    is_reset = load_flags(around.resets, n, is_row)

    G: tl.constexpr = plan.G
    products = load_tiles(P, row, col, mask, plan.H, G)
    p = ()
    for g in tl.static_range(G):
        p += (tl.where(is_reset, 0.0, products[g]),)
    h, c = None, None
    if plan.has_c:
        c = tl.where(is_reset, 0.0, load_tiles(S_C, row, col, mask, plan.H, 1)[0])
    else:
        h = tl.where(is_reset, 0.0, load_tiles(S_H, row, col, mask, plan.H, 1)[0])
    new_h, new_c = step_on(X, C, p, h, c, w, around, n, tl.cast(at, tl.int64) + row, col, mask, plan)
    if plan.has_c:
        store_tiles(S_C, (new_c,), row, col, mask, plan.H, 1)
    if plan.is_projected:
        store_tiles(H_RAW, (new_h,), row, col, mask, plan.H, 1)
    else:
        settle(new_h, S_H, OUT, around, row, n, is_reset, col, mask, plan, out_width)


@triton.jit(do_not_specialize=["first", "rows"])
def settle_forward(
    Q, S_H, OUT, around, first, rows,
    plan: tl.constexpr, out_width: tl.constexpr, BM: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """What is left of a step after Q, the projected h."""
    row, n, col, is_row, mask = place(rows, first, plan.P, BM, BP)
    is_reset = load_flags(around.resets, n, is_row)
    h = load_tiles(Q, row, col, mask, plan.P, 1)[0]
    settle(h, S_H, OUT, around, row, n, is_reset, col, mask, plan, out_width)


@triton.jit(do_not_specialize=["first", "at", "rows"])
def step_backward(
    chunk, D_OUT, D_RAW, Q, D_H, D_C, w, around, first, at, rows,
    plan: tl.constexpr, out_width: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """Back through one step. Q is the product d_p · W_hh of the step that came after, not yet in D_H; D_H and D_C, the
    gradients of the states, are overwritten.

    With a projection `settle_backward` ran before, and D_RAW is the gradient of h before its projection.
    """
    row, n, col, is_row, mask = place(rows, first, plan.H, BM, BH)
    is_reset = load_flags(around.resets, n, is_row)

    d_kept, d_c = None, None
    if plan.is_projected:
        d_h = load_tiles(D_RAW, row, col, mask, plan.H, 1)[0]
    else:
        d_kept, d_h = unsettle(D_OUT, Q, D_H, around, row, n, is_reset, col, mask, plan, out_width)
    if plan.has_c:
        d_c = load_tiles(D_C, row, col, mask, plan.H, 1)[0]
    at_row = tl.cast(at, tl.int64) + row
    _, d_old = step_back(chunk, d_h, d_c, w, around, is_reset, n, at_row, col, mask, plan)
    if plan.has_c:
        store_tiles(D_C, (d_old,), row, col, mask, plan.H, 1)
        if not plan.is_projected:
            store_tiles(D_H, (d_kept,), row, col, mask, plan.P, 1)
    else:
        store_tiles(D_H, (d_kept + d_old,), row, col, mask, plan.P, 1)


@triton.jit(do_not_specialize=["first", "at", "rows"])
def settle_backward(
    D_OUT, Q, D_H, D_Q, around, first, at, rows,
    plan: tl.constexpr, out_width: tl.constexpr, BM: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Back through `settle_forward`; D_Q, of the whole chunk, is the gradient of the projected h."""
    row, n, col, is_row, mask = place(rows, first, plan.P, BM, BP)
    is_reset = load_flags(around.resets, n, is_row)
    d_kept, d_h = unsettle(D_OUT, Q, D_H, around, row, n, is_reset, col, mask, plan, out_width)
    store_tiles(D_Q, (d_h,), tl.cast(at, tl.int64) + row, col, mask, plan.P, 1)
    store_tiles(D_H, (d_kept,), row, col, mask, plan.P, 1)


def forward(
    direction: Direction, run: Run, x: Tensor, at: int, h: Tensor, c: Tensor | None, output: Tensor, kept: Tensor | None
) -> None:
    """The steps of a run, whose part of the chunk `x` begins at row `at`. The states h and c `[B, ...]` go on."""
    plan, w = direction.plan, direction.p
    first, stride = direction.places(run)
    rows, BH = run.rows, block(plan.H)
    BM = rows_per_program(BH)
    product = h.new_empty(rows, direction.width)
    unprojected, q = (h.new_empty(rows, size) if plan.is_projected else None for size in (plan.H, plan.P))
    for t in range(run.steps):
        n = first + t * stride
        torch.mm(h[:rows], w["weight_hh"].t(), out=product)
        launch(
            step_forward, programs(rows, BM), BM * BH,
            X=x, P=product, H_RAW=unprojected, S_H=h, S_C=c, OUT=output, C=kept, w=direction.weights,
            around=direction.around, first=n, at=at + n - run.start, rows=rows,
            plan=plan, out_width=output.stride(0), BM=BM, BH=BH,
        )  # fmt: skip
        if unprojected is not None and q is not None:
            BP = block(plan.P)
            torch.mm(unprojected, w["weight_hr"].t(), out=q)
            launch(
                settle_forward, programs(rows, BM), BM * BP,
                Q=q, S_H=h, OUT=output, around=direction.around, first=n, rows=rows,
                plan=plan, out_width=output.stride(0), BM=BM, BP=BP,
            )  # fmt: skip


def backward(direction: Direction, run: Run, chunk: Chunk, at: int, gradients: Gradients) -> None:
    """Back through the steps of a run, whose part of the chunk begins at row `at`."""
    plan, w = direction.plan, direction.p
    first, stride = direction.places(run, backward=True)
    rows, BH, BP = run.rows, block(plan.H), block(plan.P)
    BM = rows_per_program(BH)
    q, out_width = gradients.q, gradients.out_width
    d_unprojected = q.new_empty(rows, plan.H) if plan.is_projected else None
    for t in range(run.steps):
        n = first + t * stride
        here = slice(at + n - run.start, at + n - run.start + rows)
        if d_unprojected is not None:
            launch(
                settle_backward, programs(rows, BM), BM * BP,
                D_OUT=gradients.output, Q=q, D_H=gradients.h, D_Q=chunk.d_q, around=direction.around,
                first=n, at=here.start, rows=rows, plan=plan, out_width=out_width, BM=BM, BP=BP,
            )  # fmt: skip
            torch.mm(chunk.d_q[here], w["weight_hr"], out=d_unprojected)
        launch(
            step_backward, programs(rows, BM), BM * BH,
            chunk=chunk, D_OUT=gradients.output, D_RAW=d_unprojected, Q=q, D_H=gradients.h, D_C=gradients.c,
            w=direction.weights, around=direction.around, first=n, at=here.start, rows=rows,
            plan=plan, out_width=out_width, BM=BM, BH=BH,
        )  # fmt: skip
        torch.mm(chunk.d_p[here], w["weight_hh"], out=q[:rows])
