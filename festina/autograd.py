"""A call as a node of autograd's graph: gradients by kernels; by the reference where they are to be differentiated again."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active

from festina import backends, ops, transforms
from festina.backends.eager import EAGER, gradients
from festina.call import Call, Outputs, Step
from festina.checks import check_call
from festina.spec import LayerSpec
from festina.transforms import Gradients, one_by_one

_REQUIRES_GRAD, _IS_META = attrgetter("requires_grad"), attrgetter("is_meta")


class _Recurrence(torch.autograd.Function):
    """A call as a node of autograd's graph. Nothing saved is ever overwritten, so backward may run more than once."""

    @staticmethod
    def forward(ctx: Any, backend: backends.Backend, call: Call, watched: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        """`tensors` are those of the call, once more: autograd has to see them."""
        outputs, saved = ops.train(backend, call, watched)
        ctx.backend, ctx.watched, ctx.layer, ctx.rates = backend, watched, call.layer, (call.zoneout, call.zoneout_cell)
        # Tensors go through `save_for_backward`, which notices writes in place and serves checkpointing, not with the call.
        around = (call.batch_sizes, call.resets, call.zoneout_mask, call.zoneout_cell_mask)
        ctx.save_for_backward(*around, *tensors, ops.kept_output(call, outputs.output), *saved)
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
        kind = (ctx.backend, call, rest[inputs], rest[inputs + 1 :], wanted, ctx.watched)
        return (None, None, None, *one_by_one(partial(_differentiate, *kind), d_outputs))


def _differentiate(
    backend: backends.Backend,
    call: Call,
    output: Tensor | None,
    saved: Sequence[Tensor],
    wanted: list[bool],
    watched: bool,
    d_outputs: Gradients,
) -> Gradients:
    """The wanted gradients of a call: by the backend's kernels unless they are to be differentiated again."""
    given = [tensor for tensor in d_outputs if tensor is not None]
    is_again = torch.is_grad_enabled()  # create_graph=True
    if is_again or ops.has_tangents(given):
        with torch.enable_grad():
            # Views, so that a gradient stops at its own tensor where one input was computed from another.
            views = call.with_tensors([tensor.view_as(tensor) for tensor in call.tensors()])
            return gradients(views, d_outputs, wanted, create_graph=is_again)
    if _are_functorch_transforms_active():
        return transforms.backward(backend, call, output, saved, d_outputs, wanted)
    watched = watched or ops.is_watched([*call.tensors(), *call.around(), *saved, *given]) or ops.is_lazy(given)
    return ops.backward(backend, call, output, saved, d_outputs, wanted, watched)


# `Function.apply` without its Python part, which unwraps tensors that outlived a `torch.func` transform: a fifth of a cell's
# forward pass. A call that is watched takes the whole.
_apply = super(torch.autograd.Function, _Recurrence).apply


def record(backend: backends.Backend, call: Call, tensors: Sequence[Tensor], watched: bool = False) -> Outputs:
    """Carry out a call as a node of autograd's graph; by the operator if it is watched.

    Args:
        backend: the one that carries it out, forward and backward.
        call: the call, which `check_call` has passed.
        tensors: `call.tensors()`.
        watched: `ops.is_watched(tensors)`, or one of the call's tensors `ops.is_lazy`.
    """
    apply = _Recurrence.apply if watched else _apply
    output, h_n, *c_n = apply(backend, call, watched, *tensors)  # type: ignore[no-untyped-call]
    return Outputs(output, h_n, c_n[0] if c_n else None)


class _Step(torch.autograd.Function):
    """A step of a cell that has been taken, as a node of autograd's graph."""

    @staticmethod
    def forward(
        ctx: Any, backend: backends.Backend, layer: LayerSpec, rates: tuple[float, float], step: Step, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.backend, ctx.layer, ctx.rates = backend, layer, rates
        ctx.save_for_backward(*tensors, *step.saved)
        ctx.set_materialize_grads(False)
        return tuple(step.state)

    @staticmethod
    def backward(ctx: Any, *d_state: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted: list[bool] = list(ctx.needs_input_grad[4:])
        input, *rest = ctx.saved_tensors
        states, inputs = len(d_state), len(wanted) - 1
        call = Call(
            layer=ctx.layer,
            input=input,
            h_0=rest[0].unsqueeze(0),
            c_0=rest[1].unsqueeze(0) if states > 1 else None,
            parameters=tuple(rest[states:inputs]),
            zoneout=ctx.rates[0],
            zoneout_cell=ctx.rates[1],
        )
        d_h, d_c = (*d_state, None)[:2]
        d_outputs = (d_h, None, d_c if d_c is None else d_c.unsqueeze(0))[: states + 1]
        kind = (ctx.backend, call, None, rest[inputs:], wanted, False)
        d_input, *found = one_by_one(partial(_differentiate, *kind), d_outputs)
        d_old = [d if d is None else d.squeeze(0) for d in found[:states]]
        return (None, None, None, None, d_input, *d_old, *found[states:])


_apply_step = super(torch.autograd.Function, _Step).apply


def record_step(
    backend: backends.Backend, layer: LayerSpec, rates: tuple[float, float], step: Step, tensors: Sequence[Tensor]
) -> list[Tensor]:
    """The new states of a step that a backend has taken in training, as a node of autograd's graph.

    Args:
        backend: the one that has taken it, and differentiates it.
        layer, rates: of the cell, and of Zoneout on h and on c by the expectation.
        step: its results, which nothing else has seen.
        tensors: input, state, parameters.
    """
    return [*_apply_step(backend, layer, rates, step, *tensors)]  # type: ignore[no-untyped-call]


def is_recorded(tensors: Sequence[Tensor]) -> bool:
    """True if autograd records what is done with these tensors."""
    return torch.is_grad_enabled() and any(map(_REQUIRES_GRAD, tensors))


def _recurrence_autograd(*args: Any) -> tuple[Tensor, list[Tensor]]:
    *_, input, state, parameters = args
    tensors = [input, *state, *parameters]
    if ops.has_tangents(tensors):
        _, call = ops.parse(*args)
        check_call(call, tensors)
        return ops.listed(EAGER.forward(call))
    every = [*tensors, *(tensor for tensor in args[2:6] if tensor is not None)]
    watched = ops.is_watched(every) or ops.is_lazy(every)
    if is_recorded(tensors):
        backend, call = ops.parse(*args)
        if not watched:
            check_call(call, tensors)
        return ops.listed(record(backend, call, tensors, watched))
    # A second pass through the dispatcher would end there too, but for a call in which one tensor alone is on meta.
    if not (watched or any(map(_IS_META, every))):
        return ops.carry_out(*args)
    with torch._C._AutoDispatchBelowAutograd():
        result: tuple[Tensor, list[Tensor]] = torch.ops.festina.recurrence(*args)
    return result


ops.library.impl("recurrence", _recurrence_autograd, "Autograd")
