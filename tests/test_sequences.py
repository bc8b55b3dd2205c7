"""Forms of input (`festina.sequences`): batch_first, one row, packed, nested, lengths, and batches without a step or a row."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from samples import VARIANTS, assert_same, has_c, listed, make, random_state
from torch import Tensor
from torch.nested import nested_tensor, nested_tensor_from_jagged
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import festina

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


def nested(rows: list[Tensor], **options: Any) -> Tensor:
    return nested_tensor(rows, layout=torch.jagged, **options)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("variant", ["lstm", "lstm-icefall", "gru-haste", "indrnn"])
def test_a_nested_tensor_is_a_batch_with_lengths(variant: str, batch_first: bool) -> None:
    """Outputs, states and the gradients of the values, the state and the weights, with resets and empty rows."""
    layer, lengths = make(variant, I, H, 2, bidirectional=True, batch_first=batch_first, **F64), [4, 0, 6, 0, 1]
    rows, cuts = [torch.randn(n, I, **F64) for n in lengths], [torch.rand(n) < 0.4 for n in lengths]
    hx = random_state(layer, 4, len(lengths))
    found = []
    for is_nested in (True, False):
        if is_nested:
            x = nested(rows, requires_grad=True)
            output, state = layer(x, hx, resets=nested(cuts))
            assert output.shape == (5, x.shape[1], 2 * H)  # the ragged size of the input: the two can be added
            padded = torch.nested.to_padded_tensor(output, 0.0)
        else:
            pad = torch.nn.utils.rnn.pad_sequence
            x = pad(rows, batch_first).requires_grad_()
            padded, state = layer(x, hx, lengths=lengths, resets=pad(cuts, batch_first))
            padded = padded if batch_first else padded.transpose(0, 1)
        weights = torch.randn(padded.shape, generator=torch.Generator().manual_seed(1), **F64)
        loss = (padded * weights).sum() + sum(s.square().sum() for s in listed(state))
        d_x, *d_weights = torch.autograd.grad(loss, [x, *layer.parameters()])
        if is_nested:
            d_x = torch.nested.to_padded_tensor(d_x, 0.0)
        elif not batch_first:
            d_x = d_x.transpose(0, 1)
        found.append((padded, state, d_x, d_weights))
    assert_same(found[0], found[1])


def test_a_nested_tensor_may_have_holes_and_no_rows() -> None:
    layer = make("gru-haste", I, H, bidirectional=True, batch_first=True, **F64)
    x = torch.randn(3, 6, I, **F64)
    starts, lengths = torch.tensor([0, 1, 2]), torch.tensor([3, 0, 4])
    output, _ = layer(torch.nested.narrow(x, 1, starts, lengths, layout=torch.jagged))
    for got, row, start, n in zip(output.unbind(), x, starts, lengths):
        assert_same(got, layer(row[start : start + n])[0] if n else row.new_zeros(0, 2 * H))
    nothing = x.new_zeros(0, I)
    assert layer(nested_tensor_from_jagged(nothing, torch.tensor([0])))[0].shape[::2] == (0, 2 * H)
    assert layer(nested_tensor_from_jagged(nothing, torch.tensor([0, 0])))[0].values().shape == (0, 2 * H)


def test_a_nested_tensor_serves_the_stateless_layer_and_its_masks() -> None:
    parameters = {"weight_ih": torch.randn(5, I, **F64), "weight_hh": torch.randn(5, **F64)}
    rows, lengths = [torch.randn(n, I, **F64) for n in (2, 4, 0)], [2, 4, 0]
    mask = torch.rand(1, 3, 4, 5) < 0.5
    options: dict[str, Any] = {"batch_first": True, "zoneout_mask": mask}
    got, h_n = festina.functional.layer("indrnn", nested(rows), parameters, **options)
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    want = festina.functional.layer("indrnn", padded, parameters, lengths=lengths, **options)
    assert_same((torch.nested.to_padded_tensor(got, 0.0), h_n), want)


def test_a_nested_tensor_compiles_in_one_graph() -> None:
    layer = make("lstm-haste", I, H, batch_first=True, **F64)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    for lengths in ((4, 1, 6), (2, 7, 1)):
        x = nested([torch.randn(n, I, **F64) for n in lengths])
        resets = nested([torch.rand(n) < 0.4 for n in lengths])
        (got, got_state), (want, want_state) = compiled(x, resets=resets), layer(x, resets=resets)
        assert_same((got.values(), got_state), (want.values(), want_state))
    for offsets, flags, message in (
        ([0, 5, 3, 10], resets, "the rows of a nested input must lie one after the other"),
        ([0, 5, 99, 10], resets, "the rows of a nested input must lie one after the other"),
        ([0, 2, 9, 10], nested([torch.zeros(n) > 0 for n in (2, 6, 2)]), "resets must have the lengths of the input"),
    ):
        with pytest.raises(RuntimeError, match=message):
            compiled(nested_tensor_from_jagged(torch.randn(10, I, **F64), torch.tensor(offsets)), resets=flags)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("offsets", "lengths", "message"),
    [
        ([0, 5, 3, 10], None, r"one after the other in its values, of which there are 10, got offsets \[0, 5, 3, 10\]"),
        ([0, 5, 99], None, r"in its values, of which there are 10, got offsets \[0, 5, 99\]"),
        ([0, -3, 10], None, r"got offsets \[0, -3, 10\]"),
        ([0, 5, 10], [3, 6], r"got offsets \[0, 5, 10\] and lengths \[3, 6\]"),
        ([0, 5, 10], [-1, 2], r"and lengths \[-1, 2\]"),
        ([0.0, 10.0], None, "offsets and lengths of a nested input must be int64, got torch.float32"),
    ],
)
def test_rows_of_a_nested_tensor_are_not_trusted(offsets: Any, lengths: Any, message: str) -> None:
    """torch.nested takes any offsets; a kernel would read and write beyond the values."""
    given = None if lengths is None else torch.tensor(lengths)
    x = nested_tensor_from_jagged(torch.randn(10, I), torch.tensor(offsets), given)
    with pytest.raises((TypeError, ValueError), match=message):
        make("gru", I, H)(x)


def test_what_is_nested_in_another_way_is_refused() -> None:
    layer, rows = make("gru", I, H), [torch.randn(n, I) for n in (2, 3)]
    x = nested(rows)
    for input, options, message in (
        (nested_tensor(rows), {}, r"must have the layout torch.jagged, got torch.strided; .*input.unbind"),
        (x.transpose(1, 2), {}, r"must be \[B, j, I\], ragged in its second axis"),
        (nested([row[0] for row in rows]), {}, r"must be \[B, j, I\], got"),
        (x, {"lengths": [2, 3]}, "a NestedTensor holds its own lengths"),
        (x, {"resets": torch.zeros(2, 3, dtype=torch.bool)}, r"resets must be nested as the input is, \[B, j\]"),
        (x, {"resets": x}, r"a nested resets must be \[B, j\]"),
        (x, {"resets": nested([row[:, 0] for row in rows])}, "resets must be a bool tensor, got torch.float32"),
        (x, {"resets": nested([row[1:, 0] > 0 for row in rows])}, r"lengths of the input, \[2, 3\], got \[1, 2\]"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            layer(input, **options)
