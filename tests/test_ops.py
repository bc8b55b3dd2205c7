"""Operators and the node of autograd's graph (`festina.ops`): opcheck, double backward, several graphs, saved tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from samples import FIVE_VARIANTS, assert_same, gradients, make, random_state
from torch import Tensor
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import festina
from festina import backends, ops, sequences

T, B, I, H = 6, 4, 3, 5
F64: dict[str, Any] = {"dtype": torch.float64}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


# Operators


def sample_calls() -> dict[str, tuple[Any, ...]]:
    """Arguments of `recurrence` as layers make them in training; together they use every option."""

    def arguments(variant: str, extra: dict[str, Any], **options: Any) -> tuple[Any, ...]:
        layer = make(variant, I, H, **options)
        D = layer.spec.directions
        steps, packed = sequences.pack(torch.randn(T, B, I), D, **extra)
        state = random_state(layer, D, B)
        state = list(state) if isinstance(state, tuple) else [state]
        around = {"batch_sizes": packed.batch_sizes, "resets": packed.resets}
        call = layer._call(layer.layer_parameters(), steps, state, **around)
        return ops.arguments(call, backends.forced())

    lengths, resets = {"lengths": [3, 6, 0, 2]}, {"resets": torch.rand(T, B) < 0.3}
    return {
        "masks": arguments("gru-dreamer", {**lengths, **resets}, zoneout=0.5),
        "everything": arguments(
            "lstm-icefall", {**lengths, **resets}, bidirectional=True, proj_size=2, zoneout=0.5, zoneout_cell=0.5
        ),
        "indrnn": arguments("indrnn-haste", resets),
    }


@pytest.mark.parametrize("case", ["masks", "everything", "indrnn"])
def test_opcheck(case: str) -> None:
    """Every operator: schema, fake shapes, autograd, dispatch in compiled graphs."""
    *options, input, state, parameters = sample_calls()[case]
    call = (*options, input, state, [p.detach() for p in parameters])
    output, state_n, saved = torch.ops.festina.recurrence_train(*call)
    d_output, d_h_n, d_c_n = (*(torch.randn_like(t) for t in (output, *state_n)), None)[:3]
    wanted = [True] * (1 + len(state) + len(parameters))
    traced = ("test_aot_dispatch_dynamic",)
    for name, args, more in (
        ("recurrence", (*options, input.clone().requires_grad_(), state, list(parameters)), traced),
        ("recurrence_train", call, ()),  # it saves padding that is neither written nor read, so two calls differ
        ("recurrence_backward", (*call, output, state_n, saved, d_output, d_h_n, d_c_n, wanted), traced),
    ):
        utils = ("test_schema", "test_faketensor", *more)
        torch.library.opcheck(getattr(torch.ops.festina, name).default, args, test_utils=utils)


def test_opcheck_of_sort_rows() -> None:
    for lengths in ([3, 0, 5, 5], [0, 0], []):
        args = (torch.tensor(lengths, dtype=torch.int64), 5, True)
        torch.library.opcheck(torch.ops.festina.sort_rows.default, args)


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


def test_forward_mode_says_where_to_go() -> None:
    layer, x = festina.LayerNormLSTM(I, H), torch.randn(T, B, I)
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match=r"forward-mode .* torch.func.jvp and torch.func.jacfwd do"),
    ):
        layer(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))


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
    for change in ("output", "input", "weight_hh_l0"):
        layer, x = make("lstm-haste", I, H), torch.randn(T, B, I)
        output, (h_n, _) = layer(x)
        with torch.no_grad():
            {"output": output, "input": x, "weight_hh_l0": layer.weight_hh_l0}[change].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            h_n.sum().backward()


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
