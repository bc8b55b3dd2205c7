"""Layers loaded from other projects' checkpoints compute what those projects compute, and dump back unchanged.

The expected values come from `golden/`, numbers computed by the projects' own code, and, without such numbers, from the
equations in `formulas.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from formulas import FORMULAS, Formula, H, I
from samples import assert_same, listed
from torch import Tensor, nn

import festina
from festina import backends, convert, functional, norms, spec
from festina.call import Case
from festina.convert.engine import read

GOLDEN = {
    "haste_GRU": "haste.GRU",
    "haste_GRU_zoneout_train": "haste.GRU",
    "haste_IndRNN": "haste.IndRNN",
    "haste_IndRNN_zoneout_train": "haste.IndRNN",
    "haste_LSTM": "haste.LSTM",
    "haste_LSTM_zoneout_train": "haste.LSTM",
    "haste_LayerNormGRU": "haste.LayerNormGRU",
    "haste_LayerNormGRU_zoneout_train": "haste.LayerNormGRU",
    "haste_LayerNormIndRNN": "haste.LayerNormIndRNN",
    "haste_LayerNormIndRNN_zoneout_train": "haste.LayerNormIndRNN",
    "haste_LayerNormLSTM": "haste.LayerNormLSTM",
    "haste_LayerNormLSTM_zoneout_eval": "haste.LayerNormLSTM",
    "haste_LayerNormLSTM_zoneout_train": "haste.LayerNormLSTM",
    "icefall_LayerNormLSTMCell_proj": "icefall.LayerNormLSTMCell",
    "sheeprl_LayerNormGRUCell": "sheeprl.LayerNormGRUCell",
    "torch_custom_lstms_LayerNormLSTMCell": "fastrnns.LayerNormLSTMCell",
}
"""Every golden file and the format that loads it."""

FOLDER = Path(__file__).parent / "golden"


def golden(name: str, group: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The tensors of one group of a golden file, by their names within it."""
    with np.load(FOLDER / f"{name}.npz") as file:
        found = {
            key.removeprefix(group + "/"): torch.from_numpy(file[key])
            for key in file.files
            if key.startswith(group + "/")
        }
    return {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in found.items()}


def meta(name: str) -> dict[str, Any]:
    with np.load(FOLDER / f"{name}.npz") as file:
        found: dict[str, Any] = json.loads(str(file["meta"]))
    return found


def paired(state: list[Tensor]) -> Any:
    """A state in the form that a layer takes."""
    return tuple(state) if len(state) > 1 else state[0]


