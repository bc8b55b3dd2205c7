"""The host's side of both passes: products and sums over time, chunk by chunk, around the steps that a tier takes.

Nothing here waits for the device. Of a forward pass only h and c are kept: backward makes the pre-activations of a
chunk again, with two products over all its steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from festina.backends.triton import loop_tier, step_tier
from festina.backends.triton.direction import Direction, Gradients, Run
from festina.backends.triton.step import Chunk
from festina.call import Call, Outputs


def tier(direction: Direction) -> ModuleType:
    """The module that takes the steps of a run, forward and backward."""
    return loop_tier if direction.is_loop else step_tier


def scope(call: Call) -> AbstractContextManager[object]:
    """Launches go to the device of the tensors; types are as the call has them."""
    stack = ExitStack()
    stack.enter_context(torch.no_grad())
    if call.input.is_cuda:
        stack.enter_context(torch.cuda.device(call.input.device))
    stack.enter_context(torch.autocast(call.input.device.type, enabled=False))
    return stack


def extent(chunk: Sequence[Run]) -> slice:
    """The rows of a chunk among all packed steps."""
    return slice(min(run.start for run in chunk), max(run.end for run in chunk))


def forward(call: Call, c: Tensor | None) -> Outputs:
    """Both directions; `c` `[D, N, H]`, if given, is filled with c after every step."""
    D, _, P = call.h_0.shape
    input = call.input.contiguous()
    output = input.new_empty(len(input), D * P)
    h_n = call.h_0.clone(memory_format=torch.contiguous_format)
    c_n = None if call.c_0 is None else call.c_0.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    with scope(call):
        for d in range(D):
            direction = Direction(call, d)
            for chunk in direction.chunks():
                here = extent(chunk)
                x, _ = direction.project(input[here])
                for run in chunk:
                    tier(direction).forward(
                        direction, run, x, run.start - here.start, h_n[d], None if c_n is None else c_n[d],
                        output[:, d * P :], None if c is None else c[d],
                    )  # fmt: skip
    return Outputs(output, h_n, None if c_n is None else c_n.to(input.dtype))


def gradient_of(state: Tensor, last: Tensor | None) -> Tensor:
    """A float32 copy of the last state's gradient, zeros if there is none: it becomes that of the first state."""
    start = state.new_zeros(state.shape, dtype=torch.float32)
    return start if last is None else start.copy_(last)


