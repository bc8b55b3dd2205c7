"""The node of autograd's graph (`festina.autograd`): double backward, forward mode, gradients in batches, saved tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from samples import FIVE_VARIANTS, assert_same, gradients, listed, make, random_state
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import festina
from festina import ops

T, B, I, H = 6, 4, 3, 5
F64: dict[str, Any] = {"dtype": torch.float64}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


# What backward gives


@pytest.mark.parametrize("variant", FIVE_VARIANTS)
def test_only_what_is_asked_for_gets_a_gradient(variant: str) -> None:
    layer, x = make(variant, I, H, **F64), torch.randn(T, B, I, **F64)
    want = dict(zip((name for name, _ in layer.named_parameters()), gradients(layer(x)[0], layer)))
    layer.requires_grad_(False)
    assert not layer(x)[0].requires_grad
    layer.weight_hh_l0.requires_grad_()
    layer(x)[0].square().sum().backward()
    assert_same(layer.weight_hh_l0.grad, want["weight_hh_l0"])
    assert all(p.grad is None for name, p in layer.named_parameters() if name != "weight_hh_l0")
    layer.eval()  # backward works in eval mode too
    layer(x)[0].square().sum().backward()
    assert_same(layer.weight_hh_l0.grad, 2 * want["weight_hh_l0"])


@pytest.mark.parametrize("variant", FIVE_VARIANTS)
def test_a_gradient_penalty_is_differentiated_exactly(variant: str) -> None:
    """WGAN-GP: the norm of the input's gradient is part of the loss; checked against finite differences."""
    layer, x = make(variant, I, H, **F64), torch.randn(T, B, I, **F64).requires_grad_()

    def penalty(weight: Tensor) -> Tensor:
        output = functional_call(layer, {"weight_hh_l0": weight}, (x,))[0]
        (d_x,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
        return (d_x.square().sum((0, 2)).sqrt() - 1).square().sum()

    assert torch.autograd.gradcheck(penalty, (layer.weight_hh_l0.detach().requires_grad_(),))


@pytest.mark.parametrize("variant", FIVE_VARIANTS)
def test_gradients_with_a_graph_where_one_tensor_is_computed_from_another(variant: str) -> None:
    """The state depends on the input and on a weight: both orders of gradients count each way from one to the other once."""
    cell, x = make(variant, 3, 3, cell=True, **F64), torch.randn(2, 3, **F64).requires_grad_()

    def output(x: Tensor, weight: Tensor) -> Any:
        states = tuple(k * x * weight[:3].sum(0) for k in (0.5, 0.3))
        hx = states if variant.startswith("lstm") else states[0]
        new = functional_call(cell, {"weight_ih": weight}, (x, hx))
        return (new[0] if isinstance(new, tuple) else new).square().sum()

    leaves = (x, cell.weight_ih.detach().requires_grad_())
    plain, with_graph = (torch.autograd.grad(output(*leaves), leaves, create_graph=graph) for graph in (False, True))
    assert_same(list(with_graph), list(plain))
    assert torch.autograd.gradgradcheck(output, leaves)


# Forward mode


def calls(variant: str) -> Iterator[tuple[torch.nn.Module, Callable[[Tensor], tuple[Tensor, ...]], Tensor]]:
    """A layer over sequences with lengths and resets, and a cell with resets: module, function of its input, input."""
    layer, cell = make(variant, I, H, **F64), make(variant, I, H, cell=True, **F64)
    resets, hx = torch.rand(T, B) < 0.3, random_state(cell, 0, B)

    def over_time(x: Tensor) -> tuple[Tensor, ...]:
        output, state = layer(x, lengths=[3, T, 0, 2], resets=resets)
        return output, *listed(state)

    def one_step(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(listed(cell(x, hx, resets=resets[0])))

    def plain_step(x: Tensor) -> tuple[Tensor, ...]:  # the way that prepared steps take
        return tuple(listed(cell(x, hx)))

    yield layer, over_time, torch.randn(T, B, I, **F64)
    yield cell, one_step, torch.randn(B, I, **F64)
    yield cell, plain_step, torch.randn(B, I, **F64)


def tangents(function: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor, v: Tensor) -> list[Tensor | None]:
    with forward_ad.dual_level():
        outputs = function(forward_ad.make_dual(x, v))
        return [forward_ad.unpack_dual(output).tangent for output in outputs]


@pytest.mark.parametrize("variant", FIVE_VARIANTS)
def test_forward_mode_gives_the_derivative_whatever_requires_a_gradient(variant: str) -> None:
    """Against two passes backward. Nothing of a call requires a gradient if its weights are frozen, or under no_grad."""
    for module, function, x in calls(variant):
        v = torch.randn_like(x)
        want = torch.autograd.functional.jvp(function, x, v)[1]
        for frozen, mode in ((False, nullcontext), (True, nullcontext), (False, torch.no_grad)):
            module.requires_grad_(not frozen)
            with mode():
                function(x)  # a cell prepares its next step
                assert_same(tangents(function, x, v), list(want))
        with torch.profiler.profile():
            assert_same(tangents(function, x, v), list(want))


def test_a_tangent_of_any_tensor_of_a_call_is_followed() -> None:
    """Of a parameter and a state as of the input, by the operator too; where there is none, there is none of the output."""
    layer, x, hx = make("gru-haste", I, H, **F64), torch.randn(T, B, I, **F64), torch.randn(1, B, H, **F64)
    call = layer._call(layer.layer_parameters(), x.flatten(0, 1), [hx])
    tensors = call.tensors()
    for at, tensor in enumerate(tensors):

        def output(value: Tensor, at: int = at) -> tuple[Tensor, ...]:
            moved = call.with_tensors([*tensors[:at], value, *tensors[at + 1 :]])
            return tuple(torch.ops.festina.recurrence(*ops.arguments(moved, ""))[:1])

        v = torch.randn_like(tensor)
        want = torch.autograd.functional.jvp(output, tensor.detach(), v)[1]
        with torch.no_grad():
            assert_same(tangents(output, tensor, v), list(want))
    assert len(tensors) == 2 + len(list(layer.parameters()))
    with forward_ad.dual_level():
        assert forward_ad.unpack_dual(layer(x, hx)[0]).tangent is None


@pytest.mark.parametrize("variant", ["lstm-haste", "gru"])
def test_forward_mode_over_backward(variant: str) -> None:
    """A gradient is linear in the cotangent, and so carries its tangent on; that of a dual input is the Hessian's product."""
    layer, x = make(variant, I, H, **F64), torch.randn(T, B, I, **F64).requires_grad_()
    output = layer(x)[0]
    cotangent, v = torch.randn_like(output), torch.randn_like(output)
    with forward_ad.dual_level():
        (d_x,) = torch.autograd.grad(output, x, forward_ad.make_dual(cotangent, v), retain_graph=True)
        tangent = forward_ad.unpack_dual(d_x).tangent
    assert_same(tangent, torch.autograd.grad(output, x, v)[0])

    def loss(x: Tensor) -> Tensor:
        return layer(x)[0].square().sum()  # type: ignore[no-any-return]

    direction = torch.randn_like(x)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.detach().requires_grad_(), direction)
        (d_x,) = torch.autograd.grad(loss(dual), dual)
        tangent = forward_ad.unpack_dual(d_x).tangent
    assert_same(tangent, torch.autograd.functional.hvp(loss, x.detach(), direction)[1])


# Gradients in batches


@pytest.mark.parametrize("variant", FIVE_VARIANTS)
def test_gradients_of_many_cotangents_at_once(variant: str) -> None:
    layer, x = make(variant, I, H, **F64), torch.randn(T, B, I, **F64).requires_grad_()
    output, state = layer(x, lengths=[3, T, 0, 2])
    outputs, inputs = [output, *listed(state)], [x, *layer.parameters()]
    cotangents = [torch.randn(3, *out.shape, **F64) for out in outputs]
    for create_graph in (False, True):
        got = torch.autograd.grad(
            outputs, inputs, cotangents, is_grads_batched=True, retain_graph=True, create_graph=create_graph
        )
        for v in range(3):
            want = torch.autograd.grad(outputs, inputs, [c[v] for c in cotangents], retain_graph=True)
            assert_same([g[v] for g in got], list(want))


@pytest.mark.parametrize("variant", ["lstm-haste", "gru-dreamer"])
def test_vectorised_jacobians_and_hessians(variant: str) -> None:
    layer, x = make(variant, I, 4, **F64), torch.randn(2, 2, I, **F64)
    functional = torch.autograd.functional

    def output(x: Tensor) -> Tensor:
        return layer(x)[0]  # type: ignore[no-any-return]

    def loss(x: Tensor) -> Tensor:
        return output(x).square().sum()

    want = functional.jacobian(output, x)
    for strategy in ("reverse-mode", "forward-mode"):
        assert_same(functional.jacobian(output, x, vectorize=True, strategy=strategy), want)
    want = functional.hessian(loss, x)
    for strategy in ("reverse-mode", "forward-mode"):
        assert_same(functional.hessian(loss, x, vectorize=True, outer_jacobian_strategy=strategy), want)


def test_gradcheck_of_both_modes_and_in_batches() -> None:
    layer, x = make("lstm-haste", 2, 3, **F64), torch.randn(2, 1, 2, **F64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: layer(x)[0], (x,), check_forward_ad=True, check_batched_grad=True)


# A state that is changed in place


@pytest.mark.parametrize("is_watched", [False, True], ids=["plain", "profiled"])
@pytest.mark.parametrize("variant", FIVE_VARIANTS)
def test_a_state_may_be_changed_in_place_between_steps_of_a_cell(variant: str, is_watched: bool) -> None:
    """As `torch.nn`'s cells allow: rows whose episode ends are zeroed, before the next step and before backward."""
    cell, steps = make(variant, I, H, cell=True, **F64), torch.randn(T, B, I, **F64)
    hx, goes_on = random_state(cell, 0, B), torch.tensor([[0.0], [1.0], [0.5], [1.0]], **F64)

    def by_row(state: Tensor) -> Tensor:
        state[0] = 0
        state[2] *= 0.5
        return state

    def train(change: Callable[[Tensor], Tensor]) -> list[Tensor]:
        state, loss = hx, torch.zeros((), **F64)
        for x in steps:
            new = [change(s) for s in listed(cell(x, state))]
            loss = loss + sum(s.square().sum() for s in new)
            state = tuple(new) if len(new) > 1 else new[0]
        return list(torch.autograd.grad(loss, list(cell.parameters())))

    want = train(lambda state: state * goes_on)
    with torch.profiler.profile() if is_watched else nullcontext():
        assert_same(train(by_row), want)
        assert_same(train(lambda state: state.mul_(goes_on)), want)


@pytest.mark.parametrize("variant", FIVE_VARIANTS)
def test_last_states_of_a_layer_may_be_changed_in_place(variant: str) -> None:
    layer, x = make(variant, I, H, **F64), torch.randn(T, B, I, **F64)

    def loss(change: Callable[[Tensor], Tensor]) -> Tensor:
        output, state = layer(x)
        output, state = layer(x, change(state) if isinstance(state, Tensor) else tuple(map(change, state)))
        return output.square().sum() + sum(change(s).sum() for s in listed(state))  # type: ignore[no-any-return]

    parameters = list(layer.parameters())
    want = torch.autograd.grad(loss(lambda state: state * 0.5), parameters)
    assert_same(torch.autograd.grad(loss(lambda state: state.mul_(0.5)), parameters), want)


# Saved tensors


def test_several_graphs_live_at_once_and_each_may_run_twice() -> None:
    layer = make("lstm-haste", I, H, **F64)
    inputs = [torch.randn(T, B, I, **F64) for _ in range(2)]
    alone = [gradients(layer(x)[0], layer) for x in inputs]
    losses = [layer(x)[0].square().sum() for x in inputs]
    weights = list(layer.parameters())
    for k in (1, 0, 1):
        assert_same(list(torch.autograd.grad(losses[k], weights, retain_graph=True)), alone[k])
    torch.autograd.grad(losses[0], weights)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(losses[0], weights)


def test_no_gradient_after_a_saved_tensor_was_changed() -> None:
    """The output of several steps is saved, as nn.LSTM saves it: a copy would take as much memory again."""
    for change in ("output", "input", "weight_hh_l0"):
        layer, x = make("lstm-haste", I, H), torch.randn(T, B, I)
        output, (h_n, _) = layer(x)
        with torch.no_grad():
            {"output": output, "input": x, "weight_hh_l0": layer.weight_hh_l0}[change].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            h_n.sum().backward()


@pytest.mark.parametrize("variant", ["lstm-haste", "gru"])
def test_no_gradient_after_what_a_step_started_from_was_changed(variant: str) -> None:
    for index in range(2):
        cell, x = make(variant, I, H, cell=True), torch.randn(B, I)
        hx = random_state(cell, 0, B)
        new = listed(cell(x, hx))
        (x, listed(hx)[-1])[index].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            new[0].sum().backward()


def test_resets_changed_before_backward_are_an_error() -> None:
    layer, resets = festina.LayerNormGRU(3, 4), torch.zeros(5, 2, dtype=torch.bool)
    output, _ = layer(torch.randn(5, 2, 3), resets=resets)
    resets.logical_not_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_activations_changes_no_gradient(use_reentrant: bool) -> None:
    torch.manual_seed(0)
    layer = make("lstm-haste", I, H, zoneout=0.3, zoneout_cell=0.2, dropconnect=0.4, dtype=torch.float64)
    x = torch.randn(6, 2, I, dtype=torch.float64, requires_grad=True)

    def flat(x: Tensor) -> tuple[Tensor, ...]:
        output, (h_n, c_n) = layer(x)
        return output, h_n, c_n  # reentrant checkpointing loses the gradients of an inner tuple, for torch.nn too

    def gradients_by(run: Callable[..., Any]) -> list[Tensor]:
        torch.manual_seed(1)  # the same masks of Zoneout and DropConnect for both, and again in recomputation
        output, h_n, c_n = run(flat, x)
        layer.zero_grad()
        x.grad = None
        (output.square().sum() + h_n.sum() + c_n.square().sum()).backward()
        return [tensor.grad for tensor in (x, *layer.parameters()) if tensor.grad is not None]

    want = gradients_by(lambda run, *args: run(*args))
    got = gradients_by(lambda run, *args: checkpoint(run, *args, use_reentrant=use_reentrant))
    assert len(want) == 1 + len(list(layer.parameters()))
    assert_same(got, want)
