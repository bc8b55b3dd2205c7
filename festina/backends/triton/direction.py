"""One direction of a call: parameters as kernels take them, steps in chunks and runs, products over time."""

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
"""Rows over which one program adds up the gradients of gain and shift."""


LOOP_BYTES = 16 << 10 if torch.version.hip else 32 << 10
"""How large a gate's part of W_hh may be, padded to a block, for the whole recurrence to be one launch: up to
H = 128 in bfloat16 and float16, 64 in float32, and 64 on AMD, which has less shared memory. Beyond, programs spill."""

CHUNK_BYTES = 64 << 20
"""About how much is held of pre-activations and their gradients at a time."""


@dataclass(frozen=True)
class Run:
    """Consecutive steps of equally many rows; and how many rows the step before them and the one after them have."""

    start: int
    rows: int
    steps: int
    before: int
    after: int

    @property
    def end(self) -> int:
        """Past the last row."""
        return self.start + self.rows * self.steps


def chunked(sizes: Sequence[int], most: int) -> list[list[Run]]:
    """All steps as runs, and as many runs together as have at most `most` rows (or are one step).

    >>> [[(run.start, run.rows, run.steps) for run in chunk] for chunk in chunked([3, 3, 2, 1], 8)]
    [[(0, 3, 2), (6, 2, 1)], [(8, 1, 1)]]
    """
    chunks: list[list[Run]] = []
    start, t, room = 0, 0, 0
    while t < len(sizes):
        rows = sizes[t]
        if rows > room:
            chunks.append([])
            room = max(most, rows)
        end = t + 1
        while end < len(sizes) and sizes[end] == rows and rows * (end + 1 - t) <= room:
            end += 1
        before, after = sizes[t - 1] if t else 0, sizes[end] if end < len(sizes) else 0
        chunks[-1].append(Run(start, rows, end - t, before, after))
        start, t, room = start + rows * (end - t), end, room - rows * (end - t)
    return chunks


@dataclass(frozen=True)
class Gradients:
    """What goes along on the way back through the steps of a direction.

    Args:
        output: of this direction's part of the output, rows `out_width` apart; None for zeros.
        h, c: of the states, float32 `[B, ...]`, overwritten from step to step.
        q: `[B, P]`, the last product d_p · W_hh, where it is not yet in h.
    """

    output: Tensor | None
    h: Tensor
    c: Tensor | None
    q: Tensor

    @property
    def out_width(self) -> int:
        """How far apart the rows of the output are."""
        return 0 if self.output is None else self.output.stride(0)


class Direction:
    """Direction `d` of a call, ready for kernels."""

    def __init__(self, call: Call, d: int) -> None:
        self.call, self.d = call, d
        self.p = {name: tensor.contiguous() for name, tensor in call.of_direction(d).items()}
        self.B, self.P = call.h_0.shape[1:]
        self.H = self.p["weight_ih"].shape[0] // len(call.layer.cell.gates)
        self.plan = Plan.of(call.layer, self.H, self.P)
        self.width = self.plan.G * self.H
        side = ("gain_joint", "bias_joint") if self.plan.is_joint else ("gain_hh", "bias_hh")
        self.weights = Weights(*map(self.p.get, ("weight_hh", "weight_hr", *side, "gain_c", "bias_c")))
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
        self._most = CHUNK_BYTES // (16 * self.width)  # x, p and their gradients in float32

    def _flags(self, flags: Tensor | None) -> Tensor | None:
        return None if flags is None else flags[self.d].contiguous().view(torch.uint8)

    def transposed(self, name: str) -> Tensor | None:
        """A weight matrix as the products of a forward loop read it: row by row; a vector as it is."""
        if name in self.p and name not in self._transposed:
            weight = self.p[name]
            self._transposed[name] = weight.t().contiguous() if weight.dim() == 2 else weight
        return self._transposed.get(name)

    def chunks(self, backward: bool = False) -> Iterator[list[Run]]:
        """Chunks, and their runs, in the order in which this direction takes them or comes back through them."""
        chunks = chunked(self.call.sizes(), self._most)
        return iter(chunks) if self._ascends(backward) else ([*reversed(chunk)] for chunk in reversed(chunks))

    def places(self, run: Run, backward: bool = False) -> tuple[int, int]:
        """Where the step that is taken first has its first row, and how far it is from one step to the next."""
        return (run.start, run.rows) if self._ascends(backward) else (run.end - run.rows, -run.rows)

    def _ascends(self, backward: bool) -> bool:
        return (self.d == 0) is not backward

    def before(self, chunk: Sequence[Run], output: Tensor, first: Tensor, out: Tensor) -> Tensor:
        """What a state was before each step of a chunk, after resets, put into `out` in the chunk's order.

        `output` is the state after every step, `first` the initial one.
        """
        lo = min(run.start for run in chunk)
        for run in chunk:
            rows, start, end = run.rows, run.start - lo, run.end - lo
            if self.d == 0:
                joined, near, edge = min(run.before, rows), run.start - run.before, start
                out[start + rows : end] = output[run.start : run.end - rows]
            else:
                joined, near, edge = run.after, run.end, end - rows
                out[start : end - rows] = output[run.start + rows : run.end]
            out[edge : edge + joined] = output[near : near + joined]
            out[edge + joined : edge + rows] = first[joined:rows]
        if self.call.resets is not None:
            out.masked_fill_(self.call.resets[self.d, lo : lo + len(out), None], 0)
        return out

    def project(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """What x gives to some steps, float32 `[rows, G·H]`, normalised unless the norm is joint; and before that."""
        if "gain_ih" not in self.p:
            x = reference.project(self.call.layer, input, self.p).view(-1, self.width)
            return x, x
        raw = F.linear(input, self.p["weight_ih"], self.p.get("bias_inner"))
        x = torch.empty_like(raw, dtype=torch.float32)
        BH = block(self.H)
        BM = rows_per_program(BH)
        launch(
            rows_forward, programs(len(raw), BM), BM * BH,
            V=raw, GAIN=self.p["gain_ih"], SHIFT=self.p.get("bias_ih"), OUT=x, rows=len(raw),
            plan=self.plan, BM=BM, BH=BH,
        )  # fmt: skip
        return x, raw

    def norm_sums(
        self, v: Tensor, gain: Tensor, d: Tensor, addend: Tensor | None = None, d_v: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Gradients of gain and shift of the norm of `v` (+ `addend`), from `d`, that of its result; and d_v if given."""
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
