"""The layers and cells as users of `torch.nn` meet them: signatures, state dicts, saving, cells, randomness, shapes."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from samples import VARIANTS, assert_same, has_c, listed, make, random_state
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import festina
from festina import norms

T, B, I, H = 6, 4, 3, 5
F64: dict[str, Any] = {"dtype": torch.float64}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


# Construction


def test_layers_take_the_positional_arguments_of_torch_nn() -> None:
    args = (I, H, 2, False, True, 0.5, True, 2, "cpu", torch.float64)
    ours, theirs = festina.LSTM(*args), nn.LSTM(*args)
    names = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional", "proj_size")
    assert [getattr(ours, name) for name in names] == [getattr(theirs, name) for name in names]
    assert [(name, p.shape, p.dtype) for name, p in ours.named_parameters()] == [
        (name, p.shape, p.dtype) for name, p in theirs.named_parameters()
    ]


def test_cells_take_the_positional_arguments_of_torch_nn() -> None:
    args = (I, H, False, "cpu", torch.float64)
    for ours, theirs in ((festina.LSTMCell(*args), nn.LSTMCell(*args)), (festina.GRUCell(*args), nn.GRUCell(*args))):
        assert {name: p.shape for name, p in ours.named_parameters()} == {
            name: p.shape for name, p in theirs.named_parameters()
        }
        for name in ("input_size", "hidden_size", "bias"):
            assert getattr(ours, name) == getattr(theirs, name)


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
@pytest.mark.parametrize("options", [{}, {"num_layers": 3, "bidirectional": True}, {"bias": False}], ids=str)
def test_plain_layers_start_as_torch_nn_does_and_share_state_dicts(name: str, options: dict[str, Any]) -> None:
    """The same seed gives the same values; each loads the other's state dict and computes the same."""
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


@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell"])
def test_plain_cells_share_state_dicts_with_torch_nn(name: str) -> None:
    ours, theirs = getattr(festina, name)(I, H), getattr(nn, name)(I, H)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(B, I)
    assert_same(ours(x), theirs(x), 1e-5, 1e-6)


def test_initial_values() -> None:
    layer = festina.LayerNormLSTM(I, 64)
    bound = 64**-0.5
    for name, p in layer.named_parameters():
        if name.startswith("gain"):
            assert_same(p.detach(), torch.ones_like(p))
        elif name == "bias_ih_l0":  # forget_bias is 1 here, and gates are i f g o
            assert_same(p.detach().view(4, 64).mean(1), torch.tensor([0.0, 1.0, 0.0, 0.0]))
        elif name.startswith("bias"):
            assert_same(p.detach(), torch.zeros_like(p))
        else:
            assert p.abs().max() <= bound
            assert p.abs().max() > 0.95 * bound


def test_forget_bias() -> None:
    def forget(**options: Any) -> Tensor:
        torch.manual_seed(2)
        layer = options.pop("layer", festina.LSTM)(I, H, **options)
        return (
            dict(layer.named_parameters()).get("bias_ih_l0", getattr(layer, "bias_joint_l0", None)).detach()[H : 2 * H]
        )

    assert_same(forget(forget_bias=2.0), forget() + 2.0, 1e-6, 1e-6)
    assert_same(forget(layer=festina.LayerNormLSTM, forget_bias=0.0), torch.zeros(H))
    assert_same(forget(norm=norms.TORCHAUDIO, forget_bias=3), torch.full((H,), 3.0))
    assert "bias_ih_l0" not in dict(festina.LSTM(I, H, bias=False, forget_bias=1.0).named_parameters())
    assert festina.LayerNormLSTM(I, H).forget_bias == 1.0
    assert festina.LSTM(I, H).forget_bias == 0.0