def run_golden(name: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs and gradients of a golden case, through the converter, under the names of the file."""
    about = meta(name)
    params, inputs = golden(name, "param", dtype), golden(name, "input", dtype)
    mask = inputs.pop("zoneout_mask", None)
    leaves = {**params, **{f"input/{key}": value for key, value in inputs.items()}}
    for tensor in leaves.values():
        tensor.requires_grad_()
    layer, _, ((parameters,),) = read(convert.table(GOLDEN[name]), params)
    y, state = functional.layer(
        layer.cell.name,
        inputs["x"],
        parameters,
        paired([inputs[key].unsqueeze(0) for key in ("h0", "c0") if key in inputs]),
        norm=layer.plan,
        zoneout=about.get("zoneout", 0.0),
        zoneout_mask=None if mask is None else ~mask.unsqueeze(0),
    )
    assert isinstance(y, Tensor)
    outputs = {"y": y, **dict(zip(("h_n", "c_n"), (s.squeeze(0) for s in listed(state))))}
    cotangents = golden(name, "cotangent", dtype)
    loss = sum(((outputs[key] * cotangents[key]).sum() for key in outputs), start=torch.zeros((), dtype=dtype))
    found = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    return outputs, dict(zip(leaves, found))


def wanted_gradients(name: str) -> dict[str, Tensor]:
    return {**golden(name, "grad/param"), **{f"input/{k}": v for k, v in golden(name, "grad/input").items()}}


def worst(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """The largest difference, relative to each tensor's largest value if that is above 1."""
    assert got.keys() == want.keys()
    return max(float((got[k].detach() - want[k]).abs().max() / want[k].abs().max().clamp(min=1)) for k in want)


def test_every_golden_case_is_listed() -> None:
    assert GOLDEN.keys() == {path.stem for path in FOLDER.glob("*.npz")}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_case_by_name(name: str) -> None:
    """Right: 3e-14. The mildest wrong plan, another eps: 1e-6."""
    outputs, gradients = run_golden(name, torch.float64)
    assert worst(outputs, golden(name, "output")) < 1e-12
    assert worst(gradients, wanted_gradients(name)) < 1e-12


@pytest.mark.parametrize("backend", [name for name in backends.names() if name != "eager"])
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_case_on_every_backend(name: str, backend: str) -> None:
    layer = convert.load(GOLDEN[name], golden(name, "param", torch.float32))
    reason = backends.get(backend).can_run(Case(layer.spec, torch.float32, torch.device("cpu")))
    if reason:
        pytest.skip(f"{backend}: {reason}")
    with backends.use(backend):
        outputs, gradients = run_golden(name, torch.float32)
    assert worst(outputs, golden(name, "output")) < 1e-5
    assert worst(gradients, wanted_gradients(name)) < 1e-5


@pytest.mark.parametrize("name", [name for name in GOLDEN if "train" not in name])
def test_loaded_layer_runs_the_golden_case(name: str) -> None:
    """The module itself, loaded from NumPy arrays and with haste's zoneout rate, as a layer over time."""
    with np.load(FOLDER / f"{name}.npz") as file:
        arrays = {key.removeprefix("param/"): file[key] for key in file.files if key.startswith("param/")}
    layer = convert.load(GOLDEN[name], arrays, zoneout=meta(name).get("zoneout", 0.0)).eval()
    assert layer.layer_parameters()[0].dtype == torch.float64
    inputs, want = golden(name, "input"), golden(name, "output")
    y, state = layer(inputs["x"], paired([inputs[k].unsqueeze(0) for k in ("h0", "c0") if k in inputs]))
    assert_same([y, *listed(state)], [want["y"], *(want[k].unsqueeze(0) for k in ("h_n", "c_n") if k in want)])


def random_tensors(formula: Formula, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: 0.5 * torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in formula.shapes.items()
    }


def judge(formula: Formula, p: dict[str, Tensor], x: Tensor, state: list[Tensor]) -> list[Tensor]:
    """Output and final states by the project's equations."""
    h, c = (*state, None)[:2]
    assert h is not None
    outputs = []
    for x_t in x:
        h, c = formula.step(p, x_t, h, c)
        outputs.append(h)
    return [torch.stack(outputs), h, *([] if c is None else [c])]


@pytest.mark.parametrize("formula", FORMULAS, ids=str)
def test_formula(formula: Formula) -> None:
    """Outputs and all gradients agree with the project's equations. Right: 4e-15; a wrong eps: 1e-6."""
    params = random_tensors(formula)
    generator = torch.Generator().manual_seed(1)
    widths = [formula.width, *([H] if formula.has_c else [])]
    x, *state = (
        torch.randn(*lead, w, generator=generator, dtype=torch.float64)
        for *lead, w in ((6, 2, I), *((2, w) for w in widths))
    )
    leaves = [t.requires_grad_() for t in (*params.values(), x, *state)]
    want = judge(formula, params, x, state)

    layer, sizes, ((parameters,),) = read(convert.table(formula.format, **formula.options), params)
    assert sizes == (I, H, formula.width)
    y, last = functional.layer(layer.cell.name, x, parameters, paired([s.unsqueeze(0) for s in state]), norm=layer.plan)
    got = [y, *(s.squeeze(0) for s in listed(last))]
    assert_same(got, want, rtol=1e-12, atol=1e-12)
    weights = [torch.randn(w.shape, generator=generator, dtype=torch.float64) for w in want]
    gradients = [
        torch.autograd.grad(sum((o * w).sum() for o, w in zip(outs, weights)), leaves, materialize_grads=True)
        for outs in (got, want)
    ]
    assert_same(*gradients, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("formula", FORMULAS, ids=str)
def test_loaded_layer_computes_the_formula(formula: Formula) -> None:
    params = random_tensors(formula)
    layer = convert.load(formula.format, params, **formula.options)
    x = torch.randn(6, 2, I, dtype=torch.float64)
    start = [torch.zeros(2, w, dtype=torch.float64) for w in (formula.width, *([H] if formula.has_c else []))]
    output, last = layer(x)
    assert_same(
        [output, *(s.squeeze(0) for s in listed(last))], judge(formula, params, x, start), rtol=1e-12, atol=1e-12
    )


def test_every_format_has_a_judge() -> None:
    """festina's and torch's formats are judged by tests below, fastrnns and haste by golden/."""
    judged = {*GOLDEN.values(), *(formula.format for formula in FORMULAS)}
    assert {name for name in convert.names() if name not in judged} == {
        "festina.LSTM",
        "festina.GRU",
        "festina.IndRNN",
        "torch.LSTM",
        "torch.GRU",
    }


@pytest.mark.parametrize("formula", FORMULAS, ids=str)
def test_round_trip(formula: Formula) -> None:
    """Dump and load give the same layer; values that a project stores in several tensors come back as their sum."""
    params = random_tensors(formula)
    layer = convert.load(formula.format, params, **formula.options)
    dumped = convert.dump(formula.format, layer, **formula.options)
    assert {name: tuple(value.shape) for name, value in dumped.items()} == formula.shapes
    again = convert.load(formula.format, dumped, **formula.options)
    assert again.norm == layer.norm
    assert_same(dict(again.named_parameters()), dict(layer.named_parameters()), rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", sorted({name for name in GOLDEN.values() if name.startswith("haste")}))
def test_haste_round_trip_is_exact(name: str) -> None:
    stem = next(stem for stem, format in GOLDEN.items() if format == name)
    params = golden(stem, "param")
    dumped = convert.dump(name, convert.load(name, params))
    if name == "haste.LayerNormIndRNN":  # haste never reads the second row of gamma
        params["gamma"][1] = 1.0
    assert_same(dumped, params, rtol=0, atol=0)


@pytest.mark.parametrize("name", convert.names())
def test_a_default_device_moves_no_tensor(name: str) -> None:
    """Tensors keep their device, and arrays become tensors of the CPU; under another default device too."""
    table = convert.table(name)
    kind, plan = {"lstm": festina.LSTM, "gru": festina.GRU}.get(table.cell.name, festina.IndRNN), table.plan
    state = convert.dump(name, kind(I, H, **({} if plan is None else {"norm": plan})))
    arrays = {key: tensor.numpy() for key, tensor in state.items()}
    with torch.device("meta"):
        for given in (state, arrays):
            layer = convert.load(name, given)
            assert_same(convert.dump(name, layer), state, rtol=0, atol=0)
        if name.startswith("torch."):
            assert_same(dict(convert.to_torch(layer).state_dict()), state, rtol=0, atol=0)


TORCH = [("LSTM", {}), ("LSTM", {"proj_size": 4}), ("LSTM", {"bias": False}), ("GRU", {})]


@pytest.mark.parametrize(("cls", "options"), TORCH)
def test_torch_nn_both_ways(cls: str, options: dict[str, Any]) -> None:
    theirs = getattr(nn, cls)(I, H, num_layers=2, bidirectional=True, batch_first=True, dtype=torch.float64, **options)
    ours = convert.load(f"torch.{cls}", theirs.state_dict(), batch_first=True)
    x = torch.randn(2, 6, I, dtype=torch.float64)
    assert_same(ours(x), theirs(x))
    back = convert.to_torch(ours)
    assert type(back) is type(theirs)
    assert repr(back) == repr(theirs)
    assert_same(back(x), theirs(x), rtol=0, atol=0)
    assert_same(convert.dump(f"torch.{cls}", ours), dict(theirs.state_dict()), rtol=0, atol=0)


def test_torch_cell_becomes_a_layer() -> None:
    cell = nn.LSTMCell(I, H)
    layer = convert.load("torch.LSTM", cell.state_dict())
    output, (_, c_n) = layer(x := torch.randn(1, 2, I))
    h, c = cell(x[0])
    torch.testing.assert_close((output[0], c_n[0]), (h, c))


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (festina.LayerNormLSTM(I, H), "norm plan"),
        (festina.IndRNN(I, H), "no indrnn"),
        (festina.LSTM(I, H, zoneout=0.1), "zoneout is 0.1"),
        (festina.GRU(I, H, norm=norms.RESET_BEFORE), "RESET_BEFORE"),
    ],
)
def test_to_torch_refuses_what_torch_lacks(layer: Any, reason: str) -> None:
    with pytest.raises(convert.ConvertError, match=reason):
        convert.to_torch(layer)


CELLS = {"LSTM": spec.LSTM, "GRU": spec.GRU, "IndRNN": spec.INDRNN}
FITTING = [(cls, plan) for cls, cell in CELLS.items() for plan in norms.PLANS.values() if cell.admits(plan)]


@pytest.mark.parametrize(("cls", "plan"), FITTING, ids=str)
def test_own_state_dict_holds_its_plan(cls: str, plan: festina.NormPlan) -> None:
    """Every plan: the state dict alone gives the same layer."""
    layer = getattr(festina, cls)(I, H, num_layers=2, bidirectional=True, norm=plan)
    loaded = convert.load(f"festina.{cls}", layer.state_dict())
    assert loaded.spec == layer.spec
    x = torch.randn(4, 2, I)
    assert_same(loaded(x), layer(x), rtol=0, atol=0)
    assert_same(convert.dump(f"festina.{cls}", loaded), dict(layer.state_dict()), rtol=0, atol=0)


def test_own_state_dict_without_its_plan_is_refused() -> None:
    state = festina.LayerNormGRU(I, H).state_dict()
    del state["_extra_state"]
    with pytest.raises(convert.ConvertError, match="_extra_state is missing"):
        convert.load("festina.GRU", state)


@pytest.mark.parametrize("saved", [torch.tensor([123, 34], dtype=torch.uint8), torch.tensor([0.5])])
def test_own_state_dict_with_a_broken_plan_is_refused(saved: Any) -> None:
    state = {**festina.LayerNormGRU(I, H).state_dict(), "_extra_state": saved}
    with pytest.raises(convert.ConvertError, match="must hold a norm plan"):
        convert.load("festina.GRU", state)


def test_a_layer_of_a_format_without_bias_or_norms_on_c() -> None:
    """A layer lacks what its checkpoint lacks: bias, projection, inner bias."""
    cell = nn.GRUCell(I, H, bias=False)
    assert not convert.load("torch.GRU", cell.state_dict()).bias
    formula = next(formula for formula in FORMULAS if formula.format == "sheeprl.LayerNormGRUCell")
    without = convert.load(formula.format, random_tensors(formula))
    assert without.norm == norms.DREAMER
    with_bias = convert.load(formula.format, {**random_tensors(formula), "linear.bias": torch.ones(3 * H)})
    assert with_bias.norm == norms.DREAMER_V2
    assert "linear.bias" not in convert.dump(formula.format, without)
    assert "linear.bias" in convert.dump(formula.format, with_bias)


STACKS = {
    "fastrnns.LayerNormLSTMCell": "layers.{l}.directions.{d}.cell.{key}",
    "nemo.LayerNormLSTMCell": "layers.{l}.cell.{key}",
    "icefall.LayerNormLSTMCell": "layers.{l}.cell.{key}",
    "icefall.LayerNormGRUCell": "layers.{l}.cell.{key}",
    "torchaudio._CustomLSTM": "lstm_layers.{l}.{key}",
    "keras.LSTM": "{side}_lstm/{key}",
    "tfa.LayerNormLSTMCell": "{side}_rnn/{key}",
    "haste_tf.LayerNormLSTM": "{fw}/{key}",
}


@pytest.mark.parametrize("name", STACKS)
def test_stacks_and_directions(name: str) -> None:
    """Stacked and bidirectional layers survive a round trip through their scope."""
    scope = STACKS[name]
    L, D = 2 if "{l}" in scope else 1, 2 if "{d}" in scope or "{side}" in scope or "{fw}" in scope else 1
    judged = name.replace("fastrnns", "distar")  # the same cell; fastrnns itself is in golden/
    cell = convert.load(name, random_tensors(next(formula for formula in FORMULAS if formula.format == judged)))
    layer = type(cell)(I, H, num_layers=L, bidirectional=D == 2, norm=cell.norm, bias=cell.bias, dtype=torch.float64)
    state = convert.dump(name, layer)
    assert len({key.split(".")[0] if "." in key else key.split("/")[0] for key in state}) <= max(L, D)
    loaded = convert.load(name, {f"model.{key}:0": value for key, value in state.items()}, prefix="model.")
    assert (loaded.num_layers, loaded.spec.directions) == (L, D)
    x = torch.randn(4, 2, I, dtype=torch.float64)
    assert_same(loaded(x), layer(x), rtol=0, atol=1e-14)


KERAS_NAMES = {
    "Keras 2, without a model": ("{cell}/{variable}:0", "{side}_{kind}/{cell}_{n}/{variable}:0"),
    "Keras 2": ("{kind}/{cell}/{variable}:0", "bidirectional/{side}_{kind}/{cell}_{n}/{variable}:0"),
    "Keras 2, hdf5": ("{kind}/{kind}/{cell}/{variable}:0", "bidi/bidi/{side}_{kind}_7/{cell}_{n}/{variable}:0"),
    "Keras 3": ("sequential/{kind}_1/{cell}/{variable}", "model/wrap/{side}_{kind}_1/{cell}/{variable}"),
    "Keras 3, a chosen name": ("model/encoder/{cell}/{variable}", "wrap/{side}_encoder/{cell}/{variable}"),
    "Keras 3, .weights.h5": ("layers/{kind}_1/cell/vars/{at}", "layers/bidirectional/{side}_layer/cell/vars/{at}"),
    "TensorFlow 2": (
        "layer_with_weights-1/cell/{variable}/.ATTRIBUTES/VARIABLE_VALUE",
        "layer_with_weights-1/{side}_layer/cell/{variable}/.ATTRIBUTES/VARIABLE_VALUE",
    ),
    "get_weights()": ("{at}", "{all}"),
    "get_weights() in .npz": ("arr_{at}", "arr_{all}"),
}
"""How variables are named, in one direction and in two; those of Keras 3 as keras 3.8.0 names them."""


def keras_names(names: str, layer: Any, **options: Any) -> tuple[str, dict[str, Tensor]]:
    """A format, and the layer's variables under a pattern of `KERAS_NAMES`."""
    kind = "lstm" if layer.spec.cell == spec.LSTM else "gru"
    D, found = layer.spec.directions, {}
    dumped = convert.dump(f"keras.{kind.upper()}", layer, **options)
    for d, side in enumerate(("forward", "backward")[:D]):
        held = [variable for variable in ("kernel", "recurrent_kernel", "bias") if variable != "bias" or layer.bias]
        for at, variable in enumerate(held):
            value = dumped[f"{side}_{kind}/{variable}" if D == 2 else variable]
            parts = {"kind": kind, "cell": f"{kind}_cell", "side": side, "n": d + 1, "variable": variable}
            found[names.format(**parts, at=at, all=d * len(held) + at)] = value
    return f"keras.{kind.upper()}", found


@pytest.mark.parametrize("kind", KERAS_NAMES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("make", [festina.LSTM, festina.GRU])
def test_variables_of_keras_by_their_real_names(make: Any, bias: bool, kind: str) -> None:
    names = KERAS_NAMES[kind]
    x, seeds = torch.randn(4, 2, I), {"lstm/lstm_cell/seed_generator/seed_generator_state": torch.tensor([1, 2])}
    for bidirectional in (False, True):
        layer = make(I, H, bias=bias, bidirectional=bidirectional)
        layer.load_state_dict({**layer.state_dict(), **one_bias(layer)})
        name, state = keras_names(names[bidirectional], layer)
        other = list(state.values()) if "get_weights()" in kind else state | seeds
        for given in (dict(reversed(state.items())), other):
            loaded = convert.load(name, given)
            assert loaded.spec == layer.spec
            assert_same(loaded(x), layer(x), rtol=0, atol=0)


def one_bias(layer: Any) -> dict[str, Tensor]:
    """The LSTM's second bias as 0: Keras has one."""
    is_lstm = layer.spec.cell == spec.LSTM
    return {n: torch.zeros_like(p) for n, p in layer.named_parameters() if is_lstm and n.startswith("bias_hh")}


def test_the_bias_of_a_keras_gru_says_where_it_resets() -> None:
    for plan, is_after in ((norms.NONE, True), (norms.RESET_BEFORE, False)):
        layer = festina.GRU(I, H, norm=plan)
        nn.init.zeros_(layer.bias_hh_l0)
        _, state = keras_names("gru/gru_cell/{variable}:0", layer, reset_after=is_after)
        assert state["gru/gru_cell/bias:0"].dim() == 1 + is_after
        for options in ({}, {"reset_after": is_after}, {"reset_after": None}):
            loaded = convert.load("keras.GRU", state, **options)
            assert loaded.norm == plan
            assert_same(loaded(x := torch.randn(4, 2, I)), layer(x))
        with pytest.raises(convert.ConvertError, match=rf"with reset_after={is_after}, which is another function"):
            convert.load("keras.GRU", state, reset_after=not is_after)


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (
            ["lstm/cell/vars/0", "lstm_1/cell/vars/0"],
            "one Bidirectional, got those of lstm/cell, lstm_1/cell; choose a layer",
        ),
        (["a/forward_x/c/kernel", "b/backward_x/c/kernel"], "must be those of one layer"),
        (["a/forward_x/c/kernel", "a/forward_x/d/kernel"], "must be those of one layer"),
        (["forward_x/kernel", "backward_x/kernel", "dense/kernel"], "must be those of one layer"),
        (["lstm/kernel", "lstm/vars/0"], "unknown: lstm/vars/0"),
        (["lstm/kernel", "lstm/vars/3"], "unknown: lstm/vars/3"),
        (["lstm/kernel", "lstm/vars/99999999"], "unknown: lstm/vars/99999999"),
        (["lstm/kernel", "embeddings"], "unknown: embeddings"),
        ([str(at) for at in range(5)], "must give 2 arrays, 3 with a bias, .* got 5; call it on the layer"),
    ],
)
def test_variables_that_are_not_those_of_one_keras_layer(names: list[str], text: str) -> None:
    with pytest.raises(convert.ConvertError, match=text):
        convert.load("keras.LSTM", {name: torch.zeros(3, 20) for name in names})


