"""The operators `festina::recurrence`, its train and backward forms, and `sort_rows`: schemas, shapes, autograd.

One operator call is one layer over time, every direction. `recurrence` is what callers use; under autograd it becomes
`recurrence_train`, whose outputs and saved tensors `recurrence_backward` turns into gradients. The backend is chosen when
`recurrence` runs, unless one is forced; the other two are told which, since they share what is saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _get_tracing_state, _len_torch_dispatch_stack
from torch._C._autograd import _profiler_enabled

from festina import backends
from festina.backends.eager import gradients
from festina.call import Call, Case, Outputs
from festina.packing import sort_rows
from festina.spec import LayerSpec

if TYPE_CHECKING:
    from festina.module import RecurrentBase

Arguments = tuple[Any, ...]
"""A call as the operators take it: the order of `_CALL`."""

_CALL = (
    "str backend, str layer, Tensor? batch_sizes, Tensor? resets, Tensor? zoneout_mask, Tensor? zoneout_cell_mask, "
    "float zoneout, float zoneout_cell, Tensor input, Tensor[] state, Tensor[] parameters"
)

_library = torch.library.Library("festina", "DEF")
_library.define(
    "sort_rows(Tensor lengths, SymInt T, bool batch_first) -> (Tensor order, Tensor batch_sizes, Tensor index)"
)
_library.define(f"recurrence({_CALL}) -> (Tensor output, Tensor[] state_n)")
_library.define(f"recurrence_train({_CALL}) -> (Tensor output, Tensor[] state_n, Tensor[] saved)")
_library.define(
    f"recurrence_backward({_CALL}, Tensor output, Tensor[] state_n, Tensor[] saved, "
    "Tensor? d_output, Tensor? d_h_n, Tensor? d_c_n, bool[] wanted) -> Tensor[]"
)


def arguments(call: Call, backend: str) -> Arguments:
    """`call` as the operators take it; `backend` is the name of the one that is to carry it out, "" where any may."""
    return (
        backend,
        call.layer.token,
        call.batch_sizes,
        call.resets,
        call.zoneout_mask,
        call.zoneout_cell_mask,
        call.zoneout,
        call.zoneout_cell,
        call.input,
        call.state,
        call.parameters,
    )


def _call(args: Arguments) -> Call:
    """The call that `arguments` wrote down."""
    _, layer, batch_sizes, resets, mask, cell_mask, zoneout, zoneout_cell, input, state, parameters = args
    h_0, *c_0 = state
    return Call(
        layer=LayerSpec.parse(layer),
        input=input,
        h_0=h_0,
        c_0=c_0[0] if c_0 else None,
        parameters=tuple(parameters),
        batch_sizes=batch_sizes,
        resets=resets,
        zoneout_mask=mask,
        zoneout_cell_mask=cell_mask,
        zoneout=zoneout,
        zoneout_cell=zoneout_cell,
    )


def _backend(call: Call, force: str) -> backends.Backend:
    return backends.get(backends.select(Case.of(call), force))


def _parse(args: Arguments) -> tuple[backends.Backend, Call]:
    """The backend and the call of an operator's arguments."""
    call = _call(args)
    return _backend(call, args[0]), call


def _listed(outputs: Outputs) -> tuple[Tensor, list[Tensor]]:
    output, h_n, c_n = outputs
    return output, [h_n] if c_n is None else [h_n, c_n]


def _outputs(output: Tensor, state_n: Sequence[Tensor]) -> Outputs:
    """What `_listed` took apart."""
    return Outputs(output, state_n[0], state_n[1] if len(state_n) > 1 else None)


@lru_cache(maxsize=1024)
def _parameter_shapes(layer: LayerSpec, I: int, H: int, P: int) -> tuple[tuple[int, ...], ...]:
    return tuple(layer.parameter_shapes(I, H, P).values()) * layer.directions


def _check_shapes(call: Call) -> None:
    """Raise unless every parameter fits the layer, the input and the state: a module's may have been replaced."""
    I, P = call.input.shape[1], call.h_0.shape[2]
    H = P if call.c_0 is None else call.c_0.shape[2]
    shapes = _parameter_shapes(call.layer, I, H, P)
    if (*map(_SHAPE, call.parameters),) == shapes:
        return
    names = call.layer.parameter_names * call.layer.directions
    for name, parameter, shape in zip(names, call.parameters, shapes, strict=True):
        if parameter.shape != shape:
            raise ValueError(
                f"{name} must be {list(shape)} for input_size = {I} and hidden_size = {H}, got {list(parameter.shape)}"
            )


