"""Weights that never change: laid out in panels once, and never compared with anything."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from festina.backends.cpu import abi
from festina.backends.cpu.memory import POOL
from festina.backends.cpu.plans import Plan, bind, carry_out, fresh, operands, plan_for, run_on, widths
from festina.backends.cpu.weights import Ready, put_back
from festina.call import Call, Outputs
from festina.spec import LayerSpec

PANEL_TYPES = ("bfloat16", "int8")
"""Those of rounded weights."""


class FrozenPanels:
    """The panels of one layer, every direction, and inference on them.

    Args:
        layer: the layer.
        parameters: as in a `Call`. Their weights are rounded already, if `panel_type` says so: those of bfloat16 are
            bfloat16's numbers, the rows of int8 multiples of their largest magnitude / 127.
        panel_type: "whole", or one of `PANEL_TYPES`.

    Raises:
        RuntimeError: the core refuses the layer.
    """

    def __init__(self, layer: LayerSpec, parameters: Sequence[Tensor], panel_type: str) -> None:
        self.layer, self.panel_type = layer, panel_type
        self.weight_ih = torch.empty_like(parameters[0], device="meta")  # for its shape and dtype
        H, self.P = widths(layer, parameters)
        self._ready: dict[tuple[object, ...], list[Ready]] = {}
        nothing = parameters[0].new_empty
        D, I = layer.directions, self.weight_ih.shape[1]
        call = Call(layer=layer, input=nothing(0, I), h_0=nothing(D, 0, self.P), parameters=tuple(parameters))
        call.c_0 = nothing(D, 0, H) if "c" in layer.cell.states else None
        plan, core = self._plan(call), abi.core()
        self.buffer = POOL.tensor(plan.panels)
        words, _workspace = fresh(plan)
        _copies = bind(plan, words, operands(call))
        words[core.at["panels"]] = self.buffer.data_ptr()
        if core.run(words):
            raise core.error()

    def _plan(self, call: Call) -> Plan:
        return plan_for(call, abi.INFERENCE, panel_type=self.panel_type)

    def _operands(self, call: Call) -> tuple[Tensor | None, ...]:
        """As `plans.operands`; which parameters there are counts, and nothing else of them."""
        around = (call.batch_sizes, call.resets, None, None)
        return (
            *around,
            call.input,
            call.h_0,
            call.c_0,
            *(self.buffer,) * len(self.layer.parameter_names * call.h_0.shape[0]),
        )

    def forward(self, call: Call, outputs: Outputs) -> None:
        """Carry out a call without masks, of whose parameters the shapes alone count."""
        plan = self._plan(call)
        run = partial(run_on, plan, panels=self.buffer, has_panels=True)
        carry_out(plan, (*self._operands(call), *outputs), run)

    def step(self, input: Tensor, state: Sequence[Tensor], rates: tuple[float, float]) -> list[Tensor] | None:
        """One step of a cell: the new states, or None, with nothing done, if the tensors do not fit.

        Args:
            input, state: `[B, I]`; `[B, P]` and, if the cell has a c, `[B, H]`. Nothing need be checked before.
            rates: of Zoneout on h and on c, by the expectation.
        """
        if not (input.is_cpu and input.is_contiguous()) or input.dtype != self.weight_ih.dtype:
            return None
        key = (input.shape, rates, torch.get_num_threads())
        try:
            ready = self._ready[key].pop()
        except LookupError:
            if input.dim() != 2 or input.shape[1] != self.weight_ih.shape[1] or not input.shape[0]:
                return None
            ready = self._prepare(input, rates)
        if (outputs := ready.bind(input, state)) is None:
            return None
        if ready.run():
            raise abi.core().error()
        put_back(self._ready, key, ready)
        return outputs

    def _prepare(self, input: Tensor, rates: tuple[float, float]) -> Ready:
        B = input.shape[0]
        h_0 = input.new_empty(1, B, self.P)
        call = Call(layer=self.layer, input=input, h_0=h_0, parameters=(self.weight_ih,))
        call.zoneout, call.zoneout_cell = rates
        states, run = len(self.layer.cell.states), abi.core().run
        return Ready.on(self.buffer, self._plan(call), self._operands(call), states, (), run)
