"""The operators `festina::recurrence`, its train and backward forms, and `sort_rows`: schemas, fake shapes, autograd.

One operator call is one layer over time, every direction. PyTorch calls them when a graph is traced, replayed, exported or
watched; `festina.dispatch` calls a backend directly otherwise. Under autograd `recurrence` becomes `recurrence_train`, whose
outputs and saved tensors `recurrence_backward` turns into gradients. The backend is chosen when `recurrence` runs, unless
one is forced; the other two are told which, since they share what is saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _get_tracing_state, _len_torch_dispatch_stack
from torch._C._autograd import _profiler_enabled

from festina import backends, flops
from festina.backends.eager import gradients
from festina.call import Call, Outputs
from festina.checks import check_call, check_lengths, check_tensors
from festina.sequences import sort_rows
from festina.spec import LayerSpec

_CALL = (
    "str backend, str layer, Tensor? batch_sizes, Tensor? resets, Tensor? zoneout_mask, Tensor? zoneout_cell_mask, "
    "float zoneout, float zoneout_cell, Tensor input, Tensor[] state, Tensor[] parameters"
)

_library = torch.library.Library("festina", "DEF")
_library.define(
    "sort_rows(Tensor lengths, SymInt T, bool batch_first) -> (Tensor order, Tensor batch_sizes, Tensor index)"
)
_library.define(  # for torch.jit.trace, which writes every int into the graph as a constant
    "sort_rows.traced(Tensor lengths, Tensor T, Tensor B, bool batch_first) "
    "-> (Tensor order, Tensor batch_sizes, Tensor index)"
)
_library.define(f"recurrence({_CALL}) -> (Tensor output, Tensor[] state_n)")
_library.define(f"recurrence_train({_CALL}) -> (Tensor output, Tensor[] state_n, Tensor[] saved)")
_library.define(
    f"recurrence_backward({_CALL}, Tensor output, Tensor[] state_n, Tensor[] saved, "
    "Tensor? d_output, Tensor? d_h_n, Tensor? d_c_n, bool[] wanted) -> Tensor[]"
)


# A call as the operators take it, in the order of `_CALL`, and back.


def arguments(call: Call, backend: str) -> tuple[Any, ...]:
    """`backend` is the name of the one that is to carry out the call, "" if any may."""
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


def _parse(
    backend: str,
    layer: str,
    batch_sizes: Tensor | None,
    resets: Tensor | None,
    zoneout_mask: Tensor | None,
    zoneout_cell_mask: Tensor | None,
    zoneout: float,
    zoneout_cell: float,
    input: Tensor,
    state: Sequence[Tensor],
    parameters: Sequence[Tensor],
) -> tuple[backends.Backend, Call]:
    if len(state) not in (1, 2):
        raise ValueError(f"state must hold h_0, and c_0 if the cell has a c, got {len(state)} tensors")
    call = Call(
        layer=LayerSpec.parse(layer),
        input=input,
        h_0=state[0],
        c_0=state[1] if len(state) > 1 else None,
        parameters=tuple(parameters),
        batch_sizes=batch_sizes,
        resets=resets,
        zoneout_mask=zoneout_mask,
        zoneout_cell_mask=zoneout_cell_mask,
        zoneout=zoneout,
        zoneout_cell=zoneout_cell,
    )
    return backends.choose(call, backend), call


def _admit(*args: Any) -> tuple[backends.Backend, Call]:
    """The backend and the call of an operator's arguments, checked: users may call an operator directly."""
    backend, call = _parse(*args)
    check_call(call, call.tensors())
    return backend, call


def _listed(outputs: Outputs) -> tuple[Tensor, list[Tensor]]:
    """Outputs as an operator gives them."""
    return outputs.output, [state for state in outputs[1:] if state is not None]


def _outputs(output: Tensor, state_n: Sequence[Tensor]) -> Outputs:
    return Outputs(output, state_n[0], state_n[1] if len(state_n) > 1 else None)


