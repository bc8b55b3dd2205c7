"""At home in PyTorch: operators, compile, export, functional transforms, double backward, autocast, threads, autograd."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from samples import FIVE_VARIANTS, VARIANTS, assert_same, gradients, make, random_state
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, stack_module_state, vmap
from torch.nn.utils import prune

import festina
from festina import backends, ops, sequences

T, B, I, H = 6, 4, 3, 5
F64: dict[str, Any] = {"dtype": torch.float64}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


# Operators


def sample_calls() -> dict[str, tuple[Any, ...]]:
    """Arguments of `recurrence` as layers make them, in training, with every option somewhere."""

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
    """Schema, fake shapes, autograd and the dispatch of compiled graphs, of every operator."""
    *options, input, state, parameters = sample_calls()[case]
    call = (*options, input, state, [p.detach() for p in parameters])
    output, state_n, saved = torch.ops.festina.recurrence_train(*call)
    d_output, d_h_n, d_c_n = (*(torch.randn_like(t) for t in (output, *state_n)), None)[:3]
    wanted = [True] * (1 + len(state) + len(parameters))
    traced = ("test_aot_dispatch_dynamic",)
    for name, args, more in (
        ("recurrence", (*options, input.clone().requires_grad_(), state, list(parameters)), traced),
        ("recurrence_train", call, ()),  # what it saves has padding that nobody writes or reads: no two calls agree
        ("recurrence_backward", (*call, output, state_n, saved, d_output, d_h_n, d_c_n, wanted), traced),
    ):
        utils = ("test_schema", "test_faketensor", *more)
        torch.library.opcheck(getattr(torch.ops.festina, name).default, args, test_utils=utils)


def test_opcheck_of_sort_rows() -> None:
    for lengths in ([3, 0, 5, 5], [0, 0], []):
        args = (torch.tensor(lengths, dtype=torch.int64), 5, True)
        torch.library.opcheck(torch.ops.festina.sort_rows.default, args)


# torch.func


@pytest.mark.parametrize("variant", FIVE_VARIANTS)
def test_functional_transforms(variant: str) -> None:
    layer, x = make(variant, I, H, **F64), torch.randn(T, B, I, **F64)
    parameters = dict(layer.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(layer, parameters, (x,))[0].square().sum()  # type: ignore[no-any-return]

    want = dict(zip(parameters, gradients(layer(x)[0], layer)))
    assert_same(grad(loss)(parameters, x), want)
    per_sample = vmap(grad(loss), in_dims=(None, 1))(parameters, x.unsqueeze(2))
    for b in range(B):
        assert_same({name: g[b] for name, g in per_sample.items()}, grad(loss)(parameters, x[:, b : b + 1]))
    short = x[:2, :1]
    jacobian = torch.autograd.functional.jacobian(lambda x: layer(x)[0], short)
    assert_same(jacrev(lambda x: layer(x)[0])(short), jacobian)
    assert_same(jacfwd(lambda x: layer(x)[0])(short), jacobian)
    curvature = torch.autograd.functional.hessian(lambda x: layer(x)[0].square().sum(), short)
    assert_same(hessian(lambda x: loss(parameters, x))(short), curvature)


def test_an_ensemble_by_vmap() -> None:
    layers, x = [make("gru-haste", I, H, **F64) for _ in range(3)], torch.randn(T, B, I, **F64)
    parameters, buffers = stack_module_state(layers)

    def call(parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Any:
        return functional_call(layers[0], (parameters, buffers), (x,))

    outputs, states = vmap(call, in_dims=(0, 0, None))(parameters, buffers, x)
    for k, layer in enumerate(layers):
        assert_same((outputs[k], states[k]), layer(x))


def test_forward_mode_says_where_to_go() -> None:
    layer, x = festina.LayerNormLSTM(I, H), torch.randn(T, B, I)
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match=r"forward-mode .* torch.func.jvp and torch.func.jacfwd do"),
    ):
        layer(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))


# Autograd


@pytest.mark.parametrize("variant", FIVE_VARIANTS)
def test_a_gradient_penalty_is_differentiated_exactly(variant: str) -> None:
    """WGAN-GP: the norm of the input's gradient is part of the loss; judged against finite differences."""
    layer, x = make(variant, I, H, **F64), torch.randn(T, B, I, **F64).requires_grad_()

    def penalty(weight: Tensor) -> Tensor:
        output = functional_call(layer, {"weight_hh_l0": weight}, (x,))[0]
        (d_x,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
        return (d_x.square().sum((0, 2)).sqrt() - 1).square().sum()

    assert torch.autograd.gradcheck(penalty, (layer.weight_hh_l0.detach().requires_grad_(),))


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
    layer.eval()  # backward works in eval mode, too
    layer(x)[0].square().sum().backward()
    assert_same(layer.weight_hh_l0.grad, 2 * want["weight_hh_l0"])


def test_inference_mode_and_no_grad_give_the_same_numbers() -> None:
    layer, x = make("lstm-haste", I, H, **F64), torch.randn(T, B, I, **F64)
    want = layer(x)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            got = layer(x)
        assert_same(got, want)
        assert not got[0].requires_grad


# Autocast, threads, parametrizations


@pytest.mark.parametrize("variant", VARIANTS)
def test_autocast(variant: str) -> None:
    """bfloat16 out, float32 gradients near those of float32; backward inside and outside the block."""
    layer, x = make(variant, I, 16, 2), torch.randn(T, B, I)
    want_output = layer(x)[0]
    want = gradients(want_output, layer)
    for inside in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output, state = layer(x)
            assert {t.dtype for t in (output, *(state if isinstance(state, tuple) else (state,)))} == {torch.bfloat16}
            if inside:
                got = gradients(output.float(), layer)
        if not inside:
            got = gradients(output.float(), layer)
        assert (output.float() - want_output).norm() < 0.03 * want_output.norm()
        assert {g.dtype for g in got} == {torch.float32}
        for mine, exact in zip(got, want):
            assert (mine - exact).norm() < 0.1 * exact.norm()


def test_threads_share_a_module() -> None:
    layer = make("lstm-haste", I, H, 2, bidirectional=True, **F64)
    inputs = [torch.randn(2 + k % 5, B, I, **F64) for k in range(24)]

    def work(x: Tensor) -> tuple[Tensor, list[Tensor]]:
        output = layer(x, lengths=[len(x), 1, 0, 2])[0]
        return output, gradients(output, layer)

    want = [work(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        assert_same(list(pool.map(work, inputs)), want)


@pytest.mark.parametrize("way", ["parametrizations", "hook"])
def test_weight_norm_on_the_recurrent_weight(way: str) -> None:
    layer, x = make("gru-haste", I, H, **F64), torch.randn(T, B, I, **F64)
    want = layer(x)[0]
    if way == "hook":
        with pytest.warns(FutureWarning):
            nn.utils.weight_norm(layer, "weight_hh_l0")
        direction = layer.weight_hh_l0_v
    else:
        nn.utils.parametrizations.weight_norm(layer, "weight_hh_l0")
        direction = layer.parametrizations.weight_hh_l0.original1
    assert_same(layer(x)[0], want)
    with torch.no_grad():
        direction *= 3.0  # its length does not count
    assert_same(layer(x)[0], want)
    layer(x)[0].square().sum().backward()
    assert_same((direction.grad * direction).sum(1), torch.zeros(3 * H, **F64))
    assert direction.grad.any()


def test_pruning_the_recurrent_weight() -> None:
    layer, x = make("lstm-haste", I, H, **F64), torch.randn(T, B, I, **F64)
    prune.l1_unstructured(layer, "weight_hh_l0", amount=0.5)
    assert (layer.weight_hh_l0 == 0).double().mean() == 0.5
    layer(x)[0].sum().backward()
    assert (layer.weight_hh_l0_orig.grad[layer.weight_hh_l0 == 0] == 0).all()
