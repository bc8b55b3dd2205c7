"""At home in PyTorch: operators, compile, export, functional transforms, double backward, autocast, threads, autograd."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from samples import assert_same, gradients, make
from torch import Tensor, nn
from torch.nn.utils import prune

T, B, I, H = 6, 4, 3, 5
F64: dict[str, Any] = {"dtype": torch.float64}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


# Autocast, threads, parametrizations


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
