"""Calls inside `torch.func` transforms: kernels under `vmap` and `grad`, the reference under all others.

Under `vmap` the vmapped axis joins the rows of a batch where the parameters are shared. Where they are stacked, as those of
an ensemble, or where each part of the axis has its own gradients of shared parameters, the kernels run for one part after
the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import (
    TransformType,
    get_interpreter_stack,
    get_unwrapped,
    is_functorch_wrapped_tensor,
    is_legacy_batchedtensor,
)

from festina import backends, ops
from festina.backends.eager import EAGER
from festina.call import Call, Outputs
from festina.spec import LayerSpec

Gradients = Sequence[Tensor | None]
"""Of outputs or of inputs; None for zero, or for one that is not wanted."""


def run(call: Call, force: str) -> Outputs:
    """Carry out a call inside transforms, on the backend chosen for it where that is possible."""
    kinds = {interpreter.key() for interpreter in get_interpreter_stack() or ()}
    backend = backends.choose(call, force)
    if backend is EAGER or not kinds <= {TransformType.Vmap, TransformType.Grad} or torch.compiler.is_compiling():
        return EAGER.forward(call)
    tensors = map(_innermost, call.tensors())
    is_training = kinds != {TransformType.Vmap} or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
    output, h_n, *rest = _Forward.apply(is_training, *_arguments(backend, call))  # type: ignore[no-untyped-call]
    return Outputs(output, h_n, None if call.c_0 is None else rest[0])


def backward(
    backend: backends.Backend,
    call: Call,
    output: Tensor | None,
    saved: Sequence[Tensor],
    d_outputs: Gradients,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """The wanted gradients of a call, through any transform; the arguments are those of `ops.backward`."""
    arguments = (*_arguments(backend, call), output, *saved, *d_outputs[: 1 + len(call.state)])
    found = iter(_Backward.apply(tuple(wanted), *arguments))  # type: ignore[no-untyped-call]
    return [next(found) if want else None for want in wanted]


def one_by_one(differentiate: Callable[[Gradients], Gradients], d_outputs: Gradients) -> Gradients:
    """`differentiate` for each of the gradients that `is_grads_batched` and `vectorize=True` of `torch.autograd` hand over at
    once, as tensors of PyTorch's older vmap, which has no rule for our kernels; for `d_outputs` themselves if they are none."""
    if not any(d is not None and is_legacy_batchedtensor(d) for d in d_outputs):
        return differentiate(d_outputs)
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    V = max(torch._remove_batch_dim(d, level, 1, 0).shape[0] for d in d_outputs if d is not None)
    every = [None if d is None else torch._remove_batch_dim(d, level, V, 0) for d in d_outputs]
    found = zip(*(differentiate([None if d is None else d[v] for d in every]) for v in range(V)))
    return [None if one is None else torch._add_batch_dim(torch.stack([one, *rest]), 0, level) for one, *rest in found]


def _innermost(tensor: Tensor) -> Tensor:
    """The tensor that all transforms have wrapped."""
    while is_functorch_wrapped_tensor(tensor):
        tensor = get_unwrapped(tensor)
    return tensor


# Arguments of the two functions below: those of an operator, one after the other, as `torch.autograd.Function` looks into no
# list. The call's are `_AROUND` arguments, then input, states, parameters.

_AROUND = 8
"""backend, layer, batch_sizes, resets, zoneout_mask, zoneout_cell_mask, zoneout, zoneout_cell."""
_ROWS = (0, 1, 1)
"""The axis of the rows in input, h_0 and c_0, and in output, h_n and c_n."""


def _arguments(backend: backends.Backend, call: Call) -> tuple[Any, ...]:
    *around, input, state, parameters = ops.arguments(call, backend.name)
    return (*around, input, *state, *parameters)


def _count(arguments: Sequence[Any]) -> int:
    """How many tensors have rows: input and states, or output and last states."""
    return 1 + len(LayerSpec.parse(arguments[1]).cell.states)


def _parse(arguments: Sequence[Any]) -> tuple[backends.Backend, Call]:
    first = _AROUND + _count(arguments)
    input, *state = arguments[_AROUND:first]
    return ops.parse(*(*arguments[:_AROUND], input, state, arguments[first:]))


def _parse_backward(
    wanted: Sequence[bool], arguments: Sequence[Any]
) -> tuple[backends.Backend, Call, Tensor | None, Sequence[Tensor], Gradients]:
    end, of_outputs = _AROUND + len(wanted), len(arguments) - _count(arguments)
    backend, call = _parse(arguments[:end])
    output, *saved = arguments[end:of_outputs]
    return backend, call, output, saved, arguments[of_outputs:]


