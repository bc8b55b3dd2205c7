"""At home in PyTorch: operators, torch.compile, torch.export, torch.func, double backward, autocast, threads, autograd."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from samples import assert_same

import festina


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_a_layer_compiles_that_has_never_run() -> None:
    layer, x = festina.LayerNormGRU(3, 5, bidirectional=True), torch.randn(4, 2, 3)
    got = torch.compile(layer, fullgraph=True, backend="eager")(x)
    assert_same(got, layer(x))
