"""Weights laid out in panels, the order in which kernels read them, kept between calls; and prepared steps.

docs/decisions/0004-panels-of-weights.md says when they are used again.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from festina.backends.cpu import abi
from festina.backends.cpu.memory import POOL
from festina.backends.cpu.plans import Plan, bind, fresh, operands, plan_for, run_on, status_of, widths
from festina.call import Call
from festina.spec import LayerSpec

MOST_READY = 8
"""At most this many kinds of prepared steps, which differ in batch size most of all, are kept for one set of panels."""
MOST_READY_BYTES = 1 << 20
"""A step that needs more workspace is not kept: it takes long enough to be prepared again."""
STEPS_WHOLE, BYTES_WHOLE = 8, 128 << 10
"""Before panels are used again, all values of the parameters are read for calls of this many steps and more, or if the
parameters are at most this large; else a few values of each, as reading all would take as long as a step."""
MOST_UNOWNED = 16
"""At most this many sets of panels are kept for parameters that no module owns, as views of a stack of weights are."""
_VERSION = attrgetter("_version")


class Ready(NamedTuple):
    """A prepared step, which lacks only its tensors."""

    shapes: list[torch.Size]  # of the state
    args: Any
    run: Callable[[], int]
    workspace: Tensor
    saved: int  # bytes that training keeps

    @classmethod
    def on(
        cls,
        panels: Tensor,
        plan: Plan,
        call: Sequence[Tensor | None],
        states: int,
        lead: tuple[int, ...],
        function: Callable[..., int],
        *rest: Any,
    ) -> Ready:
        """A step on filled panels; `function(address of the call, *rest)` runs it.

        Args:
            plan, call: its plan, and its `operands`, of which those of the step itself do not matter.
            states, lead: how many states the cell has, and their axes before B.
        """
        words, workspace = fresh(plan)
        bind(plan, words, call)
        args = abi.core().call.from_buffer(words)
        args.panels, args.has_panels = panels.data_ptr(), 1
        shapes = [torch.Size((*lead, args.B, width)) for width in (args.P, args.H)[:states]]
        saved = plan.saved_fixed + args.N * plan.saved_per_row
        return cls(shapes, args, partial(function, ctypes.addressof(args), *rest), workspace, saved)

    def bind(self, input: Tensor, state: Sequence[Tensor]) -> list[Tensor] | None:
        """Tensors for the new state, of a step on these. None if the state does not fit the input."""
        if len(state) != len(self.shapes):
            return None
        dtype = input.dtype
        for tensor, shape in zip(state, self.shapes):
            if tensor.shape != shape or tensor.dtype != dtype or not (tensor.is_cpu and tensor.is_contiguous()):
                return None
        args, (h_0, *c_0) = self.args, state
        outputs = [*map(torch.empty_like, state)]
        args.input, args.h_0 = input.data_ptr(), h_0.data_ptr()
        args.output = args.h_n = outputs[0].data_ptr()  # the output of one step is the new h
        if c_0:
            args.c_0, args.c_n = c_0[0].data_ptr(), outputs[1].data_ptr()
        return outputs


@dataclass(frozen=True, slots=True)
class Panels:
    """Panels, and what tells whether the parameters still hold the weights that filled them.

    Args:
        parameters: the parameters themselves where a module owns them, so that no other tensor is given an id of theirs;
            else none, and a step never relies on the panels alone.
        guards: weak references to the memory of each parameter: the panels go with the first of them. There is none to a
            parameter, because `torch.utils.swap_tensors` refuses a tensor that has one.
        owner: the module; the panels go with it.
        marks: `marks_of` the parameters when the panels were filled.
        fingerprints: of a few values of each, and of all.
        reads_all: all values are read before any call.
        buffer: the panels of inference and training.
        transposed: those of backward, by whether the input's gradient was wanted.
        ready: prepared steps by what they have in common. A call takes one out and puts it back.
    """

    parameters: tuple[Tensor, ...]
    guards: list[weakref.ref[Any]]
    owner: weakref.ref[Module] | None
    marks: tuple[Any, ...]
    fingerprints: tuple[int, int]
    reads_all: bool
    buffer: Tensor
    transposed: dict[bool, Tensor]
    ready: dict[tuple[Any, ...], list[Ready]]

    def run(self, plan: Plan, words: Any, is_training: bool) -> bool:
        """Run a forward pass on the panels. False, with nothing done, if the parameters have changed."""
        at = abi.core().at
        words[at["has_panels"]], words[at["panels"]] = 1, self.buffer.data_ptr()
        return self._run_unchanged(plan, words, is_training or self.reads_all or words[at["T"]] >= STEPS_WHOLE)

    def run_backward(self, plan: Plan, words: Any, of_input: bool) -> bool:
        """Run backward on panels of the weights that the forward pass had, which the first call fills. False, with nothing
        done, if it has to fill them and the parameters hold other values by now."""
        buffer = self.transposed.get(of_input)
        if buffer is not None:
            run_on(plan, words, buffer, True)
            return True
        buffer, at = POOL.tensor(plan.panels), abi.core().at
        words[at["has_panels"]], words[at["panels"]] = 0, buffer.data_ptr()
        if not self._run_unchanged(plan, words, True):
            return False
        self.transposed[of_input] = buffer
        return True

    def _run_unchanged(self, plan: Plan, words: Any, is_whole: bool) -> bool:
        core = abi.core()
        status = status_of(plan, core.run_panels, words, is_whole, self.fingerprints[is_whole])
        if status and status != core.stale:
            raise core.error()
        return not status


def put_back(steps: dict[tuple[Any, ...], list[Ready]], key: tuple[Any, ...], ready: Ready) -> None:
    """Keep a step for the next call that has `key`, in place of those of the oldest key if there are too many."""
    if ready.workspace.nbytes > MOST_READY_BYTES:
        return
    waiting = steps.get(key)
    if waiting is None:
        if len(steps) >= MOST_READY:
            for oldest in list(steps)[:1]:  # a copy, and no index: other threads may empty the dict
                steps.pop(oldest, None)
        waiting = steps.setdefault(key, [])
    waiting.append(ready)


def marks_of(parameters: Sequence[Tensor]) -> tuple[Any, ...]:
    """What tells quickly that parameters have changed; empty if no version could tell.

    `p.data = other` changes an address alone, `p.data = p.data.t()` of a square matrix not even that.
    """
    try:
        return (
            *map(_VERSION, parameters),
            *map(Tensor.data_ptr, parameters),
            *map(Tensor.is_contiguous, parameters),
        )
    except RuntimeError:  # tensors made in inference mode have no version, and some tensors no address
        return ()


def held_by(module: Module) -> set[int]:
    """The ids of the parameters that are the module's own."""
    return {*map(id, module.parameters(recurse=False))}


