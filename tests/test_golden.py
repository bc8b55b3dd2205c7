"""Numbers that other projects computed: outputs, states and all gradients, to 1e-12. `golden/README.md` has the format.

Each reader below says how a project's parameters become ours. It is run under autograd, so gradients come back in the
project's layout through the very same map.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from festina import backends, functional, norms
from festina.call import Case
from festina.norms import NormPlan
from festina.spec import CELLS, LayerSpec

GOLDEN = Path(__file__).parent / "golden"

Parameters = dict[str, Tensor]


def reordered(tensor: Tensor, order: tuple[int, ...]) -> Tensor:
    """The gate blocks of the last axis as `order` lists them; that axis comes first: from [I, G·H] to [G·H, I]."""
    return tensor.unflatten(-1, (len(order), -1))[..., list(order), :].flatten(-2).movedim(-1, 0)


# haste's gates are i g f o and z r h, ours i f g o and r z n.
IGFO, ZRH = (0, 2, 1, 3), (1, 0, 2)


def haste_lstm(p: Parameters) -> Parameters:
    bias = reordered(p["bias"], IGFO)
    return {
        "weight_ih": reordered(p["kernel"], IGFO),
        "weight_hh": reordered(p["recurrent_kernel"], IGFO),
        "bias_ih": bias,
        "bias_hh": torch.zeros_like(bias),
    }


def haste_layer_norm_lstm(p: Parameters) -> Parameters:
    return {
        **haste_lstm(p),
        "gain_ih": reordered(p["gamma"][0], IGFO),
        "gain_hh": reordered(p["gamma"][1], IGFO),
        "gain_c": p["gamma_h"],
        "bias_c": p["beta_h"],
    }


def haste_gru(p: Parameters) -> Parameters:
    return {
        "weight_ih": reordered(p["kernel"], ZRH),
        "weight_hh": reordered(p["recurrent_kernel"], ZRH),
        "bias_ih": reordered(p["bias"], ZRH),
        "bias_hh": reordered(p["recurrent_bias"], ZRH),
    }


def haste_layer_norm_gru(p: Parameters) -> Parameters:
    gains = {"gain_ih": reordered(p["gamma"][0], ZRH), "gain_hh": reordered(p["gamma"][1], ZRH)}
    return {**haste_gru(p), **gains}


def haste_indrnn(p: Parameters) -> Parameters:
    return {"weight_ih": p["kernel"].T, "weight_hh": p["recurrent_scale"], "bias_ih": p["bias"]}


def haste_layer_norm_indrnn(p: Parameters) -> Parameters:
    return {**haste_indrnn(p), "gain_ih": p["gamma"][0]}


def fastrnns_lstm(p: Parameters) -> Parameters:
    norm_of = {"i": "ih", "h": "hh", "c": "c"}
    return {
        "weight_ih": p["weight_ih"],
        "weight_hh": p["weight_hh"],
        **{f"gain_{ours}": p[f"layernorm_{theirs}.weight"] for theirs, ours in norm_of.items()},
        **{f"bias_{ours}": p[f"layernorm_{theirs}.bias"] for theirs, ours in norm_of.items()},
    }


def icefall_lstm(p: Parameters) -> Parameters:
    gates = ("i", "f", "cx", "o")
    return {
        "weight_ih": p["weight_ih"],
        "weight_hh": p["weight_hh"],
        "weight_hr": p["weight_hr"],
        "gain_joint": torch.cat([p[f"layernorm_{gate}.weight"] for gate in gates]),
        "bias_joint": torch.cat([p[f"layernorm_{gate}.bias"] for gate in gates]),
        "bias_inner": p["bias_ih"] + p["bias_hh"],
        "gain_c": p["layernorm_cy.weight"],
        "bias_c": p["layernorm_cy.bias"],
    }


def sheeprl_gru(p: Parameters) -> Parameters:
    """Columns are [h, x], rows r n z; its update gate is `reference.gru_joint_step`'s z as it stands."""
    H, rnz = len(p["linear.bias"]) // 3, (0, 2, 1)
    return {
        "weight_ih": reordered(p["linear.weight"].T, rnz)[:, H:],
        "weight_hh": reordered(p["linear.weight"].T, rnz)[:, :H],
        "gain_joint": reordered(p["layer_norm.weight"], rnz),
        "bias_joint": reordered(p["layer_norm.bias"], rnz),
        "bias_inner": reordered(p["linear.bias"], rnz),
    }


@dataclass(frozen=True)
class Golden:
    """Which of our layers a file's layer is."""

    cell: str
    norm: NormPlan
    read: Callable[[Parameters], Parameters]