# The vmapped axis, of V parts. It is dim `dim` of a tensor that has it, and `dim` is None for one that has not.


def _joined(tensor: Tensor | None, dim: int | None, rows: int, V: int) -> Tensor | None:
    """`tensor` with the vmapped axis inside the one of its rows: all parts of a row stand one after the other."""
    if tensor is None:
        return None
    tensor = tensor.expand(V, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return tensor.movedim(0, rows + 1).flatten(rows, rows + 1)


def _parted(tensor: Tensor, rows: int, V: int) -> Tensor:
    """The inverse: the vmapped axis is `rows + 1`."""
    shape = tensor.shape
    return tensor.reshape(*shape[:rows], shape[rows] // V, V, *shape[rows + 1 :])


def _joined_call(arguments: Sequence[Any], dims: Sequence[int | None], V: int) -> list[Any]:
    """The arguments of the call that has the rows of all parts. Steps stay in order, and so do rows by their length."""
    backend, layer, batch_sizes, *masks, zoneout, zoneout_cell = arguments[:_AROUND]
    first = _AROUND + _count(arguments)
    masks = [_joined(mask, dim, 1, V) for mask, dim in zip(masks, dims[3:])]
    batch_sizes = None if batch_sizes is None else batch_sizes * V
    with_rows = map(_joined, arguments[_AROUND:first], dims[_AROUND:first], _ROWS, (V, V, V))
    return [backend, layer, batch_sizes, *masks, zoneout, zoneout_cell, *with_rows, *arguments[first:]]


def _part(arguments: Sequence[Any], dims: Sequence[int | None], v: int) -> list[Any]:
    """The arguments of part `v`."""
    return [a if dim is None else a.select(dim, v) for a, dim in zip(arguments, dims)]


def _is_shared(dims: Sequence[int | None]) -> bool:
    """True if all parts have these arguments in common."""
    return all(dim is None for dim in dims)


def _stacked(parts: Sequence[tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], int]:
    """The results of all parts, and the dim of the vmapped axis."""
    return tuple(map(torch.stack, zip(*parts))), 0


class _Forward(torch.autograd.Function):
    """A call: output, h_n, c_n if there is one, and in training what backward needs besides."""

    @staticmethod
    def forward(is_training: bool, *arguments: Any) -> tuple[Tensor, ...]:
        backend, call = _parse(arguments)
        tensors = call.tensors()
        watched = ops.is_watched(tensors) or ops.is_lazy((*tensors, *call.around()))
        saved: Sequence[Tensor] = ()
        if is_training:
            outputs, saved = ops.train(backend, call, watched)
        else:
            outputs = ops.recurrence(call, backend.name) if watched else backend.forward(call)
        return (*(tensor for tensor in outputs if tensor is not None), *saved)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, *arguments = inputs
        _, call = _parse(arguments)
        saved = output[_count(arguments) :]
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)
        (ctx.name, ctx.layer), ctx.rates = arguments[:2], arguments[6:_AROUND]
        ctx.save_for_backward(*arguments[2:6], *call.tensors(), ops.kept_output(call, output[0]), *saved)

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted, kept = ctx.needs_input_grad[1 + _AROUND :], ctx.saved_tensors
        end = 4 + len(wanted)
        backend, call = _parse((ctx.name, ctx.layer, *kept[:4], *ctx.rates, *kept[4:end]))
        output, *saved = kept[end:]
        d_outputs = d_outputs[: 1 + len(call.state)]

        def differentiate(d_outputs: Gradients) -> Gradients:
            if ops.has_tangents(d for d in d_outputs if d is not None):
                return _gradients(call, call.tensors(), d_outputs, wanted)
            return backward(backend, call, output, saved, d_outputs, wanted)

        return (*(None for _ in range(1 + _AROUND)), *one_by_one(differentiate, d_outputs))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], is_training: bool, *arguments: Any) -> tuple[Any, Any]:
        V, dims, count = info.batch_size, in_dims[1:], _count(arguments)
        first = _AROUND + count
        if _is_shared(dims[first:]):
            found = _Forward.apply(is_training, *_joined_call(arguments, dims, V))  # type: ignore[no-untyped-call]
            outputs, saved = map(_parted, found[:count], _ROWS, (V, V, V)), found[count:]
            return (*outputs, *saved), (*(rows + 1 for rows in _ROWS[:count]), *(None for _ in saved))
        parts = []
        for v in range(V):
            part = _part(arguments, dims, v)
            if not is_training:
                # A backend keeps panels of weights as long as their memory, which here is that of the whole stack.
                part[first:] = [p if dim is None else p.clone() for p, dim in zip(part[first:], dims[first:])]
            parts.append(_Forward.apply(is_training, *part))  # type: ignore[no-untyped-call]
        return _stacked(parts)


