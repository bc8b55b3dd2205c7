"""The equations against a loop over single numbers and against torch.nn; their gradients against finite differences."""

from __future__ import annotations

from itertools import product

import naive
import pytest
import torch
from cases import CASES, EVERY_PLAN, TYPICAL, feature_sets
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.testing import assert_close

import festina
from festina import norms, reference
from festina.call import Call
from festina.spec import CELLS
from festina.testing import Case, result_names, widened

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def same(got, want) -> None:
    assert_close(got, want, **EXACT)


# Each plan as it is; then every feature and a projection with the plans that differ most. Few numbers: a loop is slow.
SCALAR_CASES = [
    Case(cell, plan, T=2, B=2, I=3, H=4, dtype=torch.float64, features=features)
    for cell, plan in EVERY_PLAN
    for features in ((), ("nobias",))
]
SCALAR_CASES += [
    Case(cell, plan, T=4, B=3, I=2, H=3, P=P, dtype=torch.float64, features=features)
    for cell, plans in TYPICAL.items()
    for plan, features, P in product(plans, feature_sets(CELLS[cell]), (0, 2) if CELLS[cell].projects else (0,))
]


@pytest.mark.parametrize("case", SCALAR_CASES, ids=str)
def test_reference_is_the_scalar_loop(case):
    call, _ = case.build()
    output, h_n, c_n = reference.run(call)
    want_output, want_h, want_c = naive.run(call)
    same(output, torch.tensor(want_output, dtype=torch.float64))
    same(h_n, torch.tensor(want_h, dtype=torch.float64))
    if c_n is None:
        assert "c" not in call.layer.cell.states
    else:
        same(c_n, torch.tensor(want_c, dtype=torch.float64))


def test_the_scalar_loop_sees_what_backends_are_tried_with():
    here, there = ({case.layer.plan.with_eps(1) for case in cases} for cases in (SCALAR_CASES, CASES))
    assert here == there
    here, there = ({feature for case in cases for feature in case.features} for cases in (SCALAR_CASES, CASES))
    assert here == there