def _forward(backend: backends.Backend, call: Call) -> Outputs:
    """The backend's pass, whose kernels take shapes on trust."""
    _check_shapes(call)
    return backend.forward(call)


def _forward_train(backend: backends.Backend, call: Call) -> tuple[Outputs, list[Tensor]]:
    """The same in training."""
    _check_shapes(call)
    return backend.forward_train(call)


def _recurrence(*args: Any) -> tuple[Tensor, list[Tensor]]:
    return _listed(_forward(*_parse(args)))


def _recurrence_train(*args: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    outputs, saved = _forward_train(*_parse(args))
    return (*_listed(outputs), saved)


def _recurrence_backward(*args: Any) -> list[Tensor]:
    *call_args, output, state_n, saved, d_output, d_h_n, d_c_n, wanted = args
    backend, call = _parse(tuple(call_args))
    found = backend.backward(call, _outputs(output, state_n), saved, (d_output, d_h_n, d_c_n), wanted)
    return [call.input.new_empty(0) if gradient is None else gradient for gradient in found]


def _shapes(call: Call) -> tuple[Tensor, list[Tensor]]:
    D, _, P = call.h_0.shape
    return call.input.new_empty(call.input.shape[0], D * P), [torch.empty_like(s) for s in call.state]


def _recurrence_fake(*args: Any) -> tuple[Tensor, list[Tensor]]:
    return _shapes(_parse(args)[1])


def _recurrence_train_fake(*args: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    backend, call = _parse(args)
    return (*_shapes(call), backend.saved_like(call))


def _recurrence_backward_fake(*args: Any) -> list[Tensor]:
    *call_args, _output, _state_n, _saved, _d_output, _d_h_n, _d_c_n, wanted = args
    call = _parse(tuple(call_args))[1]
    return [
        torch.empty_like(tensor, memory_format=torch.contiguous_format) if want else call.input.new_empty(0)
        for tensor, want in zip(call.tensors(), wanted, strict=True)
    ]


def _sort_rows_fake(lengths: Tensor, T: int, batch_first: bool) -> tuple[Tensor, Tensor, Tensor]:
    context = torch.library.get_ctx()  # how many steps are valid, and how many the longest row has, only numbers tell
    longest, valid = context.new_dynamic_size(), context.new_dynamic_size()
    return torch.empty_like(lengths), lengths.new_empty(longest), lengths.new_empty(valid)


class _Recurrence(torch.autograd.Function):
    """Autograd of `recurrence`. Nothing saved is ever overwritten, so backward runs as often as it is asked to."""

    @staticmethod
    def forward(ctx: Any, backend: backends.Backend, call: Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        """`tensors` are those of the call, once more: autograd has to see them."""
        args = arguments(call, backend.name)
        if _is_watched(tensors):
            with torch._C._AutoDispatchBelowAutograd():
                output, state_n, saved = torch.ops.festina.recurrence_train(*args)
        else:
            outputs, saved = _forward_train(backend, call)
            output, state_n = _listed(outputs)
        _, token, *masks = args[:6]
        ctx.backend, ctx.token, ctx.rates, ctx.states = backend, token, args[6:8], len(state_n)
        ctx.save_for_backward(*masks, *tensors, output, *state_n, *saved)
        ctx.set_materialize_grads(False)
        return (output, *state_n)

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted: list[bool] = list(ctx.needs_input_grad[2:])
        all_saved = ctx.saved_tensors  # read once: activation checkpointing hands it out no second time
        masks, tensors, kept = all_saved[:4], all_saved[4 : 4 + len(wanted)], all_saved[4 + len(wanted) :]
        state, parameters = list(tensors[1 : 1 + ctx.states]), list(tensors[1 + ctx.states :])
        args = (ctx.backend.name, ctx.token, *masks, *ctx.rates, tensors[0], state, parameters)
        call = _call(args)
        found: Sequence[Tensor | None]
        if torch.is_grad_enabled():  # create_graph=True: the reference can be differentiated again, kernels cannot
            # Views, so that a gradient stops at its own tensor where one input was computed from another.
            call = call.with_tensors([tensor.view_as(tensor) for tensor in call.tensors()])
            found = gradients(call, d_outputs, wanted, create_graph=True)
        else:
            output, state_n, saved = kept[0], list(kept[1 : 1 + ctx.states]), list(kept[1 + ctx.states :])
            d_output, d_h_n, d_c_n = d_all = (*d_outputs, None)[:3]
            if _is_watched([t for t in (*tensors, *kept, *masks, *d_outputs) if t is not None]):
                found = torch.ops.festina.recurrence_backward(
                    *args, output, state_n, saved, d_output, d_h_n, d_c_n, wanted
                )
            else:
                found = ctx.backend.backward(call, _outputs(output, state_n), saved, d_all, wanted)
        return (None, None, *(gradient if want else None for gradient, want in zip(found, wanted, strict=True)))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        raise NotImplementedError(
            "forward-mode differentiation (torch.autograd.forward_ad) does not go through festina's operators; "
            "torch.func.jvp and torch.func.jacfwd do"
        )


_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_SHAPE = attrgetter("shape")


def _is_watched(tensors: Sequence[Tensor]) -> bool:
    """Somebody has to see an operator: a compiler, a mode, a transform, the tracer, the profiler, another class of tensor;
    or shapes are all that is asked for.
    """
    return (
        torch.compiler.is_compiling()
        or tensors[0].is_meta
        or _len_torch_dispatch_stack() > 0
        or _are_functorch_transforms_active()
        or _get_tracing_state() is not None
        or _profiler_enabled()
        or not _PLAIN.issuperset(map(type, tensors))
    )


def run(call: Call) -> Outputs:
    """Carry out a call: by the operator where somebody watches, else without the dispatcher, which costs more than a cell.

    Raises:
        ValueError: its tensors are not of one type on one device, or a parameter's shape is not what the layer needs for
            such an input and state; a kernel takes addresses and sizes on trust.
        festina.backends.BackendError: a backend was forced that cannot run this call.
    """
    tensors = call.tensors()
    dtype, device = call.input.dtype, call.input.device
    for at, tensor in enumerate(tensors):
        if tensor.dtype != dtype or tensor.device != device:
            names = ("input", *(f"{state}_0" for state in call.layer.cell.states))
            name = (*names, *(call.layer.parameter_names * call.layer.directions))[at]
            raise ValueError(
                f"{name} must be {dtype} on {device} as the input, got {tensor.dtype} on {tensor.device}; "
                f"call .to('{device}', {dtype}) on the whole layer"
            )
    if _is_watched(tensors):
        return _outputs(*torch.ops.festina.recurrence(*arguments(call, backends.forced())))
    backend = _backend(call, backends.forced())
    return _outputs(*_record(backend, call)) if _is_recorded(tensors) else _forward(backend, call)


def run_step(cell: RecurrentBase, input: Tensor, hx: Any) -> Any:
    """One step of a cell by a backend's shorter way, where there is one and nobody follows; else None, with nothing done.

    Nothing need be checked before: where something does not fit the answer is None, and the longer way tells why.
    """
    is_random = cell.training and (cell.zoneout or cell.zoneout_cell or cell.dropconnect)
    state = hx if isinstance(hx, tuple) and len(hx) > 1 else (hx,)
    if torch.is_grad_enabled() or is_random or _is_watched((input, *state)):
        return None
    for backend in backends.steppers(backends.forced()):
        if (
            found := backend.step(
                layer=cell.spec,
                parameters=cell.layer_parameters(),
                input=input,
                state=state,
                rates=(cell.zoneout, cell.zoneout_cell),
            )
        ) is not None:
            return tuple(found) if len(found) > 1 else found[0]
    return None


def _is_recorded(tensors: Sequence[Tensor]) -> bool:
    """Autograd follows these tensors."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _record(backend: backends.Backend, call: Call) -> tuple[Tensor, list[Tensor]]:
    """The call as a node of autograd's graph."""
    output, *state_n = _Recurrence.apply(backend, call, *call.tensors())  # type: ignore[no-untyped-call]
    return output, state_n


def _recurrence_autograd(*args: Any) -> tuple[Tensor, list[Tensor]]:
    *_, input, state, parameters = args
    if _is_recorded((input, *state, *parameters)):
        return _record(*_parse(args))
    with torch._C._AutoDispatchBelowAutograd():
        result: tuple[Tensor, list[Tensor]] = torch.ops.festina.recurrence(*args)
    return result


for _name, _kernel, _fake in (
    ("sort_rows", sort_rows, _sort_rows_fake),
    ("recurrence", _recurrence, _recurrence_fake),
    ("recurrence_train", _recurrence_train, _recurrence_train_fake),
    ("recurrence_backward", _recurrence_backward, _recurrence_backward_fake),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"festina::{_name}", _fake, lib=_library)
_library.impl("recurrence", _recurrence_autograd, "Autograd")
