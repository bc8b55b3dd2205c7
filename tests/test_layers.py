"""The layers (`festina.layers`): `torch.nn`'s signature, initial values and state dict, stacking, dropout between layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from samples import assert_same, make
from torch import nn

import festina

T, B, I, H = 6, 4, 3, 5
F64: dict[str, Any] = {"dtype": torch.float64}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def test_layers_take_the_positional_arguments_of_torch_nn() -> None:
    args = (I, H, 2, False, True, 0.5, True, 2, "cpu", torch.float64)
    ours, theirs = festina.LSTM(*args), nn.LSTM(*args)
    names = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional", "proj_size")
    assert [getattr(ours, name) for name in names] == [getattr(theirs, name) for name in names]
    assert [(name, p.shape, p.dtype) for name, p in ours.named_parameters()] == [
        (name, p.shape, p.dtype) for name, p in theirs.named_parameters()
    ]


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_state_dict_of_a_stack_is_that_of_torch_nn(name):
    options = {"num_layers": 3, "bidirectional": True}
    got, want = (getattr(of, name)(4, 5, **options).state_dict() for of in (festina, nn))
    assert [(key, value.shape) for key, value in got.items()] == [(key, value.shape) for key, value in want.items()]


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
@pytest.mark.parametrize("options", [{}, {"num_layers": 3, "bidirectional": True}, {"bias": False}], ids=str)
def test_plain_layers_start_as_torch_nn_does_and_share_state_dicts(name: str, options: dict[str, Any]) -> None:
    """The same seed gives the same values; each loads the other's state dict and then gives the same output."""
    torch.manual_seed(1)
    theirs = getattr(nn, name)(I, H, **options)
    torch.manual_seed(1)
    ours = getattr(festina, name)(I, H, **options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert_same(ours.state_dict(), theirs.state_dict(), 0, 0)
    ours.reset_parameters()
    theirs.load_state_dict(ours.state_dict())
    ours.reset_parameters()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(T, B, I)
    assert_same(ours(x), theirs(x), 1e-5, 1e-6)
    assert [len(row) for row in ours.all_weights] == [len(row) for row in theirs.all_weights]
    assert_same(ours.all_weights, theirs.all_weights, 0, 0)


def test_flatten_parameters_does_nothing() -> None:
    layer = festina.LSTM(I, H)
    layer.flatten_parameters()
    assert layer._apply(lambda t: t) is layer


def test_dropout_acts_between_layers_in_training_only() -> None:
    layer = make("gru-haste", I, H, 2, dropout=1.0, **F64)
    x = torch.randn(T, B, I, **F64)
    assert_same(layer(x)[0], layer(torch.zeros_like(x))[0])  # layer 1 gets zeros only
    layer.eval()
    without = make("gru-haste", I, H, 2, **F64)
    without.load_state_dict(layer.state_dict())
    assert_same(layer(x), without(x))
