"""Calls inside an ONNX export: a native ONNX operator for a plain LSTM or GRU, a Scan for everything else.

The body of the Scan is traced from `festina.reference.step`, so every cell and every plan is there without the equations
being told again. Scan and the native operators walk over padded steps: inside an export `festina.sequences` does not
pack, and says by a mask which rows run at which step. `festina.onnx.export` is the entry for users.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._higher_order_ops.scan import scan

from festina import reference
from festina.call import Call, Outputs
from festina.reference import State

# The operator and the order of its gates, in our letters: ONNX writes iofc and zrh.
_NATIVE = {"lstm": ("LSTM", "iofg"), "gru": ("GRU", "zrn")}


def run(call: Call) -> Outputs:
    """Carry out a call of T · B padded steps inside an export; `call.is_active` says which rows run, None for all."""
    layer, rates = call.layer, (call.zoneout, call.zoneout_cell)
    is_plain = layer.plan.is_none and not layer.projected and call.resets is None
    # float32 is the one type in which every runtime has the native operators.
    if layer.cell.name in _NATIVE and is_plain and not any(rates) and call.input.dtype == torch.float32:
        return _native(call)
    outputs, states = zip(*(_scan(call, d) for d in range(layer.directions)))
    h_n, *c_n = (torch.stack(values) for values in zip(*states))
    return Outputs(torch.cat(outputs, 1), h_n, c_n[0].to(call.input.dtype) if c_n else None)


def _native(call: Call) -> Outputs:
    """One ONNX LSTM or GRU, both directions."""
    layer, (D, B, H) = call.layer, call.h_0.shape
    op, gates = _NATIVE[layer.cell.name]
    sides = [call.of_direction(d) for d in range(D)]

    def in_order(name: str) -> Tensor:
        return torch.stack([torch.cat([p[name][layer.cell.rows(gate, H)] for gate in gates]) for p in sides])

    x = call.input.view(-1, B, call.input.shape[1])
    lengths = None if call.is_active is None else call.is_active.sum(0, dtype=torch.int32)
    bias = torch.cat([in_order("bias_ih"), in_order("bias_hh")], 1) if layer.bias else None
    y, *state_n = torch.onnx.ops.symbolic_multi_out(
        op,
        (x, in_order("weight_ih"), in_order("weight_hh"), bias, lengths, *call.state),
        {
            "hidden_size": H,
            "direction": "bidirectional" if D == 2 else "forward",
            **({"linear_before_reset": 1} if op == "GRU" else {}),
        },
        dtypes=[call.input.dtype] * (1 + len(call.state)),
        shapes=[(x.shape[0], D, B, H), *(state.shape for state in call.state)],
    )
    output = y.transpose(1, 2).reshape(-1, D * H)
    return Outputs(output, state_n[0], state_n[1] if len(state_n) > 1 else None)


def _scan(call: Call, d: int) -> tuple[Tensor, State]:
    """Direction `d` of a call as a scan over its steps: output [T·B, P] and the last state."""
    layer, p, rates = call.layer, call.of_direction(d), (call.zoneout, call.zoneout_cell)
    B = call.h_0.shape[1]
    x = reference.input_product(layer, call.input, p)
    given = {
        "x": x.view(-1, B, *x.shape[1:]),
        "is_active": call.is_active,
        "resets": None if call.resets is None else call.resets[d].view(-1, B),
    }

    def step(state: State, here: dict[str, Tensor]) -> tuple[State, Tensor]:
        new = reference.step(layer, here["x"], state, p, resets=here.get("resets"), masks=(None, None), rates=rates)
        if "is_active" not in here:
            return new, new[0].clone()
        is_active = here["is_active"].unsqueeze(1)
        new = tuple(torch.where(is_active, now, was) for now, was in zip(new, state))
        return new, torch.where(is_active, new[0], torch.zeros_like(new[0]))

    initial = (call.h_0[d].clone(), *(reference.wide(c[d].clone()) for c in call.state[1:]))
    state, output = scan(step, initial, {name: t for name, t in given.items() if t is not None}, reverse=d == 1)
    return output.view(-1, output.shape[2]), state
