"""Forms of input (`festina.sequences`): batch_first, one row, packed, lengths, and batches without a step or a row."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from samples import VARIANTS, assert_same, has_c, listed, make, random_state
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

T, B, I, H = 6, 4, 3, 5
F64: dict[str, Any] = {"dtype": torch.float64}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_batch_first_unbatched_and_packed_are_the_same_layer(variant: str) -> None:
    layer = make(variant, I, H, 2, bidirectional=True, **F64)
    turned = copy.deepcopy(layer)
    turned.batch_first = True
    x, hx = torch.randn(T, B, I, **F64), random_state(layer, 4, B)
    output, state = layer(x, hx)

    got, got_state = turned(x.transpose(0, 1), hx)
    assert_same(got.transpose(0, 1), output)
    assert_same(got_state, state)

    row_hx = tuple(s[:, 1] for s in listed(hx))
    got, got_state = layer(x[:, 1], row_hx if len(row_hx) > 1 else row_hx[0])
    assert_same(got, output[:, 1])
    assert_same(listed(got_state), [s[:, 1] for s in listed(state)])

    lengths = [3, 6, 1, 3]
    padded, padded_state = layer(x, hx, lengths=lengths)
    packed, packed_state = layer(pack_padded_sequence(x, lengths, enforce_sorted=False), hx)
    assert isinstance(packed, PackedSequence)
    assert_same(pad_packed_sequence(packed)[0], padded)
    assert_same(packed_state, padded_state)
    for b, length in enumerate(lengths):
        assert (padded[length:, b] == 0).all()


def test_lengths_come_as_a_list_or_any_integer_tensor() -> None:
    layer, x = make("gru-haste", I, H, **F64), torch.randn(T, B, I, **F64)
    want = layer(x, lengths=[6, 2, 0, 3])
    for dtype in (torch.int64, torch.int32, torch.uint8):
        assert_same(layer(x, lengths=torch.tensor([6, 2, 0, 3], dtype=dtype)), want)
    assert_same(layer(x, lengths=(6, 2, 0, 3)), want)
    assert_same(want[1][0, 2], torch.zeros(H, **F64))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", ["T=0", "B=0", "T=B=0", "lengths 0", "B=0 lengths"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_nothing_to_do(variant: str, case: str, batch_first: bool) -> None:
    """Outputs are 0 in the right shapes; the last state is the initial one, and its gradient passes through."""
    steps, rows = 0 if "T=" in case else T, 0 if "B=" in case else B
    P = 2 if has_c(variant) else H
    proj: dict[str, Any] = {"proj_size": P} if has_c(variant) else {}
    layer = make(variant, I, H, 2, batch_first=batch_first, bidirectional=True, zoneout=0.5, **proj, **F64)
    x = torch.randn(*((rows, steps) if batch_first else (steps, rows)), I, requires_grad=True, **F64)
    hx = random_state(layer, 4, rows)
    for s in listed(hx):
        s.requires_grad_()
    output, state = layer(x, hx, lengths=[0] * rows if "lengths" in case else None)
    assert output.shape == (*x.shape[:2], 2 * P)
    assert not output.any()
    assert_same(listed(state), listed(hx))
    (output.sum() + sum(s.sum() for s in listed(state))).backward()
    assert_same(x.grad, torch.zeros_like(x))
    for s in listed(hx):
        assert_same(s.grad, torch.ones_like(s))
    for p in layer.parameters():
        assert p.grad is not None
        assert not p.grad.any()
