"""Weights that never change: laid out in panels once, and never compared with anything."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from festina.backends.cpu import abi
from festina.backends.cpu.memory import POOL
from festina.backends.cpu.plans import Plan, bind, carry_out, fresh, make_plan, operands, run_on
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
        self.layer, self.panel_type, self.dtype = layer, panel_type, parameters[0].dtype
        self.weight_ih = parameters[0].shape
        self.H = self.weight_ih[0] // len(layer.cell.gates)
        self.P = parameters[layer.parameter_names.index("weight_hr")].shape[0] if layer.projected else self.H
        self._ready: dict[tuple[object, ...], list[Ready]] = {}
        nothing = parameters[0].new_empty
        D, I = layer.directions, self.weight_ih[1]
        call = Call(layer=layer, input=nothing(0, I), h_0=nothing(D, 0, self.P), parameters=tuple(parameters))
        call.c_0 = nothing(D, 0, self.H) if "c" in layer.cell.states else None
        plan, core = self._plan(call), abi.core()
        self.buffer = POOL.tensor(plan.panels)
        words, _workspace = fresh(plan)
        _copies = bind(plan, words, operands(call))
        words[core.at["panels"]] = self.buffer.data_ptr()
        if core.run(words):
            raise core.error()

    def _plan(self, call: Call) -> Plan:
        return make_plan(
            self.layer.token,
            abi.INFERENCE,
            self.dtype,
            call.input.shape,
            call.h_0.shape,
            self.weight_ih,
            None if call.batch_sizes is None else call.batch_sizes.shape[0],
            (False, False),
            (call.zoneout, call.zoneout_cell),
            torch.get_num_threads(),
            (),
            self.panel_type,
        )

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
        """Carry out a call without masks, whose parameters are not looked at."""
        plan = self._plan(call)
        run = partial(run_on, plan, panels=self.buffer, has_panels=True)
        carry_out(plan, (*self._operands(call), *outputs), run)

    def step(self, input: Tensor, state: Sequence[Tensor], rates: tuple[float, float]) -> list[Tensor] | None:
        """One step of a cell: the new states, or None, with nothing done, if the tensors do not fit.

        Args:
            input, state: `[B, I]`; `[B, P]` and, if the cell has a c, `[B, H]`. Nothing need be checked before.
            rates: of Zoneout on h and on c, by the expectation.
        """
        if not (input.is_cpu and input.is_contiguous()) or input.dtype != self.dtype:
            return None
        key = (input.shape, rates, torch.get_num_threads())
        try:
            ready = self._ready[key].pop()
        except LookupError:
            if input.dim() != 2 or input.shape[1] != self.weight_ih[1] or not input.shape[0]:
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
        call = Call(layer=self.layer, input=input, h_0=input.new_empty(1, B, self.P), parameters=())
        call.zoneout, call.zoneout_cell = rates
        plan, core = self._plan(call), abi.core()
        words, workspace = fresh(plan)
        bind(plan, words, self._operands(call))
        args = core.call.from_buffer(words)
        args.panels, args.has_panels = self.buffer.data_ptr(), 1
        shapes = [torch.Size((B, self.P)), torch.Size((B, self.H))][: len(self.layer.cell.states)]
        return Ready(shapes, args, partial(core.run, ctypes.addressof(args)), workspace)
