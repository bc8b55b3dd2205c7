"""The host's side of both passes: products and sums over time, chunk by chunk, around the steps that a tier takes.

Nothing here waits for the device. A forward pass keeps h and c, and a team its statistics: backward computes the
pre-activations of a chunk again, with two products over all its steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from festina.backends.triton import one_launch, step_tier
from festina.backends.triton.direction import Direction
from festina.backends.triton.norm import NO_ROWS, Rows
from festina.backends.triton.runs import Run
from festina.backends.triton.setup import Setup, setup_of
from festina.backends.triton.step import Chunk
from festina.call import Call, Outputs

NOTHING = nullcontext()


def scope(call: Call, setup: Setup) -> AbstractContextManager[object]:
    """Launches go to the device of the tensors; autograd and autocast are off."""
    index, kind = setup.kernels.index, call.input.device.type
    elsewhere = index is not None and torch.cuda.current_device() != index
    if not (elsewhere or torch.is_grad_enabled() or torch.is_autocast_enabled(kind)):
        return NOTHING
    stack = ExitStack()
    stack.enter_context(torch.no_grad())
    stack.enter_context(torch.autocast(kind, enabled=False))
    if elsewhere:
        stack.enter_context(torch.cuda.device(index))
    return stack


def extent_of(chunk: Sequence[Run]) -> slice:
    """The packed rows of a chunk."""
    return slice(min(run.start for run in chunk), max(run.end for run in chunk))


def groups(call: Call, setup: Setup) -> list[list[Direction]]:
    """The directions, those together that one launch takes."""
    directions = [Direction(call, setup, d) for d in range(call.layer.directions)]
    is_together = setup.is_full and setup.tier.forward is not None
    return [directions] if is_together else [[direction] for direction in directions]


class States(NamedTuple):
    """What the forward steps of a direction read and write. Tensors begin with that direction, and may go on.

    Args:
        h_0, c_0: the states that come in, `[B, ...]`; c_0 is None if the cell has none.
        h, c: the states that go out; the same tensors as those that come in, unless one launch takes all steps.
        every_c, stats: `[N, H]` and `[N, statistics, 2]`, filled at every step; None if they are not wanted.
        output: `[N, P]`, rows `out_width` apart.
    """

    h_0: Any
    c_0: Tensor | None
    h: Any
    c: Tensor | None
    every_c: Tensor | None
    stats: Tensor | None
    output: Any
    out_width: int


class Gradients(NamedTuple):
    """The gradients that backward steps of a direction read and write. Tensors begin with that direction, and may go on.

    Args:
        h_n, c_n: of the last states, `[B, ...]`; None for zeros.
        h, c: of the initial states; the same tensors as `h_n` and `c_n`, unless one launch takes all steps.
        stats: what forward steps kept; None if they kept none.
        output: `[N, P]`, rows `out_width` apart; None, and a distance of 0, for zeros.
    """

    h_n: Tensor | None
    c_n: Tensor | None
    h: Any
    c: Tensor | None
    stats: Tensor | None
    output: Tensor | None
    out_width: int


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in a dtype."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def of(tensor: Any, d: int) -> Any:
    """Direction `d` of a tensor `[D, ...]`, as kernels take it: they ask for its address alone, and an index costs time."""
    return tensor if tensor is None or d == 0 else tensor[d]


def columns_of(tensor: Any, d: int, P: int) -> Any:
    """Direction `d` of a tensor `[N, D·P]`, likewise: its rows keep their distance."""
    return tensor if tensor is None or d == 0 else tensor[:, d * P :]


def forward(call: Call, c: Tensor | None = None, stats: Tensor | None = None) -> Outputs:
    """Both directions; `c` `[D, N, H]` and `stats` `[D, N, statistics, 2]`, unless None, are filled at every step."""
    setup = setup_of(call)
    input, h_0 = call.input.contiguous(), call.h_0.contiguous()
    c_0 = None if call.c_0 is None else call.c_0.contiguous()
    with scope(call, setup):
        try:
            return _forward(call, setup, input, h_0, c_0, c, stats)
        except one_launch.Refused as refused:
            setup.kernels.refused[setup.ruled] = str(refused)
            return _forward(call, setup, input, h_0, c_0, c, stats)


def _forward(
    call: Call, setup: Setup, input: Tensor, h_0: Tensor, c_0: Tensor | None, c: Tensor | None, stats: Tensor | None
) -> Outputs:
    D, _, P = h_0.shape
    if not setup.tier.is_team:
        stats = None
    output = input.new_empty(input.shape[0], D * P)
    is_one_launch = setup.tier.forward is not None
    once = setup.is_full and is_one_launch and len(setup.forward_chunks) == 1
    h_n, c_n = torch.empty_like(h_0), None
    if c_0 is not None:
        c_n = torch.empty_like(c_0, dtype=c_0.dtype if once else torch.float32)
    if not once:  # the states lie in one place, c in float32, from step to step
        h_0 = h_n.copy_(h_0)
        c_0 = None if c_n is None or c_0 is None else c_n.copy_(c_0)
    of_both = (h_0, c_0, h_n, c_n, c, stats)
    for group in groups(call, setup):
        states = [
            States(*[of(tensor, d) for tensor in of_both], output=columns_of(output, d, P), out_width=D * P)  # type: ignore[misc]
            for d in (direction.d for direction in group)
        ]
        for chunks in zip(*(direction.chunks() for direction in group), strict=True):
            extents = [extent_of(chunk) for chunk in chunks]
            xs = [direction.input_product(input[extent])[0] for direction, extent in zip(group, extents)]
            for runs in zip(*chunks, strict=True):
                if is_one_launch:
                    one_launch.forward(group, runs, xs, [extent.start for extent in extents], states)
                else:
                    step_tier.forward(group[0], runs[0], xs[0], extents[0].start, states[0])
    return Outputs(output, h_n, None if c_n is None else cast(c_n, input.dtype))


def backward(
    call: Call,
    output: Tensor,
    c: Tensor | None,
    stats: Tensor | None,
    d_outputs: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """The wanted gradients of `call.tensors()`, from those of output, h_n and c_n."""
    setup = setup_of(call)
    if not setup.tier.is_team:
        stats = None
    with scope(call, setup):
        try:
            return _backward(call, setup, output, c, stats, d_outputs, wanted)
        except one_launch.Refused as refused:
            setup.kernels.refused[setup.ruled] = str(refused)
            return _backward(call, setup, output, c, None, d_outputs, wanted)


def begun(gradient: Tensor, last: Tensor | None) -> Tensor:
    """The gradient of an initial state, filled with that of the last one, from which steps go on."""
    return gradient.zero_() if last is None else gradient.copy_(last)


def _backward(
    call: Call,
    setup: Setup,
    output: Tensor,
    c: Tensor | None,
    stats: Tensor | None,
    d_outputs: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    P = call.h_0.shape[2]
    output = output.contiguous()
    d_output, d_h_n, d_c_n = (None if d is None else d.contiguous() for d in d_outputs)
    is_one_launch = setup.tier.forward is not None
    once = setup.is_full and is_one_launch and len(setup.backward_chunks) == 1
    dtype = call.input.dtype if once else torch.float32
    d_h = torch.empty_like(call.h_0, dtype=dtype, memory_format=torch.contiguous_format)
    d_c = None
    if call.c_0 is not None:
        d_c = torch.empty_like(call.c_0, dtype=dtype, memory_format=torch.contiguous_format)
    if not once:  # the gradients of the states lie in one place, in float32, from step to step
        d_h_n, d_c_n = begun(d_h, d_h_n), None if d_c is None else begun(d_c, d_c_n)
    names = call.layer.parameter_names
    parameters_wanted = wanted[1 + len(call.state) :]
    d_input = None
    if wanted[0]:  # two directions add to each row, in any order
        like = torch.zeros_like if call.layer.directions > 1 else torch.empty_like
        d_input = like(call.input, memory_format=torch.contiguous_format)
    of_both = (d_h_n, d_c_n, d_h, d_c, stats)
    width = 0 if d_output is None else d_output.shape[1]
    by_direction: list[Backward] = []
    for group in groups(call, setup):
        passes = []
        for direction in group:
            d = direction.d
            gradients = Gradients(
                *[of(tensor, d) for tensor in of_both], output=columns_of(d_output, d, P), out_width=width
            )  # type: ignore[misc]
            asked = {name for name, want in zip(names, parameters_wanted[d * len(names) :]) if want}
            passes.append(Backward(direction, columns_of(output, d, P), of(c, d), gradients, d_input, asked))
        for chunks in zip(*(direction.chunks(backward=True) for direction in group), strict=True):
            for one, chunk in zip(passes, chunks):
                one.begin(chunk)
            for runs in zip(*chunks, strict=True):
                if is_one_launch:
                    one_launch.backward(group, runs, passes)
                else:
                    step_tier.backward(group[0], runs[0], passes[0])
            for one in passes:
                one.collect()
        for one in passes:
            one.finish()
        by_direction += passes
    found = [d_input, d_h, *([] if d_c is None else [d_c])]
    for one in by_direction:
        found += [one.sums.get(name) for name in names]
    tensors = call.tensors()
    return [
        None if not want else torch.zeros_like(tensor) if gradient is None else cast(gradient, tensor.dtype)
        for tensor, gradient, want in zip(tensors, found, wanted, strict=True)
    ]


class Backward:
    """Backward of one direction: the gradients of states and input in place, those of parameters in `sums`.

    `chunk` and `origin` are of the chunk that steps are in: its tensors, and the packed row at which it begins.
    """

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
        self.input = direction.call.input.contiguous()
        self.sums: dict[str, Tensor] = {}
        self.pending: Tensor | None = None  # of the step tier: the last product d_p · W_hh, not yet added to d_h

    def begin(self, runs: Sequence[Run]) -> None:
        """Prepare the tensors that the steps of a chunk read and write."""
        direction, plan, width = self.direction, self.direction.plan, self.direction.setup.width
        self.extent = extent = extent_of(runs)
        self.origin, rows = extent.start, extent.stop - extent.start
        empty, empty_float32 = self.input.new_empty, partial(self.input.new_empty, dtype=torch.float32)
        h, c = direction.states_before(runs, self.output, self.c)
        x, self.input_product = direction.input_product(self.input[extent])
        p = None if plan.is_diagonal else torch.mm(h, direction.parameters["weight_hh"].t())
        d_x: Tensor | None = x
        has_resets = direction.around.resets is not None  # then d_p differs from the gradients of x and of the shift
        if plan.is_joint:  # x + p is needed again, for the gradients of the norm's parameters
            d_x = torch.empty_like(x) if has_resets else None
        self.chunk = Chunk(
            x=x,
            d_x=d_x,
            p=p,
            h=h,
            c=c,
            d_a=empty_float32((rows, width)) if plan.has_hh_norm or has_resets else None,
            d_p=p if p is not None and not plan.has_hh_norm else empty((rows, width)),
            d_seen=empty_float32((rows, plan.H)) if plan.has_c_norm else None,
            unprojected=empty((rows, plan.H)) if plan.is_projected else None,
            d_projected=empty((rows, plan.P)) if plan.is_projected else None,
        )

    def collect(self) -> None:
        """Add the gradients that the steps of a chunk left to those of parameters and input."""
        direction, parameters, chunk = self.direction, self.direction.parameters, self.chunk
        input = self.input[self.extent]
        d_x = chunk.d_p if chunk.d_x is None else chunk.d_x
        is_product_wanted = self.d_input is not None or not self.wanted.isdisjoint({"weight_ih", "bias_inner"})
        d_product = d_x
        if "gain_ih" in parameters and is_product_wanted and d_x.dtype != input.dtype:
            d_product = torch.empty_like(d_x, dtype=input.dtype)
        asked = {key: not self.wanted.isdisjoint(pair) for key, pair in direction.setup.sums.items()}
        x = h = c = NO_ROWS
        if "gain_ih" in parameters and (asked["x"] or is_product_wanted):
            d_v = d_product if is_product_wanted else None
            x = Rows(D=d_x, V=self.input_product, ADDEND=None, GAIN=parameters["gain_ih"], D_V=d_v)
        elif asked.get("x"):
            x = Rows(D=d_x, V=None, ADDEND=None, GAIN=None, D_V=None)
        if asked.get("h"):
            d_a = chunk.d_p if chunk.d_a is None else chunk.d_a
            joint = "gain_joint" in parameters
            v = chunk.x if joint else chunk.p if "gain_hh" in parameters else None
            h = Rows(D=d_a, V=v, ADDEND=chunk.p if joint else None, GAIN=None, D_V=None)
        if asked.get("c"):
            c = Rows(D=chunk.d_seen, V=chunk.c, ADDEND=None, GAIN=None, D_V=None)
        if not (x is h is c):
            self.add(direction.row_sums(x, h, c))

        if is_product_wanted:
            d_product = cast(d_product, input.dtype)
        if "bias_inner" in self.wanted:
            self.add({"bias_inner": d_product.sum(0, dtype=torch.float32)})
        if "weight_ih" in self.wanted:
            self.add({"weight_ih": d_product.t() @ input})
        if "weight_hh" in self.wanted:
            is_diagonal = direction.plan.is_diagonal
            self.add({"weight_hh": (chunk.d_p * chunk.h).sum(0) if is_diagonal else chunk.d_p.t() @ chunk.h})
        if "weight_hr" in self.wanted:
            self.add({"weight_hr": chunk.d_projected.t() @ chunk.unprojected})
        if self.d_input is not None:
            d_input = self.d_input[self.extent]
            if direction.call.layer.directions == 1:
                torch.mm(d_product, parameters["weight_ih"], out=d_input)
            else:
                d_input.addmm_(d_product, parameters["weight_ih"])

    def add(self, gradients: Mapping[str, Tensor]) -> None:
        """Add to the gradients of parameters, in float32 over several chunks, those that are wanted."""
        for name, gradient in gradients.items():
            if name in self.wanted:
                self.sums[name] = self.sums[name].float() + gradient if name in self.sums else gradient

    def finish(self) -> None:
        """After the last chunk."""
        if self.pending is not None:
            self.gradients.h.view(-1, self.direction.plan.P)[: len(self.pending)].add_(self.pending)
