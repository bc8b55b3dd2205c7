"""Layers as one graph: torch.compile, torch.export and AOTInductor packages."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from samples import assert_same, gradients, make
from torch import Tensor, nn
from torch.export import Dim

import festina
from festina import backends
from festina.testing import Case

T, B, I, H = 6, 4, 3, 5
F64: dict[str, Any] = {"dtype": torch.float64}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def compiler() -> Iterator[None]:
    """torch.compile as on a fresh machine; recompiling is an error.

    Graphs of training that PyTorch keeps on disk would be found again after an operator has got another schema.
    """
    torch._dynamo.reset()
    with (
        torch._dynamo.config.patch(error_on_recompile=True),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield
    torch._dynamo.reset()


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


def loop_of(cell: Any) -> Any:
    """The h of every step of a loop over a cell."""

    def run(steps: Tensor, state: Any) -> Tensor:
        outputs = []
        for x in steps.unbind():
            state = cell(x, state)
            outputs.append(state if isinstance(state, Tensor) else state[0])
        return torch.stack(outputs)

    return run


@pytest.mark.parametrize("kind", [festina.LayerNormLSTMCell, festina.GRUCell])
def test_a_compiled_loop_over_a_cell(kind: type[festina.LSTMCell | festina.GRUCell], compiler: None) -> None:
    """Training; inference, where later calls take a prepared step; and inference with parameters that have changed."""
    cell = kind(I, H)
    run, steps = loop_of(cell), torch.randn(T, B, I)
    compiled, state = torch.compile(run, fullgraph=True, backend="aot_eager"), torch.randn(2, B, H)
    start = state[0] if len(cell.spec.cell.states) == 1 else tuple(state)
    with torch._dynamo.config.patch(error_on_recompile=False):
        assert_same(gradients(compiled(steps, start), cell), gradients(run(steps, start), cell), 1e-5, 1e-6)
        for change in (0.0, 0.0, 0.5):
            with torch.no_grad():
                cell.weight_hh += change
                want = run(steps, start)
                for _ in range(2):
                    assert_same(compiled(steps, start), want, 1e-5, 1e-6)
            cell.weight_ih.data[0, 0] += change  # no version tells this
            with torch.no_grad():
                assert_same(compiled(steps, start), run(steps, start), 1e-5, 1e-6)


@pytest.mark.skipif(backends.get("cpu").can_run(Case("lstm").on("cpu")) is not None, reason="there is no compiled core")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_compiled_step_passes_the_dispatcher_once(mode: Any, compiler: None) -> None:
    """And takes the short way of a step: no module makes the call, but the owner of the parameters is known."""
    cell = copy.deepcopy(festina.LayerNormLSTMCell(256, 256))  # too large to read all of it before every step
    compiled = torch.compile(loop_of(cell), fullgraph=True, backend="aot_eager")
    x = torch.randn(T, 1, 256)
    passes: list[str] = []
    frames: list[str] = []

    def watch(frame: FrameType, event: str, about: Any) -> None:
        if event == "c_call" and (getattr(about, "__module__", None) or "").startswith("torch._ops.festina"):
            passes.append(about.__module__)
        if event == "call" and frame.f_globals.get("__name__", "").startswith("festina."):
            frames.append(frame.f_code.co_name)

    with mode():
        for _ in range(3):
            compiled(x, (torch.zeros(1, 256), torch.zeros(1, 256)))
        sys.setprofile(watch)
        try:
            compiled(x, (torch.zeros(1, 256), torch.zeros(1, 256)))
        finally:
            sys.setprofile(None)
    assert len(passes) == frames.count("carry_out") == T
    assert "check_call" not in frames


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


# AOTInductor


@pytest.mark.slow
def test_an_aot_inductor_package_loads_and_agrees(tmp_path: Path) -> None:
    layer = make("lstm-haste", I, H, num_layers=2, bidirectional=True).eval()
    steps, rows = Dim("T", max=1024), Dim("B", max=1024)
    with torch.no_grad():
        exported = torch.export.export(layer, (torch.randn(4, 3, I),), dynamic_shapes=({0: steps, 1: rows},))
        package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "layer.pt2"))
        loaded = torch._inductor.aoti_load_package(package)
        for T_, B_ in ((4, 3), (9, 2)):
            x = torch.randn(T_, B_, I)
            assert_same(loaded(x), layer(x), rtol=1e-5, atol=1e-6)
