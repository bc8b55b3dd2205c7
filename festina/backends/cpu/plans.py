"""What calls of one layer and shape have in common: the core's struct without its tensors, and how much memory they need."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from festina.backends.cpu import abi, signals
from festina.backends.cpu.cores import usable_cores
from festina.backends.cpu.memory import POOL
from festina.call import Call
from festina.spec import LayerSpec

CACHE_LINE = 64
WORK_A_THREAD = 40_000
"""Multiplications; below, waking another thread takes longer than it saves."""
FEW_STEPS, FEW_ROWS = 8, 256
"""Training keeps panels between calls of fewer steps than this with at most this many rows in all, as a loop over a cell makes
them: filling panels would take about as long as such a call. Others fill them in their workspace."""
LONG = 100_000_000
"""Multiplications; below, a call ends before anyone waits for it, and signals can wait too."""
MOST_PLANS, MOST_IDLE_BYTES = 256, 256 << 10
"""At most this many plans are cached, and a plan keeps idle buffers only up to this size: one for each thread that ever ran
it beside others."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One kind of call.

    Args:
        struct: the core's struct as bytes, without tensors.
        places: the word of the struct for the address of each tensor: `operands`, then what the pass adds. A forward pass
            adds output, h_n, c_n and, in training, saved; backward adds output, saved, the gradients of output, h_n and
            c_n, and those of the operands from the input on.
        workspace, room: bytes that a pass works in, without and with panels; those that are kept lie apart.
        panels: bytes.
        keeps_panels: they serve later calls too.
        is_long: signals are handled meanwhile.
        saved_fixed, saved_per_row: training keeps `saved_fixed + N * saved_per_row` bytes.
        idle: what `fresh` made for earlier calls, if it is small. A call takes one out, has it alone, and puts it back.
    """

    struct: bytes
    places: tuple[int, ...]
    workspace: int
    room: int
    panels: int
    keeps_panels: bool
    saved_fixed: int
    saved_per_row: int
    is_long: bool
    idle: list[tuple[Any, Tensor]] = field(default_factory=list)


def multiplications(layer: LayerSpec, I: int, H: int, P: int) -> int:
    """Those of one step of one row in both products."""
    terms = I + (1 if layer.cell.diagonal else P)
    return len(layer.cell.gates) * H * terms * layer.directions


def threads_for(layer: LayerSpec, N: int, I: int, H: int, P: int) -> int:
    """How many of torch's threads a call is worth, at most one for each core: threads wait for one another at every step, and
    one without a core would keep all of them waiting."""
    work = multiplications(layer, I, H, P) * N
    most = min(torch.get_num_threads(), usable_cores(), abi.core().layout.constants["most_threads"])
    return max(1, min(most, work // WORK_A_THREAD))


def is_long(layer: LayerSpec, N: int, I: int, H: int, P: int) -> bool:
    """Whether a call may take some hundredths of a second or more. A step costs as much as 1000 multiplications at least."""
    return (multiplications(layer, I, H, P) + 1000) * N >= LONG


def short(dtype: torch.dtype) -> str:
    """The name of a dtype in the core: `float32`."""
    return str(dtype).removeprefix("torch.")


@cache
def constants(layer: LayerSpec) -> dict[str, Any]:
    """The fields of the struct that follow from the layer alone."""
    plan, values = layer.plan, abi.core().layout.values
    return {
        "cell": values["cell"][layer.step],
        "placement": values["placement"][plan.placement],
        "groups": values["groups"][plan.groups],
        "cell_norm": values["cell_norm"][plan.cell],
        "rms": int(plan.kind == "rms"),
        "directions": layer.directions,
        "eps": plan.eps,
        "clip": plan.clip or 0.0,
    }


@cache
def slots(layer: LayerSpec) -> tuple[int, ...]:
    """Where each of a call's parameters stands among those of the struct."""
    known = abi.core().layout.parameters
    return tuple(d * len(known) + known[name] for d in range(layer.directions) for name in layer.parameter_names)


