"""The host's side of both passes: products and sums over time, chunk by chunk, around the steps that a tier takes.

Nothing here waits for the device. A forward pass keeps h and c only: backward computes the pre-activations of a chunk
again, with two products over all its steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from festina.backends.triton import loop_tier, step_tier
from festina.backends.triton.direction import Direction, Gradients, Run, States
from festina.backends.triton.step import Chunk
from festina.call import Call, Outputs


def tier(direction: Direction) -> ModuleType:
    """The module that takes the steps of a run, forward and backward."""
    return loop_tier if direction.is_loop else step_tier


def scope(call: Call) -> AbstractContextManager[object]:
    """Launches go to the device of the tensors; autograd and autocast are off."""
    stack = ExitStack()
    stack.enter_context(torch.no_grad())
    if call.input.is_cuda:
        stack.enter_context(torch.cuda.device(call.input.device))
    stack.enter_context(torch.autocast(call.input.device.type, enabled=False))
    return stack


def extent_of(chunk: Sequence[Run]) -> slice:
    """The packed rows of a chunk."""
    return slice(min(run.start for run in chunk), max(run.end for run in chunk))


def forward(call: Call, c: Tensor | None) -> Outputs:
    """Both directions; `c` `[D, N, H]`, unless None, is filled with c after every step."""
    D, _, P = call.h_0.shape
    input = call.input.contiguous()
    output = input.new_empty(len(input), D * P)
    h_n = call.h_0.clone(memory_format=torch.contiguous_format)
    c_n = None if call.c_0 is None else call.c_0.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    with scope(call):
        for d in range(D):
            direction = Direction(call, d)
            states = States(
                output=output[:, d * P :],
                h=h_n[d],
                c=None if c_n is None else c_n[d],
                every_c=None if c is None else c[d],
            )
            for chunk in direction.chunks():
                extent = extent_of(chunk)
                x, _ = direction.input_product(input[extent])
                for run in chunk:
                    tier(direction).forward(direction, run, x, extent.start, states)
    return Outputs(output, h_n, None if c_n is None else c_n.to(input.dtype))


def gradient_of(state: Tensor, last: Tensor | None) -> Tensor:
    """A float32 copy of the gradient of the last state, or zeros; backward turns it into that of the initial state."""
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
                    output=None if d_output is None else d_output[:, d * P :],
                    h=d_h[d],
                    c=None if d_c is None else d_c[d],
                    pending=torch.zeros_like(call.h_0[d], memory_format=torch.contiguous_format),
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
    """Backward of one direction: the gradients of states and input in place, those of parameters in `sums`."""

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
        self.h_0 = call.h_0[direction.d]
        self.c_0 = None if call.c_0 is None else call.c_0[direction.d]
        self.sums: dict[str, Tensor] = {}

    def run(self) -> list[Tensor]:
        """The gradients of the parameters, in their order; zeros for those that are not wanted."""
        direction = self.direction
        for chunk in direction.chunks(backward=True):
            extent = extent_of(chunk)
            buffers, input_product = self.buffers(chunk, extent)
            for run in chunk:
                tier(direction).backward(direction, run, buffers, extent.start, self.gradients)
            self.collect(extent, buffers, input_product)
        self.gradients.h.add_(self.gradients.pending)
        return [self.sums.get(name, torch.zeros_like(tensor)) for name, tensor in direction.parameters.items()]

    def buffers(self, chunk: Sequence[Run], extent: slice) -> tuple[Chunk, Tensor]:
        """The tensors that the steps of a chunk read and write; and the input product before its norm."""
        direction, plan = self.direction, self.direction.plan
        rows = extent.stop - extent.start
        empty, empty_float32 = self.input.new_empty, partial(self.input.new_empty, dtype=torch.float32)
        h = direction.states_before(chunk, self.output, self.h_0, empty(rows, direction.P))
        c = None
        if self.c is not None and self.c_0 is not None:
            c = direction.states_before(chunk, self.c, self.c_0, empty_float32((rows, direction.H)))
        x, input_product = direction.input_product(self.input[extent])
        p = None if plan.is_diagonal else torch.mm(h, direction.parameters["weight_hh"].t())
        d_x: Tensor | None = x
        has_resets = direction.around.resets is not None  # then d_p differs from the gradients of x and of the shift
        if plan.is_joint:  # x + p is needed again, for the gradients of the norm's parameters
            d_x = torch.empty_like(x) if has_resets else None
        return Chunk(
            x=x,
            d_x=d_x,
            p=p,
            h=h,
            c=c,
            d_a=empty_float32((rows, direction.width)) if plan.has_hh_norm or has_resets else None,
            d_p=p if p is not None and not plan.has_hh_norm else empty(rows, direction.width),
            d_seen=empty_float32((rows, direction.H)) if plan.has_c_norm else None,
            unprojected=empty(rows, direction.H) if plan.is_projected else None,
            d_projected=empty(rows, direction.P) if plan.is_projected else None,
        ), input_product

    def collect(self, extent: slice, chunk: Chunk, input_product: Tensor) -> None:
        """Add the gradients that the steps of a chunk left to those of parameters and input."""
        direction, parameters = self.direction, self.direction.parameters
        d_x = chunk.d_p if chunk.d_x is None else chunk.d_x
        if "gain_joint" in parameters:
            sums = direction.norm_sums(chunk.x, parameters["gain_joint"], chunk.d_a, addend=chunk.p)
            self.add(("gain_joint", "bias_joint"), sums)
        if "gain_hh" in parameters:
            self.add(("gain_hh", "bias_hh"), direction.norm_sums(chunk.p, parameters["gain_hh"], chunk.d_a))
        elif "bias_hh" in parameters:
            d_a = chunk.d_p if chunk.d_a is None else chunk.d_a
            self.add(["bias_hh"], [d_a.sum(0, dtype=torch.float32)])
        if "gain_ih" in parameters:
            sums = direction.norm_sums(input_product, parameters["gain_ih"], d_x, d_v=d_x)
            self.add(("gain_ih", "bias_ih"), sums)
        elif "bias_ih" in parameters:
            self.add(["bias_ih"], [d_x.sum(0, dtype=torch.float32)])
        if "gain_c" in parameters:
            self.add(("gain_c", "bias_c"), direction.norm_sums(chunk.c, parameters["gain_c"], chunk.d_seen))
        if "bias_inner" in parameters:
            self.add(["bias_inner"], [d_x.sum(0, dtype=torch.float32)])

        input, d_x = self.input[extent], d_x.to(self.input.dtype)
        if "weight_ih" in self.wanted:
            self.add(["weight_ih"], [d_x.t() @ input])
        if "weight_hh" in self.wanted:
            is_diagonal = direction.plan.is_diagonal
            self.add(["weight_hh"], [(chunk.d_p * chunk.h).sum(0) if is_diagonal else chunk.d_p.t() @ chunk.h])
        if "weight_hr" in self.wanted:
            self.add(["weight_hr"], [chunk.d_projected.t() @ chunk.unprojected])
        if self.d_input is not None:
            self.d_input[extent] += d_x @ parameters["weight_ih"]

    def add(self, names: Sequence[str], gradients: Sequence[Tensor]) -> None:
        """Add to the gradients of parameters, in float32, those that are wanted."""
        for name, gradient in zip(names, gradients, strict=True):
            if name in self.wanted:
                self.sums[name] = self.sums[name] + gradient if name in self.sums else gradient.float()
