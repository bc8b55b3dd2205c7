"""One direction of a call: parameters as kernels take them, chunks and runs of steps, products over time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from festina import reference
from festina.backends.triton.launch import block, launch, programs, rows_per_program
from festina.backends.triton.norm import rows_backward, rows_forward
from festina.backends.triton.step import Around, Plan, Weights
from festina.call import Call

STRIP = 64
"""Rows over which one program sums the gradients of gain and shift."""


LOOP_BYTES = 16 << 10 if torch.version.hip else 32 << 10
"""The largest part of W_hh for one gate, padded to a block, at which the whole recurrence is one launch: up to H = 128 in
bfloat16 and float16, 64 in float32, and 64 on AMD, which has less shared memory. Beyond, programs spill."""

CHUNK_BYTES = 64 << 20
"""Memory for the pre-activations of a chunk and their gradients, about."""


@dataclass(frozen=True)
class Run:
    """Consecutive steps with the same number of rows.

    Args:
        start: packed row at which the run begins.
        rows: of each step.
        steps: how many.
        rows_before, rows_after: of the step before the run and of the one after it; 0 if there is none.
    """

    start: int
    rows: int
    steps: int
    rows_before: int
    rows_after: int

    @property
    def end(self) -> int:
        """Packed row at which the run ends."""
        return self.start + self.rows * self.steps


def chunked(sizes: Sequence[int], max_rows: int) -> list[list[Run]]:
    """All steps as runs, grouped into chunks of at most `max_rows` packed rows, or of one step if that has more.

    >>> [[(run.start, run.rows, run.steps) for run in chunk] for chunk in chunked([3, 3, 2, 1], 8)]
    [[(0, 3, 2), (6, 2, 1)], [(8, 1, 1)]]
    """
    chunks: list[list[Run]] = []
    start, t, room = 0, 0, 0
    while t < len(sizes):
        rows = sizes[t]
        if rows > room:
            chunks.append([])
            room = max(max_rows, rows)
        end = t + 1
        while end < len(sizes) and sizes[end] == rows and rows * (end + 1 - t) <= room:
            end += 1
        rows_before, rows_after = sizes[t - 1] if t else 0, sizes[end] if end < len(sizes) else 0
        chunks[-1].append(Run(start, rows, end - t, rows_before, rows_after))
        start, t, room = start + rows * (end - t), end, room - rows * (end - t)
    return chunks


@dataclass(frozen=True)
class States:
    """What the forward steps of a direction overwrite.

    Args:
        output: this direction's part of the output, rows `out_width` apart.
        h, c: the states `[B, ...]`, c in float32; c is None if the cell has none.
        every_c: `[N, H]`, filled with c after every step; None if it is not wanted.
    """

    output: Tensor
    h: Tensor
    c: Tensor | None
    every_c: Tensor | None

    @property
    def out_width(self) -> int:
        """The distance between rows of the output."""
        return self.output.stride(0)


@dataclass(frozen=True)
class Gradients:
    """The gradients that backward steps of a direction read and overwrite.

    Args:
        output: of this direction's part of the output, rows `out_width` apart; None for zeros.
        h, c: of the states, float32 `[B, ...]`, overwritten at every step.
        pending: `[B, P]`, the last product d_p · W_hh, if it is not yet added to h.
    """

    output: Tensor | None
    h: Tensor
    c: Tensor | None
    pending: Tensor

    @property
    def out_width(self) -> int:
        """The distance between rows of the output; 0 if its gradient is None."""
        return 0 if self.output is None else self.output.stride(0)


class Direction:
    """Direction `d` of a call, ready for kernels."""

    def __init__(self, call: Call, d: int) -> None:
        self.call, self.d = call, d
        self.parameters = {name: tensor.contiguous() for name, tensor in call.of_direction(d).items()}
        self.B, self.P = call.h_0.shape[1:]
        self.H = self.parameters["weight_ih"].shape[0] // len(call.layer.cell.gates)
        self.plan = Plan.of(call.layer, self.H, self.P)
        self.width = self.plan.G * self.H
        norm = ("gain_joint", "bias_joint") if self.plan.is_joint else ("gain_hh", "bias_hh")
        self.weights = Weights(*map(self.parameters.get, ("weight_hh", "weight_hr", *norm, "gain_c", "bias_c")))
        self.around = Around(
            resets=self._flags(call.resets),
            keep_h=self._flags(call.zoneout_mask),
            keep_c=self._flags(call.zoneout_cell_mask),
            rate_h=call.zoneout if call.zoneout and call.zoneout_mask is None else None,
            rate_c=call.zoneout_cell if call.zoneout_cell and call.zoneout_cell_mask is None else None,
        )
        gate_bytes = block(self.H) * block(self.P) * call.input.element_size()
        self.is_loop = self.plan.is_diagonal or gate_bytes <= LOOP_BYTES
        self._transposed: dict[str, Tensor] = {}
        self._chunk_rows = CHUNK_BYTES // (16 * self.width)  # x, p and their gradients in float32

    def _flags(self, flags: Tensor | None) -> Tensor | None:
        return None if flags is None else flags[self.d].contiguous().view(torch.uint8)

    def transposed(self, name: str) -> Tensor | None:
        """A weight matrix transposed, so that the products of a forward loop read it row by row; a vector as it is."""
        if name in self.parameters and name not in self._transposed:
            weight = self.parameters[name]
            self._transposed[name] = weight.t().contiguous() if weight.dim() == 2 else weight
        return self._transposed.get(name)

    def chunks(self, backward: bool = False) -> Iterator[list[Run]]:
        """Chunks, and the runs in them, in the order in which this direction takes them, forward or backward."""
        chunks = chunked(self.call.sizes(), self._chunk_rows)
        return iter(chunks) if self._ascends(backward) else ([*reversed(chunk)] for chunk in reversed(chunks))

    def start_and_stride(self, run: Run, backward: bool = False) -> tuple[int, int]:
        """The packed row at which the first step taken begins, and the distance to the beginning of the next step."""
        return (run.start, run.rows) if self._ascends(backward) else (run.end - run.rows, -run.rows)

    def _ascends(self, backward: bool) -> bool:
        return (self.d == 0) is not backward

    def states_before(self, chunk: Sequence[Run], states: Tensor, initial: Tensor, out: Tensor) -> Tensor:
        """A state before each step of a chunk, after resets, from that after every step and the initial one.

        The result is `out`, in the order of the chunk's packed rows.
        """
        origin = min(run.start for run in chunk)
        for run in chunk:
            rows, start, end = run.rows, run.start - origin, run.end - origin
            if self.d == 0:
                continued, neighbour, first = min(run.rows_before, rows), run.start - run.rows_before, start
                out[start + rows : end] = states[run.start : run.end - rows]
            else:
                continued, neighbour, first = run.rows_after, run.end, end - rows
                out[start : end - rows] = states[run.start + rows : run.end]
            out[first : first + continued] = states[neighbour : neighbour + continued]
            out[first + continued : first + rows] = initial[continued:rows]
        if self.call.resets is not None:
            out.masked_fill_(self.call.resets[self.d, origin : origin + len(out), None], 0)
        return out

    def input_product(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """W_ih · x for some steps, float32 `[rows, G·H]`, normalised and shifted unless the norm is joint; and the
        product before its norm, which is the same tensor if the plan has no norm on it."""
        if "gain_ih" not in self.parameters:
            x = reference.input_product(self.call.layer, input, self.parameters).view(-1, self.width)
            return x, x
        product = F.linear(input, self.parameters["weight_ih"], self.parameters.get("bias_inner"))
        x = torch.empty_like(product, dtype=torch.float32)
        rows, BH = len(product), block(self.H)
        BM = rows_per_program(BH)
        launch(
            rows_forward, programs(rows, BM), BM * BH,
            V=product, GAIN=self.parameters["gain_ih"], SHIFT=self.parameters.get("bias_ih"), OUT=x, rows=rows,
            plan=self.plan, BM=BM, BH=BH,
        )  # fmt: skip
        return x, product

    def norm_sums(
        self, v: Tensor, gain: Tensor, d: Tensor, addend: Tensor | None = None, d_v: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The gradients of gain and shift of the norm of `v` (+ `addend`), from the gradient `d` of its result; and
        `d_v`, unless None, is filled with the gradient of `v`."""
        gates = v.shape[1] // self.H
        BH = block(self.H)
        BM = rows_per_program(BH)
        sums = v.new_empty(2, programs(len(v), STRIP), v.shape[1], dtype=torch.float32)
        launch(
            rows_backward, sums.shape[1], BM * BH,
            V=v, ADDEND=addend, GAIN=gain, D=d, D_V=d_v, D_GAIN=sums[0], D_SHIFT=sums[1], rows=len(v), STRIP=STRIP,
            plan=self.plan, spans=self.plan.spans if gates > 1 else ((0, 1),), G=gates, BM=BM, BH=BH,
        )  # fmt: skip
        d_gain, d_shift = sums.sum(1)
        return d_gain, d_shift