def backward(
    call: Call,
    output: Tensor,
    c: Tensor | None,
    d_outputs: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """The wanted gradients of `call.tensors()`, from those of output, h_n and c_n."""
    D, _, P = call.h_0.shape
    d_output, d_h_n, d_c_n = d_outputs
    d_output = None if d_output is None else d_output.contiguous()
    d_h = gradient_of(call.h_0, d_h_n)
    d_c = None if call.c_0 is None else gradient_of(call.c_0, d_c_n)
    d_input = torch.zeros_like(call.input, memory_format=torch.contiguous_format) if wanted[0] else None
    d_parameters: list[Tensor] = []
    names = call.layer.parameter_names
    parameters_wanted = wanted[1 + len(call.state) :]
    with scope(call):
        for d in range(D):
            of_direction = Backward(
                Direction(call, d),
                output[:, d * P : (d + 1) * P],
                None if c is None else c[d],
                Gradients(
                    None if d_output is None else d_output[:, d * P :],
                    d_h[d],
                    None if d_c is None else d_c[d],
                    torch.zeros_like(call.h_0[d], memory_format=torch.contiguous_format),
                ),
                d_input,
                {name for name, want in zip(names, parameters_wanted[d * len(names) :]) if want},
            )
            d_parameters += of_direction.run()
    found = [d_input, d_h, *([] if d_c is None else [d_c]), *d_parameters]
    return [
        None if not want or gradient is None else gradient.to(tensor.dtype)
        for tensor, gradient, want in zip(call.tensors(), found, wanted, strict=True)
    ]


class Backward:
    """The way back through one direction: gradients of states and input in place, those of parameters in a table."""

    def __init__(
        self,
        direction: Direction,
        output: Tensor,
        c: Tensor | None,
        gradients: Gradients,
        d_input: Tensor | None,
        wanted: set[str],
    ) -> None:
        self.direction, self.output, self.c, self.gradients = direction, output, c, gradients
        self.d_input, self.wanted = d_input, wanted
        call = direction.call
        self.input = call.input.contiguous()
        self.first_h = call.h_0[direction.d]
        self.first_c = None if call.c_0 is None else call.c_0[direction.d]
        self.sums: dict[str, Tensor] = {}

    def run(self) -> list[Tensor]:
        """The gradients of the parameters, in their order; zeros where one is not wanted."""
        direction = self.direction
        for chunk in direction.chunks(backward=True):
            here = extent(chunk)
            buffers, raw = self.buffers(chunk, here)
            for run in chunk:
                tier(direction).backward(direction, run, buffers, run.start - here.start, self.gradients)
            self.collect(here, buffers, raw)
        self.gradients.h.add_(self.gradients.q)
        return [self.sums.get(name, torch.zeros_like(tensor)) for name, tensor in direction.p.items()]

    def buffers(self, chunk: Sequence[Run], here: slice) -> tuple[Chunk, Tensor]:
        """What the steps of a chunk need and fill; and what the norm of x took."""
        direction, plan = self.direction, self.direction.plan
        rows = here.stop - here.start
        new, wide = self.input.new_empty, partial(self.input.new_empty, dtype=torch.float32)
        h = direction.before(chunk, self.output, self.first_h, new(rows, direction.P))
        c = None
        if self.c is not None and self.first_c is not None:
            c = direction.before(chunk, self.c, self.first_c, wide((rows, direction.H)))
        x, raw = direction.project(self.input[here])
        p = None if plan.is_diagonal else torch.mm(h, direction.p["weight_hh"].t())
        d_x: Tensor | None = x
        has_resets = direction.around.resets is not None  # they part d_p from the gradients of x and of the shift
        if plan.is_joint:  # the norm's own gradients need x + p once more
            d_x = torch.empty_like(x) if has_resets else None
        return Chunk(
            x=x,
            d_x=d_x,
            p=p,
            h=h,
            c=c,
            d_a=wide((rows, direction.width)) if plan.has_hh_norm or has_resets else None,
            d_p=p if p is not None and not plan.has_hh_norm else new(rows, direction.width),
            d_seen=wide((rows, direction.H)) if plan.has_c_norm else None,
            unprojected=new(rows, direction.H) if plan.is_projected else None,
            d_q=new(rows, direction.P) if plan.is_projected else None,
        ), raw

    def collect(self, here: slice, chunk: Chunk, raw: Tensor) -> None:
        """What the steps of a chunk left, added to the gradients of parameters and put into that of the input."""
        direction, p = self.direction, self.direction.p
        d_x = chunk.d_p if chunk.d_x is None else chunk.d_x
        if "gain_joint" in p:
            sums = direction.norm_sums(chunk.x, p["gain_joint"], chunk.d_a, addend=chunk.p)
            self.add(("gain_joint", "bias_joint"), sums)
        if "gain_hh" in p:
            self.add(("gain_hh", "bias_hh"), direction.norm_sums(chunk.p, p["gain_hh"], chunk.d_a))
        elif "bias_hh" in p:
            d_a = chunk.d_p if chunk.d_a is None else chunk.d_a
            self.add(["bias_hh"], [d_a.sum(0, dtype=torch.float32)])
        if "gain_ih" in p:
            self.add(("gain_ih", "bias_ih"), direction.norm_sums(raw, p["gain_ih"], d_x, d_v=d_x))
        elif "bias_ih" in p:
            self.add(["bias_ih"], [d_x.sum(0, dtype=torch.float32)])
        if "gain_c" in p:
            self.add(("gain_c", "bias_c"), direction.norm_sums(chunk.c, p["gain_c"], chunk.d_seen))
        if "bias_inner" in p:
            self.add(["bias_inner"], [d_x.sum(0, dtype=torch.float32)])

        input, d_x = self.input[here], d_x.to(self.input.dtype)
        if "weight_ih" in self.wanted:
            self.add(["weight_ih"], [d_x.t() @ input])
        if "weight_hh" in self.wanted:
            diagonal = direction.plan.is_diagonal
            self.add(["weight_hh"], [(chunk.d_p * chunk.h).sum(0) if diagonal else chunk.d_p.t() @ chunk.h])
        if "weight_hr" in self.wanted:
            self.add(["weight_hr"], [chunk.d_q.t() @ chunk.unprojected])
        if self.d_input is not None:
            self.d_input[here] += d_x @ p["weight_ih"]

    def add(self, names: Sequence[str], gradients: Sequence[Tensor]) -> None:
        """Add to the gradients of parameters, in float32; those that are not wanted are left out."""
        for name, gradient in zip(names, gradients, strict=True):
            if name in self.wanted:
                self.sums[name] = self.sums[name] + gradient if name in self.sums else gradient.float()