def recurrence(call: Call, backend: str) -> Outputs:
    """Carry out a call by the operator."""
    if not torch.compiler.is_compiling() and _len_torch_dispatch_stack() > 0:
        flops.register()
    return _outputs(*torch.ops.festina.recurrence(*arguments(call, backend)))


# What the operators compute, and the shapes of it.


def _recurrence(*args: Any) -> tuple[Tensor, list[Tensor]]:
    backend, call = _admit(*args)
    return _listed(backend.forward(call))


def _recurrence_train(*args: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    backend, call = _admit(*args)
    outputs, saved = backend.forward_train(call)
    return (*_listed(outputs), saved)


def _recurrence_backward(*args: Any) -> list[Tensor]:
    *call_args, output, state_n, saved, d_output, d_h_n, d_c_n, wanted = args
    backend, call = _admit(*call_args)
    outputs, d_outputs = _outputs(output, state_n), (d_output, d_h_n, d_c_n)
    if len(wanted) != len(call.tensors()):
        raise ValueError(f"wanted must hold {len(call.tensors())} flags for this call, got {len(wanted)}")
    _check_backward(backend, call, outputs, saved, d_outputs)
    found = backend.backward(call, outputs, saved, d_outputs, wanted)
    return [call.input.new_empty(0) if gradient is None else gradient for gradient in found]


def _check_backward(
    backend: backends.Backend,
    call: Call,
    outputs: Outputs,
    saved: Sequence[Tensor],
    d_outputs: Sequence[Tensor | None],
) -> None:
    """Raise unless outputs, their gradients and what was saved belong to such a call."""
    device = call.input.device
    call = call.with_tensors([tensor.to("meta") for tensor in call.tensors()])  # shapes alone: nothing is allocated
    like = (*_outputs(*_shapes(call)), *backend.saved_like(call))
    names = ("output", "h_n", "c_n", *("saved" for _ in saved))
    if len(names) != len(like):
        raise ValueError(f"saved must hold {len(like) - 3} tensors for this call on {backend.name}, got {len(saved)}")
    pairs = [*zip(names, like, (*outputs, *saved)), *zip(("d_output", "d_h_n", "d_c_n"), like, d_outputs)]
    for name, want, got in pairs:
        if got is None and (want is None or name.startswith("d_")):
            continue
        if want is None or got is None or (got.shape, got.dtype, got.device) != (want.shape, want.dtype, device):
            wanted = None if want is None else f"{want.dtype} {list(want.shape)} on {device}"
            given = None if got is None else f"{got.dtype} {list(got.shape)} on {got.device}"
            raise ValueError(f"{name} must be {wanted} for this call, got {given}")


def _shapes(call: Call) -> tuple[Tensor, list[Tensor]]:
    D, _, P = call.h_0.shape
    output = call.input.new_empty(call.input.shape[0], D * P)
    return output, [torch.empty_like(state, memory_format=torch.contiguous_format) for state in call.state]


def _shapeless(*args: Any) -> tuple[backends.Backend, Call]:
    """The backend and the call of which only shapes are asked for.

    PyTorch comes here also with numbers, if one tensor of a call is on meta: then outputs would hold what was in memory.
    """
    backend, call = _parse(*args)
    if type(call.input) in _PLAIN and not call.input.is_meta:
        named = {name: getattr(call, name) for name in ("batch_sizes", "resets", "zoneout_mask", "zoneout_cell_mask")}
        stray = next(
            (name for name, tensor in named.items() if tensor is not None and tensor.is_meta), "one of its tensors"
        )
        check_tensors(call, call.tensors())
        raise ValueError(
            f"all tensors of a call must hold numbers, as the input on {call.input.device}; {stray} is on meta"
        )
    return backend, call


def _recurrence_fake(*args: Any) -> tuple[Tensor, list[Tensor]]:
    return _shapes(_shapeless(*args)[1])


def _recurrence_train_fake(*args: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    backend, call = _shapeless(*args)
    return (*_shapes(call), backend.saved_like(call))


def _recurrence_backward_fake(*args: Any) -> list[Tensor]:
    *call_args, _output, _state_n, _saved, _d_output, _d_h_n, _d_c_n, wanted = args
    call = _shapeless(*call_args)[1]
    return [
        torch.empty_like(tensor, memory_format=torch.contiguous_format) if want else call.input.new_empty(0)
        for tensor, want in zip(call.tensors(), wanted, strict=True)
    ]


def _sort_rows_fake(lengths: Tensor, T: int, batch_first: bool) -> tuple[Tensor, Tensor, Tensor]:
    context = (
        torch.library.get_ctx()
    )  # only the numbers tell how many steps are valid, and how many the longest row has
    longest, valid = context.new_dynamic_size(), context.new_dynamic_size()
    return torch.empty_like(lengths), lengths.new_empty(longest), lengths.new_empty(valid)


def _sort_rows_traced(lengths: Tensor, T: Tensor, B: Tensor, batch_first: bool) -> tuple[Tensor, Tensor, Tensor]:
    """A traced graph holds no check, so that one on B belongs here."""
    return sort_rows(check_lengths(lengths, int(B)), int(T), batch_first)


def _sort_rows_traced_fake(lengths: Tensor, T: Tensor, B: Tensor, batch_first: bool) -> tuple[Tensor, Tensor, Tensor]:
    return _sort_rows_fake(lengths, 0, batch_first)


# Autograd.


class _Recurrence(torch.autograd.Function):
    """A call as a node of autograd's graph. Nothing saved is ever overwritten, so backward may run more than once."""

    @staticmethod
    def forward(ctx: Any, backend: backends.Backend, call: Call, watched: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        """`tensors` are those of the call, once more: autograd has to see them."""
        if watched:
            with torch._C._AutoDispatchBelowAutograd():
                output, state_n, saved = torch.ops.festina.recurrence_train(*arguments(call, backend.name))
            outputs = _outputs(output, state_n)
        else:
            outputs, saved = backend.forward_train(call)
        ctx.backend, ctx.watched, ctx.layer, ctx.rates = backend, watched, call.layer, (call.zoneout, call.zoneout_cell)
        # Tensors go through `save_for_backward`, which notices writes in place and serves checkpointing, not with the call.
        around = (call.batch_sizes, call.resets, call.zoneout_mask, call.zoneout_cell_mask)
        ctx.save_for_backward(*around, *tensors, *outputs, *saved)
        ctx.set_materialize_grads(False)
        return tuple(tensor for tensor in outputs if tensor is not None)

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted: list[bool] = list(ctx.needs_input_grad[3:])
        kept = ctx.saved_tensors  # read once: activation checkpointing hands it out no second time
        batch_sizes, resets, zoneout_mask, zoneout_cell_mask, input, h_0, *rest = kept
        c_0 = rest.pop(0) if len(d_outputs) > 2 else None
        inputs = len(wanted) - 2 - (c_0 is not None)
        call = Call(
            layer=ctx.layer,
            input=input,
            h_0=h_0,
            c_0=c_0,
            parameters=tuple(rest[:inputs]),
            batch_sizes=batch_sizes,
            resets=resets,
            zoneout_mask=zoneout_mask,
            zoneout_cell_mask=zoneout_cell_mask,
            zoneout=ctx.rates[0],
            zoneout_cell=ctx.rates[1],
        )
        d_all = d_outputs if c_0 is not None else (*d_outputs, None)
        found: Sequence[Tensor | None]
        if torch.is_grad_enabled():  # create_graph=True: the reference can be differentiated again, kernels cannot
            # Views, so that a gradient stops at its own tensor where one input was computed from another.
            call = call.with_tensors([tensor.view_as(tensor) for tensor in call.tensors()])
            found = gradients(call, d_outputs, wanted, create_graph=True)
        else:
            outputs, saved = Outputs(*rest[inputs : inputs + 3]), rest[inputs + 3 :]
            given = [tensor for tensor in d_outputs if tensor is not None]
            if ctx.watched or is_watched([input, *(t for t in kept if t is not None), *given]) or is_lazy(given):
                args = (*arguments(call, ctx.backend.name), *_listed(outputs), saved, *d_all, wanted)
                found = torch.ops.festina.recurrence_backward(*args)
                found = [gradient if want else None for gradient, want in zip(found, wanted, strict=True)]
            else:
                found = ctx.backend.backward(call, outputs, saved, d_all, wanted)
        return (None, None, None, *found)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        raise NotImplementedError(
            "forward-mode differentiation (torch.autograd.forward_ad) does not go through festina's operators; "
            "torch.func.jvp and torch.func.jacfwd do"
        )


# `Function.apply` without its Python part, which unwraps tensors that outlived a `torch.func` transform: a fifth of a cell's
# forward pass. A call that is watched takes the whole.
_apply = super(torch.autograd.Function, _Recurrence).apply


def record(backend: backends.Backend, call: Call, tensors: Sequence[Tensor], watched: bool = False) -> Outputs:
    """Carry out a call as a node of autograd's graph; by the operator if it is watched.

    Args:
        backend: the one that carries it out, forward and backward.
        call: the call, which `check_call` has passed.
        tensors: `call.tensors()`.
        watched: `is_watched(tensors)`, or one of the call's tensors `is_lazy`.
    """
    apply = _Recurrence.apply if watched else _apply
    output, h_n, *c_n = apply(backend, call, watched, *tensors)  # type: ignore[no-untyped-call]
    return Outputs(output, h_n, c_n[0] if c_n else None)


_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_REQUIRES_GRAD = attrgetter("requires_grad")
_IS_NEGATED, _IS_ZERO = Tensor.is_neg, Tensor._is_zerotensor


def is_watched(tensors: Sequence[Tensor]) -> bool:
    """True if tracing, a dispatch mode, a transform, the profiler or a tensor subclass must observe an operator, or if only
    shapes are asked for (meta tensors). The first tensor is a call's input, or a step's."""
    return (
        torch.compiler.is_compiling()
        or tensors[0].is_meta
        or _len_torch_dispatch_stack() > 0
        or _are_functorch_transforms_active()
        or _get_tracing_state() is not None
        or _profiler_enabled()
        or not _PLAIN.issuperset(map(type, tensors))
    )


def is_lazy(tensors: Sequence[Tensor]) -> bool:
    """True if the values of one are not those in its memory: it is to be negated when read, as the imaginary part of a
    conjugate is, or it is zeros without memory. A call takes the operator then: PyTorch hands that plain tensors."""
    return any(map(_IS_NEGATED, tensors)) or any(map(_IS_ZERO, tensors))


def is_recorded(tensors: Sequence[Tensor]) -> bool:
    """True if autograd records what is done with these tensors."""
    return torch.is_grad_enabled() and any(map(_REQUIRES_GRAD, tensors))


def _recurrence_autograd(*args: Any) -> tuple[Tensor, list[Tensor]]:
    *_, input, state, parameters = args
    if is_recorded((input, *state, *parameters)):
        backend, call = _parse(*args)
        tensors = call.tensors()
        if not (watched := is_watched(tensors) or is_lazy((*tensors, *call.around()))):
            check_call(call, tensors)
        return _listed(record(backend, call, tensors, watched))
    with torch._C._AutoDispatchBelowAutograd():
        result: tuple[Tensor, list[Tensor]] = torch.ops.festina.recurrence(*args)
    return result


for _name, _kernel, _fake in (
    ("sort_rows", sort_rows, _sort_rows_fake),
    ("sort_rows.traced", _sort_rows_traced, _sort_rows_traced_fake),
    ("recurrence", _recurrence, _recurrence_fake),
    ("recurrence_train", _recurrence_train, _recurrence_train_fake),
    ("recurrence_backward", _recurrence_backward, _recurrence_backward_fake),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"festina::{_name}", _fake, lib=_library)
_library.impl("recurrence", _recurrence_autograd, "Autograd")
