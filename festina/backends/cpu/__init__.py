"""The compiled core as a backend: every cell under every plan, on the CPU in float32, float64, bfloat16 and float16."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C import _is_any_autocast_enabled

from festina.backends.cpu import abi
from festina.backends.cpu.memory import POOL
from festina.backends.cpu.plans import (
    Plan,
    carry_out,
    make_plan,
    operands,
    plan_for,
    run_on,
    saved_bytes,
    short,
)
from festina.backends.cpu.weights import (
    PanelCache,
    Ready,
    fingerprints_of,
    is_owned,
    marks_of,
    prepare,
    put_back,
)
from festina.backends.support import BackendError, missing_kernel
from festina.call import Call, Case, Outputs, Step
from festina.spec import LayerSpec

RARE_KERNELS = frozenset(("product", "state", "clip", "inner_bias_hh"))
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
        plan, outputs = plan_for(call, abi.INFERENCE), new_outputs(call)
        carry_out(plan, (*operands(call), *outputs), partial(self._run_forward, plan, call, False))
        return outputs

    def _run_forward(self, plan: Plan, call: Call, is_training: bool, words: Any) -> None:
        """Run a forward pass on kept panels if the parameters have not changed, else on new ones, which are kept. Training
        reads all values for that, and keeps no panels of parameters that no module owns."""
        marks = marks_of(call.parameters)
        found = self._panels.find(call.layer, call.parameters, marks)
        if found is not None and (found.parameters or not is_owned(call)) and found.run(plan, words, is_training):
            return
        self._panels.drop(call.layer, call.parameters)
        panels = POOL.tensor(plan.panels)
        # Before the kernel reads: what another process writes meanwhile makes the panels old, not new.
        fingerprints = None if is_training and not is_owned(call) else fingerprints_of(call, marks, words)
        run_on(plan, words, panels)
        self._panels.put(call, marks, fingerprints, panels)

    def step(
        self,
        *,
        layer: LayerSpec,
        parameters: Sequence[Tensor],
        input: Tensor,
        state: Sequence[Tensor],
        rates: tuple[float, float],
        is_training: bool,
        lead: tuple[int, ...] = (),
    ) -> Step | None:
        found = self._panels.find(layer, parameters, marks_of(parameters))
        if (
            found is None
            or not found.parameters
            or not (input.is_cpu and input.is_contiguous())
            or _is_any_autocast_enabled()
        ):
            return None
        key = (input.shape, lead, input.dtype, rates, torch.get_num_threads(), is_training)
        ready: Ready | None
        try:
            ready = found.ready[key].pop()
        except LookupError:
            if self.can_run(Case(layer, input.dtype, input.device)) is not None:
                return None
            ready = prepare(layer, parameters, input, rates, lead, found, is_training)
        if ready is None or (outputs := ready.bind(input, state)) is None:
            return None
        saved = []
        if is_training:
            saved.append(POOL.tensor(ready.saved))
            ready.args.saved = saved[0].data_ptr()
        if status := ready.run():
            if status != abi.core().stale:
                raise abi.core().error()
            return None
        put_back(found.ready, key, ready)
        return Step(outputs, saved)

    def forward_train(self, call: Call) -> tuple[Outputs, list[Tensor]]:
        plan, outputs = plan_for(call, abi.TRAINING), new_outputs(call)
        saved = POOL.tensor(plan.saved_fixed + call.input.shape[0] * plan.saved_per_row)
        run = partial(self._run_forward, plan, call, True) if plan.keeps_panels else None
        carry_out(plan, (*operands(call), *outputs, saved), run)
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
        run = partial(self._run_backward, plan, call, wanted[0]) if plan.keeps_panels else None
        carry_out(plan, (*operands(call), *given), run)
        return gradients

    def _run_backward(self, plan: Plan, call: Call, of_input: bool, words: Any) -> None:
        """Run backward on panels that belong to those of the forward pass, if these are kept, else on new ones."""
        found = self._panels.find(call.layer, call.parameters, marks_of(call.parameters))
        if found is None or not found.parameters or not found.run_backward(plan, words, of_input):
            run_on(plan, words, POOL.tensor(plan.panels))


CPU = Cpu()
