"""Layers as data (`festina.spec`): names and shapes of parameters, which plan fits which cell, the token of a layer."""

from __future__ import annotations

import json
from itertools import product

import pytest
import torch
from cases import EVERY_PLAN
from torch import nn

from festina import norms, reference, spec
from festina.norms import PLANS, NormPlan
from festina.spec import CELLS, GRU, INDRNN, LSTM, LayerSpec
from festina.testing import Case, plan_label

# Parameters.


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("name", "proj_size"), [("LSTM", 0), ("LSTM", 3), ("GRU", 0)], ids=lambda v: v if isinstance(v, str) else f"P{v}"
)
def test_plain_parameters_are_those_of_torch_nn(name, proj_size, bias):
    options = {"proj_size": proj_size} if proj_size else {}
    want = getattr(nn, name)(4, 5, bias=bias, **options).state_dict()
    layer = LayerSpec(CELLS[name.lower()], bias=bias, projected=proj_size > 0)
    got = layer.parameter_shapes(4, 5, proj_size or 5)
    assert [(f"{key}_l0", shape) for key, shape in got.items()] == [(key, value.shape) for key, value in want.items()]


I, H, P = 3, 5, 4
NORMED = {
    (LSTM, norms.HASTE): {"gain_ih": (20,), "gain_hh": (20,), "gain_c": (5,), "bias_c": (5,)},
    (LSTM, norms.TORCHAUDIO): {"gain_joint": (20,), "bias_joint": (20,), "gain_c": (5,), "bias_c": (5,)},
    (LSTM, norms.ICEFALL): {
        "gain_joint": (20,),
        "bias_joint": (20,),
        "bias_inner": (20,),
        "gain_c": (5,),
        "bias_c": (5,),
    },
    (LSTM, NormPlan("separate", inner_bias=True)): {"gain_ih": (20,), "gain_hh": (20,), "bias_inner": (20,)},
    (LSTM, NormPlan(cell="readout")): {"gain_c": (5,), "bias_c": (5,)},
    (GRU, norms.HASTE): {"gain_ih": (15,), "gain_hh": (15,)},
    (GRU, norms.DREAMER): {"gain_joint": (15,), "bias_joint": (15,)},
    (INDRNN, norms.HASTE): {"gain_ih": (5,)},
}


@pytest.mark.parametrize(("cell", "plan"), NORMED, ids=lambda v: plan_label(v) if isinstance(v, NormPlan) else v.name)
def test_parameters_of_norms(cell, plan):
    shapes = LayerSpec(cell, plan).parameter_shapes(I, H, H)
    G = len(cell.gates)
    plain = {"weight_ih": (G * H, I), "weight_hh": (H,) if cell.diagonal else (G * H, H)}
    if plan.placement != "joint":  # a joint norm has one shift, `bias`
        plain |= {"bias_ih": (G * H,)} | ({} if cell.diagonal else {"bias_hh": (G * H,)})
    assert shapes == plain | NORMED[cell, plan]
    without = LayerSpec(cell, plan, bias=False).parameter_shapes(I, H, H)
    assert without == {name: shape for name, shape in shapes.items() if not name.startswith("bias")}


@pytest.mark.parametrize(("cell", "plan"), EVERY_PLAN, ids=lambda v: v if isinstance(v, str) else plan_label(v))
def test_every_parameter_moves_the_result(cell, plan):
    """Each parameter of a layer has a gradient that is not zero."""
    call, cotangents = Case(cell, plan, T=3, dtype=torch.float64).build()
    leaves = [tensor.requires_grad_() for tensor in call.tensors()]
    outputs = [out for out in reference.run(call.with_tensors(leaves)) if out is not None]
    gradients = torch.autograd.grad(outputs, leaves, cotangents)[-len(call.parameters) :]
    for name, gradient in zip(call.layer.parameter_names, gradients, strict=True):
        assert gradient.abs().max() > 1e-6, name


def test_projection_parameters():
    shapes = LayerSpec(LSTM, projected=True).parameter_shapes(I, H, P)
    assert (shapes["weight_hr"], shapes["weight_hh"]) == ((P, H), (4 * H, P))


@pytest.mark.parametrize("cell", CELLS.values(), ids=lambda cell: cell.name)
def test_rows_cut_a_parameter_into_its_gates(cell):
    at = [cell.rows(gate, H) for gate in cell.gates]
    assert [row for rows in at for row in range(len(cell.gates) * H)[rows]] == list(range(len(cell.gates) * H))


def test_gates_stand_in_the_order_of_torch_nn():
    assert LSTM.gates == ("i", "f", "g", "o")
    assert GRU.gates == ("r", "z", "n")
    assert LSTM.rows("f", 8) == slice(8, 16)
    assert GRU.rows("n", 8) == slice(16, 24)
    with pytest.raises(ValueError, match="tuple"):
        GRU.rows("f", 8)


