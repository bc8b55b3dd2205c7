"""The operators `festina::recurrence`, its train and backward forms, and `sort_rows`: schemas, fake shapes, who calls them.

One operator call is one layer over time, every direction. PyTorch calls them when a graph is traced, replayed, exported or
watched; a backend is called directly otherwise. Under autograd (`festina.autograd`) `recurrence` becomes `recurrence_train`,
whose output and saved tensors `recurrence_backward` turns into gradients. The backend is chosen when `recurrence` runs,
unless one is forced; the other two are told which, since they share what is saved.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _get_tracing_state, _len_torch_dispatch_stack
from torch._C._autograd import _profiler_enabled
from torch.autograd import forward_ad

from festina import backends, flops
from festina.call import OWNERS, Call, Outputs
from festina.checks import check_call, check_lengths, check_tensors
from festina.sequences import sort_rows
from festina.spec import LayerSpec

_CALL = (
    "str backend, str layer, Tensor? batch_sizes, Tensor? resets, Tensor? zoneout_mask, Tensor? zoneout_cell_mask, "
    "float zoneout, float zoneout_cell, Tensor input, Tensor[] state, Tensor[] parameters"
)

library = torch.library.Library("festina", "DEF")
library.define(
    "sort_rows(Tensor lengths, SymInt T, bool batch_first) -> (Tensor order, Tensor batch_sizes, Tensor index)"
)
library.define(  # for torch.jit.trace, which writes every int into the graph as a constant
    "sort_rows.traced(Tensor lengths, Tensor T, Tensor B, bool batch_first) "
    "-> (Tensor order, Tensor batch_sizes, Tensor index)"
)
library.define(f"recurrence({_CALL}) -> (Tensor output, Tensor[] state_n)")
library.define(f"recurrence_train({_CALL}) -> (Tensor output, Tensor[] state_n, Tensor[] saved)")
library.define(
    f"recurrence_backward({_CALL}, Tensor output, Tensor[] saved, "
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


def parse(
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
    """The backend and the call of an operator's arguments, unchecked."""
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
    backend, call = parse(*args)
    check_call(call, call.tensors())
    # A compiled graph hands over the parameters without their module, which says how far panels of them can be trusted.
    call.owner = OWNERS.get(id(call.parameters[0]))
    return backend, call


def listed(outputs: Outputs) -> tuple[Tensor, list[Tensor]]:
    """Outputs as an operator gives them."""
    return outputs.output, [state for state in outputs[1:] if state is not None]


def _outputs(output: Tensor, state_n: Sequence[Tensor]) -> Outputs:
    return Outputs(output, state_n[0], state_n[1] if len(state_n) > 1 else None)


# Calls that are carried out by an operator, or by the backend itself.


def recurrence(call: Call, backend: str) -> Outputs:
    """Carry out a call by the operator."""
    flops.register()
    return _outputs(*torch.ops.festina.recurrence(*arguments(call, backend)))


def train(backend: backends.Backend, call: Call, watched: bool) -> tuple[Outputs, list[Tensor]]:
    """Carry out a call in training, by the operator if it is watched: the outputs, and what `backward` needs besides."""
    if not watched:
        return backend.forward_train(call)
    flops.register()
    with torch._C._AutoDispatchBelowAutograd():
        output, state_n, saved = torch.ops.festina.recurrence_train(*arguments(call, backend.name))
    return _outputs(output, state_n), saved


def kept_output(call: Call, output: Tensor) -> Tensor | None:
    """The output as backward must find it; None if nothing of it is read, as there is one step.

    A step of a cell keeps no output, so that its caller may change the new state in place before backward.
    """
    N, B = call.input.shape[0], call.h_0.shape[1]
    if call.batch_sizes is None and not isinstance(N, torch.SymInt) and N == B:
        return None
    return output


def backward(
    backend: backends.Backend,
    call: Call,
    output: Tensor | None,
    saved: Sequence[Tensor],
    d_outputs: Sequence[Tensor | None],
    wanted: Sequence[bool],
    watched: bool,
) -> Sequence[Tensor | None]:
    """The gradients of a call that `train` carried out, those that are wanted, by the operator if it is watched.

    Args:
        output: `kept_output`.
        d_outputs: of output, h_n, and c_n if there is one; None means zero.
    """
    if output is None:
        D, _, P = call.h_0.shape
        output = call.input.new_empty(call.input.shape[0], D * P)
    d_all = (*d_outputs, None)[:3]
    if not watched:
        return backend.backward(call, output, saved, d_all, wanted)
    flops.register()
    found = torch.ops.festina.recurrence_backward(*arguments(call, backend.name), output, saved, *d_all, wanted)
    return [gradient if want else None for gradient, want in zip(found, wanted, strict=True)]


# What the operators compute, and the shapes of it.


