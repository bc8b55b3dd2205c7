"""The compiled core as a backend: every cell, under all plans but those that
`missing_kernel` names, on the CPU in float32, float64, bfloat16 and float16."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._C import _is_any_autocast_enabled

from festina.backends.cpu import abi
from festina.backends.cpu.memory import POOL
from festina.backends.cpu.plans import (
    bind,
    carry_out,
    give,
    make_plan,
    operands,
    plan_for,
    saved_bytes,
    short,
    status_of,
    take,
)
from festina.backends.cpu.weights import PanelCache, Panels, Ready, fingerprints_of, is_owned, marks_of, prepare
from festina.backends.support import BackendError, missing_kernel
from festina.call import Call, Case, Outputs
from festina.spec import LayerSpec

RARE_KERNELS = frozenset(("product", "clip", "inner_bias_hh"))
"""What the core has kernels for of the rarest plans; see `support.RARE`."""


def new_outputs(call: Call) -> Outputs:
    """Outputs of the right shapes, not yet written."""
    D, _, P = call.h_0.shape
    output = call.input.new_empty((call.input.shape[0], D * P))
    h_n = torch.empty_like(call.h_0, memory_format=torch.contiguous_format)
    c_n = None if call.c_0 is None else torch.empty_like(call.c_0, memory_format=torch.contiguous_format)
    return Outputs(output, h_n, c_n)


class Cpu:
    """Runs csrc/. What training keeps for backward, panels and workspaces come from `POOL`."""

    name = "cpu"

    def __init__(self) -> None:
        self._panels = PanelCache()

    def can_run(self, case: Case) -> str | None:
        if case.device.type != "cpu":
            return f"it runs on cpu only, and the input is on {case.device.type}"
        library = abi.library()
        core = library.core
        if core is None:
            if library.is_forced:
                raise BackendError(library.reason)
            return library.reason
        known, layer = core.layout, case.layer
        if short(case.dtype) not in known.values["type"]:
            return f"it has no {short(case.dtype)}; use {', '.join(known.values['type'])}"
        if missing := missing_kernel(layer, known.values["cell"], RARE_KERNELS):
            return missing
        plan = layer.plan
        is_known = known.parameters.keys() >= {*layer.parameter_names} and plan.groups in known.values["groups"]
        if not is_known or (layer.step, plan.placement, plan.cell) not in known.kernels:
            return f"it has no kernel for the {layer.step} step under the plan {plan}"
        return None

    def isa(self) -> str | None:
        """The instruction set that the kernels use; None without a core."""
        core = abi.library().core
        return core.isa() if core else None

    def release_memory(self) -> None:
        """Free the buffers that lie idle for later calls."""
        self._panels.release()
        make_plan.cache_clear()
        POOL.release()

    def forward(self, call: Call) -> Outputs:
        plan, outputs, core = plan_for(call, abi.INFERENCE), new_outputs(call), abi.core()
        words, workspace = take(plan)
        _copies = bind(plan, words, (*operands(call), *outputs))
        marks = marks_of(call.parameters)
        found = self._panels.find(call.layer, call.parameters, marks)
        if found is None or (not found.parameters and is_owned(call)) or not found.run(plan, words):
            panels = POOL.tensor(plan.panels)
            words[core.at["has_panels"]], words[core.at["panels"]] = 0, panels.data_ptr()
            # Before the kernel reads: what another process writes meanwhile makes the panels old, not new.
            fingerprints = fingerprints_of(call, marks, words)
            if status_of(plan, core.run, words):
                raise core.error()
            self._panels.put(call, marks, fingerprints, panels)
        give(plan, words, workspace)
        return outputs

    def step(
        self,
        *,
        layer: LayerSpec,
        parameters: Sequence[Tensor],
        input: Tensor,
        state: Sequence[Tensor],
        rates: tuple[float, float],
        lead: tuple[int, ...] = (),
    ) -> list[Tensor] | None:
        found = self._panels.find(layer, parameters, marks_of(parameters))
        if (
            found is None
            or not found.parameters
            or not (input.is_cpu and input.is_contiguous())
            or _is_any_autocast_enabled()
        ):
            return None
        dtype = input.dtype
        key = (input.shape, lead, dtype, rates, torch.get_num_threads())
        ready: Ready | None
        try:
            ready = found.ready[key].pop()
        except LookupError:
            ready = self._prepare(layer, parameters, input, rates, lead, found)
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
            if status != abi.core().stale:
                raise abi.core().error()
            return None
        found.put_back(key, ready)
        return outputs

    def _prepare(
        self,
        layer: LayerSpec,
        parameters: Sequence[Tensor],
        input: Tensor,
        rates: tuple[float, float],
        lead: tuple[int, ...],
        panels: Panels,
    ) -> Ready | None:
        """A step of these sizes; None for what is refused."""
        if self.can_run(Case(layer, input.dtype, input.device)) is not None:
            return None
        return prepare(layer, parameters, input, rates, lead, panels)

    def forward_train(self, call: Call) -> tuple[Outputs, list[Tensor]]:
        plan, outputs = plan_for(call, abi.TRAINING), new_outputs(call)
        saved = POOL.tensor(plan.saved_fixed + call.input.shape[0] * plan.saved_per_row)
        carry_out(plan, (*operands(call), *outputs, saved))
        return outputs, [saved]

    def saved_like(self, call: Call) -> list[Tensor]:
        return [call.input.new_empty(saved_bytes(call), dtype=torch.uint8)]

    def backward(
        self,
        call: Call,
        output: Tensor,
        saved: Sequence[Tensor],
        d_outputs: Sequence[Tensor | None],
        wanted: Sequence[bool],
    ) -> list[Tensor | None]:
        plan = plan_for(call, abi.BACKWARD, tuple(wanted))
        gradients = [
            torch.empty_like(tensor, memory_format=torch.contiguous_format) if want else None
            for tensor, want in zip(call.tensors(), wanted, strict=True)
        ]
        of_c = () if call.c_0 is not None else (None,)
        d_all = (*d_outputs, None)[:3]
        given = (output, saved[0], *d_all, *gradients[:2], *of_c, *gradients[2:])
        carry_out(plan, (*operands(call), *given))
        return gradients


CPU = Cpu()
