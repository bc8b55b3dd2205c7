"""The compiled core as a backend: every cell and plan on the CPU in float32, float64 and bfloat16."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _is_any_autocast_enabled

from festina.backends import core
from festina.backends.pool import POOL
from festina.call import Call, Case, Outputs
from festina.spec import LayerSpec

TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}
CELLS = ("lstm", "gru", "gru_joint", "indrnn", "indrnn_relu")
PLACEMENTS = ("none", "separate", "joint")
GROUPS = ("all", "gate", "gates|candidate")
CELL_NORMS = ("none", "readout", "carried")
CACHE_LINE = 64
MOST_THREADS = 256
STALE = 2
"""What `festina_run_panels` returns where the parameters are no longer those that were packed."""
_VERSION = attrgetter("_version")
MOST_READY = 8
"""Steps of so many kinds, by batch size most of all, are kept ready for one set of packed weights."""
MOST_READY_BYTES = 1 << 20
"""And only those that work in so little memory; a larger step takes long enough to be prepared anew."""
STEPS_WHOLE, BYTES_WHOLE = 8, 128 << 10
"""Before packed weights are used again, all of the parameters are read for calls of so many steps, or where they are so
small; else a few values of each, as all of them would take as long as a step."""
WORK_A_THREAD = 40_000
"""Multiplications; below, waking another thread takes longer than what it saves."""


@cache
def constants(layer: LayerSpec) -> dict[str, Any]:
    """The fields of the struct that follow from the layer alone."""
    plan = layer.plan
    return {
        "cell": CELLS.index(layer.step),
        "placement": PLACEMENTS.index(plan.placement),
        "groups": GROUPS.index(plan.groups),
        "cell_norm": CELL_NORMS.index(plan.cell),
        "rms": int(plan.kind == "rms"),
        "directions": layer.directions,
        "eps": plan.eps,
    }


@cache
def slots(layer: LayerSpec) -> tuple[int, ...]:
    """Where each of a call's parameters stands in the struct's pointers."""
    width = len(core.PARAMETERS)
    return tuple(
        d * width + core.PARAMETERS.index(name) for d in range(layer.directions) for name in layer.parameter_names
    )


def threads_for(N: int, I: int, H: int, P: int, directions: int) -> int:
    """How many of torch's threads a call is worth."""
    return max(1, min(torch.get_num_threads(), MOST_THREADS, 4 * H * (I + P) * N * directions // WORK_A_THREAD))


def has_zoneout(mask: Tensor | None, rate: float) -> bool:
    return mask is not None or rate != 0


def saved_bytes(call: Call) -> int:
    """Bytes that training leaves for backward; N may be symbolic."""
    N, I = call.input.shape
    H, P = call.parameters[0].shape[0] // len(call.layer.cell.gates), call.h_0.shape[2]
    rates = (call.zoneout, call.zoneout_cell)
    has = (has_zoneout(call.zoneout_mask, call.zoneout), has_zoneout(call.zoneout_cell_mask, call.zoneout_cell))
    need = template(call.layer, call.input.dtype, core.TRAINING, (0, 0, I, H, P, 0, 1), (*rates, *has))
    return need.saved_fixed + N * need.saved_per_row


class Pointers:
    """Addresses of contiguous tensors; keeps the copies that had to be made alive."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []

    def __call__(self, tensors: Iterable[Tensor | None]) -> list[int | None]:
        addresses: list[int | None] = []
        for tensor in tensors:
            if tensor is not None and not tensor.is_contiguous():
                tensor = tensor.contiguous()
                self.kept.append(tensor)
            addresses.append(None if tensor is None else tensor.data_ptr())
        return addresses


class Template(NamedTuple):
    """The struct without its tensors, as bytes: calls of one shape start from a copy. And the memory a forward pass needs."""

    struct: bytes
    packed: int
    saved_fixed: int
    saved_per_row: int
    workspace: int


@lru_cache(maxsize=256)
def template(
    layer: LayerSpec, dtype: torch.dtype, which: int, sizes: tuple[int, ...], rates: tuple[float, ...]
) -> Template:
    """What calls of one layer and shape have in common."""
    T, B, I, H, P, N, threads = sizes
    zoneout, zoneout_cell, has_h, has_c = rates
    args = core.FestinaCall(
        type=TYPES[dtype],
        threads=threads,
        T=T,
        B=B,
        I=I,
        H=H,
        P=P,
        N=N,
        zoneout=zoneout,
        zoneout_cell=zoneout_cell,
        has_zoneout=int(has_h),
        has_zoneout_cell=int(has_c),
        **{"pass": which},
        **constants(layer),
    )
    for slot in slots(layer):
        args.parameters[slot] = CACHE_LINE  # any address: sizes depend on which parameters there are
    need = bytes_of(args)
    return Template(bytes(args), need.panels, need.saved_fixed, need.saved_per_row, need.workspace)


def struct_of(call: Call, which: int, at: Pointers) -> tuple[core.FestinaCall, Template]:
    """The struct without outputs, buffers and gradients, and what it was made from."""
    layer = call.layer
    N, I = call.input.shape
    _, B, P = call.h_0.shape
    batch = call.batch_sizes
    T = batch.shape[0] if batch is not None else N // B if B else 0
    H = call.parameters[0].shape[0] // len(layer.cell.gates)
    sizes = (T, B, I, H, P, N, threads_for(N, I, H, P, layer.directions))
    has = (has_zoneout(call.zoneout_mask, call.zoneout), has_zoneout(call.zoneout_cell_mask, call.zoneout_cell))
    common = template(layer, call.input.dtype, which, sizes, (call.zoneout, call.zoneout_cell, *has))
    args = core.FestinaCall.from_buffer_copy(common.struct)
    args.batch_sizes, args.resets, args.zoneout_mask, args.zoneout_cell_mask, args.input, args.h_0, args.c_0 = at(
        (batch, call.resets, call.zoneout_mask, call.zoneout_cell_mask, call.input, call.h_0, call.c_0)
    )
    pointers = args.parameters
    for slot, address in zip(slots(layer), at(call.parameters)):
        pointers[slot] = address
    return args, common


def bytes_of(args: core.FestinaCall) -> core.FestinaBytes:
    need = core.FestinaBytes()
    core.check(core.functions().festina_bytes(args, need))
    return need


def carry_out(args: core.FestinaCall, **sizes: int) -> None:
    """Run the core; the struct's buffers of these names and sizes are borrowed for the call."""
    borrowed = []
    try:
        for name, size in sizes.items():
            borrowed.append(POOL.take(size))
            setattr(args, name, borrowed[-1][0])
        core.check(core.functions().festina_run(ctypes.addressof(args)))
    finally:
        for buffer in borrowed:
            POOL.give(*buffer)


def new_outputs(call: Call, args: core.FestinaCall) -> Outputs:
    output = call.input.new_empty(args.N, args.directions * args.P)
    h_n = torch.empty_like(call.h_0, memory_format=torch.contiguous_format)
    c_n = None if call.c_0 is None else torch.empty_like(call.c_0, memory_format=torch.contiguous_format)
    args.output, args.h_n = output.data_ptr(), h_n.data_ptr()
    if c_n is not None:
        args.c_n = c_n.data_ptr()
    return Outputs(output, h_n, c_n)


class Ready(NamedTuple):
    """A step that lacks only its tensors: a cell that is asked for one step after the other starts from here."""

    shapes: list[torch.Size]  # of the state
    args: core.FestinaCall
    run: Callable[[], int]
    workspace: Tensor


@dataclass(frozen=True)
class Packed:
    """Weights in the order of the kernels, and what tells whether they still are what the parameters hold.

    Args:
        marks: `marks_of` the parameters when they were packed.
        fingerprints: of a few values of each, and of all.
        sizes: of each in bytes, by slot.
        ready: steps for these weights by what they have in common; whoever takes one has it alone, until it is put back.
    """

    parameters: list[weakref.ref[Tensor]]
    marks: tuple[Any, ...]
    fingerprints: tuple[int, int]
    sizes: Any
    buffer: Tensor
    ready: dict[tuple[Any, ...], list[Ready]]

    def is_read_whole(self, T: int) -> bool:
        """All of the parameters are read to see whether they have changed, before a call of T steps."""
        return T >= STEPS_WHOLE or sum(self.sizes) <= BYTES_WHOLE

    def still_holds(self, args: core.FestinaCall) -> bool:
        """The parameters that `args` points to have the fingerprint of those that were packed."""
        is_whole = self.is_read_whole(args.T)
        same: bool = core.functions().festina_fingerprint(args, self.sizes, is_whole) == self.fingerprints[is_whole]
        return same

    def put_back(self, key: tuple[Any, ...], ready: Ready) -> None:
        """Keep a step for the next call that has `key`."""
        if ready.workspace.nbytes > MOST_READY_BYTES:
            return
        waiting = self.ready.get(key)
        if waiting is None:
            if len(self.ready) >= MOST_READY:
                self.ready.clear()
            waiting = self.ready[key] = []
        waiting.append(ready)


def marks_of(parameters: Sequence[Tensor]) -> tuple[Any, ...]:
    """What tells quickly that parameters are no longer what they were; nothing where no version could tell of a change.

    `p.data = other` changes an address alone, `p.data = p.data.t()` of a square not even that.
    """
    try:
        return (
            *map(_VERSION, parameters),
            *map(Tensor.data_ptr, parameters),
            *map(Tensor.is_contiguous, parameters),
        )
    except RuntimeError:  # tensors made in inference mode have no version, and some tensors no address
        return ()


class PackedCache:
    """Packed weights, one set for a layer and its parameters, dropped with any of them.

    A parameter counts as unchanged while it is the same object with the same marks and the same fingerprint. The
    fingerprint is there for writes through `.data`, which leave the version alone. docs/decisions/0004-packed-weights.md.
    """

    def __init__(self) -> None:
        self._found: dict[tuple[Any, ...], Packed] = {}

    def find(self, layer: LayerSpec, parameters: Sequence[Tensor], marks: tuple[Any, ...]) -> Packed | None:
        """What was packed of these parameters when they had these marks; whether it `still_holds` is left to ask."""
        found = self._found.get((layer.token, *map(id, parameters)))
        return found if found is not None and found.marks == marks else None

    def release(self) -> None:
        """Let go of the memory of steps that are ready."""
        for packed in list(self._found.values()):
            packed.ready.clear()

    def put(self, call: Call, marks: tuple[Any, ...], args: core.FestinaCall, buffer: Tensor) -> None:
        """Keep what was packed of parameters that had these marks, unless nothing could tell when one of them changes."""
        parameters, found = call.parameters, self._found
        if not marks or not all(p.is_contiguous() for p in parameters):
            return
        key = (call.layer.token, *map(id, parameters))
        placed = dict(zip(slots(call.layer), (p.nbytes for p in parameters)))
        sizes = core.Sizes(*(placed.get(slot, 0) for slot in range(2 * len(core.PARAMETERS))))
        few, every = (core.functions().festina_fingerprint(args, sizes, is_whole) for is_whole in (False, True))

        def drop(_: weakref.ref[Tensor]) -> None:  # comes before another object is given the id
            found.pop(key, None)

        found[key] = Packed([weakref.ref(p, drop) for p in parameters], marks, (few, every), sizes, buffer, {})


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Cpu:
    """Runs csrc/. What training keeps, and every workspace, comes from `POOL`."""

    name = "cpu"

    def __init__(self) -> None:
        self._packed = PackedCache()

    def can_run(self, case: Case) -> str | None:
        if case.device != "cpu":
            return f"it runs on cpu only, and the input is on {case.device}"
        if case.dtype not in TYPES:
            return f"it has no {short(case.dtype)}; use {', '.join(map(short, TYPES))}"
        return case.layer.rare or core.library().reason

    def isa(self) -> str | None:
        """The instruction set that the kernels use; None where there is no core."""
        return core.isa() if core.library().functions else None

    def release_memory(self) -> None:
        """Free the buffers that lie idle for later calls."""
        self._packed.release()
        POOL.release()

    def forward(self, call: Call) -> Outputs:
        at = Pointers()
        args, common = struct_of(call, core.INFERENCE, at)
        outputs = new_outputs(call, args)
        marks = marks_of(call.parameters)
        found = self._packed.find(call.layer, call.parameters, marks)
        args.has_panels = found is not None and found.still_holds(args)
        packed = found.buffer if found and args.has_panels else POOL.tensor(common.packed)
        args.panels = packed.data_ptr()
        carry_out(args, workspace=common.workspace)
        if not args.has_panels:
            self._packed.put(call, marks, args, packed)
        return outputs

    def step(
        self,
        *,
        layer: LayerSpec,
        parameters: Sequence[Tensor],
        input: Tensor,
        state: Sequence[Tensor],
        rates: tuple[float, float],
    ) -> list[Tensor] | None:
        found = self._packed.find(layer, parameters, marks_of(parameters))
        if found is None or not (input.is_cpu and input.is_contiguous()) or _is_any_autocast_enabled():
            return None
        dtype = input.dtype
        key = (input.shape, dtype, rates, torch.get_num_threads())
        ready: Ready | None
        try:
            ready = found.ready[key].pop()
        except LookupError:
            ready = self._make_ready(layer, parameters, input, rates, found)
        if ready is None or len(state) != len(ready.shapes):
            return None
        for tensor, shape in zip(state, ready.shapes):
            if tensor.shape != shape or tensor.dtype != dtype or not (tensor.is_cpu and tensor.is_contiguous()):
                return None
        args, (h_0, *c_0) = ready.args, state
        outputs = [*map(torch.empty_like, state)]
        args.input, args.h_0 = input.data_ptr(), h_0.data_ptr()
        args.output = args.h_n = outputs[0].data_ptr()  # the output of one step is the new h
        if c_0:
            args.c_0, args.c_n = c_0[0].data_ptr(), outputs[1].data_ptr()
        if status := ready.run():
            if status != STALE:
                core.check(status)
            return None
        found.put_back(key, ready)
        return outputs

    def _make_ready(
        self,
        layer: LayerSpec,
        parameters: Sequence[Tensor],
        input: Tensor,
        rates: tuple[float, float],
        found: Packed,
    ) -> Ready | None:
        """What steps of these sizes have in common; None for what is refused."""
        if input.dim() != 2:
            return None
        B, I = input.shape
        weight = parameters[0]
        is_fit = B > 0 and weight.shape[1] == I and all(p.dtype == input.dtype and p.is_cpu for p in parameters)
        if not is_fit or self.can_run(Case(layer, input.dtype, "cpu")) is not None:
            return None
        H = weight.shape[0] // len(layer.cell.gates)
        P = parameters[layer.parameter_names.index("weight_hr")].shape[0] if layer.projected else H
        call = Call(layer=layer, input=input, h_0=input.new_empty(1, B, P), parameters=tuple(parameters))
        call.zoneout, call.zoneout_cell = rates
        args, common = struct_of(call, core.INFERENCE, Pointers())
        workspace = POOL.tensor(common.workspace)
        args.panels, args.has_panels, args.workspace = found.buffer.data_ptr(), 1, workspace.data_ptr()
        shapes = [torch.Size((B, P)), torch.Size((B, H))][: len(layer.cell.states)]
        is_whole = found.is_read_whole(1)
        run = partial(
            core.functions().festina_run_panels,
            *(ctypes.addressof(args), ctypes.addressof(found.sizes), is_whole, found.fingerprints[is_whole]),
        )
        return Ready(shapes, args, run, workspace)

    def forward_train(self, call: Call) -> tuple[Outputs, list[Tensor]]:
        at = Pointers()
        args, common = struct_of(call, core.TRAINING, at)
        outputs = new_outputs(call, args)
        saved = POOL.tensor(common.saved_fixed + args.N * common.saved_per_row)
        args.saved = saved.data_ptr()
        carry_out(args, workspace=common.workspace, panels=common.packed)
        return outputs, [saved]

    def saved_like(self, call: Call) -> list[Tensor]:
        return [call.input.new_empty(saved_bytes(call), dtype=torch.uint8)]

    def backward(
        self,
        call: Call,
        outputs: Outputs,
        saved: Sequence[Tensor],
        d_outputs: Sequence[Tensor | None],
        wanted: Sequence[bool],
    ) -> list[Tensor | None]:
        at = Pointers()
        args, _ = struct_of(call, core.BACKWARD, at)
        args.output, args.saved = at((outputs[0], saved[0]))
        args.d_output, args.d_h_n, args.d_c_n = at((*d_outputs, None)[:3])
        gradients = [
            torch.empty_like(tensor, memory_format=torch.contiguous_format) if want else None
            for tensor, want in zip(call.tensors(), wanted, strict=True)
        ]
        args.d_input, args.d_h_0, *rest = at(gradients)
        if call.c_0 is not None:
            args.d_c_0 = rest.pop(0)
        for slot, gradient in zip(slots(call.layer), rest, strict=True):
            args.d_parameters[slot] = gradient
        need = bytes_of(args)
        carry_out(args, workspace=need.workspace, panels=need.panels)
        return gradients


CPU = Cpu()