def test_repr() -> None:
    layer = festina.LayerNormLSTM(
        I, H, 2, False, True, 0.1, True, 2, norm=norms.FASTRNNS, zoneout=0.2, zoneout_cell=0.3, dropconnect=0.4
    )
    assert repr(layer) == (
        "LayerNormLSTM(3, 5, proj_size=2, bias=False, num_layers=2, batch_first=True, dropout=0.1, bidirectional=True, "
        "norm=norms.FASTRNNS, zoneout=0.2, zoneout_cell=0.3, dropconnect=0.4)"
    )
    assert repr(festina.GRU(I, H)) == "GRU(3, 5)"
    assert repr(festina.IndRNN(I, H, nonlinearity="relu")) == "IndRNN(3, 5, nonlinearity=relu)"
    assert repr(layer.cell(1)).startswith(
        "LayerNormLSTMCell(4, 5, proj_size=2, bias=False, norm=norms.FASTRNNS, zoneout="
    )
    assert repr(festina.LSTMCell(I, H, norm=norms.TFA.with_eps(0.5))).startswith(
        "LSTMCell(3, 5, norm=NormPlan(placement='separate', cell='carried', eps=0.5)"
    )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("cell", [False, True], ids=["layer", "cell"])
def test_copies_and_files(variant: str, cell: bool) -> None:
    """deepcopy, pickle, torch.save whole, and torch.save of the state dict read back with weights_only."""
    module = make(variant, I, H, cell=cell, zoneout=0.1).eval()
    x = torch.randn(B, I) if cell else torch.randn(T, B, I)
    want = module(x)

    def through_file(content: Any, **options: Any) -> Any:
        file = io.BytesIO()
        torch.save(content, file)
        file.seek(0)
        return torch.load(file, **options)

    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), through_file(module, weights_only=False)]
    fresh = make(variant, I, H, cell=cell, zoneout=0.1).eval()
    fresh.load_state_dict(through_file(module.state_dict(), weights_only=True))
    for other in (*copies, fresh):
        assert_same(other(x), want, 0, 0)
        assert repr(other) == repr(module)
        assert other.norm == module.norm
        assert not {p.data_ptr() for p in other.parameters()} & {p.data_ptr() for p in module.parameters()}


def test_flatten_parameters_does_nothing() -> None:
    layer = festina.LSTM(I, H)
    layer.flatten_parameters()
    assert layer._apply(lambda t: t) is layer


@pytest.mark.parametrize("norm", norms.PLANS)
def test_state_dict_keys(norm: str) -> None:
    """A plan is one key; there is none for a plain layer, whose keys are torch.nn's."""
    plan = norms.PLANS[norm]
    is_of_gru = plan.groups == "gates|candidate" or plan.reset != "normed"
    module = (festina.GRU if is_of_gru else festina.LSTM)(I, H, norm=plan)
    keys, names = list(module.state_dict()), [name for name, _ in module.named_parameters()]
    assert keys == names + ["_extra_state"] * (norm != "NONE")
    assert len(set(names)) == len(names)


def test_a_cell_under_a_joint_plan_keeps_its_bias_flag() -> None:
    cell = festina.LSTMCell(3, 5, norm=norms.TORCHAUDIO)
    assert cell.bias is True
    assert "bias_joint" in cell.state_dict()
    assert cell(torch.zeros(2, 3))[0].shape == (2, 5)


def test_devices_and_types() -> None:
    layer = festina.LayerNormLSTM(I, H, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.bfloat16)}
    layer = layer.to_empty(device="cpu").double()
    layer.reset_parameters()
    output, state = layer(torch.randn(T, B, I, **F64))
    assert {t.dtype for t in (output, *state)} == {torch.float64}
    assert layer.half()(torch.randn(T, B, I).half())[0].dtype == torch.float16


# The cells of a layer


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_cell_shares_parameters_and_gives_the_numbers_of_its_layer(variant: str, reverse: bool) -> None:
    """Layer 1, in eval mode with every rate set."""
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


def test_cell_of_one_row_and_with_resets() -> None:
    cell = make("lstm-haste", I, H, cell=True, **F64)
    x, hx = torch.randn(B, I, **F64), random_state(cell, 0, B)
    resets = torch.tensor([True, False, True, False])
    h, c = cell(x, hx, resets=resets)
    for b in range(B):
        alone = cell(x[b], None if resets[b] else (hx[0][b], hx[1][b]))
        assert_same(alone, (h[b], c[b]))
        assert_same(cell(x[b], (hx[0][b], hx[1][b]), resets=resets[b]), (h[b], c[b]))


