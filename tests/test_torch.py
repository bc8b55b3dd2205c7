"""At home in PyTorch: operators, torch.compile, torch.export, torch.func, double backward, autocast, threads, autograd."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from samples import assert_same
from torch import Tensor, nn

import festina


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def gradients(loss: Tensor, module: nn.Module) -> list[Tensor]:
    """Of the sum of squares."""
    return list(torch.autograd.grad(loss.square().sum(), list(module.parameters()), materialize_grads=True))


def test_a_layer_compiles_that_has_never_run() -> None:
    layer, x = festina.LayerNormGRU(3, 5, bidirectional=True), torch.randn(4, 2, 3)
    got = torch.compile(layer, fullgraph=True, backend="eager")(x)
    assert_same(got, layer(x))


def test_lengths_compile_in_one_graph_whatever_they_are() -> None:
    layer = festina.LayerNormLSTM(3, 5, bidirectional=True, batch_first=True)

    def run(x: Tensor, lengths: Tensor, resets: Tensor) -> Any:
        return layer(x, lengths=lengths, resets=resets)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    x, resets = torch.randn(4, 7, 3), torch.rand(4, 7) < 0.3
    with torch._dynamo.config.patch(error_on_recompile=True):
        for given in ([7, 3, 0, 2], [7, 7, 7, 7], [0, 0, 0, 0], [1, 1, 1, 1], [0, 6, 0, 0]):
            lengths = torch.tensor(given)
            assert_same(compiled(x, lengths, resets), run(x, lengths, resets))
            grads = [gradients(f(x, lengths, resets)[0], layer) for f in (compiled, run)]
            assert_same(grads[0], grads[1], rtol=1e-5, atol=1e-6)
        with pytest.raises(ValueError, match=r"lengths must lie in \[0, T\] = \[0, 7\], got \[8, 1, 1, 1\]"):
            compiled(x, torch.tensor([8, 1, 1, 1]), resets)