class _Backward(torch.autograd.Function):
    """The gradients of a call that are wanted.

    Its arguments are `wanted`, those of the call, `ops.kept_output`, what was saved, and the gradients of the outputs.
    """

    @staticmethod
    def forward(wanted: tuple[bool, ...], *arguments: Any) -> tuple[Tensor, ...]:
        backend, call, output, saved, d_outputs = _parse_backward(wanted, arguments)
        tensors = [*call.tensors(), *call.around(), *saved, *(d for d in d_outputs if d is not None)]
        watched = ops.is_watched(tensors) or ops.is_lazy(tensors)
        found = ops.backward(backend, call, output, saved, d_outputs, wanted, watched)
        return tuple(gradient for gradient in found if gradient is not None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        wanted, *arguments = inputs
        _, call, _, saved, d_outputs = _parse_backward(wanted, arguments)
        (ctx.name, ctx.layer), ctx.rates = arguments[:2], arguments[6:_AROUND]
        ctx.wanted, ctx.passed_over = wanted, 1 + len(saved)
        ctx.save_for_backward(*arguments[2:6], *call.tensors(), *d_outputs)

    @staticmethod
    def backward(ctx: Any, *d_found: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of gradients, by the reference."""
        kept, end = ctx.saved_tensors, 4 + len(ctx.wanted)
        _, call = _parse((ctx.name, ctx.layer, *kept[:4], *ctx.rates, *kept[4:end]))
        tensors, d_outputs = kept[4:end], kept[end:]

        def gradients(*values: Tensor) -> tuple[Tensor, ...]:
            given = iter(values[len(tensors) :])
            d_given = [None if d is None else next(given) for d in d_outputs]
            found = _gradients(call, values[: len(tensors)], d_given, ctx.wanted)
            return tuple(gradient for gradient in found if gradient is not None)

        pullback = torch.func.vjp(gradients, *tensors, *(d for d in d_outputs if d is not None))[1]
        found = iter(pullback(d_found))
        of_tensors = [next(found) for _ in tensors]
        of_given = [None if d is None else next(found) for d in d_outputs]
        return (*(None for _ in range(1 + _AROUND)), *of_tensors, *(None for _ in range(ctx.passed_over)), *of_given)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], wanted: tuple[bool, ...], *arguments: Any) -> tuple[Any, Any]:
        V, dims, count = info.batch_size, in_dims[1:], _count(arguments)
        first, end, of_outputs = _AROUND + count, _AROUND + len(wanted), len(arguments) - count
        was_joined = _is_shared(dims[first:end]) and not _is_shared(dims[:first])  # by `_Forward.vmap`
        if was_joined and not any(wanted[count:]):
            output = _joined(arguments[end], dims[end], 0, V)
            d_outputs = map(_joined, arguments[of_outputs:], dims[of_outputs:], _ROWS, (V, V, V))
            call = _joined_call(arguments[:end], dims, V)
            joined = (*call, output, *arguments[end + 1 : of_outputs], *d_outputs)
            axes = [rows for rows, want in zip(_ROWS, wanted) if want]
            found = _Backward.apply(wanted, *joined)  # type: ignore[no-untyped-call]
            return tuple(_parted(gradient, rows, V) for gradient, rows in zip(found, axes)), tuple(
                rows + 1 for rows in axes
            )
        parts = []
        for v in range(V):
            part = _part(arguments, dims, v)
            if was_joined:  # what was saved is of all parts at once, but each has its own gradients of the parameters
                output, *again = _Forward.apply(True, *part[:end])  # type: ignore[no-untyped-call]
                part[end:of_outputs] = [ops.kept_output(_parse(part[:end])[1], output), *again[count - 1 :]]
            parts.append(_Backward.apply(wanted, *part))  # type: ignore[no-untyped-call]
        return _stacked(parts)


def _gradients(call: Call, tensors: Sequence[Tensor], d_outputs: Gradients, wanted: Sequence[bool]) -> Gradients:
    """The wanted gradients of the call on these tensors, by the reference and through any transform."""

    def outputs(*chosen: Tensor) -> tuple[Tensor, ...]:
        values = iter(chosen)
        given = [next(values) if want else tensor for tensor, want in zip(tensors, wanted)]
        found = EAGER.forward(call.with_tensors(given))
        return tuple(out for out, d in zip(found, d_outputs) if out is not None and d is not None)

    pullback = torch.func.vjp(outputs, *(tensor for tensor, want in zip(tensors, wanted) if want))[1]
    found = iter(pullback(tuple(d for d in d_outputs if d is not None)))
    return [next(found) if want else None for want in wanted]