def test_a_parametrized_weight_cannot_be_shared() -> None:
    layer = nn.utils.parametrizations.weight_norm(festina.GRU(I, H), "weight_hh_l0")
    with pytest.raises(TypeError, match="weight_hh of layer 0 is computed by a parametrization and cannot be shared"):
        layer.cell()


# Randomness


def test_dropout_acts_between_layers_in_training_only() -> None:
    layer = make("gru-haste", I, H, 2, dropout=1.0, **F64)
    x = torch.randn(T, B, I, **F64)
    assert_same(layer(x)[0], layer(torch.zeros_like(x))[0])  # all that layer 1 sees is 0
    layer.eval()
    without = make("gru-haste", I, H, 2, **F64)
    without.load_state_dict(layer.state_dict())
    assert_same(layer(x), without(x))


@pytest.mark.parametrize("variant", VARIANTS)
def test_random_masks_follow_the_seed_and_end_with_training(variant: str) -> None:
    rates: dict[str, Any] = {"zoneout": 0.3, "dropconnect": 0.3, **({"zoneout_cell": 0.3} if has_c(variant) else {})}
    layer = make(variant, I, H, 2, dropout=0.3, **rates, **F64)
    x = torch.randn(T, B, I, **F64)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return layer(x)[0]  # type: ignore[no-any-return]

    assert_same(run(1), run(1), 0, 0)
    assert not torch.allclose(run(1), run(2))
    layer.eval()
    assert_same(run(1), run(2), 0, 0)


def test_dropconnect_draws_one_mask_for_the_whole_sequence() -> None:
    """IndRNN, relu: with x = 1 and h_0 = 0 every unit counts the steps if its u is kept (scaled by 2), else is 1."""
    layer = festina.IndRNN(1, 2000, nonlinearity="relu", bias=False, dropconnect=0.5, **F64)
    nn.init.ones_(layer.weight_ih_l0)
    nn.init.constant_(layer.weight_hh_l0, 0.5)
    output = layer(torch.ones(T, B, 1, **F64))[0]
    counted = torch.arange(1, T + 1, **F64).view(T, 1, 1).expand_as(output)
    kept = output[-1] == T
    assert_same(output, torch.where(kept, counted, 1.0))
    assert (kept == kept[0]).all(), "one mask for every row"
    assert abs(kept[0].double().mean().item() - 0.5) < 0.05
    again = layer(torch.ones(T, B, 1, **F64))[0][-1] == T
    assert not torch.equal(again, kept), "another forward, another mask"
    layer.weight_hh_l0.grad = None
    layer(torch.ones(T, B, 1, **F64))[0].sum().backward()
    assert 0.4 < (layer.weight_hh_l0.grad == 0).double().mean().item() < 0.6


def test_zoneout_keeps_its_share_in_training_and_takes_the_expectation_otherwise() -> None:
    """One step from a state of ones: where the mask fell h and c are exactly old, elsewhere exactly new."""
    layer = make("lstm-haste", I, 50, zoneout=0.2, zoneout_cell=0.6, **F64)
    x, old = torch.randn(1, 400, I, **F64), (torch.ones(1, 400, 50, **F64), torch.full((1, 400, 50), 2.0, **F64))
    layer.zoneout = layer.zoneout_cell = 0.0
    new = layer(x, old)[1]
    layer.zoneout, layer.zoneout_cell = 0.2, 0.6
    got = layer(x, old)[1]
    for was, now, state, rate in zip(old, new, got, (0.2, 0.6)):
        kept = state == was
        assert_same(state, torch.where(kept, was, now))
        assert abs(kept.double().mean().item() - rate) < 0.02
    layer.eval()
    expected = layer(x, old)[1]
    assert_same(expected, tuple(r * was + (1 - r) * now for was, now, r in zip(old, new, (0.2, 0.6))))


# Forms of input


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
    """Forward and backward with the right shapes; the state stays what it was and so is its gradient."""
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