def is_owned(call: Call) -> bool:
    """True if the parameters are those of the module that makes the call, not computed from them, nor lent to it."""
    held = held_by(call.owner) if call.owner is not None else set()
    return all(id(parameter) in held and isinstance(parameter, Parameter) for parameter in call.parameters)


def fingerprints_of(call: Call, marks: tuple[Any, ...], words: Any) -> tuple[int, int] | None:
    """The fingerprints of a few values of each parameter, and of all; None if nothing could tell when one of them changes."""
    if not marks or not all(p.is_contiguous() for p in call.parameters):
        return None
    core = abi.core()
    return core.fingerprint(words, False), core.fingerprint(words, True)


class PanelCache:
    """Panels, one set for a layer and its parameters, dropped with the memory of any of them or with the owner.

    A parameter counts as unchanged while it is the same object with the same marks and the same fingerprint. The
    fingerprint is there for writes through `.data`, which leave the version alone. Where nobody owns the parameters the
    fingerprint is always that of all values, since another tensor may be given the id and the memory of one that has gone.
    """

    def __init__(self) -> None:
        self._found: dict[tuple[Any, ...], Panels] = {}

    def find(self, layer: LayerSpec, parameters: Sequence[Tensor], marks: tuple[Any, ...]) -> Panels | None:
        """The panels filled from these parameters when they had these marks; `Panels.run` looks at the fingerprint."""
        found = self._found.get((layer.token, *map(id, parameters)))
        return found if found is not None and found.marks == marks else None

    def release(self) -> None:
        """Free the memory of prepared steps, and of the panels of backward."""
        for panels in list(self._found.values()):
            panels.ready.clear()
            panels.transposed.clear()

    def drop(self, layer: LayerSpec, parameters: Sequence[Tensor]) -> None:
        """Give up the panels of these parameters, so that others may take their memory."""
        self._found.pop((layer.token, *map(id, parameters)), None)

    def put(self, call: Call, marks: tuple[Any, ...], fingerprints: tuple[int, int] | None, buffer: Tensor) -> None:
        """Keep panels filled from parameters that had these marks and `fingerprints_of` before; not if the latter is None."""
        if fingerprints is None:
            return
        parameters, found = call.parameters, self._found
        key = (call.layer.token, *map(id, parameters))
        # `pop` is called with the reference, which it takes for a default. It is no Python function, so that no signal can
        # keep it from what it does.
        drop = partial(found.pop, key)
        module = call.owner if is_owned(call) else None
        if module is not None:
            self._drop_former(module)
        else:
            unowned = [key for key, panels in list(found.items()) if not panels.parameters]
            for oldest in unowned[: max(0, len(unowned) + 1 - MOST_UNOWNED)]:
                found.pop(oldest, None)
        found[key] = Panels(
            parameters=() if module is None else parameters,
            guards=[weakref.ref(p.untyped_storage(), drop) for p in parameters],
            owner=None if module is None else weakref.ref(module, drop),
            marks=marks,
            fingerprints=fingerprints,
            reads_all=module is None or sum(p.nbytes for p in parameters) <= BYTES_WHOLE,
            buffer=buffer,
            transposed={},
            ready={},
        )

    def _drop_former(self, module: Module) -> None:
        """Drop the panels of parameters that the module has no longer: nothing but the panels may hold them."""
        held = held_by(module)
        for key, panels in list(self._found.items()):
            if (
                panels.owner is not None
                and panels.owner() is module
                and not held.issuperset(map(id, panels.parameters))
            ):
                self._found.pop(key, None)


def prepare(
    layer: LayerSpec,
    parameters: Sequence[Tensor],
    input: Tensor,
    rates: tuple[float, float],
    lead: tuple[int, ...],
    panels: Panels,
    is_training: bool,
) -> Ready | None:
    """What steps of these sizes have in common; None if the sizes or types do not fit, or training would keep no panels."""
    if input.dim() != 2:
        return None
    B, I = input.shape
    weight = parameters[0]
    if not (B > 0 and weight.shape[1] == I and all(p.dtype == input.dtype and p.is_cpu for p in parameters)):
        return None
    _, P = widths(layer, parameters)
    call = Call(layer=layer, input=input, h_0=input.new_empty(1, B, P), parameters=tuple(parameters))
    call.zoneout, call.zoneout_cell = rates
    plan = plan_for(call, abi.TRAINING if is_training else abi.INFERENCE)
    if not plan.keeps_panels:
        return None
    is_whole = is_training or panels.reads_all
    check = abi.core().run_panels, is_whole, panels.fingerprints[is_whole]
    return Ready.on(panels.buffer, plan, operands(call), len(layer.cell.states), lead, *check)
