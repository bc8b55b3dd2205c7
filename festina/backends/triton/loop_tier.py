# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment"
"""Tier 2: a program has a block of rows and takes them through all steps in one launch, states in registers.

The recurrent product is made inside, so H and P are small; a diagonal cell has no product and may be of any width.
`first` is the place of the first step's first row among all packed steps, `at` its place in the chunk; from step to
step both go on by `stride` rows, which is negative where steps are taken from the last to the first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from festina.backends.triton.launch import block, launch, programs, rows_per_program
from festina.backends.triton.norm import load_row, load_tiles, store_tiles
from festina.backends.triton.step import Chunk, load_flags, place, step_back, step_on, zoneout, zoneout_backward

if TYPE_CHECKING:
    from festina.backends.triton.direction import Direction, Gradients, Run


@triton.jit
def load_matrix(ptr, row, col, rows: tl.constexpr, cols: tl.constexpr, stride: tl.constexpr):
    """`[rows, cols]` of a matrix whose rows are `stride` apart, 0 outside."""
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    return tl.load(ptr + row[:, None] * stride + col[None, :], mask=inside, other=0.0)


@triton.jit
def dot(a, b, precision: tl.constexpr):
    return tl.dot(a.to(b.dtype), b, input_precision=precision)


@triton.jit
def recurrent_product(h, hh, col, col_p, plan: tl.constexpr, precision: tl.constexpr):
    """W_hh · h, a tile a gate; `hh` is the transposed W_hh `[P, G·H]` unless it is a diagonal."""
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


@triton.jit(do_not_specialize=["first", "at", "stride", "steps", "rows"])
def loop_forward(
    X, HH_T, HR_T, S_H, S_C, OUT, C, w, around, first, at, stride, steps, rows,
    plan: tl.constexpr, precision: tl.constexpr, out_width: tl.constexpr,
    BM: tl.constexpr, BH: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """`steps` steps of `rows` rows, with the weights of both products transposed. The states S_H and S_C are overwritten;
    C, where wanted, is c after every step."""
    row, n, col, is_row, mask = place(rows, first, plan.H, BM, BH)
    _, at_row, col_p, _, mask_p = place(rows, at, plan.P, BM, BP)
    h = load_tiles(S_H, row, col_p, mask_p, plan.P, 1)[0]
    c = None
    if plan.has_c:
        c = load_tiles(S_C, row, col, mask, plan.H, 1)[0]
    for _ in range(steps):
        is_reset = load_flags(around.resets, n, is_row)
        h = tl.where(is_reset, 0.0, h)
        if plan.has_c:
            c = tl.where(is_reset, 0.0, c)
        p = recurrent_product(h, HH_T, col, col_p, plan, precision)
        new_h, new_c = step_on(X, C, p, h, c, w, around, n, at_row, col, mask, plan)
        if plan.has_c:
            c = new_c
        if plan.is_projected:
            new_h = dot(new_h, load_matrix(HR_T, col, col_p, plan.H, plan.P, plan.P), precision)
        h = zoneout(h, new_h, around.keep_h, around.rate_h, n, col_p, mask_p, plan.P)
        h = h.to(OUT.dtype.element_ty).to(tl.float32)  # backward starts from what the output holds
        store_tiles(OUT, (h,), n, col_p, mask_p, out_width, 1)
        n += stride
        at_row += stride
    store_tiles(S_H, (h,), row, col_p, mask_p, plan.P, 1)
    if plan.has_c:
        store_tiles(S_C, (c,), row, col, mask, plan.H, 1)


@triton.jit(do_not_specialize=["first", "at", "stride", "steps", "rows"])
def loop_backward(
    chunk, D_OUT, D_H, D_C, w, around, first, at, stride, steps, rows,
    plan: tl.constexpr, precision: tl.constexpr, out_width: tl.constexpr,
    BM: tl.constexpr, BH: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Back through `steps` steps, from the last one; D_H and D_C, the gradients of the states, are overwritten."""
    row, n, col, is_row, mask = place(rows, first, plan.H, BM, BH)
    _, at_row, col_p, _, mask_p = place(rows, at, plan.P, BM, BP)
    d_h = load_tiles(D_H, row, col_p, mask_p, plan.P, 1)[0]
    d_c = None
    if plan.has_c:
        d_c = load_tiles(D_C, row, col, mask, plan.H, 1)[0]
    for _ in range(steps):
        is_reset = load_flags(around.resets, n, is_row)
        if D_OUT is not None:
            d_h += load_tiles(D_OUT, n, col_p, mask_p, out_width, 1)[0]
        d_kept, d_new = zoneout_backward(d_h, around.keep_h, around.rate_h, n, col_p, mask_p, plan.P)
        if plan.is_projected:
            store_tiles(chunk.d_q, (d_new,), at_row, col_p, mask_p, plan.P, 1)
            d_new = dot(d_new, load_matrix(w.hr, col_p, col, plan.P, plan.H, plan.H), precision)
        d_p, d_old = step_back(chunk, d_new, d_c, w, around, is_reset, n, at_row, col, mask, plan)
        d_h = tl.where(is_reset, 0.0, d_kept) + recurrent_product_backward(d_p, w, col, col_p, plan, precision)
        if plan.has_c:
            d_c = d_old
        else:
            d_h += d_old
        n += stride
        at_row += stride
    store_tiles(D_H, (d_h,), row, col_p, mask_p, plan.P, 1)
    if plan.has_c:
        store_tiles(D_C, (d_c,), row, col, mask, plan.H, 1)


def precision() -> str:
    """How float32 products are made: as torch makes its own."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def rows_of(direction: Direction) -> int:
    """Rows a program: those of a tensor core's tile, or where no product is made what makes a launch wide."""
    return rows_per_program(block(direction.H)) if direction.plan.is_diagonal else 16


def forward(
    direction: Direction, run: Run, x: Tensor, at: int, h: Tensor, c: Tensor | None, output: Tensor, kept: Tensor | None
) -> None:
    """The steps of a run, whose part of the chunk `x` begins at row `at`. The states h and c `[B, ...]` go on."""
    first, stride = direction.places(run)
    BM, BH, BP = rows_of(direction), block(direction.H), block(direction.P)
    launch(
        loop_forward, programs(run.rows, BM), BM * BH,
        X=x, HH_T=direction.transposed("weight_hh"), HR_T=direction.transposed("weight_hr"), S_H=h, S_C=c, OUT=output,
        C=kept, w=direction.weights, around=direction.around, first=first, at=at + first - run.start, stride=stride,
        steps=run.steps, rows=run.rows, plan=direction.plan, precision=precision(), out_width=output.stride(0),
        BM=BM, BH=BH, BP=BP,
    )  # fmt: skip


def backward(direction: Direction, run: Run, chunk: Chunk, at: int, gradients: Gradients) -> None:
    """Back through the steps of a run, whose part of the chunk begins at row `at`."""
    first, stride = direction.places(run, backward=True)
    BM, BH, BP = rows_of(direction), block(direction.H), block(direction.P)
    launch(
        loop_backward, programs(run.rows, BM), BM * BH,
        chunk=chunk, D_OUT=gradients.output, D_H=gradients.h, D_C=gradients.c, w=direction.weights,
        around=direction.around, first=first, at=at + first - run.start, stride=stride, steps=run.steps, rows=run.rows,
        plan=direction.plan, precision=precision(), out_width=gradients.out_width, BM=BM, BH=BH, BP=BP,
    )  # fmt: skip