def test_a_list_is_a_misfit_elsewhere() -> None:
    with pytest.raises(convert.ConvertError, match="unknown: 0; 1"):
        convert.load("torch.LSTM", [np.zeros((20, 3)), np.zeros((20, 5))])


def test_ding_stores_the_bias_of_all_layers_in_one_tensor() -> None:
    layer = festina.LSTM(I, H, num_layers=3, norm=norms.DING)
    state = convert.dump("ding.LSTM", layer)
    assert state["bias"].shape == (3, 4 * H)
    assert {"wx.2", "norm.5.weight"} <= state.keys()
    assert_same(convert.load("ding.LSTM", state)(x := torch.randn(4, 2, I)), layer(x), rtol=0, atol=0)


def test_a_misfit_lists_everything() -> None:
    params = golden("haste_LayerNormGRU", "param")
    del params["gamma"]
    params["gama"] = torch.ones(2, 30)
    params["kernel"] = params["kernel"].t()
    params["bias"] = torch.zeros(30, dtype=torch.int64)
    with pytest.raises(convert.ConvertError) as error:
        convert.load("haste.LayerNormGRU", params)
    text = str(error.value)
    for part in (
        "haste.LayerNormGRU: the state dict does not fit",
        "missing: gamma",
        "unknown: gama",
        "kernel must be [I, 3H] = [30, 30], got [30, 7]",
        "bias must hold floating-point numbers of 16, 32 or 64 bits, got torch.int64",
    ):
        assert part in text


