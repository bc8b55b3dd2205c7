"""The one door between modules and backends: it decides who carries out a call, and checks the call on the way.

In this order: inside an ONNX export the lowering of `festina.backends.export`; under forward-mode differentiation the
reference; inside a `torch.func` transform `festina.transforms`; if the call is watched (traced, profiled, ...) or on lazy
tensors the operator, which checks and chooses when it runs; else the chosen backend, as a node of autograd's graph if the
call is recorded.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active

from festina import autograd, backends, ops, transforms
from festina.backends import export
from festina.backends.eager import EAGER
from festina.call import Call, Outputs, float32_becomes
from festina.checks import check_call, check_tensors
from festina.spec import LayerSpec


def run(call: Call) -> Outputs:
    """Carry out a `Call` on the backend chosen for it: output `[N, D·P]`, h_n `[D, B, P]`, c_n `[D, B, H]` or None.

    Under autocast, float32 tensors are cast to its dtype first. Where forward-mode differentiation follows one of the
    tensors the reference runs, whatever the backend, since PyTorch differentiates that itself.

    Raises:
        TypeError, ValueError: sizes, dtypes or devices do not agree (`festina.checks.check_call`).
        festina.backends.BackendError: a backend was forced that cannot run this call, or a variable of docs/environment.md
            asks for what cannot be had.
    """
    force = backends.forced()
    tensors = call.tensors()
    low = float32_becomes(call.input.device.type)
    if low != torch.float32:
        is_wide = [isinstance(tensor, Tensor) and tensor.dtype == torch.float32 for tensor in tensors]
        tensors = [tensor.to(low) if wide else tensor for tensor, wide in zip(tensors, is_wide)]
        call = call.with_tensors(tensors)
    if ops.is_watched(tensors):
        check_tensors(call, tensors)
        if export.is_exporting():
            return export.run(call)
        if ops.has_tangents(tensors):
            check_call(call, tensors)
            return EAGER.forward(call)
        if not _are_functorch_transforms_active():
            return ops.recurrence(call, force)
        check_call(call, tensors)
        return transforms.run(call, force)
    check_call(call, tensors)
    if ops.is_lazy((*tensors, *call.around())):
        return ops.recurrence(call, force)
    backend = backends.choose(call, force)
    return autograd.record(backend, call, tensors) if autograd.is_recorded(tensors) else backend.forward(call)


def step(
    *,
    layer: LayerSpec,
    parameters: Sequence[Tensor],
    input: Tensor,
    state: Sequence[Tensor],
    rates: tuple[float, float],
) -> list[Tensor] | None:
    """One step of a cell by a backend's shorter way, as a node of autograd's graph if it is recorded: the new states. None,
    with nothing done, if `run` must do it.

    Nothing need be checked before: if something does not fit, the answer is None, and the longer way tells why.

    Args:
        layer, parameters: of the cell.
        input, state: `[B, I]`; `[B, P]` and, if the cell has a c, `[B, H]`.
        rates: of Zoneout on h and on c, by the expectation.
    """
    given = (input, *state)
    if ops.is_watched(given) or ops.is_lazy(given):
        return None
    # Grad mode first: without it nothing is put together to be asked.
    is_recorded = torch.is_grad_enabled() and autograd.is_recorded((*given, *parameters))
    for backend in backends.steppers(backends.forced()):
        found = backend.step(
            layer=layer, parameters=parameters, input=input, state=state, rates=rates, is_training=is_recorded
        )
        if found is None:
            continue
        if is_recorded:
            return autograd.record_step(backend, layer, rates, found, (input, *state, *parameters))
        return found.state
    return None
