"""Calls inside `torch.func` transforms (`festina.transforms`): the numbers of loops and of double backward, by kernels."""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import Any

import pytest
import torch
from samples import FIVE_VARIANTS, assert_same, gradients, listed, make
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, stack_module_state, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from festina import reference
from festina.backends.cpu import CPU
from festina.testing import Case

T, B, I, H, V = 6, 4, 3, 5, 3
F64: dict[str, Any] = {"dtype": torch.float64}
Parameters = dict[str, Tensor]
needs_core = pytest.mark.skipif(CPU.can_run(Case("lstm").on("cpu")) is not None, reason="there is no compiled core")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def kernels_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference must not run."""

    def refuse(call: object) -> None:
        raise AssertionError("the reference was reached")

    monkeypatch.setattr(reference, "run", refuse)


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


# vmap and grad, by kernels


def losses(layer: nn.Module) -> Callable[[Parameters, Tensor], Tensor]:
    def loss(parameters: Parameters, x: Tensor) -> Tensor:
        output, state = functional_call(layer, parameters, (x,), {"lengths": [3, T, 0, 2]})
        return output.square().sum() + sum(s.sin().sum() for s in listed(state))  # type: ignore[no-any-return]

    return loss


def one_by_one(function: Callable[..., Any], *stacked: Any) -> list[Tensor]:
    """What a loop over the parts gives: the leaves of the results, stacked."""
    leaves = torch.utils._pytree.tree_leaves
    part = torch.utils._pytree.tree_map
    results = [leaves(function(*part(itemgetter(v), stacked))) for v in range(V)]
    return [torch.stack(of_one) for of_one in zip(*results)]


def stacked(variant: str, **options: Any) -> tuple[nn.Module, Parameters, Tensor]:
    """A layer, the parameters of an ensemble of it, and an input for each."""
    layers = [make(variant, I, H, **options, **F64) for _ in range(V)]
    return layers[0], stack_module_state(layers)[0], torch.randn(V, T, B, I, **F64)


@needs_core
@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "num_layers": 2}], ids=["", "deep"])
@pytest.mark.parametrize("variant", FIVE_VARIANTS)
def test_vmap_and_grad_give_the_numbers_of_a_loop(variant: str, options: dict[str, Any], kernels_alone: None) -> None:
    """An ensemble, gradients of each of its models, of each sample, of the input, and of a sum over samples."""
    layer, parameters, x = stacked(variant, **options)
    own, loss = {name: p.detach()[0] for name, p in parameters.items()}, losses(layer)
    of_weights, of_input = grad(loss), grad(loss, argnums=1)

    def same(got: Any, function: Callable[..., Any], *args: Any) -> None:
        assert_same(torch.utils._pytree.tree_leaves(got), one_by_one(function, *args))

    same(vmap(loss)(parameters, x), loss, parameters, x)
    same(vmap(of_weights)(parameters, x), of_weights, parameters, x)
    same(vmap(of_input)(parameters, x), of_input, parameters, x)
    for function in (loss, of_weights, of_input):
        same(vmap(function, in_dims=(None, 0))(own, x), lambda x: function(own, x), x)  # noqa: B023
    total = grad(lambda own: vmap(loss, in_dims=(None, 0))(own, x).sum())(own)
    assert_same(total, {name: g.sum(0) for name, g in vmap(of_weights, in_dims=(None, 0))(own, x).items()})
    with torch.no_grad():
        same(vmap(loss)(parameters, x), loss, parameters, x)
        same(vmap(loss, in_dims=(None, 0))(own, x), lambda x: loss(own, x), x)


@needs_core
def test_vmap_is_recorded_and_nests(kernels_alone: None) -> None:
    """Parameters that require a gradient get it from outside; a vmapped axis may be any; several axes may be vmapped."""
    layer, parameters, x = stacked("lstm-haste")
    loss, leaves = losses(layer), list(parameters.values())
    got = torch.autograd.grad(vmap(loss, in_dims=(0, 2))(parameters, x.movedim(0, 2)).sum(), leaves)
    want = torch.autograd.grad(sum(loss({n: p[v] for n, p in parameters.items()}, x[v]) for v in range(V)), leaves)
    assert_same(got, want)
    every = vmap(vmap(loss, in_dims=(None, 0)), in_dims=(0, None))(parameters, x)
    models = [{name: p[v] for name, p in parameters.items()} for v in range(V)]
    assert_same(every, torch.stack([torch.stack([loss(own, one) for one in x]) for own in models]))
    own = {name: p[0] for name, p in parameters.items()}
    constant = vmap(lambda scale: scale * loss(own, x[0]))(torch.arange(3.0, **F64))
    assert_same(constant, torch.arange(3.0, **F64) * loss(own, x[0]))


@needs_core
@pytest.mark.parametrize("variant", ["lstm-haste", "gru"])
def test_vmap_over_cotangents(variant: str, kernels_alone: None) -> None:
    """Of one call: by `torch.func.vjp`, and by `torch.autograd.grad` under vmap."""
    layer, x = make(variant, I, H, **F64), torch.randn(T, B, I, **F64).requires_grad_()
    output = layer(x)[0]
    cotangents = torch.randn(V, *output.shape, **F64)
    want = torch.stack([torch.autograd.grad(output, x, c, retain_graph=True)[0] for c in cotangents])
    assert_same(vmap(lambda c: torch.autograd.grad(output, x, c, retain_graph=True)[0])(cotangents), want)
    pullback = vjp(lambda x: layer(x)[0], x)[1]
    assert_same(vmap(pullback)(cotangents)[0], want)


@pytest.mark.parametrize("variant", ["lstm-haste", "gru-dreamer"])
def test_resets_of_each_part(variant: str) -> None:
    layer, x, resets = make(variant, I, H, **F64), torch.randn(V, T, B, I, **F64), torch.rand(V, T, B) < 0.3

    def call(x: Tensor, resets: Tensor) -> Any:
        return layer(x, resets=resets, lengths=[3, T, 0, 2])

    assert_same(torch.utils._pytree.tree_leaves(vmap(call)(x, resets)), one_by_one(call, x, resets))
    got = vmap(lambda resets: call(x[0], resets)[0])(resets)
    assert_same(got, torch.stack([call(x[0], one)[0] for one in resets]))


@needs_core
def test_inference_by_vmap_keeps_no_weights() -> None:
    layer, parameters, x = stacked("lstm")
    kept = len(CPU._panels._found)
    with torch.no_grad():
        for _ in range(3):
            vmap(losses(layer))(parameters, x)
    assert len(CPU._panels._found) <= kept


@pytest.mark.parametrize("variant", ["lstm-haste", "gru"])
def test_gradients_of_gradients_by_transforms(variant: str) -> None:
    layer, x = make(variant, I, H, **F64), torch.randn(2, 1, I, **F64)
    parameters = dict(layer.named_parameters())

    def loss(x: Tensor) -> Tensor:
        return functional_call(layer, parameters, (x,))[0].square().sum()  # type: ignore[no-any-return]

    want = torch.autograd.functional.hessian(loss, x)
    for transformed in (jacrev(jacrev(loss)), jacrev(jacfwd(loss)), jacfwd(jacfwd(loss)), jacfwd(jacrev(loss))):
        assert_same(transformed(x), want)

    def penalty(x: Tensor) -> Tensor:
        return grad(loss)(x).square().sum()

    each = torch.randn(V, 2, 1, I, **F64)
    assert_same(vmap(grad(penalty))(each), torch.stack([grad(penalty)(one) for one in each]))
    leaf = x.clone().requires_grad_()
    (d_x,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    assert_same(grad(penalty)(x), torch.autograd.grad(d_x.square().sum(), leaf)[0])


def test_linearize() -> None:
    layer, x, v = make("gru", I, H, **F64), torch.randn(2, 2, I, **F64), torch.randn(2, 2, I, **F64)
    cell, resets = layer.cell(), torch.tensor([[False, True], [True, False]])
    for function in (lambda x: layer(x, lengths=[1, 2], resets=resets)[0], lambda x: cell(x[0])):
        output, along = linearize(function, x)
        assert_same(output, function(x))
        assert_same(along(v), jvp(function, (x,), (v,))[1])


def test_a_transform_is_traced_to_operators() -> None:
    layer, x = make("lstm-haste", I, H, **F64), torch.randn(T, B, I, **F64)
    loss, parameters = losses(layer), {name: p.detach() for name, p in layer.named_parameters()}
    traced = make_fx(grad(loss))(parameters, x)
    assert_same(traced(parameters, 2 * x), grad(loss)(parameters, 2 * x))


# Random numbers


@pytest.mark.parametrize("rate", ["zoneout", "zoneout_cell", "dropconnect"])
def test_randomness_of_vmap_is_that_of_dropout(rate: str) -> None:
    """Different parts draw different masks of the same rate, or the same; without a choice vmap refuses."""
    layer, x = make("lstm-haste", I, 20, **{rate: 0.5}, **F64), torch.randn(T, B, I, **F64)
    for given, in_dim in ((x.expand(V, T, B, I), 0), (x, None)):

        def output(x: Tensor, _: Tensor) -> Tensor:
            return layer(x)[0]  # type: ignore[no-any-return]

        def parts(randomness: str, given: Tensor = given, in_dim: int | None = in_dim) -> Tensor:
            return vmap(output, in_dims=(in_dim, 0), randomness=randomness)(given, torch.zeros(V))

        different = parts("different")
        assert not any(torch.equal(different[v], different[w]) for v in range(V) for w in range(v))
        same = parts("same")
        if in_dim is not None:
            assert_same(same[1:], same[:1].expand(V - 1, T, B, 20))
        with pytest.raises(RuntimeError, match="randomness"):
            parts("error")
