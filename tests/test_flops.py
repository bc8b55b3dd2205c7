"""FLOPs (`festina.flops`): what PyTorch's counter finds for a layer is what it finds for torch.nn's matrix products."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from samples import assert_same
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import festina
from festina import norms

T, B, I, H = 7, 2, 3, 5


def counted(layer: Any, frozen: bool, input_learns: bool, hx: Any = None, **given: Any) -> tuple[int, int, int]:
    """FLOPs of a call in inference, of one in training, and of its backward pass."""
    x = torch.randn(T, B, I, requires_grad=input_learns)
    layer.requires_grad_(not frozen)
    with FlopCounterMode(display=False) as inference, torch.no_grad():
        layer(x, hx, **given)
    with FlopCounterMode(display=False) as training:
        output, _ = layer(x, hx, **given)
    with FlopCounterMode(display=False) as backward:
        output.sum().backward()
    return inference.get_total_flops(), training.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize(("frozen", "input_learns"), [(False, True), (False, False), (True, True)])
@pytest.mark.parametrize(
    ("name", "options"),
    [("GRU", {}), ("GRU", {"num_layers": 2, "bidirectional": True}), ("LSTM", {"proj_size": 2, "bidirectional": True})],
)
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_a_layer_counts_what_torch_nn_counts(
    name: str, options: dict[str, Any], frozen: bool, input_learns: bool
) -> None:
    """A GRU on the CPU, and a projected LSTM, are made of matrix products in torch.nn: those are counted."""
    want = counted(getattr(nn, name)(I, H, **options), frozen, input_learns)
    assert min(want) > 0
    for norm in (norms.NONE, norms.HASTE):
        assert counted(getattr(festina, name)(I, H, norm=norm, **options), frozen, input_learns) == want


def test_only_valid_steps_and_matrix_products_count() -> None:
    lstm = festina.LayerNormLSTM(I, H)
    per_step = 2 * 4 * H * (I + H)
    assert counted(lstm, False, False, lengths=[3, 0])[:2] == (3 * per_step, 3 * per_step)
    of_weights, of_h = 3 * per_step, (3 - 1) * 2 * 4 * H * H  # one row has a first step, whose h_0 learns nothing
    assert counted(lstm, False, False, lengths=[3, 0])[2] == of_weights + of_h
    hx = tuple(torch.zeros(1, B, H, requires_grad=True) for _ in range(2))
    assert counted(lstm, False, False, hx, lengths=[3, 0])[2] == of_weights + of_h + 2 * 4 * H * H
    assert counted(festina.IndRNN(I, H), False, False)[0] == T * B * 2 * H * I


def test_cells_count_and_numbers_stay() -> None:
    cell, x = festina.GRUCell(I, H), torch.randn(B, I)
    with FlopCounterMode(display=False) as counter:
        got = cell(x)
    assert counter.get_total_flops() == 2 * B * 3 * H * (I + H)
    assert_same(got, cell(x))


def run_forward() -> None:
    with torch.no_grad():
        festina.LSTM(I, H)(torch.zeros(T, B, I))


def run_backward(output: Tensor) -> None:
    output.sum().backward()


def run_in_a_transform() -> None:
    """Of the function: the counter's hooks on modules do not take part in `torch.func.grad`."""
    weights = {"weight_ih": torch.zeros(4 * H, I), "weight_hh": torch.zeros(4 * H, H)}
    torch.func.grad(lambda x: festina.functional.layer("lstm", x, weights)[0].sum())(torch.zeros(T, B, I))


PER_STEP = 2 * 4 * H * (I + H)


@pytest.mark.parametrize(
    ("run", "want"),
    [
        (run_forward, T * B * PER_STEP),
        (run_backward, T * B * PER_STEP + (T - 1) * B * 2 * 4 * H * H),
        (run_in_a_transform, T * B * PER_STEP + T * B * 2 * 4 * H * I + (T - 1) * B * 2 * 4 * H * H),
    ],
)
def test_a_counter_that_was_made_before_the_formulas_counts(
    run: Callable[..., None], want: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The formulas are registered on the way, since importing PyTorch's counter brings Triton: `import festina` must not."""
    given = [festina.LSTM(I, H)(torch.zeros(T, B, I))[0]] if run is run_backward else []
    module = sys.modules["torch.utils.flop_counter"]
    monkeypatch.setattr(torch.utils, "flop_counter", module)  # and back again
    monkeypatch.delitem(sys.modules, "torch.utils.flop_counter")
    fresh = importlib.import_module("torch.utils.flop_counter")
    assert torch.ops.festina.recurrence not in fresh.flop_registry
    with fresh.FlopCounterMode(display=False) as counter:
        run(*given)
    assert counter.get_total_flops() == want
    assert torch.ops.festina.recurrence in fresh.flop_registry
