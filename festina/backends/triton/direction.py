# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment"
"""One direction of a call: parameters as kernels take them, the order of steps, products and sums over time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from festina import reference
from festina.backends.triton.launch import Launch, block, power_of_two, programs, rows_per_program, warps_for
from festina.backends.triton.norm import Rows, rows_backward, rows_forward
from festina.backends.triton.step import Around, Weights

if TYPE_CHECKING:
    from festina.backends.triton.runs import Run
    from festina.backends.triton.setup import Setup
    from festina.call import Call

STRIP = 64
"""The most rows over which one program sums the gradients of gain and shift."""


@triton.jit
def shift_rows(
    STATES, INITIAL, OUT, source, target, q, is_first, is_there, continued, is_reset,
    stride: tl.constexpr, width: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """OUT = each row's state before it, for one kind of state."""
    from_initial = is_first & (q >= continued)
    for base in tl.static_range(0, width, BLOCK):
        col = base + tl.arange(0, BLOCK)[None, :]
        here = is_there[:, None] & (col < width)
        known = here & (is_reset == 0)[:, None]
        old = tl.load(STATES + source[:, None] * stride + col, mask=known & (from_initial == 0)[:, None], other=0.0)
        initial = tl.load(
            INITIAL + q.to(tl.int64)[:, None] * width + col, mask=known & from_initial[:, None], other=0.0
        )
        value = tl.where(from_initial[:, None], initial.to(tl.float32), old.to(tl.float32))
        tl.store(OUT + target[:, None] * width + col, value.to(OUT.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["start", "origin", "rows", "count", "first", "shift", "neighbour", "continued"])
def states_before(
    start, origin, rows, count, first, shift, neighbour, continued,
    H, H_0, H_BEFORE, C, C_0, C_BEFORE, RESETS,
    out_width: tl.constexpr, P: tl.constexpr, HC: tl.constexpr, BM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """h, and c unless C is None, before each of a run's `count` packed rows, after resets.

    The run begins at packed row `start`, in a chunk that begins at `origin`. A row's state before it stands `shift` rows
    on; in the run's first step, whose rows begin `first` rows after `start`, it stands `neighbour` rows after the first
    packed one for `continued` rows, and is the initial state for the others.
    """
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    is_there = row < count
    q = row % rows
    is_first = (row - q) == first
    n = tl.cast(start, tl.int64) + row
    source = tl.where(is_first, tl.cast(neighbour, tl.int64) + q, n + shift)
    is_reset = row < 0
    if RESETS is not None:
        is_reset = tl.load(RESETS + n, mask=is_there, other=0) != 0
    target = n - origin
    shift_rows(H, H_0, H_BEFORE, source, target, q, is_first, is_there, continued, is_reset, out_width, P, BLOCK)
    if C is not None:
        shift_rows(C, C_0, C_BEFORE, source, target, q, is_first, is_there, continued, is_reset, HC, HC, BLOCK)


class Direction:
    """Direction `d` of a call, ready for kernels."""

    def __init__(self, call: Call, setup: Setup, d: int) -> None:
        self.call, self.setup, self.d, self.plan = call, setup, d, setup.plan
        self.parameters = {name: tensor.contiguous() for name, tensor in call.of_direction(d).items()}
        norm = ("gain_joint", "bias_joint") if self.plan.is_joint else ("gain_hh", "bias_hh")
        self.weights = Weights(*map(self.parameters.get, ("weight_hh", "weight_hr", *norm, "gain_c", "bias_c")))
        self.around = Around(
            resets=self._flags(call.resets),
            keep_h=self._flags(call.zoneout_mask),
            keep_c=self._flags(call.zoneout_cell_mask),
            rate_h=float(call.zoneout) if call.zoneout and call.zoneout_mask is None else None,
            rate_c=float(call.zoneout_cell) if call.zoneout_cell and call.zoneout_cell_mask is None else None,
        )

    def _flags(self, flags: Tensor | None) -> Tensor | None:
        return None if flags is None else flags[self.d].contiguous().view(torch.uint8)

    def chunks(self, backward: bool = False) -> list[list[Run]]:
        """Chunks, and the runs in them, in the order in which this direction takes them, forward or backward."""
        chunks = self.setup.backward_chunks if backward else self.setup.forward_chunks
        if self.d == 1 and self.setup.is_full:  # cut at the same steps as direction 0, counted from the end
            chunks = [[run.mirrored(self.setup.N) for run in chunk] for chunk in reversed(chunks)]
        if self._ascends(backward):
            return chunks
        return [chunk[::-1] for chunk in reversed(chunks)]

    def start_and_stride(self, run: Run, backward: bool = False) -> tuple[int, int]:
        """The packed row at which the first step taken begins, and the distance to the beginning of the next step."""
        return (run.start, run.rows) if self._ascends(backward) else (run.end - run.rows, -run.rows)

    def _ascends(self, backward: bool) -> bool:
        return (self.d == 0) is not backward

    def launch(self, kernel: Any, grid: int, values: int, parts: Sequence[tuple[Any, ...]], *constants: int) -> Launch:
        """A kernel on some programs, with threads for a tile of `values` values."""
        return Launch(self.setup.kernels, kernel, (grid, 1), warps_for(values), parts, self.plan, constants)

    def states_before(self, chunk: Sequence[Run], output: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """h and c before each step of a chunk, after resets, from those after every step; in the chunk's packed rows."""
        call, H, P, d = self.call, self.plan.H, self.plan.P, self.d
        origin = min(run.start for run in chunk)
        rows = sum(run.end - run.start for run in chunk)
        h_before = output.new_empty(rows, P)
        c_before = None if c is None else c.new_empty(rows, H)
        h_0, c_0 = (None if s is None else (s if d == 0 else s[d]).contiguous() for s in (call.h_0, call.c_0))
        BLOCK = min(256, power_of_two(max(H, P)))
        BM = rows_per_program(BLOCK, 2048)
        parts = ((output, h_0, h_before, c, c_0, c_before, self.around.resets),)
        constants = (call.layer.directions * P, P, H, BM, BLOCK)
        for run in chunk:
            count = run.rows * run.steps
            if d == 0:
                first, shift, neighbour, continued = 0, -run.rows, run.start - run.rows_before, run.rows_before
            else:
                first, shift, neighbour, continued = count - run.rows, run.rows, run.end, run.rows_after
            grid, warps = (programs(count, BM), 1), warps_for(BM * BLOCK)
            Launch(self.setup.kernels, states_before, grid, warps, parts, None, constants)(
                run.start, origin, run.rows, count, first, shift, neighbour, continued
            )
        return h_before, c_before

    def input_product(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """W_ih · x for some steps, float32 `[rows, G·H]`, normalised and shifted unless the norm is joint; and the
        product before its norm, which is the same tensor if the plan has no norm on it."""
        if "gain_ih" not in self.parameters:
            x = reference.input_product(self.call.layer, input, self.parameters).view(-1, self.setup.width)
            return x, x
        product = F.linear(input, self.parameters["weight_ih"], self.parameters.get("bias_inner"))
        x = torch.empty_like(product, dtype=torch.float32)
        rows, BH = product.shape[0], block(self.plan.H)
        BM = rows_per_program(BH)
        gain, shift = self.parameters["gain_ih"], self.parameters.get("bias_ih")
        self.launch(rows_forward, programs(rows, BM), BM * BH, ((product, gain, shift, x),), BM, BH)(rows)
        return x, product

    def row_sums(self, x: Rows, h: Rows, c: Rows) -> dict[str, Tensor]:
        """The gradients of gains and shifts, from the rows that they belong to; and `D_V` of each is filled."""
        setup = self.setup
        found = [(norm.D is not None, norm.V is not None) for norm in (x, h, c)]
        names, widths, h_at, c_at = setup.columns(*found)
        D = next(norm.D for norm in (x, h, c) if norm.D is not None)
        rows, BH, columns = D.shape[0], block(self.plan.H), sum(widths)
        BM = rows_per_program(BH)
        strip = max(BM, min(STRIP, power_of_two(programs(rows, 2 * setup.kernels.device.processors))))
        grid = programs(rows, strip)
        sums = D.new_empty(grid, columns, dtype=torch.float32)
        self.launch(rows_backward, grid, BM * BH, (x, h, c, (sums,)), h_at, c_at, BM, BH)(rows, strip, columns)
        total = sums.sum(0) if grid > 1 else sums[0]
        return dict(zip(names, total.split(widths), strict=True))
