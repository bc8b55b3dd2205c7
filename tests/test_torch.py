"""At home in PyTorch: operators, compile, export, functional transforms, double backward, autocast, threads, autograd."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from samples import VARIANTS, assert_same, make, random_state
from torch import Tensor, nn
from torch.export import Dim
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, stack_module_state, vmap
from torch.nn.utils import prune

import festina
from festina import backends, ops, sequences

T, B, I, H = 6, 4, 3, 5
F64: dict[str, Any] = {"dtype": torch.float64}
some_variants = pytest.mark.parametrize("variant", ["lstm-haste", "lstm-icefall", "gru", "gru-dreamer", "indrnn-haste"])


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def compiler() -> Iterator[None]:
    """torch.compile as in a fresh process; to compile a second time is an error."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


def gradients(loss: Tensor, module: nn.Module) -> list[Tensor]:
    """Of the sum of squares."""
    return list(torch.autograd.grad(loss.square().sum(), list(module.parameters()), materialize_grads=True))


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


# torch.compile


def test_a_layer_compiles_that_has_never_run(compiler: None) -> None:
    layer, x = festina.LayerNormGRU(3, 5, bidirectional=True), torch.randn(4, 2, 3)
    got = torch.compile(layer, fullgraph=True, backend="eager")(x)
    assert_same(got, layer(x))


@pytest.mark.slow
def test_compiled_training_step_by_inductor(compiler: None) -> None:
    """Two layers, both directions, with resets; then the same module in inference."""
    layer = make("lstm-haste", I, H, 2, bidirectional=True)
    compiled = torch.compile(layer, fullgraph=True)
    x, resets = torch.randn(T, B, I), torch.rand(T, B) < 0.3
    output, state = compiled(x, resets=resets)
    want, want_state = layer(x, resets=resets)
    assert_same((output, state), (want, want_state), 1e-4, 1e-5)
    assert_same(gradients(output, layer), gradients(want, layer), 1e-4, 1e-5)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=False):
        assert_same(compiled(x, resets=resets), layer(x, resets=resets), 1e-4, 1e-5)


@pytest.mark.parametrize("variant", ["lstm-haste", "gru-dreamer"])
def test_one_graph_for_every_length_and_batch(variant: str, compiler: None) -> None:
    layer = make(variant, I, H, **F64)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for steps, rows in ((6, 4), (9, 3), (2, 7)):
        x = torch.randn(steps, rows, I, **F64)
        output, state = compiled(x)
        want, want_state = layer(x)
        assert_same((output, state), (want, want_state))
        assert_same(gradients(output, layer), gradients(want, layer))


def test_lengths_compile_in_one_graph_whatever_they_are(compiler: None) -> None:
    layer = make("lstm-haste", 3, 5, bidirectional=True, batch_first=True, **F64)

    def run(x: Tensor, lengths: Tensor, resets: Tensor) -> Any:
        return layer(x, lengths=lengths, resets=resets)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    x, resets = torch.randn(4, 7, 3, **F64), torch.rand(4, 7) < 0.3
    for given in ([7, 3, 0, 2], [7, 7, 7, 7], [0, 0, 0, 0], [1, 1, 1, 1], [0, 6, 0, 0]):
        lengths = torch.tensor(given)
        assert_same(compiled(x, lengths, resets), run(x, lengths, resets))
        of_both = [gradients(f(x, lengths, resets)[0], layer) for f in (compiled, run)]
        assert_same(of_both[0], of_both[1])
    with pytest.raises(ValueError, match=r"lengths must lie in \[0, T\] = \[0, 7\], got \[8, 1, 1, 1\]"):
        compiled(x, torch.tensor([8, 1, 1, 1]), resets)


def test_compile_where_h_0_is_c_0(compiler: None) -> None:
    layer, x = make("lstm-haste", I, H, **F64), torch.randn(T, B, I, **F64)
    both = torch.randn(1, B, H, **F64)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found = []
    for run in (compiled, layer):
        start = both.clone().requires_grad_()
        run(x, (start, start))[0].square().sum().backward()
        found.append(start.grad)
    assert_same(found[0], found[1])


def test_compiled_zoneout_and_dropconnect_draw_from_the_generator(compiler: None) -> None:
    layer = make("gru-haste", I, H, zoneout=0.5, dropconnect=0.5)
    compiled, x = torch.compile(layer, fullgraph=True, backend="aot_eager"), torch.randn(T, B, I)

    def run(module: Any, seed: int) -> Tensor:
        torch.manual_seed(seed)
        return module(x)[0]  # type: ignore[no-any-return]

    assert_same(run(compiled, 1), run(layer, 1), 1e-6, 1e-6)
    assert not torch.equal(run(compiled, 1), run(compiled, 2))


# torch.export


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_export_with_any_length_and_batch(strict: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = make("lstm-haste", I, H, bidirectional=True)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            return self.layer(x)[0] + self.layer(x, lengths=lengths)[0]  # type: ignore[no-any-return]

    model, steps, rows = Model(), Dim("T", min=2, max=100), Dim("B", min=2, max=50)
    example = (torch.randn(T, B, I), torch.tensor([1, 2, 6, 0]))
    shapes = {"x": {0: steps, 1: rows}, "lengths": {0: rows}}
    exported = torch.export.export(model, example, dynamic_shapes=shapes, strict=strict).module()
    for T_, B_ in ((9, 2), (3, 7)):
        args = (torch.randn(T_, B_, I), torch.randint(0, T_ + 1, (B_,)))
        assert_same(exported(*args), model(*args), 1e-5, 1e-6)
    want = gradients(model(*example), model)  # the exported module trains
    got = torch.autograd.grad(exported(*example).square().sum(), list(exported.parameters()))
    assert_same(list(got), want, 1e-4, 1e-5)


# torch.func


@some_variants
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


@some_variants
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


@some_variants
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
