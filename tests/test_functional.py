"""The stateless API (`festina.functional`). Its errors are in test_checks.py; test_backends.py calls `recurrence`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from samples import assert_same
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import festina


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("enforce_sorted", [False, True])
def test_masks_of_the_functional_layer_fit_a_packed_sequence(batch_first: bool, enforce_sorted: bool) -> None:
    lengths = [6, 3, 2, 2] if enforce_sorted else [2, 6, 2, 3]
    axes = (4, 6) if batch_first else (6, 4)
    x, masks = torch.randn(*axes, 3), [torch.rand(2, *axes, 5) < 0.5 for _ in range(2)]
    layer = festina.LSTM(3, 5, bidirectional=True)
    names = layer.spec.parameter_names
    parameters = [dict(zip(names, weights)) for weights in layer.all_weights]

    def run(input: Any, **options: Any) -> Any:
        options |= {"batch_first": batch_first, "zoneout_mask": masks[0], "zoneout_cell_mask": masks[1]}
        return festina.functional.layer("lstm", input, parameters, **options)

    packed = pack_padded_sequence(x, lengths, batch_first, enforce_sorted)
    output, state = run(packed)
    want, want_state = run(x, lengths=lengths)
    assert_same(pad_packed_sequence(output, batch_first)[0], want)
    assert_same(state, want_state)