FILES = {
    "haste_LSTM": Golden("lstm", norms.NONE, haste_lstm),
    "haste_LSTM_zoneout_train": Golden("lstm", norms.NONE, haste_lstm),
    "haste_LayerNormLSTM": Golden("lstm", norms.HASTE, haste_layer_norm_lstm),
    "haste_LayerNormLSTM_zoneout_train": Golden("lstm", norms.HASTE, haste_layer_norm_lstm),
    "haste_LayerNormLSTM_zoneout_eval": Golden("lstm", norms.HASTE, haste_layer_norm_lstm),
    "haste_GRU": Golden("gru", norms.NONE, haste_gru),
    "haste_GRU_zoneout_train": Golden("gru", norms.NONE, haste_gru),
    "haste_LayerNormGRU": Golden("gru", norms.HASTE, haste_layer_norm_gru),
    "haste_LayerNormGRU_zoneout_train": Golden("gru", norms.HASTE, haste_layer_norm_gru),
    "haste_IndRNN": Golden("indrnn", norms.NONE, haste_indrnn),
    "haste_IndRNN_zoneout_train": Golden("indrnn", norms.NONE, haste_indrnn),
    "haste_LayerNormIndRNN": Golden("indrnn", norms.HASTE, haste_layer_norm_indrnn),
    "haste_LayerNormIndRNN_zoneout_train": Golden("indrnn", norms.HASTE, haste_layer_norm_indrnn),
    "torch_custom_lstms_LayerNormLSTMCell": Golden("lstm", norms.FASTRNNS, fastrnns_lstm),
    "icefall_LayerNormLSTMCell_proj": Golden("lstm", norms.ICEFALL, icefall_lstm),
    "sheeprl_LayerNormGRUCell": Golden("gru", replace(norms.SHEEPRL, inner_bias=True), sheeprl_gru),
}


def same(name: str, got: Tensor, want: Tensor) -> None:
    assert_close(got, want, rtol=1e-12, atol=1e-12, msg=lambda text: f"{name}: {text}")


def test_every_file_is_read():
    assert {path.stem for path in GOLDEN.glob("*.npz")} == set(FILES)


@pytest.mark.parametrize("backend", backends.names())
@pytest.mark.parametrize("name", FILES)
def test_golden(name, backend):
    golden = FILES[name]
    layer = LayerSpec(CELLS[golden.cell], golden.norm, projected="proj" in name)
    if reason := backends.get(backend).can_run(Case(layer, torch.float64, torch.device("cpu"))):
        pytest.skip(f"{backend}: {reason}")
    arrays = np.load(GOLDEN / f"{name}.npz")
    held = {key: torch.from_numpy(arrays[key]) for key in arrays.files if key != "meta"}
    meta = json.loads(str(arrays["meta"]))
    rate = 0.0 if meta.get("training") else meta.get("zoneout", 0.0)  # in training the mask says it all
    takes_new = held.pop("input/zoneout_mask", None)
    theirs = {key: tensor.requires_grad_() for key, tensor in held.items() if key.startswith(("param/", "input/"))}

    state = tuple(theirs[key].unsqueeze(0) for key in ("input/h0", "input/c0") if key in theirs)
    with backends.use(backend):
        output, state_n = functional.layer(
            golden.cell,
            theirs["input/x"],
            golden.read({key.removeprefix("param/"): theirs[key] for key in theirs}),
            state if len(state) > 1 else state[0],
            norm=golden.norm,
            zoneout=rate,
            zoneout_mask=None if takes_new is None else takes_new.unsqueeze(0) == 0,
        )
        got = dict(zip(("y", "h_n", "c_n"), (output, *(s[0] for s in (state_n if len(state) > 1 else [state_n])))))
        assert {f"output/{key}" for key in got} == {key for key in held if key.startswith("output/")}
        for key, value in got.items():
            same(key, value, held[f"output/{key}"])
        total = sum((value * held[f"cotangent/{key}"]).sum() for key, value in got.items())
        gradients = torch.autograd.grad(total, list(theirs.values()), materialize_grads=True)
    assert {f"grad/{key}" for key in theirs} == {key for key in held if key.startswith("grad/")}
    for key, gradient in zip(theirs, gradients, strict=True):
        same(f"the gradient of {key}", gradient, held[f"grad/{key}"])


def test_another_placement_of_the_norms_is_found_out():
    """The same weights under FASTRNNS, where haste's plan belongs, are far off: the comparison can fail."""
    held = np.load(GOLDEN / "haste_LayerNormLSTM.npz")
    p = {key.removeprefix("param/"): torch.from_numpy(held[key]) for key in held.files if key.startswith("param/")}
    x, h, c = (torch.from_numpy(held[f"input/{key}"]) for key in ("x", "h0", "c0"))
    output, _ = functional.layer("lstm", x, haste_layer_norm_lstm(p), (h[None], c[None]), norm=norms.FASTRNNS)
    assert (output - torch.from_numpy(held["output/y"])).abs().max() > 0.1