def _prepared_step(*args: Any) -> tuple[Tensor, list[Tensor]] | None:
    """What `carry_out` gives, by the shorter way of a backend that `festina.dispatch.step` takes for a cell. None, with
    nothing done, if that does not serve the call; nothing need be checked before."""
    name, layer, *around, zoneout, zoneout_cell, input, state, parameters = args
    has_rows = state and input.dim() == 2 and state[0].dim() == 3
    if not has_rows or input.shape[0] != state[0].shape[1] or any(tensor is not None for tensor in around):
        return None
    spec, rates = LayerSpec.parse(layer), (zoneout, zoneout_cell)
    if spec.directions != 1:
        return None
    for backend in backends.steppers(name):
        step = backend.step(
            layer=spec, parameters=parameters, input=input, state=state, rates=rates, is_training=False, lead=(1,)
        )
        if step is not None:
            return torch.squeeze_copy(step.state[0], 0), step.state  # an operator's results share no memory
    return None


def carry_out(*args: Any) -> tuple[Tensor, list[Tensor]]:
    """What the operator `recurrence` computes of its arguments, plain tensors that nobody watches."""
    step = _prepared_step(*args)
    if step is not None:
        return step
    backend, call = _admit(*args)
    return listed(backend.forward(call))


def _recurrence_train(*args: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    backend, call = _admit(*args)
    outputs, saved = backend.forward_train(call)
    return (*listed(outputs), saved)


def _recurrence_backward(*args: Any) -> list[Tensor]:
    *call_args, output, saved, d_output, d_h_n, d_c_n, wanted = args
    backend, call = _admit(*call_args)
    d_outputs = (d_output, d_h_n, d_c_n)
    if len(wanted) != len(call.tensors()):
        raise ValueError(f"wanted must hold {len(call.tensors())} flags for this call, got {len(wanted)}")
    _check_backward(backend, call, output, saved, d_outputs)
    found = backend.backward(call, output, saved, d_outputs, wanted)
    return [call.input.new_empty(0) if gradient is None else gradient for gradient in found]


def _check_backward(
    backend: backends.Backend,
    call: Call,
    output: Tensor,
    saved: Sequence[Tensor],
    d_outputs: Sequence[Tensor | None],
) -> None:
    """Raise unless the output, what was saved and the gradients of the outputs belong to such a call."""
    device = call.input.device
    # Shapes alone: nothing is allocated. Of the parameters nothing is made.
    call = call.with_tensors([*(tensor.to("meta") for tensor in (call.input, *call.state)), *call.parameters])
    outputs, kept = _outputs(*_shapes(call)), backend.saved_like(call)
    if len(saved) != len(kept):
        raise ValueError(f"saved must hold {len(kept)} tensors for this call on {backend.name}, got {len(saved)}")
    pairs: list[tuple[str, Tensor | None, Tensor | None]] = [("output", outputs.output, output)]
    pairs += [("saved", *pair) for pair in zip(kept, saved)]
    pairs += zip(("d_output", "d_h_n", "d_c_n"), outputs, d_outputs)
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
    backend, call = parse(*args)
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
    *call_args, _output, _saved, _d_output, _d_h_n, _d_c_n, wanted = args
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


# When a call takes the operator, and when only the reference serves.

_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_IS_NEGATED, _IS_ZERO = Tensor.is_neg, Tensor._is_zerotensor


def is_watched(tensors: Sequence[Tensor]) -> bool:
    """True if tracing, a dispatch mode, a transform, the profiler or a tensor subclass must observe an operator, if there may
    be tangents, or if only shapes are asked for (meta tensors). The first tensor is a call's input, or a step's."""
    return (
        torch.compiler.is_compiling()
        or tensors[0].is_meta
        or _len_torch_dispatch_stack() > 0
        or _are_functorch_transforms_active()
        or _get_tracing_state() is not None
        or _profiler_enabled()
        or forward_ad._current_level >= 0
        or not _PLAIN.issuperset(map(type, tensors))
    )


def is_lazy(tensors: Sequence[Tensor]) -> bool:
    """True if the values of one are not those in its memory: it is to be negated when read, as the imaginary part of a
    conjugate is, or it is zeros without memory. A call takes the operator then: PyTorch hands that plain tensors."""
    return any(map(_IS_NEGATED, tensors)) or any(map(_IS_ZERO, tensors))


def has_tangents(tensors: Iterable[Tensor]) -> bool:
    """True if forward-mode differentiation follows one of these tensors, which `is_watched` then."""
    if forward_ad._current_level < 0:
        return False
    return _are_functorch_transforms_active() or any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)


for _name, _kernel, _fake in (
    ("sort_rows", sort_rows, _sort_rows_fake),
    ("sort_rows.traced", _sort_rows_traced, _sort_rows_traced_fake),
    ("recurrence", carry_out, _recurrence_fake),
    ("recurrence_train", _recurrence_train, _recurrence_train_fake),
    ("recurrence_backward", _recurrence_backward, _recurrence_backward_fake),
):
    library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"festina::{_name}", _fake, lib=library)