@pytest.mark.parametrize("tensors", [{}, {"kernel": np.zeros((2, 2))}])
def test_an_almost_empty_state_dict_is_a_misfit(tensors: dict[str, Any]) -> None:
    with pytest.raises(convert.ConvertError, match=r"missing: .*recurrent_kernel"):
        convert.load("haste.LSTM", tensors)


def test_shapes_without_a_solution_are_listed() -> None:
    shapes: dict[str, tuple[int, ...]] = {"kernel": (7,), "recurrent_kernel": (), "bias": (3,)}
    with pytest.raises(convert.ConvertError, match=r"misshapen: kernel \[7\]; recurrent_kernel \[\]; bias \[3\]"):
        convert.load("haste.LSTM", {name: np.zeros(shape) for name, shape in shapes.items()})


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: convert.load("haste.Lstm", {}),
            ValueError,
            "format must be one of festina.LSTM, .*, got 'haste.Lstm'",
        ),
        (
            lambda: convert.load("keras.GRU", {}, order="hx"),
            TypeError,
            "options of keras.GRU must be among reset_after, got order",
        ),
        (
            lambda: convert.load("haste.GRU", {"bias": "zeros"}),
            TypeError,
            "bias must be a tensor or an array, got str",
        ),
        (lambda: convert.load("sheeprl.LayerNormGRUCell", {}, order="x"), ValueError, "order must be 'xh' or 'hx'"),
        (
            lambda: convert.dump("haste.LayerNormLSTM", festina.LSTM(I, H, norm=norms.FASTRNNS)),
            convert.ConvertError,
            "norm plan must be HASTE, got FASTRNNS",
        ),
        (lambda: convert.dump("haste.GRU", festina.LSTM(I, H)), convert.ConvertError, "cell must be gru, got lstm"),
        (
            lambda: convert.dump("haste.GRU", festina.GRU(I, H, num_layers=2)),
            convert.ConvertError,
            "has no names for 2 layers in 1 directions",
        ),
    ],
)
def test_errors(call: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()


def test_dump_refuses_what_it_has_no_place_for() -> None:
    layer = festina.LSTM(I, H, norm=norms.HASTE)  # training makes its bias_hh differ from 0
    nn.init.ones_(layer.bias_hh_l0)
    assert convert.dump("haste.LayerNormLSTM", layer)["bias"].min() >= 1  # folded: the sum is the same
    plain = festina.LSTM(I, H)
    with pytest.raises(convert.ConvertError, match="no place for: bias_hh"):
        convert.dump("sonnet.LSTM", plain, layer_norm=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    layer = festina.GRU(I, H, dtype=dtype)
    assert {p.dtype for p in convert.load("haste.GRU", convert.dump("haste.GRU", layer)).parameters()} == {dtype}


def test_loading_draws_no_random_numbers_and_copies() -> None:
    params = golden("haste_GRU", "param")
    before = torch.get_rng_state()
    layer = convert.load("haste.GRU", params)
    assert torch.equal(torch.get_rng_state(), before)
    nn.init.zeros_(layer.bias_ih_l0)
    assert params["bias"].abs().max() > 0
    assert all(p.requires_grad and p.is_leaf for p in layer.parameters())


def test_plans_cannot_be_swapped_unnoticed() -> None:
    """With the same weights, HASTE and FASTRNNS, both "LayerNorm LSTM", are different functions: by 0.6 here."""
    torch.manual_seed(0)
    haste = festina.LayerNormLSTM(8, 16)
    fastrnns = festina.LayerNormLSTM(8, 16, norm=norms.FASTRNNS)
    weights = {name: value for name, value in haste.state_dict().items() if name != "_extra_state"}
    fastrnns.load_state_dict({**fastrnns.state_dict(), **weights})
    x = torch.randn(50, 4, 8)
    assert (haste(x)[0] - fastrnns(x)[0]).abs().max() > 0.1
    with pytest.raises(RuntimeError, match="norm plan HASTE, this layer has FASTRNNS"):
        fastrnns.load_state_dict(haste.state_dict())
