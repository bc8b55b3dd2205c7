"""Calls inside an ONNX export: a native ONNX operator for a plain LSTM or GRU, a Scan for everything else.

The body of the Scan is traced from `festina.reference.step`, so every cell and every plan is there without the equations
being told again. Scan and the native operators walk over padded steps: inside an export `festina.sequences` does not
pack, and says by a mask which rows run at which step. `festina.onnx.export` is the entry for users.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C import _get_tracing_state
from torch._higher_order_ops.scan import scan_op

from festina import reference
from festina.call import Call, Outputs
from festina.reference import State

# The operator and the order of its gates, in our letters: ONNX writes iofc and zrh.
_NATIVE = {"lstm": ("LSTM", "iofg"), "gru": ("GRU", "zrn")}


def is_exporting() -> bool:
    """True inside `torch.onnx.export(dynamo=True)`.

    Raises:
        RuntimeError: it is `torch.onnx.export(dynamo=False)`, the exporter of TorchScript.
    """
    if torch.compiler.is_compiling():
        return torch.onnx.is_in_onnx_export()
    if _get_tracing_state() is not None and torch.onnx.is_in_onnx_export():
        raise RuntimeError(
            "Festina's layers, cells and functional.layer must be exported by festina.onnx.export(module, args, path) or "
            "torch.onnx.export(module, args, path, dynamo=True), but this is torch.onnx.export(dynamo=False), the exporter "
            "of TorchScript, which has no operator for them"
        )
    return False


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
    """Direction `d` of a call as a scan over its steps: output [T·B, P] and the last state.

    Everything is detached, since an export has no gradients and `scan` with gradients fails where T is open. And `scan_op` is
    called itself, with all that a step reads: the function `scan` would trace the step by itself first, take each size for
    open, G too, and fail.
    """
    layer, rates = call.layer, (call.zoneout, call.zoneout_cell)
    p = {name: value.detach() for name, value in call.of_direction(d).items()}
    B = call.h_0.shape[1]
    x = reference.input_product(layer, call.input.detach(), p)
    xs = {"x": x.view(-1, B, *x.shape[1:])}
    if call.is_active is not None:
        xs["is_active"] = call.is_active
    if call.resets is not None:
        xs["resets"] = call.resets[d].view(-1, B)
    initial = [state[d].detach().clone() for state in call.state]
    initial[1:] = [reference.wide(c) for c in initial[1:]]
    last = len(initial), len(initial) + len(xs)

    def step(*given: Tensor) -> list[Tensor]:
        state, here = given[: last[0]], dict(zip(xs, given[last[0] : last[1]]))
        held = dict(zip(p, given[last[1] :], strict=True))
        new = reference.step(layer, here["x"], state, held, resets=here.get("resets"), masks=(None, None), rates=rates)
        if "is_active" not in here:
            return [*new, new[0].clone()]
        is_active = here["is_active"].unsqueeze(1)
        new = tuple(torch.where(is_active, now, was) for now, was in zip(new, state))
        return [*new, torch.where(is_active, new[0], torch.zeros_like(new[0]))]

    steps = [value.flip(0) if d else value for value in xs.values()]
    *state, output = scan_op(step, initial, steps, tuple(p.values()))
    output = output.flip(0) if d else output
    return output.view(-1, output.shape[2]), tuple(state)