def test_shift_and_norm_shifts():
    assert LayerSpec(LSTM, norms.HASTE).norm_shifts == {"bias_ih", "bias_hh", "bias_c"}
    assert LayerSpec(LSTM, norms.ICEFALL).norm_shifts == {"bias_joint", "bias_c"}
    assert LayerSpec(LSTM).norm_shifts == frozenset()
    assert [LayerSpec(LSTM, plan).shift for plan in (norms.NONE, norms.HASTE, norms.ICEFALL)] == [
        "bias_ih",
        "bias_ih",
        "bias_joint",
    ]
    assert LayerSpec(LSTM, bias=False).shift is None


# Which plan fits which cell.


@pytest.mark.parametrize(
    ("cell", "plan", "text"),
    [
        (
            INDRNN,
            norms.DREAMER,
            "the norm plan DREAMER does not fit the indrnn cell: placement must be one of 'none', 'separate', "
            "got 'joint'",
        ),
        (
            LSTM,
            norms.BA2016_GRU,
            "the norm plan BA2016_GRU does not fit the lstm cell: groups must be one of 'all', 'gate', "
            "got 'gates|candidate'",
        ),
    ],
    ids=["placement", "groups"],
)
def test_a_plan_that_does_not_fit(cell, plan, text):
    for attempt in (lambda: cell.fit(plan), lambda: LayerSpec(cell, plan)):
        with pytest.raises(ValueError, match="does not fit") as raised:
            attempt()
        assert str(raised.value) == text


def test_a_cell_without_c_has_no_norm_on_c():
    assert GRU.fit(norms.HASTE).cell == "none"
    assert INDRNN.fit(norms.HASTE).cell == "none"
    assert LSTM.fit(norms.HASTE) is norms.HASTE
    assert LayerSpec(GRU, norms.HASTE) == LayerSpec(GRU, NormPlan("separate"))


@pytest.mark.parametrize(
    ("cell", "plan", "fits"),
    [
        (cell.name, plan.name, placement_fits and groups_fit)
        for cell, plan in product(CELLS.values(), PLANS.values())
        for placement_fits in [plan.placement != "joint" or not cell.diagonal]
        for groups_fit in [plan.groups != "gates|candidate" or cell is GRU]
    ],
)
def test_named_plans_fit_where_they_should(cell, plan, fits):
    if fits:
        assert CELLS[cell].fit(PLANS[plan]).placement == PLANS[plan].placement
    else:
        with pytest.raises(ValueError, match="does not fit"):
            CELLS[cell].fit(PLANS[plan])


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        ({"cell": "lstm"}, TypeError, "cell must be a CellSpec, such as spec.LSTM, got 'lstm'"),
        ({"plan": "HASTE"}, TypeError, "norm must be a NormPlan"),
        ({"bias": 1}, TypeError, "bias must be True or False, got 1"),
        ({"projected": None}, TypeError, "projected must be True or False, got None"),
        ({"directions": True}, TypeError, "directions must be an int, got True"),
        ({"directions": "2"}, TypeError, "directions must be an int, got '2'"),
        ({"directions": 3}, ValueError, "directions must be 1 or 2, got 3"),
    ],
)
def test_a_layer_checks_itself(fields, error, text):
    with pytest.raises(error, match=text):
        LayerSpec(**{"cell": LSTM, **fields})


# Tokens.


@pytest.mark.parametrize(
    "change",
    [
        {"cell": "lstmm"},
        {"cell": ["lstm"]},
        {"plan": None},
        {"plan": {"eps": True}},
        {"plan": {"name": "HASTE"}},
        {"bias": "yes"},
        {"directions": 0},
        {"width": 3},
    ],
    ids=str,
)
def test_tokens_that_are_none(change):
    token = json.dumps({**json.loads(LayerSpec(LSTM).token), **change})
    with pytest.raises(ValueError, match="token must be that of a LayerSpec"):
        LayerSpec.parse(token)


@pytest.mark.parametrize("token", ["", "lstm", "[]", "{}", "[" * 100_000])
def test_texts_that_are_no_tokens(token):
    with pytest.raises(ValueError, match="token must be that of a LayerSpec"):
        LayerSpec.parse(token)


@pytest.mark.parametrize(("cell", "plan"), EVERY_PLAN, ids=lambda v: v if isinstance(v, str) else plan_label(v))
def test_layers_through_their_token(cell, plan):
    for bias, directions in product((True, False), (1, 2)):
        layer = LayerSpec(CELLS[cell], plan, bias, CELLS[cell].projects, directions)
        read = LayerSpec.parse(layer.token)
        assert read == layer
        assert hash(read) == hash(layer)
        assert read.parameter_names == layer.parameter_names
        assert read.token == layer.token


def test_tokens_tell_layers_apart():
    layers = [
        LayerSpec(CELLS[cell], plan, bias, projected, directions)
        for cell, plan in EVERY_PLAN
        for bias, projected, directions in product((True, False), (True, False), (1, 2))
    ]
    assert len({layer.token for layer in layers}) == len(set(layers)) == len(layers)


def test_a_token_is_of_one_version_of_what_is_saved(monkeypatch):
    """Otherwise, after an upgrade, a compiled graph that torch has cached on disk would get saved tensors of other sizes."""
    before = LayerSpec(CELLS["lstm"])
    monkeypatch.setattr(spec, "SAVED", spec.SAVED + 1)
    assert LayerSpec(CELLS["lstm"]).token != before.token