@cache
def places(layer: LayerSpec, which: str) -> tuple[int, ...]:
    """`Plan.places` of a pass."""
    at, inputs = abi.core().at, ("input", "h_0", "c_0")

    def words(*names: str) -> list[int]:
        return [at[name] for name in names]

    taken = words("batch_sizes", "resets", "zoneout_mask", "zoneout_cell_mask", *inputs)
    taken += [at["parameters"] + slot for slot in slots(layer)]
    if which == abi.BACKWARD:
        given = words("output", "saved", "d_output", "d_h_n", "d_c_n", *("d_" + name for name in inputs))
        given += [at["d_parameters"] + slot for slot in slots(layer)]
    else:
        given = words("output", "h_n", "c_n", "saved")
    return (*taken, *given)


@lru_cache(maxsize=MOST_PLANS)
def make_plan(
    token: str,
    which: str,
    dtype: torch.dtype,
    input: torch.Size,
    h_0: torch.Size,
    weight_ih: torch.Size,
    T: int | None,
    has_masks: tuple[bool, bool],
    rates: tuple[float, float],
    threads: int,
    wanted: tuple[bool, ...],
    panel_type: str = abi.WHOLE,
) -> Plan:
    """The plan of calls to the layer of that token whose tensors have these shapes.

    Args:
        T: the length of `batch_sizes`; None if every row runs to the end.
        has_masks: of Zoneout on h and on c.
        threads: torch's; here for the sake of the cache alone.
        wanted: the gradients that backward computes, of input, states and parameters.
        panel_type: of the weights, in inference.
    """
    layer, core = LayerSpec.parse(token), abi.core()
    N, I = input
    _, B, P = h_0
    H = weight_ih[0] // len(layer.cell.gates)
    fields = dict(
        type=core.layout.values["type"][short(dtype)],
        threads=threads_for(layer, N, I, H, P),
        T=T if T is not None else N // B if B else 0,
        B=B,
        I=I,
        H=H,
        P=P,
        N=N,
        zoneout=rates[0],
        zoneout_cell=rates[1],
        has_zoneout=int(has_masks[0] or rates[0] != 0),
        has_zoneout_cell=int(has_masks[1] or rates[1] != 0),
        panel_type=core.layout.values["panel_type"][panel_type],
        **constants(layer),
    )
    fields["pass"] = core.layout.values["pass"][which]
    call, need = core.call(**fields), core.need()
    struct = bytes(call)
    # Sizes depend on which parameters and gradients there are: any address stands for those.
    for slot in slots(layer):
        call.parameters[slot] = CACHE_LINE
    names = ["d_input", "d_h_0", *(["d_c_0"] if "c" in layer.cell.states else [])]
    for name, want in zip(names, wanted):
        setattr(call, name, CACHE_LINE if want else None)
    for slot, want in zip(slots(layer), wanted[len(names) :]):
        call.d_parameters[slot] = CACHE_LINE if want else None
    if core.bytes(ctypes.byref(call), ctypes.byref(need)):
        raise core.error()
    workspace = -(-need.workspace // CACHE_LINE) * CACHE_LINE  # panels lie behind it
    keeps_panels = which == abi.INFERENCE or (fields["T"] < FEW_STEPS and N <= FEW_ROWS)
    return Plan(
        struct=struct,
        places=places(layer, which),
        workspace=workspace,
        room=workspace if keeps_panels else workspace + need.panels,
        panels=need.panels,
        keeps_panels=keeps_panels,
        saved_fixed=need.saved_fixed,
        saved_per_row=need.saved_per_row,
        is_long=is_long(layer, N, I, H, P),
    )


def plan_for(call: Call, which: str, wanted: tuple[bool, ...] = (), panel_type: str = abi.WHOLE) -> Plan:
    """The plan of one pass of a call. Of its parameters, the shape of the first counts."""
    batch = call.batch_sizes
    return make_plan(
        call.layer.token,
        which,
        call.input.dtype,
        call.input.shape,
        call.h_0.shape,
        call.parameters[0].shape,
        None if batch is None else batch.shape[0],
        (call.zoneout_mask is not None, call.zoneout_cell_mask is not None),
        (call.zoneout, call.zoneout_cell),
        torch.get_num_threads(),
        wanted,
        panel_type,
    )


def widths(layer: LayerSpec, parameters: Sequence[Tensor]) -> tuple[int, int]:
    """H and P, from the shapes of a layer's parameters."""
    H = int(parameters[0].shape[0]) // len(layer.cell.gates)
    return H, int(parameters[layer.parameter_names.index("weight_hr")].shape[0]) if layer.projected else H


def saved_bytes(call: Call) -> int:
    """Bytes that training leaves for backward. N, T and B may be symbolic: only the parameters' sizes count besides N."""
    layer, weight = call.layer, call.parameters[0]
    rows, I = map(int, weight.shape)
    _, P = widths(layer, call.parameters)
    plan = make_plan(
        layer.token,
        abi.TRAINING,
        call.input.dtype,
        torch.Size((1, I)),
        torch.Size((layer.directions, 1, P)),
        torch.Size((rows, I)),
        None,
        (call.zoneout_mask is not None, call.zoneout_cell_mask is not None),
        (call.zoneout, call.zoneout_cell),
        1,
        (),
    )
    return plan.saved_fixed + call.input.shape[0] * plan.saved_per_row


def operands(call: Call) -> tuple[Tensor | None, ...]:
    """The tensors of a call in the order of `Plan.places`."""
    return (
        *(call.batch_sizes, call.resets, call.zoneout_mask, call.zoneout_cell_mask),
        *(call.input, call.h_0, call.c_0, *call.parameters),
    )


def fresh(plan: Plan) -> tuple[Any, Tensor]:
    """The words of a struct without tensors, and the buffer for workspace and panels that it points to."""
    core, buffer = abi.core(), POOL.tensor(plan.room)
    words, address = core.words.from_buffer_copy(plan.struct), buffer.data_ptr()
    words[core.at["workspace"]], words[core.at["panels"]] = address, address + plan.workspace
    return words, buffer


def take(plan: Plan) -> tuple[Any, Tensor]:
    """What `fresh` makes, or made for an earlier call; `bind` overwrites the tensors of that."""
    try:
        return plan.idle.pop()
    except IndexError:
        return fresh(plan)


def give(plan: Plan, words: Any, buffer: Tensor) -> None:
    """Keep what a call took, for later ones."""
    if plan.room <= min(MOST_IDLE_BYTES, POOL.limit // MOST_PLANS):  # all plans together stay within the limit
        plan.idle.append((words, buffer))


def bind(plan: Plan, words: Any, tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """Write the addresses of tensors in the order of `plan.places`, 0 for None; the result is to be kept during the call.

    A tensor that is not contiguous is copied, and the copies are the result.
    """
    copies = []
    for place, tensor in zip(plan.places, tensors):
        if tensor is None:
            words[place] = 0
            continue
        if not tensor.is_contiguous():
            tensor = tensor.contiguous()
            copies.append(tensor)
        words[place] = tensor.data_ptr()
    return copies


def status_of(plan: Plan, function: Callable[..., int], words: Any, *rest: Any) -> int:
    """The status of `function(words, *rest)`, a call to the core; `signals.run` says what ends a long one."""
    return signals.run(function, words, *rest) if plan.is_long else function(words, *rest)


def carry_out(plan: Plan, tensors: Sequence[Tensor | None], run: Callable[[Any], None] | None = None) -> None:
    """Make a call of these tensors, by `run` or on panels in its workspace, and take its memory back."""
    words, buffer = take(plan)
    _copies = bind(plan, words, tensors)
    (run or partial(run_on, plan))(words)
    give(plan, words, buffer)


def run_on(plan: Plan, words: Any, panels: Tensor | None = None, has_panels: bool = False) -> None:
    """Make a call on `panels`, or on those in its workspace, which it fills unless `has_panels`."""
    core = abi.core()
    words[core.at["has_panels"]] = has_panels
    if panels is not None:
        words[core.at["panels"]] = panels.data_ptr()
    if status_of(plan, core.run, words):
        raise core.error()