@pytest.mark.parametrize("activation", [torch.tanh, torch.relu])
def test_indrnn_is_its_formula(activation):
    layer = festina.IndRNN(4, 6, nonlinearity=activation.__name__, dtype=torch.float64)
    x, h = torch.randn(5, 3, 4, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    output, h_n = layer(x, h.unsqueeze(0))
    for t in range(5):
        h = activation(x[t] @ layer.weight_ih_l0.T + layer.bias_ih_l0 + layer.weight_hh_l0 * h)
        same(output[t], h)
    same(h_n[0], h)


# Against torch.nn.

INPUTS = ("padded", "unbatched", "sorted", "unsorted")
OPTIONS = [
    dict(zip(("num_layers", "bidirectional", "proj_size", "batch_first", "bias"), values))
    for values in product((1, 2, 3), (False, True), (0, 3), (False, True), (True, False))
]


def sibling_options() -> list[tuple[str, dict]]:
    lstm = [("LSTM", options) for options in OPTIONS]
    gru = [("GRU", {k: v for k, v in options.items() if k != "proj_size"}) for options in OPTIONS]
    return lstm + [pair for i, pair in enumerate(gru) if pair not in gru[:i]]


def option_id(value) -> str:
    return value if isinstance(value, str) else "-".join(f"{k}{int(v)}" for k, v in value.items())


def siblings(name: str, options: dict) -> tuple[nn.Module, nn.Module]:
    """torch.nn's layer and ours with the same parameters, in float64."""
    theirs = getattr(nn, name)(4, 5, dtype=torch.float64, **options)
    ours = getattr(festina, name)(4, 5, dtype=torch.float64, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def samples(layer: nn.RNNBase, kind: str) -> tuple[list[torch.Tensor], object]:
    """The tensors to differentiate by (input and states), and a function from them to the layer's arguments."""
    T, B, W = 6, 4, layer.num_layers * (2 if layer.bidirectional else 1)
    rows = () if kind == "unbatched" else (B,)
    shape = (*rows, T, 4) if layer.batch_first else (T, *rows, 4)
    widths = [layer.proj_size or 5, 5] if isinstance(layer, nn.LSTM) else [5]
    tensors = [torch.randn(shape, dtype=torch.float64)]
    tensors += [torch.randn(W, *rows, width, dtype=torch.float64) for width in widths]
    lengths = {"sorted": [6, 4, 4, 1], "unsorted": [2, 6, 1, 5]}.get(kind)

    def arguments(x, *state):
        if lengths is not None:
            x = pack_padded_sequence(x, lengths, layer.batch_first, enforce_sorted=kind == "sorted")
        return x, state if len(state) > 1 else state[0]

    return tensors, arguments


def flat(output, state) -> list[torch.Tensor]:
    output = output.data if isinstance(output, PackedSequence) else output
    return [output, *(state if isinstance(state, tuple) else (state,))]


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize(("name", "options"), sibling_options(), ids=option_id)
def test_plain_layer_is_torch_nn(name, options, kind):
    theirs, ours = siblings(name, options)
    tensors, arguments = samples(theirs, kind)
    results = []
    for layer in (theirs, ours):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        outputs = flat(*layer(*arguments(*leaves)))
        generator = torch.Generator().manual_seed(0)
        cotangents = [torch.randn(out.shape, generator=generator, dtype=out.dtype) for out in outputs]
        gradients = torch.autograd.grad(outputs, [*leaves, *layer.parameters()], cotangents)
        results.append((outputs, gradients))
    same(results[1], results[0])


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_plain_layer_starts_from_zeros_as_torch_nn(name):
    theirs, ours = siblings(name, {"num_layers": 2, "bidirectional": True})
    x = torch.randn(6, 3, 4, dtype=torch.float64)
    same(flat(*ours(x)), flat(*theirs(x)))


@pytest.mark.parametrize(("name", "options"), sibling_options(), ids=option_id)
def test_state_dicts_are_shared_both_ways(name, options):
    theirs, ours = siblings(name, options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(1.0)
    assert not torch.equal(theirs.weight_ih_l0, ours.weight_ih_l0)
    theirs.load_state_dict(ours.state_dict())
    for name_, parameter in theirs.named_parameters():
        assert torch.equal(parameter, ours.get_parameter(name_))


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_packed_output_is_laid_out_as_torch_nn(name):
    theirs, ours = siblings(name, {"bidirectional": True})
    packed = pack_padded_sequence(torch.randn(6, 4, 4, dtype=torch.float64), [2, 6, 1, 5], enforce_sorted=False)
    (got, _), (want, _) = ours(packed), theirs(packed)
    same(pad_packed_sequence(got)[0], pad_packed_sequence(want)[0])
    assert pad_packed_sequence(got)[1].tolist() == [2, 6, 1, 5]


# Gradients against finite differences.

GRADCHECKED = [
    Case("lstm", norms.NONE, 2, 2, 2, 3, P=2, dtype=torch.float64, features=("ragged",)),
    Case("lstm", norms.HASTE, 2, 2, 2, 3, dtype=torch.float64, features=("zoneout", "zoneout_cell")),
    Case("lstm", norms.FASTRNNS, 2, 2, 2, 3, dtype=torch.float64, features=("resets",)),
    Case("lstm", norms.ICEFALL, 2, 2, 2, 3, dtype=torch.float64, features=("expectation",)),
    Case("lstm", norms.NormPlan("joint", cell="readout", kind="rms"), 2, 2, 2, 3, dtype=torch.float64),
    Case("gru", norms.NONE, 2, 2, 2, 3, dtype=torch.float64, features=("bidirectional",)),
    Case("gru", norms.HASTE, 2, 2, 2, 3, dtype=torch.float64, features=("ragged", "idle")),
    Case("gru", norms.BA2016_GRU, 2, 2, 2, 3, dtype=torch.float64),
    Case("gru", norms.DREAMER, 2, 2, 2, 3, dtype=torch.float64, features=("zoneout",)),
    Case("indrnn", norms.HASTE, 2, 2, 2, 3, dtype=torch.float64, features=("expectation", "resets")),
]


def of_tensors(call: Call):
    """The recurrence through the operators as a function of its tensors."""

    def outputs(*tensors):
        return tuple(out for out in festina.functional.recurrence(call.with_tensors(tensors)) if out is not None)

    return outputs, [tensor.requires_grad_() for tensor in call.tensors()]


@pytest.mark.parametrize("case", GRADCHECKED, ids=str)
def test_gradients_are_finite_differences(case):
    """In fast mode, along random directions, here and below."""
    assert torch.autograd.gradcheck(*of_tensors(case.build()[0]), fast_mode=True)


@pytest.mark.parametrize("case", GRADCHECKED, ids=str)
def test_second_gradients_are_finite_differences(case):
    assert torch.autograd.gradgradcheck(*of_tensors(case.build()[0]), fast_mode=True)


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=option_id)
@pytest.mark.parametrize("name", ["LSTM", "GRU", "IndRNN", "LayerNormLSTM", "LayerNormGRU", "LayerNormIndRNN"])
def test_gradients_through_layers(name, options):
    torch.manual_seed(0)
    layer = getattr(festina, name)(2, 3, dtype=torch.float64, **options)
    names = [name for name, _ in layer.named_parameters()]
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    states = 2 if "LSTM" in name else 1
    state = torch.randn(states, layer.spec.directions * layer.num_layers, 2, 3, dtype=torch.float64, requires_grad=True)

    def outputs(x, state, *parameters):
        hx = tuple(state) if states > 1 else state[0]
        called = torch.func.functional_call(layer, dict(zip(names, parameters)), (x, hx), {"lengths": [2, 3]})
        return tuple(flat(*called))

    leaves = (x, state, *(parameter.detach().requires_grad_() for parameter in layer.parameters()))
    assert torch.autograd.gradcheck(outputs, leaves, fast_mode=True)
    if not options:  # of a stack they take half a minute
        assert torch.autograd.gradgradcheck(outputs, leaves, fast_mode=True)


# Precision.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [Case("lstm", norms.HASTE), Case("gru", norms.DREAMER)], ids=str)
def test_low_types_keep_norms_and_gates_wide(case, dtype):
    """Outputs come in the low type and stay within a few of its roundings of float64."""
    call, _ = Case(**{**vars(case), "dtype": dtype}).build()
    names, _ = result_names(call)
    for name, out, want in zip(names, reference.run(call), reference.run(widened(call))):
        if out is not None:
            assert out.dtype == dtype, name
            assert_close(out.double(), want, rtol=0, atol=8 * torch.finfo(dtype).eps)
