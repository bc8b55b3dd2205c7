"""The cells (`festina.cells`): `torch.nn`'s signature and state dict, and the cells of a layer, which share its parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from samples import VARIANTS, assert_same, has_c, listed, make, random_state
from torch import nn

import festina
from festina import norms

T, B, I, H = 6, 4, 3, 5
F64: dict[str, Any] = {"dtype": torch.float64}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


# Construction


def test_cells_take_the_positional_arguments_of_torch_nn() -> None:
    args = (I, H, False, "cpu", torch.float64)
    for ours, theirs in ((festina.LSTMCell(*args), nn.LSTMCell(*args)), (festina.GRUCell(*args), nn.GRUCell(*args))):
        assert {name: p.shape for name, p in ours.named_parameters()} == {
            name: p.shape for name, p in theirs.named_parameters()
        }
        for name in ("input_size", "hidden_size", "bias"):
            assert getattr(ours, name) == getattr(theirs, name)


@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell"])
def test_state_dict_of_a_cell_is_that_of_torch_nn(name):
    got, want = (getattr(of, name)(4, 5).state_dict() for of in (festina, nn))
    assert [(key, value.shape) for key, value in got.items()] == [(key, value.shape) for key, value in want.items()]


@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell"])
def test_plain_cells_share_state_dicts_with_torch_nn(name: str) -> None:
    ours, theirs = getattr(festina, name)(I, H), getattr(nn, name)(I, H)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(B, I)
    assert_same(ours(x), theirs(x), 1e-5, 1e-6)


def test_a_cell_under_a_joint_plan_keeps_its_bias_flag() -> None:
    cell = festina.LSTMCell(3, 5, norm=norms.TORCHAUDIO)
    assert cell.bias is True
    assert "bias_joint" in cell.state_dict()
    assert cell(torch.zeros(2, 3))[0].shape == (2, 5)


# The cells of a layer


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_cell_shares_parameters_and_gives_the_numbers_of_its_layer(variant: str, reverse: bool) -> None:
    """Of layer 1, in eval mode with every rate set."""
    rates: dict[str, Any] = {
        "zoneout": 0.1,
        "dropconnect": 0.3,
        **({"zoneout_cell": 0.2, "proj_size": 2} if has_c(variant) else {}),
    }
    layer = make(variant, I, H, 2, bidirectional=True, **rates, **F64).eval()
    x, hx = torch.randn(T, B, I, **F64), random_state(layer, 4, B)
    output, state_n = layer(x, hx)

    below, state, last = x, [s.clone() for s in listed(hx)], None
    for index in range(2):
        halves = []
        for direction in (False, True):
            cell = layer.cell(index, reverse=direction)
            assert not cell.training
            for name, parameter in cell.named_parameters():
                assert parameter is getattr(layer, f"{name}_l{index}{'_reverse' * direction}")
            row = 2 * index + direction
            here = tuple(s[row] for s in state) if len(state) > 1 else state[0][row]
            steps = []
            for t in reversed(range(T)) if direction else range(T):
                here = cell(below[t], here)
                steps.append(listed(here)[0])
            halves.append(torch.stack(steps[::-1] if direction else steps))
            if index == 1 and direction == reverse:
                last = listed(here)
        below = torch.cat(halves, 2)
    assert_same(below, output)
    assert_same(last, [s[2 + reverse] for s in listed(state_n)])


def test_cell_in_training_without_randomness_trains_the_layer() -> None:
    layer = make("lstm-haste", I, H, **F64)
    x = torch.randn(T, B, I, **F64)
    cell, state, total = layer.cell(), None, torch.zeros((), **F64)
    assert cell.training
    for step in x:
        state = cell(step, state)
        total = total + state[0].square().sum()
    by_cell = torch.autograd.grad(total, list(layer.parameters()))
    assert_same(by_cell, torch.autograd.grad(layer(x)[0].square().sum(), list(layer.parameters())))


def test_making_a_cell_draws_no_random_numbers() -> None:
    layer, before = festina.LayerNormLSTM(I, H), torch.get_rng_state()
    layer.cell()
    assert torch.equal(torch.get_rng_state(), before)


# One step


def test_cell_of_one_row_and_with_resets() -> None:
    cell = make("lstm-haste", I, H, cell=True, **F64)
    x, hx = torch.randn(B, I, **F64), random_state(cell, 0, B)
    resets = torch.tensor([True, False, True, False])
    h, c = cell(x, hx, resets=resets)
    for b in range(B):
        alone = cell(x[b], None if resets[b] else (hx[0][b], hx[1][b]))
        assert_same(alone, (h[b], c[b]))
        assert_same(cell(x[b], (hx[0][b], hx[1][b]), resets=resets[b]), (h[b], c[b]))


# Rates


@pytest.mark.parametrize("rate", ["zoneout", "zoneout_cell", "dropconnect"])
def test_each_rate_acts_on_steps_without_gradients(rate: str) -> None:
    """In training masks are drawn anew at each step, whatever was prepared for steps before; in eval none are."""
    cell, x = make("lstm-haste", I, 20, cell=True, **{rate: 0.5}), torch.randn(B, I)
    state = random_state(cell, 0, B)
    with torch.no_grad():
        for _ in range(2):
            quiet = [cell.eval()(x, state) for _ in range(3)]
            loud = [cell.train()(x, state) for _ in range(3)]
            assert_same(quiet[1], quiet[2], 0, 0)
            assert_same(quiet[0], quiet[2], 1e-6, 1e-6)
            for one, other in zip(loud, loud[1:] + quiet[:1]):
                assert not all(map(torch.equal, one, other))
